"""One run of training: callbacks, history, where to continue, and how it ends."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy
from scvi import settings
from scvi.train import SaveCheckpoint, TrainRunner

from ._checkpoints import PeriodicCheckpoint, ResumePoint, check_fingerprint, find_checkpoint, read_checkpoint
from ._history import History
from ._signals import StopSignals, TrainingInterrupted
from ._strategies import Unshard

__all__ = ["CellweaveTrainRunner"]


class CellweaveTrainRunner(TrainRunner):
    """The runner of scvi-tools with checkpoints, exact resume, clean interruption and a history of its own.

    It also accepts the :class:`~lightning.pytorch.callbacks.ModelCheckpoint` of Lightning, which the trainer of
    scvi-tools refuses unless it also writes model directories of its own.

    Parameters
    ----------
    *args, **kwargs
        As in :class:`scvi.train.TrainRunner`.
    callbacks
        Callbacks of the trainer; the sequence is not changed.
    checkpoint_dir
        Directory for checkpoints; none are written by default.
    checkpoint_minutes
        Time between checkpoints.
    resume
        ``"auto"`` continues the newest usable checkpoint of ``checkpoint_dir``, if there is one; a path continues that
        checkpoint.

    Raises
    ------
    ValueError
        If these options do not fit together, or the checkpoint is of another run.
    """

    def __init__(
        self,
        *args: Any,
        callbacks: Sequence[Callback] | None = None,
        checkpoint_dir: str | Path | None = None,
        checkpoint_minutes: float = 15.0,
        resume: Literal["auto"] | str | Path | None = None,
        **kwargs: Any,
    ) -> None:
        callbacks = list(callbacks or [])
        checkpoints = [c for c in callbacks if isinstance(c, ModelCheckpoint) and not isinstance(c, SaveCheckpoint)]
        others = [c for c in callbacks if c not in checkpoints]
        super().__init__(*args, callbacks=others, **kwargs)
        self.signals = StopSignals()
        directory = None if checkpoint_dir is None else Path(checkpoint_dir)
        periodic = PeriodicCheckpoint(directory, checkpoint_minutes, self.signals)
        self.trainer.callbacks.extend([*checkpoints, periodic])  # last, where Lightning itself puts them
        self.unshard = Unshard(self.model.module) if isinstance(self.trainer.strategy, FSDPStrategy) else None
        if self.unshard is not None:
            self.trainer.callbacks.insert(0, self.unshard)
        self._share_contexts()
        self._train_without_validation()
        self.training_plan.history = History(self.model.history_ if self.model.is_trained_ else None)
        self.training_plan.fingerprint = self.model._run_fingerprint(self)
        self.point = _resume_point(resume, directory)
        if self.point is not None:
            check_fingerprint(self.point, self.training_plan.fingerprint)
            self.training_plan.last_checkpoint = str(self.point.path)

    def _share_contexts(self) -> None:
        """Share the contexts of every step among the processes, whatever the strategy is called."""
        if self.trainer.world_size == 1:
            return
        if settings.seed is None:
            raise ValueError(
                "Training on several devices needs `scvi.settings.seed`: without it each process would split the "
                "cells differently."
            )
        if hasattr(self.data_splitter, "data_loader_kwargs"):
            self.data_splitter.data_loader_kwargs["distributed_sampler"] = True

    def _train_without_validation(self) -> None:
        """Skip validation, and take early stopping back, where the split left no validation cells, as of a few cells."""
        if getattr(self.data_splitter, "n_val", 1):
            return
        self.trainer.limit_val_batches = 0
        stopping = [c for c in self.trainer.callbacks if isinstance(c, EarlyStopping) and "validation" in c.monitor]
        if stopping:
            warnings.warn(
                "There are no validation cells, so training does not stop early; set a larger `validation_size`, or "
                "`early_stopping=False`.",
                UserWarning,
                stacklevel=settings.warnings_stacklevel,
            )
            self.trainer.callbacks = [c for c in self.trainer.callbacks if c not in stopping]

    # ---------------------------------------------------------------- the run

    def _run_training_core(self) -> None:
        try:
            with self.signals:
                self._fit()
        except TrainingInterrupted as interruption:
            self._leave()
            self.signals.end_as_demanded(interruption.signum)
        except BaseException:
            self._leave()
            raise
        whole = None if self.unshard is None else self.unshard.whole("module.")
        if whole is not None:
            self.model.module = whole
        self._leave()
        self.model.is_trained_ = True
        self.model.to_device(self.device)
        self.model.trainer = self.trainer

    def _fit(self) -> None:
        if self.point is None:
            self.trainer.fit(self.training_plan, self.data_splitter)
        elif self.point.finished:
            self.training_plan.load_state_dict(self.point.content["state_dict"])
            self.training_plan.on_load_checkpoint(self.point.content)
        else:
            self._continue_at(self.point)
            path = str(self.point.path)
            self.point = None  # frees the weights, which Lightning reads again
            self.trainer.fit(self.training_plan, self.data_splitter, ckpt_path=path)

    def _continue_at(self, point: ResumePoint) -> None:
        """Let the first training loader start at the epoch and batch of the checkpoint.

        Lightning makes the loader and its iterator, with worker processes that fetch ahead, before it restores the
        progress of the run and sets the epoch of the sampler.
        """
        make = self.data_splitter.train_dataloader

        def train_dataloader() -> Any:
            del self.data_splitter.train_dataloader  # the next loader is the class's own again
            loader = make()
            sampler = loader.sampler
            if point.batch and not hasattr(sampler, "start_batch"):
                raise ValueError(
                    f"`{point.path}` lies inside an epoch, where a {type(sampler).__name__} cannot continue; use a "
                    "checkpoint of the end of an epoch."
                )
            sampler.set_epoch(point.epoch)
            sampler.start_batch = point.batch
            return loader

        self.data_splitter.train_dataloader = train_dataloader

    def _leave(self) -> None:
        """What holds after every run, whether it ended well or not."""
        self.model.history_ = self._history()
        for name, rows in (("train", "train_idx"), ("validation", "val_idx"), ("test", "test_idx")):
            setattr(self.model, f"{name}_indices", getattr(self.data_splitter, rows, None))
        self.model.module.eval()
        if torch.cuda.is_available():
            gc.collect()  # what cycles still hold of the memory of the device
            torch.cuda.empty_cache()

    def _history(self) -> dict[str, Any]:
        """Our curves, and what callbacks of the user logged."""
        history = self.training_plan.history
        frames = history.frames()
        logged = getattr(self.trainer.logger, "history", None)
        for name, frame in logged.items() if isinstance(logged, dict) else ():  # empty on all but the first process
            if name not in history:
                frames[name] = frame.astype(float).set_axis(frame.index + history.n_earlier).rename_axis("epoch")
        return frames


def _resume_point(resume: str | Path | None, directory: Path | None) -> ResumePoint | None:
    if directory is not None and settings.seed is None:
        raise ValueError("`checkpoint_dir` needs `scvi.settings.seed`: without it no run can be continued exactly.")
    if resume == "auto":
        if directory is None:
            raise ValueError("`resume='auto'` needs `checkpoint_dir`, the directory to look for checkpoints in.")
        return find_checkpoint(directory)
    if resume is not None:
        return read_checkpoint(resume)
    if directory is not None and any(directory.glob("epoch*.ckpt")):
        raise ValueError(
            f"`checkpoint_dir={str(directory)!r}` holds checkpoints of an earlier run; continue it with "
            "`resume='auto'` or choose an empty directory."
        )
    return None
