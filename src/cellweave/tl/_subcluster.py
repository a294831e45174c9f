"""Clusters inside one population, in the space where markers mean expression."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import pandas as pd
import scanpy as sc
from anndata import AnnData
from numpy.typing import NDArray

from cellweave._keys import OUTPUT_KEYS

from ._populations import cells_of

__all__ = ["subcluster_population"]

_NAME = "subcluster_population"


def subcluster_population(
    adata: AnnData,
    population: str,
    groupby: str = "scyan_population",
    use_rep: str = "X_scyan",
    markers: Sequence[str] | None = None,
    resolution: float = 0.2,
    min_share: float = 0.02,
    min_cells: int = 50,
    n_neighbors: int = 15,
    key_added: str | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> pd.DataFrame:
    """Find groups of cells inside a population that the marker table does not name.

    Neighbours and Leiden clusters of scanpy :cite:p:`Wolf18`, among the cells of the population only.

    Parameters
    ----------
    adata
        Cells with populations in ``obs`` and a representation in ``obsm``.
    population
        Name of a population, or of a group of a level column ``{groupby}_{level}``.
    groupby
        Column of ``obs`` with the populations.
    use_rep
        Key of ``obsm``; a DataFrame with a column per marker, such as the latent markers of Scyan (-1 negative, 1
        positive), or an array.
    markers
        Columns of the representation to cluster by; all by default. Markers about which the table says nothing for this
        population are the interesting ones.
    resolution
        Resolution of the Leiden algorithm; more gives more clusters.
    min_share, min_cells
        Clusters with a smaller share of the population, or fewer cells, are no clusters: their cells get none.
    n_neighbors
        Neighbours of a cell in the graph.
    key_added
        Column of ``obs`` to write; ``"scyan_subcluster_{population}"`` by default, with ``_`` for ``/``.
    seed
        Seed of the neighbours and of the clustering; the global random state is left alone.
    overwrite
        Replace a column that this function did not write.

    Returns
    -------
    pandas.DataFrame
        A row per cluster and column of the representation: ``cluster``, ``marker``, ``n_cells``, ``mean`` (in the
        cluster) and ``difference`` (to the mean of the other cells of the population, in the units of the
        representation). All columns of the representation are listed, also those that were not used.

        ``adata.obs[key_added]`` has the clusters ``"0"``, ``"1"``, ... from the largest on, missing outside the population
        and in small clusters; ``adata.uns[key_added]`` the returned frame; ``adata.uns["cellweave"][key_added]`` the
        arguments.

    Raises
    ------
    ImportError
        If igraph is not installed.
    KeyError
        If a column or representation is missing.
    ValueError
        If there is no such population, it has fewer than ``min_cells`` cells, a marker is unknown, a value is not finite,
        an argument is out of range, or ``key_added`` holds something else.

    Examples
    --------
    >>> cw.tl.subcluster_population(adata, "NK cells", markers=["CD16", "CD57"])
    """
    if not (resolution > 0 and 0 <= min_share < 1 and min_cells >= 3 and n_neighbors >= 2):
        raise ValueError(
            f"`resolution` must be above 0, `min_share` in [0, 1), `min_cells` at least 3 and `n_neighbors` at least 2, got "
            f"{resolution}, {min_share}, {min_cells} and {n_neighbors}."
        )
    _require_igraph()
    key = f"scyan_subcluster_{population.replace('/', '_')}" if key_added is None else key_added
    _check_key(adata, key, overwrite)
    inside = cells_of(adata, population, groupby, "population")
    if (n_cells := int(inside.sum())) < max(min_cells, n_neighbors + 1):
        raise ValueError(
            f"`population={population!r}` has {n_cells} cell(s), fewer than `min_cells={min_cells}` or "
            f"`n_neighbors={n_neighbors}` allow; choose its group, or lower them."
        )
    values = _representation(adata, use_rep, inside)
    clusters = _clusters(values[_columns(values, markers, use_rep)], resolution, n_neighbors, seed)
    clusters = _without_small(clusters, max(min_share * n_cells, min_cells))
    summary = _summary(values, clusters)
    names = [str(i) for i in range(clusters.max() + 1)]
    codes = np.full(adata.n_obs, -1)
    codes[inside] = clusters
    adata.obs[key] = pd.Categorical.from_codes(codes, names)
    adata.uns[key] = summary
    parameters = {
        "population": population, "groupby": groupby, "use_rep": use_rep, "resolution": resolution, "min_share": min_share,
        "min_cells": min_cells, "n_neighbors": n_neighbors, "seed": seed,
        **({} if markers is None else {"markers": list(markers)}),
    }  # fmt: skip
    record = {"function": _NAME, "version": version("cellweave"), "part": "obs", "parameters": parameters}
    adata.uns[OUTPUT_KEYS.PROVENANCE] = {**adata.uns.get(OUTPUT_KEYS.PROVENANCE, {}), key: record}
    return summary.copy()


def _require_igraph() -> None:
    try:
        importlib.import_module("igraph")
    except ImportError as error:
        raise ImportError(
            'subcluster_population needs igraph, which is not installed: run `pip install "cellweave[cluster]"`.'
        ) from error


def _check_key(adata: AnnData, key: str, overwrite: bool) -> None:
    """Nothing of the user's is replaced."""
    if not isinstance(key, str) or not key:
        raise ValueError(f"`key_added` must be a name, got {key!r}; pass a text that is not empty.")
    record = adata.uns.get(OUTPUT_KEYS.PROVENANCE, {}).get(key, {})
    for part, there in (("obs", key in adata.obs), ("uns", key in adata.uns)):
        if there and not overwrite and record.get("function") != _NAME:
            raise ValueError(
                f"`adata.{part}[{key!r}]` already exists and was not written by {_NAME}; choose another `key_added` or pass "
                "`overwrite=True`."
            )


