"""The cascaded flow: perturbed cells, and features of them, from noise, a control cell and a perturbation."""

from __future__ import annotations

from typing import Any

import torch
from scvi.module.base import BaseModuleClass, LossOutput, auto_move_data
from torch import Tensor

from cellweave._keys import FLOW_KEYS, LOADER_KEYS, REGISTRY_KEYS
from cellweave.flow import (
    CascadedTimes,
    FlowTimes,
    TimeMode,
    end_point,
    linear_path,
    poisson_rate,
)
from cellweave.objective import (
    ConditionalMMD,
    ExpressionVelocity,
    LatentVelocity,
    Objective,
    ZeroGate,
    step_generator,
    step_outputs,
)

from ._ccfm_draws import GENES, FlowDraws, expected_change, own_generator, rows_with_weight, take
from ._ccfm_generation import FlowGeneration, FlowOrigin, NoiseKind
from ._ccfm_network import FlowLayout, LatentLevel
from ._ccfm_sampling import Stage1Input

__all__ = ["CascadedFlowModule"]


class CascadedFlowModule(FlowGeneration, BaseModuleClass):
    r"""Cascaded flow matching for perturbed cells.

    Two streams flow from noise at the time 0 to data at the time 1: the expression of a perturbed cell and features of
    that cell, which another model computed. Both see a control cell and the perturbation. A training cell teaches one of
    the streams: the features at a random time beside expression that is noise, or the expression beside (almost) finished
    features. Sampling makes the features first and the expression from them. Without features this is scDFM.

    The loss is the squared error of the two velocities :math:`x_1-x_0` at :math:`x_t=(1-t)x_0+tx_1`, and the maximum mean
    discrepancy between the expected end points :math:`x_t+(1-t)v` and the measured cells.

    With ``start="control"`` the expression flows from the control cell, moved by the change that a simple prediction
    expects (the anchor), instead of from noise. The velocity is zero before training, so that an untrained model is the
    simple prediction, and training learns what it leaves. The network then reads what the cells of a context share (the
    reference), not the cell: from the start and a later point of a straight path the velocity could be computed, and a
    network that knows both learns that rule, which multiplies its errors when the flow is followed.

    Parameters
    ----------
    n_tokens
        Number of gene tokens, special ones included.
    n_latent
        Number of features of the latent stream; 0 for none.
    latent_level
        Features of every ``"gene"`` or of the whole ``"cell"``.
    forbidden
        Gene graph, see :class:`~cellweave.nn.GeneEncoder`.
    n_labels
        Number of perturbation labels; 0 where perturbations are gene tokens.
    n_hidden
        Width of a token.
    n_layers
        Blocks of the backbone.
    n_heads
        Heads of the attention; must divide ``n_hidden``.
    encoder_heads
        Heads of the interaction along the gene graph; ``n_heads`` by default.
    bottleneck_dim
        Width of the bottleneck of the features.
    decoder_depth
        Blocks of the head of the features.
    dropout
        Dropout rate while training.
    layout
        ``"ccfm"`` or ``"scdfm"``, see :class:`TwoStreamNetwork`.
    adapter_residual
        Add the adapters to the stream; the published model replaces the stream by them.
    zero_init
        Start with velocities of zero; the published model starts with random ones.
    perturbation_head
        Add the published head that predicts the perturbation vector.
    time_mode
        See :class:`~cellweave.flow.CascadedTimes`.
    choose_latent_p
        Probability that a cell teaches the features.
    latent_noise
        Expression is taught beside features at a time in ``[1 - latent_noise, 1]``; 0 for finished ones.
    latent_weight, mmd_weight
        Weights of the loss of the features and of the discrepancy; the discrepancy is left out with 0.
    own_count
        Divide the loss of each stream by the cells that teach it instead of all cells.
    noise
        Start of the expression: ``"gaussian"``, or ``"poisson"`` counts with the control cell's rates, as ``log1p``.
    noise_target_sum
        Sum of the Poisson rates of a cell, see :func:`~cellweave.flow.poisson_rate`.
    stage1_expression_input
        Expression beside which the features are made: ``"noise"``, or the ``"control"`` cell. Used in training and sampling.
    condition_dropout
        Probability that a cell's perturbation is hidden in training, which guidance needs.
    n_genes_per_step
        Number of genes drawn for a step of training or validation; all by default.
    start
        Start of the expression: ``"noise"``, or the ``"control"`` cell plus its anchor, if the batch has one.
    start_noise
        Standard deviation of Gaussian noise on control cells at the start; only with ``start="control"``.
    zero_gate
        Learn how likely a gene of a cell is zero, and draw the zeros of sampled cells from that.
    gate_weight
        Weight of the loss of that head.

    Raises
    ------
    ValueError
        If an argument is out of range or does not go with another.

    References
    ----------
    scDFM, arXiv 2602.07103 (2026); Baade et al., *Latent forcing*, arXiv 2602.11401 (2026).
    """

    def __init__(
        self,
        n_tokens: int,
        n_latent: int = 0,
        latent_level: LatentLevel = "gene",
        forbidden: Tensor | None = None,
        n_labels: int = 0,
        n_hidden: int = 128,
        n_layers: int = 4,
        n_heads: int = 8,
        encoder_heads: int | None = None,
        bottleneck_dim: int = 128,
        decoder_depth: int = 2,
        dropout: float = 0.1,
        layout: FlowLayout = "ccfm",
        adapter_residual: bool = True,
        zero_init: bool = True,
        perturbation_head: bool = False,
        time_mode: TimeMode = "uniform",
        choose_latent_p: float = 0.4,
        latent_noise: float = 0.25,
        latent_weight: float = 1.0,
        mmd_weight: float = 0.5,
        own_count: bool = False,
        noise: NoiseKind = "gaussian",
        noise_target_sum: float | None = 1e4,
        stage1_expression_input: Stage1Input = "noise",
        condition_dropout: float = 0.1,
        n_genes_per_step: int | None = None,
        start: FlowOrigin = "noise",
        start_noise: float = 0.0,
        zero_gate: bool = False,
        gate_weight: float = 1.0,
    ) -> None:
        super().__init__(
            n_tokens,
            n_latent,
            latent_level,
            forbidden,
            n_labels,
            n_hidden,
            n_layers,
            n_heads,
            encoder_heads,
            bottleneck_dim,
            decoder_depth,
            dropout,
            layout,
            adapter_residual,
            zero_init,
            perturbation_head,
            start == "control",
            zero_gate,
        )
        choices: tuple[tuple[str, str, tuple[str, str]], ...] = (
            ("noise", noise, ("gaussian", "poisson")),
            ("stage1_expression_input", stage1_expression_input, ("noise", "control")),
            ("start", start, ("noise", "control")),
        )
        for name, value, known in choices:
            if value not in known:
                raise ValueError(f"`{name}` must be {known[0]!r} or {known[1]!r}, got {value!r}; choose one of them.")
        if not 0 <= condition_dropout < 1:
            raise ValueError(f"`condition_dropout` must be in [0, 1), got {condition_dropout}; choose a share.")
        if start_noise < 0:
            raise ValueError(f"`start_noise` must not be negative, got {start_noise}; use 0 for none.")
        if start == "noise" and start_noise:
            raise ValueError(f"`start_noise`={start_noise} needs `start`='control'; noise alone has the size 1.")
        if start == "control" and noise != "gaussian":
            raise ValueError(f"`noise`={noise!r} does not go with `start`='control'; use `noise`='gaussian'.")
        self.start, self.start_noise = start, start_noise
        # without features every cell teaches the expression
        self.times = (
            CascadedTimes(time_mode, choose_latent_p, latent_noise) if n_latent else CascadedTimes("uniform", 0.0)
        )
        self.noise, self.noise_target_sum = noise, noise_target_sum
        self.stage1_expression_input = stage1_expression_input
        self.condition_dropout, self.n_genes_per_step = condition_dropout, n_genes_per_step
        self.objectives: list[Objective] = [ExpressionVelocity(own_count=own_count)]
        if n_latent:
            self.objectives.append(LatentVelocity(latent_weight, own_count))
        if mmd_weight:
            self.objectives.append(ConditionalMMD(mmd_weight))
        if zero_gate:
            self.objectives.append(ZeroGate(gate_weight))

    # ---------------------------------------------------------------- training

    def draw(self, tensors: dict[str, Any]) -> FlowDraws:
        """All draws of a training step, on the CPU; from the seed of the batch if it has one.

        Parameters
        ----------
        tensors
            The batch.
        """
        control, latent = tensors[FLOW_KEYS.CONTROL], tensors.get(FLOW_KEYS.LATENT)
        n_cells, n_genes = control.shape
        genes = None
        if self.n_genes_per_step and self.n_genes_per_step < n_genes:
            shared = step_generator(tensors, GENES)
            genes = torch.randperm(n_genes, generator=shared)[: self.n_genes_per_step]
            control = control[:, genes.to(control.device)]
        generator = own_generator(tensors)
        times = self.times.sample(n_cells, generator)
        if self.noise == "poisson":
            rate = poisson_rate(control, self.noise_target_sum).cpu()
            expression = torch.poisson(rate, generator=generator).log1p()
        else:
            expression = torch.randn(control.shape, generator=generator)
        drawn = None
        if self.n_latent and latent is not None:
            per_gene = self.latent_level == "gene"
            shape = (*control.shape, self.n_latent) if per_gene else (n_cells, self.n_latent)
            drawn = torch.randn(shape, generator=generator)
        hidden = torch.rand(n_cells, generator=generator) < (self.condition_dropout if self.training else 0.0)
        moves = None
        if FLOW_KEYS.TRANSPORT in tensors:  # of all genes: how much a cell expresses is a matter of all
            moves = (
                torch.rand(n_cells, n_genes, generator=generator),
                torch.randn(n_cells, n_genes, generator=generator),
            )
        return FlowDraws(genes, times, expression, drawn, hidden, moves)

    def _get_inference_input(self, tensors: dict[str, Any], **_: Any) -> dict[str, Any]:
        return {
            "x": tensors[REGISTRY_KEYS.X],
            "control": tensors[FLOW_KEYS.CONTROL],
            "genes": tensors[FLOW_KEYS.GENES],
            "anchor": tensors.get(FLOW_KEYS.ANCHOR),
            "transport": tensors.get(FLOW_KEYS.TRANSPORT),
            "reference": tensors.get(FLOW_KEYS.REFERENCE),
            "latent": tensors.get(FLOW_KEYS.LATENT),
            "has_latent": tensors.get(FLOW_KEYS.HAS_LATENT),
            "draws": self.draw(tensors),
        }

    @auto_move_data
    def inference(
        self,
        x: Tensor,
        control: Tensor,
        genes: Tensor,
        draws: FlowDraws,
        latent: Tensor | None = None,
        has_latent: Tensor | None = None,
        anchor: Tensor | None = None,
        transport: Tensor | None = None,
        reference: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Points on the paths of both streams, and the velocities there.

        Returns
        -------
        ``target``, ``x_t``, ``u_expr``, and what the network reads as ``control`` and ``anchor`` (the reference where there
        is one), all ``(cell, gene)``, and ``genes`` ``(gene,)`` of the genes of this step;
        the four fields of :class:`~cellweave.flow.FlowTimes` and ``hidden`` ``(cell,)``; with features ``z_t`` and
        ``u_latent`` of their shape.
        """
        if transport is not None and draws.moves is not None:
            control = take(control, None, -1)
            anchor = expected_change(control, transport, *draws.moves)
        keep = None if draws.genes is None else draws.genes.to(x.device)
        x, control, genes = (take(a, keep, -1) for a in (x, control, genes))
        times = FlowTimes(*(t.to(x) for t in draws.times))
        anchor = None if anchor is None else take(anchor, keep, -1)
        path = linear_path(self._begin(control, anchor, draws.expression.to(x)), x, times.t_expr)
        x_t = path.x
        if self.n_latent and self.stage1_expression_input == "control":
            x_t = torch.where((times.w_expr == 0)[:, None], control, x_t)
        out = {"target": x, "control": control, "genes": genes, "x_t": x_t, "u_expr": path.velocity}
        out |= {**times._asdict(), "hidden": draws.hidden.to(x.device)}
        if reference is not None:
            out["control"], out["anchor"] = take(reference, keep, -1).to(x).unbind(1)
        elif anchor is not None:
            out["anchor"] = anchor
        if latent is not None and draws.latent is not None:
            per_gene = self.latent_level == "gene"
            latent = take(latent, keep, 1) if per_gene else latent
            flow = linear_path(draws.latent.to(latent), latent, times.t_latent)
            out |= {"z_t": flow.x, "u_latent": flow.velocity}
            if has_latent is not None and per_gene:
                out["has_latent"] = take(has_latent, keep, -1)
        return out

    def _get_generative_input(self, tensors: dict[str, Any], inference_outputs: dict[str, Tensor]) -> dict[str, Any]:
        names = ("control", "anchor", "genes", "x_t", "z_t", "t_expr", "t_latent", "w_latent", "hidden")
        inputs: dict[str, Any] = {name: inference_outputs[name] for name in names if name in inference_outputs}
        inputs |= {name: tensors[name] for name in (FLOW_KEYS.PERTURBATION, FLOW_KEYS.DOSE) if name in tensors}
        if self.covariate_layer is not None:
            inputs["covariates"] = tensors[REGISTRY_KEYS.CATEGORIES]
        return inputs

    @auto_move_data
    def generative(
        self,
        control: Tensor,
        genes: Tensor,
        perturbation: Tensor,
        x_t: Tensor,
        t_expr: Tensor,
        z_t: Tensor | None = None,
        t_latent: Tensor | None = None,
        w_latent: Tensor | None = None,
        hidden: Tensor | None = None,
        anchor: Tensor | None = None,
        dose: Tensor | None = None,
        covariates: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Velocities ``v_expr`` ``(cell, gene)`` and, with features, ``v_latent`` of the cells ``latent_rows``.

        With a zero gate also ``zero_logit`` ``(cell, gene)``.

        The features' head is the dearest part beside the backbone, so cells whose features do not count (``w_latent`` 0)
        are left out of it.

        Parameters
        ----------
        control
            Expression of the control cells ``(cell, gene)``.
        genes
            Token of every gene ``(gene,)``.
        perturbation
            Tokens or labels of the perturbation ``(cell, slot)``, negative for none.
        x_t, z_t
            Noisy expression ``(cell, gene)`` and noisy features.
        t_expr, t_latent
            Their times ``(cell,)``.
        w_latent
            Weights of the features ``(cell,)``; all count by default.
        hidden
            Cells whose perturbation the network must not see, bool ``(cell,)``; none by default.
        anchor
            Expected change of the control cells ``(cell, gene)``; none by default.
        dose, covariates
            See :meth:`TwoStreamNetwork.read_tokens`.
        """
        gene, vector = self.read_tokens(genes, perturbation, dose, covariates)
        if hidden is not None:
            vector = torch.where(hidden[:, None], self.p_mask_embed, vector)
        known, effect = self.read_control(gene, control, anchor), self.read_perturbation(vector)
        condition = self.condition(t_expr, t_latent, effect)
        tokens = self.expression_tokens(x_t, known)
        if z_t is not None:
            tokens = tokens + self.latent_tokens(z_t)
        tokens = self.backbone(tokens, condition, known, effect)
        out = {"v_expr": self.expression_velocity(tokens, effect)}
        if self.gate_layer is not None:
            out["zero_logit"] = self.zero_logit(tokens, effect)
        if z_t is not None:
            rows = rows_with_weight(len(tokens), w_latent, tokens.device)
            out |= {"latent_rows": rows, "v_latent": self.latent_velocity(tokens[rows], condition[rows])}
        return out

    def loss(
        self,
        tensors: dict[str, Any],
        inference_outputs: dict[str, Tensor],
        generative_outputs: dict[str, Tensor],
    ) -> LossOutput:
        """Weighted sum of the objectives; every raw term is reported."""
        flow, v_expr = inference_outputs, generative_outputs["v_expr"]
        valid = tensors.get(LOADER_KEYS.VALID)
        valid = v_expr.new_ones(len(v_expr)) if valid is None else valid.to(v_expr)
        outputs = {**flow, **generative_outputs, "n_cells": valid.sum().clamp(min=1), "w_expr": flow["w_expr"] * valid}
        outputs["end"] = end_point(flow["x_t"], v_expr, flow["t_expr"])
        if "v_latent" in outputs:
            rows = outputs["latent_rows"]
            outputs |= {"u_latent": flow["u_latent"][rows], "w_latent": (flow["w_latent"] * valid)[rows]}
            if outputs.get("has_latent", valid).ndim > 1:
                outputs["has_latent"] = outputs["has_latent"][rows]
        if FLOW_KEYS.CONDITION in tensors:
            outputs["condition"] = tensors[FLOW_KEYS.CONDITION]
        outputs.update(step_outputs(tensors))
        terms = {objective.name: objective(outputs) for objective in self.objectives}
        return LossOutput(
            loss=torch.stack([o.weight * terms[o.name] for o in self.objectives]).sum(),
            n_obs_minibatch=tensors.get(LOADER_KEYS.N_VALID, len(v_expr)),
            extra_metrics={name: value.detach() for name, value in terms.items()},
        )
