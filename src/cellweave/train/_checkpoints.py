"""Checkpoints of a running training: written whole or not at all, found again, and checked before they are used."""

from __future__ import annotations

import logging
import os
import time
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from ._plan import CHECKPOINT_KEY, CellweaveTrainingPlan, epoch_counts
from ._signals import StopSignals, TrainingInterrupted

__all__ = ["CheckpointError", "PeriodicCheckpoint", "ResumePoint", "find_checkpoint", "read_checkpoint"]

logger = logging.getLogger(__name__)

_SUFFIX, _PARTIAL = ".ckpt", ".partial"
_KEPT = 2


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: damaged, foreign, or of another run."""


class ResumePoint(NamedTuple):
    """Where a checkpoint continues."""

    path: Path
    epoch: int  # epoch that runs next, or on
    batch: int  # its batches that are done
    finished: bool  # nothing is left to train
    fingerprint: dict[str, str]
    content: dict[str, Any]


# ---------------------------------------------------------------- reading


def read_checkpoint(path: str | os.PathLike[str]) -> ResumePoint:
    """Read and check a checkpoint; nothing in it is executed.

    Parameters
    ----------
    path
        File that :class:`PeriodicCheckpoint` or a checkpoint callback of Lightning wrote.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    CheckpointError
        If the file is damaged or not a checkpoint of cellweave.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint `{path}`.")
    _check_sums(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds, all of which mean the same here
        raise CheckpointError(
            f"`{path}` cannot be read with `weights_only=True`, so it is damaged or not a checkpoint of cellweave."
        ) from error
    if not isinstance(content, dict) or CHECKPOINT_KEY not in content or "loops" not in content:
        raise CheckpointError(f"`{path}` is not a checkpoint of a cellweave training run.")
    state, loop = content[CHECKPOINT_KEY], content["loops"]["fit_loop"]
    epoch = loop["epoch_progress"]["current"]
    is_between_epochs = epoch["ready"] == epoch["processed"]
    batch = 0 if is_between_epochs else loop["epoch_loop.batch_progress"]["current"]["processed"]
    return ResumePoint(path, epoch["processed"], batch, state["finished"], state["fingerprint"], content)


def find_checkpoint(directory: str | os.PathLike[str]) -> ResumePoint | None:
    """The newest usable checkpoint of a directory, or None; damaged ones are named in a warning.

    Parameters
    ----------
    directory
        Directory that :class:`PeriodicCheckpoint` writes to.
    """
    for path in reversed(_checkpoints(Path(directory))):
        try:
            return read_checkpoint(path)
        except CheckpointError as error:
            warnings.warn(f"{error} The checkpoint before it is used.", UserWarning, stacklevel=2)
    return None


def _checkpoints(directory: Path) -> list[Path]:
    """Checkpoints of a directory from old to new: their names sort by progress."""
    return sorted(directory.glob(f"epoch*{_SUFFIX}")) if directory.is_dir() else []


def _check_sums(path: Path) -> None:
    """Compare the checksums that torch stored with every tensor; torch itself does not look at them."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # headers may say anything: encrypted, an unknown compression, ...
        raise CheckpointError(f"`{path}` is damaged or cut off ({error}).") from error
    if damaged is not None:
        raise CheckpointError(f"`{path}` is damaged: the checksum of its part `{damaged}` does not match.")


def check_fingerprint(point: ResumePoint, fingerprint: Mapping[str, str]) -> None:
    """Refuse a checkpoint of another run.

    Raises
    ------
    CheckpointError
        If anything that shapes the run differs; names what.
    """
    keys = dict.fromkeys([*fingerprint, *point.fingerprint])
    differences = [
        f"{key} ({point.fingerprint.get(key, 'none')} there, {fingerprint.get(key, 'none')} here)"
        for key in keys
        if point.fingerprint.get(key) != fingerprint.get(key)
    ]
    if differences:
        raise CheckpointError(
            f"The checkpoint `{point.path}` belongs to another run, which differs in {', '.join(differences)}; "
            "continue it with the same data, model and arguments, or start anew in an empty `checkpoint_dir`."
        )


# ---------------------------------------------------------------- writing


class PeriodicCheckpoint(Checkpoint):
    """Write checkpoints by the clock, when a signal ends the run, and at the end; keep the last two.

    Checkpoints are written between optimiser steps only, and not between the last step of an epoch and the end of its
    validation, so that each continues exactly.

    Parameters
    ----------
    directory
        Where checkpoints go; None writes none and only handles signals.
    minutes
        Time between checkpoints.
    signals
        Signals that end the run after the running step.
    """

    def __init__(self, directory: Path | None, minutes: float, signals: StopSignals) -> None:
        self.directory, self.minutes, self.signals = directory, minutes, signals
        self._last = time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals over from Lightning; remove what a killed process left half-written."""
        self.signals.install()
        self._last = time.monotonic()
        if self.directory is not None and trainer.is_global_zero:
            self.directory.mkdir(parents=True, exist_ok=True)
            for left in self.directory.glob(f"*{_PARTIAL}"):
                left.unlink()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save or stop after an optimiser step."""
        self._act(trainer, pl_module, possible=_is_between_steps(trainer, batch_idx))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save or stop after an epoch and its validation."""
        self._act(trainer, pl_module, possible=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the finished run."""
        if self.directory is not None:
            self._save(trainer, pl_module)

    def _act(self, trainer: Trainer, pl_module: LightningModule, possible: bool) -> None:
        signum = self.signals.received or 0
        due: float = self.directory is not None and time.monotonic() - self._last >= 60 * self.minutes
        if trainer.world_size > 1:  # one process may be the only one that knows
            wishes = torch.tensor([float(signum), float(due)], device=trainer.strategy.root_device)
            signum, due = (round(wish) for wish in trainer.strategy.reduce(wishes, reduce_op="max").tolist())
        if not possible or not (signum or due):
            return
        if self.directory is not None:
            self._save(trainer, pl_module)
        if signum:
            raise TrainingInterrupted(signum)

    def _save(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self.directory is not None
        self._last = time.monotonic()
        if not all(torch.isfinite(parameter).all() for parameter in pl_module.parameters()):
            return  # the next step will stop with an error; what was saved before is worth more
        epochs = epoch_counts(trainer)
        batch = trainer.fit_loop.batch_idx + 1 if epochs["ready"] != epochs["processed"] else 0
        path = self.directory / f"epoch{epochs['processed']:06d}-batch{batch:08d}{_SUFFIX}"
        partial = path.with_suffix(_PARTIAL)
        trainer.save_checkpoint(partial)  # on all processes: they may have parts of the state
        if trainer.is_global_zero:
            _publish(partial, path)
            for old in _checkpoints(self.directory)[:-_KEPT]:
                old.unlink()
        trainer.strategy.barrier("cellweave.checkpoint")
        if isinstance(pl_module, CellweaveTrainingPlan):
            pl_module.last_checkpoint = str(path)
        logger.info("Wrote checkpoint %s.", path)


def _is_between_steps(trainer: Trainer, batch_idx: int) -> bool:
    """Whether gradients were applied, and neither a validation nor the end of the epoch follows."""
    loop = trainer.fit_loop
    validates = False
    if trainer.enable_validation and trainer.val_check_batch not in (None, float("inf")):
        n_done = loop.total_batch_idx if trainer.check_val_every_n_epoch is None else batch_idx
        validates = (n_done + 1) % int(trainer.val_check_batch or 1) == 0
    return not trainer.is_last_batch and not validates and (batch_idx + 1) % trainer.accumulate_grad_batches == 0


def _publish(partial: Path, path: Path) -> None:
    """Give a complete file its name, so that no reader and no crash ever sees a part of it under that name."""
    _flush(partial)
    os.replace(partial, path)
    if os.name == "posix":  # elsewhere directories cannot be opened
        _flush(path.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() or os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
