"""User-facing models: one class per family."""

from ._scyan import ScyanModel
from ._stack import StackModel

__all__ = ["ScyanModel", "StackModel"]
