"""What is known of a perturbation beyond its name: a representation, and a dose."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["DoseResponse", "TokenDescriptions"]


class TokenDescriptions(nn.Module):
    """Vectors of tokens from given features, such as fingerprints of drugs or embeddings of proteins.

    A token that was not trained has no vector of its own, only the one that its features give. So that these can stand
    alone, training sometimes hides the own vector of a described token.

    Parameters
    ----------
    n_tokens
        Number of tokens.
    n_described
        Number of tokens with features.
    n_features
        Number of features.
    dim
        Width of a vector.
    hide
        Probability that a described token is seen without its own vector in training.

    Attributes
    ----------
    features
        Features, standardised ``(described, feature)``; see :meth:`describe`.
    place
        Row of every token among them ``(token,)``, -1 without features.
    own
        Whether a token has a vector of its own ``(token,)``.
    """

    features: Tensor
    place: Tensor
    own: Tensor

    def __init__(self, n_tokens: int, n_described: int, n_features: int, dim: int, hide: float = 0.25) -> None:
        super().__init__()
        self.hide = hide
        self.register_buffer("features", torch.zeros(n_described, n_features))
        self.register_buffer("place", torch.full((n_tokens,), -1))
        self.register_buffer("own", torch.ones(n_tokens, dtype=torch.bool))
        self.project = nn.Sequential(nn.Linear(n_features, dim), nn.GELU(), nn.Linear(dim, dim))

    def describe(self, tokens: Tensor, features: Tensor, trained: Tensor) -> None:
        """Store what is known.

        Parameters
        ----------
        tokens
            Tokens with features ``(described,)``.
        features
            Their features ``(described, feature)``; standardised here, over the tokens that were trained.
        trained
            Whether each of them was in the training data ``(described,)``.
        """
        used = features[trained] if trained.sum() > 1 else features
        spread = used.std(0, correction=0)
        self.features.copy_((features - used.mean(0)) / torch.where(spread > 0, spread, 1.0))
        self.place[tokens] = torch.arange(len(tokens))
        self.own[tokens] = trained

    def forward(self, ids: Tensor, vectors: Tensor) -> Tensor:
        """Vectors ``(..., dim)`` of tokens ``(...)`` from their own vectors and their features."""
        place, own = self.place[ids], self.own[ids]
        described = place >= 0
        if self.training and self.hide:
            own = own & ~(described & (torch.rand(ids.shape, device=ids.device) < self.hide))
        told = self.project(self.features[place.clamp(min=0)])
        return vectors * own[..., None] + told * described[..., None]


class DoseResponse(nn.Module):
    """Scale the vector of a perturbation by its dose.

    Every component has a Hill curve of the dose with a learned half-dose and slope, which rises from 0 at no dose to its
    maximum; at the usual dose 1 it starts at half.

    Parameters
    ----------
    dim
        Width of a vector.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.log_half = nn.Parameter(torch.zeros(dim))
        self.log_slope = nn.Parameter(torch.zeros(dim))

    def forward(self, vectors: Tensor, dose: Tensor) -> Tensor:
        """Vectors ``(..., dim)`` at doses ``(...)`` in units of the usual dose."""
        logit = self.log_slope.exp() * (dose.clamp(min=1e-8).log()[..., None] - self.log_half)
        return 2 * vectors * logit.sigmoid()
