"""The cascaded flow backwards: from a measured cell to where its flow starts."""

from __future__ import annotations

import torch
from torch import Tensor

from cellweave.flow import integrate

from ._ccfm_sampling import CascadeSampler, FlowSolver, FlowStart

__all__ = ["embed_cells", "invert_flow"]


def invert_flow(
    sampler: CascadeSampler, perturbation: Tensor, x: Tensor, latent: Tensor | None, how: FlowSolver
) -> FlowStart:
    """Where the flows start that end at measured cells.

    The stages are followed backwards in reversed order: the expression beside the measured features, then the features
    beside the start of the expression.

    Parameters
    ----------
    sampler
        Flow beside the control cells.
    perturbation
        Tokens or labels of the condition ``(cell or 1, slot)``.
    x
        Measured expression ``(cell, gene)``.
    latent
        Measured features ``(cell, gene, latent)`` or ``(cell, latent)``; None for a model without.
    how
        Solver and times; there is no guidance.
    """
    network = sampler.network
    constants = network.read_perturbation(network.read_tokens(sampler.genes, perturbation)[1])
    velocity = sampler.expression_velocity(latent, constants, FlowSolver().expression_guidance)
    start = integrate(velocity, x, how.expression_times.flip(0), how.solver)
    if latent is not None:
        velocity = sampler.latent_velocity(start, constants, FlowSolver().latent_guidance)
        latent = integrate(velocity, latent, how.latent_times.flip(0), how.solver)
    return FlowStart(start, latent)


def embed_cells(sampler: CascadeSampler, x: Tensor, latent: Tensor | None) -> Tensor:
    """Mean over genes of the tokens behind finished cells whose perturbation the network is not told ``(cell, dim)``.

    Parameters
    ----------
    sampler
        Flow beside the control cells.
    x
        Measured expression ``(cell, gene)``.
    latent
        Measured features; None for a model without.
    """
    network, one = sampler.network, torch.ones(1, device=x.device)
    hidden = network.null_perturbation()
    tokens = network.expression_tokens(x, sampler.control)
    if latent is not None:
        tokens = tokens + network.latent_tokens(latent)
    return network.backbone(tokens, network.condition(one, one, hidden), sampler.control, hidden).mean(1)
