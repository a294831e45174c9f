"""Training that fails or is stopped, for every model family."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback


class Stop(Callback):
    """Ctrl-C in the first step."""

    def on_train_batch_end(self, *args: object) -> None:
        raise KeyboardInterrupt


@pytest.fixture
def untrained(family, make):
    """A model of the family before training."""
    return family.create(make())


def test_loss_that_is_not_finite(untrained, family, monkeypatch):
    """Protects row 45: one sentence names step, term and rows; the weights are those before the step."""
    weights = {name: weight.clone() for name, weight in untrained.module.state_dict().items()}
    loss = untrained.module.loss

    def broken(*args, **kwargs):
        output = loss(*args, **kwargs)
        output.loss = output.loss * torch.nan
        return output

    monkeypatch.setattr(untrained.module, "loss", broken)
    with pytest.raises(RuntimeError, match=r"^The loss is not finite at step 0 \(epoch 0; .*=.*; rows \d+.*\); lower"):
        family.train(untrained, train_size=1.0, early_stopping=False)
    assert not untrained.is_trained
    assert all(torch.equal(weight, weights[name]) for name, weight in untrained.module.state_dict().items())


def test_interrupted_training(untrained, family):
    """Protects row 46: the model says that it is not trained, keeps working, and can be trained again."""
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        family.train(untrained, callbacks=[Stop()])
    assert not untrained.is_trained
    family.train(untrained)
    assert untrained.is_trained
    assert all(np.isfinite(values).all() for values in family.results(untrained).values())
