"""Loggers of a training run: those of the user, and one that fills ``model.history``."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import pandas as pd
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from scvi import settings

__all__ = ["HistoryLogger", "with_history"]


class HistoryLogger(Logger):
    """Collect every metric in a frame, and stand for another logger towards Lightning.

    scvi-tools reads the history of a model from the first logger of the trainer only. This logger takes that place;
    name, version, directory and experiment are those of the logger that the user put first, so that callbacks find them
    and checkpoints go where they would without it.

    Parameters
    ----------
    first
        First logger of the user, if any.
    """

    def __init__(self, first: Logger | None = None) -> None:
        super().__init__()
        self._first = first
        self._values: dict[str, dict[int, float]] = {}
        self._index_name: dict[str, str] = {}

    @property
    def name(self) -> str | None:
        """Name of the run."""
        return "cellweave" if self._first is None else self._first.name

    @property
    def version(self) -> int | str | None:
        """Version of the run."""
        return None if self._first is None else self._first.version

    @property
    def save_dir(self) -> str | None:
        """Directory of the run."""
        return None if self._first is None else self._first.save_dir

    @property
    def experiment(self) -> Any:
        """Experiment of the logger that the user put first."""
        return getattr(self._first, "experiment", None)

    @property
    def history(self) -> dict[str, pd.DataFrame]:
        """One frame per metric, indexed by epoch (by step where a metric is logged without one)."""
        return {
            name: pd.DataFrame({name: list(values.values())}, index=pd.Index(list(values), name=self._index_name[name]))
            for name, values in self._values.items()
        }

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Keep the last value of each metric in an epoch."""
        by = "epoch" if "epoch" in metrics else "step"
        at = metrics["epoch"] if by == "epoch" else step
        for name in metrics.keys() - {"epoch", "step"}:
            self._index_name.setdefault(name, by)
            self._values.setdefault(name, {})[int(at or 0)] = float(metrics[name])

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Arguments are saved with the model."""


def with_history(
    logger: Logger | Iterable[Logger] | bool | None, save_dir: str | os.PathLike[str] | None = None
) -> list[Logger]:
    """The user's loggers behind one that fills the history of the model.

    Parameters
    ----------
    logger
        The ``logger`` argument of ``train``: one Lightning logger, several, ``True`` for Lightning's own choice,
        ``False`` or None for none.
    save_dir
        Directory of Lightning's own choice; ``scvi.settings.logging_dir`` by default.

    Returns
    -------
    Loggers for the trainer. Its first one writes no files, unlike that of scvi-tools, which leaves a pickle in the working
    directory when several processes train.

    Raises
    ------
    TypeError
        If something else than loggers is given.
    ValueError
        If ``scvi.settings.mlflow_set_tracking_uri`` is set: the report that scvi-tools then writes after training holds
        settings of its own models, and would fail.
    """
    if getattr(settings, "mlflow_set_tracking_uri", ""):
        raise ValueError(
            "`scvi.settings.mlflow_set_tracking_uri` reports settings that only models of scvi-tools have; set it to '' "
            "and pass `logger=MLFlowLogger(experiment_name, tracking_uri=...)` to `train`."
        )
    if logger is None or isinstance(logger, bool):
        loggers = [_default_logger(os.fspath(save_dir or settings.logging_dir))] if logger else []
    else:
        loggers = [logger] if isinstance(logger, Logger) else list(logger)
    for one in loggers:
        if not isinstance(one, Logger):
            raise TypeError(f"`logger` must hold loggers of Lightning, got {one!r}; see `lightning.pytorch.loggers`.")
    return [HistoryLogger(loggers[0] if loggers else None), *loggers]


def _default_logger(save_dir: str) -> Logger:
    try:
        return TensorBoardLogger(save_dir)
    except ModuleNotFoundError:
        return CSVLogger(save_dir)
