"""A marker table as a heat map, with what its check found, beside what was measured in the cells of each population."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray

from cellweave._keys import OUTPUT_KEYS

__all__ = ["marker_table"]

# A median this close to zero contradicts nothing.
_TOLERANCE = 0.1
# Without the ends of the map, which are too dark for marks on them.
_CMAP = LinearSegmentedColormap.from_list("entries", plt.get_cmap("RdBu_r")(np.linspace(0.12, 0.88, 256)))
_UNKNOWN = "0.85"
_COLORS = {"error": "#b2182b", "warning": "#d95f02"}
_PAIR = "#7b3294"
_CELL = (0.26, 0.22)  # width and height of an entry, in inches
_ROW_CHECKS = {"over_blank": "over-blank", "sibling_imbalance": "few entries"}
_COLUMN_CHECKS = ("missing_marker", "not_finite", "constant_marker", "one_sided_marker")


@runtime_checkable
class _HasFrame(Protocol):
    """A :class:`cellweave.io.MarkerTable`."""

    def to_frame(self) -> pd.DataFrame: ...


class _Layout(NamedTuple):
    """The axes of the figure."""

    figure: Figure
    levels: list[Axes]  # coarse to fine
    table: Axes
    pairs: Axes | None
    observed: Axes | None


def marker_table(
    table: _HasFrame | pd.DataFrame | str | os.PathLike | None = None,
    adata: AnnData | None = None,
    groupby: str = "scyan_population",
    layer: str | None = None,
    check: pd.DataFrame | None = None,
) -> Figure:
    """Draw a marker table: red positive, blue negative, white zero, grey unknown; graded entries with their value.

    Populations of a hierarchy are grouped, from the coarsest level on the left. With ``adata`` a second panel shows the
    median expression of the cells of every population on the same colour scale, and crosses where it clearly lies on
    the other side of zero than the table says. With ``check`` its findings are marked: joined dots beside populations that no
    marker tells apart, points in entries that alone tell two populations apart, coloured names of markers and populations.

    Parameters
    ----------
    table
        A :class:`~cellweave.io.MarkerTable`, its frame, or the path of its CSV file. By default the table with which
        ``adata.obs[groupby]`` was predicted.
    adata
        Cells with predicted populations in ``obs`` and scaled expression.
    groupby
        Column of ``obs`` with the populations.
    layer
        Layer with the scaled expression; ``adata.X`` by default.
    check
        What :func:`cellweave.pp.check_marker_table` returned.

    Returns
    -------
    The figure. The axes with the labels ``"marker table"`` and ``"observed medians"`` hold the drawn arrays, in the order of
    their rows from top to bottom.

    Raises
    ------
    ValueError
        If there is no table, it is none, the data lack a marker or all populations, or ``check`` belongs to another table.
    KeyError
        If the data have no such column or layer.

    Examples
    --------
    >>> table = cw.io.MarkerTable.parse("table.csv")
    >>> cw.pl.marker_table(table, check=cw.pp.check_marker_table(table))
    """
    frame = _grouped(_frame(table, adata, groupby))
    names = [str(name) for name in frame.index.get_level_values(0)]
    findings = _checked(check, names, [str(marker) for marker in frame.columns])
    medians, n_cells = (None, None) if adata is None else _observed(adata, frame, names, groupby, layer)
    layout = _layout(frame, findings, medians is not None)
    rho = frame.to_numpy(dtype=float)
    values = [rho] if medians is None else [rho, medians]
    image = _draw_entries(layout.table, rho, frame.columns, "marker table")
    layout.table.set_yticks(range(len(names)), names, fontsize="small")
    _draw_grades(layout.table, rho)
    _draw_levels(layout.levels, frame)
    handles = _grey_handles(rho, n_cells)
    handles += _mark_findings(layout, findings, names, list(frame.columns))
    if layout.observed is not None and medians is not None and n_cells is not None:
        _draw_entries(layout.observed, medians, frame.columns, "observed medians")
        handles += _mark_contradictions(layout.observed, rho, medians)
        layout.observed.set_yticks(range(len(names)), [f"{n:,}" for n in n_cells], fontsize="x-small")
        layout.observed.yaxis.tick_right()
        # above the numbers, where it cannot meet the title of a narrow panel
        layout.observed.annotate(
            "cells", (1, 1), (4, 4), xycoords="axes fraction", textcoords="offset points", fontsize="x-small"
        )
    for ax in (layout.table, layout.observed):
        if ax is not None:
            _draw_boundaries(ax, frame)
    _draw_scale(layout, image, values)
    if handles:
        layout.figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    return layout.figure


# ---------------------------------------------------------------- what to draw


def _frame(table: Any, adata: AnnData | None, groupby: str) -> pd.DataFrame:
    """Entries ``(population, marker)`` with the levels in the index."""
    if table is None:
        return _stored_frame(adata, groupby)
    if isinstance(table, str | os.PathLike):
        table = pd.read_csv(table, index_col=0)
    frame = table.to_frame() if isinstance(table, _HasFrame) else table
    if not isinstance(frame, pd.DataFrame) or frame.empty:
        raise ValueError(
            f"`table` must be a MarkerTable or its frame with populations and markers, got {type(table).__name__}; make one "
            "with `cellweave.io.MarkerTable.parse`."
        )
    levels = [name for name in frame.columns if "level" in str(name).lower()]
    frame = frame.set_index(levels, append=True)
    try:
        return frame.astype(float)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`table` has entries that are no numbers ({error}); `cellweave.io.MarkerTable.parse` says where."
        ) from error


def _stored_frame(adata: AnnData | None, groupby: str) -> pd.DataFrame:
    """The table that the model recorded beside its labels."""
    record: Mapping[str, Any] = {} if adata is None else adata.uns.get(OUTPUT_KEYS.PROVENANCE, {}).get(groupby, {})
    text = record.get("parameters", {}).get("table")
    if text is None:
        raise ValueError(
            f"`table` is missing, and no model has recorded one for `groupby={groupby!r}` in `adata.uns`; pass the marker "
            "table."
        )
    stored = json.loads(text)
    index = pd.MultiIndex.from_arrays(
        [stored["populations"], *stored["levels"].values()], names=["population", *stored["levels"]]
    )
    return pd.DataFrame(stored["rho"], index=index, columns=stored["markers"]).astype(float)


def _grouped(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows with the members of every group together; groups and members in table order."""
    codes = [pd.factorize(frame.index.get_level_values(i))[0] for i in range(1, frame.index.nlevels)]
    return frame.iloc[np.lexsort([np.arange(len(frame)), *codes])]


