"""Figures of training, predictions, attention and marker tables, drawn with matplotlib."""

from ._attention import context_attention
from ._curves import training_curves
from ._marker_table import marker_table
from ._reconstruction import masked_reconstruction

__all__ = ["context_attention", "marker_table", "masked_reconstruction", "training_curves"]
