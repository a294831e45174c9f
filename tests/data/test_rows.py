"""Rows: every storage gives the rows of the matrix in memory."""

from __future__ import annotations

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr
from anndata import AnnData
from hypothesis import given
from hypothesis import strategies as st

from cellweave.data._rows import DiskRows, MemoryRows, StackedRows, is_on_disk, row_source, stack

N, G = 60, 7
STORAGES = [
    "memory_csr",
    "memory_csc",
    "memory_dense",
    "h5ad_csr",
    "h5ad_csc",
    "h5ad_dense",
    "h5ad_gzip",
    "h5ad_int64",
    "h5ad_unsorted",
    "h5ad_repeated",
    "zarr_csr",
    "zarr_dense",
    "zarr_v2_csr",
    "zarr_sharded",
    "dask_csr",
    "dask_dense",
    "dask_repeated",
    "stacked",
    "stacked_mixed",
]


def _counts() -> sp.csr_matrix:
    x = np.random.default_rng(0).poisson(0.8, size=(N, G)).astype(np.float32)
    x[[0, 17, N - 1]] = 0  # cells without counts, also the first and the last
    return sp.csr_matrix(x)


def _unsorted(x: sp.csr_matrix) -> sp.csr_matrix:
    x = x.copy()
    for start, stop in zip(x.indptr[:-1], x.indptr[1:], strict=True):
        x.indices[start:stop] = x.indices[start:stop][::-1].copy()
        x.data[start:stop] = x.data[start:stop][::-1].copy()
    x.has_sorted_indices = False
    return x


def _repeated(x: sp.csr_matrix) -> sp.csr_matrix:
    """Every value v as two entries, 1 and v - 1, of the same cell and gene."""
    row = np.repeat(np.arange(N), np.diff(x.indptr))
    order = np.argsort(np.concatenate([row, row]), kind="stable")
    data = np.concatenate([np.ones_like(x.data), x.data - 1])[order]
    return sp.csr_matrix((data, np.concatenate([x.indices, x.indices])[order], 2 * x.indptr), shape=x.shape)


def _h5ad(folder, x, **options):
    AnnData(x, obs=pd.DataFrame(index=[f"c{i}" for i in range(x.shape[0])])).write_h5ad(folder / "a.h5ad", **options)
    return h5py.File(folder / "a.h5ad")["X"]


def _raw_csr(folder, x, index=np.int64):
    """A CSR group exactly as the arrays of ``x`` are, without the cleaning that a writer may do."""
    with h5py.File(folder / "raw.h5", "w") as file:
        group = file.create_group("X")
        group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": x.shape})
        group["data"], group["indices"], group["indptr"] = x.data, x.indices.astype(index), x.indptr.astype(index)
    return h5py.File(folder / "raw.h5")["X"]


def _zarr(folder, x, zarr_format=3, shards=None):
    group = zarr.open_group(folder / f"a{zarr_format}.zarr", mode="w", zarr_format=zarr_format)
    if not sp.issparse(x):
        return group.create_array("X", data=x, chunks=(9, 3))
    group = group.create_group("X")
    group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": list(x.shape)})
    for name in ("data", "indices", "indptr"):
        group.create_array(name, data=getattr(x, name), chunks=(16,), shards=shards)
    return group


def _dask(x):
    return pytest.importorskip("dask.array").from_array(x, chunks=(13, G), asarray=False)


def _stacked(folder, x, mixed=False):
    """Three parts: genes permuted, one gene missing where it has no counts anyway, genes in order."""
    dense = x.toarray()
    order = np.random.default_rng(1).permutation(G)
    dense[10:30, 2] = 0
    second = np.delete(dense[10:30], 2, axis=1)
    where = np.array([0, 1, -1, 2, 3, 4, 5])
    parts = [DiskRows(_h5ad(folder, x[:10][:, order]), "a"), MemoryRows(second if mixed else sp.csr_matrix(second))]
    third = dense[30:].astype(np.int32) if mixed else dense[30:]
    parts.append(DiskRows(_zarr(folder, third if mixed else sp.csr_matrix(third)), "b"))
    return StackedRows(parts, [np.argsort(order), where, None]), dense