def _representation(adata: AnnData, use_rep: str, inside: NDArray[np.bool_]) -> pd.DataFrame:
    """The representation of the cells of the population as a frame; columns of an array are numbered."""
    if use_rep not in adata.obsm:
        raise KeyError(f"`use_rep={use_rep!r}` is not in `adata.obsm`; it has {list(adata.obsm)}.")
    stored: Any = adata.obsm[use_rep]
    names = stored.columns.astype(str) if isinstance(stored, pd.DataFrame) else None
    array = np.asarray(stored[inside], dtype=np.float32)
    array = array.reshape(len(array), -1)
    if not np.isfinite(array).all():
        bad = ~np.isfinite(array).all(axis=1)
        first = adata.obs_names[np.flatnonzero(inside)[np.argmax(bad)]]
        raise ValueError(
            f"`adata.obsm[{use_rep!r}]` is NaN or infinite in {int(bad.sum())} cell(s) of the population (first: "
            f"{first!r}); compute it for all of them."
        )
    return pd.DataFrame(
        array, columns=names if names is not None else [f"{use_rep}_{j}" for j in range(array.shape[1])]
    )


def _columns(values: pd.DataFrame, markers: Sequence[str] | None, use_rep: str) -> list[str]:
    if markers is None:
        return list(values.columns)
    unknown = [marker for marker in markers if marker not in values]
    if unknown or not len(markers) or isinstance(markers, str):
        raise ValueError(
            f"`markers` must be a list of columns of `adata.obsm[{use_rep!r}]`, got {markers!r}; there are "
            f"{list(values.columns)}."
        )
    return list(markers)


def _clusters(values: pd.DataFrame, resolution: float, n_neighbors: int, seed: int) -> NDArray[np.intp]:
    """Leiden clusters, numbered from the largest on ``(cell of the population,)``."""
    slim = AnnData(values.to_numpy())
    sc.pp.neighbors(slim, n_neighbors=n_neighbors, use_rep="X", random_state=seed)
    sc.tl.leiden(slim, resolution=resolution, random_state=seed, flavor="igraph", n_iterations=2, directed=False)
    return slim.obs["leiden"].astype(int).to_numpy()


def _without_small(clusters: NDArray[np.intp], at_least: float) -> NDArray[np.intp]:
    """Clusters with enough cells, numbered from the largest on; -1 for the others."""
    names, n_cells = np.unique(clusters, return_counts=True)
    order = names[np.argsort(-n_cells, kind="stable")]
    number = {name: i for i, name in enumerate(order[np.sort(-n_cells) <= -at_least])}
    return np.array([number.get(name, -1) for name in clusters], dtype=np.intp)


def _summary(values: pd.DataFrame, clusters: NDArray[np.intp]) -> pd.DataFrame:
    parts = []
    for cluster in range(clusters.max() + 1):
        cells = clusters == cluster
        mean = values[cells].mean()
        parts.append(
            pd.DataFrame(
                {
                    "cluster": str(cluster),
                    "marker": values.columns.astype(str),
                    "n_cells": int(cells.sum()),
                    "mean": mean.to_numpy(),
                    # one cluster that holds all cells has no others
                    "difference": (mean - values[~cells].mean()).to_numpy(),
                }
            )
        )
    columns = ["cluster", "marker", "n_cells", "mean", "difference"]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)
