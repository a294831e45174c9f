"""Preprocessing that scanpy lacks."""

from cellweave.data import align_genes

from ._counts import recover_counts
from ._marker_table import check_marker_table
from ._statistics import gene_moments
from ._store import write_store

__all__ = ["align_genes", "check_marker_table", "gene_moments", "recover_counts", "write_store"]
