"""From AnnData to tensors: checks, gene alignment, contexts, loaders."""

from ._columns import take_columns
from ._conditions import CONTROL_SYNONYMS, ConditionNames
from ._densify import as_dense
from ._feature_cache import FeatureCache
from ._feature_statistics import FeatureCompression, FeatureStatistics
from ._features import (
    CallableFeatures,
    FeatureEncoder,
    FeatureLevel,
    GeneTableFeatures,
    ModelFeatures,
    ObsmFeatures,
    PCAFeatures,
    make_encoder,
)
from ._fields import (
    CategoriesObsField,
    CategoryObsField,
    GroupObsField,
    MuDataCategoriesObsField,
    MuDataCategoryObsField,
    MuDataGroupObsField,
)
from ._gene_graph import coexpression, coexpression_mask, pad_mask, top_k_mask
from ._genes import align_genes, match_genes
from ._loader import CellSetDataset, CellSetLoader, gene_shares
from ._pair_sampler import CellPairs, PairSampler
from ._pairs import GroupStarts, PairDataset, Pairing, PairLoader, PairSplitter, PairTables, pair_within_sets
from ._rows import DiskRows, Rows, as_csr, row_source
from ._sampler import CellSetSampler, Contexts, draw_contexts
from ._screen import Screen, context_names, parse_doses
from ._splitter import CellSetSplitter, split_cells
from ._store import CellStore, Part, join_parts, open_store
from ._tokens import SPECIAL_TOKENS, PerturbationTokens, UnseenPerturbationError
from ._validate import (
    check_cells,
    check_counts,
    check_groups,
    check_known,
    check_names,
    get_counts,
    looks_like_counts,
    warn_small_data,
)
from ._validate_expression import check_expression
from ._validate_markers import check_intensities, check_measured, find_markers

# `CellStore` is public as `cellweave.io.CellStore`; a class can have one place in the API reference only.
__all__ = [
    "as_dense",
    "GroupStarts",
    "CellPairs",
    "PairSampler",
    "PairDataset",
    "Pairing",
    "pair_within_sets",
    "PairLoader",
    "PairSplitter",
    "PairTables",
    "Screen",
    "context_names",
    "parse_doses",
    "SPECIAL_TOKENS",
    "PerturbationTokens",
    "UnseenPerturbationError",
    "check_expression",
    "CONTROL_SYNONYMS",
    "ConditionNames",
    "CallableFeatures",
    "CategoriesObsField",
    "CategoryObsField",
    "CellSetDataset",
    "CellSetLoader",
    "CellSetSampler",
    "CellSetSplitter",
    "Contexts",
    "DiskRows",
    "FeatureCache",
    "FeatureCompression",
    "FeatureEncoder",
    "FeatureLevel",
    "FeatureStatistics",
    "GeneTableFeatures",
    "GroupObsField",
    "ModelFeatures",
    "MuDataCategoriesObsField",
    "MuDataCategoryObsField",
    "MuDataGroupObsField",
    "ObsmFeatures",
    "PCAFeatures",
    "Part",
    "Rows",
    "align_genes",
    "as_csr",
    "check_cells",
    "check_counts",
    "check_groups",
    "check_intensities",
    "check_known",
    "check_measured",
    "check_names",
    "coexpression",
    "coexpression_mask",
    "draw_contexts",
    "find_markers",
    "gene_shares",
    "get_counts",
    "join_parts",
    "looks_like_counts",
    "make_encoder",
    "match_genes",
    "open_store",
    "pad_mask",
    "row_source",
    "split_cells",
    "take_columns",
    "top_k_mask",
    "warn_small_data",
]
