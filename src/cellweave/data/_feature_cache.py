"""Features of the cells of a training run, computed before it where they fit into memory."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
from anndata import AnnData
from numpy.typing import NDArray

from cellweave._types import Indices

from ._feature_statistics import FeatureCompression, FeatureStatistics
from ._features import FeatureEncoder, encode_checked
from ._rows import row_source

__all__ = ["FeatureCache"]

# Training cells from which the statistics come.
_MAX_CELLS = 4096
# Bytes of features of genes that are made at once while the statistics are collected or the cache is filled.
_BLOCK_BYTES = 64 * 2**20


class FeatureCache:
    """Standardised features of cells, ready for training.

    The encoder is fitted to the training cells; mean and variance of its features, and their compression, come from at
    most 4,096 of them. Features of cells are computed once and kept. So are features of genes that take less than
    ``memory_limit``; larger ones are computed when they are asked for, and those that were used last are kept.

    Parameters
    ----------
    encoder
        Encoder, fitted here.
    adata
        All cells.
    x
        Their log-normalised expression ``(cell, gene)``, in the order of ``adata``.
    train_rows
        Rows or mask of the training cells.
    rows
        Rows or mask of all cells whose features will be needed; all cells by default.
    latent_dim
        Number of principal components to which the features are compressed; None keeps the features.
    seed
        Seed of the choice of training cells for the statistics.
    memory_limit
        Bytes that features of genes may take.

    Raises
    ------
    ValueError
        If no training cells are given, or the features cannot be used.
    """

    def __init__(
        self,
        encoder: FeatureEncoder,
        adata: AnnData,
        x: Any,
        train_rows: Indices,
        rows: Indices | None = None,
        latent_dim: int | None = None,
        seed: int = 0,
        memory_limit: int = 2 * 2**30,
    ) -> None:
        self.encoder, self.adata, self.x = encoder, adata, row_source(x)
        if self.x.shape != adata.shape:
            raise ValueError(
                f"`x` must have the shape of `adata`, {adata.shape}, got {self.x.shape}; give all its cells."
            )
        train = _positions(train_rows, adata.n_obs, "train_rows")
        if not len(train):
            raise ValueError("`train_rows` names no cells; give the cells that the features are standardised by.")
        needed = np.arange(adata.n_obs) if rows is None else np.unique(_positions(rows, adata.n_obs, "rows"))
        encoder.fit(adata, self.x, train)
        self.level = encoder.level
        self.has_features: NDArray[np.bool_] | None = getattr(encoder, "has_features", None)
        self._place = np.full(adata.n_obs, -1)
        self._place[needed] = np.arange(len(needed))
        raw = self._encode_all(needed) if self.level == "cell" else None
        sample = _sample(train, seed)
        self.statistics = FeatureStatistics(encoder.dim, covariance=latent_dim is not None)
        self._collect(sample, raw)
        self.compression = None if latent_dim is None else FeatureCompression.fit(self.statistics, latent_dim)
        self.dim = encoder.dim if latent_dim is None else latent_dim
        self._features: NDArray[np.float32] | None = None if raw is None else self._transformed(raw)
        self._kept: OrderedDict[int, NDArray[np.float32]] = OrderedDict()
        per_cell = 4 * adata.n_vars * self.dim
        self._capacity = memory_limit // per_cell
        if self.level == "gene" and len(needed) <= self._capacity:
            blocks = [self._transformed(self._encode_all(part)) for part in self._blocks(needed)]
            self._features = np.concatenate(blocks)

    @property
    def in_memory(self) -> bool:
        """Whether the features of all needed cells are kept."""
        return self._features is not None

    def get(self, rows: Indices) -> NDArray[np.float32]:
        """Standardised features of cells, ``(cell, dim)`` or ``(cell, gene, dim)``; 0 for genes without features.

        Parameters
        ----------
        rows
            Rows or mask of cells, in any order and repeated or not.

        Raises
        ------
        ValueError
            If the cache was not made for one of the cells.
        """
        wanted = _positions(rows, self.adata.n_obs, "rows")
        place = self._place[wanted]
        if (place < 0).any():
            unknown = wanted[place < 0]
            raise ValueError(
                f"`rows` names {len(unknown)} cells without features (first: {self.adata.obs_names[unknown[0]]!r}); make "
                "the cache for them too."
            )
        return self._features[place] if self._features is not None else self._on_demand(wanted)

    def transform(self, adata: AnnData, x: Any, rows: Indices) -> NDArray[np.float32]:
        """Standardised features of cells of any data, computed now ``(cell, dim)`` or ``(cell, gene, dim)``.

        Parameters
        ----------
        adata
            The data.
        x
            Their log-normalised expression ``(cell, gene)``.
        rows
            Rows or mask of the cells.
        """
        if adata is self.adata:
            return self.get(rows)
        return self._transformed(
            encode_checked(self.encoder, adata, row_source(x), _positions(rows, adata.n_obs, "rows"))
        )

    def inverse(self, z: NDArray[np.floating]) -> NDArray[np.float32]:
        """Features on the scale of the encoder, of standardised (and compressed) ones.

        Parameters
        ----------
        z
            What :meth:`get` gives, or a model generated ``(..., dim)``.
        """
        return self.statistics.restore(z if self.compression is None else self.compression.inverse(z))

    # ---------------------------------------------------------------- parts

    def _encode_all(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        return encode_checked(self.encoder, self.adata, self.x, rows)

    def _blocks(self, rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        size = max(1, _BLOCK_BYTES // (4 * self.adata.n_vars * self.encoder.dim))
        return [rows[i : i + size] for i in range(0, len(rows), size)]

    def _collect(self, sample: NDArray[np.int64], raw: NDArray[np.float32] | None) -> None:
        """Statistics of a sample of cells; features of genes block by block, since they are large."""
        if raw is not None and (self._place[sample] >= 0).all():
            self.statistics.update(raw[self._place[sample]])
            return
        for part in [sample] if self.level == "cell" else self._blocks(sample):
            self.statistics.update(self._encode_all(part), self.has_features)

    def _transformed(self, raw: NDArray[np.float32]) -> NDArray[np.float32]:
        values = self.statistics.standardize(raw, self.has_features)
        return values if self.compression is None else self.compression.transform(values)

    def _on_demand(self, wanted: NDArray[np.int64]) -> NDArray[np.float32]:
        if not len(wanted):
            return np.empty((0, self.adata.n_vars, self.dim), dtype=np.float32)
        unique, place = np.unique(wanted, return_inverse=True)
        fresh = np.array([row for row in unique if row not in self._kept], dtype=np.int64)
        made = dict(zip(fresh.tolist(), self._transformed(self._encode_all(fresh)), strict=True)) if len(fresh) else {}
        found = np.stack([made[row] if row in made else self._kept[row] for row in unique.tolist()])
        for row in unique.tolist():
            # a copy: a view would keep the whole block alive
            self._kept[row] = made[row].copy() if row in made else self._kept[row]
            self._kept.move_to_end(row)
        while len(self._kept) > self._capacity:
            self._kept.popitem(last=False)
        return found[place]


def _sample(rows: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    if len(rows) <= _MAX_CELLS:
        return rows
    return np.sort(np.random.default_rng(seed).choice(rows, _MAX_CELLS, replace=False))


def _positions(rows: Indices, n_cells: int, name: str) -> NDArray[np.int64]:
    """Rows or a mask as valid positions."""
    given = np.asarray(rows)
    if given.dtype == bool:
        if given.shape != (n_cells,):
            raise ValueError(
                f"`{name}` is a mask of {given.size} cells, the data have {n_cells}; make it for all cells."
            )
        return np.flatnonzero(given)
    positions = given.astype(np.int64)
    if len(bad := positions[(positions < 0) | (positions >= n_cells)]):
        raise ValueError(
            f"`{name}` has {len(bad)} rows outside of the {n_cells} cells (first: {bad[0]}); give rows from 0 on."
        )
    return positions
