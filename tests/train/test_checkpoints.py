"""Checkpoints: written whole, kept in twos, found again, refused when they are damaged or of another run."""

from __future__ import annotations

import logging
import math
import os
import random
import re
import signal
import threading

import pytest
import scvi
import torch
from lightning.pytorch import Callback

from cellweave.model import StackModel
from cellweave.train import CheckpointError, StopSignals, find_checkpoint, read_checkpoint

NAMES = ["epoch000001-batch00000002.ckpt", "epoch000002-batch00000000.ckpt"]


@pytest.fixture(scope="module")
def create(make_adata, tiny):
    """Function that creates a model on fresh data: ``create(n_cells=96, seed=0, **model_options)``."""

    def make(n_obs=96, seed=0, data_seed=0, **options) -> StackModel:
        scvi.settings.seed = seed
        adata = make_adata(n_obs, seed=data_seed)
        StackModel.setup_anndata(adata)
        return StackModel(adata, **{**tiny, **options})

    return make


@pytest.fixture
def run(quick, tmp_path):
    """Arguments of a run of two epochs of three steps with a checkpoint after every step."""
    return {**quick, "checkpoint_dir": tmp_path / "checkpoints", "checkpoint_minutes": 0}


class At(Callback):
    """Calls a function at the start of a step."""

    def __init__(self, step: int, function) -> None:
        self.step, self.function, self.n = step, function, 0

    def on_train_batch_start(self, trainer, plan, batch, batch_idx):
        self.n += 1
        if self.n == self.step:
            self.function(trainer, plan)


def _files(run) -> list[str]:
    return sorted(path.name for path in run["checkpoint_dir"].iterdir())


# ---------------------------------------------------------------- writing


def test_last_two_are_kept_and_load_without_code(create, run):
    """Protects the disk and the reader: two files, each readable with `weights_only=True`, nothing half-written."""
    create().train(**run)
    assert _files(run) == NAMES
    for name in NAMES:
        content = torch.load(run["checkpoint_dir"] / name, weights_only=True)
        assert {"state_dict", "optimizer_states", "lr_schedulers", "loops", "cellweave"} <= set(content)


def test_no_checkpoint_before_its_time(create, run):
    """Protects speed: with the default of 15 minutes a short run writes one checkpoint, at its end."""
    create().train(**{**run, "checkpoint_minutes": 15.0})
    assert _files(run) == NAMES[1:]


