"""Torch modules, one per model family: tensors in, tensors and losses out."""

from ._ccfm import CascadedFlowModule
from ._ccfm_anchor import AnchorTable
from ._ccfm_draws import FlowDraws, evaluating
from ._ccfm_generation import FlowGeneration, FlowOrigin, NoiseKind
from ._ccfm_inversion import embed_cells, invert_flow
from ._ccfm_network import NOTHING, UNKNOWN, FlowLayout, TwoStreamNetwork
from ._ccfm_sampling import CascadeSampler, FlowSample, FlowSolver, FlowStart, Stage1Input
from ._scyan import ScyanAnnotation, ScyanModule
from ._scyan_ensemble import ScyanEnsemble
from ._stack import StackModule, sample_gene_mask

__all__ = [
    "NOTHING",
    "UNKNOWN",
    "AnchorTable",
    "CascadeSampler",
    "CascadedFlowModule",
    "FlowDraws",
    "FlowGeneration",
    "FlowLayout",
    "FlowOrigin",
    "NoiseKind",
    "Stage1Input",
    "FlowSample",
    "FlowSolver",
    "FlowStart",
    "ScyanAnnotation",
    "ScyanEnsemble",
    "ScyanModule",
    "StackModule",
    "TwoStreamNetwork",
    "embed_cells",
    "evaluating",
    "invert_flow",
    "sample_gene_mask",
]
