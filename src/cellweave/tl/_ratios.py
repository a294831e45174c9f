"""How frequent populations are in samples, with intervals."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from cellweave._types import AnnOrMuData

from ._populations import cells_of, obs_column, stored_table

__all__ = ["population_ratios"]


def population_ratios(
    adata: AnnOrMuData,
    sample_key: str,
    groupby: str = "scyan_population",
    among: str | None = None,
    ci: float = 0.95,
) -> pd.DataFrame:
    """Share of every population in every sample, with Wilson score intervals.

    The intervals hold the uncertainty of counting a finite number of cells. Samples of one condition differ by more than
    that; compare conditions with the samples as replicates.

    Parameters
    ----------
    adata
        Cells with populations and samples in ``obs``; nothing is written into it.
    sample_key
        Column of ``obs`` with the samples.
    groupby
        Column of ``obs`` with the populations, missing where a cell was rejected. A level column counts groups.
    among
        Group of a level column ``{groupby}_{level}``: shares are among its cells, and of its populations. All cells of a
        sample by default, the rejected ones included.
    ci
        Coverage of the intervals.

    Returns
    -------
    pandas.DataFrame
        A row per sample and population, also where the count is zero: ``sample``, ``population``, ``count`` (cells),
        ``total`` (cells of the sample, or of ``among`` in it), ``ratio``, ``ci_low`` and ``ci_high`` (shares in [0, 1],
        NaN where ``total`` is zero).

    Raises
    ------
    KeyError
        If a column is missing.
    ValueError
        If a sample is missing for some cells, ``among`` is no population or group, or ``ci`` is out of range.

    Examples
    --------
    >>> cw.tl.population_ratios(adata, "sample", among="T cells")
    """
    if not 0 < ci < 1:
        raise ValueError(f"`ci` must be between 0 and 1, got {ci}; 0.95 is usual.")
    samples = obs_column(adata, sample_key, "sample_key").astype("category")
    if n_missing := int(samples.isna().sum()):
        raise ValueError(
            f"`adata.obs[{sample_key!r}]` is missing in {n_missing} cell(s); fill in or remove these cells."
        )
    labels = obs_column(adata, groupby, "groupby").astype("category")
    chosen = np.ones(adata.n_obs, dtype=bool) if among is None else cells_of(adata, among, groupby, "among")
    samples = samples.cat.remove_unused_categories()
    totals = samples[chosen].value_counts()
    counts = pd.crosstab(labels[chosen], samples[chosen], dropna=False)
    rows = []
    for sample in samples.cat.categories:
        for population in _populations(adata, groupby, among, labels, chosen):
            count = int(counts.at[population, sample]) if population in counts.index and sample in counts else 0
            rows.append({"sample": sample, "population": population, **_share(count, int(totals[sample]), ci)})
    return pd.DataFrame(rows, columns=["sample", "population", "count", "total", "ratio", "ci_low", "ci_high"])


def _populations(
    adata: AnnOrMuData, groupby: str, among: str | None, labels: pd.Series, chosen: np.ndarray
) -> list[object]:
    """Populations to count: all, or those of a group, also the ones that no cell belongs to where the table is stored."""
    everyone = list(labels.cat.categories)
    if among is None:
        return everyone
    table = stored_table(adata, groupby)
    if table is not None:
        members = {name for name, inside in zip(table.populations, table.members_of(among), strict=True) if inside}
    else:
        members = set(labels[chosen].dropna())
    return [name for name in everyone if name in members]


def _share(count: int, total: int, ci: float) -> dict[str, float]:
    if total == 0:
        return {"count": count, "total": total, "ratio": np.nan, "ci_low": np.nan, "ci_high": np.nan}
    interval = binomtest(count, total).proportion_ci(ci, method="wilson")
    return {"count": count, "total": total, "ratio": count / total, "ci_low": interval.low, "ci_high": interval.high}
