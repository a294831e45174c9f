"""Layers: tensors in, tensors out."""

from ._attention import MultiHeadAttention, TabularAttentionLayer, within_cell_heads
from ._coupling import CouplingFlow, CouplingLayer
from ._covariates import CovariateEncoder

__all__ = [
    "CouplingFlow",
    "CouplingLayer",
    "CovariateEncoder",
    "MultiHeadAttention",
    "TabularAttentionLayer",
    "within_cell_heads",
]
