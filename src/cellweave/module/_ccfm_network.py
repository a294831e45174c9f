"""The network of the cascaded flow: from noisy expression and noisy features to their velocities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from cellweave.nn import (
    ContinuousValueEncoder,
    CovariateEncoder,
    DiffPerceiverBlock,
    DoseResponse,
    ExpressionDecoder,
    GeneAdaLN,
    GeneEncoder,
    LabelEncoder,
    LatentDecoder,
    LatentEmbedder,
    PairLinear,
    PairSequential,
    SignedValueEncoder,
    TimestepEmbedder,
    TokenDescriptions,
)

__all__ = [
    "NOTHING",
    "UNKNOWN",
    "ControlConstants",
    "FlowLayout",
    "LatentLevel",
    "PerturbationConstants",
    "TwoStreamNetwork",
]

# What stands in a slot of a perturbation where there is no token: nothing, or something that training did not see.
NOTHING, UNKNOWN = -1, -2

FlowLayout = Literal["ccfm", "scdfm"]
LatentLevel = Literal["gene", "cell"]


class ControlConstants(NamedTuple):
    """What depends on genes and control cells only, the same at all times and under all perturbations."""

    gene: Tensor  # (gene, dim)
    fusion: Tensor  # (cell, gene, dim): share of the control cell in the expression tokens
    references: tuple[tuple[Tensor, Tensor], ...]  # per block: queries and keys (cell, head, gene, width)
    gene_vectors: tuple[tuple[Tensor, ...], ...]  # per block: shift, gate and scale (gene, dim)


class PerturbationConstants(NamedTuple):
    """What depends on the perturbation only; the first axis is 1 where all cells share it."""

    vector: Tensor  # (cell, dim)
    adapters: tuple[Tensor, ...]  # per block: (cell, 1, dim)
    decoder: Tensor  # (cell, 1, dim)
    gate: Tensor | None = None  # likewise, of the head of zeros


class TwoStreamNetwork(nn.Module):
    """Gene tokens of noisy expression and noisy features, a backbone that sees control cell and perturbation, two heads.

    What stays the same while a differential equation is solved is computed apart, by :meth:`read_control` and
    :meth:`read_perturbation`; every path through the network uses it, so that training and sampling are one formula.

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
        Heads of all attention layers but that of the gene graph; must divide ``n_hidden``.
    encoder_heads
        Heads of the interaction along the gene graph; ``n_heads`` by default.
    bottleneck_dim
        Width of the bottleneck of the features.
    decoder_depth
        Blocks of the head of the features.
    dropout
        Dropout rate.
    layout
        ``"ccfm"``: gene vectors join after the fusion, perturbation and both times make the condition. ``"scdfm"``: the
        published single-stream model, gene vectors join before, the time alone is the condition.
    adapter_residual
        Add the adapters to the stream; the published model replaces the stream by them.
    zero_init
        Start with blocks that are the identity and velocities of zero; the published model starts with random ones.
    perturbation_head
        Add the published head that predicts the perturbation vector.
    anchored
        Read the expected change of every gene beside the control cell.
    zero_gate
        Add the head that tells how likely a gene of a cell is zero.

    Raises
    ------
    ValueError
        If an argument is out of range or does not go with another.

    References
    ----------
    scDFM, arXiv 2602.07103 (2026).
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
        anchored: bool = False,
        zero_gate: bool = False,
    ) -> None:
        super().__init__()
        _check(n_tokens, n_latent, latent_level, n_hidden, n_layers, n_heads, layout)
        self.layout, self.latent_level, self.n_latent = layout, latent_level, n_latent
        self.n_hidden, self.adapter_residual = n_hidden, adapter_residual
        self.encoder = GeneEncoder(n_tokens, n_hidden, forbidden, encoder_heads or n_heads, dropout)
        self.perturbation_embedder = LabelEncoder(n_labels, n_hidden) if n_labels else None
        self.p_mask_embed = nn.Parameter(0.02 * torch.randn(n_hidden))
        self.value_encoder_1 = ContinuousValueEncoder(n_hidden, dropout)
        self.value_encoder_2 = ContinuousValueEncoder(n_hidden, dropout)
        self.anchor_encoder = SignedValueEncoder(n_hidden) if anchored else None
        self.fusion_layer = PairSequential(
            PairLinear(n_hidden, n_hidden, n_hidden), nn.GELU(), nn.Linear(n_hidden, n_hidden), nn.LayerNorm(n_hidden)
        )
        self.t_embedder = TimestepEmbedder(n_hidden) if layout == "scdfm" else None
        self.t_expr_embedder = TimestepEmbedder(n_hidden) if layout == "ccfm" else None
        self.t_latent_embedder = TimestepEmbedder(n_hidden) if n_latent else None
        self.latent_embedder = LatentEmbedder(n_latent, bottleneck_dim, n_hidden) if n_latent else None
        self.blocks = nn.ModuleList(DiffPerceiverBlock(n_hidden, n_heads, i) for i in range(n_layers))
        self.gene_adaLN = nn.ModuleList(GeneAdaLN(n_hidden) for _ in range(n_layers))
        self.adapter_layer = nn.ModuleList(_adapter(n_hidden, dropout) for _ in range(n_layers))
        self.final_layer = ExpressionDecoder(n_hidden)
        self.gate_layer = ExpressionDecoder(n_hidden) if zero_gate else None
        self.p_head = (
            nn.Sequential(nn.LayerNorm(n_hidden), nn.Linear(n_hidden, n_hidden)) if perturbation_head else None
        )
        self.latent_decoder: LatentDecoder | None = None
        if n_latent:
            self.latent_decoder = LatentDecoder(n_hidden, n_latent, decoder_depth, n_heads, latent_level == "cell")
        self.descriptions: TokenDescriptions | None = None
        self.dose_response: DoseResponse | None = None
        self.covariate_encoder: CovariateEncoder | None = None
        self.covariate_layer: nn.Linear | None = None
        self._initialise(zero_init)

    def tell_more(
        self, described: tuple[int, int] | None = None, dosed: bool = False, n_categories: Sequence[int] = ()
    ) -> None:
        """Let the network read more than names of perturbations.

        Parameters
        ----------
        described
            Number of tokens with given features, and of these features; see :class:`~cellweave.nn.TokenDescriptions`.
        dosed
            Read doses.
        n_categories
            Number of categories of every covariate.
        """
        if described is not None:
            self.descriptions = TokenDescriptions(self.encoder.n_tokens, *described, self.n_hidden)
        if dosed:
            self.dose_response = DoseResponse(self.n_hidden)
        if n_categories:
            self.covariate_encoder = CovariateEncoder(n_categories)
            self.covariate_layer = nn.Linear(self.covariate_encoder.n_covariates, self.n_hidden, bias=False)
            nn.init.normal_(self.covariate_layer.weight, std=0.02)

    # ---------------------------------------------------------------- what stays the same along the flow

    def read_tokens(
        self, genes: Tensor, perturbation: Tensor, dose: Tensor | None = None, covariates: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Vectors of genes ``(gene, dim)`` and of perturbations ``(cell or 1, dim)``, from one table.

        Parameters
        ----------
        genes
            Token of every gene ``(gene,)``.
        perturbation
            Tokens, or labels, of what was perturbed ``(cell or 1, slot)``; ``NOTHING`` is left out, ``UNKNOWN`` is something
            that training did not see. The vector is their mean, and zero where none is left.
        dose
            Their doses in units of the usual ones ``(cell or 1, slot)``; the usual ones by default.
        covariates
            Codes of the covariates ``(cell or 1, column)``, which move the vector.
        """
        present, known, ids = perturbation != NOTHING, perturbation >= 0, perturbation.clamp(min=0)
        if self.perturbation_embedder is not None:
            gene, parts = self.encoder(genes), self.perturbation_embedder(ids)
        else:
            vectors = self.encoder(torch.cat([genes, ids.flatten()]))
            gene, parts = vectors[: len(genes)], vectors[len(genes) :].view(*ids.shape, -1)
        if self.descriptions is not None:
            parts = self.descriptions(ids, parts)
        parts = torch.where(known[..., None], parts, self.p_mask_embed)
        if self.dose_response is not None and dose is not None:
            parts = self.dose_response(parts, dose)
        used = present[..., None].to(parts)
        vector = (parts * used).sum(1) / used.sum(1).clamp(min=1)
        if self.covariate_layer is not None and self.covariate_encoder is not None and covariates is not None:
            vector = vector + self.covariate_layer(self.covariate_encoder(covariates))
        return gene, vector

    def read_control(self, gene: Tensor, control: Tensor, anchor: Tensor | None = None) -> ControlConstants:
        """Constants of gene vectors ``(gene, dim)``, the expression of control cells and their anchor ``(cell, gene)``."""
        tokens = self.value_encoder_2(control)
        if self.layout == "scdfm":
            tokens = tokens + gene
        fused = tokens
        if self.anchor_encoder is not None:
            fused = tokens + self.anchor_encoder(torch.zeros_like(control) if anchor is None else anchor)
        return ControlConstants(
            gene,
            self.fusion_layer.constant(fused),
            tuple(cast("DiffPerceiverBlock", block).constant(tokens) for block in self.blocks),
            tuple(cast("GeneAdaLN", layer).constant(gene) for layer in self.gene_adaLN),
        )

    def read_perturbation(self, vector: Tensor) -> PerturbationConstants:
        """Constants of perturbation vectors ``(cell or 1, dim)``."""
        rows = vector[:, None]
        adapters = tuple(cast("PairSequential", adapter).constant(rows) for adapter in self.adapter_layer)
        gate = None if self.gate_layer is None else self.gate_layer.constant(rows)
        return PerturbationConstants(vector, adapters, self.final_layer.constant(rows), gate)

    def null_perturbation(self) -> PerturbationConstants:
        """Constants of "some perturbation", which training learns where it hides the perturbation."""
        return self.read_perturbation(self.p_mask_embed[None])

    # ---------------------------------------------------------------- the parts of a velocity

    def expression_tokens(self, x: Tensor, control: ControlConstants) -> Tensor:
        """Tokens ``(cell, gene, dim)`` of noisy expression ``(cell, gene)`` beside its control cell."""
        tokens = self.value_encoder_1(x)
        if self.layout == "scdfm":
            return self.fusion_layer(tokens + control.gene, control.fusion)
        return self.fusion_layer(tokens, control.fusion) + control.gene

    def latent_tokens(self, z: Tensor) -> Tensor:
        """Tokens ``(cell, gene or 1, dim)`` of noisy features ``(cell, gene, latent)`` or ``(cell, latent)``."""
        tokens = cast("LatentEmbedder", self.latent_embedder)(z)
        return tokens if self.latent_level == "gene" else tokens[:, None]

    def condition(self, t_expr: Tensor, t_latent: Tensor | None, perturbation: PerturbationConstants) -> Tensor:
        """Condition of the blocks ``(cell or 1, dim)`` at times ``(cell or 1,)``."""
        if self.t_embedder is not None:
            return self.t_embedder(t_expr)
        c = cast("TimestepEmbedder", self.t_expr_embedder)(t_expr) + perturbation.vector
        return c if self.t_latent_embedder is None or t_latent is None else c + self.t_latent_embedder(t_latent)

    def backbone(
        self, x: Tensor, condition: Tensor, control: ControlConstants, perturbation: PerturbationConstants
    ) -> Tensor:
        """Tokens ``(cell, gene, dim)`` after all blocks."""
        layers = zip(self.gene_adaLN, self.adapter_layer, self.blocks, strict=True)
        for i, (gene_norm, adapter, block) in enumerate(layers):
            x = gene_norm(x, control.gene_vectors[i])
            adapted = adapter(x, perturbation.adapters[i])
            x = x + adapted if self.adapter_residual else adapted
            x = block(x, condition, control.references[i])
        return x

    def expression_velocity(self, x: Tensor, perturbation: PerturbationConstants) -> Tensor:
        """Velocity of the expression ``(cell, gene)`` from tokens of the backbone."""
        return self.final_layer(x, perturbation.decoder)

    def zero_logit(self, x: Tensor, perturbation: PerturbationConstants) -> Tensor:
        """Log odds that a gene of a cell is zero ``(cell, gene)``, from tokens of the backbone."""
        return cast("ExpressionDecoder", self.gate_layer)(x, cast("Tensor", perturbation.gate))

    def latent_velocity(self, x: Tensor, condition: Tensor) -> Tensor:
        """Velocity of the features, of their shape, from tokens of the backbone."""
        return cast("LatentDecoder", self.latent_decoder)(x, condition)

    def perturbation_from_tokens(self, x: Tensor) -> Tensor:
        """Perturbation vector ``(cell, dim)`` that the tokens of the backbone tell."""
        return cast("nn.Sequential", self.p_head)(x.mean(1))

    def _initialise(self, zero: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.latent_decoder is not None:
            self.latent_decoder.start_at_zero()
        if not zero:
            return
        for block in cast("list[DiffPerceiverBlock]", self.blocks):
            block.diff_self_attn.adaLN_modulation.set_zero()
            block.diff_cross_attn.adaLN_modulation.set_zero()
        heads = [self.final_layer] if self.gate_layer is None else [self.final_layer, self.gate_layer]
        for head in heads:
            nn.init.zeros_(cast("nn.Linear", head.fc[-1]).weight)


def _adapter(dim: int, dropout: float) -> PairSequential:
    return PairSequential(
        PairLinear(dim, dim, dim), nn.LeakyReLU(), nn.Dropout(dropout), nn.Linear(dim, dim), nn.LeakyReLU()
    )


def _check(
    n_tokens: int, n_latent: int, latent_level: str, n_hidden: int, n_layers: int, n_heads: int, layout: str
) -> None:
    sizes = {"n_tokens": n_tokens, "n_hidden": n_hidden, "n_layers": n_layers, "n_heads": n_heads}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"`{name}` must be at least 1, got {size}; choose a positive number.")
    if n_latent < 0:
        raise ValueError(f"`n_latent` must not be negative, got {n_latent}; use 0 for a model without features.")
    for name, value, known in (("layout", layout, ("ccfm", "scdfm")), ("latent_level", latent_level, ("gene", "cell"))):
        if value not in known:
            raise ValueError(f"`{name}` must be {known[0]!r} or {known[1]!r}, got {value!r}; choose one of them.")
    if layout == "scdfm" and n_latent:
        raise ValueError(f"`layout`='scdfm' has no latent stream, got `n_latent`={n_latent}; use `layout`='ccfm'.")
