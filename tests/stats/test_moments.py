"""Streaming moments of genes."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import cellweave as cw
from cellweave.pp import _statistics
from cellweave.stats import Moments

VALUES = hnp.arrays(np.float64, st.tuples(st.integers(1, 12), st.just(3)), elements=st.floats(-1e3, 1e3, width=32))


def _close(moments: Moments, values: np.ndarray) -> None:
    np.testing.assert_allclose(moments.mean, values.mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(moments.variance(0), values.var(0), rtol=1e-10, atol=1e-9)
    np.testing.assert_array_equal(moments.n_expressed, (values != 0).sum(0))


@given(VALUES, st.integers(0, 12))
def test_any_split_gives_the_moments_of_all_cells(values, at):
    """Protects merging: two parts in either order, dense or sparse, have the moments of the whole."""
    sparse = sp.csr_matrix(values[at:])
    parts = [Moments.of_dense(values[:at]), Moments.of_sparse(sparse.data, sparse.indices, *sparse.shape)]
    _close(parts[0].merge(parts[1]), values)
    _close(parts[1].merge(parts[0]), values)


@given(VALUES, VALUES, VALUES)
def test_merging_is_associative(a, b, c):
    """Protects trees of workers: the order in which partial results are joined does not matter."""
    a, b, c = map(Moments.of_dense, (a, b, c))
    left, right = a.merge(b).merge(c), a.merge(b.merge(c))
    np.testing.assert_allclose(left.mean, right.mean, rtol=1e-12, atol=1e-10)
    np.testing.assert_allclose(left.m2, right.m2, rtol=1e-10, atol=1e-6)


def test_large_offsets_do_not_cancel():
    """Protects the variance of values far from zero, where the difference of sums of squares loses all digits."""
    values = 1e8 + np.random.default_rng(0).normal(size=(1000, 2))
    moments = Moments.of_dense(values[:500]).merge(Moments.of_dense(values[500:]))
    np.testing.assert_allclose(moments.variance(1), values.var(0, ddof=1), rtol=1e-7)


def test_no_cells_and_one_cell():
    """Protects small data: no variance without cells, and neutral empty parts."""
    empty, one = Moments.empty(2), Moments.of_dense(np.array([[1.0, 0.0]]))
    assert np.isnan(empty.variance()).all()
    assert np.isnan(one.variance(1)).all()
    for moments in (empty.merge(one), one.merge(empty)):
        np.testing.assert_array_equal(moments.mean, [1.0, 0.0])
        assert moments.n_cells == 1


@pytest.fixture
def adata(make_adata) -> AnnData:
    return make_adata(n_cells=200)


@pytest.fixture
def expected(adata) -> pd.DataFrame:
    x = adata.X.toarray().astype(np.float64)
    columns = {"mean": x.mean(0), "var": x.var(0, ddof=1), "std": x.std(0, ddof=1), "n_cells": (x > 0).sum(0)}
    return pd.DataFrame(columns, index=adata.var_names)


@pytest.mark.parametrize("storage", ["csr", "csc", "dense", "backed", "store", "zarr", "dask", "dask-sparse"])
def test_gene_moments_of_any_storage(adata, expected, storage, tmp_path, monkeypatch):
    """Protects one result for all storages: equal to the in-memory statistics to 1e-12, over several chunks."""
    monkeypatch.setattr(_statistics, "_CHUNK", 64)
    if storage in ("csc", "dense"):
        adata.X = sp.csc_matrix(adata.X) if storage == "csc" else adata.X.toarray()
    elif storage in ("backed", "store"):
        adata.write_h5ad(tmp_path / "a.h5ad")
        path = tmp_path / "a.h5ad"
        adata = ad.read_h5ad(path, backed="r") if storage == "backed" else cw.io.open_store(path)
    elif storage == "zarr":
        adata = cw.pp.write_store(adata, tmp_path / "a.zarr", shuffle=False)
    elif storage.startswith("dask"):
        da = pytest.importorskip("dask.array", reason="dask is an optional dependency")
        x = da.from_array(adata.X.toarray(), chunks=(70, 7))
        adata.X = x.map_blocks(sp.csr_matrix, dtype=x.dtype) if storage == "dask-sparse" else x
    found = cw.pp.gene_moments(adata)
    pd.testing.assert_frame_equal(found, expected, rtol=1e-12, check_dtype=False)


def test_layer_and_divisor(adata, expected):
    """Protects the arguments: another layer, and the population variance."""
    adata.layers["half"] = adata.X / 2
    found = cw.pp.gene_moments(adata, layer="half", ddof=0)
    np.testing.assert_allclose(found["mean"], expected["mean"] / 2)
    np.testing.assert_allclose(found["var"], expected["var"] / 4 * 199 / 200)
    with pytest.raises(KeyError, match="`layer='no'` not found; `adata.layers` has 'half'"):
        cw.pp.gene_moments(adata, layer="no")
