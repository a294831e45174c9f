"""Averaged weights: the formula, where they are used, and runs that are stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import scvi
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from cellweave.model import StackModel
from cellweave.train import ExponentialMovingAverage, fsdp_strategy, read_checkpoint

RUN = {"max_epochs": 2, "batch_size": 16, "accelerator": "cpu", "enable_progress_bar": False, "lr": 0.01}
# the last step still moves the weights, so that they differ from their average
RUN["plan_kwargs"] = {"schedule": "constant"}
DECAY = 0.8


class Watch(Callback):
    """Weights after every step, and those that were validated."""

    def __init__(self) -> None:
        self.steps: list[list[torch.Tensor]] = []
        self.validated: list[list[torch.Tensor]] = []

    def on_train_start(self, trainer, plan):
        self.steps.append([p.detach().clone() for p in plan.parameters()])

    def on_train_batch_end(self, trainer, plan, outputs, batch, batch_idx):
        if trainer.global_step == len(self.steps):
            self.steps.append([p.detach().clone() for p in plan.parameters()])

    def on_validation_batch_start(self, trainer, plan, batch, batch_idx, dataloader_idx=0):
        self.validated.append([p.detach().clone() for p in plan.parameters()])


class Fail(Callback):
    """Does something at the start of a step, or of a validation batch."""

    def __init__(self, step: int, act, validation: bool = False) -> None:
        self.step, self.act, self.validation, self.n = step, act, validation, 0

    def _count(self):
        self.n += 1
        if self.n == self.step:
            self.act()

    def on_train_batch_start(self, trainer, plan, batch, batch_idx):
        if not self.validation:
            self._count()

    def on_validation_batch_start(self, trainer, plan, batch, batch_idx, dataloader_idx=0):
        if self.validation:
            self._count()


def _kill(signum: int = signal.SIGTERM):
    return lambda: os.kill(os.getpid(), signum)


def _break():
    raise RuntimeError("broken")


@pytest.fixture(scope="module")
def create(make_adata, tiny):
    """Function that creates a model on fresh data, with the same initial weights every time."""

    def make() -> StackModel:
        scvi.settings.seed = 0
        adata = make_adata()
        StackModel.setup_anndata(adata, batch_key="batch", context_key="donor")
        return StackModel(adata, **{**tiny, "n_cells": 8, "dropout": 0.1})

    return make


@pytest.fixture(scope="module")
def train(create):
    """Function that trains a new model with averaged weights: ``train(*callbacks, **options)``."""

    def run(*callbacks: Callback, decay: float = DECAY, model: StackModel | None = None, **options) -> StackModel:
        model = model or create()
        model.train(**{**RUN, **options}, callbacks=[ExponentialMovingAverage(decay), *callbacks])
        return model

    return run


@pytest.fixture(scope="module")
def whole(train):
    """A run that was never stopped."""
    return train()


def _average(steps: list[list[torch.Tensor]], decay: float) -> list[torch.Tensor]:
    """The formula, in double precision."""
    mean = [w.double() for w in steps[0]]
    for n, weights in enumerate(steps[1:]):
        d = min(decay, (1 + n) / (10 + n))
        mean = [d * m + (1 - d) * w.double() for m, w in zip(mean, weights, strict=True)]
    return mean


def _assert_close(weights, expected):
    for weight, value in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.detach().double(), value, rtol=1e-5, atol=1e-7)


def _assert_same(first: StackModel, second: StackModel) -> None:
    """Weights and curves agree bit for bit."""
    for name, value in first.module.state_dict().items():
        assert torch.equal(value, second.module.state_dict()[name]), name
    assert set(first.history) == set(second.history)
    for name, frame in first.history.items():
        pd.testing.assert_frame_equal(second.history[name], frame, check_exact=True)


@pytest.mark.parametrize(
    ("decay", "options"), [(DECAY, {}), (0.999, {}), (0.0, {}), (DECAY, {"accumulate_grad_batches": 2})]
)
def test_the_average_is_that_of_the_formula(train, decay, options):
    """Protects the formula with its warm-up, one update per optimiser step, and what is validated and left at the end."""
    watch = Watch()
    model = train(watch, decay=decay, **options)
    assert len(watch.steps) > 6
    expected = _average(watch.steps, decay)
    _assert_close(model.module.parameters(), expected)
    _assert_close(watch.validated[-1], expected)  # the last validation follows the last step
    moved = max(float((w - e).abs().max()) for w, e in zip(watch.steps[-1], expected, strict=True))
    assert moved < 1e-7 if decay == 0 else moved > 1e-3


def test_the_average_does_not_change_the_training(create, train):
    """Protects the trajectory: weights after every step are those of a run without the average."""
    with_average, alone = Watch(), Watch()
    train(with_average)
    create().train(**RUN, callbacks=[alone])
    for ours, theirs in zip(with_average.steps, alone.steps, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("step", "options"),
    [
        (1, {}),
        (3, {}),
        (6, {}),
        (7, {}),
        (12, {}),
        (4, {"accumulate_grad_batches": 2}),
        (3, {"val_check_interval": 0.5}),
    ],
)
def test_stopped_and_resumed(create, train, whole, tmp_path, step, options):
    """Protects exact resume: stopped at any step, the last one included, weights and curves end bit-equal."""
    expected = train(**options) if options else whole
    with pytest.raises(SystemExit):
        train(Fail(step, _kill()), checkpoint_dir=tmp_path, **options)
    other = create()
    with torch.no_grad():
        for parameter in other.module.parameters():
            parameter.normal_()
    _assert_same(expected, train(model=other, checkpoint_dir=tmp_path, resume="auto", **options))


def test_last_step_of_the_run_is_among_them(whole, train):
    """Protects the test above: its step 12 is the last one, after which a resumed run has nothing to train."""
    counter = Fail(10**9, _break)
    train(counter)
    assert counter.n == 12


def test_finished_and_early_checkpoints_hold_the_average(train, whole, tmp_path):
    """Protects scripts that are started again, and users who read weights from a checkpoint of Lightning."""
    watch = Watch()
    callback = ModelCheckpoint(tmp_path / "lightning", filename="{step}", every_n_train_steps=4, save_top_k=-1)
    train(watch, callback, checkpoint_dir=tmp_path)
    again = train(checkpoint_dir=tmp_path, resume="auto")
    _assert_same(whole, again)
    state = read_checkpoint(tmp_path / "lightning" / "step=8.ckpt").content["state_dict"]
    _assert_close([w for w in state.values() if w.is_floating_point()], _average(watch.steps[:9], DECAY))
    _assert_same(whole, train(resume=tmp_path / "lightning" / "step=8.ckpt"))


def test_limit_of_steps_is_resumed_to_the_same_end(train, tmp_path):
    """Protects runs that are limited by `max_steps`, whose finished checkpoint Lightning opens again."""
    done = train(max_steps=7, checkpoint_dir=tmp_path)
    _assert_same(done, train(max_steps=7, checkpoint_dir=tmp_path, resume="auto"))


@pytest.mark.parametrize(
    ("callback", "error"),
    [
        (Fail(8, _kill(signal.SIGINT)), KeyboardInterrupt),
        (Fail(8, _break), RuntimeError),
        (Fail(2, _break, validation=True), RuntimeError),
    ],
    ids=["ctrl-c", "error", "error-in-validation"],
)
def test_interrupted_training_leaves_the_average(create, train, callback, error):
    """Protects Ctrl-C and errors: the module holds the average up to then, whichever weights it held at that moment."""
    model, watch = create(), Watch()
    with pytest.raises(error):
        train(watch, callback, model=model)
    assert len(watch.steps) > 5
    _assert_close(model.module.parameters(), _average(watch.steps, DECAY))


def test_the_second_set_of_weights_is_freed(create):
    """Protects memory: a trained model keeps its callbacks, but not the weights of the last step."""
    callback = ExponentialMovingAverage()
    create().train(**RUN, callbacks=[callback])
    assert callback.state_dict() == {}


def test_one_callback_serves_two_runs(create):
    """Protects users who keep the callback: the second run starts a new average."""
    callback, weights = ExponentialMovingAverage(DECAY), []
    for _ in range(2):
        model = create()
        model.train(**RUN, callbacks=[callback])
        weights.append([p.detach().clone() for p in model.module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_bad_decay(decay):
    """Protects against a decay that would never move, or run away."""
    with pytest.raises(ValueError, match=r"`decay` must be in \[0, 1\), got .*; 0.999 averages"):
        ExponentialMovingAverage(decay)


def test_checkpoint_of_another_average_is_refused(create, train, tmp_path):
    """Protects resume: without the average, or with another decay, the end would silently be another one."""
    with pytest.raises(SystemExit):
        train(Fail(3, _kill()), checkpoint_dir=tmp_path / "averaged")
    with pytest.raises(ValueError, match=r"written with `decay`=0.8, got 0.5; continue it with the same\.$"):
        train(decay=0.5, checkpoint_dir=tmp_path / "averaged", resume="auto")
    with pytest.raises(SystemExit):
        create().train(**RUN, callbacks=[Fail(3, _kill())], checkpoint_dir=tmp_path / "plain")
    with pytest.raises(ValueError, match=r"has no averaged weights, which `decay`=0.8 asks for; continue it without"):
        train(checkpoint_dir=tmp_path / "plain", resume="auto")


def test_weights_that_cannot_be_averaged(create):
    """Protects against an average that stands still in bfloat16, and against shards."""
    with pytest.raises(ValueError, match=r"cannot average \d+ weights in half precision \(first: 'module"):
        create().train(**{**RUN, "precision": "bf16-true"}, callbacks=[ExponentialMovingAverage()])
    callback = ExponentialMovingAverage()
    trainer = type("Trainer", (), {"strategy": fsdp_strategy()})()
    with pytest.raises(ValueError, match="cannot average weights that FSDP shards; train without one of them"):
        callback.setup(trainer, None, "fit")


class _Tied(torch.nn.Module):
    """A weight with two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(2, 2, bias=False)
        self.second = torch.nn.Linear(2, 2, bias=False)
        self.second.weight = self.first.weight


