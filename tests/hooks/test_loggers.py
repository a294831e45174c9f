"""Loggers of Lightning (MLflow, Weights & Biases, ...) beside the history of the model."""

from __future__ import annotations

import csv
import pickle

import lightning.pytorch as pl
import pandas as pd
import pytest
import scvi
from lightning.pytorch.loggers import CSVLogger, Logger

from cellweave.model import StackModel


class Recorder(Logger):
    """Keeps what it is told, and spoils the dictionary it was told with, as some loggers do."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name, self.rows, self.status = name, [], None

    @property
    def name(self) -> str:
        return self._name

    @property
    def version(self) -> str:
        return "7"

    @property
    def experiment(self) -> str:
        return f"experiment of {self._name}"

    def log_metrics(self, metrics, step=None) -> None:
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, params, *args, **kwargs) -> None:
        pass

    def finalize(self, status: str) -> None:
        self.status = status


@pytest.fixture
def train(make_adata, tiny, quick):
    """Function that trains the same tiny model with other options: ``train(logger=...)``."""

    def fit(**options) -> StackModel:
        scvi.settings.seed = 0
        adata = make_adata()
        StackModel.setup_anndata(adata, batch_key="batch")
        model = StackModel(adata, **tiny)
        model.train(**quick, **options)
        return model

    return fit


def _assert_same_history(first: StackModel, second: StackModel) -> None:
    assert first.history.keys() == second.history.keys()
    for name, frame in first.history.items():
        pd.testing.assert_frame_equal(frame, second.history[name])


def test_several_loggers_receive_every_metric(train):
    """Protects loggers: each of them gets all curves with their epochs, and the history is that of a plain run."""
    first, second = Recorder("first"), Recorder("second")
    model = train(logger=[first, second])
    _assert_same_history(train(), model)
    assert first.rows == second.rows
    assert first.status == second.status == "success"
    for name, frame in model.history.items():
        logged = [(metrics["epoch"], metrics[name]) for _, metrics in first.rows if name in metrics]
        assert dict(logged) == pytest.approx(frame[name].to_dict()), name  # the history keeps more digits


def test_callbacks_and_the_progress_bar_see_the_metrics_of_the_epoch(train):
    """Protects early stopping, searches over hyper-parameters and the bar: what the history gets, they find in the trainer."""
    seen = []

    class Look(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module) -> None:
            seen.append(
                (dict(trainer.callback_metrics), dict(trainer.progress_bar_metrics), dict(trainer.logged_metrics))
            )

    model = train(callbacks=[Look()])
    for name in ("train_loss", "validation_loss", "lr"):
        curve = model.history[name][name].tolist()
        # callbacks come before the plan at the end of training, after it at the end of validation
        shift = 0 if name == "validation_loss" else 1
        for place in (0, 2) if name == "lr" else (0, 1, 2):
            found = [float(metrics[place][name]) for metrics in seen[shift:]]
            assert found == pytest.approx(curve[: len(found)]), (name, place)
    assert float(model.trainer.callback_metrics["train_loss"]) == pytest.approx(model.history["train_loss"].iloc[-1, 0])
    assert model.trainer.progress_bar_metrics["cells/s"] >= 0


def test_one_logger_need_not_be_in_a_list(train, tmp_path):
    """Protects the usual call `train(logger=CSVLogger(...))`: the file has every curve, the history too."""
    model = train(logger=CSVLogger(tmp_path, name="run", version="v"))
    _assert_same_history(train(), model)
    with (tmp_path / "run" / "v" / "metrics.csv").open() as file:
        rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
    for name, frame in model.history.items():
        logged = {row["epoch"]: row[name] for row in rows if name in row}
        assert logged == pytest.approx(frame[name].to_dict()), name


@pytest.mark.parametrize("logger", [False, True])
def test_switches_of_lightning(train, tmp_path, logger):
    """Protects `logger=False` (nothing on disk) and `logger=True` (Lightning's own choice): the history stays."""
    model = train(logger=logger, default_root_dir=str(tmp_path))
    _assert_same_history(train(), model)
    assert any(tmp_path.rglob("*")) == logger


def test_history_goes_on_when_training_goes_on(train, quick):
    """Protects the second call of `train` with a logger: epochs continue, all curves are there."""
    model = train(logger=[Recorder("a")])
    model.train(**quick, logger=[Recorder("b")])
    assert all(list(frame.index) == [0, 1, 2, 3] for frame in model.history.values())
    pickle.loads(pickle.dumps(model))


def test_history_of_a_failed_run_is_kept(train):
    """Protects the curves of a run that ends with an error: what was logged is in the history."""

    class Stop(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module) -> None:
            if trainer.current_epoch == 1:
                raise RuntimeError("stopped on purpose")

    recorder, caught = Recorder("a"), []

    class Catch(pl.Callback):
        def on_exception(self, trainer, pl_module, exception) -> None:
            caught.append(trainer._model)

    with pytest.raises(RuntimeError, match="stopped on purpose"):
        train(logger=recorder, callbacks=[Stop(), Catch()])
    assert list(caught[0].history["train_loss"].index)[:1] == [0]
    assert recorder.status == "failed"


def test_callbacks_find_the_logger_of_the_user(train, tmp_path):
    """Protects callbacks and checkpoints: directory, name and experiment are those of the user's first logger."""
    seen = {}

    class Look(pl.Callback):
        def on_train_start(self, trainer, pl_module) -> None:
            seen["experiment"], seen["name"] = pl_module.logger.experiment, pl_module.logger.name
            seen["log_dir"] = trainer.log_dir

    train(logger=[Recorder("mine"), CSVLogger(tmp_path)], callbacks=[Look()])
    assert seen["experiment"] == "experiment of mine"
    assert seen["name"] == "mine"


def test_checkpoints_go_where_the_logger_says(train, tmp_path):
    """Protects the default place of Lightning's checkpoints: the run directory of the user's logger."""
    train(logger=CSVLogger(tmp_path, name="run", version="v"), callbacks=[pl.callbacks.ModelCheckpoint()])
    assert list((tmp_path / "run" / "v" / "checkpoints").glob("*.ckpt"))


def test_wrong_logger_is_named(train):
    """Protects against a cryptic error inside Lightning: what is not a logger is named."""
    with pytest.raises(TypeError, match="`logger` must hold loggers of Lightning, got 'mlflow'"):
        train(logger=["mlflow"])


def test_mlflow_settings_of_scvi_tools_are_refused_before_training(train, monkeypatch):
    """Protects a long run: the report of scvi-tools would fail after it, so a sentence before it says what to do."""
    monkeypatch.setattr(scvi.settings, "mlflow_set_tracking_uri", "sqlite:///mlruns.db")
    with pytest.raises(ValueError, match="set it to '' and pass `logger=MLFlowLogger"):
        train()


@pytest.mark.slow
def test_mlflow(train, tmp_path):
    """Protects `MLFlowLogger`: the run holds the last value of every curve. Runs where MLflow is installed."""
    for package in ("mlflow", "alembic"):
        pytest.importorskip(package, reason="MLflow with its database is not installed")
    from lightning.pytorch.loggers import MLFlowLogger

    logger = MLFlowLogger("cellweave", tracking_uri=f"sqlite:///{tmp_path}/mlruns.db")
    model = train(logger=logger)
    metrics = logger.experiment.get_run(logger.run_id).data.metrics
    for name, frame in model.history.items():
        assert metrics[name] == pytest.approx(frame[name].iloc[-1]), name


@pytest.mark.slow
def test_wandb(train, tmp_path):
    """Protects `WandbLogger` offline: the run is written, the history stays. Runs where W&B is installed."""
    wandb = pytest.importorskip("wandb", reason="Weights & Biases is not installed")
    from lightning.pytorch.loggers import WandbLogger

    model = train(logger=WandbLogger(project="cellweave", save_dir=tmp_path, offline=True))
    summary = wandb.run.summary
    for name, frame in model.history.items():
        assert summary[name] == pytest.approx(frame[name].iloc[-1]), name
    wandb.finish()
    assert list(tmp_path.rglob("*.wandb"))
