"""Composable training objectives: each has a name, a weight and its own logged curve."""

from ._base import Objective
from ._masked_nb import MaskedNegativeBinomial, negative_binomial_nll
from ._metrics import masked_correlation, masked_mae
from ._sliced_wasserstein import SlicedWasserstein, draw_slices, sliced_wasserstein

__all__ = [
    "MaskedNegativeBinomial",
    "Objective",
    "SlicedWasserstein",
    "draw_slices",
    "masked_correlation",
    "masked_mae",
    "negative_binomial_nll",
    "sliced_wasserstein",
]
