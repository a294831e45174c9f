"""Rows of a cells x genes matrix, wherever it is: in memory, in an h5ad or zarr file, in a dask array, in many files."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp
from anndata.abc import CSCDataset, CSRDataset
from numpy.typing import NDArray
from scvi import settings

from ._columns import take_columns
from ._raw import RawArray, raw_array

__all__ = [
    "DiskRows",
    "MemoryRows",
    "Rows",
    "StackedRows",
    "as_csr",
    "column_rows",
    "is_on_disk",
    "row_source",
    "stack",
]

# A gap of at most this many unwanted rows is read through: one longer read costs less than two.
_GAP = 16
# Rows of a whole-matrix pass that are in memory at a time.
_CHUNK = 8192
# What HDF5 and the codecs of zarr raise.
_READ_ERRORS = (OSError, RuntimeError, ValueError, KeyError)
_slow_files: set[str] = set()


class Rows(ABC):
    """Read access to the rows of a matrix ``(cell, gene)``; slicing gives CSR or dense arrays in memory."""

    shape: tuple[int, int]
    dtype: np.dtype
    ndim = 2
    on_disk = True  # reading rows costs time: worth reading in blocks and ahead

    @abstractmethod
    def read(self, start: int, stop: int) -> sp.csr_matrix | NDArray:
        """Rows ``start`` to ``stop``, in one contiguous read where the storage allows it."""

    def take(self, rows: NDArray[np.int64]) -> sp.csr_matrix | NDArray:
        """Sorted unique rows, in as few reads as their gaps allow."""
        if len(rows) == 0:
            return self.read(0, 0)
        runs = np.split(rows, np.flatnonzero(np.diff(rows) > _GAP + 1) + 1)
        block = self._read_runs([(int(run[0]), int(run[-1]) + 1) for run in runs])
        if block.shape[0] == len(rows):
            return block
        starts = np.cumsum([0, *(run[-1] - run[0] + 1 for run in runs[:-1])])
        return block[np.concatenate([start + run - run[0] for start, run in zip(starts, runs, strict=True)])]

    def _read_runs(self, runs: Sequence[tuple[int, int]]) -> sp.csr_matrix | NDArray:
        blocks = [self.read(start, stop) for start, stop in runs]
        return blocks[0] if len(blocks) == 1 else stack(blocks)

    def chunks(self, size: int = _CHUNK) -> Iterator[tuple[int, sp.csr_matrix | NDArray]]:
        """All rows in order, ``size`` at a time, each with the number of its first row."""
        for start in range(0, self.shape[0], size):
            yield start, self.read(start, min(start + size, self.shape[0]))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> sp.csr_matrix | NDArray:
        """Rows, or rows and columns, as a matrix in memory."""
        rows, columns = key if isinstance(key, tuple) else (key, slice(None))
        if isinstance(rows, slice) and rows.step in (None, 1):
            start, stop, _ = rows.indices(self.shape[0])
            block = self.read(start, max(start, stop))
        else:
            wanted = np.arange(self.shape[0])[np.ravel(rows) if isinstance(rows, np.ndarray) else rows]
            wanted = np.atleast_1d(wanted)
            unique, inverse = np.unique(wanted, return_inverse=True)
            block = self.take(unique)[inverse]
        if isinstance(columns, slice) and columns == slice(None):
            return block
        return block[:, np.ravel(columns) if isinstance(columns, np.ndarray) else columns]


class MemoryRows(Rows):
    """A matrix in memory; sparse ones become canonical CSR, sharing arrays where they are so already."""

    on_disk = False

    def __init__(self, x: Any) -> None:
        x = _canonical(x) if sp.issparse(x) else x
        self.x, self.shape, self.dtype = x, x.shape, x.dtype

    def read(self, start: int, stop: int) -> sp.csr_matrix | NDArray:
        """Rows ``start`` to ``stop``."""
        return self.x[start:stop]

    def take(self, rows: NDArray[np.int64]) -> sp.csr_matrix | NDArray:
        """Rows in any order."""
        return self.x[rows]


class DiskRows(Rows):
    """A CSR group or a dense array of an h5ad or zarr file.

    Parameters
    ----------
    data
        Group with ``data``, ``indices`` and ``indptr`` as AnnData writes it, or a two-dimensional array.
    name
        What error messages call it.

    Raises
    ------
    OSError
        If parts of a sparse matrix are missing or damaged.
    """

    def __init__(self, data: Any, name: str) -> None:
        self.name = name
        self.indptr: NDArray[np.int64] | None = None
        self.raw: tuple[RawArray | None, ...] = (None,)
        if hasattr(data, "shape"):
            self.arrays: tuple[Any, ...] = (data,)
            self.shape, self.dtype = (int(data.shape[0]), int(data.shape[1])), np.dtype(data.dtype)
        else:
            self.arrays = (data["data"], data["indices"])
            self.raw = tuple(map(raw_array, self.arrays))
            n_cells, n_genes = data.attrs["shape"]
            self.shape, self.dtype = (int(n_cells), int(n_genes)), np.dtype(data["data"].dtype)
            self.indptr = self._read_indptr(data["indptr"])
            for array in self.arrays:
                _check_complete(array, name)
        if any(getattr(array, "compression", None) == "gzip" for array in self.arrays) and name not in _slow_files:
            _slow_files.add(name)
            warnings.warn(
                f"{name} is compressed with gzip, which makes reading it about three times slower; "
                "`cellweave.pp.write_store` rewrites it once in a faster form.",
                UserWarning,
                stacklevel=settings.warnings_stacklevel,
            )

    def read(self, start: int, stop: int) -> sp.csr_matrix | NDArray:
        """Rows ``start`` to ``stop`` in one contiguous read of each array."""
        return self._read_runs([(start, stop)])

    def _read_runs(self, runs: Sequence[tuple[int, int]]) -> sp.csr_matrix | NDArray:
        if self.indptr is None:
            return self._read_into(self.arrays[0], None, runs, runs)
        entries = [(int(self.indptr[start]), int(self.indptr[stop])) for start, stop in runs]
        pairs = zip(self.arrays, self.raw, strict=True)
        data, indices = (self._read_into(array, raw, entries, runs) for array, raw in pairs)
        # compiled loops trust the indices: one beyond the genes would write outside of their array
        if len(indices) and not (indices.min() >= 0 and indices.max() < self.shape[1]):
            raise self._damaged(runs[0][0], runs[-1][1], f"gene {indices.max()} of {self.shape[1]}")
        indptr = np.concatenate([[0], *(np.diff(self.indptr[start : stop + 1]) for start, stop in runs)]).cumsum()
        x = sp.csr_matrix((data, indices, indptr), shape=(len(indptr) - 1, self.shape[1]))
        if not (x.has_canonical_format and data.all()):  # repeated genes or zeros: rare, or a chunk that has vanished
            for array in self.arrays:
                _check_complete(array, self.name)
        x.sum_duplicates()
        return x

    def _read_into(
        self,
        array: Any,
        raw: RawArray | None,
        where: Sequence[tuple[int, int]],
        runs: Sequence[tuple[int, int]],
    ) -> NDArray:
        """Ranges of an array one after the other in one new array: nothing is copied a second time."""
        out = np.empty((sum(stop - start for start, stop in where), *array.shape[1:]), dtype=array.dtype)
        at = 0
        for (start, stop), cells in zip(where, runs, strict=True):
            try:
                if raw is None:
                    out[at : at + stop - start] = array[start:stop]
                else:
                    raw.read_into(out[at : at + stop - start], start, stop)
            except _READ_ERRORS as error:
                raise self._damaged(*cells, str(error)) from error
            at += stop - start
        return out

    def _read_indptr(self, array: Any) -> NDArray[np.int64]:
        n_entries = {int(values.shape[0]) for values in self.arrays}
        try:
            indptr = np.asarray(array[:], dtype=np.int64)
        except _READ_ERRORS as error:
            raise self._damaged(0, self.shape[0], str(error)) from error
        if any(n_entries):
            _check_complete(array, self.name)
        is_valid = len(indptr) == self.shape[0] + 1 and indptr[0] == 0 and bool(np.all(np.diff(indptr) >= 0))
        if not is_valid or n_entries != {int(indptr[-1])}:
            raise self._damaged(0, self.shape[0], "`indptr` does not fit to `data` and `indices`")
        return indptr

    def _damaged(self, start: int, stop: int, reason: str) -> OSError:
        return OSError(
            f"Cells {start} to {stop - 1} of {self.name} cannot be read ({reason}); restore the file from a copy."
        )


class _SlicedRows(Rows):
    """Anything else that is sliced by rows: dask arrays (computed on access) and CSC matrices on disk."""

    def __init__(self, x: Any) -> None:
        self.x, self.shape, self.dtype = x, (int(x.shape[0]), int(x.shape[1])), np.dtype(x.dtype)

    def read(self, start: int, stop: int) -> sp.csr_matrix | NDArray:
        """Rows ``start`` to ``stop``, computed now."""
        return self._computed(self.x[start:stop])

    def take(self, rows: NDArray[np.int64]) -> sp.csr_matrix | NDArray:
        """Sorted unique rows; in one computation, so that no chunk of a dask array is computed twice."""
        return self._computed(self.x[rows]) if hasattr(self.x, "compute") and len(rows) else super().take(rows)

    @staticmethod
    def _computed(block: Any) -> sp.csr_matrix | NDArray:
        block = block.compute() if hasattr(block, "compute") else block
        return _canonical(block) if sp.issparse(block) else np.asarray(block)


class StackedRows(Rows):
    """The rows of several matrices below each other, with the columns of each brought into one gene order.

    Parameters
    ----------
    parts
        The matrices.
    columns
        For each of them, the column of every gene, -1 where it lacks the gene; None where its genes are in order.
    """

    def __init__(self, parts: Sequence[Rows], columns: Sequence[NDArray[np.int64] | None]) -> None:
        self.parts, self.columns = list(parts), list(columns)
        n_genes = {p.shape[1] if c is None else len(c) for p, c in zip(parts, columns, strict=True)}
        if len(n_genes) != 1:
            raise ValueError(f"The parts have different numbers of genes: {sorted(n_genes)}.")
        self.offsets = np.cumsum([0, *(part.shape[0] for part in parts)])
        self.shape = (int(self.offsets[-1]), n_genes.pop())
        self.dtype = np.result_type(*(part.dtype for part in parts))
        self.on_disk = any(part.on_disk for part in parts)

    def read(self, start: int, stop: int) -> sp.csr_matrix | NDArray:
        """Rows ``start`` to ``stop``, one contiguous read for each part they touch."""
        blocks: list[Any] = []
        for part, columns, first in zip(self.parts, self.columns, self.offsets[:-1], strict=True):
            low, high = np.clip([start - first, stop - first], 0, part.shape[0])
            if low < high or (start == stop and not blocks):
                block = part.read(low, high)
                blocks.append(block if columns is None else take_columns(block, columns))
        block = blocks[0] if len(blocks) == 1 else stack(blocks)
        if sp.issparse(block):
            block.sort_indices()  # reordering genes leaves them unsorted
        return block.astype(self.dtype, copy=False)


def row_source(x: Any, name: str = "the counts") -> Rows:
    """Rows of ``x``: an array or sparse matrix, a backed matrix of AnnData, an array of a file, or a dask array."""
    if isinstance(x, Rows):
        return x
    if not is_on_disk(x):
        return MemoryRows(x)
    if isinstance(x, CSRDataset):
        return DiskRows(x.group, _file_name(x.group, name))
    if isinstance(x, CSCDataset) or hasattr(x, "compute"):
        return _SlicedRows(x)
    return DiskRows(x, _file_name(x, name))


def column_rows(x: Any, columns: NDArray[np.int64], measured: Any | None = None) -> Rows:
    """Rows of a few columns of ``x``; in memory a dense float32 matrix, without a copy where ``x`` is that already.

    Parameters
    ----------
    x
        Matrix ``(cell, column)``.
    columns
        Positions of the wanted columns.
    measured
        Matrix of the shape of ``x`` in memory, 0 where a value was not measured: it becomes NaN.
    """
    in_order = np.array_equal(columns, np.arange(x.shape[1]))
    if is_on_disk(x):
        return row_source(x) if in_order else StackedRows([row_source(x)], [columns])
    block = x if in_order else x[:, columns]
    block = block.toarray() if sp.issparse(block) else np.asarray(block)
    block = np.ascontiguousarray(block, dtype=np.float32)
    if measured is not None:
        mask = measured[:, columns]
        block = np.where((mask.toarray() if sp.issparse(mask) else np.asarray(mask)) == 0, np.float32(np.nan), block)
    return MemoryRows(block)


def is_on_disk(x: Any) -> bool:
    """Whether rows of ``x`` must be read or computed before they are in memory."""
    return x.on_disk if isinstance(x, Rows) else not (isinstance(x, np.ndarray) or sp.issparse(x))


def stack(blocks: Sequence[Any]) -> Any:
    """Blocks below each other: CSR if any of them is sparse."""
    if any(sp.issparse(block) for block in blocks):
        return sp.vstack([as_csr(block) for block in blocks], format="csr")
    return np.concatenate(blocks)


def as_csr(block: Any) -> sp.csr_matrix:
    """A matrix in memory as CSR; float16, which sparse matrices do not have, as float32."""
    return sp.csr_matrix(block.astype(np.float32) if block.dtype == np.float16 else block)


def _canonical(x: Any) -> sp.csr_matrix:
    """CSR with sorted genes and each of them once in a cell; ``x`` stays as it is."""
    x = sp.csr_matrix(x)
    if not x.has_canonical_format:
        x = x.copy()
        x.sum_duplicates()
    return x


def _check_complete(array: Any, name: str) -> None:
    """Zarr reads a missing chunk as zeros, without a word; of a sparse matrix no chunk may be missing."""
    stored = getattr(array, "nchunks_initialized", None)
    if stored is None:
        return
    if array.size and stored < array.nchunks:
        raise OSError(
            f"{array.nchunks - stored} of {array.nchunks} chunks of `{array.path}` in {name} are missing; restore the "
            "store from a copy."
        )


def _file_name(data: Any, default: str) -> str:
    """The file that holds a group or array of h5py or zarr."""
    file = getattr(data, "file", None)
    path = getattr(file, "filename", None) or getattr(data, "store_path", None)
    return default if path is None else f"`{path}`"
