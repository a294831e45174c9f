"""Training without the lines that Lightning prints about hardware, tips and tiny data."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["quiet_lightning", "wants_progress_bar"]

_LOGGERS = ("lightning.pytorch", "lightning.fabric", "lightning", "pytorch_lightning")

# Advice that does not apply: contexts are cheap to load, our means are already those of all processes, our samplers
# continue inside an epoch, and early stopping is added by us where scvi-tools refuses it.
_ADVICE = (
    r".*does not have many workers",
    r"The number of training batches",
    r"You defined a `validation_step` but have no `val_dataloader`",
    r".*recommended to use `self\.log\(.*sync_dist=True\)`",
    r"You're resuming from a checkpoint that ended before the epoch ended",
    r"early_stopping was automatically disabled due to the use of DDP",
)


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Hide information and advice of Lightning; warnings and errors stay, and the levels of its loggers come back."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(max(logger.level, logging.WARNING))
    try:
        with warnings.catch_warnings():
            for message in _ADVICE:
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def wants_progress_bar() -> bool:
    """Whether a person is looking: a terminal or a notebook."""
    ipython = sys.modules.get("IPython")
    return sys.stdout.isatty() or (ipython is not None and ipython.get_ipython() is not None)
