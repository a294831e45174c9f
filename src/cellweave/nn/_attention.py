"""Tabular attention: over the gene tokens inside a cell, then across the cells of a context."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["MultiHeadAttention", "TabularAttentionLayer", "within_cell_heads"]

# Heads narrower than this get special care on the CPU, see `_project`.
_NARROW_HEAD = 16


def within_cell_heads(token_dim: int, n_heads: int) -> int:
    """Number of heads of the within-cell attention for tokens of width ``token_dim``.

    Eight when eight divides the token width, else the largest divisor of the token width that does not exceed
    ``n_heads``; the rule of the published Stack architecture.
    """
    if token_dim % 8 == 0:
        return 8
    return max(h for h in range(1, min(n_heads, token_dim) + 1) if token_dim % h == 0)


class MultiHeadAttention(nn.Module):
    r"""Multi-head self-attention, :math:`\mathrm{softmax}(QK^\top/\sqrt{d_h})V`, through the fused kernel of torch.

    Parameters
    ----------
    dim
        Width of the tokens.
    n_heads
        Number of heads; must divide ``dim``.
    dropout
        Dropout rate on the attention probabilities while training.

    Raises
    ------
    ValueError
        If ``n_heads`` does not divide ``dim``.
    """

    def __init__(self, dim: int, n_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if dim % n_heads:
            raise ValueError(
                f"`n_heads`={n_heads} does not divide the attention width {dim}; choose a divisor of {dim}."
            )
        self.n_heads = n_heads
        self.dropout = dropout
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, n_prompt: int | None = None) -> Tensor:
        """Attend within the sequence axis of ``x``.

        Parameters
        ----------
        x
            Tokens ``(batch, sequence, dim)``.
        n_prompt
            When given, the first ``n_prompt`` positions see only each other while all later positions see everything.
            Two dense calls replace the mask this would otherwise need.

        Returns
        -------
        Tensor ``(batch, sequence, dim)``.
        """
        q, k, v = self._project(x)
        if n_prompt is None or n_prompt in (0, x.shape[1]):
            out = self._attend(q, k, v)
        else:
            prompt = self._attend(q[:, :, :n_prompt], k[:, :, :n_prompt], v[:, :, :n_prompt])
            rest = self._attend(q[:, :, n_prompt:], k, v)
            out = torch.cat([prompt, rest], dim=2)
        return self.proj(out.transpose(1, 2).flatten(2))  # (batch, sequence, dim)

    def attention_map(self, x: Tensor, n_prompt: int | None = None) -> Tensor:
        """Attention probabilities ``(batch, head, sequence, sequence)`` that :meth:`forward` uses implicitly."""
        q, k, _ = self._project(x)
        scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        if n_prompt:
            scores[:, :, :n_prompt, n_prompt:] = -torch.inf
        return scores.softmax(dim=-1)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # rows of qkv.weight are q, k, v, each head-major: (batch, seq, 3, head, width) -> 3 x (batch, head, seq, width)
        qkv = self.qkv(x).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)
        if qkv.device.type == "cpu" and qkv.shape[-1] < _NARROW_HEAD:
            # fused CPU attention over narrow heads wants float32 (bfloat16 is slower there) and contiguous rows
            qkv = (qkv.float() if qkv.dtype == torch.bfloat16 else qkv).contiguous()
        q, k, v = qkv.unbind(0)
        return q, k, v

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # without this, CPU autocast would turn the float32 of `_project` back into bfloat16
        with torch.autocast("cpu", enabled=torch.is_autocast_enabled("cpu") and q.dtype != torch.float32):
            return F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)


class TabularAttentionLayer(nn.Module):
    r"""One post-norm layer over a cells × tokens grid.

    .. math::
        u &= \mathrm{LN}(x + A_\text{within}(x + p)) \\
        g &= \mathrm{LN}(u + A_\text{across}(u)) \\
        x' &= \mathrm{LN}(g + \mathrm{MLP}(g))

    The within-cell attention runs over the gene tokens of one cell, the across-cell attention over the cells of a
    context with all tokens of a cell concatenated. Sub-module names are those of the published checkpoints, where
    ``cell_attn`` is the attention *inside* a cell and ``gene_attn`` the attention *across* cells.

    Parameters
    ----------
    n_tokens
        Gene tokens per cell.
    token_dim
        Width of a token.
    n_heads
        Heads of the across-cell attention; must divide ``n_tokens * token_dim``.
    mlp_ratio
        Expansion of the token-wise MLP.
    dropout
        Dropout rate.
    """

    def __init__(self, n_tokens: int, token_dim: int, n_heads: int, mlp_ratio: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        dim = n_tokens * token_dim
        self.cell_attn = MultiHeadAttention(token_dim, within_cell_heads(token_dim, n_heads), dropout)
        self.cell_norm = nn.LayerNorm(token_dim)
        self.gene_attn = MultiHeadAttention(dim, n_heads, dropout)
        self.gene_norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(
            nn.Linear(token_dim, mlp_ratio * token_dim),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(mlp_ratio * token_dim, token_dim),
            nn.Dropout(dropout),
        )
        self.mlp_norm = nn.LayerNorm(token_dim)

    def forward(self, x: Tensor, position: Tensor, n_prompt: int | None = None) -> Tensor:
        """Update the grid ``x`` of shape ``(context, cell, token, token_dim)``; ``position`` is ``(token, token_dim)``."""
        u = self._within_cells(x, position)
        g = self.gene_norm(u + self.gene_attn(u, n_prompt))  # (context, cell, token * token_dim)
        g = g.view_as(x)
        return self.mlp_norm(g + self.mlp(g))

    def across_cell_map(self, x: Tensor, position: Tensor, n_prompt: int | None = None) -> Tensor:
        """Cell × cell attention ``(context, head, cell, cell)`` of this layer for the grid ``x``."""
        return self.gene_attn.attention_map(self._within_cells(x, position), n_prompt)

    def _within_cells(self, x: Tensor, position: Tensor) -> Tensor:
        u = x.flatten(0, 1)  # (context * cell, token, token_dim)
        # the position enters queries, keys and values of every layer but not the residual stream
        u = self.cell_norm(u + self.cell_attn(u + position))
        return u.view(*x.shape[:2], -1)  # (context, cell, token * token_dim)
