"""Predicted against measured effects of a perturbation, one point per gene."""

from __future__ import annotations

from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from anndata import AnnData
from matplotlib.axes import Axes
from numpy.typing import NDArray
from scipy.stats import false_discovery_control, mannwhitneyu

from ._perturbation_data import Populations, annotate_points, correlation_text, read_populations

__all__ = ["de_agreement", "perturbation_shift"]

_SIZE = (4.6, 4.4)  # inches
_DOT, _TOP = "0.65", "#4477aa"
# Genes tested at once: the ranks of all cells and genes would be a second copy of the data.
_CHUNK = 500
# What is said of a gene, its colour, and whether it is drawn above the others.
_CALLS = {
    "called in both, same direction": "#117733",
    "called in both, opposite": "#cc3311",
    "measured only": "#4477aa",
    "predicted only": "#ee7733",
    "neither": "0.8",
}


def perturbation_shift(
    pred: AnnData,
    true: AnnData,
    perturbation: str,
    perturbation_key: str = "perturbation",
    control_key: str = "control",
    layer: str | None = None,
    n_labels: int = 10,
    split_control: bool = True,
    seed: int = 0,
    ax: Axes | None = None,
) -> Axes:
    """Draw the predicted against the measured change of the mean of every gene.

    A shift is the mean over perturbed cells less the mean over control cells. If both shifts are taken from the same control
    cells, the noise of these cells correlates them even where nothing is predicted, so by default each gets its own random
    half. The correlation in the title is that of the points that are drawn. Control and measured cells should be of the
    same cell type, donor or line as the predicted ones: select them before.

    Parameters
    ----------
    pred
        Predicted cells, as :meth:`cellweave.model.CascadedFlowModel.predict_perturbation` returns them: log-normalised.
    true
        Measured cells, perturbed and control, log-normalised.
    perturbation
        Label of the perturbation.
    perturbation_key
        Column of ``obs`` with the perturbations, in both objects.
    control_key
        Label of control cells in that column of ``true``.
    layer
        Layer of ``true`` with log-normalised expression; ``X`` by default.
    n_labels
        Number of genes to name and colour: those with the largest measured shift.
    split_control
        Use disjoint halves of the control cells for prediction and measurement.
    seed
        Seed of the halves.
    ax
        Axes to draw into; a new figure by default.

    Returns
    -------
    The axes; ``ax.collections[0]`` holds all genes, in the order of ``pred.var_names``, ``ax.collections[1]`` the named ones.

    Raises
    ------
    KeyError
        If the column or the layer is missing.
    ValueError
        If a group has fewer than two cells, genes do not match, or the data are counts or have missing values.
    """
    cells = read_populations(pred, true, perturbation, perturbation_key, control_key, layer)
    for_pred, for_true = cells.controls(split_control, seed)
    x = cells.measured.mean(0) - for_true.mean(0)
    y = cells.predicted.mean(0) - for_pred.mean(0)
    ax = plt.subplots(figsize=_SIZE, layout="constrained")[1] if ax is None else ax
    top = np.argsort(-np.abs(x), kind="stable")[:n_labels]
    ax.scatter(x, y, s=8, color=_DOT, lw=0, alpha=0.7, rasterized=True)
    ax.scatter(x[top], y[top], s=18, color=_TOP, lw=0, zorder=3)
    _square(ax, x, y)
    _name_axes(ax, "mean shift", cells)
    how = "disjoint control halves" if split_control else "shared control cells"
    ax.set_title(f"{perturbation}: {correlation_text(x, y)} ({how})", fontsize="medium", loc="left")
    annotate_points(ax, x[top], y[top], [cells.genes[i] for i in top])
    return ax


# ---------------------------------------------------------------- differential expression


class _Calls(NamedTuple):
    """Differential expression of one group of cells against control cells."""

    fold: NDArray  # (gene,): log2 of the ratio of means
    called: NDArray[np.bool_]  # (gene,)


