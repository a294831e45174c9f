"""``tl.subcluster_population`` finds groups inside a population and touches nothing else."""

from __future__ import annotations

import random
import sys

import anndata
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from sklearn.metrics import adjusted_rand_score

from cellweave.tl import subcluster_population

pytest.importorskip("igraph", reason="igraph is not installed: pip install 'cellweave[cluster]'")

MARKERS = ["CD3", "CD16", "CD57"]


@pytest.fixture
def adata() -> AnnData:
    """NK cells of two kinds that differ in CD16 (300 and 150), 40 of a third, and 200 T cells."""
    rng = np.random.default_rng(0)
    kind = np.repeat([0, 1, 2, 3], [300, 150, 40, 200])
    mean = np.array([[-1, 1, -1], [-1, -1, -1], [-1, 1, 3], [1, -1, -1]], dtype=float)
    latent = mean[kind] + 0.15 * rng.normal(size=(len(kind), 3))
    order = rng.permutation(len(kind))
    kind, latent = kind[order], latent[order]
    names = [f"cell{i}" for i in range(len(kind))]
    adata = AnnData(np.zeros((len(kind), 1), dtype=np.float32), obs=pd.DataFrame({"kind": kind}, index=names))
    population = pd.Categorical.from_codes(np.array([0, 0, 0, 1])[kind], ["NK", "T/NKT"])
    adata.obs["scyan_population"] = population
    adata.obs["scyan_population_level"] = pd.Categorical(["Lymphoid"] * len(kind))
    adata.obsm["X_scyan"] = pd.DataFrame(latent.astype(np.float32), index=names, columns=MARKERS)
    return adata


def test_kinds_are_found_and_small_ones_dropped(adata):
    """Protects the discovery: two kinds of NK cells, from the largest on; 40 cells are no cluster; T cells get none."""
    subcluster_population(adata, "NK")
    clusters = adata.obs["scyan_subcluster_NK"]
    assert list(clusters.cat.categories) == ["0", "1"]
    kind = adata.obs["kind"].to_numpy()
    assert clusters[kind >= 2].isna().all()
    has = clusters.notna().to_numpy()
    assert has[kind < 2].mean() > 0.98
    assert adjusted_rand_score(kind[has], clusters[has]) > 0.98
    assert (clusters[kind == 0].dropna() == "0").mean() > 0.98
    more = subcluster_population(adata, "NK", min_cells=20)
    assert more["cluster"].nunique() == 3


def test_the_summary_says_what_differs(adata):
    """Protects the interpretation: means of the cluster, and differences to the rest of the population."""
    summary = subcluster_population(adata, "NK").set_index(["cluster", "marker"])
    cells = (adata.obs["scyan_subcluster_NK"] == "0").to_numpy()
    rest = (adata.obs["scyan_population"] == "NK").to_numpy() & ~cells
    latent = adata.obsm["X_scyan"]["CD16"]
    assert summary.at[("0", "CD16"), "mean"] == pytest.approx(latent[cells].mean(), abs=1e-5)
    assert summary.at[("0", "CD16"), "difference"] == pytest.approx(
        latent[cells].mean() - latent[rest].mean(), abs=1e-5
    )
    assert summary.at[("0", "CD16"), "n_cells"] == cells.sum()
    assert abs(summary.at[("1", "CD16"), "difference"]) > 1 > abs(summary.at[("1", "CD3"), "difference"])
    pd.testing.assert_frame_equal(adata.uns["scyan_subcluster_NK"], summary.reset_index())


def test_chosen_markers_alone_decide(adata):
    """Protects the choice of markers: without CD16 the two kinds are one."""
    summary = subcluster_population(adata, "NK", markers=["CD3"], resolution=0.01, key_added="by CD3")
    clusters = adata.obs["by CD3"]
    kind = adata.obs["kind"].to_numpy()
    has = clusters.notna().to_numpy()
    assert abs(adjusted_rand_score(kind[has], clusters[has])) < 0.1
    assert set(summary["marker"]) == set(MARKERS)
    assert adata.uns["cellweave"]["by CD3"]["parameters"]["markers"] == ["CD3"]


