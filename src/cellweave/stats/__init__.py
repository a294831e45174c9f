"""Accumulators over cells, and tables of mean shifts with the simple predictions that follow from them."""

from ._anchors import (
    ANCHORS,
    AnchorRule,
    Evidence,
    choose_anchors,
    condition_kind,
    context_response,
    expected_shift,
    similar_contexts,
    with_contexts,
)
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
from ._shrinkage import posterior_effects, shrink_effects, shrinkage_risk

__all__ = [
    "ANCHORS",
    "AnchorRule",
    "Evidence",
    "choose_anchors",
    "condition_kind",
    "context_response",
    "similar_contexts",
    "posterior_effects",
    "shrink_effects",
    "shrinkage_risk",
    "expected_shift",
    "with_contexts",
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