def test_write_that_fails_leaves_the_previous_checkpoint(create, run, monkeypatch):
    """Protects against a full disk or a kill while writing: the names that count hold whole files only."""
    import cellweave.train._checkpoints as module

    real = os.replace
    calls = []

    def fail(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError("No space left on device")
        real(source, target)

    monkeypatch.setattr(module.os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        create().train(**run)
    assert [name for name in _files(run) if name.endswith(".ckpt")] == ["epoch000000-batch00000001.ckpt"]
    create().train(**run, resume="auto")  # removes the rest of the failed write
    assert _files(run) == NAMES


def test_weights_that_are_not_finite_are_not_saved(create, run):
    """Protects the last good checkpoint: a step that ruins the weights is not written over it."""

    def ruin(trainer, plan):
        plan.module.output_mlp[3].bias.register_hook(lambda gradient: gradient * math.nan)

    with pytest.raises(RuntimeError, match="not finite at step 5"):
        create().train(**run, callbacks=[At(5, ruin)])
    for name in _files(run):
        weights = torch.load(run["checkpoint_dir"] / name, weights_only=True)["state_dict"]
        assert all(torch.isfinite(value).all() for value in weights.values()), name


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_damaged_newest_falls_back_to_the_one_before(create, run, damage):
    """Protects resume: a truncated, altered or empty newest file is named in a warning and not used."""
    whole = create()
    whole.train(**run)
    newest = run["checkpoint_dir"] / NAMES[1]
    content = bytearray(newest.read_bytes())
    weights = torch.load(newest, weights_only=True)["state_dict"]["module.output_mlp.3.weight"]
    content[content.find(weights.numpy().tobytes()) + 5] ^= 1
    newest.write_bytes({"cut": content[: len(content) // 2], "flip": content, "empty": b""}[damage])
    resumed, counter = create(), At(10**9, None)
    with pytest.warns(UserWarning, match=f"{re.escape(NAMES[1])}.* is damaged.*The checkpoint before it is used"):
        resumed.train(**run, callbacks=[counter], resume="auto")
    assert counter.n == 1
    for name, value in whole.module.state_dict().items():
        assert torch.equal(value, resumed.module.state_dict()[name])


def test_flipped_bits_are_noticed(create, run):
    """Protects resume from silent damage: of 60 random single-bit flips none that matters goes unnoticed.

    Flips between the parts of the file, where torch pads, change nothing that is read.
    """
    create().train(**run)
    path = run["checkpoint_dir"] / NAMES[1]
    content, whole, rng, n_refused = path.read_bytes(), read_checkpoint(path), random.Random(0), 0
    for _ in range(60):
        damaged = bytearray(content)
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            read = read_checkpoint(path)
        except CheckpointError as error:
            assert "damaged" in str(error)
            n_refused += 1
        else:
            assert repr(read.content) == repr(whole.content)
            for key in ("state_dict", "optimizer_states"):
                torch.testing.assert_close(read.content[key], whole.content[key], rtol=0, atol=0)
    assert n_refused > 30


def test_empty_or_absent_directory_starts_fresh(create, run, tmp_path):
    """Protects `resume="auto"` in a script that is started for the first time."""
    assert find_checkpoint(tmp_path / "nowhere") is None
    create().train(**run, resume="auto")
    assert _files(run) == NAMES


@pytest.mark.parametrize(
    ("model", "train", "named"),
    [
        ({"n_layers": 2}, {}, r"`n_layers` of the model \(1 there, 2 here\)"),
        ({"n_obs": 90}, {}, r"number of cells \(96 there, 90 here\), cell names .*split of the cells"),
        ({"seed": 5}, {}, r"seed \(0 there, 5 here\), split of the cells"),
        ({}, {"max_epochs": 3}, r"max_epochs \(2 there, 3 here\); continue"),
        ({}, {"batch_size": 64}, r"contexts per step \(2 there, 4 here\); continue"),
        ({}, {"train_size": 0.5}, r"split of the cells"),
        ({}, {"lr": 0.5}, r"lr \(0.001 there, 0.5 here\); continue"),
    ],
    ids=lambda value: "",
)
def test_checkpoint_of_another_run_is_refused(create, run, model, train, named):
    """Protects against a wrong continuation: one sentence that says what differs, before anything is changed."""
    create().train(**run)
    other = create(**model)
    before = {name: value.clone() for name, value in other.module.state_dict().items()}
    with pytest.raises(CheckpointError, match=f"belongs to another run, which differs in .*{named}"):
        other.train(**{**run, **train}, resume="auto")
    assert all(torch.equal(value, before[name]) for name, value in other.module.state_dict().items())
    assert not other.is_trained


def test_foreign_file_is_refused(create, quick, tmp_path):
    """Protects `resume=path` from files that are something else, or nothing."""
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match="is not a checkpoint of a cellweave training run"):
        create().train(**quick, resume=tmp_path / "other.ckpt")
    with pytest.raises(FileNotFoundError, match="There is no checkpoint"):
        create().train(**quick, resume=tmp_path / "none.ckpt")


def test_options_that_contradict_each_other(create, quick, run, tmp_path):
    """Protects against mixed-up runs: "auto" without a directory, a used directory, no seed, the former argument."""
    with pytest.raises(ValueError, match="`resume='auto'` needs `checkpoint_dir`"):
        create().train(**quick, resume="auto")
    create().train(**run)
    with pytest.raises(ValueError, match="holds checkpoints of an earlier run; continue it with `resume='auto'`"):
        create().train(**run)
    model = create()
    scvi.settings._seed = None
    with pytest.raises(ValueError, match="`checkpoint_dir` needs `scvi.settings.seed`"):
        model.train(**{**run, "checkpoint_dir": tmp_path / "new"})
    with pytest.raises(TypeError, match="`ckpt_path` is now `resume`"):
        model.train(**quick, ckpt_path="x.ckpt")


# ---------------------------------------------------------------- interruptions


def test_not_finite_loss_names_rows_and_checkpoint_and_keeps_the_weights(create, run):
    """Protects row 45 of the fault table: step, term, rows of the batch, last finite checkpoint; weights as before."""
    seen = {}

    def poison(trainer, plan):
        plan.module.objectives[0].weight = math.nan
        seen.update({name: value.clone() for name, value in plan.module.state_dict().items()})

    model = create()
    with pytest.raises(RuntimeError) as caught:
        model.train(**run, callbacks=[At(5, poison)])
    pattern = (
        r"The loss is not finite at step 4 \(epoch 1; recon_loss=[\d.]+, sw_loss=[\d.]+; rows (\d+, ){5}\.\.\.\); lower "
        r"`lr`, .* in the data; the last finite checkpoint is `.*epoch000001-batch00000001\.ckpt`\."
    )
    assert re.fullmatch(pattern, str(caught.value))
    assert all(torch.equal(value, seen[name]) for name, value in model.module.state_dict().items())
    assert not model.is_trained
    assert list(model.history["train_loss"].index) == [0]


@pytest.mark.parametrize(("signum", "error"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_signal_ends_the_run_after_the_step(create, run, signum, error):
    """Protects row 46 of the fault table: the step is finished and saved, handlers are restored, state is truthful."""
    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    model = create()
    with pytest.raises(error) as caught:
        model.train(**{**run, "checkpoint_minutes": 15}, callbacks=[At(2, lambda *_: os.kill(os.getpid(), signum))])
    if signum == signal.SIGTERM:
        assert caught.value.code == 143
    assert _files(run) == ["epoch000000-batch00000002.ckpt"]
    assert handlers == [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    assert not model.is_trained
    assert not model.module.training
    model.train(**run, resume="auto")
    assert model.is_trained


def test_handler_of_the_user_is_called(create, quick):
    """Protects programs with a SIGTERM handler of their own: it runs once, after training, and is back afterwards."""
    called = []

    def handler(signum, frame):
        called.append(signum)

    before = signal.signal(signal.SIGTERM, handler)
    try:
        with pytest.raises(SystemExit):
            create().train(**quick, callbacks=[At(2, lambda *_: os.kill(os.getpid(), signal.SIGTERM))])
        assert called == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_second_ctrl_c_interrupts_at_once():
    """Protects the impatient: the first signal waits for the step, the second one does not."""
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_training_in_a_thread_leaves_signals_alone(create, quick):
    """Protects servers: only the main thread may handle signals; training elsewhere works without."""
    model = create()
    thread = threading.Thread(target=model.train, kwargs=quick)
    thread.start()
    thread.join()
    assert model.is_trained


# ---------------------------------------------------------------- silence


def test_training_is_quiet(create, quick, capfd, caplog):
    """Protects the user's screen: no hardware lines, tips or bars where nobody looks; the levels come back."""
    names = ("lightning.pytorch", "lightning.fabric")
    model = create()
    capfd.readouterr()
    levels = [logging.getLogger(name).level for name in names]
    caplog.clear()
    options = {key: value for key, value in quick.items() if key != "enable_progress_bar"}
    model.train(**options, train_size=1.0)
    out = capfd.readouterr()
    assert out.out == ""
    assert out.err == ""
    assert [record.message for record in caplog.records if record.name.startswith("lightning")] == []
    assert [logging.getLogger(name).level for name in names] == levels


def test_bar_for_a_person(create, quick, capfd, monkeypatch):
    """Protects feedback: on a terminal there is one bar, with the speed."""
    monkeypatch.setattr("cellweave.model._training.wants_progress_bar", lambda: True)
    options = {key: value for key, value in quick.items() if key != "enable_progress_bar"}
    create().train(**options)
    shown = "".join(capfd.readouterr())
    assert "Epoch 2/2" in shown
    assert "cells/s" in shown
