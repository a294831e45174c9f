"""Composable training objectives: each has a name, a weight and its own logged curve."""

from ._base import Objective
from ._labels import LabelCrossEntropy
from ._masked_nb import MaskedNegativeBinomial, negative_binomial_nll
from ._metrics import masked_correlation, masked_mae
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
    "LabelCrossEntropy",
    "LogDeterminant",
    "MarkerMonotonicity",
    "MaskedNegativeBinomial",
    "MixtureLikelihood",
    "Objective",
    "PopulationLogProb",
    "PopulationPrior",
    "PopulationWeightPrior",
    "SlicedWasserstein",
    "derive_seed",
    "marker_discordance",
    "draw_slices",
    "marker_discordance",
    "masked_correlation",
    "masked_mae",
    "mixture_log_likelihood",
    "negative_binomial_nll",
    "normal_per_context",
    "population_posterior",
    "shared_mean",
    "sliced_wasserstein",
    "step_generator",
    "step_outputs",
]
