"""Parameters of the logicle scale, found for each marker from its values."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scvi import settings

from ._intensities import Intensities
from ._transforms import Logicle, some

__all__ = ["automatic_logicle"]

Floats = NDArray[np.float64]
# The scale of markers whose values do not determine one: t and w.
_FALLBACK = 5e5, 1.0
_MAX_WIDTH = 2.0


def automatic_logicle(values: Intensities, q: float, m: float, quantile_clip: float) -> Logicle:
    """The logicle scale of every marker.

    Parameters
    ----------
    values
        The intensities.
    q
        Quantile of the negative intensities that the linear part reaches.
    m
        Decades of the scale.
    quantile_clip
        Quantile of a marker below which values are cut off; 0 for none.

    Raises
    ------
    ValueError
        If a parameter is out of its range.
    """
    for name, value in (("q", q), ("quantile_clip", quantile_clip)):
        if not 0 <= value <= 1:
            raise ValueError(f"`{name}` must be between 0 and 1, got {value!r}; it is a quantile.")
    if not 2 * _FALLBACK[1] <= m < np.inf:
        raise ValueError(f"`m` must be at least {2 * _FALLBACK[1]:g} decades, got {m!r}; 4.5 is usual.")
    n = len(values.markers)
    t, w, low = np.empty(n), np.empty(n), np.full(n, -np.inf)
    step = Logicle(np.array(values.markers, dtype=object), t, np.full(n, float(m)), w, low)
    failed: list[str] = []
    for j, column in values.columns():
        top, width = float(column.max(initial=0.0)), _width(column, q, m)
        if not 0 < width <= min(_MAX_WIDTH, m / 2):
            (top, width), failed = _FALLBACK, [*failed, values.markers[j]]
        t[j], w[j] = top, width
        if quantile_clip and len(column):
            low[j] = _quantile_after(step, j, column, quantile_clip)
    _warn_fallback(failed)
    return step


def _width(column: Floats, q: float, m: float) -> float:
    """Decades of the linear part; 0 where the values do not determine it."""
    top, negative = float(column.max(initial=0.0)), column[column < 0]
    if top <= 0 or not len(negative):
        return 0.0
    first, third = np.quantile(negative, [0.25, 0.75])
    negative = negative[negative >= first - 1.5 * (third - first)]
    reach = abs(1e-8 + float(np.quantile(negative, q)))
    return float(m - np.log10(top / reach)) / 2 if 10.0**m * reach > top else 0.0


def _quantile_after(step: Logicle, j: int, column: Floats, quantile: float) -> float:
    """Quantile of the transformed values: the transform is monotone, so that its two neighbours are enough."""
    neighbours = np.quantile(column, quantile, method="lower"), np.quantile(column, quantile, method="higher")
    below, above = step.of_column(np.array(neighbours), j)
    return float(below + (above - below) * (quantile * (len(column) - 1) % 1))


def _warn_fallback(markers: Sequence[str]) -> None:
    if markers:
        warnings.warn(
            f"{len(markers)} marker(s) (first: {some(markers)}) do not determine a logicle scale, mostly for lack of negative "
            f"values, and get t={_FALLBACK[0]:g} and w={_FALLBACK[1]:g}; give a `reference` table, or use `arcsinh`.",
            UserWarning,
            stacklevel=settings.warnings_stacklevel,
        )
