"""Scores of predicted perturbations beside simple baselines and a replicate of the experiment."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

__all__ = ["perturbation_scores"]

_COLUMNS = ("perturbation", "method", "metric", "value")
_REPLICATE = "replicate"
# Markers of the baselines in the order of the legend; they share a muted colour scale, predictions do not.
_BASELINES = {
    "no_change": ("X", "0.55", "no change"),
    "perturbed_mean": ("s", "#88ccee", "mean of perturbations"),
    "observed": ("h", "#6699cc", "measured in training"),
    "context_mean": ("P", "#999933", "mean of other contexts"),
    "additive": ("D", "#44aa99", "additive"),
    "nearest_context": ("^", "#aa4499", "nearest context"),
    "linear_context": ("v", "#882255", "linear in contexts"),
    "gene_linear": ("<", "#ddaa33", "linear in genes"),
}
_PREDICTIONS = ("#cc3311", "#4477aa", "#117733", "#222222")
_CEILING = "0.1"
_ROW = 0.21  # inches, of few rows; many rows get less
_ALL = "median"
_HIGHER = ("pearson", "spearman", "overlap", "de_overlap", "discrimination", "r2", "recall", "precision", "jaccard")
_LOWER = ("mse", "mae", "energy", "mmd", "rmse")


def perturbation_scores(
    scores: pd.DataFrame,
    metric: str | Sequence[str] = "pearson_delta",
    methods: Sequence[str] | None = None,
    max_rows: int = 60,
    ax: Axes | None = None,
) -> Figure:
    """Draw the score of every perturbation beside the baselines and the replicate, one panel per metric.

    A row per perturbation (and context, where there are several), the best predicted on top; below several rows stand their
    medians. The filled circle is the prediction, other symbols are baselines, the black bar is what a repetition of the
    experiment reaches. A prediction is worth its cost where it lies beyond all baselines. With more than ``max_rows`` rows
    every method is a column of dots instead, one per perturbation, with the median as a line and as a number; in brackets,
    the number of rows of a method that has not all. Medians are over the rows that a method has.

    Parameters
    ----------
    scores
        Table of ``cellweave.tl.evaluate_perturbation``: the columns ``perturbation``, ``context`` (optional), ``method``,
        ``metric`` and ``value``. Methods with other names than the baselines and ``"replicate"`` are predictions.
    metric
        Metric, or several.
    methods
        Methods to draw; all by default.
    max_rows
        Largest number of rows.
    ax
        Axes to draw a single metric into; a new figure by default.

    Returns
    -------
    The figure; ``figure.axes`` are the panels in the order of the metrics. In a panel every method has one collection of
    dots, whose label is its name in the table.

    Raises
    ------
    ValueError
        If a column, a metric or a method is missing, a value stands there twice, or ``ax`` is given for several metrics.
    """
    wanted = [metric] if isinstance(metric, str) else list(metric)
    if ax is not None and len(wanted) != 1:
        raise ValueError(f"`ax` holds one panel, but `metric` has {len(wanted)} {wanted}; name one.")
    tables = _tables(scores, wanted, methods)
    order = _order(tables[wanted[0]], wanted[0])
    names = list(dict.fromkeys(name for table in tables.values() for name in table.columns))
    ordered = sorted(names, key=_rank)
    as_rows = len(order) <= max_rows
    figure, axes = _panels(len(wanted), len(order), as_rows, len(ordered)) if ax is None else (_root(ax), [ax])
    styles = _styles(ordered)
    for panel, (name, table) in zip(axes, tables.items(), strict=True):
        table = table.reindex(index=order)
        if as_rows:
            _draw_rows(panel, table, styles, first=panel is axes[0])
        else:
            _draw_columns(panel, table, styles)
        _name_metric(panel, name, as_rows)
    if as_rows:
        handles, labels = [_handle(styles[name]) for name in ordered], [styles[name][2] for name in ordered]
        axes[-1].legend(handles, labels, loc="upper left", bbox_to_anchor=(1.02, 1), borderaxespad=0, frameon=False,
                        fontsize="x-small", handletextpad=0.1)  # fmt: skip
    return figure


# ---------------------------------------------------------------- the table


def _tables(scores: pd.DataFrame, metrics: list[str], methods: Sequence[str] | None) -> dict[str, pd.DataFrame]:
    """Per metric a table of values (row of the figure, method)."""
    missing = [name for name in _COLUMNS if name not in scores]
    if missing:
        raise ValueError(
            f"`scores` has no column {missing[0]!r}; pass the table of `cellweave.tl.evaluate_perturbation`."
        )
    _check("metric", metrics, scores["metric"])
    if methods is not None:
        _check("methods", list(methods), scores["method"])
        scores = scores[scores["method"].isin(list(methods))]
    scores = scores[scores["metric"].isin(metrics)].assign(row=_row_names)
    repeated = scores.duplicated(["row", "method", "metric"])
    if repeated.any():
        first = scores[repeated].iloc[0]
        raise ValueError(
            f"`scores` has {repeated.sum()} values more than once (first: {first['metric']!r} of {first['method']!r} for "
            f"{first['row']!r}); average over seeds first, or name the runs in `method`."
        )
    found = {
        name: scores[scores["metric"] == name].pivot(index="row", columns="method", values="value") for name in metrics
    }
    empty = [name for name, table in found.items() if table.isna().all(axis=None)]
    if empty:
        raise ValueError(f"`metric`={empty[0]!r} has no value in `scores`; choose another metric.")
    return found


def _check(argument: str, wanted: list[str], column: pd.Series) -> None:
    known = list(dict.fromkeys(column.astype(str)))
    unknown = [name for name in wanted if name not in known]
    if unknown or not wanted:
        raise ValueError(f"`{argument}` names {unknown[:5]}, which `scores` does not have; choose among {known}.")


def _row_names(scores: pd.DataFrame) -> pd.Series:
    """Perturbation, and context where there are several."""
    names = scores["perturbation"].astype(str)
    if "context" not in scores or scores["context"].nunique() < 2:
        return names
    return names + " · " + scores["context"].astype(str)


def _order(table: pd.DataFrame, metric: str) -> list[str]:
    """Rows by the score of the prediction (else of the first method), the best first, rows without one last."""
    scores = table[min(table.columns, key=lambda name: (_rank(name)[0] != 1, _rank(name)))].astype(float)
    if metric.endswith("ratio"):
        scores = (scores - 1).abs()
    ascending = metric.endswith("ratio") or metric.startswith(_LOWER)
    return list(scores.sort_values(ascending=ascending, kind="stable").index)


def _rank(method: str) -> tuple[int, int, str]:
    """Place in the legend: baselines, predictions, replicate."""
    if method in _BASELINES:
        return 0, list(_BASELINES).index(method), method
    return (2 if method == _REPLICATE else 1), 0, "" if method == "prediction" else method


# ---------------------------------------------------------------- the drawing

_Style = tuple[str, str, str, float]  # marker, colour, name, size


def _styles(methods: list[str]) -> dict[str, _Style]:
    predictions = [name for name in methods if _rank(name)[0] == 1]
    styles: dict[str, _Style] = {name: (*look, 22.0) for name, look in _BASELINES.items()}
    styles[_REPLICATE] = ("|", _CEILING, "replicate", 90.0)
    return styles | {name: ("o", _PREDICTIONS[i % len(_PREDICTIONS)], name, 42.0) for i, name in enumerate(predictions)}


def _draw_rows(ax: Axes, table: pd.DataFrame, styles: dict[str, _Style], first: bool) -> None:
    rows = np.arange(len(table), dtype=float)
    low, high = table.min(axis=1).to_numpy(), table.max(axis=1).to_numpy()
    ax.hlines(rows, low, high, color="0.88", lw=1.0, zorder=1)
    dense = 0.6 if len(table) > 30 else 1.0
    several = len(table) > 1  # the median of one row is that row
    for order, name in enumerate(sorted(table.columns, key=_rank)):
        marker, color, _, size = styles[name]
        values = table[name].to_numpy(dtype=float)
        at, where = list(values), list(rows)
        if several:
            at.append(np.nanmedian(values) if np.isfinite(values).any() else np.nan)
            where.append(len(rows) + 0.6)
        ax.scatter(at, where, marker=marker, color=color, s=size * dense, label=name, zorder=2 + 0.1 * order,
                   **({"lw": 1.6} if marker == "|" else {"edgecolor": "white", "lw": 0.4}))  # fmt: skip
    places, names = list(rows), list(map(str, table.index))
    if several:
        ax.axhline(len(rows) - 0.2, color="0.3", lw=0.7)
        places, names = [*places, len(rows) + 0.6], [*names, _ALL]
    ax.set_yticks(places, names if first else [], fontsize="x-small" if len(rows) > 30 else "small")
    ax.set_ylim(len(rows) + (1.2 if several else -0.2), -0.8)
    ax.tick_params(axis="y", length=0)
    ax.spines[["top", "right", "left"]].set_visible(False)


def _draw_columns(ax: Axes, table: pd.DataFrame, styles: dict[str, _Style]) -> None:
    """A column of dots per method; dots of about the same value stand beside each other."""
    methods = sorted(table.columns, key=_rank)
    finite = table.to_numpy(dtype=float)
    finite = finite[np.isfinite(finite)]
    step = (finite.max() - finite.min()) / 60 or 1.0
    for place, name in enumerate(methods):
        values = np.sort(table[name].dropna().to_numpy(dtype=float))
        ax.scatter(place + _beside(values, step), values, s=9, color=styles[name][1], lw=0, alpha=0.8, label=name)
        if len(values):
            median = float(np.median(values))
            ax.hlines(median, place - 0.4, place + 0.4, color="0.1", lw=1.6, zorder=3)
            ax.text(place, 1.01, f"{median:.2g}", transform=ax.get_xaxis_transform(), ha="center", va="bottom",
                    fontsize="x-small")  # fmt: skip
    measured = table.notna().sum()
    labels = [styles[m][2] + (f" ({measured[m]:,})" if measured[m] < len(table) else "") for m in methods]
    ax.set_title("median", fontsize="x-small", loc="left", x=-0.1, y=1.01, pad=0)
    ax.set_xticks(range(len(methods)), labels, rotation=35, ha="right", rotation_mode="anchor", fontsize="small")
    ax.set_xlim(-0.6, len(methods) - 0.2)
    ax.spines[["top", "right"]].set_visible(False)


def _beside(values: NDArray, step: float) -> NDArray:
    """Offsets that spread the dots of one bin of values around the middle."""
    offsets = np.zeros(len(values))
    bins = np.floor(values / step)
    most = max((np.sum(bins == b) for b in np.unique(bins)), default=1)
    width = min(0.09, 0.7 / most)
    for b in np.unique(bins):
        inside = np.flatnonzero(bins == b)
        offsets[inside] = (np.arange(len(inside)) - (len(inside) - 1) / 2) * width
    return offsets


def _name_metric(ax: Axes, metric: str, as_rows: bool) -> None:
    words = metric.replace("_", " ")
    best = None
    if metric.endswith("ratio"):
        best, words = 1.0, f"{words}\n(1 is best)"
    elif metric.startswith(_LOWER):
        words = f"{words}\n({'← ' if as_rows else ''}lower is better)"
    elif metric.startswith(_HIGHER):
        words = f"{words}\n(higher is better{' →' if as_rows else ''})"
    place, line = (ax.set_xlabel, ax.axvline) if as_rows else (ax.set_ylabel, ax.axhline)
    place(words, fontsize="small")
    line(0.0 if best is None else best, color="0.8", lw=0.8, zorder=0)
    ax.tick_params(axis="x" if as_rows else "y", labelsize="x-small")


def _handle(style: _Style) -> Line2D:
    marker, color, _, size = style
    return Line2D([], [], ls="", marker=marker, color=color, ms=min(size**0.5, 8), mec=color if marker == "|" else "white",
                  mew=1.6 if marker == "|" else 0.4)  # fmt: skip


def _panels(n_metrics: int, n_rows: int, as_rows: bool, n_methods: int) -> tuple[Figure, list[Axes]]:
    if as_rows:
        row = _ROW if n_rows <= 30 else 0.15
        size = (2.9 + 2.5 * n_metrics, max(0.8 + row * (n_rows + 2), 0.4 + 0.17 * n_methods))
    else:
        size = (0.6 + (0.6 + 0.5 * n_methods) * n_metrics, 3.8)
    figure, axes = plt.subplots(1, n_metrics, squeeze=False, figsize=size, layout="constrained")
    return figure, list(axes[0])


def _root(ax: Axes) -> Figure:
    figure = ax.get_figure(root=True)
    assert figure is not None  # axes are always part of a figure
    return figure
