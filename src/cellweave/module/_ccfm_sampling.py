"""Solving the cascaded flow: first the features, then the expression given them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from cellweave.flow import Guidance, Velocity, guide, integrate, time_grid

from ._ccfm_network import ControlConstants, PerturbationConstants, TwoStreamNetwork

__all__ = ["CascadeSampler", "FlowSample", "FlowSolver", "FlowStart", "Stage1Input"]

Stage1Input = Literal["noise", "control"]


class FlowStart(NamedTuple):
    """Where a flow starts."""

    expression: Tensor  # (cell, gene)
    latent: Tensor | None = None  # (cell, gene, latent) or (cell, latent)


class FlowSample(NamedTuple):
    """Where a flow ends."""

    expression: Tensor  # (cell, gene), as the flow gives it: small negative values are zeros of the data
    latent: Tensor | None  # (cell, gene, latent) or (cell, latent)


class FlowSolver(NamedTuple):
    """How a flow is solved."""

    solver: str = "midpoint"
    expression_times: Tensor = time_grid(11)
    latent_times: Tensor = time_grid(11)
    expression_guidance: Guidance = Guidance()
    latent_guidance: Guidance = Guidance()


class CascadeSampler:
    """Perturbed cells from control cells; what the control cells give is computed once for all perturbations.

    Parameters
    ----------
    network
        The network, in evaluation mode.
    genes
        Token of every gene ``(gene,)``.
    control
        Expression of the control cells ``(cell, gene)``.
    """

    def __init__(self, network: TwoStreamNetwork, genes: Tensor, control: Tensor) -> None:
        self.network, self.genes, self.expression = network, genes, control
        none = torch.full((1, 1), -1, device=genes.device)
        self.control: ControlConstants = network.read_control(network.read_tokens(genes, none)[0], control)

    def generate(
        self, perturbation: Tensor, start: FlowStart, how: FlowSolver, stage1_input: Stage1Input = "noise"
    ) -> FlowSample:
        """Cells after a perturbation.

        Parameters
        ----------
        perturbation
            Tokens or labels ``(cell or 1, slot)``; one row where all cells share it.
        start
            Noise.
        how
            Solver, times and guidance.
        stage1_input
            Expression that the first stage sees: the noise that the second starts from, as in training, or the control
            cell.
        """
        constants = self.network.read_perturbation(self.network.read_tokens(self.genes, perturbation)[1])
        latent = start.latent
        if latent is not None:
            seen = start.expression if stage1_input == "noise" else self.expression
            velocity = self.latent_velocity(seen, constants, how.latent_guidance)
            latent = integrate(velocity, latent, how.latent_times, how.solver)
        velocity = self.expression_velocity(latent, constants, how.expression_guidance)
        return FlowSample(integrate(velocity, start.expression, how.expression_times, how.solver), latent)

    def latent_velocity(self, expression: Tensor, perturbation: PerturbationConstants, guidance: Guidance) -> Velocity:
        """Velocity of the features beside an ``expression`` at the time 0, whose tokens stay the same."""
        network, tokens = self.network, self.network.expression_tokens(expression, self.control)
        zero = expression.new_zeros(1)

        def velocity(branch: PerturbationConstants, t: float, z: Tensor) -> Tensor:
            condition = network.condition(zero, zero + t, branch)
            x = network.backbone(tokens + network.latent_tokens(z), condition, self.control, branch)
            return network.latent_velocity(x, condition)

        return self._guided(velocity, perturbation, guidance)

    def expression_velocity(
        self, latent: Tensor | None, perturbation: PerturbationConstants, guidance: Guidance
    ) -> Velocity:
        """Velocity of the expression beside finished features, whose tokens stay the same."""
        network = self.network
        tokens = None if latent is None else network.latent_tokens(latent)
        one = self.expression.new_ones(1)

        def velocity(branch: PerturbationConstants, t: float, x: Tensor) -> Tensor:
            condition = network.condition(one * t, one, branch)
            x = network.expression_tokens(x, self.control)
            x = network.backbone(x if tokens is None else x + tokens, condition, self.control, branch)
            return network.expression_velocity(x, branch)

        return self._guided(velocity, perturbation, guidance)

    def _guided(
        self,
        velocity: Callable[[PerturbationConstants, float, Tensor], Tensor],
        perturbation: PerturbationConstants,
        guidance: Guidance,
    ) -> Velocity:
        null = self.network.null_perturbation() if guidance.scale != 1 else perturbation

        def guided(t: float, state: Tensor) -> Tensor:
            scale = guidance.at(t)
            own = velocity(perturbation, t, state)
            return own if scale == 1 else guide(own, velocity(null, t, state), scale)

        return guided
