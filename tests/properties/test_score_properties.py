"""Properties of scores of an embedding."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from hypothesis import given, settings
from hypothesis import strategies as st

from cellweave.tl import label_scores

OPTIONS = {"n_neighbors": 3, "seeds": (0,), "cv": 2}
SEEDS = st.integers(0, 2**31)


def _adata(labels, embedding) -> AnnData:
    obs = pd.DataFrame({"label": [f"t{i}" for i in labels]}, index=[f"c{i}" for i in range(len(labels))])
    return AnnData(obs=obs, obsm={"X": np.asarray(embedding, dtype=np.float32)})


def _labels(n_labels: int, n_each: int, rng) -> np.ndarray:
    return rng.permutation(np.repeat(np.arange(n_labels), n_each))


@given(st.integers(2, 4), st.integers(4, 8), SEEDS, st.data())
def test_names_of_labels_do_not_matter(n_labels, n_each, seed, data):
    """Protects comparisons: renaming the cell types changes no score."""
    rng = np.random.default_rng(seed)
    labels = _labels(n_labels, n_each, rng)
    embedding = rng.normal(size=(len(labels), 3)) + labels[:, None]
    names = np.array(data.draw(st.permutations(range(n_labels))))
    first, second = (
        label_scores(_adata(codes, embedding), "X", "label", **OPTIONS) for codes in (labels, names[labels])
    )
    pd.testing.assert_frame_equal(first, second)


@given(st.integers(2, 4), st.integers(4, 8), SEEDS)
def test_a_perfect_embedding_has_perfect_scores(n_labels, n_each, seed):
    """Protects the scale of the scores: far apart types score one, and no score leaves its range."""
    rng = np.random.default_rng(seed)
    labels = _labels(n_labels, n_each, rng)
    scores = label_scores(_adata(labels, 1000 * np.eye(n_labels)[labels]), "X", "label", **OPTIONS).loc["X"]
    np.testing.assert_allclose(scores, 1)
    noise = label_scores(_adata(labels, rng.normal(size=(len(labels), 2))), "X", "label", **OPTIONS).loc["X"]
    assert noise.max() <= 1
    assert noise[["NMI", "knn_accuracy", "knn_f1"]].min() >= 0
    assert noise[["ARI", "silhouette"]].min() >= -1


@settings(max_examples=10)
@given(st.integers(2, 4), st.integers(4, 8), SEEDS, st.floats(0.1, 10), st.floats(-5, 5))
def test_units_and_place_of_an_embedding_do_not_matter(n_labels, n_each, seed, scale, shift):
    """Protects comparisons of methods: moving or rescaling an embedding changes no score."""
    rng = np.random.default_rng(seed)
    labels = _labels(n_labels, n_each, rng)
    embedding = 3 * np.eye(n_labels)[labels] + 0.1 * rng.normal(size=(len(labels), n_labels))
    first, second = (
        label_scores(_adata(labels, values), "X", "label", **OPTIONS).loc["X"]
        for values in (embedding, scale * embedding + shift)
    )
    assert first.to_numpy() == pytest.approx(second.to_numpy(), abs=1e-3)
