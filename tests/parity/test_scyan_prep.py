"""Preprocessing of intensities, compared with numbers of the published Scyan and of float64 formulas (``scyan_prep``).

The original compensates with the transposed matrix; the numbers of the right convention are those that are kept.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

import cellweave as cw

pytestmark = pytest.mark.parity
MARKERS = list("ABCD")


@pytest.fixture(scope="module")
def prep() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).parent / "fixtures" / "scyan_prep.npz") as arrays:
        return dict(arrays)


@pytest.fixture
def adata(prep) -> AnnData:
    return AnnData(prep["raw"].copy(), var=pd.DataFrame(index=MARKERS))


@pytest.mark.parametrize(("translation", "cofactor"), [(0, 5), (1, 5), (0, 150)])
def test_arcsinh(prep, adata, translation, cofactor):
    """Protects the transform of the published settings: translation before, cofactor after."""
    cw.pp.arcsinh(adata, cofactor=cofactor, translation=translation)
    np.testing.assert_allclose(adata.X, prep[f"asinh_t{translation}_c{cofactor}"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("center", "name"), [(None, "scale_cytof"), (False, "scale_cytof"), (True, "scale_centered")])
def test_scaling(prep, adata, center, name):
    """Protects both kinds of scaling, and which one follows arcsinh by itself; standard deviations are those of ddof 0."""
    cw.pp.arcsinh(adata)
    cw.pp.scale_markers(adata, center=center)
    np.testing.assert_allclose(adata.X, prep[name], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(adata.uns["cellweave_transforms"]["X"]["1"]["std"], prep["scale_std"], rtol=1e-6)


def test_compensation_is_of_row_vectors(prep, adata):
    """Protects against the defect of the original, which applies the inverse of the transposed matrix."""
    cw.pp.compensate(adata, pd.DataFrame(prep["spillover"], index=MARKERS, columns=MARKERS))
    np.testing.assert_allclose(adata.X, prep["compensated_row_vector_convention"], rtol=1e-5, atol=1e-4)
    assert np.abs(adata.X - prep["compensated_as_in_original"]).max() > 1


def test_automatic_logicle(prep, adata):
    """Protects the parameters found per marker, and the values; the original computes its parameters in float32."""
    pytest.importorskip("flowutils")
    cw.pp.logicle(adata)
    record = adata.uns["cellweave_transforms"]["X"]["0"]
    for j, name in enumerate("tmw"):
        np.testing.assert_allclose(record[name], prep["auto_logicle_t_m_w"][:, j], rtol=1e-6)
    np.testing.assert_allclose(adata.X, prep["auto_logicle__orig"], atol=1e-4)


def test_aml_file_is_reproduced(real_data):
    """Protects the whole chain on the published AML file: arcsinh, given statistics, cut at ten."""
    import anndata as ad

    published = ad.read_h5ad(real_data("cytometry/aml_short.h5ad"))
    statistics = pd.read_csv(real_data("cytometry/aml_marker_mean_std.csv"), index_col=0)
    adata = published.raw.to_adata()
    cw.pp.arcsinh(adata, cofactor=5, translation=1)
    cw.pp.scale_markers(adata, reference=statistics)
    np.testing.assert_allclose(adata.X, published.X, atol=1e-5)
