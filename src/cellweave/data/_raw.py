"""Arrays whose bytes stand in a file as they are, read without the library that wrote them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BytesCodec
from zarr.storage import LocalStore

__all__ = ["RawArray", "raw_array"]


class RawArray(NamedTuple):
    """A one-dimensional array in chunks of plain bytes; one system call copies a run of them to where they are needed."""

    dtype: np.dtype
    chunk: int  # values per chunk
    offsets: NDArray[np.int64]  # (chunk,): first byte of each chunk in its file
    source: Any  # the HDF5 file, or the names of one file per chunk

    def read_into(self, out: NDArray, start: int, stop: int) -> None:
        """Copy values ``start`` to ``stop`` to ``out``.

        Raises
        ------
        OSError
            If bytes are missing.
        """
        size, at = self.dtype.itemsize, 0
        for first, last in self._runs(start, stop):
            chunk = first // self.chunk
            view = out[at : at + last - first].view(np.uint8).data
            self._read(chunk, view, int(self.offsets[chunk]) + (first - chunk * self.chunk) * size)
            at += last - first

    def _runs(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Parts of the range that stand together in one file."""
        n_bytes = self.chunk * self.dtype.itemsize
        first = start
        while first < stop:
            chunk = first // self.chunk
            last = (chunk + 1) * self.chunk
            while last < stop and isinstance(self.source, h5py.File):
                if self.offsets[chunk + 1] != self.offsets[chunk] + n_bytes:
                    break
                chunk, last = chunk + 1, last + self.chunk
            yield first, min(last, stop)
            first = last

    def _read(self, chunk: int, view: memoryview, offset: int) -> None:
        if isinstance(self.source, h5py.File):
            _read_exactly(self.source.id.get_vfd_handle(), view, offset)
            return
        descriptor = os.open(self.source[chunk], os.O_RDONLY)
        try:
            _read_exactly(descriptor, view, offset)
        finally:
            os.close(descriptor)


def _read_exactly(descriptor: int, view: memoryview, offset: int) -> None:
    while len(view):
        n = os.preadv(descriptor, [view], offset)
        if n == 0:
            raise OSError(f"{len(view)} bytes are missing")
        view, offset = view[n:], offset + n


def raw_array(array: Any) -> RawArray | None:
    """The plain bytes of an array of h5py or zarr; None where they are compressed, foreign or not on a local disk."""
    if len(array.shape) != 1 or array.shape[0] == 0 or not hasattr(os, "preadv"):
        return None
    if not array.dtype.isnative or array.dtype.kind not in "iuf":
        return None
    return _of_hdf5(array) if isinstance(array, h5py.Dataset) else _of_zarr(array)


def _of_hdf5(array: h5py.Dataset) -> RawArray | None:
    file, properties = array.file, array.id.get_create_plist()
    # what is being written may still be in the cache of the library
    is_plain = file.mode == "r" and file.driver == "sec2" and file.userblock_size == 0
    if not is_plain or properties.get_nfilters() or array.external or array.is_virtual:
        return None
    if array.chunks is None:
        offset = array.id.get_offset()
        return None if offset is None else RawArray(array.dtype, array.shape[0], np.array([offset]), file)
    chunk = array.chunks[0]
    offsets = np.full(-(-array.shape[0] // chunk), -1, dtype=np.int64)

    def place(info: Any) -> None:
        offsets[info.chunk_offset[0] // chunk] = info.byte_offset

    array.id.chunk_iter(place)
    return None if (offsets < 0).any() else RawArray(array.dtype, chunk, offsets, file)


def _of_zarr(array: zarr.Array) -> RawArray | None:
    metadata, store = array.metadata, array.store
    if metadata.zarr_format != 3 or not isinstance(store, LocalStore):
        return None
    if not all(isinstance(codec, BytesCodec) and _is_native(codec) for codec in metadata.codecs):
        return None
    chunk = array.chunks[0]
    n_chunks = -(-array.shape[0] // chunk)
    folder = Path(store.root) / array.path
    names = [str(folder / metadata.encode_chunk_key((i,))) for i in range(n_chunks)]
    return RawArray(array.dtype, chunk, np.zeros(n_chunks, dtype=np.int64), names)


def _is_native(codec: BytesCodec) -> bool:
    return codec.endian is None or str(getattr(codec.endian, "value", codec.endian)) == sys.byteorder
