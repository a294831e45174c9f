"""From AnnData to tensors: checks, gene alignment, contexts, loaders."""

from ._fields import CategoryObsField, GroupObsField, MuDataCategoryObsField, MuDataGroupObsField
from ._genes import align_genes, match_genes
from ._loader import CellSetDataset, CellSetLoader, gene_shares
from ._sampler import CellSetSampler, Contexts, draw_contexts
from ._splitter import CellSetSplitter, split_cells
from ._validate import (
    check_cells,
    check_counts,
    check_groups,
    check_known,
    check_names,
    looks_like_counts,
    warn_small_data,
)

__all__ = [
    "CategoryObsField",
    "CellSetDataset",
    "CellSetLoader",
    "CellSetSampler",
    "CellSetSplitter",
    "Contexts",
    "GroupObsField",
    "MuDataCategoryObsField",
    "MuDataGroupObsField",
    "align_genes",
    "check_cells",
    "check_counts",
    "check_groups",
    "check_known",
    "check_names",
    "draw_contexts",
    "gene_shares",
    "looks_like_counts",
    "match_genes",
    "split_cells",
    "warn_small_data",
]
