"""Training through the model: history, stopping, random state, reproducibility, exact resume."""

from __future__ import annotations

import random

import numpy as np
import pandas as pd
import pytest
import scvi
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from cellweave.model import StackModel
from cellweave.module import StackModule
from cellweave.train import CheckpointError

TERMS = {
    "train_loss",
    "validation_loss",
    "recon_loss_train",
    "recon_loss_validation",
    "sw_loss_train",
    "sw_loss_validation",
    "masked_mae_validation",
    "masked_corr_validation",
    "lr",
}


@pytest.fixture
def create(make_adata, tiny):
    """Function that creates a model on fresh data, with the same initial weights every time."""

    def make(**options) -> StackModel:
        scvi.settings.seed = 0
        adata = make_adata()
        StackModel.setup_anndata(adata, batch_key="batch", context_key="donor")
        return StackModel(adata, **{**tiny, "dropout": 0.1, **options})

    return make


def _weights(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.module.state_dict().items()}


def _equal(first, second) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


# ---------------------------------------------------------------- history


def test_history_holds_every_term_of_every_epoch(create, quick):
    """Protects the curves: one finite row per epoch and term; validation runs without being asked for."""
    model = create()
    model.train(**{**quick, "max_epochs": 3})
    assert set(model.history) == TERMS
    for name, frame in model.history.items():
        assert list(frame.columns) == [name]
        assert list(frame.index) == [0, 1, 2]
        assert frame.index.name == "epoch"
        assert np.isfinite(frame[name].to_numpy()).all()


def test_loss_in_the_history_is_the_sum_of_its_terms(create, quick):
    """Protects the bookkeeping: epoch averages of the terms add up to the logged loss, weighted by valid cells."""
    model = create(sw_weight=0.25)
    model.train(**quick)
    for part in ("train", "validation"):
        total = model.history[f"recon_loss_{part}"].iloc[:, 0] + 0.25 * model.history[f"sw_loss_{part}"].iloc[:, 0]
        np.testing.assert_allclose(model.history[f"{part}_loss"].iloc[:, 0], total, rtol=1e-5)


def test_validation_terms_are_means_over_valid_cells(create, quick, monkeypatch):
    """Protects early stopping: the logged value is the average over cells, each once, fillings not counted."""
    seen = []
    module_loss = StackModule.loss

    def loss(self, tensors, *args):
        output = module_loss(self, tensors, *args)
        if not self.training:
            seen.append((int(tensors["valid"].sum()), output.extra_metrics["masked_mae"].item()))
        return output

    monkeypatch.setattr(StackModule, "loss", loss)
    model = create()
    model.train(**{**quick, "max_epochs": 1}, validation_size=0.5)
    n_valid, values = map(np.array, zip(*seen, strict=True))
    assert len(n_valid) > 1
    assert n_valid.sum() == len(model.validation_indices) == 48
    logged = model.history["masked_mae_validation"]["masked_mae_validation"].item()
    assert logged == pytest.approx((n_valid * values).sum() / 48, rel=1e-5)


def test_second_run_appends_to_the_history(create, quick):
    """Protects further training: epochs are numbered on, also after loading is simulated by a second call."""
    model = create()
    model.train(**quick)
    model.train(**quick)
    for frame in model.history.values():
        assert list(frame.index) == [0, 1, 2, 3]


def test_no_validation_cells_no_validation_terms(create, quick):
    """Protects `train_size=1`: training works and logs its own terms only."""
    model = create()
    model.train(**quick, train_size=1.0)
    assert set(model.history) == {name for name in TERMS if name.endswith("_train") or name in ("train_loss", "lr")}
    assert len(model.validation_indices) == 0


def test_training_lowers_the_loss(create, quick):
    """Protects the whole loop: the validation loss falls clearly (0.22 to 0.60 nats for five seeds)."""
    model = create(dropout=0.0)
    model.train(**{**quick, "max_epochs": 40}, lr=2e-2, validation_size=0.3)
    loss = model.history["validation_loss"]["validation_loss"].to_numpy()
    assert loss[-1] < loss[0] - 0.15


# ---------------------------------------------------------------- stopping and callbacks


def test_early_stopping_watches_the_validation_loss(create, quick):
    """Protects `early_stopping=True`: it stops on `validation_loss` (scvi-tools would look for an ELBO)."""
    model = create()
    options = {"early_stopping_patience": 1, "early_stopping_min_delta": 100.0}
    model.train(**{**quick, "max_epochs": 30}, early_stopping=True, **options)
    assert model.trainer.early_stopping_callback.monitor == "validation_loss"
    assert len(model.history["train_loss"]) == 2