def test_weights_in_two_places():
    """Protects tied weights: both of their names hold the average in a checkpoint."""
    module, callback = _Tied(), ExponentialMovingAverage(0.0)
    trainer = type("Trainer", (), {"strategy": None, "global_step": 1})()
    callback.setup(trainer, module, "fit")
    callback.on_train_start(trainer, module)
    with torch.no_grad():
        module.first.weight.fill_(2.0)
    checkpoint = {"state_dict": {k: v.clone() for k, v in module.state_dict().items()}}
    callback.on_save_checkpoint(trainer, module, checkpoint)
    assert set(checkpoint["state_dict"]) == {"first.weight", "second.weight"}
    assert not any((value == 2.0).any() for value in checkpoint["state_dict"].values())


SCRIPT = """
import json, sys
sys.path.insert(0, sys.argv[3])
from train_together import simulate, stack
import scvi, torch
from cellweave.train import ExponentialMovingAverage
folder, devices = sys.argv[1], int(sys.argv[2])
scvi.settings.seed = 0
model = stack(simulate())
parallel = {"strategy": "ddp"} if devices > 1 else {}
model.train(max_epochs=2, batch_size=32 // devices, accelerator="cpu", devices=devices, lr=0.01, enable_progress_bar=False,
            callbacks=[ExponentialMovingAverage(0.8)], **parallel)
rank = model.trainer.global_rank
torch.save(model.module.state_dict(), f"{folder}/{devices}-{rank}.pt")
history = {name: frame.iloc[:, 0].tolist() for name, frame in model.history.items()}
open(f"{folder}/{devices}-{rank}.json", "w").write(json.dumps(history))
"""


@pytest.mark.ddp
@pytest.mark.slow
def test_processes_hold_the_same_average(tmp_path):
    """Protects DDP: both processes end with the same average, and it is that of one process."""
    script, helper = tmp_path / "run.py", Path(__file__).parents[1] / "ddp"
    script.write_text(SCRIPT)
    environment = {k: v for k, v in os.environ.items() if k not in ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK")}
    for devices in ("1", "2"):
        command = [sys.executable, str(script), str(tmp_path), devices, str(helper)]
        run = subprocess.run(command, capture_output=True, text=True, timeout=540, env=environment, cwd=tmp_path)
        assert run.returncode == 0, run.stderr
    alone, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    assert all(torch.equal(first[name], value) for name, value in second.items())
    for name, value in alone.items():
        torch.testing.assert_close(first[name], value, rtol=1e-3, atol=1e-4)
    curves = [json.loads((tmp_path / f"{name}.json").read_text())["validation_loss"] for name in ("1-0", "2-0")]
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
