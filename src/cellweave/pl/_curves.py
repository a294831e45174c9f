"""Loss terms and metrics over the epochs of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

__all__ = ["training_curves"]

TRAINING, VALIDATION = "training", "validation"
_COLORS = {TRAINING: "#4477aa", VALIDATION: "#ee7733"}
_PANEL = (3.3, 2.5)  # inches
_MAX_COLUMNS = 3
# With fewer epochs every epoch gets a dot; a single epoch would otherwise be invisible.
_DOTS_BELOW = 25


class _Term(NamedTuple):
    title: str
    unit: str


# In the order in which they are drawn; terms of other models follow under their own names.
_TERMS = {
    "loss": _Term("Loss", "weighted sum of the terms"),
    "recon_loss": _Term("Reconstruction of hidden genes", "nats per hidden count"),
    "sw_loss": _Term("Sliced Wasserstein", "squared embedding units"),
    "masked_mae": _Term("Error at hidden genes", "counts per gene"),
    "masked_corr": _Term("Correlation at hidden genes", "Pearson r per cell"),
}


def training_curves(
    history: Mapping[str, pd.DataFrame | pd.Series] | Any,
    terms: Sequence[str] | str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Draw how every loss term and metric developed over the epochs.

    One panel per term, with the training and the validation cells as two curves; a metric that is computed on
    validation cells only has one. Epochs are counted from one. Nothing is smoothed.

    Parameters
    ----------
    history
        ``model.history``, a mapping of names such as ``recon_loss_train`` and ``recon_loss_validation`` to one-column
        frames indexed by epoch, or an object that has it as its attribute ``history``.
    terms
        Terms to draw and their order, for instance ``["recon_loss", "masked_corr"]``; all by default.
    ax
        Axes to draw a single term into; a new figure by default.

    Returns
    -------
    The figure; ``figure.axes`` are the panels in the order of the terms.

    Raises
    ------
    ValueError
        If the history is empty, a term is unknown, or ``ax`` is given for several terms.
    """
    curves = _chosen(_curves(history), terms)
    if ax is not None and len(curves) != 1:
        raise ValueError(
            f"`ax` holds one panel, but there are {len(curves)} terms {list(curves)}; name one in `terms`."
        )
    panels = _panels(len(curves)) if ax is None else [ax]
    for panel, (name, splits) in zip(panels, curves.items(), strict=True):
        _draw(panel, _TERMS.get(name, _Term(name, "")), splits)
    both = next((panel for panel in panels if len(panel.lines) > 1), panels[0])
    both.legend(frameon=False, loc="best", handlelength=1.5)
    figure = panels[0].get_figure(root=True)
    assert figure is not None  # panels were made here or given as Axes of a figure
    return figure


def _curves(history: Mapping[str, pd.DataFrame | pd.Series] | Any) -> dict[str, dict[str, pd.Series]]:
    """Finite values by term and split; terms in the order of the table, then in that of the history."""
    history = getattr(history, "history", history)
    if not isinstance(history, Mapping) or not history:
        raise ValueError("`history` has no curves; train the model first, then pass `model.history` or the model.")
    found: dict[str, dict[str, pd.Series]] = {}
    for key, column in history.items():
        name, split = _parse(key)
        values = pd.to_numeric(column.squeeze("columns") if isinstance(column, pd.DataFrame) else column).dropna()
        if split is not None and len(values):
            found.setdefault(name, {})[split] = values
    if not found:
        raise ValueError(f"`history` has no training or validation curve among {list(history)}.")
    return {name: found[name] for name in [*(t for t in _TERMS if t in found), *(f for f in found if f not in _TERMS)]}


def _parse(key: str) -> tuple[str, str | None]:
    """Term and split of a name in a history: ``recon_loss_train``, or ``train_loss`` for the sum of all terms."""
    for prefix, split in (("train_", TRAINING), ("validation_", VALIDATION)):
        if key == f"{prefix}loss":
            return "loss", split
    for suffix, split in (("_train", TRAINING), ("_validation", VALIDATION)):
        if key.endswith(suffix):
            return key.removesuffix(suffix), split
    return key, None


def _chosen(curves: dict[str, dict[str, pd.Series]], terms: Sequence[str] | str | None) -> dict[str, dict]:
    terms = list(curves) if terms is None else [terms] if isinstance(terms, str) else list(terms)
    unknown = [term for term in terms if term not in curves]
    if unknown or not terms:
        raise ValueError(f"`terms` has {unknown[:5]}, which the history does not; it has {list(curves)}.")
    return {term: curves[term] for term in terms}


def _panels(n: int) -> list[Axes]:
    n_columns = min(n, _MAX_COLUMNS)
    n_rows = -(-n // n_columns)
    size = (_PANEL[0] * n_columns, _PANEL[1] * n_rows)
    figure, axes = plt.subplots(n_rows, n_columns, figsize=size, squeeze=False, layout="constrained")
    for spare in axes.flat[n:]:
        figure.delaxes(spare)
    return list(axes.flat[:n])


def _draw(ax: Axes, term: _Term, splits: dict[str, pd.Series]) -> None:
    for split in (TRAINING, VALIDATION):
        if split in splits:
            values = splits[split]
            marker = "o" if len(values) < _DOTS_BELOW else None
            epochs = np.asarray(values.index) + 1
            ax.plot(epochs, values.to_numpy(), color=_COLORS[split], lw=1.4, marker=marker, ms=3, label=split)
    ax.set_title(term.title, fontsize="medium", loc="left")
    ax.set(xlabel="epoch", ylabel=term.unit)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    n_epochs = max(values.index[-1] + 1 for values in splits.values())
    if n_epochs < _DOTS_BELOW:
        ax.set_xlim(0.5, n_epochs + 0.5)
    ax.spines[["top", "right"]].set_visible(False)
