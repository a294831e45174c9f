"""The compiled loop from sparse to dense rows."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st

from cellweave.data._densify import dense_rows

TYPES = ["bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float32", "float64"]


def _matrix(dtype: str, index=np.int32) -> sp.csr_matrix:
    rng = np.random.default_rng(0)
    x = np.where(rng.random((30, 11)) < 0.4, rng.integers(1, 100, size=(30, 11)), 0)
    x[[0, 7, 29]] = 0
    x = sp.csr_matrix(x.astype(dtype))
    x.indices, x.indptr = x.indices.astype(index), x.indptr.astype(index)
    return x


@pytest.mark.parametrize("index", [np.int32, np.int64])
@pytest.mark.parametrize("dtype", TYPES)
def test_equals_scipy(dtype, index):
    """Protects every batch: the same float32 values as scipy, for every type of counts and of indices."""
    x = _matrix(dtype, index)
    rows = np.array([29, 3, 3, 0, 12, 3, 28, 7])
    dense = dense_rows(x, rows)
    assert dense.dtype == np.float32
    np.testing.assert_array_equal(dense, x[rows].toarray().astype(np.float32))


@given(st.lists(st.integers(0, 29), max_size=80).map(lambda rows: np.array(rows, dtype=np.int64)))
def test_any_rows_in_any_order(rows):
    """Protects contexts: rows repeat, come in any order, and may be none; nothing is left of the memory before."""
    x = _matrix("float32")
    np.testing.assert_array_equal(dense_rows(x, rows), x[rows].toarray())


def test_unsorted_genes_do_not_matter():
    """Protects files whose genes are unsorted within a cell."""
    x = _matrix("float32")
    y = x.copy()
    for a, b in zip(x.indptr[:-1], x.indptr[1:], strict=True):
        y.indices[a:b], y.data[a:b] = x.indices[a:b][::-1], x.data[a:b][::-1]
    np.testing.assert_array_equal(dense_rows(y, np.arange(30)), x.toarray())


def test_float64_is_rounded_like_numpy():
    """Protects exactness: values that float32 cannot hold are rounded as a cast would."""
    x = sp.csr_matrix(np.array([[0.1, 1 / 3], [1e-40, 16777217.0]]))
    np.testing.assert_array_equal(dense_rows(x, np.array([1, 0])), x.toarray()[[1, 0]].astype(np.float32))
