"""Statistics of genes in one pass over data of any size."""

from __future__ import annotations

from functools import reduce
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from scvi.utils import track

from cellweave.data import get_counts, row_source
from cellweave.stats import Moments

__all__ = ["gene_moments"]

# Cells that are in memory at a time.
_CHUNK = 8192


def gene_moments(adata: AnnData, layer: str | None = None, ddof: int = 1) -> pd.DataFrame:
    """Mean, variance and standard deviation of every gene, in one pass, in float64.

    Works on data in memory, backed AnnData, a :class:`~cellweave.io.CellStore` and dask arrays, in bounded memory. Chunks of
    a dask array are summarised by its own scheduler, so that they are spread over its workers.

    Parameters
    ----------
    adata
        The data.
    layer
        Layer with the values; ``adata.X`` by default.
    ddof
        Divisor of the variance is the number of cells minus ``ddof``.

    Returns
    -------
    Frame with a row per gene, in the order of ``adata.var_names``, and columns ``mean``, ``var``, ``std`` (units of the
    values; ``var`` squared) and ``n_cells`` (cells in which the value is not zero).

    Raises
    ------
    KeyError
        If there is no such layer, or no ``X``.
    """
    x = get_counts(adata, layer)
    parts = _of_dask(x) if hasattr(x, "to_delayed") else _of_rows(x)
    moments = reduce(Moments.merge, parts, Moments.empty(adata.n_vars))
    variance = moments.variance(ddof)
    columns = {"mean": moments.mean, "var": variance, "std": np.sqrt(variance), "n_cells": moments.n_expressed}
    return pd.DataFrame(columns, index=adata.var_names)


def _of_rows(x: Any) -> Any:
    rows = row_source(x)
    n_chunks = -(-rows.shape[0] // _CHUNK)
    chunks = rows.chunks(_CHUNK)
    for _, block in track(chunks, description="Summarising genes", style="tqdm", disable=n_chunks < 8, total=n_chunks):
        yield _of_block(block)


def _of_dask(x: Any) -> list[Moments]:
    import dask

    blocks = x.rechunk({1: -1}).to_delayed().ravel()
    return list(dask.compute(*(dask.delayed(_of_block)(block) for block in blocks)))


def _of_block(block: Any) -> Moments:
    if not sp.issparse(block):
        return Moments.of_dense(np.asarray(block))
    block = sp.csr_matrix(block)
    block.sum_duplicates()
    return Moments.of_sparse(block.data, block.indices, *block.shape)
