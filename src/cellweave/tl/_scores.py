"""How well an embedding separates labels and mixes batches."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import anndata
import numpy as np
import pandas as pd
from sklearn.cluster import KMeans
from sklearn.metrics import (
    accuracy_score,
    adjusted_rand_score,
    f1_score,
    normalized_mutual_info_score,
    silhouette_score,
)
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier

if TYPE_CHECKING:
    from anndata import AnnData
    from numpy.typing import NDArray

__all__ = ["integration_scores", "label_scores"]

# The silhouette compares all pairs of cells; more cells than this are subsampled.
MAX_SILHOUETTE_CELLS = 10_000
_AGGREGATES = {"Bio conservation": "bio", "Batch correction": "batch", "Total": "total"}


def label_scores(
    adata: AnnData,
    embedding_keys: str | Sequence[str],
    label_key: str,
    n_neighbors: int = 15,
    seeds: Sequence[int] = (0, 1, 2),
    cv: int = 5,
) -> pd.DataFrame:
    """Score embeddings by how well they separate labelled cells, with scikit-learn only.

    Parameters
    ----------
    adata
        Cells with embeddings in ``obsm`` and labels in ``obs``; nothing is written into it.
    embedding_keys
        Keys of ``obsm``.
    label_key
        Column of ``obs`` without missing values and with at least two labels of at least ``cv`` cells each.
    n_neighbors
        Neighbours of the classifier.
    seeds
        Seeds of KMeans and of the folds; every score is the mean over them.
    cv
        Folds of the stratified cross-validation.

    Returns
    -------
    pandas.DataFrame
        One row per embedding. ``NMI`` and ``ARI``: agreement of the labels with KMeans, k = number of labels (0 no
        agreement, 1 perfect). ``silhouette``: mean Euclidean silhouette of the labels, in [-1, 1]; on a random subset
        per seed if there are more than 10 000 cells. ``knn_accuracy`` and ``knn_f1``: accuracy and macro F1 of a nearest
        neighbour classifier on held-out folds.

    Raises
    ------
    KeyError
        A key is missing in ``obsm`` or ``obs``.
    ValueError
        Labels are missing, too few or too rare; an embedding has values that are not finite.

    Notes
    -----
    Held-out folds are drawn from all cells. An embedding that was fitted with labels, or a batch that occurs in both
    parts, makes the classifier look better than it is on new data.

    Examples
    --------
    >>> cw.tl.label_scores(adata, ["X_pca", "X_stack"], "cell_type")
    """
    keys = _as_list(embedding_keys)
    labels = _categories(adata, label_key, "label")
    _require_cells_per_label(labels, label_key, cv)
    codes = pd.factorize(labels)[0]  # by first appearance: ties between neighbours must not depend on the names
    if not len(seeds):
        raise ValueError("seeds is empty; pass at least one seed.")
    rows = {}
    for key in keys:
        embedding = _embedding(adata, key)
        per_seed = [_scores_of_seed(embedding, codes, n_neighbors, seed, cv) for seed in seeds]
        rows[key] = pd.DataFrame(per_seed).mean()
    return pd.DataFrame(rows).T.rename_axis("embedding")


def integration_scores(
    adata: AnnData,
    embedding_keys: str | Sequence[str],
    batch_key: str,
    label_key: str,
    pre_integrated_key: str = "X_pca",
    n_jobs: int = 1,
) -> pd.DataFrame:
    """Score embeddings by how well they mix batches and keep labels, with the default metrics of scib-metrics.

    The numbers are raw: without min-max scaling the score of one embedding does not depend on the others.

    Parameters
    ----------
    adata
        Cells with embeddings in ``obsm`` and annotations in ``obs``; nothing is written into it.
    embedding_keys
        Keys of ``obsm`` to score.
    batch_key
        Column of ``obs`` with at least two batches.
    label_key
        Column of ``obs`` with at least two labels.
    pre_integrated_key
        Key of ``obsm`` with the embedding before integration, usually principal components; the principal component
        regression measures how much less the batch explains than there.
    n_jobs
        Processes for the nearest neighbours.

    Returns
    -------
    pandas.DataFrame
        One row per embedding, one column per metric under its name in scib-metrics, then ``bio`` and ``batch``, their
        plain means, and ``total`` = 0.6 bio + 0.4 batch.

    Raises
    ------
    ImportError
        scib-metrics is not installed.
    KeyError
        A key is missing in ``obsm`` or ``obs``.
    ValueError
        Annotations are missing or have one value only; an embedding has values that are not finite.

    Notes
    -----
    scib-metrics compiles its kernels for every new number of dimensions. Releases differ in their metrics: report the
    version beside the numbers.

    Examples
    --------
    >>> cw.tl.integration_scores(adata, ["X_pca", "X_stack"], "batch", "cell_type")
    """
    keys = _as_list(embedding_keys)
    slim = anndata.AnnData(
        obs=_annotations(adata, {"batch": batch_key, "label": label_key}),
        obsm={key: _embedding(adata, key) for key in dict.fromkeys([*keys, pre_integrated_key])},
    )
    options = {"pre_integrated_embedding_obsm_key": pre_integrated_key, "n_jobs": n_jobs, "progress_bar": False}
    benchmark = _scib_benchmark().Benchmarker(slim, "batch", "label", keys, **options)
    benchmark.benchmark()
    table = benchmark.get_results(min_max_scale=False).loc[keys].astype(float)
    table = table[[column for column in table if column not in _AGGREGATES] + list(_AGGREGATES)]
    return table.rename(columns=_AGGREGATES).rename_axis(index="embedding", columns=None)


def _annotations(adata: AnnData, columns: dict[str, str]) -> pd.DataFrame:
    """Checked categorical columns of ``obs`` under new names: role -> column."""
    checked = {role: pd.Categorical(_categories(adata, key, role)) for role, key in columns.items()}
    return pd.DataFrame(checked, index=adata.obs_names)


def _scib_benchmark() -> ModuleType:
    """The optional library, or how to get it."""
    try:
        return importlib.import_module("scib_metrics.benchmark")
    except ImportError as error:
        raise ImportError(
            'integration_scores needs scib-metrics, which is not installed: run `pip install "cellweave[eval]"`.'
        ) from error


def _scores_of_seed(
    embedding: NDArray[np.float32], labels: NDArray[np.intp], n_neighbors: int, seed: int, cv: int
) -> dict[str, float]:
    clusters = KMeans(len(np.unique(labels)), n_init=10, random_state=seed).fit_predict(embedding)
    folds = StratifiedKFold(cv, shuffle=True, random_state=seed)
    predicted = cross_val_predict(KNeighborsClassifier(n_neighbors), embedding, labels, cv=folds)
    subset = MAX_SILHOUETTE_CELLS if len(labels) > MAX_SILHOUETTE_CELLS else None
    return {
        "NMI": normalized_mutual_info_score(labels, clusters),
        "ARI": adjusted_rand_score(labels, clusters),
        "silhouette": silhouette_score(embedding, labels, sample_size=subset, random_state=seed),
        "knn_accuracy": accuracy_score(labels, predicted),
        "knn_f1": f1_score(labels, predicted, average="macro"),
    }


def _as_list(keys: str | Sequence[str]) -> list[str]:
    found = [keys] if isinstance(keys, str) else list(dict.fromkeys(keys))
    if not found:
        raise ValueError("embedding_keys is empty; name at least one key of adata.obsm.")
    return found


def _categories(adata: AnnData, key: str, role: str) -> NDArray[np.str_]:
    """One column of ``obs`` as strings, checked."""
    if key not in adata.obs:
        raise KeyError(f"The {role} column '{key}' is not in adata.obs; it has {list(adata.obs.columns)}.")
    column = adata.obs[key]
    if n_missing := int(column.isna().sum()):
        raise ValueError(f"adata.obs['{key}'] has no {role} for {n_missing} of {len(column)} cells; drop these cells.")
    values = column.astype(str).to_numpy(dtype=str)
    if len(np.unique(values)) < 2:
        raise ValueError(f"adata.obs['{key}'] has one {role} only ('{values[0]}'); scores need at least two.")
    return values


def _require_cells_per_label(labels: NDArray[np.str_], key: str, cv: int) -> None:
    names, n_cells = np.unique(labels, return_counts=True)
    rare = {str(name): int(n) for name, n in zip(names, n_cells, strict=True) if n < cv}
    if rare:
        raise ValueError(f"Labels in adata.obs['{key}'] have fewer cells than cv={cv}: {rare}; drop them or lower cv.")


def _embedding(adata: AnnData, key: str) -> NDArray[np.float32]:
    """One embedding as a finite, dense, two-dimensional float32 array."""
    if key not in adata.obsm:
        raise KeyError(f"The embedding '{key}' is not in adata.obsm; it has {list(adata.obsm)}.")
    stored = adata.obsm[key]
    values = np.asarray(stored.toarray() if hasattr(stored, "toarray") else stored, dtype=np.float32)
    bad = ~np.isfinite(values.reshape(len(values), -1)).all(axis=1)
    if bad.any():
        first = adata.obs_names[np.flatnonzero(bad)[0]]
        raise ValueError(f"adata.obsm['{key}'] is not finite in {bad.sum()} cells, the first is '{first}'.")
    return values.reshape(len(values), -1)
