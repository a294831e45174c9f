"""Back from transformed values to intensities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from numpy.typing import NDArray

from cellweave._keys import OUTPUT_KEYS
from cellweave.data import get_counts

from ._intensities import blocks, check_matrix, precision
from ._transforms import Step, read_steps, some

__all__ = ["inverse_transform"]


def inverse_transform(
    adata: AnnData,
    values: str | pd.DataFrame | AnnData | NDArray[Any] | None = None,
    layer: str | None = None,
    markers: Sequence[str] | None = None,
) -> pd.DataFrame:
    """Undo the recorded transforms of a layer, for its own values or for any others on the same scale.

    Everything that :func:`~cellweave.pp.compensate`, :func:`~cellweave.pp.arcsinh`, :func:`~cellweave.pp.logicle` and
    :func:`~cellweave.pp.scale_markers` did to the layer is undone in reverse order, up to rounding. Values that were cut
    off (``max_value``, ``quantile_clip``) come back as the intensity of the cut.

    Parameters
    ----------
    adata
        Data with the record; nothing is written into it.
    values
        What to bring back: a key of ``adata.obsm`` or ``adata.layers``, for example ``"scyan_corrected"``; a DataFrame whose
        columns are markers; an AnnData, for example of sampled cells; an array. By default the layer itself.
    layer
        Layer whose transforms are undone; ``adata.X`` by default.
    markers
        Names of the columns of an array, or the markers to return of anything else. Columns that are all NaN count as not
        measured and stay NaN.

    Returns
    -------
    Frame (cell, marker) of intensities, float32 (float64 where the values were).

    Raises
    ------
    KeyError
        If there is no such layer or key.
    TypeError
        If ``values`` is none of these, or holds no numbers.
    ValueError
        If nothing is recorded for the layer, or a marker is not among those that were transformed, or compensation cannot
        be undone because markers that spill into the wanted ones are missing.

    Examples
    --------
    >>> cw.pp.inverse_transform(adata, "scyan_corrected")
    """
    if not isinstance(adata, AnnData):
        raise TypeError(f"`adata` must be an AnnData, got {type(adata).__name__}; of a MuData give one modality.")
    steps = read_steps(adata, layer)
    if not steps:
        recorded = [str(key) for key in adata.uns.get(OUTPUT_KEYS.TRANSFORMS, {})]
        raise ValueError(
            f"Nothing is recorded for `{'adata.X' if layer is None else layer}` in "
            f"`adata.uns[{OUTPUT_KEYS.TRANSFORMS!r}]`, only for {some(recorded)}; name another `layer`."
        )
    x, names, cells = _matrix(adata, values, layer, markers)
    result = _undo(x, names, steps)
    frame = pd.DataFrame(result, index=cells, columns=pd.Index(names))
    return frame if markers is None or names == list(markers) else frame[list(markers)]


def _undo(x: Any, names: list[str], steps: Sequence[Step]) -> NDArray[Any]:
    measured = _measured(x)
    bound: list[Step] = []
    wanted = [name for name, there in zip(names, measured, strict=True) if there]
    for step in steps:
        bound.append(step.take(wanted))
    out = np.full(x.shape, np.nan, dtype=precision(x))
    for start, block in blocks(x):
        block = block[:, measured]
        for step in reversed(bound):
            block = step.undo(block)
        out[start : start + len(block), measured] = block
    return out


def _measured(x: Any) -> NDArray[np.bool_]:
    """Columns that are not all NaN."""
    empty = np.ones(x.shape[1], dtype=bool)
    for _, block in blocks(x):
        empty &= np.isnan(block).all(axis=0)
    return ~empty | (x.shape[0] == 0)


def _matrix(
    adata: AnnData, values: Any, layer: str | None, markers: Sequence[str] | None
) -> tuple[Any, list[str], pd.Index]:
    """The values as a matrix, with the names of its columns and rows."""
    cells = adata.obs_names
    if isinstance(values, str) and values in adata.layers and values not in adata.obsm:
        x, names = adata.layers[values], list(adata.var_names)
    elif values is None:
        x, names = get_counts(adata, layer), list(adata.var_names)
    else:
        x, names, cells = _given(adata, _of_obsm(adata, values) if isinstance(values, str) else values, markers)
    check_matrix(x, "values")
    names = [str(name) for name in names]
    missing = [marker for marker in markers or () if marker not in names]
    if missing:
        raise ValueError(
            f"`values` lacks {len(missing)} of the `markers` (first: {some(missing)}); it has {some(names)}."
        )
    return x, names, cells


def _given(adata: AnnData, values: Any, markers: Sequence[str] | None) -> tuple[Any, list[str], pd.Index]:
    if isinstance(values, pd.DataFrame):
        return values.to_numpy(), list(values.columns), values.index
    if isinstance(values, AnnData):
        return get_counts(values), list(values.var_names), values.obs_names
    if not (isinstance(values, np.ndarray) or sp.issparse(values)):
        raise TypeError(
            f"`values` must be a key, DataFrame, AnnData or array, got {type(values).__name__}; give one of them."
        )
    names = list(adata.var_names if markers is None else markers)
    if values.ndim != 2 or values.shape[1] != len(names):
        raise ValueError(
            f"`values` is an array of shape {values.shape}, which needs {len(names)} columns; name its columns with `markers`."
        )
    return values, names, adata.obs_names if values.shape[0] == adata.n_obs else pd.RangeIndex(values.shape[0])


def _of_obsm(adata: AnnData, key: str) -> Any:
    if key not in adata.obsm:
        there = [*adata.obsm, *(name for name in adata.layers if name is not None)]
        raise KeyError(f"`values={key!r}` not found; `adata.obsm` and `adata.layers` have {some(there)}.")
    if key in adata.layers:
        raise ValueError(
            f"`values={key!r}` is in `adata.obsm` and in `adata.layers`; give one of them itself, as "
            f"`values=adata.obsm[{key!r}]`."
        )
    return adata.obsm[key]
