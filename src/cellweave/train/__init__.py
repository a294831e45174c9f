"""The lean training plan that every gradient-trained model shares."""

from ._plan import CellweaveTrainingPlan
from ._runner import CellweaveTrainRunner
from ._schedules import SCHEDULES, warmup_constant, warmup_cosine

__all__ = ["SCHEDULES", "CellweaveTrainRunner", "CellweaveTrainingPlan", "warmup_constant", "warmup_cosine"]
