"""What figures of populations read from an AnnData, checked, and the densities and colours that they share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import pandas as pd
from anndata import AnnData
from matplotlib.colors import hsv_to_rgb
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d
from scipy.stats import ks_2samp

from cellweave._keys import OUTPUT_KEYS

# Cells that a distance between two groups looks at; more do not change which markers differ most.
_MAX_COMPARED = 5000
_GRID_POINTS = 200
_HUE_START = 0.58  # blue: the first group of most tables is the largest, and red would shout


@runtime_checkable
class HasFrame(Protocol):
    """A :class:`cellweave.io.MarkerTable`."""

    def to_frame(self) -> pd.DataFrame: ...


class Hierarchy(NamedTuple):
    """Populations and the groups they belong to."""

    leaves: list[str]  # in table order
    levels: dict[str, list[str]]  # level -> group of every leaf, fine to coarse

    def paths(self) -> list[tuple[str, ...]]:
        """Names from the coarsest group down to each leaf; a leaf that is its own group stands there once."""
        columns = [*reversed(self.levels.values()), self.leaves]
        return [tuple(dict.fromkeys(names)) for names in zip(*columns, strict=True)]


def read_hierarchy(source: AnnData | HasFrame | pd.DataFrame, groupby: str = "scyan_population") -> Hierarchy:
    """Populations of a table, of its frame, or of the table with which ``adata.obs[groupby]`` was predicted."""
    if isinstance(source, AnnData):
        stored = source.uns.get(OUTPUT_KEYS.PROVENANCE, {}).get(groupby, {}).get("parameters", {}).get("table")
        if stored is None:
            raise KeyError(
                f"`adata.uns['{OUTPUT_KEYS.PROVENANCE}']` has no table for `groupby={groupby!r}`; predict with "
                f"`key_added={groupby!r}` first, or pass the table."
            )
        table: dict[str, Any] = json.loads(stored)
        return Hierarchy(list(table["populations"]), {k: list(v) for k, v in table.get("levels", {}).items()})
    frame = source if isinstance(source, pd.DataFrame) else source.to_frame() if isinstance(source, HasFrame) else None
    if frame is None or not len(frame):
        raise ValueError(
            f"`table` must be a MarkerTable, its frame or an AnnData, got {type(source).__name__}; read a file with "
            "`cellweave.io.MarkerTable.parse`."
        )
    columns = [[str(name) for name in frame.index.get_level_values(i)] for i in range(frame.index.nlevels)]
    names = [str(name) for name in frame.index.names]
    return Hierarchy(columns[0], dict(zip(names[1:], columns[1:], strict=True)))


def read_populations(adata: AnnData, groupby: str) -> pd.Series:
    """Categorical populations of the cells, NaN for cells without."""
    if groupby not in adata.obs:
        raise KeyError(f"`groupby={groupby!r}` is not a column of `adata.obs`; predict populations first.")
    populations = adata.obs[groupby].astype("category").cat.remove_unused_categories()
    if not len(populations.cat.categories):
        raise ValueError(f"No cell has a population in `adata.obs[{groupby!r}]`; predict with a lower threshold.")
    return populations


def read_latent(adata: AnnData, obsm: str) -> pd.DataFrame:
    """Latent markers ``(cell, marker)`` with their names."""
    if obsm not in adata.obsm:
        raise KeyError(
            f"`obsm={obsm!r}` is not in `adata.obsm`; store `model.get_latent_representation()` there first."
        )
    latent = adata.obsm[obsm]
    if not isinstance(latent, pd.DataFrame):
        raise ValueError(f"`adata.obsm[{obsm!r}]` must be a frame with marker names, got {type(latent).__name__}.")
    return latent


def check_names(name: str, wanted: Sequence[str], known: Sequence[str], where: str) -> list[str]:
    """The wanted names, all of which must be known."""
    missing = [value for value in wanted if value not in set(known)]
    if missing:
        raise ValueError(
            f"`{name}` names {len(missing)} that are not {where} (first: {missing[0]!r}); choose among {list(known)[:8]}."
        )
    return list(wanted)


def distance(first: NDArray, second: NDArray) -> float:
    """Kolmogorov-Smirnov statistic of two groups of values; 0 where one has none."""
    rng = np.random.default_rng(0)
    groups = [values[np.isfinite(values)] for values in (first, second)]
    groups = [rng.choice(v, _MAX_COMPARED, replace=False) if len(v) > _MAX_COMPARED else v for v in groups]
    return float(ks_2samp(*groups, method="asymp").statistic) if all(len(values) for values in groups) else 0.0


def density(values: NDArray, limits: tuple[float, float]) -> tuple[NDArray, NDArray]:
    """Grid and smoothed density of all finite values within the limits, with Silverman's bandwidth."""
    values = values[np.isfinite(values)]
    counts, edges = np.histogram(values, _GRID_POINTS, limits)
    step = edges[1] - edges[0]
    quartiles = np.subtract(*np.percentile(values, [75, 25])) / 1.349 if len(values) else 0.0
    spread = min(filter(None, (values.std(), quartiles)), default=step) if len(values) else step
    width = max(0.9 * spread * max(len(values), 1) ** -0.2, step)
    smooth = gaussian_filter1d(counts.astype(float), width / step, mode="constant")
    return (edges[:-1] + edges[1:]) / 2, smooth / max(len(values) * step, np.finfo(float).tiny)


def limits(*values: NDArray) -> tuple[float, float]:
    """Range of nearly all values, with a margin."""
    finite = np.concatenate([v[np.isfinite(v)] for v in values])
    if not len(finite):
        return -1.0, 1.0
    low, high = np.percentile(finite, [0.2, 99.8])
    margin = 0.08 * (high - low) or 1.0
    return float(low - margin), float(high + margin)


def hues(hierarchy: Hierarchy) -> dict[str, tuple[float, float, float]]:
    """Colour of every leaf and group: a hue per coarsest group, a step of lightness per leaf in it."""
    paths = hierarchy.paths()
    parents = list(dict.fromkeys(path[0] for path in paths))
    colors: dict[str, tuple[float, float, float]] = {}
    for i, parent in enumerate(parents):
        hue = (_HUE_START + i / len(parents)) % 1.0
        children = [path for path in paths if path[0] == parent]
        colors[parent] = _rgb(hue, 0.75, 0.75)
        for k, path in enumerate(children if len(children) > 1 else []):
            share = k / (len(children) - 1)
            colors[path[-1]] = _rgb(hue + 0.35 * (share - 0.5) / len(parents), 0.95 - 0.6 * share, 0.55 + 0.4 * share)
        colors.setdefault(children[0][-1], colors[parent])  # the only member of a group has its colour
        for path in children:  # groups between take the colour of their first leaf
            for name in path[1:-1]:
                colors.setdefault(name, colors[path[-1]])
    return colors


def _rgb(hue: float, saturation: float, value: float) -> tuple[float, float, float]:
    red, green, blue = hsv_to_rgb((hue % 1.0, saturation, value))
    return float(red), float(green), float(blue)
