"""Layers: tensors in, tensors out."""

from ._attention import MultiHeadAttention, TabularAttentionLayer, within_cell_heads

__all__ = ["MultiHeadAttention", "TabularAttentionLayer", "within_cell_heads"]
