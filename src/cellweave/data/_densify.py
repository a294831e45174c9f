"""Rows of a CSR matrix as a dense float32 array, in one pass over the wanted entries."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

__all__ = ["as_dense", "dense_rows"]


def dense_rows(x: sp.csr_matrix, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """``x[rows]`` as a float32 array ``(len(rows), gene)``, without the sparse copy and casts in between.

    Parameters
    ----------
    x
        Canonical CSR matrix of any number type.
    rows
        Valid, non-negative rows in any order, repeated or not.
    """
    out = np.empty((len(rows), x.shape[1]), dtype=np.float32)
    # in the order of the memory: rows that lie next to each other are read one after the other
    _fill(x.data, x.indices, x.indptr, rows, np.argsort(rows), out)
    return out


def as_dense(block: Any) -> NDArray[np.float32]:
    """A block of rows as a contiguous float32 array ``(cell, gene)``, whatever it was.

    Parameters
    ----------
    block
        Sparse matrix or array.
    """
    return np.ascontiguousarray(block.toarray() if sp.issparse(block) else block, dtype=np.float32)


@numba.njit(cache=True, nogil=True)
def _fill(data, indices, indptr, rows, order, out):  # type: ignore[no-untyped-def]
    for i in order:
        row = rows[i]
        out[i] = 0  # row by row: it stays in the cache until it is filled
        for j in range(indptr[row], indptr[row + 1]):
            out[i, indices[j]] = data[j]
