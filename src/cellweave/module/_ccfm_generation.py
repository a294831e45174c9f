"""Making cells with a trained cascaded flow: where their flows start, and where they end."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from cellweave.flow import cell_uniform, gaussian_noise, poisson_noise, poisson_rate

from ._ccfm_draws import evaluating, expected_change
from ._ccfm_network import TwoStreamNetwork
from ._ccfm_sampling import CascadeSampler, FlowSample, FlowSolver, FlowStart, Stage1Input

__all__ = ["FlowGeneration", "FlowOrigin", "NoiseKind"]

NoiseKind = Literal["gaussian", "poisson"]
FlowOrigin = Literal["noise", "control"]

# Streams of a cell's noise.
_EXPRESSION, _LATENT, _GATE, _MOVE, _MOVED = range(5)


class FlowGeneration(TwoStreamNetwork):
    """Sampling of the module of the cascaded flow."""

    noise: NoiseKind
    noise_target_sum: float | None
    start: FlowOrigin
    start_noise: float
    stage1_expression_input: Stage1Input

    def draw_start(self, control: Tensor, cells: Tensor, seed: int, anchor: Tensor | None = None) -> FlowStart:
        """Where the flows of cells start; its noise belongs to the number of a cell, not to its place in a batch.

        Parameters
        ----------
        control
            Expression of the control cells ``(cell, gene)``.
        cells
            Number of every cell ``(cell,)``.
        seed
            Seed of all cells.
        anchor
            Expected change of the control cells ``(cell, gene)`` or ``(gene,)``; read where flows start from control cells.
        """
        n_genes = control.shape[1]
        if self.noise == "poisson":
            rate = poisson_rate(control, self.noise_target_sum)
            noise = poisson_noise(rate, cells, seed, _EXPRESSION)
        elif self.start == "control" and not self.start_noise:
            noise = torch.zeros(control.shape)  # nothing is drawn where noise has no share
        else:
            noise = gaussian_noise((n_genes,), cells, seed, _EXPRESSION)
        gate = None if self.gate_layer is None else cell_uniform((n_genes,), cells, seed, _GATE).to(control)
        latent = None
        if self.n_latent:
            shape = (n_genes, self.n_latent) if self.latent_level == "gene" else (self.n_latent,)
            latent = gaussian_noise(shape, cells, seed, _LATENT).to(control)
        return FlowStart(self._begin(control, anchor, noise.to(control)), latent, gate)

    def draw_change(self, control: Tensor, transport: Tensor, cells: Tensor, seed: int) -> Tensor:
        """Expected change of control cells ``(cell, gene)``: the anchor of :meth:`draw_start` and :meth:`sample`.

        Parameters
        ----------
        control
            Expression of the control cells ``(cell, gene)``.
        transport
            How they are expected to move ``(cell, 4, gene)``, see :class:`~cellweave.flow.Transport`.
        cells
            Number of every cell ``(cell,)``.
        seed
            Seed of all cells.
        """
        shape = (control.shape[1],)
        uniform, normal = cell_uniform(shape, cells, seed, _MOVE), gaussian_noise(shape, cells, seed, _MOVED)
        return expected_change(control, transport, uniform, normal)

    def _begin(self, control: Tensor, anchor: Tensor | None, noise: Tensor) -> Tensor:
        """Start of the expression ``(cell, gene)``."""
        if self.start == "noise":
            return noise
        start = control + self.start_noise * noise if self.start_noise else control
        return start if anchor is None else start + anchor

    @torch.no_grad()
    def sample(
        self,
        genes: Tensor,
        control: Tensor,
        perturbation: Tensor,
        start: FlowStart,
        how: FlowSolver | None = None,
        stage1_expression_input: Stage1Input | None = None,
        anchor: Tensor | None = None,
        dose: Tensor | None = None,
        covariates: Tensor | None = None,
        reference: Tensor | None = None,
    ) -> FlowSample:
        """Cells after a perturbation, and their features; without dropout, whatever the mode.

        Parameters
        ----------
        genes
            Token of every gene ``(gene,)``.
        control
            Expression of the control cells ``(cell, gene)``.
        perturbation
            Tokens or labels ``(cell or 1, slot)``; one row, where all cells share it, is faster.
        start
            Where the flows start, see :meth:`draw_start`.
        how
            Solver, times and guidance; ten midpoint steps per stage by default.
        stage1_expression_input
            Another input than in training; the same by default.
        anchor
            Expected change of the control cells ``(cell, gene)`` with which the flows start, for the network to read.
        dose, covariates
            See :meth:`TwoStreamNetwork.read_tokens`.
        reference
            What the network reads instead of the control cells and their anchor ``(cell or 1, 2, gene)``, as in training.
        """
        # not `auto_move_data`, which would also move the times of the solver: not every device has float64
        device = self.p_mask_embed.device
        latent, gate = (None if a is None else a.to(device) for a in (start.latent, start.gate))
        anchor, reference = (None if a is None else a.to(device) for a in (anchor, reference))
        begin = FlowStart(start.expression.to(device), latent, gate)
        with evaluating(self):
            sampler = CascadeSampler(self, genes.to(device), control.to(device), anchor, reference)
            stage1 = stage1_expression_input or self.stage1_expression_input
            told = [None if a is None else a.to(device) for a in (dose, covariates)]
            return sampler.generate(perturbation.to(device), begin, how or FlowSolver(), stage1, *told)