def _observed(
    adata: AnnData, frame: pd.DataFrame, names: list[str], groupby: str, layer: str | None
) -> tuple[NDArray, NDArray]:
    """Median expression ``(population, marker)``, NaN without cells, and the number of cells ``(population,)``."""
    if groupby not in adata.obs:
        raise KeyError(f"`groupby={groupby!r}` is not in `adata.obs`; it has {list(adata.obs.columns)}.")
    if layer is not None and layer not in adata.layers:
        raise KeyError(f"`layer={layer!r}` is not in `adata.layers`; it has {list(adata.layers)}.")
    markers = [str(marker) for marker in frame.columns]
    if missing := [marker for marker in markers if marker not in adata.var_names]:
        raise ValueError(
            f"`adata.var_names` lacks {len(missing)} of the {len(markers)} markers of `table` (first: {missing[0]!r}); "
            "`cellweave.pp.check_marker_table(table, adata)` proposes close names."
        )
    labels = adata.obs[groupby].astype(object)
    if not labels.isin(names).any():
        raise ValueError(f"`adata.obs[{groupby!r}]` has none of the populations of `table`; predict them first.")
    expression = adata[:, markers].to_df(layer=layer)
    medians = expression.groupby(labels.to_numpy()).median().reindex(names)
    return medians.to_numpy(dtype=float), labels.value_counts().reindex(names, fill_value=0).to_numpy()


def _checked(check: pd.DataFrame | None, names: list[str], markers: list[str]) -> pd.DataFrame:
    columns = ["check", "severity", "population", "other", "marker"]
    if check is None:
        return pd.DataFrame(columns=columns)
    if not isinstance(check, pd.DataFrame) or not set(columns) <= set(check.columns):
        raise ValueError("`check` must be what `cellweave.pp.check_marker_table` returned; pass that frame.")
    pairs = check["check"].isin(["unseparable", "near_unseparable"])  # `other` is a group elsewhere
    populations = pd.concat([check["population"], check.loc[pairs, "other"]]).dropna()
    known = populations.isin(names).all() and check["marker"].dropna().isin(markers).all()
    if not known:
        raise ValueError("`check` names populations or markers that `table` does not have; check the same table.")
    return check[columns]


