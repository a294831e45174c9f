"""Scores of embeddings: perfect and useless embeddings get the values they deserve, bad input gets one sentence."""

from __future__ import annotations

import importlib.util
import sys

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import cellweave as cw
from cellweave.tl import _scores

needs_scib = pytest.mark.skipif(
    importlib.util.find_spec("scib_metrics") is None,
    reason='scib-metrics is not installed; pip install "cellweave[eval]"',
)


@pytest.fixture
def adata() -> anndata.AnnData:
    """Three labels and two balanced batches; one embedding knows the labels, one the batches, one nothing."""
    rng = np.random.default_rng(0)
    label, batch = np.arange(240) % 3, np.arange(240) // 3 % 2
    noise = rng.normal(size=(240, 4))
    obs = pd.DataFrame({"label": label.astype(str), "batch": batch.astype(str)}, index=[f"c{i}" for i in range(240)])
    embeddings = {
        "knows_label": noise * 0.1 + np.eye(4)[label] * 5,
        "knows_batch": noise * 0.1 + np.eye(4)[label] * 5 + np.outer(batch, [0, 0, 0, 5]),
        "noise": noise,
    }
    return anndata.AnnData(obs=obs, obsm=embeddings)


def test_perfect_and_random_embeddings(adata: anndata.AnnData):
    """Protects the direction and the range of every column."""
    scores = cw.tl.label_scores(adata, ["knows_label", "noise"], "label")
    assert list(scores.columns) == ["NMI", "ARI", "silhouette", "knn_accuracy", "knn_f1"]
    assert list(scores.index) == ["knows_label", "noise"]
    np.testing.assert_allclose(scores.loc["knows_label"].drop("silhouette"), 1)
    assert scores.loc["knows_label", "silhouette"] > 0.9
    chance = pd.Series({"NMI": 0.05, "ARI": 0.05, "silhouette": 0.05, "knn_accuracy": 0.5, "knn_f1": 0.5})
    assert (scores.loc["noise"] < chance).all()


def test_macro_f1_sees_the_rare_label(adata: anndata.AnnData):
    """Protects the reason for macro F1: a classifier that ignores a rare label keeps its accuracy, not its F1."""
    adata.obs["label"] = np.where(np.arange(240) < 12, "rare", "common")
    scores = cw.tl.label_scores(adata, "noise", "label").loc["noise"]
    assert scores["knn_accuracy"] == pytest.approx(0.95)
    assert scores["knn_f1"] == pytest.approx(0.5, abs=0.02)


def test_scores_are_means_over_seeds(adata: anndata.AnnData):
    """Protects the averaging: several seeds give the mean of single seeds, and a repeated call the same numbers."""
    adata.obs["label"] = pd.Categorical(np.arange(240) % 12)  # enough clusters for KMeans to depend on its seed
    single = [cw.tl.label_scores(adata, "noise", "label", seeds=[seed]) for seed in (3, 4)]
    both = cw.tl.label_scores(adata, "noise", "label", seeds=(3, 4))
    assert (single[0] != single[1])[["NMI", "knn_accuracy"]].all(axis=None)  # clusters and folds are both reseeded
    pd.testing.assert_frame_equal(both, (single[0] + single[1]) / 2)
    pd.testing.assert_frame_equal(both, cw.tl.label_scores(adata, "noise", "label", seeds=(3, 4)))


def test_label_scores_ignore_names_and_containers(adata: anndata.AnnData):
    """Protects invariances: renamed labels, and the embedding as DataFrame or sparse matrix, change nothing."""
    expected = cw.tl.label_scores(adata, "noise", "label").to_numpy()
    adata.obs["renamed"] = adata.obs["label"].map({"0": "z", "1": "y", "2": "x"})
    adata.obsm["frame"] = pd.DataFrame(adata.obsm["noise"], index=adata.obs_names, columns=list("abcd"))
    adata.obsm["sparse"] = sp.csr_matrix(adata.obsm["noise"])
    found = cw.tl.label_scores(adata, ["frame", "sparse"], "renamed").to_numpy()
    np.testing.assert_allclose(found, np.vstack([expected, expected]), atol=1e-6)


def test_label_scores_write_nothing(adata: anndata.AnnData):
    """Protects the user's data."""
    before = adata.copy()
    cw.tl.label_scores(adata, ["knows_label"], "label")
    pd.testing.assert_frame_equal(adata.obs, before.obs)
    assert list(adata.obsm) == list(before.obsm)
    assert not adata.uns


