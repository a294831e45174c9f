"""Torch modules, one per model family: tensors in, tensors and losses out."""

from ._stack import StackModule, sample_gene_mask

__all__ = ["StackModule", "sample_gene_mask"]
