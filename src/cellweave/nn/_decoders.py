"""Velocities of expression and of latent features from the tokens of a cell."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ._adaln import Modulation, modulate
from ._packed_attention import PackedAttention
from ._pairs import PairLinear, PairSequential

__all__ = ["ExpressionDecoder", "LatentDecoder"]


class ExpressionDecoder(nn.Module):
    """One number per gene from its token and the perturbation.

    Parameters
    ----------
    dim
        Width of a token and of the perturbation.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc = PairSequential(
            PairLinear(dim, dim, dim), nn.LeakyReLU(), nn.Linear(dim, dim), nn.LeakyReLU(), nn.Linear(dim, 1)
        )

    def constant(self, perturbation: Tensor) -> Tensor:
        """What :meth:`forward` needs of the perturbation ``(..., dim)``."""
        return self.fc.constant(perturbation)

    def forward(self, x: Tensor, constant: Tensor) -> Tensor:
        """Numbers ``(cell, gene)`` of tokens ``(cell, gene, dim)``."""
        return self.fc(x, constant).squeeze(-1)


class _LatentBlock(nn.Module):
    """Self-attention and an MLP, each with shift, scale and gate of a condition."""

    def __init__(self, dim: int, n_heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attn = PackedAttention(dim, n_heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.adaLN_modulation = Modulation(dim, 6)

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        vectors = self.adaLN_modulation.vectors(condition[:, None])
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = vectors
        h = h + gate * self.attn(modulate(self.norm(h), shift, scale))
        return h + mlp_gate * self.mlp(modulate(self.norm(h), mlp_shift, mlp_scale))


class LatentDecoder(nn.Module):
    """Velocity of latent features, of every gene or of the whole cell; 0 at the start.

    Parameters
    ----------
    dim
        Width of a token.
    latent_dim
        Number of features.
    depth
        Number of blocks.
    n_heads
        Heads of the attention; must divide ``dim``.
    pool
        Give one vector per cell: a learned query attends to the tokens before the blocks.
    """

    def __init__(self, dim: int, latent_dim: int, depth: int = 2, n_heads: int = 8, pool: bool = False) -> None:
        super().__init__()
        self.dh_proj = nn.Linear(dim, dim)
        self.pool = PackedAttention(dim, n_heads) if pool else None
        if pool:
            self.pool_query = nn.Parameter(torch.randn(1, 1, dim))
        self.dh_blocks = nn.ModuleList(_LatentBlock(dim, n_heads) for _ in range(depth))
        self.final = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, latent_dim))
        self.start_at_zero()

    def start_at_zero(self) -> None:
        """Make every block the identity and every velocity 0."""
        for block in self.dh_blocks:
            block.adaLN_modulation.set_zero()  # type: ignore[operator, union-attr]
        for parameter in self.final[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Velocities of tokens ``(cell, gene, dim)`` under the ``condition`` ``(cell or 1, dim)``.

        Returns
        -------
        Tensor ``(cell, gene, latent)``, or ``(cell, latent)`` with ``pool``.
        """
        h = self.dh_proj(x)
        if self.pool is not None:
            h = self.pool(self.pool_query.expand(len(h), -1, -1), h)
        for block in self.dh_blocks:
            h = block(h, condition)
        out = self.final(h)
        return out if self.pool is None else out[:, 0]
