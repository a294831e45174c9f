"""How many cells populations have: the tree of a table, shares per sample, agreement with given labels, colours."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray
from scipy.stats import binomtest

from ._population_data import HasFrame, check_names, hues, read_hierarchy, read_populations

__all__ = ["annotation_confusion", "population_hierarchy", "population_palette", "population_ratios"]

_NO_LABEL = "no label"
_ROOT = ()
_MAX_COLUMNS = 5
_SHOWN_SHARE = 0.05  # smaller shares of a confusion matrix are seen as colour only
_BOUNDS = (("ci_low", "ci_high"), ("low", "high"))


def population_palette(
    table: HasFrame | pd.DataFrame | AnnData, groupby: str = "scyan_population"
) -> dict[str, tuple[float, float, float]]:
    """Colours of populations: a hue for every coarsest group, steps of it for the populations in the group.

    Nothing is written; pass the result as ``palette`` to scanpy.

    Parameters
    ----------
    table
        A :class:`~cellweave.io.MarkerTable`, its frame, or an AnnData annotated with one.
    groupby
        Column of ``obs`` that was predicted, for an AnnData.

    Returns
    -------
    Red, green and blue in [0, 1] by name, for populations and groups.

    Raises
    ------
    KeyError
        If the AnnData holds no table.
    ValueError
        If ``table`` is none.

    Examples
    --------
    >>> sc.pl.umap(adata, color="scyan_population", palette=cw.pl.population_palette(adata))
    """
    return hues(read_hierarchy(table, groupby))


def population_hierarchy(
    table: HasFrame | pd.DataFrame | AnnData, groupby: str = "scyan_population", ax: Axes | None = None
) -> Axes:
    """Draw the hierarchy of populations as a tree, with numbers and shares of cells where an AnnData is given.

    Parameters
    ----------
    table
        A :class:`~cellweave.io.MarkerTable`, its frame, or an AnnData annotated with one. The area of a dot is then the
        share among all cells with a label.
    groupby
        Column of ``obs`` that was predicted, for an AnnData.
    ax
        Axes to draw into; a new figure by default.

    Returns
    -------
    The axes: depth to the right, the first population on top.

    Raises
    ------
    KeyError
        If the AnnData holds no table or no predicted column.
    ValueError
        If ``table`` is none.
    """
    hierarchy = read_hierarchy(table, groupby)
    paths = _grouped(hierarchy.paths())
    counts = read_populations(table, groupby).value_counts() if isinstance(table, AnnData) else None
    colors, depth = hues(hierarchy), max(len(path) for path in paths)
    width = 1.2 + 2.1 * depth
    ax = plt.subplots(figsize=(width, 0.5 + 0.24 * len(paths)), layout="constrained")[1] if ax is None else ax
    nodes = _nodes(paths, depth)
    for node, (x, y) in nodes.items():
        if node != _ROOT:
            parent_x, parent_y = nodes[node[:-1]]
            ax.plot(
                [parent_x, parent_x + 0.12, parent_x + 0.12, x],
                [parent_y, parent_y, y, y],
                color="0.7",
                lw=0.9,
                zorder=1,
            )
    total, leaves = 0 if counts is None else int(counts.sum()), set(paths)
    for node, (x, y) in nodes.items():
        n_cells = None if counts is None else sum(int(counts.get(p[-1], 0)) for p in paths if p[: len(node)] == node)
        size = 30.0 if n_cells is None else 14 + 220 * n_cells / max(total, 1)
        ax.scatter([x], [y], s=size, color=[colors[node[-1]] if node else (0.4, 0.4, 0.4)], zorder=2)
        _name_node(
            ax, (x, y), node, node in leaves, "" if n_cells is None else f"{n_cells:,} ({n_cells / max(total, 1):.1%})"
        )
    ax.set(xlim=(-0.35, depth + 0.9), ylim=(len(paths) - 0.4, -0.9))
    ax.axis("off")
    return ax


def _name_node(ax: Axes, at: tuple[float, float], node: tuple[str, ...], is_leaf: bool, number: str) -> None:
    """Name leaves on their right, groups on the left above their line, and the root above its dot."""
    shift, sides, text = (-4, 11), ("center", "bottom"), f"all\n{number.split(' ')[0]}"
    if is_leaf:
        shift, sides, text = (9, 0), ("left", "center"), f"{node[-1]}  {number}"
    elif node:
        shift, sides, text = (4, 7), ("right", "bottom"), f"{node[-1]}  {number}"
    name = ax.annotate(text.strip(), at, shift, textcoords="offset points", fontsize="small")
    name.set(ha=sides[0], va=sides[1])


def _grouped(paths: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Paths in table order, members of a group together."""
    first: dict[tuple[str, ...], int] = {}
    for i, path in enumerate(paths):
        for k in range(1, len(path) + 1):
            first.setdefault(path[:k], i)
    return sorted(paths, key=lambda path: [first[path[:k]] for k in range(1, len(path) + 1)])


