"""What enters a flow over cells: times, expression values, genes, labels and latent features, each as tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ._packed_attention import PackedAttention

__all__ = [
    "ContinuousValueEncoder",
    "GeneEncoder",
    "LabelEncoder",
    "LatentEmbedder",
    "SignedValueEncoder",
    "TimestepEmbedder",
    "timestep_features",
]

# Longest period of the time features, in units of time.
_MAX_PERIOD = 10_000.0


def timestep_features(t: Tensor, n_features: int = 256) -> Tensor:
    r"""Cosines, then sines, of :math:`t\,f_k` with :math:`f_k = 10000^{-k/h}`, :math:`k < h`, half of the features.

    Parameters
    ----------
    t
        Times in [0, 1], any shape.
    n_features
        Number of features; even.

    Returns
    -------
    Tensor of the shape of ``t`` with one more axis ``(..., feature)``.
    """
    half = n_features // 2
    frequency = torch.exp(torch.arange(half, device=t.device, dtype=t.dtype) * (-math.log(_MAX_PERIOD) / half))
    angle = t[..., None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class TimestepEmbedder(nn.Module):
    """A small network on :func:`timestep_features`.

    Parameters
    ----------
    dim
        Width of the output.
    n_features
        Number of time features.
    """

    def __init__(self, dim: int, n_features: int = 256) -> None:
        super().__init__()
        self.n_features = n_features
        self.mlp = nn.Sequential(nn.Linear(n_features, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        """Embeddings ``(..., dim)`` of times of any shape."""
        return self.mlp(timestep_features(t, self.n_features))


class ContinuousValueEncoder(nn.Module):
    """One token per expression value.

    Parameters
    ----------
    dim
        Width of a token.
    dropout
        Dropout rate on the tokens.
    max_value
        Larger values count as this one.
    """

    def __init__(self, dim: int, dropout: float = 0.1, max_value: float = 512.0) -> None:
        super().__init__()
        self.max_value = max_value
        self.linear1 = nn.Linear(1, dim)
        self.linear2 = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens ``(cell, gene, dim)`` of values ``(cell, gene)``."""
        hidden = self.linear1(x.clamp(max=self.max_value)[..., None]).relu()
        return self.dropout(self.norm(self.linear2(hidden)))


class SignedValueEncoder(nn.Module):
    """One token per value that may be negative and whose size matters from the first step on; zero gives zero.

    Parameters
    ----------
    dim
        Width of a token.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.inner = nn.Linear(1, dim, bias=False)
        self.outer = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens ``(cell, gene, dim)`` of values ``(cell, gene)``."""
        return self.outer(self.inner(x[..., None]).tanh())


class LabelEncoder(nn.Module):
    """A learned vector per label.

    Parameters
    ----------
    n_labels
        Number of labels.
    dim
        Width of a vector.
    """

    def __init__(self, n_labels: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_labels, dim)
        self.enc_norm = nn.LayerNorm(dim)

    def forward(self, ids: Tensor) -> Tensor:
        """Vectors ``(..., dim)`` of label codes of any shape."""
        return self.enc_norm(self.embedding(ids))


class _GraphInteraction(nn.Module):
    """One pre-norm layer in which tokens attend to the tokens that a graph allows."""

    def __init__(self, dim: int, n_heads: int, dropout: float) -> None:
        super().__init__()
        self.cross_attn = PackedAttention(dim, n_heads, dropout)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.linear1, self.linear2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, memory: Tensor, allowed: Tensor) -> Tensor:
        attended = self.cross_attn(self.norm1(tokens)[None], memory[None], allowed)[0]
        x = tokens + self.dropout(attended)
        hidden = self.dropout(nn.functional.gelu(self.linear1(self.norm2(x))))
        return x + self.dropout(self.linear2(hidden))


class GeneEncoder(nn.Module):
    """A learned vector per token (gene, or special token), which may depend on the tokens linked to it in a graph.

    The vector depends on the token only, never on the cell, so one table serves all cells, and the vectors of all tokens
    that a step needs should be asked for in one call: while training, they share their dropout.

    Parameters
    ----------
    n_tokens
        Number of tokens.
    dim
        Width of a vector.
    forbidden
        True where the token of the row must not see that of the column ``(token, token)``, such as
        ``cellweave.data.coexpression_mask`` gives. Without it tokens do not interact.
    n_heads
        Heads of the interaction.
    dropout
        Dropout rate of the interaction.

    Raises
    ------
    ValueError
        If the mask has another shape, or leaves a token nothing to see.
    """

    allowed_bits: Tensor

    def __init__(
        self, n_tokens: int, dim: int, forbidden: Tensor | None = None, n_heads: int = 8, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.n_tokens = n_tokens
        self.embedding = nn.Embedding(n_tokens, dim)
        self.enc_norm = nn.LayerNorm(dim)
        self.perturbation_interaction: _GraphInteraction | None = None
        if forbidden is not None:
            self._check(forbidden)
            self.perturbation_interaction = _GraphInteraction(dim, n_heads, dropout)
            # one bit per entry: stored with the model, and small (3 MB for 5,000 genes)
            self.register_buffer("allowed_bits", _pack(~forbidden))

    def forward(self, ids: Tensor) -> Tensor:
        """Vectors ``(..., dim)`` of token ids of any shape."""
        memory = self.enc_norm(self.embedding.weight)
        if self.perturbation_interaction is None:
            return memory[ids]
        tokens, place = ids.unique(return_inverse=True)
        allowed = _unpack(self.allowed_bits[tokens], self.n_tokens)
        return self.perturbation_interaction(memory[tokens], memory, allowed)[place]

    def _check(self, forbidden: Tensor) -> None:
        if forbidden.shape != (self.n_tokens, self.n_tokens):
            raise ValueError(
                f"`forbidden` must have the shape {(self.n_tokens, self.n_tokens)}, got {tuple(forbidden.shape)}; "
                "make it for the tokens of this model."
            )
        if blind := int(forbidden.all(1).sum()):
            first = int(forbidden.all(1).nonzero()[0])
            raise ValueError(
                f"`forbidden` leaves {blind} tokens nothing to see (first: {first}); let every token see itself."
            )


def _pack(allowed: Tensor) -> Tensor:
    """Bits of a bool matrix ``(row, column)`` as uint8 ``(row, column / 8)``."""
    padded = nn.functional.pad(allowed.to(torch.uint8), (0, -allowed.shape[1] % 8))
    return (padded.unflatten(1, (-1, 8)) << torch.arange(8, dtype=torch.uint8)).sum(2, dtype=torch.uint8)


def _unpack(bits: Tensor, n_columns: int) -> Tensor:
    """The bool matrix that :func:`_pack` packed."""
    shift = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits[:, :, None] >> shift) & 1).flatten(1)[:, :n_columns].bool()


class LatentEmbedder(nn.Sequential):
    """Tokens of latent features, through a bottleneck.

    Parameters
    ----------
    latent_dim
        Number of features.
    bottleneck_dim
        Width of the bottleneck.
    dim
        Width of a token.
    """

    def __init__(self, latent_dim: int, bottleneck_dim: int, dim: int) -> None:
        super().__init__(nn.Linear(latent_dim, bottleneck_dim), nn.GELU(), nn.Linear(bottleneck_dim, dim))
