"""The cascaded flow as its published layers compute it, without any rewrite: the reference of ``benchmarks/ccfm.py``.

It reads the weights of a :class:`cellweave.module.CascadedFlowModule`, so that both compute the same function:

* attention by explicit (gene, gene) maps, also in torch's multi-head attention, which makes them by default,
* the vectors of genes and of the perturbation anew for every cell and every call, with the memory repeated per cell,
* concatenated inputs, although one half is the same for all genes or at all times,
* both heads at every call, although a stage of the sampling needs one,
* all states of a solution kept in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cellweave.module import CascadedFlowModule

State = Tensor
Field = Callable[[float, State], State]


class NaiveFlow:
    """Velocities and solutions of the flow of a module, composed layer by layer.

    Parameters
    ----------
    module
        Owner of the weights, with ``layout="ccfm"``, gene tokens as perturbations and, if any, features of every gene.
    """

    def __init__(self, module: CascadedFlowModule) -> None:
        self.module: Any = module

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
    ) -> dict[str, Tensor]:
        """Velocities of all cells; arguments and result as those of ``CascadedFlowModule.generative``."""
        m = self.module
        gene = self._genes(genes.expand(len(control), -1))
        p = self._genes(perturbation).mean(1)
        if hidden is not None:
            p = torch.where(hidden[:, None], m.p_mask_embed, p)
        noisy, known = m.value_encoder_1(x_t), m.value_encoder_2(control)
        x = _sequence(m.fusion_layer, torch.cat([noisy, known], -1)) + gene
        condition = m.t_expr_embedder(t_expr) + p
        if z_t is not None:
            x, condition = x + m.latent_embedder(z_t), condition + m.t_latent_embedder(t_latent)
        beside = p[:, None].expand(-1, x.shape[1], -1)
        for gene_norm, adapter, block in zip(m.gene_adaLN, m.adapter_layer, m.blocks, strict=True):
            shift, gate, scale = gene_norm.adaLN_modulation(gene).chunk(3, -1)
            x = x + gate * (gene_norm.norm(x) * scale + shift)
            adapted = _sequence(adapter, torch.cat([x, beside], -1))
            x = x + adapted if m.adapter_residual else adapted
            x = _block(block.diff_self_attn, x, x, condition)
            x = _block(block.diff_cross_attn, x, known, condition)
        out = {"v_expr": _sequence(m.final_layer.fc, torch.cat([x, beside], -1)).squeeze(-1)}
        if z_t is not None:
            rows = torch.arange(len(x), device=x.device)
            out |= {"latent_rows": rows, "v_latent": _decode_latent(m.latent_decoder, x, condition)}
        return out

    @torch.no_grad()
    def sample(
        self, genes: Tensor, control: Tensor, perturbation: Tensor, start: Tensor, latent: Tensor | None, times: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Expression and features at the ends of both stages, each solved by the midpoint rule at ``times``."""
        zeros, ones = torch.zeros(len(control)), torch.ones(len(control))

        def both(x: Tensor, t_expr: Tensor, z: Tensor | None, t_latent: Tensor) -> dict[str, Tensor]:
            return self.generative(control, genes, perturbation, x, t_expr, z, None if z is None else t_latent)

        if latent is not None:
            latent = _trajectory(lambda t, z: both(start, zeros, z, zeros + t)["v_latent"], latent, times)[-1]
        return _trajectory(lambda t, x: both(x, zeros + t, latent, ones)["v_expr"], start, times)[-1], latent

    def _genes(self, ids: Tensor) -> Tensor:
        """Vectors ``(cell, token, dim)`` of tokens ``(cell, token)``, for every cell on its own."""
        encoder = self.module.encoder
        memory = encoder.enc_norm(encoder.embedding.weight)
        interaction, tokens = encoder.perturbation_interaction, memory[ids]
        if interaction is None:
            return tokens
        # the mask of the first cell serves all, as published; here all cells have the same tokens
        forbidden = self._forbidden[ids[0]]
        repeated = memory.repeat(len(ids), 1, 1)
        attended = _attention(interaction.cross_attn, interaction.norm1(tokens), repeated, forbidden)
        x = tokens + interaction.dropout(attended)
        hidden = interaction.dropout(F.gelu(interaction.linear1(interaction.norm2(x))))
        return x + interaction.dropout(interaction.linear2(hidden))

    @property
    def _forbidden(self) -> Tensor:
        """The gene graph, one byte per pair of tokens; unpacked once."""
        if not hasattr(self, "_mask"):
            encoder = self.module.encoder
            bits = (encoder.allowed_bits[:, :, None] >> torch.arange(8, dtype=torch.uint8)) & 1
            self._mask = ~bits.flatten(1)[:, : encoder.n_tokens].bool()
        return self._mask


