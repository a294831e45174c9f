"""Torch modules, one per model family: tensors in, tensors and losses out."""

from ._ccfm import CascadedFlowModule
from ._ccfm_anchor import AnchorTable
from ._ccfm_draws import FlowDraws
from ._ccfm_network import TwoStreamNetwork
from ._ccfm_sampling import CascadeSampler, FlowSample, FlowSolver, FlowStart
from ._scyan import ScyanAnnotation, ScyanModule
from ._scyan_ensemble import ScyanEnsemble
from ._stack import StackModule, sample_gene_mask

__all__ = [
    "AnchorTable",
    "CascadeSampler",
    "CascadedFlowModule",
    "FlowDraws",
    "FlowSample",
    "FlowSolver",
    "FlowStart",
    "ScyanAnnotation",
    "ScyanEnsemble",
    "ScyanModule",
    "StackModule",
    "TwoStreamNetwork",
    "sample_gene_mask",
]
