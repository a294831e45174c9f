"""Figures reported beside the loss; they are logged, never optimised."""

from __future__ import annotations

from torch import Tensor

__all__ = ["masked_correlation", "masked_mae"]


def masked_mae(x: Tensor, px_rate: Tensor) -> Tensor:
    """Mean absolute error in counts of each cell; ``x`` and ``px_rate`` are ``(cell, masked gene)``."""
    return (px_rate - x).abs().mean(-1) if x.shape[1] else px_rate.sum(-1)


def masked_correlation(x: Tensor, px_rate: Tensor, eps: float = 1e-8) -> Tensor:
    """Pearson correlation of counts and predicted mean within each cell; zero with fewer than two masked genes.

    ``x`` and ``px_rate`` are ``(cell, masked gene)``.
    """
    if x.shape[1] < 2:
        return px_rate.new_zeros(len(px_rate))
    x_c = x - x.mean(-1, keepdim=True)
    p_c = px_rate - px_rate.mean(-1, keepdim=True)
    norm = (x_c.square().sum(-1) + eps).sqrt() * (p_c.square().sum(-1) + eps).sqrt()
    return (x_c * p_c).sum(-1) / norm
