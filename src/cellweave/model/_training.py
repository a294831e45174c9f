"""Training through scvi-tools, with its known traps kept away from the user."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lightning.pytorch.callbacks import EarlyStopping
from scvi.model.base import UnsupervisedTrainingMixin

from cellweave import _compat
from cellweave.data import CellSetSplitter
from cellweave.train import (
    CellweaveTrainingPlan,
    CellweaveTrainRunner,
    quiet_lightning,
    wants_progress_bar,
    with_history,
)

__all__ = ["TrainingMixin"]


# Arguments of the loaders that decide which cells meet in which step.
_ORDER = ("n_cells", "by_context", "rule", "block_size", "buffer_size")


class TrainingMixin(UnsupervisedTrainingMixin):
    """Training of every gradient-trained model."""

    _data_splitter_cls = CellSetSplitter
    _training_plan_cls = CellweaveTrainingPlan
    _train_runner_cls = CellweaveTrainRunner

    def _fit(
        self,
        max_epochs: int,
        *,
        splitter: dict[str, Any],
        plan: dict[str, Any],
        trainer: dict[str, Any],
        **options: Any,
    ) -> None:
        """Train through scvi-tools, keeping its known traps away from the user.

        The caller's random state is untouched: all draws of training are seeded by (seed, epoch, batch).
        """
        datamodule = options.get("datamodule")
        if self.adata is None and datamodule is None:
            raise ValueError(
                "This model has no data to train on; load it with `adata=`, create it from an AnnData, or pass `datamodule=`."
            )
        trainer = {**trainer, "callbacks": list(trainer.get("callbacks") or [])}  # scvi-tools appends to the list
        if "log_save_dir" not in trainer or trainer.get("logger") is not None:
            trainer["logger"] = with_history(trainer.get("logger"), trainer.get("default_root_dir"))
        if datamodule is None:
            has_validation = _has_validation(options.get("train_size"), options.get("validation_size"))
        else:
            has_validation = getattr(datamodule, "n_val", 1) > 0
        if has_validation:
            trainer.setdefault("check_val_every_n_epoch", 1)
        trainer.setdefault("early_stopping_monitor", "validation_loss")
        trainer.setdefault("enable_progress_bar", wants_progress_bar())
        if options.get("early_stopping"):
            if not has_validation:
                raise ValueError("`early_stopping=True` needs validation cells; set `validation_size` above 0.")
            options["early_stopping"] = self._early_stopping(trainer)
        if self.adata is not None:
            self._validate_anndata(
                self.adata
            )  # replays our registration if the data were set up for another model since
        with _fork_random_state(), quiet_lightning():
            try:
                super().train(
                    max_epochs=max_epochs,
                    datasplitter_kwargs=splitter,
                    plan_kwargs=plan,
                    **options,
                    **trainer,
                )
            finally:
                self.module.float()  # `precision="64-true"` and the like leave other dtypes behind

    def _run_fingerprint(self, runner: CellweaveTrainRunner) -> dict[str, str]:
        """What a checkpoint must agree in so that continuing it gives the same weights as never having stopped."""
        trainer, plan, splitter = runner.trainer, runner.training_plan, runner.data_splitter
        contexts = dict(getattr(splitter, "data_loader_kwargs", {}))
        per_process = max(1, contexts.get("batch_size", 0) // contexts.get("n_cells", 1))
        splits = [getattr(splitter, name, None) for name in ("train_idx", "val_idx", "test_idx")]
        facts: dict[str, Any] = {
            "model": type(self).__name__,
            **{f"`{name}` of the model": value for name, value in self._constructor_arguments().items()},
            "number of cells": None if self.adata is None else self.adata.n_obs,
            "cell names": None if self.adata is None else _digest(self.adata.obs_names.astype(str)),
            "genes": _digest(self.genes),
            "seed": plan.seed,
            "split of the cells": _digest(np.asarray(rows).tobytes().hex() for rows in splits if rows is not None),
            "max_epochs": trainer.max_epochs,
            "contexts per step": per_process * trainer.world_size,
            **{f"`{name}` of the contexts": contexts.get(name) for name in _ORDER},
            **{name: getattr(plan, name, None) for name in ("lr", "weight_decay", "betas", "eps")},
            **{name: getattr(plan, name, None) for name in ("warmup_steps", "schedule")},
            "gradient_clip_val": trainer.gradient_clip_val,
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
            "precision": trainer.precision,
        }
        if getattr(splitter, "max_cells", None) is not None:  # checkpoints of the first versions do not have it
            facts["`max_cells` of the contexts"] = splitter.max_cells
        return {name: str(fact) for name, fact in facts.items()}

    @staticmethod
    def _early_stopping(trainer: dict[str, Any]) -> bool:
        """Whether scvi-tools shall add early stopping; it refuses under DDP, where we add the callback ourselves."""
        if not _compat.use_distributed_sampler(trainer.get("strategy")):
            return True
        trainer["callbacks"].append(
            EarlyStopping(
                trainer["early_stopping_monitor"],
                patience=trainer.get("early_stopping_patience", 45),
                min_delta=trainer.get("early_stopping_min_delta", 0.0),
                mode=trainer.get("early_stopping_mode", "min"),
            )
        )
        return False


def _digest(lines: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(str(line).encode() + b"\n")
    return digest.hexdigest()[:12]


def _has_validation(train_size: float | None, validation_size: float | None) -> bool:
    if validation_size is not None:
        return validation_size > 0
    return train_size is None or train_size < 1


@contextmanager
def _fork_random_state() -> Iterator[None]:
    """Run with the random state of torch and numpy, and restore both afterwards."""
    numpy_state = np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        np.random.set_state(numpy_state)
