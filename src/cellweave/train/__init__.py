"""Training that every gradient-trained model shares: plan, schedules, checkpoints, several devices."""

from ._checkpoints import CheckpointError, PeriodicCheckpoint, ResumePoint, find_checkpoint, read_checkpoint
from ._ema import ExponentialMovingAverage
from ._history import History
from ._loggers import HistoryLogger, with_history
from ._means import EpochMeans
from ._plan import CellweaveTrainingPlan
from ._quiet import quiet_lightning, wants_progress_bar
from ._runner import CellweaveTrainRunner
from ._schedules import SCHEDULES, warmup_constant, warmup_cosine
from ._signals import StopSignals, TrainingInterrupted
from ._strategies import fsdp_strategy

__all__ = [
    "SCHEDULES",
    "CellweaveTrainRunner",
    "CellweaveTrainingPlan",
    "CheckpointError",
    "EpochMeans",
    "ExponentialMovingAverage",
    "History",
    "HistoryLogger",
    "PeriodicCheckpoint",
    "ResumePoint",
    "StopSignals",
    "TrainingInterrupted",
    "find_checkpoint",
    "fsdp_strategy",
    "quiet_lightning",
    "read_checkpoint",
    "wants_progress_bar",
    "warmup_constant",
    "warmup_cosine",
    "with_history",
]
