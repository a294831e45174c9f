"""Latent markers of populations: densities, profiles, batches before and after correction, trust in each marker."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ._attention import _spread
from ._population_data import check_names, density, distance, limits, read_latent, read_populations

__all__ = ["batch_correction", "latent_density", "marker_monotonicity", "population_profile"]

_PANEL = (1.9, 1.25)  # inches
_POPULATION, _OTHERS = "#4477aa", "0.6"
_FLAGGED, _FINE = "#cc3311", "#4477aa"
# Below this rank correlation a latent marker is no longer the measured one.
_LEAST_SPEARMAN = 0.7
_BATCH_COLORS = 10  # of tab10
_BAR = 1.4  # largest latent value on the bar of a profile
_MAX_MARKERS = 6


def latent_density(
    adata: AnnData,
    population: str | Sequence[str] | None = None,
    markers: Sequence[str] | None = None,
    groupby: str = "scyan_population",
    obsm: str = "X_scyan",
    n_markers: int = 4,
) -> Figure:
    """Draw the density of latent markers of populations against that of all other cells.

    A row per population. The dotted lines are where the table puts negative and positive cells. Densities are smoothed over
    all cells, and both integrate to one, so that rare populations can be seen.

    Parameters
    ----------
    adata
        Annotated cells with latent markers.
    population
        Population, or several; all that have cells by default.
    markers
        Markers to draw; by default, for every population, those that differ most from the other cells, by the statistic of
        Kolmogorov and Smirnov, which stands in the panel.
    groupby
        Column of ``obs`` with the populations; cells without one count as others.
    obsm
        Frame of latent markers in ``obsm``.
    n_markers
        Number of markers, if they are not given.

    Returns
    -------
    The figure; ``figure.axes`` are the panels row by row.

    Raises
    ------
    KeyError
        If the populations or the latent markers are missing.
    ValueError
        If a population or marker is unknown, or latent markers have no names.
    """
    labels, latent = read_populations(adata, groupby), read_latent(adata, obsm)
    known = list(labels.cat.categories)
    wanted = known if population is None else [population] if isinstance(population, str) else list(population)
    wanted = check_names("population", wanted, known, f"populations with cells in `adata.obs[{groupby!r}]`")
    columns = [str(name) for name in latent.columns]
    if markers is not None:
        markers = check_names("markers", list(markers), columns, f"columns of `adata.obsm[{obsm!r}]`")
    values = latent.to_numpy(dtype=float)
    n_columns = min(n_markers, len(columns)) if markers is None else len(markers)
    figure, axes = _panels(len(wanted), n_columns)
    for row, name in zip(axes, wanted, strict=True):
        inside = (labels == name).to_numpy()
        apart = np.array([distance(values[inside, j], values[~inside, j]) for j in range(len(columns))])
        chosen = (
            np.argsort(-apart, kind="stable")[:n_columns] if markers is None else [columns.index(m) for m in markers]
        )
        for panel, j in zip(row, chosen, strict=True):
            _draw_pair(panel, values[:, j], inside)
            panel.set_xlabel(columns[j], fontsize="small", labelpad=1)
            panel.text(0.98, 0.95, f"KS {apart[j]:.2f}", transform=panel.transAxes, ha="right", va="top", fontsize=6)
        row[0].set_ylabel(f"{name}\n({inside.sum():,})", rotation=0, ha="right", va="center", fontsize="small")
    handles = axes[0, 0].lines[:2]
    figure.legend(handles, ["population", "all other cells"], loc="outside upper right", ncols=2, frameon=False)
    return figure


def _draw_pair(ax: Axes, values: NDArray, inside: NDArray[np.bool_]) -> None:
    span = limits(values)
    for part, color in ((values[inside], _POPULATION), (values[~inside], _OTHERS)):
        grid, height = density(part, span)
        ax.plot(grid, height, color=color, lw=1.2)
        ax.fill_between(grid, height, color=color, alpha=0.25, lw=0)
    for mode in (-1, 1):
        ax.axvline(mode, color="0.3", ls=":", lw=0.7, zorder=0)


def batch_correction(
    adata: AnnData,
    batch_key: str,
    layer: str = "scyan_corrected",
    markers: Sequence[str] | None = None,
    before: str | None = None,
) -> Figure:
    """Draw the density of markers in every batch, before and after batch correction.

    The number in a panel is the largest distance (Kolmogorov and Smirnov) between a batch and all other cells. Batches that
    hold different populations must differ, before and after.

    Parameters
    ----------
    adata
        Cells with corrected expression.
    batch_key
        Column of ``obs`` with the batches.
    layer
        Layer with the corrected expression; NaN in variables that were not corrected.
    markers
        Variables to draw; by default the six whose batches differ most before.
    before
        Layer with the expression before; ``adata.X`` by default.

    Returns
    -------
    The figure; ``figure.axes`` are the panels before, then those after.

    Raises
    ------
    KeyError
        If the column or a layer is missing.
    ValueError
        If there are fewer than two batches, or a marker is unknown or was not corrected.
    """
    batches = _batches(adata, batch_key)
    for name in (layer, before):
        if name is not None and name not in adata.layers:
            raise KeyError(f"`adata.layers` has no {name!r}; write it with `model.correct_batch` first.")
    corrected = [m for m in adata.var_names if np.isfinite(_column(adata, m, layer)).any()]
    wanted = corrected if markers is None else list(markers)
    check_names("markers", wanted, corrected, f"corrected in `adata.layers[{layer!r}]`")
    columns = {(m, name): _column(adata, m, name) for m in wanted for name in (before, layer)}
    apart = {key: _largest_distance(values, batches) for key, values in columns.items()}
    if markers is None:
        wanted = sorted(wanted, key=lambda m: -apart[m, before])[:_MAX_MARKERS]
    figure, axes = _panels(2, len(wanted))
    for row, name, title in zip(axes, (before, layer), ("before", "after"), strict=True):
        for panel, marker in zip(row, wanted, strict=True):
            _draw_batches(panel, columns[marker, name], batches)
            panel.text(
                0.98, 0.95, f"KS {apart[marker, name]:.2f}", transform=panel.transAxes, ha="right", va="top", fontsize=6
            )
            panel.set_xlabel(marker if name == layer else "", fontsize="small", labelpad=1)
        row[0].set_ylabel(title)
    names = [str(name) for name in batches.cat.categories]
    figure.legend(axes[0, 0].lines, names, loc="outside right upper", frameon=False, fontsize="small", title=batch_key)
    return figure


def _batches(adata: AnnData, batch_key: str) -> pd.Series:
    if batch_key not in adata.obs:
        raise KeyError(f"`batch_key={batch_key!r}` is not a column of `adata.obs`; it has {list(adata.obs)[:8]}.")
    batches = adata.obs[batch_key].astype("category").cat.remove_unused_categories()
    if len(batches.cat.categories) < 2:
        raise ValueError(
            f"`adata.obs[{batch_key!r}]` has {len(batches.cat.categories)} batch; two are needed to compare."
        )
    return batches


def _column(adata: AnnData, marker: str, layer: str | None) -> NDArray:
    column = adata[:, [marker]].layers[layer] if layer is not None else adata[:, [marker]].X
    return np.asarray(column.toarray() if sp.issparse(column) else column, dtype=float).ravel()


def _largest_distance(values: NDArray, batches: pd.Series) -> float:
    codes = batches.cat.codes.to_numpy()
    return max(distance(values[codes == k], values[codes != k]) for k in range(len(batches.cat.categories)))


def _draw_batches(ax: Axes, values: NDArray, batches: pd.Series) -> None:
    span, codes, colors = limits(values), batches.cat.codes.to_numpy(), plt.get_cmap("tab10")
    for k in range(len(batches.cat.categories)):
        grid, height = density(values[codes == k], span)
        ax.plot(grid, height, color=colors(k % _BATCH_COLORS), ls="-" if k < _BATCH_COLORS else "--", lw=1.1, alpha=0.9)


def _panels(n_rows: int, n_columns: int) -> tuple[Figure, NDArray]:
    size = (1.3 + _PANEL[0] * n_columns, 0.5 + _PANEL[1] * n_rows)
    figure, axes = plt.subplots(n_rows, n_columns, squeeze=False, figsize=size, layout="constrained")
    for panel in axes.flat:
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.set_yticks([])
        panel.tick_params(labelsize="x-small", length=2, pad=1)
        panel.set_ymargin(0.15)
    return figure, axes


# ---------------------------------------------------------------- one population, one marker at a time


def population_profile(
    adata: AnnData,
    population: str,
    groupby: str = "scyan_population",
    obsm: str = "X_scyan",
    ax: Axes | None = None,
    cmap: str = "RdBu_r",
) -> Axes:
    """Draw a population as a bar from negative to positive, with every marker at its mean latent value.

    Parameters
    ----------
    adata
        Annotated cells with latent markers.
    population
        Population to draw.
    groupby
        Column of ``obs`` with the populations.
    obsm
        Frame of latent markers in ``obsm``.
    ax
        Axes to draw into; a new figure by default.
    cmap
        Diverging colour map of the bar.

    Returns
    -------
    The axes; the vertical axis is the latent value. Means beyond the ends of the bar are drawn at the ends.

    Raises
    ------
    KeyError
        If the populations or the latent markers are missing.
    ValueError
        If the population has no cells, or latent markers have no names.
    """
    labels, latent = read_populations(adata, groupby), read_latent(adata, obsm)
    check_names("population", [population], list(labels.cat.categories), "populations with cells")
    inside = (labels == population).to_numpy()
    means = latent.loc[inside].mean().dropna().sort_values()
    longest = max((len(str(name)) for name in means.index), default=0)
    size = (2.3 + 0.09 * longest, 0.8 + 0.2 * max(len(means), 12))
    ax = plt.subplots(figsize=size, layout="constrained")[1] if ax is None else ax
    bound = _BAR
    ax.imshow(np.linspace(-1, 1, 256)[:, None], cmap=cmap, aspect="auto", origin="lower", extent=(0, 1, -bound, bound))
    shown = means.clip(-bound, bound).to_numpy()
    places = _spread((shown + bound) / (2 * bound), min(0.95 / max(len(means), 1), 0.045)) * 2 * bound - bound
    for name, value, shown_at, place in zip(means.index, means, shown, places, strict=True):
        ax.plot([0, 1], [shown_at, shown_at], color="0.15", lw=0.8)
        ax.plot([1, 1.25], [shown_at, place], color="0.5", lw=0.6, clip_on=False)
        ax.text(1.3, place, f"{name}  {value:+.2f}", va="center", fontsize="small")
    ax.set(xlim=(0, 1.5), ylim=(-bound, bound), xticks=[], yticks=[-1, 0, 1])
    ax.set_yticklabels(["Neg", "0", "Pos"])
    ax.spines[:].set_visible(False)
    ax.set_title(f"{population} ({inside.sum():,} cells)", fontsize="medium", loc="left")
    return ax


def marker_monotonicity(diagnostics: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw how well every latent marker follows the measured marker it stands for.

    Parameters
    ----------
    diagnostics
        What :meth:`cellweave.model.ScyanModel.get_marker_diagnostics` returns: a row per marker, with ``spearman`` and,
        where there is one, a ``flag``. Markers below 0.7 are red and named with their flag.
    ax
        Axes to draw into; a new figure by default.

    Returns
    -------
    The axes, markers from the best (top) to the worst.

    Raises
    ------
    ValueError
        If there is no column ``spearman``, or no marker has a value.
    """
    if "spearman" not in diagnostics or not diagnostics["spearman"].notna().any():
        raise ValueError("`diagnostics` has no values in a column 'spearman'; pass `model.get_marker_diagnostics()`.")
    frame = diagnostics[diagnostics["spearman"].notna()].sort_values("spearman")
    values, rows = frame["spearman"].to_numpy(dtype=float), np.arange(len(frame))
    low = values < _LEAST_SPEARMAN
    ax = plt.subplots(figsize=(4.6, 0.9 + 0.21 * len(frame)), layout="constrained")[1] if ax is None else ax
    colors = np.where(low, _FLAGGED, _FINE)
    ax.hlines(rows, 0, values, color=colors, lw=1.5)
    ax.scatter(values, rows, c=colors, s=26, zorder=3)
    for row in rows[low]:
        flag = str(frame["flag"].iloc[row]) if "flag" in frame and isinstance(frame["flag"].iloc[row], str) else ""
        at = (max(values[row], 0), row)  # right of zero, where no name of a marker stands
        ax.annotate(f"{values[row]:.2f} {flag}".strip(), at, (6, 0), textcoords="offset points", va="center",
                    fontsize="small", color=_FLAGGED, bbox={"color": "white", "pad": 0.5})  # fmt: skip
    ax.axvline(_LEAST_SPEARMAN, color="0.4", ls="--", lw=0.8)
    ax.axvline(0, color="0.7", lw=0.8)
    ax.set_yticks(rows, [str(name) for name in frame.index], fontsize="small")
    ax.set(xlim=(min(-0.05, values.min() - 0.1), 1.05), ylim=(-0.7, len(frame) - 0.3))
    ax.set_xlabel("rank correlation with the measured marker", fontsize="small")
    ax.spines[["top", "right"]].set_visible(False)
    return ax
