"""The cascaded flow backwards: from a measured cell to where its flow starts."""

from __future__ import annotations

import torch
from torch import Tensor

from cellweave.flow import Guidance, integrate

from ._ccfm_network import PerturbationConstants
from ._ccfm_sampling import CascadeSampler, FlowSolver, FlowStart

__all__ = ["embed_cells", "invert_flow"]


def invert_flow(
    sampler: CascadeSampler, condition: PerturbationConstants, x: Tensor, latent: Tensor | None, how: FlowSolver
) -> FlowStart:
    """Where the flows start that end at measured cells.

    The stages are followed backwards in reversed order: the expression beside the measured features, then the features
    beside the start of the expression.

    Parameters
    ----------
    sampler
        Flow beside the control cells.
    condition
        Condition of the cells, as the sampler reads it.
    x
        Measured expression ``(cell, gene)``.
    latent
        Measured features ``(cell, gene, latent)`` or ``(cell, latent)``; None for a model without.
    how
        Solver and times; there is no guidance.
    """
    velocity = sampler.expression_velocity(latent, condition, Guidance())
    start = integrate(velocity, x, how.expression_times.flip(0), how.solver)
    if latent is not None:
        velocity = sampler.latent_velocity(start, condition, Guidance())
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
