"""Composable training objectives: each has a name, a weight and its own logged curve."""

from ._base import Objective
from ._flow_matching import ExpressionVelocity, LatentVelocity, ZeroGate, velocity_error
from ._labels import LabelCrossEntropy
from ._masked_nb import MaskedNegativeBinomial, negative_binomial_nll
from ._metrics import masked_correlation, masked_mae
from ._mmd import ConditionalMMD, median_bandwidths, squared_distances, squared_mmd
from ._monotone import MarkerMonotonicity, marker_discordance
from ._population_prior import (
    LogDeterminant,
    MixtureLikelihood,
    PopulationLogProb,
    PopulationPrior,
    PopulationWeightPrior,
    mixture_log_likelihood,
    population_posterior,
)
from ._shared import derive_seed, normal_per_context, shared_mean, step_generator, step_outputs
from ._sliced_wasserstein import SlicedWasserstein, draw_slices, sliced_wasserstein

__all__ = [
    "ConditionalMMD",
    "ExpressionVelocity",
    "LabelCrossEntropy",
    "LatentVelocity",
    "LogDeterminant",
    "MarkerMonotonicity",
    "MaskedNegativeBinomial",
    "MixtureLikelihood",
    "Objective",
    "PopulationLogProb",
    "PopulationPrior",
    "PopulationWeightPrior",
    "SlicedWasserstein",
    "ZeroGate",
    "derive_seed",
    "marker_discordance",
    "draw_slices",
    "marker_discordance",
    "masked_correlation",
    "masked_mae",
    "median_bandwidths",
    "mixture_log_likelihood",
    "negative_binomial_nll",
    "normal_per_context",
    "population_posterior",
    "shared_mean",
    "sliced_wasserstein",
    "squared_distances",
    "squared_mmd",
    "step_generator",
    "step_outputs",
    "velocity_error",
]
