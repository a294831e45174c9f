"""Checks of marker intensities: real values, transformed and scaled, in a few columns."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from difflib import get_close_matches
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray

from ._rows import column_rows
from ._validate import _layer_names, _some, _warn, get_counts

__all__ = ["check_intensities", "check_measured", "find_markers"]

# Raw intensities and counts reach thousands, transformed and scaled ones a few units.
_MAX_INTENSITY = 1000.0
# How far the spread of scaled markers may be from 1, on average, before it is worth a word.
_SPREAD = 0.5


def find_markers(names: pd.Index, markers: Sequence[str]) -> NDArray[np.int64]:
    """Position in ``names`` of every marker ``(marker,)``.

    Raises
    ------
    ValueError
        If markers are missing; names those that are similar.
    """
    position = pd.Index(names.astype(str)).get_indexer(list(markers))
    missing = [marker for marker, at in zip(markers, position, strict=True) if at < 0]
    if missing:
        similar = (
            f", which has {_some(close)}"
            if (close := _similar(missing[0], set(names.astype(str)) - set(markers)))
            else ""
        )
        raise ValueError(
            f"{len(missing)} of the {len(markers)} markers of the table are not in `adata.var_names` (first: "
            f"{_some(missing)}){similar}; rename the columns of the table or the variables of the data so that they agree."
        )
    return position.astype(np.int64)


def _similar(marker: str, names: Collection[str]) -> list[str]:
    """Names that may be the marker: much like it, or beginning with it, as ``CD3(Er170)Di`` does."""
    by_lower = {name.lower(): name for name in sorted(names)}
    close = get_close_matches(marker.lower(), by_lower, n=3, cutoff=0.6)
    longer = [name for name in by_lower if re.match(rf"{re.escape(marker.lower())}\W", name)]
    return [by_lower[name] for name in dict.fromkeys([*close, *longer])][:3]


def check_intensities(
    adata: AnnData, markers: Sequence[str], layer: str | None = None, measured: str | None = None, warn: bool = True
) -> None:
    """Check the values of the markers of a table.

    Parameters
    ----------
    adata
        Data that hold the markers.
    markers
        Names of the markers.
    layer
        Layer with the values; ``adata.X`` by default.
    measured
        Layer that is 0 where a marker was not measured; what stands there does not matter.
    warn
        Warn about markers that seem not to be scaled.

    Raises
    ------
    ValueError
        If markers are missing, or values are NaN, infinite, or too large to be transformed intensities.
    """
    where = "adata.X" if layer is None else f"adata.layers[{layer!r}]"
    columns = find_markers(adata.var_names, markers)
    rows = column_rows(get_counts(adata, layer), columns)
    mask = None if measured is None else column_rows(adata.layers[measured], columns)
    n_seen = np.zeros(len(markers))
    total, squares = np.zeros(len(markers)), np.zeros(len(markers))
    for start, block in rows.chunks():
        values = _dense(block)
        known = np.ones(values.shape, bool) if mask is None else _dense(mask.read(start, start + len(values))) != 0
        _check_values(values, known, start, where, adata, markers)
        values = np.where(known, values, 0)
        n_seen += known.sum(0)
        total += values.sum(0)
        squares += np.square(values).sum(0)
    never = np.flatnonzero(n_seen == 0)
    if len(never):
        raise ValueError(
            f"{len(never)} marker(s) of the table are measured in no cell, as `nan_layer={measured!r}` says (first: "
            f"{markers[never[0]]!r}); leave them out of the table."
        )
    spread = np.sqrt(np.maximum(squares / n_seen - np.square(total / n_seen), 0))
    if warn and len(adata) > 1 and abs(float(spread.mean()) - 1) > _SPREAD:
        _warn(
            f"The markers in `{where}` have a standard deviation of {spread.mean():.2g} on average, where scaled ones have "
            "1; transform and scale them, for example with `cellweave.pp.arcsinh` and `cellweave.pp.scale_markers`."
        )


def check_measured(adata: AnnData, nan_layer: str | None) -> None:
    """Check the layer that says which values were measured.

    Raises
    ------
    KeyError
        If there is no such layer.
    ValueError
        If it holds anything but 0 and 1, or is on disk.
    """
    if nan_layer is None:
        return
    if nan_layer not in adata.layers:
        raise KeyError(f"`nan_layer={nan_layer!r}` not found; `adata.layers` has {_some(_layer_names(adata))}.")
    rows = column_rows(adata.layers[nan_layer], np.arange(adata.n_vars))
    if rows.on_disk:
        raise ValueError(f"`nan_layer={nan_layer!r}` is on disk; load the data with `adata.to_memory()` first.")
    for start, block in rows.chunks():
        values = _dense(block)
        wrong = (values != 0) & (values != 1)
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            raise ValueError(
                f"`adata.layers[{nan_layer!r}]` has {int(wrong.sum())} value(s) other than 0 and 1 (first: "
                f"{values[row, column]:g} in cell {adata.obs_names[start + row]!r}); give 1 where a marker was measured and "
                "0 where not."
            )


def _check_values(
    values: NDArray, known: NDArray[np.bool_], start: int, where: str, adata: AnnData, markers: Sequence[str]
) -> None:
    faults = [
        (np.isnan(values), "NaN", "remove these cells, or say with `nan_layer` where markers were not measured"),
        (np.isinf(values), "infinite", "fix or remove them"),
        (
            np.abs(values) >= _MAX_INTENSITY,
            f"at or above {_MAX_INTENSITY:g} in size and look like raw intensities",
            "transform and scale them first, for example with `cellweave.pp.arcsinh` and `cellweave.pp.scale_markers`",
        ),
    ]
    for bad, kind, advice in faults:
        bad &= known
        if bad.any():
            row, column = np.argwhere(bad)[0]
            n_cells, n_markers = int(bad.any(1).sum()), int(bad.any(0).sum())
            raise ValueError(
                f"`{where}` has {int(bad.sum())} value(s) of {n_markers} marker(s) in {n_cells} cell(s) that are {kind} "
                f"(first: marker {markers[column]!r} of cell {adata.obs_names[start + row]!r}); {advice}."
            )


def _dense(block: Any) -> NDArray[np.float64]:
    return np.asarray(block.toarray() if hasattr(block, "toarray") else block, dtype=np.float64)