def _rows(storage: str, folder):
    """Rows of a storage, and the dense matrix they must equal."""
    x = _counts()
    dense = x.toarray()
    make = {
        "memory_csr": lambda: x,
        "memory_csc": lambda: x.tocsc(),
        "memory_dense": lambda: dense,
        "h5ad_csr": lambda: DiskRows(_h5ad(folder, x), "a"),
        "h5ad_csc": lambda: ad.read_h5ad(_h5ad(folder, x.tocsc()).file.filename, backed="r").X,
        "h5ad_dense": lambda: _h5ad(folder, dense),
        "h5ad_gzip": lambda: ad.read_h5ad(_h5ad(folder, x, compression="gzip").file.filename, backed="r").X,
        "h5ad_int64": lambda: DiskRows(_raw_csr(folder, x), "a"),
        "h5ad_unsorted": lambda: DiskRows(_raw_csr(folder, _unsorted(x), np.int32), "a"),
        "h5ad_repeated": lambda: DiskRows(_raw_csr(folder, _repeated(x), np.int32), "a"),
        "zarr_csr": lambda: DiskRows(_zarr(folder, x), "a"),
        "zarr_dense": lambda: _zarr(folder, dense),
        "zarr_v2_csr": lambda: DiskRows(_zarr(folder, x, 2), "a"),
        "zarr_sharded": lambda: DiskRows(_zarr(folder, x, shards=(48,)), "a"),
        "dask_csr": lambda: _dask(x),
        "dask_dense": lambda: _dask(dense),
        "dask_repeated": lambda: _dask(_repeated(x)),
    }
    if storage.startswith("stacked"):
        return _stacked(folder, x, mixed=storage == "stacked_mixed")
    return row_source(make[storage]()), dense


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Function from a storage to its rows, opened once for all tests of this file."""
    opened = {}

    def get(storage):
        if storage not in opened:
            opened[storage] = _rows(storage, tmp_path_factory.mktemp(storage))
        return opened[storage]

    return get


def _values(block) -> np.ndarray:
    return block.toarray() if sp.issparse(block) else block


def _dense(block) -> np.ndarray:
    """Values of a block, which must be canonical where it is sparse."""
    if sp.issparse(block):
        assert block.format == "csr"
        fresh = sp.csr_matrix((block.data, block.indices, block.indptr), shape=block.shape)
        assert fresh.has_canonical_format
        return block.toarray()
    assert isinstance(block, np.ndarray)
    return block


@pytest.mark.filterwarnings("ignore:.*compressed with gzip")
@pytest.mark.parametrize("storage", STORAGES)
def test_reads_equal_the_matrix_in_memory(sources, storage):
    """Protects all of training on files: every way to ask for rows gives them, canonical and in the order asked for."""
    rows, dense = sources(storage)
    assert rows.shape == dense.shape == (len(rows), G)
    for start, stop in [(0, N), (0, 0), (N, N), (33, 33), (9, 10), (5, 41), (10, 30), (29, 31)]:
        np.testing.assert_array_equal(_dense(rows.read(start, stop)), dense[start:stop])
    chunks = list(rows.chunks(17))
    assert [start for start, _ in chunks] == [0, 17, 34, 51]
    np.testing.assert_array_equal(np.concatenate([_dense(block) for _, block in chunks]), dense)


KEYS = [
    slice(None),
    slice(3, 9),
    slice(9, 3),
    slice(-5, None),
    slice(None, None, -1),
    slice(50, 2, -7),
    slice(0, N, 4),
    slice(N, N + 5),
    5,
    -1,
    [],
    [4, 4, 0],
    np.array([59, 0, 7, 7, 30]),
    np.array([-1, -60, 3]),
    np.array([], dtype=int),
    np.arange(N) % 3 == 0,
    np.zeros(N, dtype=bool),
]


@pytest.mark.filterwarnings("ignore:.*compressed with gzip")
@pytest.mark.parametrize("storage", STORAGES)
def test_indexing_follows_numpy(sources, storage):
    """Protects slices and views of stores: slices, masks and row numbers mean what they mean for an array."""
    rows, dense = sources(storage)
    for key in KEYS:
        expected = np.atleast_2d(dense[key])
        np.testing.assert_array_equal(_dense(rows[key]), expected.reshape(-1, G), err_msg=str(key))
        np.testing.assert_array_equal(_dense(rows[key, :]), expected.reshape(-1, G), err_msg=str(key))
    for columns in (slice(2, 5), np.array([6, 0, 0]), np.arange(G) > 3):
        chosen = np.array([40, 3, 3, 0])
        np.testing.assert_array_equal(_values(rows[chosen, columns]), dense[chosen][:, columns])
        np.testing.assert_array_equal(_values(rows[3:7, columns]), dense[3:7][:, columns])
    grid = np.ix_([8, 2, 50], [1, 5])
    np.testing.assert_array_equal(_values(rows[grid]), dense[grid])
    for outside in (np.array([N]), np.array([-N - 1]), [0, N]):
        with pytest.raises(IndexError):
            rows[outside]


@pytest.mark.filterwarnings("ignore:.*compressed with gzip")
@pytest.mark.parametrize("storage", STORAGES)
@given(
    st.lists(st.integers(0, N - 1), unique=True, max_size=N).map(lambda rows: np.array(sorted(rows), dtype=np.int64))
)
def test_take_equals_the_chosen_rows(sources, storage, chosen):
    """Protects the reading of buffers: any sorted selection, whatever its gaps."""
    rows, dense = sources(storage)
    np.testing.assert_array_equal(_dense(rows.take(chosen)), dense[chosen])


def test_take_reads_in_runs(tmp_path, monkeypatch):
    """Protects the speed on disk: gaps of up to 16 rows are read through, larger ones split the read."""
    rows = DiskRows(_h5ad(tmp_path, sp.random(200, G, 0.5, format="csr")), "a")
    reads = []
    read = DiskRows._read_runs
    monkeypatch.setattr(DiskRows, "_read_runs", lambda self, runs: reads.append(runs) or read(self, runs))
    wanted = np.array([0, 1, 17, 34, 52, 53, 199])
    np.testing.assert_array_equal(rows.take(wanted).toarray(), rows[wanted].toarray())
    assert reads[0] == [(0, 35), (52, 54), (199, 200)]


def test_types_of_stacked_rows_do_not_depend_on_the_cells(tmp_path):
    """Protects mixed files: a read of one part has the common type too."""
    parts = [MemoryRows(np.ones((3, 2), dtype=np.int32)), MemoryRows(sp.csr_matrix(np.ones((3, 2), dtype=np.float32)))]
    rows = StackedRows(parts, [None, None])
    assert rows.dtype == rows.read(0, 2).dtype == rows.read(4, 5).dtype == rows.read(2, 5).dtype == np.float64
    half = StackedRows([MemoryRows(np.ones((3, 2), dtype=np.float16)), parts[1]], [None, None])
    np.testing.assert_array_equal(_dense(half.read(1, 5)), np.ones((4, 2)))


def test_parts_must_have_the_same_number_of_genes():
    """Protects against cells of different genes below each other."""
    with pytest.raises(ValueError, match=r"different numbers of genes: \[2, 3\]"):
        StackedRows([MemoryRows(np.ones((1, 2))), MemoryRows(np.ones((1, 3)))], [None, None])


def test_what_is_on_disk(tmp_path):
    """Protects the choice of blocks: memory is not read in blocks, files and delayed arrays are."""
    x = _counts()
    assert not any(map(is_on_disk, (x, x.toarray(), x.tocsc(), sp.csr_array(x), MemoryRows(x))))
    on_disk = (
        _h5ad(tmp_path, x.toarray()),
        _dask(x),
        StackedRows([MemoryRows(x), DiskRows(_zarr(tmp_path, x), "a")], [None] * 2),
    )
    assert all(map(is_on_disk, on_disk))
    assert not StackedRows([MemoryRows(x)], [None]).on_disk


def test_memory_is_shared_and_never_changed():
    """Protects the user's matrix and memory: canonical CSR is used as it is, anything else is cleaned in a copy."""
    x, repeated = _counts(), _repeated(_counts())
    assert np.shares_memory(MemoryRows(x).x.data, x.data)
    for source in (MemoryRows(repeated), row_source(_dask(repeated))):
        assert source.read(0, N).nnz == x.nnz
        assert repeated.nnz == 2 * x.nnz