def _nodes(paths: Sequence[tuple[str, ...]], depth: int) -> dict[tuple[str, ...], tuple[float, float]]:
    """Position of every node; leaves stand in the last column, groups in the middle of their members."""
    rows: dict[tuple[str, ...], list[int]] = {}
    for row, path in enumerate(paths):
        for k in range(len(path) + 1):
            rows.setdefault(path[:k], []).append(row)
    leaves = set(paths)
    return {node: (float(depth if node in leaves else len(node)), float(np.mean(at))) for node, at in rows.items()}


# ---------------------------------------------------------------- shares per sample


def population_ratios(
    ratios: pd.DataFrame | AnnData,
    sample_key: str | None = None,
    populations: Sequence[str] | None = None,
    groupby: str = "scyan_population",
    confidence: float = 0.95,
) -> Figure:
    """Draw the share of every population in every sample, with intervals.

    Intervals are those of Wilson for the share of a sample of this many cells. They say nothing about how donors differ.

    Parameters
    ----------
    ratios
        Frame with the columns ``sample``, ``population`` and ``ratio`` and the bounds ``ci_low`` and ``ci_high`` (or ``low``
        and ``high``), or an annotated AnnData.
    sample_key
        Column of ``obs`` with the samples, for an AnnData.
    populations
        Populations to draw; all by default.
    groupby
        Column of ``obs`` with the populations, for an AnnData.
    confidence
        Confidence of the intervals, for an AnnData.

    Returns
    -------
    The figure, a panel per population.

    Raises
    ------
    KeyError
        If a column is missing.
    ValueError
        If a population is unknown, the sample of a cell is missing, or the frame is empty.
    """
    frame = _ratio_frame(ratios, sample_key, groupby, confidence) if isinstance(ratios, AnnData) else ratios
    bounds = next((pair for pair in _BOUNDS if set(pair) <= set(frame.columns)), _BOUNDS[0])
    missing = [name for name in ("sample", "population", "ratio", *bounds) if name not in frame.columns]
    if missing:
        raise KeyError(f"`ratios` has no column {missing[0]!r}; pass what `cellweave.tl.population_ratios` returns.")
    frame = frame.assign(sample=frame["sample"].astype(str), population=frame["population"].astype(str))
    known = list(dict.fromkeys(frame["population"]))
    wanted = check_names("populations", known if populations is None else list(populations), known, "in `ratios`")
    if not wanted:
        raise ValueError("`ratios` has no rows; there is nothing to draw.")
    samples = list(dict.fromkeys(frame["sample"]))
    n_columns = min(_MAX_COLUMNS, len(wanted))
    n_rows = -(-len(wanted) // n_columns)
    size = ((0.7 + 0.2 * max(len(samples), 4)) * n_columns + 0.6, 1.35 * n_rows + 0.6)
    figure, axes = plt.subplots(n_rows, n_columns, squeeze=False, sharex=True, figsize=size, layout="constrained")
    for panel in axes.flat[len(wanted) :]:
        panel.set_axis_off()
    for panel, name in zip(axes.flat, wanted, strict=False):
        rows = frame[frame["population"] == name].set_index("sample")
        _draw_ratios(panel, rows.reindex(samples), bounds)
        panel.set_title(name, fontsize="small", pad=3)
        panel.set_xticks(range(len(samples)), samples, rotation=90, fontsize="x-small")
    for panel in axes.flat[max(0, len(wanted) - n_columns) : len(wanted)]:
        panel.tick_params(labelbottom=True)
    figure.supylabel("share of the cells of a sample", fontsize="small")
    return figure


def _draw_ratios(ax: Axes, rows: pd.DataFrame, bounds: tuple[str, str]) -> None:
    ratio, low, high = (rows[name].to_numpy(dtype=float) for name in ("ratio", *bounds))
    ax.errorbar(range(len(rows)), ratio, [ratio - low, high - ratio], fmt="o", ms=3.5, lw=1, color="#4477aa", capsize=2)
    ax.set(xlim=(-0.6, len(rows) - 0.4), ylim=(0, 1.12 * (np.nanmax(high, initial=0.0) or 1.0)))
    ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    ax.locator_params(axis="y", nbins=4)
    ax.tick_params(labelsize="x-small", length=2)
    ax.spines[["top", "right"]].set_visible(False)


def _ratio_frame(adata: AnnData, sample_key: str | None, groupby: str, confidence: float) -> pd.DataFrame:
    """Shares of all cells of each sample, those without a label included in the total."""
    labels = read_populations(adata, groupby)
    if sample_key is None or sample_key not in adata.obs:
        raise KeyError(f"`sample_key={sample_key!r}` is not a column of `adata.obs`; it has {list(adata.obs)[:8]}.")
    samples = adata.obs[sample_key]
    if samples.isna().any():
        raise ValueError(
            f"`adata.obs[{sample_key!r}]` is missing for {int(samples.isna().sum())} cells; name their sample."
        )
    rows = []
    for sample, part in labels.groupby(samples, observed=True, sort=True):
        counts = part.value_counts(sort=False)
        for population, n in counts.items():
            interval = binomtest(int(n), len(part)).proportion_ci(confidence, method="wilson")
            rows.append((str(sample), str(population), int(n), n / len(part), interval.low, interval.high))
    return pd.DataFrame(rows, columns=["sample", "population", "count", "ratio", "ci_low", "ci_high"])


# ---------------------------------------------------------------- agreement with labels


def annotation_confusion(
    adata: AnnData, labels_key: str, groupby: str = "scyan_population", ax: Axes | None = None, cmap: str = "Blues"
) -> Axes:
    """Draw which populations the cells of every given label got: shares of each row.

    Parameters
    ----------
    adata
        Annotated cells.
    labels_key
        Column of ``obs`` with given labels; cells without are left out. Labels named like populations stand in their order.
    groupby
        Column of ``obs`` with the predicted populations; cells without one have a column of their own.
    ax
        Axes to draw into; a new figure by default.
    cmap
        Sequential colour map.

    Returns
    -------
    The axes; ``ax.images[0]`` holds the shares.

    Raises
    ------
    KeyError
        If a column is missing.
    ValueError
        If no cell has a given label, or none a population.
    """
    predicted = read_populations(adata, groupby)
    if labels_key not in adata.obs:
        raise KeyError(f"`labels_key={labels_key!r}` is not a column of `adata.obs`; it has {list(adata.obs)[:8]}.")
    labels = adata.obs[labels_key]
    if not labels.notna().any():
        raise ValueError(f"No cell has a label in `adata.obs[{labels_key!r}]`; there is nothing to compare.")
    order = adata.obs[groupby].astype("category").cat.categories
    text = predicted.astype(object).where(predicted.notna(), _NO_LABEL).astype(str)[labels.notna()]
    table = pd.crosstab(labels[labels.notna()].astype(str), text)
    columns = [str(name) for name in [*order, _NO_LABEL] if str(name) in table.columns]
    rows = [str(name) for name in order if str(name) in table.index]
    rows += [name for name in table.index if name not in rows]
    columns += [name for name in rows if name in map(str, order) and name not in columns]  # never predicted
    table = table.reindex(rows, columns=_in_order(columns, order), fill_value=0)
    shares = table.to_numpy(dtype=float) / table.to_numpy().sum(1, keepdims=True)
    size = (2.6 + 0.3 * table.shape[1], 1.9 + 0.24 * len(rows))
    ax = plt.subplots(figsize=size, layout="constrained")[1] if ax is None else ax
    image = ax.imshow(shares, cmap=cmap, vmin=0, vmax=1, aspect="auto")
    ax.figure.colorbar(image, ax=ax, label="share of the row", shrink=0.7, format=PercentFormatter(1.0))
    _write_shares(ax, shares)
    ax.set_xticks(range(table.shape[1]), list(table.columns), rotation=90, fontsize="small")
    ax.set_yticks(
        range(len(rows)), [f"{n} ({int(c):,})" for n, c in zip(rows, table.sum(axis=1), strict=True)], fontsize="small"
    )
    ax.set(xlabel="predicted population", ylabel=f"{labels_key} (cells)")
    return ax


def _in_order(columns: Sequence[str], order: Sequence[object]) -> list[str]:
    position = {str(name): i for i, name in enumerate(order)}
    return sorted(columns, key=lambda name: position.get(name, len(position)))


def _write_shares(ax: Axes, shares: NDArray) -> None:
    for i, j in zip(*np.nonzero(shares >= _SHOWN_SHARE), strict=True):
        ax.text(j, i, f"{100 * shares[i, j]:.0f}", ha="center", va="center", fontsize=6,
                color="white" if shares[i, j] > 0.6 else "0.2")  # fmt: skip
