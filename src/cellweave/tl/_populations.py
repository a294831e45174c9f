"""Cells of a population or group, as a model has written them into ``obs``."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cellweave._keys import OUTPUT_KEYS
from cellweave._types import AnnOrMuData
from cellweave.io import MarkerTable

__all__ = ["cells_of", "obs_column", "stored_table"]


def obs_column(adata: AnnOrMuData, key: str, argument: str) -> pd.Series:
    """A column of ``obs``.

    Raises
    ------
    KeyError
        If there is no such column.
    """
    if key not in adata.obs:
        raise KeyError(f"`{argument}={key!r}` is not in `adata.obs`; it has {list(adata.obs.columns)}.")
    return adata.obs[key]


def cells_of(adata: AnnOrMuData, name: str, groupby: str, argument: str) -> NDArray[np.bool_]:
    """Which cells belong to a population, or to a group of one of the level columns ``{groupby}_{level}``, ``(cell,)``.

    Raises
    ------
    KeyError
        If there is no column ``groupby``.
    ValueError
        If no column has the name.
    """
    known: list[str] = []
    for column in _label_columns(adata, groupby):
        names = [str(value) for value in column.cat.categories]
        if name in names:
            return (column.cat.codes == names.index(name)).to_numpy()
        known += names
    raise ValueError(
        f"`{argument}={name!r}` is no population or group of `adata.obs[{groupby!r}]` and its level columns; they have "
        f"{list(dict.fromkeys(known))}."
    )


def _label_columns(adata: AnnOrMuData, groupby: str) -> Iterator[pd.Series]:
    """The labels, then the levels beside them, as categories."""
    yield obs_column(adata, groupby, "groupby").astype("category")
    for key in adata.obs.columns:
        if str(key).startswith(f"{groupby}_") and not pd.api.types.is_numeric_dtype(adata.obs[key]):
            yield adata.obs[key].astype("category")


def stored_table(adata: AnnOrMuData, key: str) -> MarkerTable | None:
    """The marker table with which the labels ``obs[key]`` were made; None where no model has recorded one."""
    record = adata.uns.get(OUTPUT_KEYS.PROVENANCE, {}).get(key, {})
    text = record.get("parameters", {}).get("table")
    return None if text is None else MarkerTable.parse(json.loads(text))
