"""Bytes of files read without the library that wrote them."""

from __future__ import annotations

import os

import h5py
import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from zarr.codecs import BytesCodec, ZstdCodec

from cellweave.data import _raw
from cellweave.data._raw import raw_array

VALUES = np.arange(1000, dtype=np.int32) * 7
# kinds of storage whose bytes are plain
PLAIN = ("h5 contiguous", "h5 chunked", "h5 written in pieces", "zarr")


@pytest.fixture(scope="module")
def arrays(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("raw")
    with h5py.File(folder / "a.h5", "w") as file:
        file["contiguous"] = VALUES
        file.create_dataset("chunked", data=VALUES, chunks=(64,), maxshape=(None,))
        pieces = [file.create_dataset(name, (0,), "i4", chunks=(64,), maxshape=(None,)) for name in ("pieces", "other")]
        for start in range(0, 1000, 100):  # chunks of two arrays take turns in the file
            for piece in pieces:
                piece.resize((start + 100,))
                piece[start:] = VALUES[start : start + 100]
        file.create_dataset("gzip", data=VALUES, chunks=(64,), compression="gzip")
        file.create_dataset("shuffled", data=VALUES, chunks=(64,), shuffle=True)
        file.create_dataset("checked", data=VALUES, chunks=(64,), fletcher32=True)
        file.create_dataset("foreign", data=VALUES.astype(">i4"))
        file.create_dataset("missing", (1000,), "i4", chunks=(64,))[64:128] = 1
        file.create_dataset("empty", (0,), "i4", chunks=(64,), maxshape=(None,))
        file["matrix"] = VALUES.reshape(10, 100)
    group = zarr.open_group(folder / "a.zarr", mode="w")
    for name, options in {
        "plain": {"compressors": None},
        "zstd": {"compressors": ZstdCodec()},
        "big": {"compressors": None, "serializer": BytesCodec(endian="big")},
        "sharded": {"compressors": None, "shards": (128,)},
    }.items():
        group.create_array(name, shape=(1000,), chunks=(64,), dtype="i4", **options)[:] = VALUES
    v2 = zarr.create_array(folder / "v2.zarr", shape=(1000,), chunks=(64,), dtype="i4", zarr_format=2, compressors=None)
    v2[:] = VALUES
    file, group = h5py.File(folder / "a.h5", "r"), zarr.open_group(folder / "a.zarr", mode="r")
    return {
        "h5 contiguous": file["contiguous"],
        "h5 chunked": file["chunked"],
        "h5 written in pieces": file["pieces"],
        **{name: file[name] for name in ("gzip", "shuffled", "checked", "foreign", "missing", "empty", "matrix")},
        "zarr": group["plain"],
        **{f"zarr {name}": group[name] for name in ("zstd", "big", "sharded")},
        "zarr v2": zarr.open_array(folder / "v2.zarr", mode="r"),
    }


@given(st.data())
@pytest.mark.parametrize("kind", PLAIN)
def test_any_range_equals_that_of_the_library(arrays, kind, data):
    """Protects the counts: the bytes between any two positions are those that h5py or zarr would give."""
    start = data.draw(st.integers(0, 1000))
    stop = data.draw(st.integers(start, 1000))
    out = np.full(stop - start, -1, dtype=np.int32)
    raw_array(arrays[kind]).read_into(out, start, stop)
    np.testing.assert_array_equal(out, VALUES[start:stop])


@pytest.mark.parametrize(
    "kind",
    ["gzip", "shuffled", "checked", "foreign", "missing", "empty", "matrix", "zarr zstd", "zarr sharded", "zarr v2"],
)
def test_everything_else_is_left_to_the_library(arrays, kind):
    """Protects from wrong numbers: compressed, filtered, byte-swapped, missing and other chunks are not read raw."""
    assert raw_array(arrays[kind]) is None


def test_byte_order_of_zarr(arrays):
    """Protects numbers of the other byte order, which zarr tells apart by its codec."""
    assert raw_array(arrays["zarr big"]) is None


def test_neighbouring_chunks_are_one_read(arrays, monkeypatch):
    """Protects the speed: chunks that follow each other in the file cost one system call."""
    calls = []
    read = _raw._read_exactly
    monkeypatch.setattr(_raw, "_read_exactly", lambda *a: calls.append(len(a[1])) or read(*a))
    raw_array(arrays["h5 contiguous"]).read_into(np.empty(900, dtype=np.int32), 50, 950)
    assert calls == [3600]


def test_files_that_are_being_written_are_left_to_the_library(tmp_path):
    """Protects backed files opened for writing, whose newest values may not be on disk yet."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"] = VALUES
        assert raw_array(file["x"]) is None


def test_missing_bytes_are_an_error(tmp_path):
    """Protects from garbage: a file that was cut after opening is an error, not old memory."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"] = VALUES
    with h5py.File(tmp_path / "a.h5", "r") as file:
        raw = raw_array(file["x"])
        os.truncate(tmp_path / "a.h5", int(raw.offsets[0]) + 100)
        with pytest.raises(OSError, match="3900 bytes are missing"):
            raw.read_into(np.empty(1000, dtype=np.int32), 0, 1000)


def test_a_missing_chunk_of_zarr_is_an_error(tmp_path):
    """Protects from zeros that zarr would give in place of a chunk that has vanished."""
    array = zarr.create_array(tmp_path / "a", shape=(100,), chunks=(50,), dtype="i4", compressors=None)
    array[:] = 1
    raw = raw_array(zarr.open_array(tmp_path / "a", mode="r"))
    (tmp_path / "a" / "c" / "1").unlink()
    with pytest.raises(FileNotFoundError):
        raw.read_into(np.empty(100, dtype=np.int32), 0, 100)
