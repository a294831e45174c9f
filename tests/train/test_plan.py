"""The training plan: optimiser, schedule, and the checks of a step."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback

from cellweave.model import StackModel
from cellweave.module import StackModule
from cellweave.train import CellweaveTrainingPlan, warmup_constant, warmup_cosine


class Record(Callback):
    """Keeps what each training step used."""

    def __init__(self) -> None:
        self.lrs, self.modes, self.steps = [], [], 0

    def on_train_batch_start(self, trainer, plan, batch, batch_idx):
        self.lrs.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.modes.append({module.training for module in plan.module.modules()})
        self.steps += 1


@pytest.fixture
def model(make_adata, tiny) -> StackModel:
    adata = make_adata()
    StackModel.setup_anndata(adata)
    return StackModel(adata, **tiny)


# ---------------------------------------------------------------- schedules


def test_cosine_values():
    """Protects the schedule: linear warm-up, 1 at its end, half-way mean at half-time, the floor from the end on."""
    rates = [warmup_cosine(step, n_warmup=4, n_total=24) for step in range(30)]
    np.testing.assert_allclose(rates[:4], [0.2, 0.4, 0.6, 0.8])
    assert rates[4] == 1
    assert rates[14] == pytest.approx((1 + 0.01) / 2)
    assert rates[24:] == pytest.approx([0.01] * 6)
    assert all(a > b for a, b in zip(rates[4:24], rates[5:25], strict=True))


def test_constant_values():
    """Protects the schedule: linear warm-up, then the full rate for ever."""
    np.testing.assert_allclose([warmup_constant(s, 3, 10) for s in (0, 1, 2, 3, 4, 50)], [0.25, 0.5, 0.75, 1, 1, 1])


@pytest.mark.parametrize("schedule", [warmup_cosine, warmup_constant])
@pytest.mark.parametrize(("n_warmup", "n_total"), [(0, 1), (0, 10), (5, 5), (10, 5)])
def test_short_runs_have_a_positive_rate(schedule, n_warmup, n_total):
    """Protects runs of a few steps: no division by zero, every rate in (0, 1]."""
    assert all(0 < schedule(step, n_warmup, n_total) <= 1 for step in range(12))


def test_rates_of_a_run_follow_the_schedule(model, quick):
    """Protects the wiring: the schedule advances by optimiser step over exactly the steps of the run."""
    record = Record()
    model.train(**{**quick, "max_epochs": 4}, lr=0.02, warmup_steps=3, callbacks=[record])
    expected = [0.02 * warmup_cosine(step, 3, record.steps) for step in range(record.steps)]
    np.testing.assert_allclose(record.lrs, expected)


def test_default_warm_up_is_a_twentieth(model, quick):
    """Protects the default: 3 of 60 steps warm up."""
    record = Record()
    model.train(**{**quick, "max_epochs": 20}, lr=0.01, train_size=1.0, callbacks=[record])
    assert len(record.lrs) == 60
    assert np.argmax(record.lrs) == 60 // 20


def test_unknown_schedule_is_refused(tiny):
    """Protects against a misspelt schedule."""
    with pytest.raises(ValueError, match=r"`schedule` must be one of \['constant', 'cosine'\], got 'linear'"):
        CellweaveTrainingPlan(StackModule(5, **tiny), schedule="linear")


# ---------------------------------------------------------------- optimiser


def test_matrices_decay_and_vectors_do_not(model, quick):
    """Protects the groups: every weight in exactly one, biases and norms without decay; the eps of torch."""
    model.train(**quick, weight_decay=0.25)
    (optimizer,) = model.trainer.optimizers
    decayed, plain = optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.25, 0.0)
    assert all(p.ndim > 1 for p in decayed["params"])
    assert all(p.ndim <= 1 for p in plain["params"])
    expected = sorted(map(id, model.module.parameters()))
    assert sorted(map(id, decayed["params"] + plain["params"])) == expected
    assert type(optimizer) is torch.optim.AdamW
    assert decayed["eps"] == plain["eps"] == 1e-8
    assert decayed["betas"] == (0.9, 0.999)


def test_frozen_weights_stay_as_they_are(model, quick):
    """Protects freezing: weights that need no gradient get neither updates nor decay."""
    frozen = model.module.gene_reduction[0].weight.requires_grad_(False)
    before = frozen.clone()
    model.train(**quick, weight_decay=0.5)
    assert torch.equal(frozen, before)


def test_plan_arguments_reach_the_plan(model, quick):
    """Protects `plan_kwargs`: unknown names fail at once, known ones override."""
    model.train(**quick, plan_kwargs={"eps": 1e-6, "schedule": "constant"})
    assert model.trainer.optimizers[0].param_groups[0]["eps"] == 1e-6
    with pytest.raises(TypeError, match="unexpected keyword argument 'epsilon'"):
        model.train(**quick, plan_kwargs={"epsilon": 1e-6})


# ---------------------------------------------------------------- modes


def test_every_run_trains_in_train_mode(model, quick, tmp_path):
    """Protects dropout (trap of scvi-tools): the first run, the second, and one after loading are in train mode."""
    record = Record()
    model.train(**quick, callbacks=[record])
    model.train(**quick, callbacks=[record])
    model.save(tmp_path / "model")
    loaded = StackModel.load(tmp_path / "model", model.adata, accelerator="cpu")
    loaded.train(**quick, callbacks=[record])
    assert record.steps == 3 * 2 * 3
    assert record.modes == [{True}] * record.steps
    assert not any(module.training for module in loaded.module.modules())


def test_dropout_is_active_in_the_second_run(make_adata, tiny, quick):
    """Protects what train mode is for: a second run with dropout differs from one without."""
    weights = []
    for dropout in (0.0, 0.5):
        adata = make_adata()
        StackModel.setup_anndata(adata)
        model = StackModel(adata, **tiny, dropout=0.0)
        torch.manual_seed(0)
        model.module.reset_parameters()
        model.train(**quick)
        for module in model.module.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = dropout
        model.train(**quick)
        weights.append(torch.cat([p.detach().flatten() for p in model.module.parameters()]))
    assert not torch.allclose(weights[0], weights[1])


def test_validation_runs_in_eval_mode(make_adata, tiny, quick):
    """Protects validation losses: no dropout in them, and training mode is restored for the next epoch."""
    adata = make_adata()
    StackModel.setup_anndata(adata)
    modes = {"validation": [], "train": []}

    class Modes(Callback):
        def on_validation_batch_start(self, trainer, plan, *_):
            modes["validation"].append(plan.module.training)

        def on_train_batch_start(self, trainer, plan, *_):
            modes["train"].append(plan.module.training)

    StackModel(adata, **tiny, dropout=0.3).train(**quick, callbacks=[Modes()])
    assert set(modes["validation"]) == {False}
    assert set(modes["train"]) == {True}


# ---------------------------------------------------------------- faults


def test_loss_that_is_not_finite_stops_with_one_sentence(model, quick):
    """Protects the user from a tensor dump: step, epoch, term and advice in one sentence; the model stays untrained."""

    class Poison(Callback):
        def on_train_batch_start(self, trainer, plan, batch, batch_idx):
            if trainer.global_step == 4:
                with torch.no_grad():
                    plan.module.output_mlp[3].bias.fill_(math.nan)

    with pytest.raises(RuntimeError) as caught:
        model.train(**quick, callbacks=[Poison()])
    message = str(caught.value)
    assert message.startswith("The loss is not finite at step 4 (epoch 1; recon_loss=nan, sw_loss=")
    assert message.endswith(".")
    assert "lower `lr`" in message
    assert "\n" not in message
    assert not model.is_trained


def test_accumulated_batches_draw_their_own_masks(model, quick, monkeypatch):
    """Protects gradient accumulation: batches of one optimiser step differ in their random draws."""
    masks = []
    from cellweave.module import _stack

    draw = _stack.sample_gene_mask
    monkeypatch.setattr(_stack, "sample_gene_mask", lambda *args: masks.append(draw(*args)) or masks[-1])
    model.train(**{**quick, "max_epochs": 1}, train_size=1.0, accumulate_grad_batches=3)
    assert len(masks) == 3
    assert len({tuple(mask.tolist()) for mask in masks}) == 3


def test_compiled_training_equals_eager_training(make_adata, tiny, quick, tmp_path):
    """Protects `compile=True`: the same weights after training, under the same names, also in checkpoints."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    states = []
    for compiled in (False, True):
        torch.compiler.reset()
        adata = make_adata()
        StackModel.setup_anndata(adata)
        torch.manual_seed(0)
        model = StackModel(adata, **tiny)
        checkpoint = ModelCheckpoint(tmp_path, filename=str(compiled))
        options = {"compile": True, "plan_kwargs": {"compile_kwargs": {"backend": "eager"}}} if compiled else {}
        model.train(**quick, callbacks=[checkpoint], **options)
        states.append(torch.load(tmp_path / f"{compiled}.ckpt", weights_only=True)["state_dict"])
    assert list(states[1]) == [f"module.{name}" for name, _ in model.module.named_parameters()]
    torch.testing.assert_close(states[0], states[1])


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_precision(model, quick, precision):
    """Protects other precisions: finite losses, and getters that work afterwards, in float32."""
    model.train(**quick, precision=precision)
    assert {p.dtype for p in model.module.parameters()} == {torch.float32}
    assert np.isfinite(model.history["train_loss"].to_numpy(dtype=float)).all()
    assert np.isfinite(model.get_latent_representation()).all()