def test_early_stopping_needs_validation_cells(create, quick):
    """Protects against a run that can never stop: a clear refusal before training."""
    with pytest.raises(ValueError, match="`early_stopping=True` needs validation cells; set `validation_size`"):
        create().train(**quick, early_stopping=True, train_size=1.0)


def test_callbacks_of_the_user_are_not_changed(create, quick):
    """Protects reuse (trap of scvi-tools): the list given as `callbacks` works for a second run."""
    callbacks = [Callback()]
    model = create()
    for _ in range(2):
        model.train(**{**quick, "enable_progress_bar": True}, early_stopping=True, callbacks=callbacks)
    assert len(callbacks) == 1


def test_checkpoints_of_scvi_tools_are_safe_model_directories(create, quick, tmp_path):
    """Protects `SaveCheckpoint` of scvi-tools: it writes through our `save`, and the result loads."""
    model = create()
    checkpoint = scvi.train.SaveCheckpoint(dirpath=str(tmp_path / "best"), monitor="validation_loss")
    model.train(**quick, callbacks=[checkpoint])
    loaded = StackModel.load(checkpoint.best_model_path, accelerator="cpu")
    assert loaded.module.n_genes == 20


def test_interrupted_training_is_truthful(create, quick):
    """Protects Ctrl-C: a first run that is interrupted leaves an untrained model that can be trained again."""

    class Interrupt(Callback):
        def on_train_epoch_start(self, trainer, plan):
            if trainer.current_epoch == 1:
                raise KeyboardInterrupt

    model = create()
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        model.train(**quick, callbacks=[Interrupt()])
    assert not model.is_trained
    model.train(**quick)
    assert model.is_trained


# ---------------------------------------------------------------- random state


def test_same_seed_gives_the_same_weights(create, quick):
    """Protects reproducibility: two runs in one process agree bit for bit; another seed does not."""
    weights = []
    for seed in (0, 0, 1):
        model = create()
        scvi.settings.seed = seed
        model.train(**quick)
        weights.append(_weights(model))
    assert _equal(weights[0], weights[1])
    assert not _equal(weights[0], weights[2])


def test_random_state_before_training_does_not_matter(create, quick):
    """Protects reproducibility: training reads the seed, never the global generators."""
    weights = []
    for noise in (11, 12):
        model = create()
        torch.manual_seed(noise)
        np.random.seed(noise)
        random.seed(noise)
        model.train(**quick)
        weights.append(_weights(model))
    assert _equal(*weights)


def test_worker_processes_do_not_matter(create, quick):
    """Protects reproducibility: worker processes, spawned as on macOS and Windows, load data and make no draws."""
    spawned = {"num_workers": 1, "multiprocessing_context": "spawn", "persistent_workers": True}
    weights = []
    for options in ({}, spawned):
        model = create()
        model.train(**quick, train_size=1.0, datasplitter_kwargs=options)
        weights.append(_weights(model))
    assert _equal(*weights)


@pytest.mark.parametrize("fails", [False, True])
def test_training_leaves_the_random_state_alone(create, quick, fails):
    """Protects the user's own draws: numpy and torch continue as if no training had happened, even if it failed."""

    class Fail(Callback):
        def on_train_epoch_end(self, trainer, plan):
            np.random.rand(7)
            if fails:
                raise ZeroDivisionError

    model = create()
    before = (np.random.get_state(), torch.get_rng_state())
    if fails:
        with pytest.raises(ZeroDivisionError):
            model.train(**quick, callbacks=[Fail()])
    else:
        model.train(**quick, callbacks=[Fail()])
    np.testing.assert_array_equal(before[0][1], np.random.get_state()[1])
    assert before[0][2] == np.random.get_state()[2]
    assert torch.equal(before[1], torch.get_rng_state())


def test_unseeded_training_differs_from_run_to_run(create, quick):
    """Protects the default of scvi-tools: without a seed, two runs draw different splits and masks."""
    weights = []
    for _ in range(2):
        model = create()
        scvi.settings._seed = None
        model.train(**quick)
        weights.append(_weights(model))
    assert not _equal(*weights)


# ---------------------------------------------------------------- resume


