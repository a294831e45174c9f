"""Exact resume: a run that was stopped and continued ends with the weights and curves of one that was not."""

from __future__ import annotations

import os
import signal

import numpy as np
import pandas as pd
import pytest
import scvi
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from cellweave.model import StackModel

# 76 to 86 training cells in contexts of 8, two contexts per step: five or six steps an epoch, three epochs.
RUN = {"max_epochs": 3, "batch_size": 16, "accelerator": "cpu", "enable_progress_bar": False, "lr": 0.01}


class Send(Callback):
    """Sends a signal to this process at the start of a step."""

    def __init__(self, step: int, signum: int = signal.SIGTERM) -> None:
        self.step, self.signum, self.n = step, signum, 0

    def on_train_batch_start(self, trainer, plan, batch, batch_idx):
        self.n += 1
        if self.n == self.step:
            os.kill(os.getpid(), self.signum)


@pytest.fixture(scope="module")
def create(make_adata, tiny):
    """Function that creates a model on fresh data, with the same initial weights every time."""

    def make(**options) -> StackModel:
        scvi.settings.seed = 0
        adata = make_adata()
        StackModel.setup_anndata(adata, batch_key="batch", context_key="donor")
        return StackModel(adata, **{**tiny, "n_cells": 8, "dropout": 0.1, **options})

    return make


@pytest.fixture(scope="module")
def whole(create):
    """Function that trains without interruption: ``whole(**options)``; runs of the same options are shared."""
    done = {}

    def train(**options) -> StackModel:
        key = repr(options)
        if key not in done:
            done[key] = create()
            done[key].train(**{**RUN, **options})
        return done[key]

    return train


def _assert_same(first: StackModel, second: StackModel) -> None:
    """Weights and curves agree bit for bit."""
    for name, value in first.module.state_dict().items():
        assert torch.equal(value, second.module.state_dict()[name]), name
    assert set(first.history) == set(second.history)
    for name, frame in first.history.items():
        pd.testing.assert_frame_equal(second.history[name], frame, check_exact=True)


def _stop_and_resume(create, directory, step: int, **options) -> StackModel:
    with pytest.raises(SystemExit):
        create().train(**{**RUN, **options}, callbacks=[Send(step)], checkpoint_dir=directory)
    resumed = create()
    torch.manual_seed(99)  # another state, as in a new process, and other weights
    np.random.seed(99)
    with torch.no_grad():
        for parameter in resumed.module.parameters():
            parameter.normal_()
    resumed.train(**{**RUN, **options}, checkpoint_dir=directory, resume="auto")
    return resumed


@pytest.mark.parametrize("step", [1, 3, 6, 7, 11, 12])
def test_stopped_at_any_step(create, whole, tmp_path, step):
    """Protects exact resume inside an epoch and at its end, dropout and a validation set included."""
    _assert_same(whole(), _stop_and_resume(create, tmp_path, step))


@pytest.mark.parametrize(
    ("step", "options"),
    [
        (2, {"train_size": 1.0}),
        (4, {"accumulate_grad_batches": 2}),
        (7, {"accumulate_grad_batches": 4}),
        (3, {"early_stopping": True, "early_stopping_patience": 1, "early_stopping_min_delta": 100.0}),
        (8, {"datasplitter_kwargs": {"num_workers": 2}}),
        (8, {"check_val_every_n_epoch": 2}),
        (3, {"val_check_interval": 0.5}),
    ],
    ids=[
        "no-validation",
        "accumulate",
        "accumulate-over-the-end",
        "early-stopping",
        "workers",
        "every-2",
        "half-epochs",
    ],
)
def test_stopped_in_other_kinds_of_runs(create, whole, tmp_path, step, options):
    """Protects exact resume with gradient accumulation, early stopping, workers and rarer or more frequent validation."""
    _assert_same(whole(**options), _stop_and_resume(create, tmp_path, step, **options))


def test_stopped_again_and_again(create, whole, tmp_path):
    """Protects preemptible machines: a run that is stopped after every second step still ends the same."""
    for _ in range(20):
        model = create()
        try:
            model.train(**RUN, callbacks=[Send(2)], checkpoint_dir=tmp_path, resume="auto")
        except SystemExit:
            assert not model.is_trained
            continue
        break
    _assert_same(whole(), model)


def test_resumed_in_the_same_model(create, whole, tmp_path):
    """Protects notebooks: Ctrl-C, then `train` on the same object with `resume="auto"`."""
    model = create()
    with pytest.raises(KeyboardInterrupt):
        model.train(**RUN, callbacks=[Send(9, signal.SIGINT)], checkpoint_dir=tmp_path)
    assert list(model.history["train_loss"].index) == [0]
    assert not model.is_trained
    assert len(model.train_indices) + len(model.validation_indices) == 96
    model.train(**RUN, checkpoint_dir=tmp_path, resume="auto")
    assert model.is_trained
    _assert_same(whole(), model)


def test_second_run_is_resumed_with_the_history_of_the_first(create, tmp_path):
    """Protects further training: after resume, the curves of the earlier run are still there, and epochs count on."""
    models = []
    for stop in (False, True):
        model = create()
        model.train(**{**RUN, "max_epochs": 1})
        if stop:
            with pytest.raises(SystemExit):
                model.train(**RUN, callbacks=[Send(8)], checkpoint_dir=tmp_path)
            assert model.is_trained  # by the first run
            model = create()
        model.train(**RUN, checkpoint_dir=tmp_path if stop else None, resume="auto" if stop else None)
        models.append(model)
    assert list(models[1].history["train_loss"].index) == [0, 1, 2, 3]
    _assert_same(*models)


def test_finished_run_is_not_trained_again(create, whole, tmp_path):
    """Protects scripts that are started again: the finished run is restored, with no further step."""
    create().train(**RUN, checkpoint_dir=tmp_path)
    again, counter = create(), Send(10**9)
    again.train(**RUN, callbacks=[counter], checkpoint_dir=tmp_path, resume="auto")
    assert counter.n == 0
    assert again.is_trained
    assert not again.module.training
    _assert_same(whole(), again)


def test_run_that_stopped_early_is_finished(create, tmp_path):
    """Protects early stopping: what stopped by itself is not continued to `max_epochs`."""
    options = {**RUN, "early_stopping": True, "early_stopping_patience": 1, "early_stopping_min_delta": 100.0}
    create().train(**options, checkpoint_dir=tmp_path)
    again = create()
    again.train(**options, checkpoint_dir=tmp_path, resume="auto")
    assert list(again.history["train_loss"].index) == [0, 1]


def test_checkpoint_of_lightning_inside_an_epoch(create, whole, tmp_path):
    """Protects users of `ModelCheckpoint`: its files continue exactly as well."""
    callback = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    create().train(**RUN, callbacks=[callback])
    resumed = create()
    resumed.train(**RUN, resume=tmp_path / "step=8.ckpt")
    _assert_same(whole(), resumed)


def test_checkpoints_do_not_change_the_run(create, whole, tmp_path):
    """Protects the trajectory: a run that writes a checkpoint after every step ends like one that writes none."""
    model = create()
    model.train(**RUN, checkpoint_dir=tmp_path, checkpoint_minutes=0)
    _assert_same(whole(), model)
