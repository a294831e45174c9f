"""Accumulators over cells, and tables of mean shifts with the simple predictions that follow from them."""

from ._moments import Moments
from ._shifts import (
    SHIFT_PREDICTORS,
    Predictor,
    ShiftTable,
    additive,
    context_mean,
    gene_linear,
    group_means,
    linear_context,
    nearest_context,
    no_change,
    observed,
    perturbed_mean,
)

__all__ = [
    "SHIFT_PREDICTORS",
    "Moments",
    "Predictor",
    "ShiftTable",
    "additive",
    "context_mean",
    "gene_linear",
    "group_means",
    "linear_context",
    "nearest_context",
    "no_change",
    "observed",
    "perturbed_mean",
]
