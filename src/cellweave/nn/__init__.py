"""Layers: tensors in, tensors out."""

from ._adaln import GeneAdaLN, Modulation, modulate
from ._attention import MultiHeadAttention, TabularAttentionLayer, within_cell_heads
from ._coupling import CouplingFlow, CouplingLayer
from ._covariates import CovariateEncoder
from ._decoders import ExpressionDecoder, LatentDecoder
from ._descriptions import DoseResponse, TokenDescriptions
from ._diff_attention import DifferentialAttention, DifferentialTransformerBlock, DiffPerceiverBlock
from ._embedders import (
    ContinuousValueEncoder,
    GeneEncoder,
    LabelEncoder,
    LatentEmbedder,
    SignedValueEncoder,
    TimestepEmbedder,
    timestep_features,
)
from ._packed_attention import PackedAttention
from ._pairs import PairLinear, PairSequential

__all__ = [
    "DoseResponse",
    "TokenDescriptions",
    "ContinuousValueEncoder",
    "CouplingFlow",
    "CouplingLayer",
    "CovariateEncoder",
    "DiffPerceiverBlock",
    "DifferentialAttention",
    "DifferentialTransformerBlock",
    "ExpressionDecoder",
    "GeneAdaLN",
    "GeneEncoder",
    "LabelEncoder",
    "LatentDecoder",
    "LatentEmbedder",
    "Modulation",
    "MultiHeadAttention",
    "PackedAttention",
    "PairLinear",
    "PairSequential",
    "SignedValueEncoder",
    "TabularAttentionLayer",
    "TimestepEmbedder",
    "modulate",
    "timestep_features",
    "within_cell_heads",
]
