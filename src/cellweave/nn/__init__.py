"""Layers: tensors in, tensors out."""

from ._attention import MultiHeadAttention, TabularAttentionLayer, within_cell_heads
from ._coupling import CouplingFlow, CouplingLayer

__all__ = ["CouplingFlow", "CouplingLayer", "MultiHeadAttention", "TabularAttentionLayer", "within_cell_heads"]
