"""Control, measured and predicted cells side by side: single genes, and the first principal components."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ._perturbation_data import COLORS, CONTROL, MEASURED, PREDICTED, read_populations
from ._population_data import density

__all__ = ["perturbation_embedding", "perturbation_genes"]

_PANEL = (2.0, 2.3)  # inches
_MAX_COLUMNS = 5
# Half of the width of a group on the axis, which stands for all of its cells.
_HALF_WIDTH = 0.42
# Share of the height of an axis, below zero, that the bars of zeros and their numbers take.
_BELOW = 0.15
# Fewer cells with the gene than this are drawn one by one: a density of them would be invented.
_MIN_FOR_DENSITY = 10
# Cells of a group that are drawn; more only hide each other.
_MAX_DRAWN = 2000


def perturbation_genes(
    pred: AnnData,
    true: AnnData,
    perturbation: str,
    genes: Sequence[str] | str | None = None,
    perturbation_key: str = "perturbation",
    control_key: str = "control",
    layer: str | None = None,
    n_genes: int = 5,
) -> Figure:
    """Draw how single genes are distributed in control, measured and predicted cells.

    Most values are zeros, which a violin would hide. So zeros and other values are drawn apart: the bar at the bottom is as
    wide as the share of cells without the gene, which is printed below it; the shape above is the density of the cells
    with the gene, and where it is widest it is as wide as their share. The white dot is the mean over all cells, zeros
    included. Fewer than ten cells with the gene are drawn as single dots.

    Parameters
    ----------
    pred
        Predicted cells, log-normalised. Values of zero or less count as zeros.
    true
        Measured cells, perturbed and control, log-normalised.
    perturbation
        Label of the perturbation.
    genes
        Genes to draw; by default those with the largest measured shift of the mean.
    perturbation_key
        Column of ``obs`` with the perturbations, in both objects.
    control_key
        Label of control cells in that column of ``true``.
    layer
        Layer of ``true`` with log-normalised expression; ``X`` by default.
    n_genes
        Number of genes, if they are not given.

    Returns
    -------
    The figure; ``figure.axes`` are the panels in the order of the genes.

    Raises
    ------
    KeyError
        If the column or the layer is missing.
    ValueError
        If a group has fewer than two cells, a gene is unknown, or the data are counts or have missing values.
    """
    given = [genes] if isinstance(genes, str) else genes
    if given is not None and not len(given):
        raise ValueError("`genes` is empty; name at least one gene, or leave it out for those that change most.")
    cells = read_populations(pred, true, perturbation, perturbation_key, control_key, layer, given)
    chosen = np.arange(len(cells.genes))
    if given is None:
        shift = np.abs(cells.measured.mean(0) - cells.control.mean(0))
        chosen = np.argsort(-shift, kind="stable")[:n_genes]
    n_columns = min(len(chosen), _MAX_COLUMNS)
    n_rows = -(-len(chosen) // n_columns)
    size = (0.5 + _PANEL[0] * n_columns, 0.6 + _PANEL[1] * n_rows)
    figure, axes = plt.subplots(n_rows, n_columns, squeeze=False, figsize=size, layout="constrained")
    for spare in axes.flat[len(chosen) :]:
        figure.delaxes(spare)
    for panel, gene in zip(axes.flat, chosen, strict=False):
        _draw_gene(panel, {name: group[:, gene] for name, group in cells.groups().items()})
        panel.set_title(cells.genes[gene], fontsize="medium", style="italic")
    for row in axes:
        row[0].set_ylabel("log-normalised expression", fontsize="small")
    counts = ", ".join(f"{len(group):,} {name}" for name, group in cells.groups().items())
    figure.suptitle(f"{perturbation} ({counts} cells); below: share of zeros", fontsize="small", x=0.01, ha="left")
    return figure


def _draw_gene(ax: Axes, groups: dict[str, NDArray]) -> None:
    top = max(max(values.max() for values in groups.values()), 1e-3) * 1.08
    bar = 0.3 * _BELOW * top
    for place, (name, values) in enumerate(groups.items()):
        zero, color = values <= 0, COLORS[name]
        ax.bar(place, -bar, 2 * _HALF_WIDTH * zero.mean(), color=color, lw=0, label=name)
        ax.text(place, -1.4 * bar, f"{zero.mean():.0%}", ha="center", va="top", fontsize="x-small")
        grid, width = _shape(values, top)
        if len(grid):
            half = _HALF_WIDTH * width
            ax.fill_betweenx(grid, place - half, place + half, color=color, lw=0.6, alpha=0.85)
        else:
            ax.scatter(np.full((~zero).sum(), place), values[~zero], s=7, color=color, lw=0)
        ax.scatter(place, values.mean(), s=22, color="white", edgecolor="0.15", lw=0.9, zorder=4)
    ax.axhline(0, color="0.3", lw=0.6)
    ax.set_xticks(range(len(groups)), list(groups), fontsize="x-small")
    ax.set(xlim=(-0.55, len(groups) - 0.45), ylim=(-_BELOW * top * 0.95, top))
    ax.set_yticks([tick for tick in ax.get_yticks() if 0 <= tick <= top])
    ax.tick_params(labelsize="x-small", length=2)
    ax.tick_params(axis="x", length=0)
    ax.spines[["top", "right", "bottom"]].set_visible(False)


def _shape(values: NDArray, top: float) -> tuple[NDArray, NDArray]:
    """Density of the cells with the gene, its largest value their share; empty where they are too few."""
    positive = values[values > 0]
    if len(positive) < _MIN_FOR_DENSITY:
        return np.empty(0), np.empty(0)
    grid, height = density(positive, (-top, top))
    height = height + height[::-1]  # what smoothing moved below zero belongs above
    kept = (grid >= positive.min()) & (grid <= positive.max())
    if kept.sum() < 2:
        return np.empty(0), np.empty(0)
    return grid[kept], height[kept] / height[kept].max() * len(positive) / len(values)


# ---------------------------------------------------------------- principal components


def perturbation_embedding(
    pred: AnnData,
    true: AnnData,
    perturbation: str,
    components: tuple[int, int] = (1, 2),
    perturbation_key: str = "perturbation",
    control_key: str = "control",
    layer: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw control, measured and predicted cells in principal components of the measured cells.

    The components are those of control and measured cells together; predicted cells are projected, so that they cannot
    bend the picture. Arrows lead from the mean of control cells to the means of the measured and the predicted ones.

    Parameters
    ----------
    pred
        Predicted cells, log-normalised.
    true
        Measured cells, perturbed and control, log-normalised.
    perturbation
        Label of the perturbation.
    components
        The two components to draw, counted from one.
    perturbation_key
        Column of ``obs`` with the perturbations, in both objects.
    control_key
        Label of control cells in that column of ``true``.
    layer
        Layer of ``true`` with log-normalised expression; ``X`` by default.
    ax
        Axes to draw into; a new figure by default.

    Returns
    -------
    The axes; ``ax.collections[:3]`` are the control, measured and predicted cells, at most 2,000 of each. Means are those of
    all cells.

    Raises
    ------
    KeyError
        If the column or the layer is missing.
    ValueError
        If a group has fewer than two cells, genes do not match, a component does not exist, or the data are counts or
        have missing values.
    """
    cells = read_populations(pred, true, perturbation, perturbation_key, control_key, layer)
    places, explained = _project(cells.groups(), components)
    ax = plt.subplots(figsize=(4.8, 4.2), layout="constrained")[1] if ax is None else ax
    rng = np.random.default_rng(0)
    for name, xy in places.items():
        shown = rng.permutation(len(xy))[:_MAX_DRAWN]
        label = f"{name} ({len(xy):,} cells)"
        ax.scatter(xy[shown, 0], xy[shown, 1], s=7, color=COLORS[name], lw=0, alpha=0.55, label=label, rasterized=True)
    start = places[CONTROL].mean(0)
    for name in (MEASURED, PREDICTED):
        arrow = {"arrowstyle": "-|>", "color": "0.1", "lw": 1.4, "shrinkA": 0, "shrinkB": 5}
        ax.annotate("", places[name].mean(0), start, arrowprops=arrow | {"ls": "-" if name == MEASURED else "--"})
    for name, xy in places.items():
        ax.scatter(xy[:, 0].mean(), xy[:, 1].mean(), s=70, color=COLORS[name], edgecolor="0.1", lw=1.2, zorder=4)
    ax.set_xlabel(f"PC{components[0]} ({explained[0]:.1%} of variance)")
    ax.set_ylabel(f"PC{components[1]} ({explained[1]:.1%})")
    ax.set_title(f"{perturbation}: components of measured cells, circles are means", fontsize="medium", loc="left")
    ax.legend(loc="upper left", bbox_to_anchor=(0, -0.07), ncols=3, frameon=False, fontsize="x-small",
              markerscale=2, handletextpad=0.1, columnspacing=1, borderaxespad=0.3)  # fmt: skip
    ax.set(xticks=[], yticks=[])
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _project(groups: dict[str, NDArray], components: tuple[int, int]) -> tuple[dict[str, NDArray], NDArray]:
    """Coordinates ``(cell, 2)`` of every group and the explained share of variance of both components."""
    fitted = np.concatenate([groups[CONTROL], groups[MEASURED]])
    centre = fitted.mean(0)
    fitted = fitted - centre
    # of the smaller of the two products: exact, and fast for few cells with many genes or the reverse
    by_cell = len(fitted) <= fitted.shape[1]
    variance, vectors = np.linalg.eigh(fitted @ fitted.T if by_cell else fitted.T @ fitted)
    variance, vectors = variance[::-1].clip(min=0), vectors[:, ::-1]
    usable = int((variance > 1e-9 * max(variance[0], np.finfo(float).tiny)).sum())
    if not all(1 <= c <= usable for c in components):
        raise ValueError(
            f"`components`={components} asks for more than the {usable} principal components of the cells; count from 1."
        )
    chosen = np.array(components) - 1
    axes = vectors[:, chosen]
    if by_cell:
        axes = fitted.T @ axes / np.sqrt(variance[chosen])
    axes = axes * np.sign(axes[np.abs(axes).argmax(0), [0, 1]])  # the sign of a component is arbitrary: fix it
    return {name: (group - centre) @ axes for name, group in groups.items()}, variance[chosen] / variance.sum()
