"""Torch modules, one per model family: tensors in, tensors and losses out."""

from ._scyan import ScyanAnnotation, ScyanModule
from ._scyan_ensemble import ScyanEnsemble
from ._stack import StackModule, sample_gene_mask

__all__ = ["ScyanAnnotation", "ScyanEnsemble", "ScyanModule", "StackModule", "sample_gene_mask"]
