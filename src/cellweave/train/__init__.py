"""The lean training plan that every gradient-trained model shares."""

from ._plan import CellweaveTrainingPlan
from ._schedules import SCHEDULES, warmup_constant, warmup_cosine

__all__ = ["SCHEDULES", "CellweaveTrainingPlan", "warmup_constant", "warmup_cosine"]