# ---------------------------------------------------------------- the drawing


def _layout(frame: pd.DataFrame, findings: pd.DataFrame, observed: bool) -> _Layout:
    """Levels, table, pairs and medians from left to right, with rows of the same height."""
    n_rows, n_columns = frame.shape
    n_levels, n_pairs = frame.index.nlevels - 1, int((findings["check"] == "unseparable").sum())
    widths = [0.12] * n_levels + [_CELL[0] * n_columns]
    widths += [0.14 * n_pairs] * (n_pairs > 0) + [_CELL[0] * n_columns] * observed
    label = 0.075 * max(len(str(name)) for name in frame.index.get_level_values(0))
    size = (sum(widths) + label * (1 + n_levels) + 1.6, _CELL[1] * n_rows + 1.9)
    figure, grid = plt.subplots(
        1, len(widths), figsize=size, squeeze=False, sharey=False, width_ratios=widths, layout="constrained"
    )
    axes = list(grid[0])
    for ax in axes:
        ax.set_ylim(n_rows - 0.5, -0.5)
    rest = axes[n_levels + 1 :]
    return _Layout(
        figure, axes[:n_levels], axes[n_levels], rest[0] if n_pairs else None, rest[-1] if observed else None
    )


def _draw_entries(ax: Axes, values: NDArray, markers: pd.Index, title: str) -> AxesImage:
    image = ax.imshow(
        values, cmap=_CMAP.with_extremes(bad=_UNKNOWN), vmin=-1, vmax=1, aspect="auto", interpolation="nearest"
    )
    ax.set_label(title)
    ax.set_title(title, fontsize="medium")
    ax.set_xticks(range(len(markers)), list(markers), rotation=90, fontsize="small")
    ax.set_xticks(np.arange(len(markers) - 1) + 0.5, minor=True)
    ax.set_yticks(np.arange(len(values) - 1) + 0.5, minor=True)
    ax.grid(which="minor", color="white", lw=0.8)
    ax.tick_params(which="both", length=0)
    ax.spines[:].set_visible(False)
    return image


def _grey_handles(rho: NDArray, n_cells: NDArray | None) -> list[Any]:
    """What grey means, where it occurs."""
    meanings = ["unknown"] * bool(np.isnan(rho).any())
    meanings += ["no cells"] * (n_cells is not None and bool((n_cells == 0).any()))
    return [Patch(color=_UNKNOWN, label=", ".join(meanings))] if meanings else []


def _draw_grades(ax: Axes, rho: NDArray) -> None:
    for i, j in np.argwhere(np.isfinite(rho) & (np.abs(rho) != 1)):
        color = "white" if abs(rho[i, j]) > 0.7 else "black"
        ax.text(j, i, f"{rho[i, j]:g}", ha="center", va="center", fontsize="xx-small", color=color)


def _runs(groups: pd.Index) -> list[tuple[str, int, int]]:
    """Name, first row and row behind the last of each group."""
    starts = np.flatnonzero(np.r_[True, groups[1:] != groups[:-1]])
    return [
        (str(groups[a]), int(a), int(b)) for a, b in zip(starts, np.r_[starts[1:], len(groups)], strict=True)
    ]  # fmt: skip


def _draw_levels(axes: list[Axes], frame: pd.DataFrame) -> None:
    """A bar beside the rows of each group; a population on its own with the name of its group needs no second name."""
    names = frame.index.get_level_values(0)
    for ax, depth in zip(axes, range(frame.index.nlevels - 1, 0, -1), strict=True):
        runs = _runs(frame.index.get_level_values(depth))
        for _, start, stop in runs:
            ax.plot([0.5, 0.5], [start - 0.35, stop - 0.65], color="0.4", lw=2, solid_capstyle="butt")
        shown = [(name, a, b) for name, a, b in runs if b - a > 1 or str(names[a]) != name]
        ax.set_yticks([(a + b - 1) / 2 for _, a, b in shown], [name for name, _, _ in shown], fontsize="small")
        ax.set_label(f"level {frame.index.names[depth]}")
        ax.set(xlim=(0, 1), xticks=[])
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)


