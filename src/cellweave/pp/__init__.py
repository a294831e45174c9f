"""Preprocessing that scanpy lacks."""

from cellweave.data import align_genes

from ._compensation import compensate
from ._counts import recover_counts
from ._cytometry import arcsinh, logicle, scale_markers
from ._inverse import inverse_transform
from ._marker_table import check_marker_table
from ._statistics import gene_moments
from ._store import write_store

__all__ = [
    "align_genes",
    "arcsinh",
    "check_marker_table",
    "compensate",
    "gene_moments",
    "inverse_transform",
    "logicle",
    "recover_counts",
    "scale_markers",
    "write_store",
]
