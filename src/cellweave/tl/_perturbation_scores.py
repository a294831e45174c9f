"""Scores of one method on all groups of a screen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ._perturbation_methods import Method
from ._perturbation_metrics import discrimination, energy_and_mmd, overlap, rowwise_pearson, top_genes
from ._perturbation_screen import Screen

__all__ = ["metric_names", "score"]

Array = NDArray[np.float64]

_MEANS = ("mse", "mae", "pearson_delta")
_POPULATIONS = ("energy_distance", "mmd", "variance_ratio", "zero_fraction_ratio")
_TRUTH = ("n_de_true", "energy_p_true", "null")
# A measured perturbation without DE genes whose energy distance to control is not beyond this p-value is called null.
_NULL_P = 0.05


def metric_names(n_top: int, chosen: Iterable[str] | None = None) -> tuple[str, ...]:
    """Names of the metrics to compute.

    Raises
    ------
    ValueError
        If a chosen one does not exist, or none is chosen.
    """
    top = (f"pearson_delta_top{n_top}", f"mse_top{n_top}")
    every = (*_MEANS, *top, *_POPULATIONS, "discrimination_l1", f"de_overlap_top{n_top}", "n_de_pred", *_TRUTH)
    wanted = every if chosen is None else tuple(chosen)
    unknown = [name for name in wanted if name not in every]
    if unknown or not wanted:
        raise ValueError(
            f"`metrics` has {len(unknown)} unknown name(s) (first: {unknown[0]!r}); choose from {', '.join(every)}."
            if unknown
            else f"`metrics` is empty; choose from {', '.join(every)}."
        )
    return tuple(name for name in every if name in wanted)


def score(method: Method, screen: Screen, wanted: Sequence[str]) -> pd.DataFrame:
    """Metrics of a method, one row per group to which it applies, one column per metric."""
    groups = np.flatnonzero(method.applies)
    found = _mean_scores(method, screen, wanted)
    if set(wanted) & set(_POPULATIONS):
        found |= _spread(_population_scores, method, screen, groups)
    if {"n_de_pred", f"de_overlap_top{screen.settings.n_top}"} & set(wanted):
        found |= _spread(_test_scores, method, screen, groups)
    if set(wanted) & set(_TRUTH):
        n_de = screen.truth_test[1]
        found["n_de_true"] = n_de.astype(np.float64)
        if {"energy_p_true", "null"} & set(wanted):
            found["energy_p_true"] = screen.truth_energy_p
            found["null"] = ((n_de == 0) & (screen.truth_energy_p > _NULL_P)).astype(np.float64)
    return pd.DataFrame({name: found[name] for name in wanted}, index=screen.groups)[method.applies]


def _mean_scores(method: Method, screen: Screen, wanted: Sequence[str]) -> dict[str, Array]:
    """Metrics of means and shifts, averaged over the splits."""
    n_top = screen.settings.n_top
    splits = [_split_scores(method, screen, split, wanted) for split in range(screen.settings.n_splits)]
    names = (*_MEANS, f"pearson_delta_top{n_top}", f"mse_top{n_top}", "discrimination_l1")
    return {name: np.mean([found[name] for found in splits], axis=0) for name in names if name in splits[0]}


def _split_scores(method: Method, screen: Screen, split: int, wanted: Sequence[str]) -> dict[str, Array]:
    n_top = screen.settings.n_top
    predicted, true = method.means(split)
    error = predicted - true
    shift, true_shift = method.shifts(split)
    found = {
        "mse": np.square(error).mean(axis=1),
        "mae": np.abs(error).mean(axis=1),
        "pearson_delta": rowwise_pearson(shift, true_shift),
    }
    if f"mse_top{n_top}" in wanted:
        found[f"mse_top{n_top}"] = np.square(_at_top(screen.truth_test[0], n_top, error)).mean(axis=1)
    if f"pearson_delta_top{n_top}" in wanted:
        scores = method.true_scores(split)
        at_top = (_at_top(scores, n_top, values) for values in (shift, true_shift))
        found[f"pearson_delta_top{n_top}"] = rowwise_pearson(*at_top)
    if "discrimination_l1" in wanted:
        found["discrimination_l1"] = _discrimination(method, screen, shift, true_shift)
    return found


def _at_top(scores: Array, n_top: int, values: Array) -> Array:
    """Values of the genes with the largest absolute scores of every group ``(group, n_top)``."""
    top = np.stack([top_genes(score, n_top) for score in scores])
    return np.take_along_axis(values, top, axis=1)


def _discrimination(method: Method, screen: Screen, predicted: Array, true: Array) -> Array:
    """Discrimination among the perturbations of every context to which the method applies."""
    values = np.full(len(screen.groups), np.nan)
    position = {gene: i for i, gene in enumerate(screen.truth.genes)}
    for context in np.unique(screen.context[method.applies]):
        here = np.flatnonzero((screen.context == context) & method.applies)
        targets = np.zeros((len(here), len(position)), dtype=bool)
        for row, group in enumerate(here):
            targets[row, [position[part] for part in screen.conditions[group] if part in position]] = True
        values[here] = discrimination(predicted[here], true[here], targets)
    return values


def _spread(scorer, method: Method, screen: Screen, groups: NDArray[np.intp]) -> dict[str, Array]:  # type: ignore[no-untyped-def]
    """Scores of single groups as arrays over all groups, NaN where the method does not apply."""
    rows = {int(group): scorer(method, screen, int(group)) for group in groups}
    table = pd.DataFrame.from_dict(rows, orient="index", dtype=np.float64).reindex(range(len(screen.groups)))
    return {str(name): table[name].to_numpy() for name in table}


def _population_scores(method: Method, screen: Screen, group: int) -> dict[str, float]:
    pairs = [_compare(predicted, true, screen) for predicted, true in method.populations(group)]
    return {name: float(np.mean([pair[name] for pair in pairs])) for name in pairs[0]}


def _compare(predicted: NDArray[np.float32], true: NDArray[np.float32], screen: Screen) -> dict[str, float]:
    energy, mmd = energy_and_mmd(screen.project(predicted), screen.project(true), screen.gamma)
    return {
        "energy_distance": energy,
        "mmd": mmd,
        "variance_ratio": _ratio(_total_variance(predicted), _total_variance(true)),
        "zero_fraction_ratio": _ratio(float((predicted == 0).mean()), float((true == 0).mean())),
    }


def _test_scores(method: Method, screen: Screen, group: int) -> dict[str, float]:
    predicted, n_de = method.test(group)
    n_top = screen.settings.n_top
    return {
        f"de_overlap_top{n_top}": overlap(predicted, method.true_scores(0)[group], n_top),
        "n_de_pred": float(n_de),
    }


def _total_variance(x: NDArray[np.float32]) -> float:
    """Sum of the variances of all genes; NaN for one cell."""
    return float(x.var(axis=0, ddof=1, dtype=np.float64).sum()) if len(x) > 1 else float("nan")


def _ratio(predicted: float, true: float) -> float:
    return predicted / true if true > 0 else float("nan")
