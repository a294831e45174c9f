"""Genes are known by name: bring any AnnData into the gene order of a model."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from scvi import settings

from ._validate import get_counts

__all__ = ["align_genes"]

_WARN_BELOW = 0.9


def align_genes(adata: AnnData, genes: Sequence[str], layer: str | None = None, min_overlap: float = 0.5) -> AnnData:
    """Return the counts of ``adata`` for exactly ``genes``, in that order.

    Genes are matched by name. Genes that ``adata`` lacks become zero columns, genes that are not asked for are left
    out. The result shares ``obs`` values with ``adata`` but is a new object; ``adata`` is not changed.

    Parameters
    ----------
    adata
        Data whose ``var_names`` are gene names of the same kind as ``genes``.
    genes
        Names of the wanted genes, in the wanted order.
    layer
        Layer that holds the counts; ``adata.X`` by default. It is found under the same name in the result, and in
        its ``X``.
    min_overlap
        Least share of ``genes`` that must be found.

    Returns
    -------
    AnnData ``(cell, len(genes))`` with CSR or dense counts of the dtype of the input.

    Raises
    ------
    KeyError
        If there is no such layer, or no ``X``.
    ValueError
        If gene names are repeated, or fewer than ``min_overlap`` of ``genes`` are found.
    """
    wanted = pd.Index(genes)
    repeated = adata.var_names[adata.var_names.duplicated()].unique()
    if len(repeated):
        raise ValueError(
            f"`adata.var_names` repeats {len(repeated)} gene name(s) (first: {repeated[0]!r}); run "
            "`adata.var_names_make_unique()` or merge the columns before aligning."
        )
    position = adata.var_names.get_indexer(wanted)  # (gene,), -1 where missing
    _report(position, wanted, adata, min_overlap)
    x = _take_columns(get_counts(adata, layer), position)
    aligned = AnnData(X=x, obs=adata.obs.copy(), var=pd.DataFrame(index=wanted))
    if layer is not None:
        aligned.layers[layer] = aligned.X
    return aligned


def _report(position: np.ndarray, wanted: pd.Index, adata: AnnData, min_overlap: float) -> None:
    n_found = int((position >= 0).sum())
    overlap = n_found / len(wanted)
    missing = wanted[position < 0]
    found = f"{n_found} of the {len(wanted)} genes of the model are in `adata.var_names`"
    if n_found == 0 or overlap < min_overlap:
        raise ValueError(
            f"Only {found} (first of the model: {wanted[:1].tolist()}, first of `adata`: {adata.var_names[:1].tolist()}), less than "
            f"`min_overlap={min_overlap}`; use the same kind of gene names (symbols or Ensembl identifiers)."
        )
    if overlap < _WARN_BELOW:
        warnings.warn(
            f"{found}; the others count as zero (first missing: {missing[0]!r}).",
            UserWarning,
            stacklevel=settings.warnings_stacklevel,
        )


def _take_columns(x: Any, position: np.ndarray) -> sp.csr_matrix | np.ndarray:
    """Columns ``position`` of ``x``, zero where ``position`` is -1."""
    found = position >= 0
    if not isinstance(x, np.ndarray) and not sp.issparse(x):
        x = x[:]  # a backed matrix
    if sp.issparse(x):
        # a selection matrix does the reordering, dropping and zero filling in one sparse product
        n_found = int(found.sum())
        select = sp.csr_matrix(
            (np.ones(n_found, dtype=x.dtype), (position[found], np.flatnonzero(found))),
            shape=(x.shape[1], len(position)),
        )
        return sp.csr_matrix(x) @ select
    out = np.zeros((x.shape[0], len(position)), dtype=x.dtype)
    out[:, found] = x[:, position[found]]
    return out
