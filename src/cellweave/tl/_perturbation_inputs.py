"""Cells of a perturbation screen, read from AnnData and checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from numpy.typing import NDArray

from cellweave.data import CONTROL_SYNONYMS, ConditionNames, get_counts

__all__ = ["Cells", "Columns", "first_of", "read_cells", "require_genes"]

# log1p of counts per million stays below this, counts and scaled intensities do not.
_MAX_LOG = 15.0
# What stands between the columns of a context in its name.
_BETWEEN = " | "


class Columns(NamedTuple):
    """Which columns of ``obs`` mean what."""

    perturbation: str
    names: ConditionNames
    pairing: tuple[str, ...] = ()
    shift: tuple[str, ...] = ()
    stratify: tuple[str, ...] = ()


class Cells(NamedTuple):
    """Log-normalised cells.

    Parameters
    ----------
    x
        Expression ``(cell, gene)``, float32, dense or CSR.
    obs
        A row per cell, named as in the data: ``perturbation`` (canonical name), ``context``, ``shift_context`` (over
        which shifts are carried), ``stratum`` (within which control cells are halved) and ``source``.
    genes
        Names of the genes.
    """

    x: Any
    obs: pd.DataFrame
    genes: pd.Index

    def take(self, chosen: NDArray) -> Cells:
        """Some of the cells."""
        rows = np.flatnonzero(chosen) if chosen.dtype == bool else chosen
        return Cells(self.x[rows], self.obs.iloc[rows], self.genes)

    def dense(self, rows: NDArray[np.integer]) -> NDArray[np.float32]:
        """Expression of some cells as a dense array."""
        block = self.x[rows]
        return block.toarray() if sp.issparse(block) else block

    @property
    def groups(self) -> pd.MultiIndex:
        """Perturbation and context of every cell."""
        return pd.MultiIndex.from_frame(self.obs[["perturbation", "context"]])


def read_cells(adata: AnnData, role: str, columns: Columns, layer: str | None = None, measured: bool = True) -> Cells:
    """Check one AnnData and read what is needed of it; the AnnData stays as it is.

    Cells are brought in the order of their names, so that nothing that is drawn later depends on their order.

    Parameters
    ----------
    adata
        The data.
    role
        What error messages call it.
    columns
        Columns of ``obs``.
    layer
        Layer with log-normalised expression, ``X`` by default.
    measured
        Whether the values must not be negative; predictions may be.

    Raises
    ------
    KeyError
        If a column or layer is missing.
    TypeError
        If it is no AnnData.
    ValueError
        If there are no cells, names of genes are repeated, labels are missing, or values are not log-normalised.
    """
    if not isinstance(adata, AnnData):
        raise TypeError(f"`{role}` must be an AnnData of cells, got {type(adata).__name__}; wrap the cells in one.")
    if adata.n_obs == 0 or adata.n_vars == 0:
        raise ValueError(f"`{role}` has no cells or no genes (shape {adata.shape}); check how it was selected.")
    repeated = adata.var_names[adata.var_names.duplicated()].unique()
    if len(repeated):
        raise ValueError(
            f"`{role}.var_names` repeats {len(repeated)} gene name(s) (first: {repeated[0]!r}); genes are matched by name, "
            "so make them unique."
        )
    obs = pd.DataFrame(
        {
            "perturbation": _perturbations(adata, role, columns),
            "context": _context(adata, role, columns.pairing),
            "shift_context": _context(adata, role, columns.shift),
            "stratum": _context(adata, role, tuple(dict.fromkeys([*columns.pairing, *columns.stratify]))),
            "source": adata.obs["source_cell"].to_numpy() if "source_cell" in adata.obs else None,
        },
        index=adata.obs_names,
    )
    x = _expression(adata, role, layer, measured)
    order = np.argsort(adata.obs_names.to_numpy(dtype=str), kind="stable")
    if not (order[1:] > order[:-1]).all():
        x, obs = x[order], obs.iloc[order]
    return Cells(x, obs, adata.var_names)


def require_genes(cells: Cells, role: str, genes: pd.Index, other: str) -> Cells:
    """Cells with their genes in the order of ``genes``.

    Raises
    ------
    ValueError
        If these are not the same genes.
    """
    if cells.genes.equals(genes):
        return cells
    missing, more = genes.difference(cells.genes), cells.genes.difference(genes)
    if len(missing) or len(more):
        raise ValueError(
            f"`{role}` and `{other}` must have the same genes, but {len(missing)} of {len(genes)} are missing in `{role}` "
            f"and {len(more)} are in `{role}` only (first: {[*missing, *more][0]!r}); select the genes that both have."
        )
    return Cells(cells.x[:, cells.genes.get_indexer(genes)], cells.obs, genes)


def first_of(pairs: pd.MultiIndex) -> str:
    """The first (perturbation, context) of an index, for a message."""
    perturbation, context = pairs[0]
    return repr(perturbation) if context == "" else f"{perturbation!r} in {context!r}"


def _perturbations(adata: AnnData, role: str, columns: Columns) -> NDArray[np.object_]:
    """Canonical name of the perturbation of every cell."""
    codes, labels = pd.factorize(_column(adata, role, columns.perturbation, "perturbation_key"))
    return np.array([columns.names.canonical(str(label)) for label in labels], dtype=object)[codes]


def _context(adata: AnnData, role: str, keys: Sequence[str]) -> NDArray[np.object_]:
    """Name of the combination of columns of every cell, '' without columns."""
    parts = [_column(adata, role, key, "pairing_keys").astype(str) for key in keys]
    if not parts:
        return np.full(adata.n_obs, "", dtype=object)
    name = parts[0]
    for part in parts[1:]:
        name = name + _BETWEEN + part
    return name.to_numpy(dtype=object)


def _column(adata: AnnData, role: str, key: str, argument: str) -> pd.Series:
    if key not in adata.obs:
        raise KeyError(f"`{role}.obs` has no column {key!r} (`{argument}`); it has {list(adata.obs.columns)}.")
    column = adata.obs[key]
    if n_missing := int(column.isna().sum()):
        first = adata.obs_names[int(np.argmax(column.isna()))]
        raise ValueError(
            f"`{role}.obs[{key!r}]` is missing in {n_missing} of {len(column)} cell(s) (first: {first!r}); fill in or "
            "remove these cells."
        )
    return column.astype(object)


def _expression(adata: AnnData, role: str, layer: str | None, measured: bool) -> Any:
    """Checked expression as a float32 matrix of its own kind."""
    x: Any = get_counts(adata, layer)
    x = x[:] if not (sp.issparse(x) or isinstance(x, np.ndarray)) else x  # a file or a view
    x = x.compute() if hasattr(x, "compute") else x
    if sp.issparse(x):
        x = sp.csr_matrix(x, dtype=np.float32)
        if not x.has_canonical_format:
            x = x.copy()  # the arrays are the user's
            x.sum_duplicates()
    else:
        x = np.asarray(x, dtype=np.float32)
    values: Any = x.data if sp.issparse(x) else x
    where = f"{role}.X" if layer is None else f"{role}.layers[{layer!r}]"
    bad = ~np.isfinite(values)
    if bad.any():
        raise ValueError(
            f"`{where}` has {int(bad.sum())} NaN or infinite value(s) (first: {_place(adata, x, bad)}); remove these cells "
            "or repair them."
        )
    if values.size == 0 or not values.any():
        return x
    if not (values != np.rint(values)).any():
        raise ValueError(
            f"`{where}` holds whole numbers only (largest: {values.max():g}), which look like counts; normalise and "
            "take log1p first, or name the layer that holds such values with `layer=`."
        )
    wrong: NDArray[np.bool_] = (values >= _MAX_LOG) | (values < (0 if measured else -np.inf))
    if wrong.any():
        raise ValueError(
            f"`{where}` has {int(wrong.sum())} value(s) that are no log-normalised expression (first: {_place(adata, x, wrong)}); "
            f"such values are {'0 or more and ' if measured else ''}below {_MAX_LOG:g}, so give log1p of normalised counts."
        )
    return x


def _place(adata: AnnData, x: Any, bad: NDArray[np.bool_]) -> str:
    """Cell and gene of the first marked value."""
    at = int(np.argmax(bad))
    if sp.issparse(x):
        row, column, value = int(np.searchsorted(x.indptr, at, side="right") - 1), int(x.indices[at]), x.data[at]
    else:
        row, column = (int(i) for i in np.unravel_index(at, x.shape))
        value = x[row, column]
    return f"cell {adata.obs_names[row]!r}, gene {adata.var_names[column]!r}, value {value:g}"


def missing_control(role: str, columns: Columns, cells: Cells) -> str:
    """What to say when there are no control cells."""
    found = sorted(cells.obs["perturbation"].unique())
    alike = [label for label in found if label.lower() in {name.lower() for name in CONTROL_SYNONYMS}]
    advice = f"the label {alike[0]!r} may be it" if alike else "name the label of the control cells with `control_key=`"
    return (
        f"`{role}.obs[{columns.perturbation!r}]` has no control cells ({columns.names.control_key!r}; it has {len(found)} "
        f"labels, first: {found[0]!r}); {advice}."
    )
