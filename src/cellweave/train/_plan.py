"""Training plan: optimiser, schedule, history, and randomness that depends on seed, epoch and batch only."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from scvi import settings
from scvi.module.base import BaseModuleClass, LossOutput
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel

from cellweave._keys import LOADER_KEYS, STEP_KEYS
from cellweave.objective import derive_seed

from ._history import History
from ._means import EpochMeans
from ._schedules import SCHEDULES

__all__ = ["CHECKPOINT_KEY", "CellweaveTrainingPlan"]

# What a Lightning checkpoint holds beyond Lightning's own state stands under this key.
CHECKPOINT_KEY = "cellweave"

# Streams of the per-batch seeds, so that training and validation never share draws.
_STREAMS = {"train": 0, "validation": 1}

# Rows of a failing batch that its message names.
_ROWS_NAMED = 5

Split = Literal["train", "validation"]


class CellweaveTrainingPlan(LightningModule):
    """Optimise a module with AdamW and log every loss term once per epoch.

    Masks, dropout and other draws of a training batch are seeded from (seed, epoch, batch), those of a validation batch
    from (seed, batch), so that a resumed run continues the trajectory and validation curves are comparable over epochs.
    Processes that train together draw what concerns the whole step alike, see ``STEP_KEYS``.

    Every checkpoint that Lightning writes of this plan also holds the history, the sums behind the means of the running
    epoch and the fingerprint of the run, so that training can continue from it at any step.

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

    Attributes
    ----------
    history
        Values by name and epoch, earlier runs of the model included.
    fingerprint
        What identifies the run; stored in checkpoints.
    last_checkpoint
        Newest checkpoint with finite weights, named when the loss stops being finite.

    Raises
    ------
    ValueError
        If the schedule is unknown.
    RuntimeError
        In training, if the loss is not finite; names step, term and rows. The weights are those before the step.
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
        self.history = History()
        self.fingerprint: dict[str, str] = {}
        self.last_checkpoint: str | None = None
        # asked now: strategies that shard the weights flatten them
        self._matrices = {name for name, parameter in module.named_parameters() if parameter.ndim > 1}
        self._means: dict[str, EpochMeans] = {split: EpochMeans() for split in _STREAMS}
        self._epoch_start = time.monotonic()

    # ---------------------------------------------------------------- steps

    def on_fit_start(self) -> None:
        """Leave the evaluation mode in which scvi-tools puts modules after training and loading."""
        self.module.train()
        self._epoch_start = time.monotonic()

    def on_train_start(self) -> None:
        """Announce an epoch that a checkpoint continues in its middle, which Lightning does not do."""
        self.on_train_epoch_start()

    def on_train_epoch_start(self) -> None:
        """Tell a module whose loss follows a schedule which epoch begins."""
        start_epoch = getattr(self.module, "start_epoch", None)
        if start_epoch is not None:
            start_epoch(self.current_epoch)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Let a module take back gradients of parameters that this step shall leave alone."""
        select_gradients = getattr(self.module, "select_gradients", None)
        if select_gradients is not None:
            select_gradients()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """One optimiser step."""
        # not the optimiser step, which is the same for all batches whose gradients are accumulated
        batch = self._prepare(batch, "train", self.current_epoch, batch_idx)
        output = self._forward(batch)[2]
        self._check_finite(output, batch)
        self._add("train", output, batch)
        return output.loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Loss and metrics of one validation batch."""
        batch = self._prepare(batch, "validation", 0, batch_idx)
        self._add("validation", self._forward(batch)[2], batch)

    def _prepare(self, batch: dict[str, Any], split: Split, epoch: int, batch_idx: int) -> dict[str, Any]:
        """Seed the draws of a batch; where processes share the step, say which part of it this one has."""
        seed = derive_seed(self.seed, _STREAMS[split], epoch, batch_idx)
        self._seed_layers(derive_seed(seed, self.global_rank))
        batch = {**batch, STEP_KEYS.SEED: torch.tensor(seed)}
        if self.trainer.world_size == 1:
            return batch
        valid = batch[LOADER_KEYS.VALID].view(-1, batch[LOADER_KEYS.N_CELLS])
        mean = self._across_processes(torch.stack([valid.sum(), valid.any(1).sum()]).float())
        # samplers deal the contexts of a step to the processes in turns
        position = torch.arange(len(valid)) * self.trainer.world_size + self.global_rank
        return {
            **batch,
            STEP_KEYS.POSITION: position,
            STEP_KEYS.CELLS_PER_PROCESS: mean[0],
            STEP_KEYS.CONTEXTS_PER_PROCESS: mean[1],
        }

    def _seed_layers(self, seed: int) -> None:
        """Seed dropout, which draws from the global generator of its device."""
        # torch.manual_seed would also look at all other kinds of devices, which takes longer than a small layer
        torch.default_generator.manual_seed(seed)
        if self.device.type != "cpu":
            torch.get_device_module(self.device).manual_seed(seed)

    def _check_finite(self, output: LossOutput, batch: dict[str, Any]) -> None:
        finite = torch.isfinite(output.loss)
        if self.trainer.world_size > 1:  # all processes stop, or those left would wait for ever
            finite = self._across_processes(finite.float()) == 1
        if finite:
            return
        terms = ", ".join(f"{name}={value.item():.4g}" for name, value in output.extra_metrics.items())
        rows = batch.get(LOADER_KEYS.ROW)
        place = f"epoch {self.current_epoch}; {terms}"
        if rows is not None:
            place += f"; rows {', '.join(map(str, rows[:_ROWS_NAMED].tolist()))}" + (
                ", ..." * (len(rows) > _ROWS_NAMED)
            )
        last = f"; the last finite checkpoint is `{self.last_checkpoint}`" if self.last_checkpoint else ""
        raise RuntimeError(
            f"The loss is not finite at step {self.global_step} ({place}); lower `lr`, "
            f"use `precision='32-true'`, or look for extreme values in the data{last}."
        )

    # ---------------------------------------------------------------- history

    def _add(self, split: Split, output: LossOutput, batch: dict[str, Any]) -> None:
        terms = {f"{split}_loss": output.loss, **{f"{k}_{split}": v for k, v in output.extra_metrics.items()}}
        per_process = batch.get(STEP_KEYS.CELLS_PER_PROCESS, output.n_obs_minibatch)
        self._means[split].add(terms, per_process * self.trainer.world_size)

    def on_validation_epoch_end(self) -> None:
        """Log the means over the validation cells."""
        self._log_epoch("validation", keep=not self.trainer.sanity_checking)

    def on_train_epoch_end(self) -> None:
        """Log the means over the training cells, the learning rate and the speed."""
        self._log_epoch("train")
        now = time.monotonic()
        if self.n_obs_training:
            speed = self.n_obs_training / max(now - self._epoch_start, 1e-9)
            self.trainer.progress_bar_metrics["cells/s"] = float(round(speed))
        self._epoch_start = now

    def _log_epoch(self, split: Split, keep: bool = True) -> None:
        means = self._means[split]
        values = means.compute(self._across_processes) if means else {}
        means.reset()
        if split == "train":
            values["lr"] = self.trainer.optimizers[0].param_groups[0]["lr"]
        self._announce(values, f"{split}_loss")
        if keep:
            for name, value in values.items():
                self.history.add(name, self.current_epoch, value)
            for logger in self.trainer.loggers:
                logger.log_metrics({**values, "epoch": self.current_epoch}, max(self.global_step - 1, 0))
                logger.save()

    def _announce(self, values: dict[str, float], in_progress_bar: str) -> None:
        """Where callbacks and the progress bar look.

        ``log`` does the same, but reduces values over batches and processes first; these are reduced, and on a few cells it
        takes longer than an optimiser step.
        """
        trainer = self.trainer
        tensors = {name: torch.tensor(value, device=self.device) for name, value in values.items()}
        trainer.callback_metrics.update(tensors)
        trainer.logged_metrics.update(tensors)
        if in_progress_bar in values:
            trainer.progress_bar_metrics[in_progress_bar] = values[in_progress_bar]

    def _across_processes(self, values: Tensor) -> Tensor:
        """Average over processes; the same in all of them."""
        return self.trainer.strategy.reduce(values, reduce_op="mean") if self.trainer.world_size > 1 else values

    # ---------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what an exact resume needs beyond the state that Lightning keeps."""
        checkpoint[CHECKPOINT_KEY] = {
            "fingerprint": dict(self.fingerprint),
            "history": self.history.state_dict(),
            "means": self._means["train"].state_dict(self._across_processes),
            "finished": self._is_finished(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continue the history and the running means."""
        state = checkpoint[CHECKPOINT_KEY]
        self.history.load_state_dict(state["history"])
        self._means["train"].load_state_dict(state["means"])

    def _is_finished(self) -> bool:
        """Whether nothing is left to train; asked between steps and after epochs."""
        n_epochs = epoch_counts(self.trainer)["processed"]
        all_epochs = self.trainer.max_epochs not in (None, -1) and n_epochs >= (self.trainer.max_epochs or 0)
        return all_epochs or (self.trainer.should_stop and n_epochs >= (self.trainer.min_epochs or 0))

    # ---------------------------------------------------------------- optimiser

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip gradients; by their norm over all shards where weights are sharded, which Lightning leaves to us."""
        root = self.trainer.strategy.model
        if isinstance(root, FullyShardedDataParallel) and gradient_clip_algorithm in (None, "norm"):
            if gradient_clip_val:
                root.clip_grad_norm_(gradient_clip_val)
            return
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW over matrices (decayed) and vectors (not decayed), scheduled per step."""
        groups: list[dict[str, Any]] = [
            {"params": [], "weight_decay": self.weight_decay},
            {"params": [], "weight_decay": 0.0},
        ]
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                groups[_plain(name) not in self._matrices]["params"].append(parameter)
        # one pass over the weights; under mixed precision Lightning cannot clip gradients of the fused optimiser
        fused = "mixed" not in self.trainer.precision
        optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=fused)
        n_total = int(self.trainer.estimated_stepping_batches)
        n_warmup = min(500, n_total // 20) if self.warmup_steps is None else self.warmup_steps
        # a partial, not a lambda: trained models keep their trainer and must survive pickle
        factor = partial(SCHEDULES[self.schedule], n_warmup=n_warmup, n_total=n_total)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def epoch_counts(trainer: Trainer) -> dict[str, int]:
    """How many epochs are ``ready``, ``started``, ``processed`` (their steps and validation) and ``completed``."""
    return trainer.fit_loop.epoch_progress.current.state_dict()


def _plain(name: str) -> str:
    """Name of a parameter before FSDP wrapped its module."""
    return name.replace("_fsdp_wrapped_module.", "")
