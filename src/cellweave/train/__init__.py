"""The lean training plan that every gradient-trained model shares."""

from ._loggers import HistoryLogger, with_history
from ._plan import CellweaveTrainingPlan
from ._runner import CellweaveTrainRunner
from ._schedules import SCHEDULES, warmup_constant, warmup_cosine

__all__ = [
    "SCHEDULES",
    "CellweaveTrainRunner",
    "CellweaveTrainingPlan",
    "HistoryLogger",
    "warmup_constant",
    "warmup_cosine",
    "with_history",
]
