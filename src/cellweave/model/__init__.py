"""User-facing models: one class per family."""

from ._stack import StackModel

__all__ = ["StackModel"]
