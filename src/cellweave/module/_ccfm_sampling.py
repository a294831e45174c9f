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
    gate: Tensor | None = None  # (cell, gene): uniform numbers that decide which genes are zero


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
    gate_time: float = 0.9  # zeros are decided at the last expression time up to this one


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
    anchor
        Expected change of the control cells ``(cell, gene)``; none by default.
    reference
        What the network reads instead of both ``(cell or 1, 2, gene)``; none by default.
    """

    def __init__(
        self,
        network: TwoStreamNetwork,
        genes: Tensor,
        control: Tensor,
        anchor: Tensor | None = None,
        reference: Tensor | None = None,
    ) -> None:
        self.network, self.genes, self.expression = network, genes, control
        none = torch.full((1, 1), -1, device=genes.device)
        if reference is not None:
            control, anchor = reference.expand(len(control), -1, -1).unbind(1)
        self.control: ControlConstants = network.read_control(network.read_tokens(genes, none)[0], control, anchor)

    def generate(
        self,
        perturbation: Tensor,
        start: FlowStart,
        how: FlowSolver,
        stage1_input: Stage1Input = "noise",
        dose: Tensor | None = None,
        covariates: Tensor | None = None,
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
        dose, covariates
            See :meth:`TwoStreamNetwork.read_tokens`.
        """
        constants = self.read(perturbation, dose, covariates)
        latent = start.latent
        if latent is not None:
            seen = start.expression if stage1_input == "noise" else self.expression
            velocity = self.latent_velocity(seen, constants, how.latent_guidance)
            latent = integrate(velocity, latent, how.latent_times, how.solver)
        velocity = self.expression_velocity(latent, constants, how.expression_guidance)
        times, x = how.expression_times, start.expression
        if start.gate is None or self.network.gate_layer is None:
            return FlowSample(integrate(velocity, x, times, how.solver), latent)
        # beside finished expression the zeros would only repeat what the flow says, so they are decided a little before
        stop = int((times[:-1] <= how.gate_time).sum().clamp(min=1)) - 1
        if stop:
            x = integrate(velocity, x, times[: stop + 1], how.solver)
        zero = start.gate < self.zero_probability(latent, constants, float(times[stop]), x)
        return FlowSample(integrate(velocity, x, times[stop:], how.solver).masked_fill(zero, 0), latent)

    def read(
        self, perturbation: Tensor, dose: Tensor | None = None, covariates: Tensor | None = None
    ) -> PerturbationConstants:
        """Constants of a condition; arguments as in :meth:`generate`."""
        return self.network.read_perturbation(self.network.read_tokens(self.genes, perturbation, dose, covariates)[1])

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
        tokens = None if latent is None else self.network.latent_tokens(latent)

        def velocity(branch: PerturbationConstants, t: float, x: Tensor) -> Tensor:
            return self.network.expression_velocity(self._second_stage(tokens, branch, t, x), branch)

        return self._guided(velocity, perturbation, guidance)

    def zero_probability(
        self, latent: Tensor | None, perturbation: PerturbationConstants, t: float, x: Tensor
    ) -> Tensor:
        """How likely the genes of cells are zero ``(cell, gene)``, told from expression ``x`` at the time ``t``."""
        tokens = None if latent is None else self.network.latent_tokens(latent)
        return self.network.zero_logit(self._second_stage(tokens, perturbation, t, x), perturbation).sigmoid()

    def _second_stage(
        self, latent_tokens: Tensor | None, perturbation: PerturbationConstants, t: float, x: Tensor
    ) -> Tensor:
        """Tokens of the backbone ``(cell, gene, dim)`` beside finished features."""
        one = self.expression.new_ones(1)
        condition = self.network.condition(one * t, one, perturbation)
        tokens = self.network.expression_tokens(x, self.control)
        tokens = tokens if latent_tokens is None else tokens + latent_tokens
        return self.network.backbone(tokens, condition, self.control, perturbation)

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
