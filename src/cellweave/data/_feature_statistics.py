"""Features on the scale that a flow from standard normal noise needs, and fewer of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from cellweave.stats import Moments

__all__ = ["FeatureCompression", "FeatureStatistics"]

_EPS = 1e-6


class FeatureStatistics:
    """Mean and variance of every feature over cells, and over the genes that have features; in float64.

    Parameters
    ----------
    dim
        Number of features.
    warmup_batches
        Number of calls of :meth:`update` that count; later ones change nothing. None for all.
    covariance
        Also keep the covariance of the features, which :class:`FeatureCompression` needs.

    Raises
    ------
    ValueError
        If an argument is out of range.
    """

    def __init__(self, dim: int, warmup_batches: int | None = None, covariance: bool = False) -> None:
        if dim < 1:
            raise ValueError(f"`dim` must be at least 1, got {dim}; give the number of features.")
        if warmup_batches is not None and warmup_batches < 1:
            raise ValueError(f"`warmup_batches` must be at least 1, got {warmup_batches}; choose a positive number.")
        self.dim, self.warmup_batches, self.n_batches = dim, warmup_batches, 0
        self._moments = Moments.empty(dim)
        self._cross = np.zeros((dim, dim)) if covariance else None

    @property
    def count(self) -> int:
        """Number of vectors so far: cells, or cells times genes with features."""
        return self._moments.n_cells

    @property
    def mean(self) -> NDArray[np.float64]:
        """Mean of every feature ``(dim,)``."""
        return self._moments.mean

    @property
    def variance(self) -> NDArray[np.float64]:
        """Variance of every feature ``(dim,)``, divided by the count; 1 before anything was seen."""
        return self._moments.variance(ddof=0) if self.count else np.ones(self.dim)

    @property
    def frozen(self) -> bool:
        """Whether :meth:`update` changes nothing any more."""
        return self.warmup_batches is not None and self.n_batches >= self.warmup_batches

    def update(self, features: ArrayLike, has_features: NDArray[np.bool_] | None = None) -> None:
        """Add a batch, in any order and any sizes; nothing happens once the statistics are frozen.

        Parameters
        ----------
        features
            ``(cell, dim)`` or ``(cell, gene, dim)``.
        has_features
            Which genes have features, bool ``(gene,)`` or ``(cell, gene)``; all by default.
        """
        if self.frozen:
            return
        values = np.asarray(features, dtype=np.float64)
        if has_features is not None:
            values = values[np.broadcast_to(has_features, values.shape[:-1])]
        values = values.reshape(-1, self.dim)
        self.n_batches += 1
        if not len(values):
            return
        batch, seen = Moments.of_dense(values), self._moments
        if self._cross is not None:
            centred, delta = values - batch.mean, batch.mean - seen.mean
            share = seen.n_cells * len(values) / (seen.n_cells + len(values))
            self._cross += centred.T @ centred + share * np.outer(delta, delta)
        self._moments = seen.merge(batch)

    def covariance(self) -> NDArray[np.float64]:
        """Covariance of the standardised features ``(dim, dim)``.

        Raises
        ------
        ValueError
            If it was not kept.
        """
        if self._cross is None:
            raise ValueError("`covariance` was not kept; create the statistics with `covariance=True`.")
        scale = 1 / np.sqrt(self.variance + _EPS)
        return self._cross / max(self.count, 1) * np.outer(scale, scale)

    def standardize(self, z: ArrayLike, has_features: NDArray[np.bool_] | None = None) -> NDArray[np.float32]:
        """``(z - mean) / sqrt(variance + 1e-6)``; 0 where there are no features.

        Parameters
        ----------
        z
            Features ``(..., dim)``.
        has_features
            See :meth:`update`.
        """
        values = (np.asarray(z) - self.mean) / np.sqrt(self.variance + _EPS)
        if has_features is not None:
            values = np.where(np.asarray(has_features)[..., None], values, 0)
        return values.astype(np.float32)

    def restore(self, z: ArrayLike) -> NDArray[np.float32]:
        """Features of standardised ones, the inverse of :meth:`standardize`.

        Parameters
        ----------
        z
            Standardised features ``(..., dim)``.
        """
        return (np.asarray(z) * np.sqrt(self.variance + _EPS) + self.mean).astype(np.float32)

    def buffers(self) -> dict[str, Tensor]:
        """``feature_mean`` and ``feature_var`` (float32 ``(dim,)``) and ``feature_count`` (int64), for a module to keep."""
        mean, var = (torch.tensor(a, dtype=torch.float32) for a in (self.mean, self.variance))
        return {"feature_mean": mean, "feature_var": var, "feature_count": torch.tensor(self.count)}

    def to_dict(self) -> dict[str, Any]:
        """Everything but the covariance as plain JSON, from which :meth:`from_dict` makes the same statistics."""
        return {
            "count": self.count,
            "mean": self.mean.tolist(),
            "m2": self._moments.m2.tolist(),
            "n_batches": self.n_batches,
            "warmup_batches": self.warmup_batches,
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Self:
        """Statistics that :meth:`to_dict` described.

        Parameters
        ----------
        state
            What :meth:`to_dict` gave.
        """
        mean, m2 = (np.asarray(state[name], dtype=np.float64) for name in ("mean", "m2"))
        new = cls(len(mean), state["warmup_batches"])
        new.n_batches = state["n_batches"]
        new._moments = Moments(state["count"], mean, m2, np.zeros(len(mean), dtype=np.int64))
        return new


class FeatureCompression:
    """Principal components of standardised features, each with the variance 1.

    Parameters
    ----------
    components
        Directions ``(latent, dim)``, orthonormal.
    variance
        Variance of the standardised features along each ``(latent,)``.
    explained
        Share of the variance that the components keep.
    """

    def __init__(self, components: NDArray[np.float64], variance: NDArray[np.float64], explained: float) -> None:
        self.components, self.variance, self.explained = components, variance, explained
        self.dim = len(components)

    @classmethod
    def fit(cls, statistics: FeatureStatistics, latent_dim: int) -> Self:
        """Components of the features that the statistics saw.

        Parameters
        ----------
        statistics
            Statistics with the covariance.
        latent_dim
            Number of components.

        Raises
        ------
        ValueError
            If there are not that many features, or they do not vary in so many directions.
        """
        if not 1 <= latent_dim <= statistics.dim:
            raise ValueError(
                f"`latent_dim` must be from 1 to the number of features, {statistics.dim}, got {latent_dim}; choose fewer, or "
                "None to keep all."
            )
        values, vectors = np.linalg.eigh(statistics.covariance())
        variance, components = values[::-1], vectors.T[::-1]
        rank = int((variance > _EPS * max(variance[0], _EPS)).sum())
        if rank < latent_dim:
            raise ValueError(
                f"`latent_dim`={latent_dim} components cannot be made of features that vary in {rank} directions only; choose "
                "fewer."
            )
        # of the two directions, the one whose largest entry is positive: the same on every machine
        largest = np.take_along_axis(components, np.abs(components).argmax(1)[:, None], 1)
        components = components * np.sign(largest)
        explained = float(variance[:latent_dim].sum() / variance.sum())
        return cls(components[:latent_dim].copy(), variance[:latent_dim].copy(), explained)

    def transform(self, z: ArrayLike) -> NDArray[np.float32]:
        """Components ``(..., latent)`` of standardised features.

        Parameters
        ----------
        z
            Standardised features ``(..., dim)``.
        """
        return (np.asarray(z) @ self.components.T / np.sqrt(self.variance)).astype(np.float32)

    def inverse(self, z: ArrayLike) -> NDArray[np.float32]:
        """Standardised features ``(..., dim)`` that have these components and nothing beside them.

        Parameters
        ----------
        z
            Components ``(..., latent)``.
        """
        return ((np.asarray(z) * np.sqrt(self.variance)) @ self.components).astype(np.float32)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON."""
        arrays = {"components": self.components.tolist(), "variance": self.variance.tolist()}
        return {**arrays, "explained": self.explained}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Self:
        """Compression that :meth:`to_dict` described.

        Parameters
        ----------
        state
            What :meth:`to_dict` gave.
        """
        return cls(np.asarray(state["components"]), np.asarray(state["variance"]), state["explained"])
