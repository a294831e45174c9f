"""Preprocessing that scanpy lacks."""

from cellweave.data import align_genes

from ._counts import recover_counts
from ._statistics import gene_moments
from ._store import write_store

__all__ = ["align_genes", "gene_moments", "recover_counts", "write_store"]