def test_stack_keeps_dense_dense_and_makes_mixtures_sparse():
    """Protects joined buffers of files of both kinds."""
    dense, sparse = np.ones((2, 3)), sp.csr_matrix(np.eye(3))
    assert isinstance(stack([dense, dense]), np.ndarray)
    np.testing.assert_array_equal(_dense(stack([dense, sparse])), np.concatenate([dense, np.eye(3)]))


def test_dask_chunks_are_computed_once_per_buffer():
    """Protects the cost of dask arrays: scattered rows of one chunk do not compute it again and again."""
    calls = []

    def load(block):
        calls.append(len(block))
        return block

    x = _dask(_counts().toarray()).map_blocks(load, dtype=np.float32, meta=np.empty((0, 0), np.float32))
    rows = row_source(x)
    calls.clear()
    rows.take(np.array([0, 30, 59]))
    assert len(calls) == 3


def test_dense_arrays_may_have_empty_chunks(tmp_path):
    """Protects valid files: zarr does not store chunks of zeros, which is no damage."""
    x = np.zeros((20, 4), dtype=np.float32)
    x[3, 1] = 2
    array = zarr.create_array(tmp_path / "a.zarr", data=x, chunks=(5, 2))
    assert array.nchunks_initialized < array.nchunks
    np.testing.assert_array_equal(row_source(array).read(0, 20), x)
