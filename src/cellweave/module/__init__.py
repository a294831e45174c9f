"""Torch modules, one per model family: tensors in, tensors and losses out."""

from ._scyan import ScyanAnnotation, ScyanModule
from ._stack import StackModule, sample_gene_mask

__all__ = ["ScyanAnnotation", "ScyanModule", "StackModule", "sample_gene_mask"]
