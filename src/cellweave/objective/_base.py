from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from torch import Generator, Tensor

__all__ = ["Objective"]


class Objective(ABC):
    """One term of a training loss.

    A module hands every objective the same mapping of its outputs; an objective takes what it ``requires`` and returns
    a scalar. Any model whose outputs hold the required tensors may use it. Where processes share a step, the average of
    their values must be the value of one process that sees the whole step: means go through ``shared_mean``, draws that
    concern one context through ``normal_per_context``.

    Parameters
    ----------
    weight
        Factor of this term in the total loss.

    Attributes
    ----------
    name
        Key under which the raw (unweighted) value is logged.
    requires
        Names of the module outputs that the objective reads.
    """

    name: ClassVar[str]
    requires: ClassVar[frozenset[str]]

    def __init__(self, weight: float = 1.0) -> None:
        self.weight = weight

    @abstractmethod
    def __call__(self, outputs: Mapping[str, Tensor], generator: Generator | None = None) -> Tensor:
        """Raw value of the term, a 0-d tensor; random draws, if any, come from ``generator``."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}(weight={self.weight})"
