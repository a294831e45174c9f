"""Attention between the cells of one context, cells grouped by label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, to_rgba
from numpy.typing import ArrayLike, NDArray

__all__ = ["context_attention"]

# The colour scale covers this share of the entries; a few cells that look at themselves would otherwise set it.
_COVERED = 99.0
# Never stretch the scale over less than this many doublings: attention that is uniform shall look uniform.
_MIN_SPAN = 0.1
# Nor over more than this: a sharp head ignores most cells completely, and how completely is not of interest.
_MAX_SPAN = 4.0
_STRIP = 0.025  # width of a colour strip, as a share of the axes
_LINE = 10.5  # height of a line of label names, in points


class _Group(NamedTuple):
    name: str
    code: int  # position among all categories
    start: int
    stop: int


def context_attention(
    attention: ArrayLike,
    labels: Sequence[str] | pd.Series | pd.Categorical,
    layer: int | None = None,
    head: int | None = None,
    palette: Mapping[str, str] | Sequence[str] | None = None,
    ax: Axes | None = None,
    cmap: str = "RdBu_r",
) -> Axes:
    """Draw which cells of a context look at which, with the cells grouped by label.

    The colour of row ``i`` and column ``j`` is the weight that cell ``i`` gives to cell ``j``, divided by the weight
    that it would give if it looked at all cells alike, on a log2 scale: 0 is no preference, 1 is twice and -1 half of
    the uniform weight. The scale is symmetric and covers 99 % of the entries, but not more than 16-fold differences;
    an arrow at an end of the colour bar says that some entries lie outside. Within a label, cells keep their order.

    Parameters
    ----------
    attention
        Weights ``(layer, head, cell, cell)``, as :meth:`cellweave.model.StackModel.get_attention` returns them, or
        ``(cell, cell)``. Rows sum to one.
    labels
        Label of each cell ``(cell,)``. Labels follow each other in the order of the categories, or else sorted.
    layer, head
        Layer and head to draw, counted from zero (negative: from the end); the mean over all of them by default.
    palette
        Colours of the labels: a mapping, or a sequence in the order of all categories such as scanpy's
        ``adata.uns["bulk_labels_colors"]``.
    ax
        Axes to draw into; a new figure by default. Colour strips and label names are drawn beside it.
    cmap
        Diverging colour map.

    Returns
    -------
    The axes. ``ax.images[0]`` holds the drawn array, in the order of the groups.

    Raises
    ------
    ValueError
        If shapes do not match, a label is missing, a layer or head does not exist, or rows do not sum to one.
    """
    weights = _weights(attention, layer, head)
    order, groups = _grouped(labels, len(weights))
    ratio = _log2_ratio(weights)[np.ix_(order, order)]
    colors = _colors(groups, palette)
    ax = plt.subplots(figsize=(6.6, 4.2), layout="constrained")[1] if ax is None else ax
    _draw_ratio(ax, ratio, cmap)
    for group in groups[1:]:
        ax.axhline(group.start - 0.5, color="0.15", lw=0.6)
        ax.axvline(group.start - 0.5, color="0.15", lw=0.6)
    _draw_strips(ax, groups, colors)
    _draw_names(ax, groups, len(ratio))
    ax.set_title(_what(np.shape(attention), layer, head), fontsize="medium", loc="left", pad=14)
    return ax


# ---------------------------------------------------------------- the array


def _weights(attention: ArrayLike, layer: int | None, head: int | None) -> NDArray:
    """One matrix ``(cell, cell)``: the chosen layer and head, or means over them."""
    maps = np.asarray(attention, dtype=float)
    if maps.ndim == 2 and layer is None and head is None:
        maps = maps[None, None]
    if maps.ndim != 4 or maps.shape[2] != maps.shape[3] or not maps.size:
        raise ValueError(
            "`attention` must be (layer, head, cell, cell), or (cell, cell) without `layer` and `head`, got shape "
            f"{np.shape(attention)}."
        )
    if not np.allclose(maps.sum(-1), 1, atol=1e-3):
        raise ValueError("The rows of `attention` do not sum to one; pass what `get_attention` returns, unscaled.")
    for axis, (name, chosen) in enumerate({"layer": layer, "head": head}.items()):
        if chosen is not None and not -maps.shape[axis] <= chosen < maps.shape[axis]:
            raise ValueError(f"`{name}={chosen}` does not exist; `attention` has {maps.shape[axis]} of them.")
    maps = maps.mean(0) if layer is None else maps[layer]
    return maps.mean(0) if head is None else maps[head]


def _log2_ratio(weights: NDArray) -> NDArray:
    """Doublings over the uniform weight; a weight that underflowed to zero counts as the smallest positive number."""
    return np.log2(np.maximum(weights, np.finfo(np.float32).tiny) * len(weights))


def _grouped(labels: Sequence[str] | pd.Series | pd.Categorical, n_cells: int) -> tuple[NDArray, list[_Group]]:
    """Order that brings cells of a label together, and the extent of each label."""
    column = pd.Categorical(labels if isinstance(labels, pd.Categorical) else pd.Series(labels))
    if len(column) != n_cells:
        raise ValueError(f"`labels` has {len(column)} entries, but `attention` is between {n_cells} cells.")
    if (column.codes < 0).any():
        raise ValueError(
            f"`labels` is missing for {(column.codes < 0).sum()} cells; name them, for instance 'unknown'."
        )
    stops = np.cumsum(np.bincount(column.codes, minlength=len(column.categories)))
    starts = np.concatenate([[0], stops[:-1]])
    present = np.flatnonzero(stops > starts)
    groups = [_Group(str(column.categories[k]), int(k), int(starts[k]), int(stops[k])) for k in present]
    return np.argsort(column.codes, kind="stable"), groups


def _colors(groups: list[_Group], palette: Mapping[str, str] | Sequence[str] | None) -> list[tuple[float, ...]]:
    """Colour of each group; categories that do not occur keep their colour for other figures."""
    needed = max(group.code for group in groups) + 1
    if palette is None:
        n_colors, cmap = (10, plt.get_cmap("tab10")) if needed <= 10 else (20, plt.get_cmap("tab20"))
        return [cmap(group.code % n_colors) for group in groups]
    if isinstance(palette, Mapping):
        missing = [group.name for group in groups if group.name not in palette]
        if missing:
            raise ValueError(f"`palette` has no colour for {missing[:5]}.")
        return [to_rgba(palette[group.name]) for group in groups]
    if len(palette) < needed:
        raise ValueError(f"`palette` has {len(palette)} colours for {needed} labels.")
    return [to_rgba(palette[group.code]) for group in groups]


# ---------------------------------------------------------------- the drawing


def _draw_ratio(ax: Axes, ratio: NDArray, cmap: str) -> None:
    span = float(np.clip(np.percentile(np.abs(ratio), _COVERED), _MIN_SPAN, _MAX_SPAN))
    image = ax.imshow(ratio, cmap=cmap, vmin=-span, vmax=span, interpolation="nearest", aspect="auto")
    outside = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}
    extend = outside[bool(ratio.min() < -span), bool(ratio.max() > span)]
    scale = ax.inset_axes((1.04, 0, 0.035, 1), label="colour scale")
    ax.figure.colorbar(image, cax=scale, label="attention relative to uniform (log2)", extend=extend)
    ax.set(xticks=[], yticks=[], xlabel="each row: the cells that one cell looks at")
    ax.spines[:].set_visible(False)


def _draw_strips(ax: Axes, groups: list[_Group], colors: list[tuple[float, ...]]) -> None:
    """A strip of label colours left of the rows and one above the columns."""
    codes = np.repeat(np.arange(len(groups)), [group.stop - group.start for group in groups])
    places = {"rows": (-1.6 * _STRIP, 0, _STRIP, 1), "columns": (0, 1 + 0.6 * _STRIP, 1, _STRIP)}
    for name, place in places.items():
        strip = ax.inset_axes(place, label=f"label colours of {name}")
        strip.imshow(codes[:, None] if name == "rows" else codes[None], cmap=ListedColormap(colors), aspect="auto",
                     vmin=-0.5, vmax=len(groups) - 0.5, interpolation="nearest")  # fmt: skip
        strip.set(xticks=[], yticks=[])
        strip.spines[:].set_visible(False)


def _draw_names(ax: Axes, groups: list[_Group], n_cells: int) -> None:
    """Name every group beside its rows; names of small neighbouring groups are moved apart and joined by a line."""
    height = ax.get_window_extent().height / ax.figure.dpi * 72  # points
    gap = min(_LINE / height, 1 / len(groups))
    centres = np.array([(group.start + group.stop) / 2 for group in groups]) / n_cells
    edge, text = -1.7 * _STRIP, -0.085
    for group, centre, place in zip(groups, centres, _spread(centres, gap), strict=True):
        name = ax.annotate(
            f"{group.name} ({group.stop - group.start})", (text - 0.01, 1 - place), xycoords="axes fraction",
            ha="right", va="center", fontsize=0.8 * gap * height, annotation_clip=False,
        )  # fmt: skip
        name.set_gid("label name")
        ax.plot([edge, text], [1 - centre, 1 - place], transform=ax.transAxes, color="0.5", lw=0.6, clip_on=False)


def _spread(centres: NDArray, gap: float) -> NDArray:
    """Positions in [0, 1], in the order of ``centres`` and close to them, at least ``gap`` apart."""
    # least squares under the order of the shifted positions: pool neighbours that want to be too close
    shifted = centres - gap * np.arange(len(centres))
    blocks: list[list[float]] = []
    for value in shifted:
        blocks.append([value, 1.0])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (low, n_low), (high, n_high) = blocks[-2:]
            blocks[-2:] = [[(low * n_low + high * n_high) / (n_low + n_high), n_low + n_high]]
    placed = np.repeat([b[0] for b in blocks], [int(b[1]) for b in blocks])
    return np.clip(placed, gap / 2, 1 - gap * (len(centres) - 0.5)) + gap * np.arange(len(centres))


def _what(shape: tuple[int, ...], layer: int | None, head: int | None) -> str:
    if len(shape) == 2:
        return "Attention between cells"
    if layer is head is None:
        return "Attention between cells, mean of layers and heads"
    where = "mean of layers" if layer is None else f"layer {layer % shape[0]}"
    return f"Attention, {where}, " + ("mean of heads" if head is None else f"head {head % shape[1]}")
