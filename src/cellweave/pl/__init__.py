"""Figures of training, predictions and attention, drawn from histories and arrays with matplotlib."""

from ._attention import context_attention
from ._curves import training_curves
from ._reconstruction import masked_reconstruction

__all__ = ["context_attention", "masked_reconstruction", "training_curves"]
