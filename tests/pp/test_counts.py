"""``recover_counts`` returns the exact integers behind log-normalised values, or refuses."""

from __future__ import annotations

import anndata
import numpy as np
import pytest
import scanpy as sc
import scipy.sparse as sp
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import cellweave as cw
from cellweave.data import _recover


def log_normalised(counts: np.ndarray, scale: np.ndarray | float, decimals: int | None = None) -> np.ndarray:
    values = np.log1p(np.asarray(scale, dtype=np.float64) * counts)
    return values if decimals is None else np.round(values, decimals)


@pytest.fixture
def counts() -> np.ndarray:
    """Poisson counts in which every cell has a 1 and some have larger counts; no cell is empty."""
    rng = np.random.default_rng(0)
    x = rng.poisson(rng.gamma(0.5, 4, size=60), size=(40, 60))
    x[:, 0] = 1
    return x


@pytest.mark.parametrize("decimals", [None, 3, 4])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_round_trip_is_exact(counts: np.ndarray, decimals: int | None, dtype: type):
    """Protects the whole purpose: every count comes back, for exact and rounded files, in either precision."""
    scale = 1e4 / counts.sum(axis=1, keepdims=True)
    found = cw.pp.recover_counts(log_normalised(counts, scale, decimals).astype(dtype))
    assert sp.isspmatrix_csr(found)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found.toarray(), counts)


def test_result_of_scanpy_is_inverted(counts: np.ndarray):
    """Protects against an error model that fits our own formula but not the float32 arithmetic of scanpy."""
    adata = anndata.AnnData(sp.csr_matrix(counts, dtype=np.float32))
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    np.testing.assert_array_equal(cw.pp.recover_counts(adata).toarray(), counts)


