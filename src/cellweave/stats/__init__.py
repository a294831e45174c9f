"""Accumulators over cells: update with some, merge with others, finalize once; order does not matter."""

from ._moments import Moments

__all__ = ["Moments"]
