"""Training plan: optimiser, schedule, logging, and randomness that depends on seed, epoch and batch only."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from scvi import settings
from scvi.module.base import BaseModuleClass, LossOutput
from torch import Tensor

from ._schedules import SCHEDULES

__all__ = ["CellweaveTrainingPlan"]

# Streams of the per-batch seeds, so that training and validation never share draws.
_TRAIN, _VALIDATION = 0, 1


class CellweaveTrainingPlan(LightningModule):
    """Optimise a module with AdamW and log every loss term once per epoch.

    Masks, dropout and other draws of a training batch are seeded from (seed, epoch, batch), those of a validation batch
    from (seed, batch), so that a resumed run continues the trajectory and validation curves are comparable over epochs.

    Parameters
    ----------
    module
        Module whose forward returns a :class:`scvi.module.base.LossOutput` as third output.
    lr
        Peak learning rate.
    weight_decay
        Weight decay of matrices; biases, norms and embeddings of single vectors are not decayed.
    betas, eps
        AdamW constants; the ``eps`` of torch, not the 0.01 of the scvi-tools plan.
    warmup_steps
        Steps of linear warm-up; a twentieth of all steps, at most 500, by default.
    schedule
        ``"cosine"`` falls to 1 % of ``lr`` at the last step, ``"constant"`` stays.
    compile
        Compile the forward with :func:`torch.compile`.
    compile_kwargs
        Keyword arguments of :func:`torch.compile`.

    Raises
    ------
    ValueError
        If the schedule is unknown.
    RuntimeError
        In training, if the loss is not finite; names the step and the term.
    """

    _forward: Callable[[dict[str, Any]], tuple[Any, Any, LossOutput]]

    def __init__(
        self,
        module: BaseModuleClass,
        *,
        lr: float = 1e-3,
        weight_decay: float = 3e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        warmup_steps: int | None = None,
        schedule: Literal["cosine", "constant"] = "cosine",
        compile: bool = False,
        compile_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if schedule not in SCHEDULES:
            raise ValueError(f"`schedule` must be one of {sorted(SCHEDULES)}, got {schedule!r}.")
        self.module = module
        self.lr, self.weight_decay, self.betas, self.eps = lr, weight_decay, betas, eps
        self.warmup_steps, self.schedule = warmup_steps, schedule
        forward = torch.compile(module, **(compile_kwargs or {})) if compile else module
        # not registered as a second submodule: checkpoints hold the weights once, compiled or not
        object.__setattr__(self, "_forward", forward)
        self.seed = settings.seed if settings.seed is not None else secrets.randbits(32)
        self.n_obs_training: int | None = None  # both are set by the scvi-tools runner
        self.n_obs_validation: int | None = None

    def on_fit_start(self) -> None:
        """Leave the evaluation mode in which scvi-tools puts modules after training and loading."""
        self.module.train()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """One optimiser step."""
        # not the optimiser step, which is the same for all batches whose gradients are accumulated
        self._seed_batch(_TRAIN, self.current_epoch, batch_idx)
        output = self._forward(batch)[2]
        if not torch.isfinite(output.loss):
            terms = ", ".join(f"{name}={value.item():.4g}" for name, value in output.extra_metrics.items())
            raise RuntimeError(
                f"The loss is not finite at step {self.global_step} (epoch {self.current_epoch}; {terms}); lower `lr`, "
                "use `precision='32-true'`, or look for extreme values in the data."
            )
        self._log(output, "train")
        return output.loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Loss and metrics of one validation batch."""
        self._seed_batch(_VALIDATION, 0, batch_idx)
        self._log(self._forward(batch)[2], "validation")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW over matrices (decayed) and vectors (not decayed), scheduled per step."""
        trainable = [p for p in self.module.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trainable if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
        ]
        # one pass over the weights; under mixed precision Lightning cannot clip gradients of the fused optimiser
        fused = "mixed" not in self.trainer.precision
        optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=fused)
        n_total = int(self.trainer.estimated_stepping_batches)
        n_warmup = min(500, n_total // 20) if self.warmup_steps is None else self.warmup_steps
        # a partial, not a lambda: trained models keep their trainer and must survive pickle
        factor = partial(SCHEDULES[self.schedule], n_warmup=n_warmup, n_total=n_total)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _seed_batch(self, stream: int, epoch: int, batch_idx: int) -> None:
        entropy = [self.seed, stream, epoch, batch_idx, self.global_rank]
        state = np.random.SeedSequence(entropy).generate_state(1, np.uint64)
        torch.manual_seed(int(state[0] >> np.uint64(1)))

    def _log(self, output: LossOutput, split: Literal["train", "validation"]) -> None:
        options = {"on_step": False, "on_epoch": True, "sync_dist": True, "batch_size": max(1, output.n_obs_minibatch)}
        self.log(f"{split}_loss", output.loss.detach(), prog_bar=True, **options)
        self.log_dict({f"{name}_{split}": value for name, value in output.extra_metrics.items()}, **options)