def _sequence(layers: Any, x: Tensor) -> Tensor:
    """Layers one after the other, the first on its two inputs as one."""
    first, *rest = layers
    x = F.linear(x, first.weight, first.bias)
    for layer in rest:
        x = layer(x)
    return x


def _block(block: Any, y: Tensor, x: Tensor, condition: Tensor) -> Tensor:
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = block.adaLN_modulation(condition)[:, None].chunk(6, -1)
    y = y + gate * _differential_attention(block.attn, block.norm(y) * (1 + scale) + shift, x)
    return y + mlp_gate * block.mlp(block.norm(y) * (1 + mlp_scale) + mlp_shift)


def _differential_attention(layer: Any, y: Tensor, x: Tensor) -> Tensor:
    """Both maps, their difference, and the difference times the values."""

    def heads(projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (layer.n_heads, -1)).transpose(1, 2)

    q1, v = heads(layer.q_proj_1(y)), heads(layer.v_proj(y))
    if layer.cross:
        k1, q2, k2 = heads(layer.k_proj_1(x)), heads(layer.q_proj_2(y)), heads(layer.k_proj_2(x))
    else:
        k1, q2, k2 = heads(layer.k_proj_1(y)), heads(layer.q_proj_2(x)), heads(layer.k_proj_2(x))
    scaling = q1.shape[-1] ** -0.5
    first = ((q1 * scaling) @ k1.transpose(-1, -2)).softmax(-1)
    second = ((q2 * scaling) @ k2.transpose(-1, -2)).softmax(-1)
    factor = (layer.lambda_q1 * layer.lambda_k1).sum().exp() - (layer.lambda_q2 * layer.lambda_k2).sum().exp()
    out = layer.subln((first - (factor + layer.lambda_init) * second) @ v) * (1 - layer.lambda_init)
    return layer.out_proj(out.transpose(1, 2).flatten(2))


def _attention(layer: Any, query: Tensor, memory: Tensor, forbidden: Tensor | None = None) -> Tensor:
    """What ``torch.nn.MultiheadAttention`` computes when it is called without further arguments."""
    query, memory = query.transpose(0, 1), memory.transpose(0, 1)
    weights = (layer.in_proj_weight, layer.in_proj_bias, None, None, False, layer.dropout if layer.training else 0.0)
    out, _ = F.multi_head_attention_forward(
        query, memory, memory, query.shape[-1], layer.n_heads, *weights, layer.out_proj.weight, layer.out_proj.bias,
        training=layer.training, attn_mask=forbidden,
    )  # fmt: skip
    return out.transpose(0, 1)


def _decode_latent(decoder: Any, x: Tensor, condition: Tensor) -> Tensor:
    h = decoder.dh_proj(x)
    for block in decoder.dh_blocks:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = block.adaLN_modulation(condition)[:, None].chunk(6, -1)
        y = block.norm(h) * (1 + scale) + shift
        h = h + gate * _attention(block.attn, y, y)
        h = h + mlp_gate * block.mlp(block.norm(h) * (1 + mlp_scale) + mlp_shift)
    return decoder.final(h)


def _trajectory(velocity: Field, state: State, times: Tensor) -> Tensor:
    """States at all times ``(time, ...)``."""
    states, grid = [state], times.tolist()
    for t, after in zip(grid[:-1], grid[1:], strict=True):
        half = (after - t) / 2
        states.append(states[-1] + 2 * half * velocity(t + half, states[-1] + half * velocity(t, states[-1])))
    return torch.stack(states)