def test_large_data_are_subsampled_for_the_silhouette(adata: anndata.AnnData, monkeypatch: pytest.MonkeyPatch):
    """Protects memory: above the limit the silhouette uses that many cells and stays close to the full value."""
    full = cw.tl.label_scores(adata, "knows_label", "label").loc["knows_label", "silhouette"]
    monkeypatch.setattr(_scores, "MAX_SILHOUETTE_CELLS", 100)
    part = cw.tl.label_scores(adata, "knows_label", "label").loc["knows_label", "silhouette"]
    assert part != full
    assert part == pytest.approx(full, abs=0.01)


BAD_INPUT = [
    (lambda a: None, {"embedding_keys": "X_umap"}, KeyError, r"'X_umap' is not in adata\.obsm; it has \['knows_label'"),
    (lambda a: None, {"embedding_keys": []}, ValueError, "embedding_keys is empty"),
    (lambda a: None, {"label_key": "type"}, KeyError, r"label column 'type' is not in adata\.obs; it has \['label'"),
    (lambda a: a.obs.loc.__setitem__((["c3", "c9"], "label"), None), {}, ValueError, "no label for 2 of 240 cells"),
    (lambda a: a.obs.__setitem__("label", "T"), {}, ValueError, r"has one label only \('T'\)"),
    (lambda a: a.obsm["noise"].__setitem__((5, 2), np.nan), {}, ValueError, "not finite in 1 cells, the first is 'c5'"),
    (lambda a: a.obsm["noise"].__setitem__((5, 2), np.inf), {}, ValueError, "not finite in 1 cells, the first is 'c5'"),
]


@pytest.mark.parametrize(("damage", "arguments", "error", "message"), BAD_INPUT)
@pytest.mark.parametrize("score", ["label_scores", "integration_scores"])
def test_bad_input_is_one_sentence(adata: anndata.AnnData, score: str, damage, arguments, error, message: str):
    """Protects users of both functions from a trace inside a library: the key, the number and the first place."""
    damage(adata)
    arguments = {"embedding_keys": ["noise"], "label_key": "label", **arguments}
    if score == "integration_scores":
        arguments |= {"batch_key": "batch", "pre_integrated_key": "noise"}
    with pytest.raises(error, match=message):
        getattr(cw.tl, score)(adata, **arguments)


def test_rare_labels_and_seeds(adata: anndata.AnnData):
    """Protects the cross-validation: a label that cannot be in every fold is named with its number of cells."""
    adata.obs.loc[["c0", "c1"], "label"] = "rare"
    with pytest.raises(ValueError, match=r"fewer cells than cv=5: \{'rare': 2\}"):
        cw.tl.label_scores(adata, "noise", "label")
    assert len(cw.tl.label_scores(adata, "noise", "label", cv=2)) == 1
    with pytest.raises(ValueError, match="seeds is empty"):
        cw.tl.label_scores(adata, "noise", "label", cv=2, seeds=())


def test_missing_library_is_named(adata: anndata.AnnData, monkeypatch: pytest.MonkeyPatch):
    """Protects users without the extra: the sentence says what to install."""
    monkeypatch.setitem(sys.modules, "scib_metrics", None)
    monkeypatch.delitem(sys.modules, "scib_metrics.benchmark", raising=False)
    with pytest.raises(ImportError, match=r'pip install "cellweave\[eval\]"'):
        cw.tl.integration_scores(adata, ["noise"], "batch", "label", "noise")


def test_one_batch_cannot_be_integrated(adata: anndata.AnnData):
    """Protects against scores of a mixing that cannot exist."""
    adata.obs["batch"] = "b"
    with pytest.raises(ValueError, match=r"adata\.obs\['batch'\] has one batch only"):
        cw.tl.integration_scores(adata, ["noise"], "batch", "label", "noise")


@needs_scib
@pytest.mark.slow
def test_integration_scores_tell_batch_from_label(adata: anndata.AnnData):
    """Protects columns, weights and directions: an embedding without the batch scores higher on mixing."""
    before = adata.copy()
    keys = ["knows_label", "knows_batch"]
    table = cw.tl.integration_scores(adata, keys, "batch", "label", pre_integrated_key="knows_batch")
    assert list(table.index) == keys
    assert list(table.columns[-3:]) == ["bio", "batch", "total"]
    assert table.dtypes.eq(float).all()
    np.testing.assert_allclose(table["total"], 0.6 * table["bio"] + 0.4 * table["batch"])
    assert table.loc["knows_label", "batch"] > table.loc["knows_batch", "batch"] + 0.2
    assert table.loc["knows_label", "bio"] > 0.9
    assert table.loc["knows_batch", "PCR comparison"] == 0
    pd.testing.assert_frame_equal(adata.obs, before.obs)
    assert list(adata.obsm) == list(before.obsm)
