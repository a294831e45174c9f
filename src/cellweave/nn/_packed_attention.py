from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["PackedAttention", "split_heads"]

# On the CPU, with fewer allowed pairs than this share, going from pair to pair is faster than a dense map with a mask.
_SPARSE = 0.05


def split_heads(x: Tensor, n_heads: int) -> Tensor:
    """``(batch, token, dim)`` as contiguous ``(batch, head, token, width)``: fused CPU attention is slow on strided rows."""
    return x.unflatten(-1, (n_heads, -1)).transpose(1, 2).contiguous()


class PackedAttention(nn.Module):
    """Multi-head attention with the parameters of ``nn.MultiheadAttention``, always through the fused kernel of torch.

    ``nn.MultiheadAttention`` computes the whole map of all tokens while evaluating, which for 5,000 genes is 0.8 GB for
    every cell.

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
            raise ValueError(f"`n_heads`={n_heads} does not divide the width {dim}; choose a divisor of {dim}.")
        self.n_heads = n_heads
        self.dropout = dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, query: Tensor, memory: Tensor | None = None, allowed: Tensor | None = None) -> Tensor:
        """Attend from ``query`` to ``memory``.

        Parameters
        ----------
        query
            Tokens ``(batch, query, dim)``.
        memory
            Tokens ``(batch, key, dim)``; the queries by default.
        allowed
            True where a query may see a key ``(query, key)``; everywhere by default.

        Returns
        -------
        Tensor ``(batch, query, dim)``.
        """
        if memory is None:
            parts = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        else:
            dim = query.shape[-1]
            q = F.linear(query, self.in_proj_weight[:dim], self.in_proj_bias[:dim])
            k, v = F.linear(memory, self.in_proj_weight[dim:], self.in_proj_bias[dim:]).chunk(2, dim=-1)
            parts = (q, k, v)
        q, k, v = (split_heads(part, self.n_heads) for part in parts)
        dropout = self.dropout if self.training else 0.0
        # elsewhere the sums over pairs would depend on the order in which threads arrive
        if allowed is not None and q.device.type == "cpu" and allowed.sum() < _SPARSE * allowed.numel():
            out = _attend_pairs(q, k, v, allowed, dropout)
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=dropout)
        return self.out_proj(out.transpose(1, 2).flatten(2))


def _attend_pairs(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, dropout: float) -> Tensor:
    """Attention ``(batch, head, query, width)`` over the allowed pairs only; every query has one."""
    query, key = allowed.nonzero(as_tuple=True)  # (pair,), sorted by query
    logits = (q[:, :, query] * k[:, :, key]).sum(-1) * q.shape[-1] ** -0.5  # (batch, head, pair)
    groups = query.expand_as(logits)
    highest = logits.new_full(q.shape[:3], -torch.inf).scatter_reduce(2, groups, logits.detach(), "amax")
    weights = (logits - highest[:, :, query]).exp()
    total = torch.zeros_like(highest).index_add(2, query, weights)
    weights = F.dropout(weights / total[:, :, query], dropout)
    return torch.zeros_like(q).index_add(2, query, weights[..., None] * v[:, :, key])
