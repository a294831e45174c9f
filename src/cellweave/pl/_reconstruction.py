"""Observed counts of hidden genes against what a model expected."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from numpy.typing import ArrayLike, NDArray

__all__ = ["masked_reconstruction"]

# A mean over fewer entries is noise.
_MIN_ENTRIES = 30
# Lower end of both axes, half a row below zero, so that zero counts have a row of their own.
_LOWEST = np.expm1(-np.log(2) / 2)


def masked_reconstruction(
    observed: pd.DataFrame | ArrayLike,
    predicted: pd.DataFrame | ArrayLike,
    ax: Axes | None = None,
    n_bins: int = 50,
    cmap: str = "viridis",
) -> Axes:
    """Draw observed counts of hidden genes against their predicted mean.

    The colour is the number of entries (one entry is one hidden gene of one cell) at each observed count and predicted
    mean, so that millions of entries can be drawn. Axes are spaced by ``log(1 + count)``. Points on the dashed line are
    predicted exactly; the solid line is the mean observed count of all entries with about the same prediction, which
    lies on the dashed line where predictions are right on average. The corner shows the Pearson correlation of
    ``log(1 + observed)`` and ``log(1 + predicted)`` over all entries. It is high as soon as highly expressed genes are
    told from others; :meth:`cellweave.model.StackModel.get_reconstruction_metrics` compares with that baseline.

    Parameters
    ----------
    observed
        Counts of the hidden genes ``(cell, hidden gene)``, or any other shape.
    predicted
        Predicted mean counts in the same shape. ``observed, predicted = model.get_masked_predictions()`` gives both.
    ax
        Axes to draw into; a new figure by default.
    n_bins
        Bins of the predicted mean. Observed counts up to 20 have a row each, larger ones share rows.
    cmap
        Colour map of the number of entries.

    Returns
    -------
    The axes. Its coordinates are counts.

    Raises
    ------
    ValueError
        If shapes or names differ, or a value is missing or negative.
    """
    x, y = _entries(observed, predicted)
    ax = plt.subplots(figsize=(4.4, 3.6), layout="constrained")[1] if ax is None else ax
    x_edges = np.expm1(np.linspace(0, np.log1p(x.max() or 1.0) + 1e-6, n_bins + 1))
    y_edges = _count_edges(y.max())
    top = max(x_edges[-1], y_edges[-1])
    counts, _, _ = np.histogram2d(x, y, bins=(x_edges, y_edges))
    _log1p_axes(ax, top)
    mesh = ax.pcolormesh(
        x_edges, y_edges, np.ma.masked_equal(counts.T, 0), norm=LogNorm(vmin=1), cmap=cmap, rasterized=True
    )
    ax.figure.colorbar(mesh, ax=ax, label="entries (hidden gene × cell)")
    ax.plot([0, top], [0, top], color="0.3", lw=1, ls="--", label="observed = predicted")
    ax.plot(*_mean_observed(x, y, x_edges), color="#ee7733", lw=1.8, label="mean observed")
    ax.set(xlabel="predicted mean count", ylabel="observed count")
    ax.text(0.98, 0.02, _correlation(x, y), transform=ax.transAxes, ha="right", va="bottom",
            bbox={"color": "white", "alpha": 0.7, "pad": 1.5})  # fmt: skip
    above: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.2}
    ax.legend(frameon=False, fontsize="small", ncols=2, handlelength=1.6, columnspacing=1.2, **above)
    return ax


def _entries(observed: pd.DataFrame | ArrayLike, predicted: pd.DataFrame | ArrayLike) -> tuple[NDArray, NDArray]:
    """Predicted and observed values as flat, checked arrays."""
    if isinstance(observed, pd.DataFrame) and isinstance(predicted, pd.DataFrame):
        for axis in ("index", "columns"):
            if not getattr(observed, axis).equals(getattr(predicted, axis)):
                raise ValueError(
                    f"The {axis} of `observed` and `predicted` differ; they must be the same, in one order."
                )
    arrays = {"observed": np.asarray(observed, dtype=float), "predicted": np.asarray(predicted, dtype=float)}
    shapes = [array.shape for array in arrays.values()]
    if shapes[0] != shapes[1] or not arrays["observed"].size:
        raise ValueError(
            f"`observed` and `predicted` must have the same, non-empty shape, got {shapes[0]} and {shapes[1]}."
        )
    for name, array in arrays.items():
        if not np.isfinite(array).all() or array.min() < 0:
            raise ValueError(
                f"`{name}` has missing, infinite or negative values; counts and their means are zero or more."
            )
    return arrays["predicted"].ravel(), arrays["observed"].ravel()


def _count_edges(largest: float, exact: int = 20) -> NDArray:
    """Edges of rows: one row per count up to ``exact``, then rows of about equal height on the log axis.

    The edge between two counts lies in the middle of them on the log axis.
    """
    counts = np.log1p(np.arange(min(int(np.ceil(largest)), exact) + 2))
    edges = np.concatenate([[np.log1p(_LOWEST)], (counts[:-1] + counts[1:]) / 2])
    n_shared = max(0, int(np.ceil((np.log1p(largest) - edges[-1]) / (edges[-1] - edges[-2]))))
    shared = np.expm1(edges[-1] + (edges[-1] - edges[-2]) * np.arange(1, n_shared + 1))
    return np.concatenate([np.expm1(edges), np.ceil(shared) + 0.5])  # no count lies on an edge


def _mean_observed(x: NDArray, y: NDArray, edges: NDArray) -> tuple[NDArray, NDArray]:
    """Mean prediction and mean observed count in each bin of predictions that has enough entries."""
    which = np.digitize(x, edges[1:-1])
    n, sum_x, sum_y = (np.bincount(which, weights=w, minlength=len(edges) - 1) for w in (None, x, y))
    enough = n >= min(_MIN_ENTRIES, n.max())
    return sum_x[enough] / n[enough], sum_y[enough] / n[enough]


def _correlation(x: NDArray, y: NDArray) -> str:
    x, y = np.log1p(x), np.log1p(y)
    if x.std() == 0 or y.std() == 0:
        return "Pearson r undefined"
    return f"Pearson r = {round(np.corrcoef(x, y)[0, 1], 2) + 0:.2f}"  # + 0: no minus sign before zero


def _log1p_axes(ax: Axes, top: float) -> None:
    """Both axes in counts, spaced by log(1 + count)."""
    ticks = [t for t in (0, 1, 3, 10, 30, 100, 300, 1000, 3000, 10000) if t <= top]
    for axis, name in ((ax.xaxis, "x"), (ax.yaxis, "y")):
        getattr(ax, f"set_{name}scale")("function", functions=(_forward, np.expm1))
        axis.set_ticks(ticks, labels=[f"{t:,}" for t in ticks])
        axis.set_ticks([], minor=True)
    ax.set(xlim=(_LOWEST, top), ylim=(_LOWEST, top))
    ax.spines[["top", "right"]].set_visible(False)


def _forward(x: NDArray) -> NDArray:
    return np.log1p(np.maximum(x, -0.99))
