"""The Stack architecture: tabular attention over a context of cells with a masked negative-binomial objective."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, cast

import torch
from scvi.module.base import BaseModuleClass, LossOutput, auto_move_data
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from cellweave._keys import LOADER_KEYS, REGISTRY_KEYS, STEP_KEYS
from cellweave.nn import TabularAttentionLayer
from cellweave.objective import (
    MaskedNegativeBinomial,
    SlicedWasserstein,
    masked_correlation,
    masked_mae,
    shared_mean,
    step_generator,
    step_outputs,
)

__all__ = ["BatchCondition", "StackModule", "sample_gene_mask"]

BatchCondition = Literal["none", "decoder", "both"]

# Library size to which the input is scaled when `normalize_input` is on: the usual counts per ten thousand.
_INPUT_SCALE = 1e4

# Streams of the random draws of a step.
_MASK, _LOSS = 0, 1


@torch.compiler.disable  # draws stay eager, so that a seed means the same with and without compilation
def sample_gene_mask(n_genes: int, rate_min: float, rate_max: float, generator: Generator | None = None) -> Tensor:
    """Draw the masked genes of one step: a uniform rate, then a uniform subset of ``floor(n_genes * rate)`` genes.

    Returns
    -------
    int64 tensor ``(masked gene,)`` on the CPU.
    """
    rate = torch.empty(()).uniform_(rate_min, rate_max, generator=generator).item()
    return torch.randperm(n_genes, generator=generator)[: int(n_genes * rate)]


class StackModule(BaseModuleClass):
    r"""Stack: gene reduction, tabular attention layers, negative-binomial decoder.

    Log counts of a cell are reduced to a grid of ``n_hidden`` gene tokens of width ``token_dim``; layers alternate
    attention over the tokens inside a cell and across the cells of a context; the decoder gives
    :math:`\mu = \ell\,\mathrm{softmax}(\cdot)` and :math:`\theta = \mathrm{softplus}(\cdot)` per gene. Parameter names
    and shapes are those of the published checkpoints as long as ``batch_condition="none"``.

    Parameters
    ----------
    n_genes
        Number of genes.
    n_batch
        Number of batches known to the decoder and encoder; unused with ``batch_condition="none"``.
    n_hidden
        Gene tokens per cell.
    token_dim
        Width of a token; the embedding of a cell has ``n_hidden * token_dim`` dimensions.
    n_cells
        Cells per context that inference uses by default. No weight depends on it.
    n_layers
        Tabular attention layers.
    n_heads
        Heads of the across-cell attention; must divide ``n_hidden * token_dim``.
    mlp_ratio
        Expansion of the token-wise MLP.
    dropout
        Dropout rate.
    mask_rate_min, mask_rate_max
        Range of the share of genes masked in a step.
    sw_weight
        Weight of the sliced-Wasserstein term.
    n_proj
        Directions of the sliced-Wasserstein term.
    batch_condition
        ``"none"`` is the published model. ``"decoder"`` adds a learned shift per batch to the hidden layer of the
        decoder, which equals concatenating the one-hot batch as scvi-tools does; ``"both"`` also shifts the gene
        tokens, so that the encoder knows the batch.
    normalize_input
        Scale every cell to ten thousand counts before the logarithm. The published model reads raw log counts.

    References
    ----------
    Dong et al., *Stack: in-context learning of single-cell biology*, bioRxiv 10.64898/2026.01.09.698608 (2026).
    """

    def __init__(
        self,
        n_genes: int,
        n_batch: int = 1,
        n_hidden: int = 100,
        token_dim: int = 8,
        n_cells: int = 128,
        n_layers: int = 6,
        n_heads: int = 8,
        mlp_ratio: int = 4,
        dropout: float = 0.1,
        mask_rate_min: float = 0.1,
        mask_rate_max: float = 0.8,
        sw_weight: float = 0.01,
        n_proj: int = 64,
        batch_condition: BatchCondition = "none",
        normalize_input: bool = False,
    ) -> None:
        super().__init__()
        if batch_condition not in ("none", "decoder", "both"):
            raise ValueError(f"`batch_condition` must be 'none', 'decoder' or 'both', got {batch_condition!r}.")
        sizes = {"n_hidden": n_hidden, "token_dim": token_dim, "n_cells": n_cells, "n_heads": n_heads, "n_proj": n_proj}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"`{name}` must be at least 1, got {size}.")
        if not 0 <= mask_rate_min <= mask_rate_max <= 1:
            raise ValueError(
                "`mask_rate_min` and `mask_rate_max` must satisfy 0 <= mask_rate_min <= mask_rate_max <= 1, got "
                f"{mask_rate_min} and {mask_rate_max}."
            )
        dim = n_hidden * token_dim
        self.n_genes, self.n_batch, self.n_cells = n_genes, n_batch, n_cells
        self.n_tokens, self.token_dim = n_hidden, token_dim
        self.mask_rate_min, self.mask_rate_max = mask_rate_min, mask_rate_max
        self.normalize_input = normalize_input

        self.gene_pos_embedding = nn.Parameter(torch.empty(n_hidden, token_dim))
        self.gene_reduction = nn.Sequential(nn.Linear(n_genes, dim), nn.GELU(), nn.Dropout(dropout))
        self.layers = nn.ModuleList(
            TabularAttentionLayer(n_hidden, token_dim, n_heads, mlp_ratio, dropout) for _ in range(n_layers)
        )
        self.output_mlp = nn.Sequential(
            nn.Linear(dim, 2 * dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(2 * dim, 2 * n_genes)
        )
        self.decoder_batch: nn.Embedding | None = nn.Embedding(n_batch, 2 * dim) if batch_condition != "none" else None
        self.encoder_batch: nn.Embedding | None = nn.Embedding(n_batch, dim) if batch_condition == "both" else None
        self.objectives = (MaskedNegativeBinomial(), SlicedWasserstein(sw_weight, n_proj))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as the published model: Xavier-uniform weights, zero biases, standard-normal positions."""
        nn.init.normal_(self.gene_pos_embedding)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
            elif isinstance(layer, nn.Embedding):  # a batch starts without a shift
                nn.init.zeros_(layer.weight)

    # ---------------------------------------------------------------- encoder and decoder

    def encode(
        self,
        x: Tensor,
        n_cells: int,
        batch_index: Tensor | None = None,
        mask_genes: Tensor | None = None,
        n_prompt: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Embed contexts of cells.

        Parameters
        ----------
        x
            Counts ``(cell, gene)``, dense or sparse CSR, set-major: the first ``n_cells`` rows are the first context.
        n_cells
            Cells per context.
        batch_index
            Batch codes ``(cell, 1)``, read with ``batch_condition="both"``.
        mask_genes
            Genes hidden from the encoder, ``(masked gene,)``. They look like measured zeros.
        n_prompt
            When given, the first cells of every context see only each other.

        Returns
        -------
        Embeddings ``(context, cell, token * token_dim)`` and library sizes ``(context * cell, 1)`` in counts.
        """
        x = x.to_dense() if x.layout != torch.strided else x
        library = x.sum(-1, keepdim=True)
        grid = self._tokens(x, library, n_cells, batch_index, mask_genes)
        for layer in self.layers:
            grid = layer(grid, self.gene_pos_embedding, n_prompt)
        return grid.flatten(2), library

    def decode(
        self, z: Tensor, library: Tensor, batch_index: Tensor | None = None, genes: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Negative-binomial parameters from embeddings.

        Parameters
        ----------
        z
            Embeddings ``(cell, token * token_dim)``.
        library
            Library sizes ``(cell, 1)`` in counts.
        batch_index
            Batch codes ``(cell, 1)``, read unless ``batch_condition="none"``.
        genes
            Genes to return, ``(chosen gene,)``; all by default. The softmax always runs over all genes.

        Returns
        -------
        ``px_scale`` (expected share of the library), ``px_rate`` (expected counts) and ``px_r`` (inverse dispersion),
        each ``(cell, chosen gene)``.
        """
        hidden_layer, activation, dropout, last = self.output_mlp
        hidden = hidden_layer(z)
        if self.decoder_batch is not None and batch_index is not None:
            hidden = hidden + self.decoder_batch(batch_index.flatten())
        hidden = dropout(activation(hidden))  # (cell, 2 * dim)
        # rows of the last layer alternate: scale logit and dispersion of gene 0, of gene 1, ...
        last = cast("nn.Linear", last)  # plain attributes: under FSDP they are views, which `get_parameter` refuses
        weight, bias = last.weight.view(self.n_genes, 2, -1), last.bias.view(self.n_genes, 2)
        log_scale = _full_precision(F.linear(hidden, weight[:, 0], bias[:, 0])).log_softmax(-1)
        if genes is not None:
            log_scale, weight, bias = log_scale[:, genes], weight[genes], bias[genes]
        px_r = F.softplus(_full_precision(F.linear(hidden, weight[:, 1], bias[:, 1])))
        px_scale = log_scale.exp()
        return {"px_scale": px_scale, "px_rate": px_scale * library, "px_r": px_r}

    def across_cell_maps(self, x: Tensor, n_cells: int, batch_index: Tensor | None = None) -> Tensor:
        """Attention between the cells of each context: ``(context, layer, head, cell, cell)``, rows sum to one."""
        x = x.to_dense() if x.layout != torch.strided else x
        grid = self._tokens(x, x.sum(-1, keepdim=True), n_cells, batch_index, None)
        maps = []
        for layer in cast("Iterable[TabularAttentionLayer]", self.layers):
            maps.append(layer.across_cell_map(grid, self.gene_pos_embedding))
            grid = layer(grid, self.gene_pos_embedding)
        return torch.stack(maps, dim=1)

    def _tokens(
        self, x: Tensor, library: Tensor, n_cells: int, batch_index: Tensor | None, mask_genes: Tensor | None
    ) -> Tensor:
        features = self.features(x, library, mask_genes)
        linear, activation, dropout = self.gene_reduction
        tokens = linear(features)
        if self.encoder_batch is not None and batch_index is not None:
            tokens = tokens + self.encoder_batch(batch_index.flatten())
        tokens = dropout(activation(tokens))
        return tokens.view(-1, n_cells, self.n_tokens, self.token_dim)

    def features(self, x: Tensor, library: Tensor, mask_genes: Tensor | None = None) -> Tensor:
        """Log counts ``(cell, gene)`` as the encoder reads them, zero at masked genes."""
        scaled = x * (_INPUT_SCALE / library.clamp(min=1)) if self.normalize_input else x
        features = torch.log1p(scaled)
        if mask_genes is not None:
            features[:, mask_genes] = 0  # in place: log1p just made this tensor
        return features

    # ---------------------------------------------------------------- scvi-tools protocol

    def _get_inference_input(self, tensors: dict[str, Any], **_: Any) -> dict[str, Any]:
        x = tensors[REGISTRY_KEYS.X]
        mask_genes = tensors.get(LOADER_KEYS.MASK_GENES)
        if mask_genes is None:
            generator = step_generator(tensors, _MASK)
            mask_genes = sample_gene_mask(self.n_genes, self.mask_rate_min, self.mask_rate_max, generator)
        return {
            "x": x,
            "n_cells": tensors.get(LOADER_KEYS.N_CELLS, x.shape[0]),
            "batch_index": tensors.get(REGISTRY_KEYS.BATCH),
            "mask_genes": mask_genes.to(x.device),
        }

    @auto_move_data
    def inference(
        self, x: Tensor, n_cells: int, batch_index: Tensor | None = None, mask_genes: Tensor | None = None
    ) -> dict[str, Tensor | None]:
        """Embeddings ``z`` ``(context, cell, dim)``, the library sizes and the targets at the masked genes."""
        x = x.to_dense() if x.layout != torch.strided else x
        z, library = self.encode(x, n_cells, batch_index, mask_genes)
        target = x if mask_genes is None else x[:, mask_genes]
        return {"z": z, "library": library, "mask_genes": mask_genes, "target": target}

    def _get_generative_input(
        self, tensors: dict[str, Any], inference_outputs: dict[str, Tensor | None]
    ) -> dict[str, Any]:
        return {
            "z": inference_outputs["z"],
            "library": inference_outputs["library"],
            "batch_index": tensors.get(REGISTRY_KEYS.BATCH),
            "genes": inference_outputs["mask_genes"],
        }

    @auto_move_data
    def generative(
        self, z: Tensor, library: Tensor, batch_index: Tensor | None = None, genes: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Negative-binomial parameters at the masked genes; see :meth:`decode`."""
        return self.decode(z.flatten(0, 1), library, batch_index, genes)

    def loss(
        self,
        tensors: dict[str, Any],
        inference_outputs: dict[str, Any],
        generative_outputs: dict[str, Tensor],
    ) -> LossOutput:
        """Weighted sum of the objectives; every raw term is reported, and in eval mode the masked metrics."""
        target, px_rate = inference_outputs["target"], generative_outputs["px_rate"]
        valid = tensors.get(LOADER_KEYS.VALID)
        valid = px_rate.new_ones(len(px_rate)) if valid is None else valid.to(px_rate)
        outputs = {**generative_outputs, "z": inference_outputs["z"], "target": target, "valid": valid}
        outputs.update(step_outputs(tensors))
        generator = step_generator(tensors, _LOSS)
        terms = {objective.name: objective(outputs, generator) for objective in self.objectives}
        loss = torch.stack([o.weight * terms[o.name] for o in self.objectives]).sum()
        if not self.training:
            for name, per_cell in (("masked_mae", masked_mae), ("masked_corr", masked_correlation)):
                terms[name] = shared_mean(per_cell(target, px_rate), valid, tensors.get(STEP_KEYS.CELLS_PER_PROCESS))
        return LossOutput(
            loss=loss,
            n_obs_minibatch=tensors.get(LOADER_KEYS.N_VALID, len(px_rate)),
            extra_metrics={name: value.detach() for name, value in terms.items()},
        )


def _full_precision(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
