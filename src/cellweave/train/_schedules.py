"""Learning-rate factors as functions of the optimiser step."""

from __future__ import annotations

import math

__all__ = ["SCHEDULES", "warmup_constant", "warmup_cosine"]


def warmup_cosine(step: int, n_warmup: int, n_total: int, floor: float = 0.01) -> float:
    """Linear rise over ``n_warmup`` steps, then half a cosine from 1 to ``floor`` at step ``n_total``."""
    if step < n_warmup:
        return (step + 1) / (n_warmup + 1)
    progress = min(1.0, (step - n_warmup) / max(1, n_total - n_warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def warmup_constant(step: int, n_warmup: int, n_total: int, floor: float = 0.01) -> float:
    """Linear rise over ``n_warmup`` steps, then 1; ``n_total`` and ``floor`` have no effect."""
    return min(1.0, (step + 1) / (n_warmup + 1))


SCHEDULES = {"cosine": warmup_cosine, "constant": warmup_constant}
