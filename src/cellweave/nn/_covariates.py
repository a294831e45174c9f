"""Covariates of cells as one float matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["CovariateEncoder"]

# Spread of a column, as a share of its mean, below which it is constant but for the digits of float32.
_LEAST_SPREAD = 1e-7


class CovariateEncoder(nn.Module):
    """Categories one-hot, one column per category, then numbers standardised.

    Parameters
    ----------
    n_categories
        Number of categories of each categorical covariate.
    n_continuous
        Number of continuous covariates.

    Attributes
    ----------
    loc, scale
        Mean and standard deviation of the continuous covariates, ``(continuous,)``; see :meth:`standardize`.
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, n_categories: Sequence[int] = (), n_continuous: int = 0) -> None:
        super().__init__()
        self.n_categories, self.n_continuous = tuple(n_categories), n_continuous
        self.register_buffer("loc", torch.zeros(n_continuous))
        self.register_buffer("scale", torch.ones(n_continuous))

    @property
    def n_covariates(self) -> int:
        """Columns of the result."""
        return sum(self.n_categories) + self.n_continuous

    def standardize(self, values: Tensor) -> None:
        """Take location and scale from ``values`` ``(cell, continuous)``; the scale of a constant column is 1."""
        values = values.double()  # in float32 a constant column would have a tiny spread, by which it would be divided
        loc, scale = values.mean(0), values.std(0, correction=0)
        self.loc.copy_(loc)
        self.scale.copy_(torch.where(scale > _LEAST_SPREAD * loc.abs(), scale, 1.0))

    def forward(self, codes: Tensor | None, continuous: Tensor | None = None) -> Tensor:
        """Covariates ``(cell, covariate)``.

        Parameters
        ----------
        codes
            Category of each categorical covariate, int64 ``(cell, categorical)``.
        continuous
            Values of the continuous covariates ``(cell, continuous)``.
        """
        parts = []
        if codes is not None:
            parts = [
                F.one_hot(column, n).to(self.loc.dtype)
                for column, n in zip(codes.unbind(1), self.n_categories, strict=True)
            ]
        if continuous is not None:
            parts.append((continuous.to(self.loc) - self.loc) / self.scale)
        return torch.cat(parts, 1)
