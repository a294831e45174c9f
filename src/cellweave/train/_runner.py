from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from scvi.train import SaveCheckpoint, TrainRunner

__all__ = ["CellweaveTrainRunner"]


class CellweaveTrainRunner(TrainRunner):
    """The runner of scvi-tools, which also accepts the :class:`~lightning.pytorch.callbacks.ModelCheckpoint` of Lightning.

    The trainer of scvi-tools refuses that callback unless it also writes model directories of its own, but exact
    resuming (``ckpt_path``) needs it.

    Parameters
    ----------
    *args, **kwargs
        As in :class:`scvi.train.TrainRunner`.
    callbacks
        Callbacks of the trainer; the sequence is not changed.
    """

    def __init__(self, *args: Any, callbacks: Sequence[Callback] | None = None, **kwargs: Any) -> None:
        callbacks = list(callbacks or [])
        checkpoints = [c for c in callbacks if isinstance(c, ModelCheckpoint) and not isinstance(c, SaveCheckpoint)]
        others = [c for c in callbacks if c not in checkpoints]
        super().__init__(*args, callbacks=others, **kwargs)
        self.trainer.callbacks.extend(checkpoints)  # last, where Lightning itself puts them