def de_agreement(
    pred: AnnData,
    true: AnnData,
    perturbation: str,
    perturbation_key: str = "perturbation",
    control_key: str = "control",
    layer: str | None = None,
    alpha: float = 0.05,
    pseudocount: float = 0.1,
    n_labels: int = 10,
    split_control: bool = True,
    seed: int = 0,
    ax: Axes | None = None,
) -> Axes:
    """Draw predicted against measured log fold changes, coloured by which of the two calls the gene.

    Genes are called by the Wilcoxon rank-sum test against control cells (with corrections for ties and continuity) with the
    false discovery rate of Benjamini and Hochberg over the genes. More cells call more genes: the axes say how many there
    are. Fold changes are those of means of ``exp(x) - 1``.

    Parameters
    ----------
    pred
        Predicted cells, log-normalised.
    true
        Measured cells, perturbed and control, log-normalised.
    perturbation
        Label of the perturbation.
    perturbation_key
        Column of ``obs`` with the perturbations, in both objects.
    control_key
        Label of control cells in that column of ``true``.
    layer
        Layer of ``true`` with log-normalised expression; ``X`` by default.
    alpha
        False discovery rate.
    pseudocount
        Added to both means, in units of normalised counts, so that genes without counts in a group have a fold change.
    n_labels
        Number of called genes to name: those with the largest fold change on either axis.
    split_control
        Use disjoint halves of the control cells for prediction and measurement, see :func:`perturbation_shift`.
    seed
        Seed of the halves.
    ax
        Axes to draw into; a new figure by default.

    Returns
    -------
    The axes, with one collection per entry of the legend.

    Raises
    ------
    KeyError
        If the column or the layer is missing.
    ValueError
        If a group has fewer than two cells, genes do not match, the data are counts or have missing values, or ``alpha`` or
        ``pseudocount`` is out of range.
    """
    if not 0 < alpha < 1:
        raise ValueError(f"`alpha` must be between 0 and 1, got {alpha}; 0.05 is common.")
    if pseudocount <= 0:
        raise ValueError(f"`pseudocount` must be positive, got {pseudocount}; 0.1 is the default.")
    cells = read_populations(pred, true, perturbation, perturbation_key, control_key, layer)
    for_pred, for_true = cells.controls(split_control, seed)
    measured = _call(cells.measured, for_true, alpha, pseudocount)
    predicted = _call(cells.predicted, for_pred, alpha, pseudocount)
    ax = plt.subplots(figsize=(_SIZE[0], _SIZE[1] + 0.5), layout="constrained")[1] if ax is None else ax
    kinds = _kinds(measured, predicted)
    for level, (kind, color) in enumerate(reversed(_CALLS.items())):
        of_kind = kinds == kind
        size, label = 7 if kind == "neither" else 14, f"{kind} ({of_kind.sum():,})"
        ax.scatter(measured.fold[of_kind], predicted.fold[of_kind], s=size, color=color, lw=0, alpha=0.8, label=label,
                   zorder=2 + 0.1 * level, rasterized=True)  # fmt: skip
    _square(ax, measured.fold, predicted.fold)
    _name_axes(ax, "log2 fold change", cells)
    handles, labels = ax.get_legend_handles_labels()
    ax.legend(handles[::-1], labels[::-1], loc="upper left", bbox_to_anchor=(0, -0.15), borderaxespad=0, ncols=2,
              frameon=False, fontsize="x-small", markerscale=1.5, handletextpad=0.2)  # fmt: skip
    ax.set_title(f"{perturbation}: genes called at FDR {alpha:g}", fontsize="medium", loc="left")
    called = np.flatnonzero(kinds != "neither")
    largest = np.maximum(np.abs(measured.fold), np.abs(predicted.fold))[called]
    top = called[np.argsort(-largest, kind="stable")[:n_labels]]
    annotate_points(ax, measured.fold[top], predicted.fold[top], [cells.genes[i] for i in top])
    return ax


def _call(cells: NDArray, control: NDArray, alpha: float, pseudocount: float) -> _Calls:
    means = [np.expm1(group).mean(0) + pseudocount for group in (cells, control)]
    return _Calls(np.log2(np.maximum(means[0], pseudocount) / np.maximum(means[1], pseudocount)),
                  false_discovery_control(_p_values(cells, control)) < alpha)  # fmt: skip


def _p_values(cells: NDArray, control: NDArray) -> NDArray:
    """Of the rank-sum test of every gene; 1 where all cells are alike."""
    p = np.ones(cells.shape[1])
    varies = (np.maximum(cells.max(0), control.max(0)) > np.minimum(cells.min(0), control.min(0))).nonzero()[0]
    for start in range(0, len(varies), _CHUNK):
        genes = varies[start : start + _CHUNK]
        p[genes] = mannwhitneyu(cells[:, genes], control[:, genes], method="asymptotic").pvalue
    return p


def _kinds(measured: _Calls, predicted: _Calls) -> NDArray[np.str_]:
    """Entry of the legend of every gene."""
    both = measured.called & predicted.called
    same = np.sign(measured.fold) == np.sign(predicted.fold)
    same_way, opposite, only_measured, only_predicted, neither = _CALLS
    conditions = [both & same, both & ~same, measured.called, predicted.called]
    return np.select(conditions, [same_way, opposite, only_measured, only_predicted], neither)


# ---------------------------------------------------------------- axes


def _square(ax: Axes, x: NDArray, y: NDArray) -> None:
    """Equal limits on both axes, the identity, and lines through zero."""
    low, high = min(x.min(), y.min(), 0.0), max(x.max(), y.max(), 0.0)
    margin = 0.08 * (high - low) or 1.0
    span = (low - margin, high + margin)
    ax.plot(span, span, color="0.3", ls="--", lw=0.9, zorder=1)
    ax.axhline(0, color="0.85", lw=0.8, zorder=0)
    ax.axvline(0, color="0.85", lw=0.8, zorder=0)
    ax.set(xlim=span, ylim=span)
    ax.set_box_aspect(1)
    ax.spines[["top", "right"]].set_visible(False)


def _name_axes(ax: Axes, what: str, cells: Populations) -> None:
    ax.set_xlabel(f"measured {what} ({len(cells.measured):,} cells)")
    ax.set_ylabel(f"predicted {what} ({len(cells.predicted):,} cells)")
