"""Inference over contexts: every cell once per assignment, results in the order of the cells."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from numpy.typing import NDArray
from scvi import settings
from scvi.utils import track

from cellweave._keys import LOADER_KEYS
from cellweave._types import AnnOrMuData, ContextRule, Indices
from cellweave.data import CellSetLoader, CellStore, DiskRows, open_store
from cellweave.io import LayerWriter

__all__ = ["ContextInferenceMixin", "all_cells", "all_cells_and_genes"]


class ContextInferenceMixin:
    """Per-cell results from a module that reads contexts."""

    def _over_contexts(
        self,
        adata: AnnOrMuData,
        rows: NDArray[np.int64],
        compute: Callable[[dict[str, Any]], torch.Tensor],
        *,
        n_cells: int,
        batch_size: int | None,
        seed: int,
        rule: ContextRule = "random",
        by_context: bool = True,
        n_repeats: int = 1,
        description: str = "",
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Mean and standard deviation over context assignments of a per-cell quantity, in the order of ``rows``.

        ``compute`` maps a batch on the device to a tensor ``(cell, feature)``. Every cell of ``rows`` (sorted, unique)
        is taken from the one context in which it is valid; repeat ``r`` uses the assignment of seed ``seed + r``.
        """
        mean: NDArray[np.float32] = np.zeros(0, dtype=np.float32)
        squares = mean
        for repeat in range(n_repeats):
            out = self._collected(
                adata,
                rows,
                compute,
                description,
                n_cells=n_cells,
                batch_size=batch_size,
                seed=seed + repeat,
                rule=rule,
                by_context=by_context,
            )
            if repeat == 0:
                mean, squares = out, np.zeros_like(out)
            else:  # Welford's update: stable, one array per moment
                delta = out - mean
                mean = mean + delta / np.float32(repeat + 1)
                squares = squares + delta * (out - mean)
        return mean, np.sqrt(squares / np.float32(max(1, n_repeats - 1)))

    def _collected(
        self, adata: AnnOrMuData, rows: NDArray[np.int64], *args: Any, **contexts: Any
    ) -> NDArray[np.float32]:
        """Values of :meth:`_computed`, which has the same arguments, in the order of ``rows`` (sorted, unique)."""
        out: NDArray[np.float32] = np.zeros((0, 0), dtype=np.float32)
        for done, values in self._computed(adata, rows, *args, **contexts):
            if out.size == 0:
                out = np.empty((len(rows), values.shape[1]), dtype=np.float32)
            out[np.searchsorted(rows, done)] = values
        return out

    def _computed(
        self,
        adata: AnnOrMuData,
        rows: NDArray[np.int64],
        compute: Callable[[dict[str, Any]], torch.Tensor],
        description: str,
        *,
        n_cells: int,
        batch_size: int | None = None,
        **contexts: Any,
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """Rows and values ``(cell, feature)`` of one batch after the other; every cell of ``rows`` comes once."""
        loader = CellSetLoader(
            self.get_anndata_manager(adata, required=True),
            rows,
            n_cells=n_cells,
            batch_size=max(settings.batch_size, 4 * n_cells) if batch_size is None else batch_size,
            load_sparse_tensor=torch.device(self.device).type != "cpu",
            **self._loader_options(adata),
            **contexts,
        )
        if self.module.training:  # going through all layers to say so takes a millisecond
            self.module.eval()
        silent = len(loader) < (8 if n_cells > 1 else 100)  # a bar for work that takes a moment is noise
        for batch in track(loader, description=description, disable=silent, style="tqdm"):
            batch = {k: v.to(self.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
            with torch.inference_mode():
                values = compute(batch).float().cpu().numpy()
            valid = batch[LOADER_KEYS.VALID].cpu().numpy()
            yield batch[LOADER_KEYS.ROW].cpu().numpy()[valid], values[valid]

    def _to_layer(
        self,
        store: CellStore,
        key: str,
        genes: NDArray[np.str_],
        batches: Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]],
        parameters: Mapping[str, Any],
        overwrite: bool,
    ) -> CellStore:
        """Write values of :meth:`_computed` to a layer on disk as they come, and open it; ``genes`` names their columns."""
        if not isinstance(store.rows, DiskRows):
            raise ValueError(
                "Layers are added to a store of one file that is opened as it is, not to several files or aligned genes; "
                "write one with `cellweave.pp.write_store`."
            )
        columns = store.var_names.astype(str).get_indexer(pd.Index(genes))
        known = np.flatnonzero(columns >= 0)
        record = json.loads(json.dumps(self._provenance(parameters)))
        with LayerWriter(store.paths[0], key, store.shape, columns[known], overwrite, record) as writer:
            for rows, values in batches:
                writer.write(rows, values[:, known])
        return open_store(store.paths[0], layer=key, obs_columns=[])

    def _loader_options(self, adata: AnnOrMuData) -> dict[str, Any]:
        """Hook: what the loaders of this model need beyond contexts."""
        return {}

    @staticmethod
    def _rows(adata: AnnOrMuData, indices: Indices | None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Sorted unique rows to compute, and where each requested cell is among them."""
        if indices is None:
            rows = np.arange(adata.n_obs)
            return rows, rows
        indices = np.asarray(indices)
        if indices.dtype == bool:
            if indices.shape != (adata.n_obs,):
                raise ValueError(
                    f"`indices` is a mask of length {len(indices)}, but there are {adata.n_obs} cells; give one value per cell."
                )
            indices = np.flatnonzero(indices)
        if indices.ndim != 1 or indices.size == 0 or indices.dtype.kind not in "iu":
            raise ValueError(
                "`indices` must be a non-empty sequence of row numbers or a boolean mask; leave it out for all cells."
            )
        outside = indices[(indices < -adata.n_obs) | (indices >= adata.n_obs)]
        if outside.size:
            raise ValueError(f"`indices` has row {outside[0]}, but there are {adata.n_obs} cells; count rows from 0.")
        return np.unique(indices % adata.n_obs, return_inverse=True)


def all_cells(values: NDArray[np.float32], rows: NDArray[np.int64], n_obs: int) -> NDArray[np.float32]:
    """``values`` ``(len(rows), feature)`` as ``(n_obs, feature)``, NaN in all other rows."""
    if len(rows) == n_obs:
        return values
    out = np.full((n_obs, values.shape[1]), np.nan, dtype=np.float32)
    out[rows] = values
    return out


def all_cells_and_genes(
    values: NDArray[np.float32], rows: NDArray[np.int64], genes: NDArray[np.str_], holder: AnnData
) -> NDArray[np.float32]:
    """``values`` ``(len(rows), len(genes))`` in the shape of ``holder``, NaN for other cells and genes."""
    unique, column = np.unique(genes, return_index=True)  # a gene may have been asked for twice
    position = pd.Index(unique).get_indexer(holder.var_names.astype(str))
    out = np.full(holder.shape, np.nan, dtype=np.float32)
    known = np.flatnonzero(position >= 0)
    out[np.ix_(rows, known)] = values[:, column[position[known]]]
    return out
