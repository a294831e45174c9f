"""From a registered AnnData to flat, set-major batches of tensors."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

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

from ._annbatch import AnnbatchRows
from ._densify import dense_rows
from ._rows import MemoryRows, column_rows, row_source, stack
from ._sampler import BUFFER_SIZE, Buffer, CellSetSampler

__all__ = ["CellSetDataset", "CellSetLoader", "chosen_block_size", "gene_shares"]

logger = logging.getLogger(__name__)

# Neighbouring rows of data on disk that are read in one go: runs of this length are about as fast as longer ones.
_BLOCK_SIZE = 512


class CellSetDataset(Dataset):
    """Random access to the registered data of an AnnData or MuData, in memory or on disk.

    Parameters
    ----------
    adata_manager
        Manager of the registered object.
    load_sparse_tensor
        Give sparse counts as CSR tensors, to be densified on the device; dense otherwise.
    columns
        Positions of the columns to read, ``(marker,)``, for models of a few markers; all by default. In memory they are
        taken once, as a dense float32 matrix, unless the registered one already is that.
    """

    def __init__(
        self,
        adata_manager: AnnDataManager,
        load_sparse_tensor: bool = False,
        columns: NDArray[np.int64] | None = None,
    ) -> None:
        registered = adata_manager.data_registry
        x = adata_manager.get_from_registry(REGISTRY_KEYS.X)
        if columns is not None:
            has_mask = REGISTRY_KEYS.MEASURED in registered
            x = column_rows(x, columns, adata_manager.get_from_registry(REGISTRY_KEYS.MEASURED) if has_mask else None)
        elif sp.issparse(x) and x.format != "csr":
            logger.info("Converting %s counts to CSR once; store them as CSR to save this.", x.format.upper())
        self.x = row_source(x)
        matrices = (REGISTRY_KEYS.X, REGISTRY_KEYS.MEASURED)
        self.codes = {key: _codes(adata_manager.get_from_registry(key)) for key in registered if key not in matrices}
        self.load_sparse_tensor = load_sparse_tensor

    def __len__(self) -> int:
        return self.x.shape[0]

    def __getitem__(self, sample: tuple[NDArray[np.int64], NDArray[np.bool_]]) -> dict[str, Any]:
        """Batch for ``(rows, valid)``: values float32 ``(cell, gene)``, ``obs`` columns ``(cell, column)``, rows, validity."""
        rows, valid = sample
        if isinstance(self.x, MemoryRows):
            return self._batch(rows, valid, self._tensor(self.x.x, rows))
        return self._batch(rows, valid, self._tensor(self.x[rows], np.arange(len(rows))))

    def _batch(self, rows: NDArray[np.int64], valid: NDArray[np.bool_], counts: Tensor) -> dict[str, Any]:
        batch: dict[str, Any] = {key: codes[rows] for key, codes in self.codes.items()}
        batch[REGISTRY_KEYS.X] = counts
        batch[LOADER_KEYS.ROW] = torch.from_numpy(rows)
        batch[LOADER_KEYS.VALID] = torch.from_numpy(valid)
        batch[LOADER_KEYS.N_VALID] = int(valid.sum())
        return batch

    def stream(self, buffers: Iterable[Buffer]) -> Iterator[dict[str, Any]]:
        """Batches of buffers; the cells of the next buffer are read while those of the last are used."""
        if isinstance(self.x, AnnbatchRows):
            for rows, valid, counts in self.x.stream(buffers):
                yield self._batch(rows, valid, self._tensor(counts, np.arange(len(rows))))
            return
        held: tuple[NDArray[np.int64], Any] | None = None  # cells of earlier buffers that a batch still needs
        for buffer, block in _read_ahead(buffers, self.x.take):
            for rows, valid in buffer.batches:
                yield self._batch(rows, valid, self._tensor(*_find(rows, buffer.rows, block, held)))
            if len(buffer.kept):
                kept, position = _find(buffer.kept, buffer.rows, block, held)
                held = buffer.kept, kept[position]
                del kept
            else:
                held = None
            del block  # or it would stay until the next one is there, while the one after that is being read

    def _tensor(self, x: Any, rows: NDArray[np.int64]) -> Tensor:
        """Rows of a matrix in memory as a float32 tensor: CSR, or dense."""
        if not sp.issparse(x):
            return torch.from_numpy(np.ascontiguousarray(x[rows], dtype=np.float32))
        if not self.load_sparse_tensor:
            return torch.from_numpy(dense_rows(x, rows))
        x = x[rows].astype(np.float32, copy=False)
        index = np.result_type(x.indptr, x.indices)  # torch wants one type for both
        indptr, indices = (torch.from_numpy(a.astype(index, copy=False)) for a in (x.indptr, x.indices))
        return torch.sparse_csr_tensor(indptr, indices, torch.from_numpy(x.data), size=x.shape, check_invariants=False)


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
    block_size
        Cells of a block of neighbouring rows, from shuffled blocks of which contexts are drawn; contexts come from all cells
        with None. By default data on disk are read in blocks and data in memory are not.
    buffer_size
        Cells that are read together, when there are blocks.
    max_cells
        Cells per epoch at most, others in every epoch; all by default.
    columns
        Positions of the columns to read; see :class:`CellSetDataset`.
    **kwargs
        Passed to :class:`torch.utils.data.DataLoader`. Data on disk are read ahead in a thread of this process;
        ``num_workers`` has no effect on them.
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
        block_size: int | Literal["auto"] | None = "auto",
        buffer_size: int = BUFFER_SIZE,
        max_cells: int | None = None,
        columns: NDArray[np.int64] | None = None,
        **kwargs: Any,
    ) -> None:
        dataset = CellSetDataset(adata_manager, load_sparse_tensor, columns)
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
            block_size=chosen_block_size(block_size, dataset.x.on_disk),
            buffer_size=buffer_size,
            max_cells=max_cells,
        )
        self.reads_ahead = dataset.x.on_disk and block_size is not None
        if self.reads_ahead and sampler.is_scattered:
            warnings.warn(
                "The cells of a `context_key` group are scattered over the file, which makes reading them slow; rewrite it "
                "once with `cellweave.pp.write_store(..., group_by=...)`, or mix groups with `by_context=False`.",
                UserWarning,
                stacklevel=settings.warnings_stacklevel,
            )
        if self.reads_ahead:
            kwargs = {key: kwargs[key] for key in ("generator", "pin_memory") if key in kwargs}
        kwargs.setdefault("num_workers", 0 if self.reads_ahead else settings.dl_num_workers)
        # without a generator of its own, every iterator would draw a number from the user's global one
        kwargs.setdefault("generator", torch.Generator().manual_seed(seed))
        self._cells, self._contexts = _WithContextSize(dataset, n_cells), sampler
        super().__init__(self._cells, sampler=sampler, batch_size=None, **kwargs)

    def __iter__(self) -> Any:
        """Iterator of batches."""
        return self._cells.stream(self._contexts.buffers()) if self.reads_ahead else super().__iter__()


class _WithContextSize(Dataset):
    """Adds the number of cells per context, which the sampler decides, to every batch."""

    def __init__(self, dataset: CellSetDataset, n_cells: int) -> None:
        self.dataset, self.n_cells = dataset, n_cells

    def __getitem__(self, sample: tuple[NDArray[np.int64], NDArray[np.bool_]]) -> dict[str, Any]:
        return {**self.dataset[sample], LOADER_KEYS.N_CELLS: self.n_cells}

    def stream(self, buffers: Iterable[Buffer]) -> Iterator[dict[str, Any]]:
        for batch in self.dataset.stream(buffers):
            yield {**batch, LOADER_KEYS.N_CELLS: self.n_cells}


def _codes(values: Any) -> Tensor:
    """Columns of ``obs`` ``(cell, column)``: codes int64, numbers float32; what is the same in all cells takes no memory."""
    values = np.asarray(values)
    # np.array copies: pandas 3 gives read-only arrays, which torch wraps with a warning about undefined behaviour
    columns = np.array(values, dtype=np.float32 if values.dtype.kind == "f" else np.int64)
    codes = torch.from_numpy(columns.reshape(len(values), -1))
    return codes[:1].clone().expand_as(codes) if len(codes) and (codes == codes[0]).all() else codes


def chosen_block_size(block_size: int | Literal["auto"] | None, on_disk: bool) -> int | None:
    """The block size that ``"auto"`` stands for: blocks are for data that must be read from disk."""
    return (_BLOCK_SIZE if on_disk else None) if block_size == "auto" else block_size


def _read_ahead(buffers: Iterable[Buffer], read: Callable[[NDArray[np.int64]], Any]) -> Iterator[tuple[Buffer, Any]]:
    """Every buffer with what ``read`` gives for its rows, one read ahead of the consumer."""
    with ThreadPoolExecutor(1, thread_name_prefix="cellweave-reader") as pool:
        waiting = iter(buffers)
        buffer = next(waiting, None)
        future = None if buffer is None else pool.submit(read, buffer.rows)
        while buffer is not None and future is not None:
            block = future.result()
            following = next(waiting, None)
            # the future would keep the block that it read
            future = None if following is None else pool.submit(read, following.rows)
            yield buffer, block
            del block
            buffer = following


def _find(
    rows: NDArray[np.int64], block_rows: NDArray[np.int64], block: Any, held: tuple[NDArray[np.int64], Any] | None
) -> tuple[Any, NDArray[np.int64]]:
    """A matrix that holds the cells ``rows``, and where: the block that was read, joined with cells that were held."""
    position = np.searchsorted(block_rows, rows)
    if held is None:
        return block, position
    found = block_rows[np.minimum(position, len(block_rows) - 1)] == rows
    if found.all():
        return block, position
    joined = stack([block[position[found]], held[1][np.searchsorted(held[0], rows[~found])]])
    where = np.empty(len(rows), dtype=np.int64)
    where[np.concatenate([np.flatnonzero(found), np.flatnonzero(~found)])] = np.arange(len(rows))
    return joined, where


def gene_shares(adata_manager: AnnDataManager, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """Share of each gene in all registered counts of sorted ``rows``: ``(gene,)``, summing to one."""
    x = row_source(adata_manager.get_from_registry(REGISTRY_KEYS.X))
    blocks = np.array_split(rows, -(-len(rows) // BUFFER_SIZE))
    total = np.sum([np.asarray(x.take(b).sum(axis=0), dtype=np.float64).ravel() for b in blocks], axis=0)
    return total / total.sum()
