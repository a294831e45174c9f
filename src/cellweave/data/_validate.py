"""Full checks of what the user registers, made before anything is written to their AnnData."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from numpy.typing import NDArray
from scvi import settings

__all__ = [
    "check_cells",
    "check_counts",
    "check_groups",
    "check_known",
    "check_names",
    "get_counts",
    "looks_like_counts",
    "warn_small_data",
]

# Integers above this are not exact in float32, in which all models compute. A float32, not an int: compared with a
# float16 matrix an int would be cast to float16 and overflow.
_MAX_COUNT = np.float32(2**24)
# Entries inspected at a time, so that a backed or very large matrix is checked in bounded memory.
_BLOCK_ENTRIES = 2**24


def check_names(adata: AnnData) -> None:
    """Check that ``adata`` is a real object with cells and uniquely named genes.

    Raises
    ------
    ValueError
        If ``adata`` is a view, has no cells or genes, or repeats gene names.
    """
    if adata.is_view:
        raise ValueError("`adata` is a view of another AnnData; run `adata = adata.copy()` first.")
    if adata.n_obs == 0:
        raise ValueError(f"`adata` has no cells (shape {adata.shape}); check the filters applied to it.")
    if adata.n_vars == 0:
        raise ValueError(f"`adata` has no genes (shape {adata.shape}); check the filters applied to it.")
    repeated = adata.var_names[adata.var_names.duplicated()].unique()
    if len(repeated):
        raise ValueError(
            f"`adata.var_names` repeats {len(repeated)} gene name(s) (first: {_some(repeated)}); genes are matched by "
            "name, so run `adata.var_names_make_unique()` or merge the columns."
        )
    if not pd.Index(adata.obs_names.array).is_unique:  # on a copy, which forgets its hash table of all names
        _warn("`adata.obs_names` are not unique; results are written by position.")


def check_cells(mdata: Any, modalities: Iterable[str]) -> None:
    """Check that every modality has all cells of a MuData, and those that are read have them in its order.

    Parameters
    ----------
    mdata
        The MuData.
    modalities
        Names of the modalities that are read beside each other.

    Raises
    ------
    ValueError
        If cells are missing in a modality, or in another order.
    """
    for name, modality in mdata.mod.items():
        missing = ~mdata.obs_names.isin(modality.obs_names)
        if missing.any():
            raise ValueError(
                f"Modality {name!r} lacks {int(missing.sum())} of the {mdata.n_obs} cells of the MuData (first: "
                f"{mdata.obs_names[int(np.argmax(missing))]!r}); keep those that it has with "
                f"`mdata = mdata[mdata[{name!r}].obs_names].copy()`."
            )
    for name in modalities:
        moved = mdata.mod[name].obs_names != mdata.obs_names
        if moved.any():
            raise ValueError(
                f"Modality {name!r} has {int(moved.sum())} cells in another order than the MuData (first: "
                f"{mdata.mod[name].obs_names[int(np.argmax(moved))]!r}); bring them in one order with "
                "`mdata = mdata[mdata.obs_names].copy()`."
            )


def check_counts(adata: AnnData, layer: str | None = None, allow_noncounts: bool = False) -> None:
    """Check every value of ``adata.X`` or a layer for use by a count model.

    Cells without counts are accepted with one warning, and so are non-integer values if they are allowed.

    Parameters
    ----------
    adata
        The data.
    layer
        Name of the layer; ``adata.X`` by default.
    allow_noncounts
        Accept non-integer values.

    Raises
    ------
    KeyError
        If there is no such layer, or no ``X``.
    ValueError
        If a value is NaN, infinite, negative, too large for exact float32 arithmetic or not an integer, or if all are
        zero.
    """
    where = "adata.X" if layer is None else f"adata.layers[{layer!r}]"
    n_fractional, first, library = 0, "", np.zeros(adata.n_obs)
    for start, block in _row_blocks(get_counts(adata, layer)):
        _check_block(block, start, where, adata)
        values = _values(block)
        fractional = values != np.rint(values) if values.dtype.kind == "f" else np.zeros(0, dtype=bool)
        if n_fractional == 0 and fractional.any():
            first = _describe(block, int(np.argmax(fractional)), start, adata)
        n_fractional += int(np.count_nonzero(fractional))
        library[start : start + block.shape[0]] = np.asarray(block.sum(axis=1, dtype=np.float64)).ravel()
    if not library.any():
        raise ValueError(f"`{where}` holds only zeros; give the raw counts with `layer=`.")
    if n_fractional:
        _report_noncounts(adata, layer, f"`{where}` has {n_fractional} non-integer value(s) ({first})", allow_noncounts)
    n_empty = int((library == 0).sum())
    if n_empty:
        name = adata.obs_names[int(np.argmin(library != 0))]
        _warn(f"{n_empty} cell(s) have no counts in `{where}` (first: {name!r}); consider removing them.")


def _report_noncounts(adata: AnnData, layer: str | None, found: str, allowed: bool) -> None:
    """Refuse, or warn about, values that are no counts, and say where counts seem to be."""
    others = [key for key in _layer_names(adata) if key != layer]
    hints = [f"`layer={key!r}`" for key in others if looks_like_counts(adata.layers[key])]
    if layer is not None and adata.X is not None and looks_like_counts(adata.X):
        hints.append("`adata.X`")
    advice = f"these look like counts: {', '.join(hints)}" if hints else "give raw counts with `layer=`"
    if not allowed:
        raise ValueError(
            f"{found}, but the model is a model of counts; {advice}, or set up the model with `allow_noncounts=True`."
        )
    _warn(f"{found} and is read by a model of counts, as `allow_noncounts=True` allows; {advice}.")


def get_counts(adata: AnnData, layer: str | None = None) -> Any:
    """``adata.X`` or a layer, with an error that names the layers there are.

    Raises
    ------
    KeyError
        If there is no such layer, or no ``X``.
    """
    if layer is not None and layer not in adata.layers:
        raise KeyError(f"`layer={layer!r}` not found; `adata.layers` has {_some(_layer_names(adata))}.")
    x = adata.X if layer is None else adata.layers[layer]
    if x is None:
        there = _some(_layer_names(adata))
        raise KeyError(f"`adata.X` is empty; name the counts with `layer=`, `adata.layers` has {there}.")
    return x


def _layer_names(adata: AnnData) -> list[str]:
    return [key for key in adata.layers if key is not None]  # anndata 0.13 lists `X` as the layer None


def check_groups(obs: pd.DataFrame, key: str | None, argument: str) -> None:
    """Check a categorical ``obs`` column.

    Raises
    ------
    KeyError
        If there is no such column.
    ValueError
        If values are missing, or the column is continuous: more distinct numbers than 100 and 10 % of the cells.
    """
    if key is None:
        return
    if key not in obs:
        raise KeyError(f"`{argument}={key!r}` not found; `adata.obs` has {_some(obs.columns)}.")
    column = obs[key]
    n_missing = int(column.isna().sum())
    if n_missing:
        first = obs.index[int(np.argmax(column.isna().to_numpy()))]
        raise ValueError(
            f"`adata.obs[{key!r}]` (`{argument}`) is missing in {n_missing} cell(s) (first: {first!r}); fill or remove them."
        )
    is_number = pd.api.types.is_float_dtype(column) or pd.api.types.is_integer_dtype(column)
    if is_number and column.nunique() > max(100, 0.1 * len(column)):
        raise ValueError(
            f"`adata.obs[{key!r}]` (`{argument}`) has {column.nunique()} distinct numbers in {len(column)} cells and "
            "looks continuous; bin it into categories first."
        )


def check_known(obs: pd.DataFrame, key: str, argument: str, known: NDArray[Any]) -> None:
    """Check that a column of new data holds known categories only.

    Raises
    ------
    ValueError
        If it holds others.
    """
    names = known.tolist()
    column = obs[key]
    new = [value for value in column.unique().tolist() if value not in names]
    if new:
        n_cells = int(column.isin(new).sum())
        raise ValueError(
            f"`adata.obs[{key!r}]` (`{argument}`) has {len(new)} value(s) in {n_cells} cell(s) that the model does not "
            f"know ({_some(new, as_text=False)}); it knows {_some(names, 10, as_text=False)}, so give these cells one of "
            "them or leave them out."
        )


def warn_small_data(n_obs: int, n_cells: int) -> None:
    """Say once that data with fewer cells than one context fill it by repeating cells.

    Parameters
    ----------
    n_obs
        Cells of the data.
    n_cells
        Cells per context of the model.
    """
    if n_obs < n_cells:
        _warn(
            f"The data have {n_obs} cell(s), fewer than one context (`n_cells={n_cells}`); contexts repeat cells to be "
            "full, so choose a smaller `n_cells` or give more cells."
        )


def looks_like_counts(x: Any) -> bool:
    """Whether the first cells of a matrix hold non-negative integers."""
    block = x[: min(x.shape[0], 100)]
    values = np.asarray(_values(block.compute() if hasattr(block, "compute") else block), dtype=np.float64)
    return bool(np.all(values >= 0) and np.all(values == np.rint(values)))


def _check_block(block: Any, start: int, where: str, adata: AnnData) -> None:
    values = _values(block)
    if values.size == 0:
        return
    faults = [
        (~np.isfinite(values), "NaN or infinite", "fix or remove them"),
        (values < 0, "negative", "give raw counts with `layer=`"),
        (values > _MAX_COUNT, "larger than 2^24", "such counts are not exact in float32; check the units"),
    ]
    for bad, kind, advice in faults:
        n_bad = int(np.count_nonzero(bad))
        if n_bad:
            first = _describe(block, int(np.argmax(bad)), start, adata)
            raise ValueError(
                f"`{where}` has {n_bad} value(s) that are {kind} in cells {start} to {start + block.shape[0] - 1} "
                f"({first}); {advice}."
            )


def _describe(block: Any, flat: int, start: int, adata: AnnData) -> str:
    """Where entry ``flat`` of a block that begins at row ``start`` is."""
    row, column = _position(block, flat)
    return f"first: cell {adata.obs_names[start + row]!r}, gene {adata.var_names[column]!r}"


def _position(block: Any, flat: int) -> tuple[int, int]:
    """Row and column of entry ``flat`` of ``_values(block)``."""
    if sp.issparse(block):
        return int(np.searchsorted(block.indptr, flat, side="right") - 1), int(block.indices[flat])
    row, column = np.unravel_index(flat, block.shape)
    return int(row), int(column)


def _values(block: Any) -> np.ndarray:
    return block.data if sp.issparse(block) else np.asarray(block).reshape(-1)


def _row_blocks(x: Any) -> Iterator[tuple[int, Any]]:
    """Blocks of rows as CSR or dense arrays; works for in-memory and backed matrices."""
    if sp.issparse(x) and x.format != "csr":
        x = x.tocsr()
    step = max(1, _BLOCK_ENTRIES // max(1, x.shape[1]))
    for start in range(0, x.shape[0], step):
        block = x if step >= x.shape[0] and (sp.issparse(x) or isinstance(x, np.ndarray)) else x[start : start + step]
        block = block.compute() if hasattr(block, "compute") else block  # of a dask array
        yield start, _canonical(block) if sp.issparse(block) else block


def _canonical(block: Any) -> Any:
    """CSR rows in which every entry is stored once: parts of a repeated entry say nothing about its value."""
    block = block.tocsr()
    if not block.has_canonical_format:
        block = block.copy()
        block.sum_duplicates()
    return block


def _some(names: Any, n: int = 5, as_text: bool = True) -> str:
    listed = [repr(str(name) if as_text else name) for name in list(names)[: n + 1]]
    if not listed:
        return "nothing"
    return ", ".join(listed[:n]) + (", ..." if len(listed) > n else "")


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=settings.warnings_stacklevel)
