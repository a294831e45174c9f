"""Layer norms whose shift, scale and gate come from a condition."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["GeneAdaLN", "Modulation", "modulate"]


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``x * (1 + scale) + shift``."""
    return x * (1 + scale) + shift


class Modulation(nn.Sequential):
    """Vectors that a condition gives to a block.

    Parameters
    ----------
    dim
        Width of the condition and of each vector.
    n_vectors
        Number of vectors.
    """

    def __init__(self, dim: int, n_vectors: int) -> None:
        super().__init__(nn.SiLU(), nn.Linear(dim, n_vectors * dim))
        self.n_vectors = n_vectors

    def set_zero(self) -> None:
        """Make all vectors zero, so that a gated block is the identity."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def vectors(self, condition: Tensor) -> tuple[Tensor, ...]:
        """The vectors, each of the shape of the condition ``(..., dim)``."""
        return self(condition).chunk(self.n_vectors, dim=-1)


class GeneAdaLN(nn.Module):
    r"""Tokens changed by their gene, :math:`x + g\,(\mathrm{LN}(x)\,s + b)` with :math:`b, g, s` of the gene.

    Parameters
    ----------
    dim
        Width of a token.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.adaLN_modulation = Modulation(dim, 3)
        self.norm = nn.LayerNorm(dim)

    def constant(self, gene: Tensor) -> tuple[Tensor, ...]:
        """Shift, gate and scale of gene vectors ``(..., gene, dim)``: they do not depend on the cell."""
        return self.adaLN_modulation.vectors(gene)

    def forward(self, x: Tensor, constant: tuple[Tensor, ...]) -> Tensor:
        """Tokens ``(cell, gene, dim)`` after the change."""
        shift, gate, scale = constant
        return x + gate * (self.norm(x) * scale + shift)
