"""The bundled data set holds true counts."""

from __future__ import annotations

import warnings

import anndata
import numpy as np
import pytest
import scanpy as sc
import scipy.sparse as sp

import cellweave as cw
from cellweave.data import _recover


@pytest.fixture(scope="module")
def adata() -> anndata.AnnData:
    return cw.datasets.pbmc68k()


def test_contents(adata: anndata.AnnData):
    """Protects what examples rely on: shape, sparse integer counts, labels, no leftovers of the old processing."""
    assert adata.shape == (700, 765)
    assert sp.isspmatrix_csr(adata.X)
    assert adata.X.dtype == np.float32
    np.testing.assert_array_equal(adata.X.data, np.rint(adata.X.data))
    assert adata.X.data.min() == 1
    assert adata.obs["bulk_labels"].nunique() == 10
    assert adata.raw is None
    assert not (adata.obsm or adata.layers or adata.varm or adata.obsp)


def test_counts_agree_with_the_library_sizes_of_the_study(adata: anndata.AnnData):
    """Protects the absolute level: the file also stores each cell's library size, which the recovery never reads."""
    found = _recover.recover_counts(sc.datasets.pbmc68k_reduced().raw.X).scale
    np.testing.assert_allclose(1e4 / found, adata.obs["total_counts_full"], rtol=5e-4)


def test_values_are_reproduced_to_the_last_digit(adata: anndata.AnnData):
    """Protects every entry: normalising the counts by the stored library size gives the bundled file again."""
    scaled = adata.X.multiply(1e4 / adata.obs["total_counts_full"].to_numpy()[:, None]).tocsr()
    np.testing.assert_allclose(scaled.log1p().toarray(), sc.datasets.pbmc68k_reduced().raw.X.toarray(), atol=8e-4)


def test_another_file_in_scanpy_is_refused(monkeypatch: pytest.MonkeyPatch):
    """Protects against a scanpy release whose bundled file is no longer log-normalised counts."""
    changed = sc.datasets.pbmc68k_reduced()
    values = changed.raw.X.copy()
    values.data[0] += 0.05
    changed.raw = anndata.AnnData(values, obs=changed.obs, var=changed.raw.var)
    monkeypatch.setattr(sc.datasets, "pbmc68k_reduced", lambda: changed)
    with pytest.raises(ValueError, match=changed.obs_names[0]):
        cw.datasets.pbmc68k()


def test_is_silent_and_can_be_written(adata: anndata.AnnData, tmp_path):
    """Protects notebooks: no warning, and a data set that h5ad accepts."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Python does not show these to users: anndata 0.13 asks for an option that pandas 3.1 is about to remove
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"anndata\b")
        cw.datasets.pbmc68k()
    adata.write_h5ad(tmp_path / "pbmc68k.h5ad")
    again = anndata.read_h5ad(tmp_path / "pbmc68k.h5ad")
    assert again.uns["cellweave"]["dataset"]["name"] == "pbmc68k"