def _draw_boundaries(ax: Axes, frame: pd.DataFrame) -> None:
    if frame.index.nlevels > 1:
        for _, start, _ in _runs(frame.index.get_level_values(1))[1:]:
            ax.axhline(start - 0.5, color="0.3", lw=0.8)


def _mark_findings(layout: _Layout, findings: pd.DataFrame, names: list[str], markers: list[str]) -> list[Any]:
    """Marks of the check; legend entries of those that occur."""
    handles: list[Any] = []
    pairs = findings[findings["check"] == "unseparable"]
    if layout.pairs is not None:
        for x, (a, b) in enumerate(zip(pairs["population"], pairs["other"], strict=True)):
            layout.pairs.plot([x, x], [names.index(a), names.index(b)], color=_PAIR, marker="o", ms=4, lw=1.2)
        layout.pairs.set(xlim=(-0.7, len(pairs) - 0.3), label="unseparable pairs")
        layout.pairs.set_axis_off()
        handles.append(Line2D([], [], color=_PAIR, marker="o", ms=4, lw=1.2, label="no marker tells them apart"))
    near = findings[findings["check"] == "near_unseparable"]
    if len(near):
        both = [(p, m) for key in ("population", "other") for p, m in zip(near[key], near["marker"], strict=True)]
        rows, columns = zip(*sorted({(names.index(p), markers.index(m)) for p, m in both}), strict=True)
        # in a corner: the middle may hold a number
        style: dict[str, Any] = {"ls": "", "marker": ".", "ms": 4, "color": "black"}
        layout.table.plot(np.array(columns) + 0.33, np.array(rows) - 0.28, label="decisive", **style)
        handles.append(Line2D([], [], label="alone tells two apart", **style))
    for tick, marker in zip(layout.table.get_xticklabels(), markers, strict=True):
        found = findings[(findings["marker"] == marker) & findings["check"].isin(_COLUMN_CHECKS)]
        if len(found):
            tick.set(color=_COLORS[found["severity"].iloc[0]], fontweight="bold")
    for tick, name in zip(layout.table.get_yticklabels(), names, strict=True):
        found = findings[(findings["population"] == name) & findings["check"].isin(list(_ROW_CHECKS))]
        if len(found):
            tick.set(color=_COLORS["warning"], fontweight="bold")
    return handles + _name_handles(findings)


def _name_handles(findings: pd.DataFrame) -> list[Any]:
    """What coloured names mean, where there are any."""
    columns = findings[findings["check"].isin(_COLUMN_CHECKS)]
    texts = {
        "error": "marker not usable in the data" if (columns["severity"] == "error").any() else "",
        "warning": ", ".join(
            [
                *(["marker without contrast"] if (columns["severity"] == "warning").any() else []),
                *(text for key, text in _ROW_CHECKS.items() if (findings["check"] == key).any()),
            ]
        ),
    }
    return [
        Line2D([], [], ls="", marker="$A$", color=_COLORS[severity], label=text)
        for severity, text in texts.items()
        if text
    ]


def _mark_contradictions(ax: Axes, rho: NDArray, medians: NDArray) -> list[Any]:
    """Crosses where the median lies on the other side of zero than the table says."""
    rows, columns = np.nonzero(np.sign(rho) * medians < -_TOLERANCE)
    if not len(rows):
        return []
    style: dict[str, Any] = {"ls": "", "marker": "x", "ms": 4, "color": "black", "mew": 1}
    ax.plot(columns, rows, label="contradictions", **style)
    return [Line2D([], [], label="median contradicts the table", **style)]


def _draw_scale(layout: _Layout, image: AxesImage, values: list[NDArray]) -> None:
    finite = np.concatenate([array[np.isfinite(array)] for array in values])
    outside = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}
    extend = outside[bool((finite < -1).any()), bool((finite > 1).any())]
    axes = [ax for ax in (layout.table, layout.pairs, layout.observed) if ax is not None]
    bar = layout.figure.colorbar(image, ax=axes, extend=extend, shrink=0.5, pad=0.02, aspect=15)
    bar.set_ticks([-1, 0, 1], labels=["negative", "0", "positive"], fontsize="small")
