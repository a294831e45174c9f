"""What figures of predicted perturbations read from two AnnData, checked; and labels that do not overlap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

CONTROL, MEASURED, PREDICTED = "control", "measured", "predicted"
COLORS = {CONTROL: "0.6", MEASURED: "#4477aa", PREDICTED: "#ee7733"}

# Directions and distances (points) at which the place of a label is tried, the nearest first.
_ANGLES = np.deg2rad([0, 180, 45, 135, 315, 225, 90, 270, 20, 160, 340, 200])
_DISTANCES = (6.0, 12.0, 20.0, 30.0, 42.0, 56.0, 72.0)


class Populations(NamedTuple):
    """Cells ``(cell, gene)`` of one perturbation, log-normalised, genes in the order of the prediction."""

    control: NDArray
    measured: NDArray
    predicted: NDArray
    genes: list[str]

    def groups(self) -> dict[str, NDArray]:
        """The three groups of cells by name."""
        return {CONTROL: self.control, MEASURED: self.measured, PREDICTED: self.predicted}

    def split(self, seed: int) -> tuple[NDArray, NDArray]:
        """Disjoint random halves of the control cells: one for the prediction, one for the measurement."""
        order = np.random.default_rng(seed).permutation(len(self.control))
        half = len(order) // 2
        return self.control[np.sort(order[:half])], self.control[np.sort(order[half:])]

    def controls(self, split_control: bool, seed: int) -> tuple[NDArray, NDArray]:
        """Control cells that prediction and measurement are compared with."""
        return self.split(seed) if split_control else (self.control, self.control)


def read_populations(
    pred: AnnData,
    true: AnnData,
    perturbation: str,
    perturbation_key: str,
    control_key: str,
    layer: str | None,
    genes: Sequence[str] | None = None,
) -> Populations:
    """The three groups of cells, of all predicted genes or of the named ones."""
    for name, adata in (("pred", pred), ("true", true)):
        if perturbation_key not in adata.obs:
            raise KeyError(
                f"`perturbation_key`={perturbation_key!r} is not a column of `{name}.obs`, which has "
                f"{list(adata.obs)[:8]}; name the column with the perturbations."
            )
    if layer is not None and layer not in true.layers:
        raise KeyError(f"`true.layers` has no {layer!r}; name a layer with log-normalised expression, or none.")
    if perturbation == control_key:
        raise ValueError(f"`perturbation`={perturbation!r} is the label of control cells; name what was perturbed.")
    wanted = _genes(pred, true, genes)
    keys = (perturbation_key, layer)
    return Populations(
        _cells(true, "true", control_key, wanted, "control_key", *keys),
        _cells(true, "true", perturbation, wanted, "perturbation", *keys),
        _cells(pred, "pred", perturbation, wanted, "perturbation", perturbation_key, None),
        wanted,
    )


def _genes(pred: AnnData, true: AnnData, genes: Sequence[str] | None) -> list[str]:
    """Genes to read, which both objects must have, each once."""
    wanted = [str(gene) for gene in (pred.var_names if genes is None else genes)]
    for name, adata in (("pred", pred), ("true", true)):
        if not adata.var_names.is_unique:
            first = adata.var_names[adata.var_names.duplicated()][0]
            raise ValueError(f"`{name}.var_names` has {first!r} more than once; call `var_names_make_unique()` first.")
        missing = [gene for gene in wanted if gene not in adata.var_names]
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(wanted)} genes are not in `{name}.var_names` (first: {missing[0]!r}); give both "
                "objects the same gene names."
            )
    return wanted


def _cells(
    adata: AnnData, name: str, label: str, genes: list[str], argument: str, key: str, layer: str | None
) -> NDArray:
    """Log-normalised expression of the cells with a label."""
    labels = adata.obs[key].astype(str).to_numpy()
    rows = np.flatnonzero(labels == label)
    if len(rows) < 2:
        raise ValueError(
            f"`{argument}`={label!r} has {len(rows)} cells in `{name}.obs[{key!r}]`, which has "
            f"{sorted(set(labels))[:6]}; at least two cells are needed."
        )
    columns = adata.var_names.get_indexer(genes)
    matrix = adata.X if layer is None else adata.layers[layer]
    part = matrix[rows][:, columns]
    values = np.asarray(part.toarray() if sp.issparse(part) else part, dtype=np.float64)
    where = f"`{name}.X`" if layer is None else f"`{name}.layers[{layer!r}]`"
    if not np.isfinite(values).all():
        n_bad = int((~np.isfinite(values)).sum())
        raise ValueError(f"{where} has {n_bad} missing or infinite values in {label!r} cells; remove them first.")
    if values.max(initial=0) > 1 and (values == np.round(values)).all():
        raise ValueError(
            f"{where} holds whole numbers up to {values.max():.0f}, which are counts; log-normalise first, "
            "log1p(1e4 * count / size)."
        )
    return values


def correlation(x: NDArray, y: NDArray) -> float:
    """Pearson correlation; NaN where one side does not vary."""
    return float(np.corrcoef(x, y)[0, 1]) if len(x) > 1 and x.std() > 0 and y.std() > 0 else float("nan")


def correlation_text(x: NDArray, y: NDArray) -> str:
    """Pearson correlation in words for a title."""
    r = correlation(x, y)
    return f"r = {round(r, 2) + 0:.2f}" if np.isfinite(r) else "r undefined"  # + 0: no minus sign before zero


# ---------------------------------------------------------------- labels


def annotate_points(ax: Axes, x: NDArray, y: NDArray, names: Sequence[str], fontsize: float = 7) -> list[Annotation]:
    """Name points, each name at the first free place near its point, joined by a line; a name without a place is left out.

    Call it last: places are found in the final layout and limits of the axes.
    """
    figure = ax.get_figure(root=True)
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()  # settles the layout
    scale = figure.dpi / 72
    points = ax.transData.transform(np.column_stack([x, y]))
    inside = ax.get_window_extent()
    legend = ax.get_legend()
    taken: list[Bbox] = [legend.get_window_extent()] if legend is not None else []
    taken += [text.get_window_extent() for text in ax.texts]
    dots = [Bbox.from_bounds(px - 2, py - 2, 4, 4) for px, py in points]
    drawn = []
    for i, name in enumerate(names):
        note = ax.annotate(
            name, (x[i], y[i]), (0, 0), textcoords="offset points", ha="center", va="center", fontsize=fontsize,
            arrowprops={"arrowstyle": "-", "color": "0.5", "lw": 0.5, "shrinkA": 0, "shrinkB": 2}, annotation_clip=False,
            path_effects=[withStroke(linewidth=1.5, foreground="white")],
        )  # fmt: skip
        note.set_in_layout(False)
        box = Text.get_window_extent(note)  # without the line to the point
        others = taken + [dot for j, dot in enumerate(dots) if j != i]
        place = _free_place(points[i], (box.width, box.height), scale, others, inside)
        if place is None:
            note.remove()
            continue
        note.set_position(tuple((place - points[i]) / scale))
        taken.append(_box(place, (box.width, box.height)))
        drawn.append(note)
    return drawn


def _free_place(
    point: NDArray, size: tuple[float, float], scale: float, taken: list[Bbox], inside: Bbox
) -> NDArray | None:
    """Centre of the nearest box of a size that touches nothing and lies within the axes, in pixels."""
    half = np.array(size) / 2
    for distance in _DISTANCES:
        for angle in _ANGLES:
            direction = np.array([np.cos(angle), np.sin(angle)])
            centre = point + direction * (distance * scale + half * np.abs(direction))
            box = _box(centre, size)
            within = inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1
            if within and not any(box.overlaps(other) for other in taken):
                return centre
    return None


def _box(centre: NDArray, size: tuple[float, float]) -> Bbox:
    return Bbox.from_bounds(centre[0] - size[0] / 2, centre[1] - size[1] / 2, *size)