@settings(max_examples=25, deadline=None)
@given(
    counts=hnp.arrays(np.int64, st.integers(2, 30), elements=st.integers(0, 80)),
    scale=st.floats(0.2, 20),
    decimals=st.sampled_from([None, 3, 4]),
)
def test_any_cell_comes_back_up_to_its_common_divisor(counts: np.ndarray, scale: float, decimals: int | None):
    """Protects the proof: whatever the counts and the scale, an accepted cell is right, never close."""
    divisor = np.gcd.reduce(counts) or 1
    values = log_normalised(counts[None], scale, decimals)
    assume(not np.array_equal(values, np.rint(values)))  # such values are refused as counts
    try:
        found = cw.pp.recover_counts(values, tolerance=0.0 if decimals is None else 0.5 * 10.0**-decimals)
    except ValueError as error:
        # only two honest refusals: the rounding is too coarse, or the smallest count of the cell exceeds five
        smallest = counts[counts > 0].min() // divisor
        assert "too coarsely" in str(error) or ("not log(1 + scale * count)" in str(error) and smallest > 5)
    else:
        np.testing.assert_array_equal(found.toarray()[0], counts // divisor)


@pytest.mark.parametrize("smallest", [2, 3, 4, 5])
def test_cell_without_a_one(smallest: int):
    """Protects cells whose smallest count is not 1: dividing by the smallest value alone would scale them down."""
    counts = np.array([[smallest, smallest + 1, 2 * smallest + 1, 0, 17]])
    np.testing.assert_array_equal(cw.pp.recover_counts(log_normalised(counts, 1.7, 3)).toarray(), counts)


def test_common_divisor_gives_smallest_counts():
    """Pins the documented limit: counts 2 and 4 cannot be told from 1 and 2."""
    np.testing.assert_array_equal(cw.pp.recover_counts(log_normalised(np.array([[2, 4]]), 1.3)).toarray(), [[1, 2]])


@pytest.mark.parametrize("make", [sp.csr_matrix, sp.csc_matrix, sp.coo_matrix, sp.csr_array, np.asarray])
def test_every_container_gives_the_same(counts: np.ndarray, make: type):
    """Protects against an answer that depends on how the matrix is stored."""
    values = log_normalised(counts, 2.5)
    np.testing.assert_array_equal(cw.pp.recover_counts(make(values)).toarray(), counts)


def test_layer_is_read_and_nothing_is_written(counts: np.ndarray):
    """Protects the user's data: the layer is the source, and neither X nor the layer changes."""
    adata = anndata.AnnData(np.zeros(counts.shape), layers={"log": log_normalised(counts, 2.5)})
    before = adata.layers["log"].copy()
    np.testing.assert_array_equal(cw.pp.recover_counts(adata, layer="log").toarray(), counts)
    np.testing.assert_array_equal(adata.layers["log"], before)
    assert [key for key in adata.layers if key is not None] == ["log"]  # anndata 0.13 lists X as the layer None
    assert not adata.X.any()


def test_sparse_input_is_not_changed(counts: np.ndarray):
    """Protects the user's matrix: stored zeros are ignored on a copy, not removed in place."""
    values = sp.csr_matrix(log_normalised(counts, 2.5))
    values.data[values.indptr[3]] = 0.0
    before = values.copy()
    cw.pp.recover_counts(values)
    np.testing.assert_array_equal(values.data, before.data)
    np.testing.assert_array_equal(values.indptr, before.indptr)


def test_empty_cell_and_explicit_zeros():
    """Protects cells without counts: they stay empty and their scale is unknown, not zero."""
    stored = sp.csr_matrix((log_normalised(np.array([1.0, 3.0, 0.0]), 2.5), [0, 1, 2], [0, 3, 3]), shape=(2, 3))
    found = _recover.recover_counts(stored)
    np.testing.assert_array_equal(found.counts.toarray(), [[1, 3, 0], [0, 0, 0]])
    np.testing.assert_allclose(found.scale, [2.5, np.nan], rtol=1e-6)
    assert found.deviation[1] == 0


def test_scale_and_deviation(counts: np.ndarray):
    """Protects the by-products: the scale is the library size in disguise, the deviation stays below the rounding."""
    scale = 1e4 / counts.sum(axis=1)
    found = _recover.recover_counts(log_normalised(counts, scale[:, None], 3))
    np.testing.assert_allclose(found.scale, scale, rtol=2e-3)
    assert 1e-4 < found.deviation.max() <= 5.1e-4


def test_one_wrong_value_is_found_and_the_cell_is_named(counts: np.ndarray):
    """Protects against silent rounding: a single value that is no multiple of the others must not pass."""
    values = log_normalised(counts, 2.5)
    values[7, 0] = np.log1p(2.5 * 1.37)
    adata = anndata.AnnData(values)
    adata.obs_names = [f"cell{i}" for i in range(adata.n_obs)]
    with pytest.raises(ValueError, match=r"cell 'cell7' are not log\(1 \+ scale \* count\).* is 0\.\d+ away"):
        cw.pp.recover_counts(adata)


def test_coarse_values_are_refused():
    """Protects large counts: three decimals cannot tell 5000 from 5001, so neither may be returned."""
    with pytest.raises(ValueError, match="stored too coarsely to tell a count of"):
        cw.pp.recover_counts(log_normalised(np.array([[1, 2, 3, 5000]]), 2.0, 3))


def test_explicit_tolerance_decides(counts: np.ndarray):
    """Protects the parameter: noise above the tolerance is refused, noise below it is rounded away."""
    rng = np.random.default_rng(1)
    values = log_normalised(counts, 2.5)
    values[counts > 0] += rng.uniform(-2e-4, 2e-4, size=(counts > 0).sum())
    with pytest.raises(ValueError, match="is not|are not"):
        cw.pp.recover_counts(values)
    np.testing.assert_array_equal(cw.pp.recover_counts(values, tolerance=2e-4).toarray(), counts)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[1.0, 2.0, 5.0]], "look like counts already"),
        ([[0.5, -0.3]], r"cannot be negative, found 1 such values, the first is -0\.3 in row 0, column 1"),
        ([[0.5, 0.2], [np.nan, 0.5]], "must be finite, found 1 such values, the first is nan in row 1, column 0"),
        ([[0.5, np.inf]], "must be finite"),
    ],
)
def test_values_that_are_not_log_normalised(values: list[list[float]], message: str):
    """Protects the user from passing counts, scaled or damaged data."""
    with pytest.raises(ValueError, match=message):
        cw.pp.recover_counts(np.array(values))


def test_wrong_place(counts: np.ndarray):
    """Protects the messages: the available layers are named, and a layer of a bare matrix makes no sense."""
    adata = anndata.AnnData(counts.astype(float), layers={"log": counts.astype(float)})
    with pytest.raises(KeyError, match=r"Layer 'counts' is not in adata.layers; it has \['log'\]"):
        cw.pp.recover_counts(adata, layer="counts")
    with pytest.raises(ValueError, match="needs an AnnData, found ndarray"):
        cw.pp.recover_counts(counts, layer="log")
    adata.X = None
    with pytest.raises(ValueError, match=r"adata\.X is empty; choose a layer among \['log'\]"):
        cw.pp.recover_counts(adata)
