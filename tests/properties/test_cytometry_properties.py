"""Properties of cytometry: every transform can be undone, none depends on the order of markers, files keep every bit."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

import cellweave as cw

INTENSITIES = arrays(np.float64, st.tuples(st.integers(1, 6), st.just(3)), elements=st.floats(-1e5, 1e5))
POSITIVE = st.floats(1e-2, 1e4)
THREE = st.tuples(POSITIVE, POSITIVE, POSITIVE)
MARKERS = ["CD3", "CD4", "CD8"]
ORDERS = st.permutations(MARKERS)


def cells(x: np.ndarray) -> AnnData:
    return AnnData(
        x.copy(), var=pd.DataFrame(index=[f"CD{i}" for i in range(x.shape[1])] if x.shape[1] != 3 else MARKERS)
    )


def undone(adata: AnnData, order: list[str]) -> np.ndarray:
    """What comes back for the markers in another order."""
    return cw.pp.inverse_transform(adata, adata.to_df()[order])[MARKERS].to_numpy()


@given(INTENSITIES, THREE, st.floats(-1e3, 1e3), ORDERS)
def test_arcsinh_is_undone(x, cofactors, translation, order):
    """Protects intensities of any size and sign, for any parameters."""
    adata = cells(x)
    cw.pp.arcsinh(adata, cofactor=dict(zip(MARKERS, cofactors, strict=True)), translation=translation)
    np.testing.assert_allclose(undone(adata, order), x, rtol=1e-9, atol=1e-8)


@given(INTENSITIES, THREE, st.none() | THREE, ORDERS)
def test_scaling_is_undone(x, std, mean, order):
    """Protects both kinds of scaling, with statistics from elsewhere."""
    table = pd.DataFrame({"std": std} if mean is None else {"std": std, "mean": mean}, index=MARKERS)
    adata = cells(x)
    cw.pp.scale_markers(adata, reference=table.loc[order], max_value=None)
    np.testing.assert_allclose(undone(adata, order), x, rtol=1e-9, atol=1e-8)


@given(INTENSITIES, THREE, st.floats(2, 8), st.floats(0, 1), ORDERS)
def test_logicle_is_undone(x, tops, m, width, order):
    """Protects the scale for any top, number of decades and width, also for intensities beyond its ends."""
    pytest.importorskip("flowutils")
    table = pd.DataFrame({"t": [100 + 10 * t for t in tops], "m": m, "w": width * m / 2}, index=MARKERS)
    adata = cells(x)
    cw.pp.logicle(adata, reference=table.loc[order])
    np.testing.assert_allclose(undone(adata, order), x, rtol=1e-6, atol=1e-5)


@given(INTENSITIES, arrays(np.float64, (3, 3), elements=st.floats(0, 0.4)), ORDERS)
def test_compensation_is_undone_and_right(x, spill, order):
    """Protects the convention: compensated signals times the spillover are what was measured."""
    np.fill_diagonal(spill, 1)
    table = pd.DataFrame(spill, index=MARKERS, columns=MARKERS)
    adata = cells(x)
    cw.pp.compensate(adata, table.loc[order, order[::-1]])
    np.testing.assert_allclose(adata.X @ spill, x, rtol=1e-9, atol=1e-6)
    np.testing.assert_allclose(undone(adata, order), x, rtol=1e-9, atol=1e-6)


@given(INTENSITIES.filter(lambda x: (np.ptp(x, axis=0) > 1e-3).all()), ORDERS)
def test_order_of_markers_does_not_matter(x, order):
    """Protects panels whose columns come in another order: each marker is treated by itself."""
    adata = cells(x)
    other = adata[:, order].copy()
    for one in (adata, other):
        cw.pp.arcsinh(one, cofactor=5)
        cw.pp.scale_markers(one)
    np.testing.assert_allclose(other[:, MARKERS].X, adata.X, rtol=1e-9, atol=1e-9)


MATRICES = arrays(
    np.float32, array_shapes(min_dims=2, max_dims=2, max_side=5), elements=st.floats(width=32, allow_nan=True)
)


@given(MATRICES)
def test_fcs_files_keep_every_bit(x):
    """Protects values of any size in FCS files, NaN and infinity included."""
    pytest.importorskip("flowio")
    with tempfile.TemporaryDirectory() as folder:
        cw.io.write_fcs(cells(x), Path(folder) / "a.fcs")
        back = cw.io.read_fcs(Path(folder) / "a.fcs")
    np.testing.assert_array_equal(back.X, x)


@given(MATRICES.filter(lambda x: np.isfinite(x).all()))
def test_tables_keep_every_bit(x):
    """Protects values of any size in text tables."""
    with tempfile.TemporaryDirectory() as folder:
        cw.io.write_cytometry_csv(cells(x), Path(folder) / "a.csv")
        back = cw.io.read_cytometry_csv(Path(folder) / "a.csv")
    np.testing.assert_array_equal(back.X, x)
