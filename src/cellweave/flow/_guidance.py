from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["Guidance", "guide"]


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Velocity pushed away from the unconditional one: ``unconditional + scale * (conditional - unconditional)``.

    Parameters
    ----------
    conditional, unconditional
        Velocities with and without the condition.
    scale
        1 gives the conditional velocity, 0 the other, more than 1 a stronger condition.

    References
    ----------
    Ho and Salimans, *Classifier-free diffusion guidance* (2022).
    """
    return unconditional.lerp(conditional, scale)


class Guidance(NamedTuple):
    """How strong guidance is, and when; outside the interval there is none."""

    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0

    def at(self, t: float) -> float:
        """Scale at the time ``t``."""
        return self.scale if self.start <= t <= self.end else 1.0
