"""Differential attention: the difference of two softmax maps, computed without either map."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._adaln import Modulation, modulate
from ._packed_attention import split_heads

__all__ = ["DiffPerceiverBlock", "DifferentialAttention", "DifferentialTransformerBlock"]

# Standard deviation of the vectors that make lambda, at the start.
_LAMBDA_STD = 0.1


class DifferentialAttention(nn.Module):
    r"""Multi-head attention with the map :math:`\mathrm{softmax}(Q_1K_1^\top) - \lambda\,\mathrm{softmax}(Q_2K_2^\top)`.

    As attention is linear in its map, the result is the difference of two fused calls, so that no (token, token) matrix
    is ever made. Every head is scaled by its root mean square and by :math:`1-\lambda_0`. Values come from ``y``.

    Parameters
    ----------
    dim
        Width of the tokens.
    n_heads
        Number of heads; must divide ``dim``.
    depth
        Number of the block, from 0; sets :math:`\lambda_0 = 0.8 - 0.6\,e^{-0.3\,\mathrm{depth}}`.
    cross
        True: both queries from ``y``, both keys from ``x``. False: the first map is the attention of ``y`` to itself, the
        second that of ``x`` to itself.

    Raises
    ------
    ValueError
        If ``n_heads`` does not divide ``dim``.

    References
    ----------
    Ye et al., *Differential Transformer* (2024); here every map has the full width of a head, as in scDFM,
    arXiv 2602.07103 (2026).
    """

    def __init__(self, dim: int, n_heads: int, depth: int, cross: bool) -> None:
        super().__init__()
        if dim % n_heads:
            raise ValueError(f"`n_heads`={n_heads} does not divide the width {dim}; choose a divisor of {dim}.")
        width = dim // n_heads
        self.n_heads, self.cross = n_heads, cross
        self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * depth)
        self.q_proj_1, self.k_proj_1, self.q_proj_2, self.k_proj_2, self.v_proj, self.out_proj = (
            nn.Linear(dim, dim, bias=False) for _ in range(6)
        )
        self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2 = (
            nn.Parameter(_LAMBDA_STD * torch.randn(width)) for _ in range(4)
        )
        self.subln = nn.RMSNorm(width, eps=1e-5)

    def reference(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys of the second map, each ``(batch, head, token, width)``, where it depends on ``x`` only."""
        return split_heads(self.q_proj_2(x), self.n_heads), split_heads(self.k_proj_2(x), self.n_heads)

    def forward(self, y: Tensor, x: Tensor | None = None, reference: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Attend.

        Parameters
        ----------
        y
            Tokens ``(batch, token, dim)``.
        x
            Tokens of the other input ``(batch, token, dim)``.
        reference
            With ``cross=False``, what :meth:`reference` gives for ``x``, instead of ``x``.

        Returns
        -------
        Tensor ``(batch, token, dim)``.
        """
        heads = self.n_heads
        q1, v = split_heads(self.q_proj_1(y), heads), split_heads(self.v_proj(y), heads)
        if self.cross:
            k1, q2, k2 = (
                split_heads(layer(tokens), heads)
                for layer, tokens in ((self.k_proj_1, x), (self.q_proj_2, y), (self.k_proj_2, x))
            )
        else:
            k1 = split_heads(self.k_proj_1(y), heads)
            q2, k2 = self.reference(x) if reference is None else reference  # type: ignore[arg-type]
        first = F.scaled_dot_product_attention(q1, k1, v)
        second = F.scaled_dot_product_attention(q2.expand_as(q1), k2.expand_as(k1), v)
        out = first - self._lambda().to(first) * second
        # root mean squares in single precision at least, also under autocast
        out = self.subln(out.to(torch.promote_types(out.dtype, torch.float32))) * (1 - self.lambda_init)
        return self.out_proj(out.to(y.dtype).transpose(1, 2).flatten(2))

    def _lambda(self) -> Tensor:
        first = (self.lambda_q1 * self.lambda_k1).sum().exp()
        second = (self.lambda_q2 * self.lambda_k2).sum().exp()
        return first - second + self.lambda_init


class _Mlp(nn.Module):
    """Two linear layers around a GELU (tanh form), with the published names."""

    def __init__(self, dim: int, ratio: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, ratio * dim), nn.Linear(ratio * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class DifferentialTransformerBlock(nn.Module):
    """Differential attention and an MLP, each with shift, scale and gate of a condition.

    Parameters
    ----------
    dim
        Width of the tokens.
    n_heads
        Number of heads; must divide ``dim``.
    depth
        Number of the block, from 0.
    cross
        See :class:`DifferentialAttention`.
    mlp_ratio
        Expansion of the MLP.
    """

    def __init__(self, dim: int, n_heads: int, depth: int, cross: bool, mlp_ratio: int = 4) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attn = DifferentialAttention(dim, n_heads, depth, cross)
        self.mlp = _Mlp(dim, mlp_ratio)
        self.adaLN_modulation = Modulation(dim, 6)

    def forward(
        self,
        y: Tensor,
        condition: Tensor,
        x: Tensor | None = None,
        reference: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Update tokens.

        Parameters
        ----------
        y
            Tokens ``(cell, token, dim)``.
        condition
            Condition of every cell ``(cell, dim)``, or one row for all.
        x
            Other input of the attention, which enters as it is ``(cell, token, dim)``.
        reference
            Instead of ``x``, see :class:`DifferentialAttention`.

        Returns
        -------
        Tensor ``(cell, token, dim)``.
        """
        vectors = self.adaLN_modulation.vectors(condition[:, None])
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = vectors
        y = y + gate * self.attn(modulate(self.norm(y), shift, scale), x, reference)
        return y + mlp_gate * self.mlp(modulate(self.norm(y), mlp_shift, mlp_scale))


class DiffPerceiverBlock(nn.Module):
    """Attention of the stream to its own keys, then attention less that of the control cell's tokens to themselves.

    The control cell gives queries and keys of the map that is subtracted, never values.

    Parameters
    ----------
    dim
        Width of the tokens.
    n_heads
        Number of heads; must divide ``dim``.
    depth
        Number of the block, from 0.
    """

    def __init__(self, dim: int, n_heads: int, depth: int) -> None:
        super().__init__()
        self.diff_self_attn = DifferentialTransformerBlock(dim, n_heads, depth, cross=True)
        self.diff_cross_attn = DifferentialTransformerBlock(dim, n_heads, depth, cross=False)

    def constant(self, control: Tensor) -> tuple[Tensor, Tensor]:
        """What :meth:`forward` needs of the control tokens ``(cell, token, dim)``; it does not depend on the stream."""
        return self.diff_cross_attn.attn.reference(control)

    def forward(self, y: Tensor, condition: Tensor, constant: tuple[Tensor, Tensor]) -> Tensor:
        """Update the stream ``(cell, token, dim)`` under the ``condition`` ``(cell or 1, dim)``."""
        y = self.diff_self_attn(y, condition, x=y)
        return self.diff_cross_attn(y, condition, reference=constant)
