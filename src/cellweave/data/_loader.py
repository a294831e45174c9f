"""From a registered AnnData to flat, set-major batches of tensors."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from scvi import settings
from scvi.data import AnnDataManager
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cellweave._keys import LOADER_KEYS, REGISTRY_KEYS
from cellweave._types import ContextRule

from ._sampler import CellSetSampler

__all__ = ["CellSetDataset", "CellSetLoader", "gene_shares"]

logger = logging.getLogger(__name__)

# Cells summed at a time, so that a backed matrix is read in bounded memory.
_SHARE_BLOCK = 8192


class CellSetDataset(Dataset):
    """Random access to the registered data of an AnnData or MuData, in memory or backed.

    Parameters
    ----------
    adata_manager
        Manager of the registered object.
    load_sparse_tensor
        Give sparse counts as CSR tensors, to be densified on the device; dense otherwise.
    """

    def __init__(self, adata_manager: AnnDataManager, load_sparse_tensor: bool = False) -> None:
        self.x = _as_rows(adata_manager.get_from_registry(REGISTRY_KEYS.X))
        self.codes = {
            key: torch.from_numpy(np.asarray(adata_manager.get_from_registry(key), dtype=np.int64).reshape(-1, 1))
            for key in adata_manager.data_registry
            if key != REGISTRY_KEYS.X
        }
        self.load_sparse_tensor = load_sparse_tensor

    def __len__(self) -> int:
        return self.x.shape[0]

    def __getitem__(self, sample: tuple[NDArray[np.int64], NDArray[np.bool_]]) -> dict[str, Any]:
        """Batch for ``(rows, valid)``: counts float32 ``(cell, gene)``, codes int64 ``(cell, 1)``, rows and validity."""
        rows, valid = sample
        batch: dict[str, Any] = {key: codes[rows] for key, codes in self.codes.items()}
        batch[REGISTRY_KEYS.X] = self._counts(rows)
        batch[LOADER_KEYS.ROW] = torch.from_numpy(rows)
        batch[LOADER_KEYS.VALID] = torch.from_numpy(valid)
        batch[LOADER_KEYS.N_VALID] = int(valid.sum())
        return batch

    def _counts(self, rows: NDArray[np.int64]) -> Tensor:
        x: Any = self.x[rows] if isinstance(self.x, np.ndarray | sp.csr_matrix) else _read_backed(self.x, rows)
        x = x.astype(np.float32, copy=False)
        if not sp.issparse(x):
            return torch.from_numpy(np.ascontiguousarray(x))
        if not self.load_sparse_tensor:
            return torch.from_numpy(x.toarray())
        indptr, indices = (torch.from_numpy(a.astype(np.int64)) for a in (x.indptr, x.indices))
        data = torch.from_numpy(x.data)
        return torch.sparse_csr_tensor(indptr, indices, data, size=x.shape, check_invariants=False)


class CellSetLoader(DataLoader):
    """Batches of whole contexts. Rows are set-major: cells of one context follow each other.

    Each batch is a dictionary with the registered tensors, ``row``, ``valid`` and the plain integers ``n_cells``
    (cells per context) and ``n_valid``.

    Parameters
    ----------
    adata_manager
        Manager of the registered object.
    indices
        Cells to visit; all by default.
    n_cells
        Cells per context.
    batch_size
        Cells per batch, rounded down to whole contexts.
    shuffle
        New contexts, in random order, every epoch.
    seed
        Seed of the contexts.
    rule
        How contexts are cut; see :func:`~cellweave.data.draw_contexts`.
    by_context
        Keep the groups of ``context_key`` apart; contexts mix all cells otherwise.
    load_sparse_tensor
        Give sparse counts as CSR tensors.
    distributed_sampler
        Share contexts among the ranks of the process group.
    **kwargs
        Passed to :class:`torch.utils.data.DataLoader`.
    """

    def __init__(
        self,
        adata_manager: AnnDataManager,
        indices: NDArray[np.integer] | None = None,
        *,
        n_cells: int,
        batch_size: int,
        shuffle: bool = False,
        seed: int = 0,
        rule: ContextRule = "random",
        by_context: bool = True,
        load_sparse_tensor: bool = False,
        distributed_sampler: bool = False,
        **kwargs: Any,
    ) -> None:
        dataset = CellSetDataset(adata_manager, load_sparse_tensor)
        rows = np.arange(len(dataset)) if indices is None else np.asarray(indices, dtype=np.int64)
        groups = np.zeros(len(rows), dtype=np.int64)
        if by_context and REGISTRY_KEYS.CONTEXT in dataset.codes:
            groups = dataset.codes[REGISTRY_KEYS.CONTEXT].numpy()[rows, 0]
        sampler = CellSetSampler(
            rows,
            groups,
            n_cells=n_cells,
            batch_size=batch_size,
            shuffle=shuffle,
            seed=seed,
            rule=rule,
            distributed=distributed_sampler,
        )
        kwargs.setdefault("num_workers", settings.dl_num_workers)
        # without a generator of its own, every iterator would draw a number from the user's global one
        kwargs.setdefault("generator", torch.Generator().manual_seed(seed))
        super().__init__(_WithContextSize(dataset, n_cells), sampler=sampler, batch_size=None, **kwargs)


class _WithContextSize(Dataset):
    """Adds the number of cells per context, which the sampler decides, to every batch."""

    def __init__(self, dataset: CellSetDataset, n_cells: int) -> None:
        self.dataset, self.n_cells = dataset, n_cells

    def __getitem__(self, sample: tuple[NDArray[np.int64], NDArray[np.bool_]]) -> dict[str, Any]:
        return {**self.dataset[sample], LOADER_KEYS.N_CELLS: self.n_cells}


def _as_rows(x: Any) -> Any:
    """``x`` in a form that gives rows fast and right: canonical CSR, a dense array, or a backed matrix."""
    if not sp.issparse(x):
        return x
    if x.format != "csr":
        logger.info("Converting %s counts to CSR once; store them as CSR to save this.", x.format.upper())
    x = sp.csr_matrix(x)  # shares the arrays of a CSR matrix or array
    if not x.has_canonical_format:
        x = x.copy()
        x.sum_duplicates()
    return x


def _read_backed(x: Any, rows: NDArray[np.int64]) -> Any:
    """Rows of an on-disk matrix in the requested order; HDF5 wants them sorted and unique."""
    unique, inverse = np.unique(rows, return_inverse=True)
    return x[unique][inverse]


def gene_shares(adata_manager: AnnDataManager, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """Share of each gene in all registered counts of sorted ``rows``: ``(gene,)``, summing to one."""
    x = _as_rows(adata_manager.get_from_registry(REGISTRY_KEYS.X))
    blocks = np.array_split(rows, -(-len(rows) // _SHARE_BLOCK))
    total = np.sum([np.asarray(x[block].sum(axis=0), dtype=np.float64).ravel() for block in blocks], axis=0)
    return total / total.sum()