def test_a_parent_group_is_clustered_by_its_level(adata):
    """Protects groups of the hierarchy: all their cells take part."""
    subcluster_population(adata, "Lymphoid")
    clusters = adata.obs["scyan_subcluster_Lymphoid"]
    kind = adata.obs["kind"].to_numpy()
    has = clusters.notna().to_numpy()
    assert has[kind == 3].mean() > 0.98
    assert adjusted_rand_score(kind[has], clusters[has]) > 0.95


def test_results_are_reproducible_and_the_random_state_stays(adata):
    """Protects reproducibility, and the draws of the user's own code after the call."""
    ours = random.getstate(), np.random.get_state()[1].copy()
    subcluster_population(adata, "NK", resolution=1.0, min_cells=10, key_added="a")
    assert random.getstate() == ours[0]
    np.testing.assert_array_equal(np.random.get_state()[1], ours[1])
    random.random(), np.random.random()
    subcluster_population(adata, "NK", resolution=1.0, min_cells=10, key_added="b")
    pd.testing.assert_series_equal(adata.obs["a"], adata.obs["b"], check_names=False)


def test_results_can_be_written_and_computed_again(adata, tmp_path):
    """Protects files: a name with a slash is no key, and our own result may be replaced."""
    subcluster_population(adata, "T/NKT")
    adata.write_h5ad(tmp_path / "a.h5ad")
    again = anndata.read_h5ad(tmp_path / "a.h5ad")
    pd.testing.assert_series_equal(again.obs["scyan_subcluster_T_NKT"], adata.obs["scyan_subcluster_T_NKT"])
    subcluster_population(again, "T/NKT", resolution=2.0, min_cells=3, min_share=0)
    assert again.obs["scyan_subcluster_T_NKT"].nunique() > 1


def test_an_array_without_names_will_do(adata):
    """Protects representations of other tools."""
    adata.obsm["X_other"] = adata.obsm["X_scyan"].to_numpy()
    summary = subcluster_population(adata, "NK", use_rep="X_other")
    assert set(summary["marker"]) == {"X_other_0", "X_other_1", "X_other_2"}


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (ValueError, {"population": "B"}, r"`population='B'` is no population or group.*'Lymphoid'"),
        (ValueError, {"min_cells": 1000}, r"has 490 cell\(s\), fewer than `min_cells=1000`"),
        (ValueError, {"markers": ["CD56"]}, "`markers` must be a list of columns"),
        (ValueError, {"markers": []}, "`markers` must be a list of columns"),
        (ValueError, {"resolution": 0}, "`resolution` must be above 0"),
        (ValueError, {"min_share": 1.5}, "`min_share` in"),
        (ValueError, {"key_added": "kind"}, r"`adata.obs\['kind'\]` already exists and was not written by"),
        (ValueError, {"key_added": ""}, "`key_added` must be a name"),
        (KeyError, {"use_rep": "X_pca"}, "`use_rep='X_pca'` is not in `adata.obsm`"),
        (KeyError, {"groupby": "mine"}, "`groupby='mine'` is not in"),
    ],
)
def test_wrong_arguments_are_explained_and_nothing_is_written(adata, kind, change, message):
    """Protects the user's object: after an error it is as it was."""
    columns = list(adata.obs.columns)
    with pytest.raises(kind, match=message):
        subcluster_population(adata, **{"population": "NK", **change})
    assert list(adata.obs.columns) == columns
    assert not adata.uns


def test_cells_without_representation_are_refused(adata):
    """Protects the graph from NaN: the first cell is named, and other populations do not matter."""
    kind = adata.obs["kind"].to_numpy()
    adata.obsm["X_scyan"].iloc[int(np.flatnonzero(kind == 3)[0]), 0] = np.nan
    subcluster_population(adata, "NK")
    row = int(np.flatnonzero(kind == 1)[0])
    adata.obsm["X_scyan"].iloc[row, 0] = np.nan
    with pytest.raises(ValueError, match=rf"NaN or infinite in 1 cell\(s\).*'cell{row}'"):
        subcluster_population(adata, "NK", key_added="again")


def test_a_missing_igraph_says_how_to_install_it(adata, monkeypatch):
    """Protects from a traceback of another package."""
    monkeypatch.setitem(sys.modules, "igraph", None)
    with pytest.raises(ImportError, match=r"cellweave\[cluster\]"):
        subcluster_population(adata, "NK")
