"""User-facing models: one class per family."""

from ._ccfm import CascadedFlowModel
from ._scyan import ScyanModel
from ._stack import StackModel

__all__ = ["CascadedFlowModel", "ScyanModel", "StackModel"]