def test_resumed_run_equals_the_uninterrupted_one(create, quick, tmp_path):
    """Protects exact resume: from the checkpoint of epoch 2 of 4, weights end bit-equal to those of the whole run."""
    options = {**quick, "max_epochs": 4}
    whole = create()
    whole.train(**options, callbacks=[ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)])
    resumed = create()
    torch.manual_seed(99)  # another random state, as in a new process
    np.random.seed(99)
    with torch.no_grad():
        for parameter in resumed.module.parameters():
            parameter.normal_()
    resumed.train(**options, resume=tmp_path / "epoch=1.ckpt")
    assert _equal(_weights(whole), _weights(resumed))
    for name, frame in resumed.history.items():
        pd.testing.assert_frame_equal(frame, whole.history[name])


def test_interrupted_run_can_be_resumed(create, quick, tmp_path):
    """Protects long runs: what an interrupted run saved leads to the weights of a run without interruption."""

    class Interrupt(Callback):
        def on_train_epoch_start(self, trainer, plan):
            if trainer.current_epoch == 2:
                raise ZeroDivisionError

    options = {**quick, "max_epochs": 3}
    whole = create()
    whole.train(**options)
    stopped = create()
    with pytest.raises(ZeroDivisionError):
        stopped.train(**options, callbacks=[ModelCheckpoint(tmp_path, filename="last"), Interrupt()])
    resumed = create()
    resumed.train(**options, resume=tmp_path / "last.ckpt")
    assert _equal(_weights(whole), _weights(resumed))


def test_checkpoint_that_would_run_code_is_refused(create, quick, tmp_path):
    """Protects resuming from files of others: a pickle that would run code is not opened."""

    class Payload:
        def __reduce__(self):
            return (tmp_path.joinpath("executed").touch, ())

    torch.save({"state_dict": Payload()}, tmp_path / "bad.ckpt")
    with pytest.raises(CheckpointError, match="`weights_only=True`, so it is damaged or not a checkpoint of cellweave"):
        create().train(**quick, resume=tmp_path / "bad.ckpt")
    assert not (tmp_path / "executed").exists()


# ---------------------------------------------------------------- data of the run


def test_training_reads_its_own_registration(create, quick):
    """Protects a model from a later `setup_anndata` on the same object: it trains on the columns it was made with."""
    plain = create(batch_condition="decoder")
    plain.train(**quick)
    disturbed = create(batch_condition="decoder")
    StackModel.setup_anndata(disturbed.adata, batch_key="donor", context_key="batch")
    disturbed.train(**quick)
    assert _equal(_weights(plain), _weights(disturbed))


def test_split_is_kept_on_the_model(create, quick):
    """Protects evaluation: training, validation and test rows of the run are on the model and partition the cells."""
    model = create()
    model.train(**quick, train_size=0.5, validation_size=0.25)
    parts = [model.train_indices, model.validation_indices, model.test_indices]
    assert list(map(len, parts)) == [48, 24, 24]
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(96))


def test_split_by_context_through_the_model(create, quick):
    """Protects `split_by="context"`: no donor on both sides."""
    model = create()
    model.train(**quick, split_by="context", train_size=0.5)
    donors = model.adata.obs["donor"].to_numpy()
    assert not set(donors[model.train_indices]) & set(donors[model.validation_indices])


def test_context_size_and_mixing_can_be_chosen_for_training(create, quick):
    """Protects `datasplitter_kwargs`: another context size, contexts across donors."""
    seen = []

    class Look(Callback):
        def on_train_batch_start(self, trainer, plan, batch, batch_idx):
            groups = batch["context"].view(-1, batch["n_cells"])
            seen.append((batch["n_cells"], bool((groups != groups[:, :1]).any())))

    model = create()
    model.train(**quick, datasplitter_kwargs={"n_cells": 8, "by_context": False}, callbacks=[Look()])
    assert {n for n, _ in seen} == {8}
    assert any(mixed for _, mixed in seen)


def test_default_number_of_epochs_follows_the_number_of_cells(create, quick, monkeypatch):
    """Protects defaults: about 2,000 steps, between 10 and 400 epochs."""
    model = create()
    assert model._default_epochs(512) == 400
    monkeypatch.setattr("cellweave.model._stack._TARGET_STEPS", 36)
    assert model._default_epochs(32) == 12
    monkeypatch.setattr("cellweave.model._stack._TARGET_STEPS", 1)
    assert model._default_epochs(32) == 10
