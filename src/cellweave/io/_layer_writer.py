"""Results as large as the data, written to a zarr store as they are computed."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self
from uuid import uuid4

import numpy as np
import zarr
from numpy.typing import NDArray

__all__ = ["LayerWriter"]

# Cells that wait in memory before they are written together, and cells per chunk.
_BUFFER, _CHUNK_CELLS = 8192, 512
# Attribute of a layer that says what produced it, as `uns["cellweave"]` does for results in memory.
_RECORD = "cellweave"


class LayerWriter:
    """A new float32 layer ``(cell, gene)`` of a zarr store, filled row by row; it appears when it is complete.

    Used as a context manager: a failure leaves the store as it was. Rows that are never written, and columns that are not
    among ``columns``, are NaN.

    Parameters
    ----------
    path
        The zarr store, on a local disk.
    key
        Name of the layer.
    shape
        Cells and genes of the store.
    columns
        Columns of the store that the values fill ``(value,)``; all in order by default.
    overwrite
        Replace a layer of this name.
    record
        What produces the values; kept beside them. A layer whose record names the same ``model`` may be replaced too.

    Raises
    ------
    ValueError
        If the store is not a zarr directory, or has such a layer and ``overwrite`` is false.
    """

    def __init__(
        self,
        path: Path,
        key: str,
        shape: tuple[int, int],
        columns: NDArray[np.int64] | None = None,
        overwrite: bool = False,
        record: Mapping[str, Any] | None = None,
    ) -> None:
        if not (path / "zarr.json").is_file():
            raise ValueError(
                f"`{path}` is not a zarr store of the present format, so that no layer can be added to it; rewrite it with "
                "`cellweave.pp.write_store`, or ask for fewer cells with `indices=`."
            )
        self.target = path / "layers" / key
        self.record = dict(record or {})
        if self.target.exists() and not overwrite and not self._is_ours():
            raise ValueError(
                f"`{path}` has a layer {key!r} already; choose another `key_added` or pass `overwrite=True`."
            )
        self.path, self.key, self.shape, self.columns = path, key, shape, columns
        self._work = path / f".layer.{uuid4().hex}"
        self._waiting: list[tuple[NDArray[np.int64], NDArray[np.float32]]] = []
        self._n_waiting = 0

    def __enter__(self) -> Self:
        chunks = (min(_CHUNK_CELLS, self.shape[0]), self.shape[1])
        self._array: Any = zarr.create_array(
            self._work, shape=self.shape, chunks=chunks, dtype="f4", fill_value=np.nan, compressors="auto"
        )
        self._array.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0", _RECORD: self.record})
        return self

    def _is_ours(self) -> bool:
        earlier: Any = dict(zarr.open_array(self.target, mode="r").attrs).get(_RECORD, {})
        return bool(self.record) and earlier.get("model") == self.record.get("model")

    def write(self, rows: NDArray[np.int64], values: NDArray[np.float32]) -> None:
        """Add some rows.

        Parameters
        ----------
        rows
            Rows of the store ``(row,)``; each comes once.
        values
            Their values ``(row, column)``.
        """
        self._waiting.append((rows, values))
        self._n_waiting += len(rows)
        if self._n_waiting >= _BUFFER:
            self._flush()

    def _flush(self) -> None:
        if not self._waiting:
            return
        rows = np.concatenate([rows for rows, _ in self._waiting])
        values = np.concatenate([values for _, values in self._waiting])
        self._waiting, self._n_waiting = [], 0
        order = np.argsort(rows)
        rows, values = rows[order], values[order]
        if self.columns is not None:
            whole = np.full((len(rows), self.shape[1]), np.nan, dtype=np.float32)
            whole[:, self.columns] = values
            values = whole
        if rows[-1] - rows[0] + 1 == len(rows):
            self._array[int(rows[0]) : int(rows[-1]) + 1] = values
        else:
            self._array.oindex[rows] = values

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            if kind is None:
                self._flush()
                group = zarr.open_group(self.path, mode="r+", use_consolidated=False)
                layers = group.require_group("layers")
                layers.attrs.update({"encoding-type": "dict", "encoding-version": "0.1.0"})
                if self.target.exists():
                    shutil.rmtree(self.target)
                self._work.rename(self.target)
                _refresh(self.path)
        finally:
            shutil.rmtree(self._work, ignore_errors=True)


def _refresh(path: Path) -> None:
    """Stores that repeat the metadata of all arrays in one place, as AnnData writes them, must learn of the new one."""
    if zarr.open_group(path, mode="r").metadata.consolidated_metadata is None:
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Consolidated metadata")
        zarr.consolidate_metadata(path)
