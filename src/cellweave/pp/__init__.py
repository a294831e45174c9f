"""Preprocessing that scanpy lacks."""

from cellweave.data import align_genes

from ._counts import recover_counts

__all__ = ["align_genes", "recover_counts"]
