"""How well labels from a marker table agree with those of an expert, beside two baselines without a flow."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.metrics import (
    accuracy_score,
    adjusted_rand_score,
    f1_score,
    precision_recall_fscore_support,
    recall_score,
)

from cellweave._types import AnnOrMuData
from cellweave.io import MarkerTable

from ._baselines import gaussian_mixture, marker_expression, prior_only
from ._populations import obs_column

__all__ = ["evaluate_annotation"]

Codes = NDArray[np.intp]  # position of the population of each cell, -1 for none
PRIOR_ONLY, MIXTURE = "prior only", "Gaussian mixture"


def evaluate_annotation(
    adata: AnnOrMuData,
    labels_key: str,
    prediction_keys: str | Sequence[str] = ("scyan_population",),
    table: pd.DataFrame | str | os.PathLike | Mapping[str, Any] | MarkerTable | None = None,
    layer: str | None = None,
    sample_key: str | None = None,
    label_map: Mapping[str, str] | None = None,
    level: str | None = None,
    per_population: bool = False,
    prior_std: float = 0.3,
    seed: int = 0,
) -> pd.DataFrame:
    """Compare predicted populations with known labels, and with what the marker table achieves without a model.

    With ``table`` two baselines stand beside the predictions. They need the scaled expression that the model was given:

    - ``"prior only"``: the population with the highest density of the prior of Scyan (Blampey et al., 2023) at the
      measured values, all populations being equally frequent; the ``Baseline`` of the original;
    - ``"Gaussian mixture"``: a mixture of diagonal Gaussians fitted to all cells by EM, started at the same prior;
      unknown entries start at the mean of the marker, and no component gets narrower than the prior.

    Cells whose label is missing or no population are left out of all numbers and counted. A rejected cell, which has no
    prediction, counts as wrong.

    Parameters
    ----------
    adata
        Cells with labels and predictions in ``obs``; nothing is written into it. With ``table`` an AnnData, otherwise a
        MuData will do.
    labels_key
        Column of ``obs`` with the known labels.
    prediction_keys
        Columns of ``obs`` with predicted populations, missing where a cell was rejected; may be empty with ``table``.
    table
        Marker table, for the baselines and the names of the populations; anything that
        :meth:`cellweave.io.MarkerTable.parse` reads. Without it the populations are the categories of the predictions.
    layer
        Layer with the scaled expression for the baselines; ``adata.X`` by default.
    sample_key
        Column of ``obs``; every sample gets rows of its own.
    label_map
        Known label -> population, for labels that are written in another way.
    level
        Level of the hierarchy of ``table`` to compare at: labels and predictions that name a population count as its
        group.
    per_population
        Return a row per population instead.
    prior_std
        Standard deviation of the prior of the baselines, in units of the scaled expression.
    seed
        Seed of the Gaussian mixture.

    Returns
    -------
    pandas.DataFrame
        A row per method, or per method and sample. ``accuracy``, ``macro_f1`` and ``balanced_accuracy`` (means over the
        populations that occur among the labels), ``ari`` (rejected cells are one cluster), ``rejected`` (share of cells
        without prediction), ``n_cells`` (scored) and ``n_left_out``.

        With ``per_population`` a row per method, sample and population: ``f1``, ``precision``, ``recall`` and ``support``
        (number of labelled cells). Precision is 0 where a population was never predicted, recall where no cell has its
        label.

    Raises
    ------
    KeyError
        If a column or layer is missing.
    ValueError
        If there is nothing to compare, no label is a population, a prediction or a value of ``label_map`` is none, or the
        expression lacks markers or has values that are not finite.

    Examples
    --------
    >>> cw.tl.evaluate_annotation(adata, "cell_type", table="table.csv", layer="scaled")
    """
    parsed = None if table is None else MarkerTable.parse(table)
    keys = [prediction_keys] if isinstance(prediction_keys, str) else list(dict.fromkeys(prediction_keys))
    columns = {key: obs_column(adata, key, "prediction_keys") for key in keys}
    names = _canonical_names(parsed, level, columns)
    populations = list(dict.fromkeys(names.values()))
    truth = _truth(adata, labels_key, label_map or {}, names, populations)
    samples = _samples(adata, sample_key)
    predicted = {key: _predictions(column, names, populations, key) for key, column in columns.items()}
    if parsed is not None:
        x = marker_expression(adata, parsed, layer)
        to_code = np.array([populations.index(names[name]) for name in parsed.populations])
        predicted[PRIOR_ONLY] = to_code[prior_only(x, parsed, prior_std)]
        predicted[MIXTURE] = to_code[gaussian_mixture(x, parsed, prior_std, seed)]
    rows = [
        {"method": method, **({"sample": sample} if sample_key is not None else {}), **row}
        for method, codes in predicted.items()
        for sample, cells in samples.items()
        for row in (_per_population if per_population else _overall)(truth[cells], codes[cells], populations)
    ]
    index = ["method", *(["sample"] if sample_key is not None else []), *(["population"] if per_population else [])]
    return pd.DataFrame(rows).set_index(index[0] if len(index) == 1 else index)


# ---------------------------------------------------------------------------------------------------------- names


def _canonical_names(table: MarkerTable | None, level: str | None, columns: Mapping[str, pd.Series]) -> dict[str, str]:
    """Every name that may occur -> the name that it counts as."""
    if table is None:
        if level is not None:
            raise ValueError(f"`level={level!r}` has no meaning without `table`; pass the marker table.")
        if not columns:
            raise ValueError(
                "`prediction_keys` is empty and there is no `table`; name a column or pass the marker table."
            )
        names = [str(name) for column in columns.values() for name in column.astype("category").cat.categories]
        return {name: name for name in names}
    if level is None:
        return {name: name for name in table.populations}
    groups, _ = table.groups(level)
    return {**dict(zip(table.populations, table.levels[level], strict=True)), **{group: group for group in groups}}


def _truth(
    adata: AnnOrMuData,
    labels_key: str,
    label_map: Mapping[str, str],
    names: Mapping[str, str],
    populations: Sequence[str],
) -> Codes:
    if unknown := [name for name in label_map.values() if name not in names]:
        raise ValueError(
            f"`label_map` leads to {len(unknown)} name(s) that are no population (first: {unknown[0]!r}); there are "
            f"{list(populations)}."
        )
    labels = obs_column(adata, labels_key, "labels_key").astype("category")
    codes = _codes(labels, {**names, **{label: names[name] for label, name in label_map.items()}}, populations)
    if (codes < 0).all():
        raise ValueError(
            f"`adata.obs[{labels_key!r}]` has no label that is a population (labels: "
            f"{[str(name) for name in labels.cat.categories[:5]]}, populations: {list(populations[:5])}); translate them "
            "with `label_map`."
        )
    return codes


def _predictions(column: pd.Series, names: Mapping[str, str], populations: Sequence[str], key: str) -> Codes:
    labels = column.astype("category")
    unknown = [str(name) for name in labels.cat.categories if str(name) not in names]
    if unknown:
        raise ValueError(
            f"`adata.obs[{key!r}]` predicts {len(unknown)} name(s) that are no population of `table` (first: "
            f"{unknown[0]!r}); use NaN for rejected cells, and `level` for groups."
        )
    return _codes(labels, names, populations)


def _codes(labels: pd.Series, names: Mapping[str, str], populations: Sequence[str]) -> Codes:
    """Position of the population of each cell; -1 for missing and unknown names."""
    position = {name: i for i, name in enumerate(populations)}
    of_category = [position[names[str(name)]] if str(name) in names else -1 for name in labels.cat.categories]
    return np.array([*of_category, -1], dtype=np.intp)[labels.cat.codes.to_numpy()]


def _samples(adata: AnnOrMuData, sample_key: str | None) -> dict[str, NDArray[np.bool_]]:
    if sample_key is None:
        return {"all": np.ones(adata.n_obs, dtype=bool)}
    column = obs_column(adata, sample_key, "sample_key")
    if n_missing := int(column.isna().sum()):
        raise ValueError(
            f"`adata.obs[{sample_key!r}]` is missing in {n_missing} cell(s); fill in or remove these cells."
        )
    codes, samples = pd.factorize(column, sort=True)
    return {str(sample): codes == i for i, sample in enumerate(samples)}


# ---------------------------------------------------------------------------------------------------------- scores


def _overall(truth: Codes, codes: Codes, populations: Sequence[str]) -> Iterator[dict[str, float]]:
    scored = truth >= 0
    n_left_out = int((~scored).sum())
    truth, codes = truth[scored], codes[scored]
    # rejected cells would otherwise be a class of their own with an F1 of 0
    present = np.unique(truth)
    macro = {"labels": present, "average": "macro", "zero_division": 0}
    some = len(truth) > 0
    yield {
        "accuracy": accuracy_score(truth, codes) if some else np.nan,
        "macro_f1": f1_score(truth, codes, **macro) if some else np.nan,
        "balanced_accuracy": recall_score(truth, codes, **macro) if some else np.nan,
        "ari": adjusted_rand_score(truth, codes) if some else np.nan,
        "rejected": float((codes < 0).mean()) if some else np.nan,
        "n_cells": len(truth),
        "n_left_out": n_left_out,
    }


def _per_population(truth: Codes, codes: Codes, populations: Sequence[str]) -> Iterator[dict[str, Any]]:
    scored = truth >= 0
    labels = np.arange(len(populations))
    scores = (
        precision_recall_fscore_support(truth[scored], codes[scored], labels=labels, zero_division=0)
        if scored.any()
        else np.zeros((4, len(labels)))
    )
    for name, precision, recall, f1, support in zip(populations, *scores, strict=True):
        yield {"population": name, "f1": f1, "precision": precision, "recall": recall, "support": int(support)}
