"""Training through scvi-tools, with its known traps kept away from the user."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lightning.pytorch.callbacks import EarlyStopping
from scvi.model.base import UnsupervisedTrainingMixin

from cellweave import _compat
from cellweave.data import CellSetSplitter
from cellweave.train import CellweaveTrainingPlan, CellweaveTrainRunner, with_history

__all__ = ["TrainingMixin"]


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
        if self.adata is None:
            raise ValueError("This model has no data to train on; load it with `adata=` or create it from an AnnData.")
        trainer = {**trainer, "callbacks": list(trainer.get("callbacks") or [])}  # scvi-tools appends to the list
        trainer["logger"] = with_history(trainer.get("logger"), trainer.get("default_root_dir"))
        has_validation = _has_validation(options.get("train_size"), options.get("validation_size"))
        if has_validation:
            trainer.setdefault("check_val_every_n_epoch", 1)
        trainer.setdefault("early_stopping_monitor", "validation_loss")
        if options.get("early_stopping"):
            if not has_validation:
                raise ValueError("`early_stopping=True` needs validation cells; set `validation_size` above 0.")
            options["early_stopping"] = self._early_stopping(trainer)
        self._validate_anndata(self.adata)  # replays our registration if the data were set up for another model since
        with _fork_random_state():
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
        history: Any = getattr(self, "history_", None)
        if isinstance(history, dict):  # the logger of scvi-tools collects objects
            self.history_ = {name: frame.astype(float) for name, frame in history.items()}

    @staticmethod
    def _early_stopping(trainer: dict[str, Any]) -> bool:
        """Whether scvi-tools shall add early stopping; it refuses under DDP, where we add the callback ourselves."""
        if not _compat.use_distributed_sampler(trainer.get("strategy")):
            return True
        patience = trainer.get("early_stopping_patience", 45)
        trainer["callbacks"].append(EarlyStopping(trainer["early_stopping_monitor"], patience=patience))
        return False


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
