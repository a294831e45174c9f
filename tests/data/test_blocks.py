"""Reading in blocks: every cell once, one order for every storage, bounded reads, no thread left behind."""

from __future__ import annotations

import threading

import anndata as ad
import numpy as np
import pytest
import torch
from anndata import AnnData
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cellweave._keys import LOADER_KEYS, REGISTRY_KEYS
from cellweave.data import CellSetLoader, CellSetSampler, open_store
from cellweave.data._rows import DiskRows, MemoryRows
from cellweave.model import StackModel

BLOCKS = {"block_size": 8, "buffer_size": 24}


def _sampler(rows, groups, rank: int = 0, world: int = 1, **options) -> CellSetSampler:
    arguments = {"n_cells": 4, "batch_size": 8, "shuffle": True, "seed": 0, **BLOCKS, **options}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.distributed.is_available", lambda: True)
        patch.setattr("torch.distributed.is_initialized", lambda: True)
        patch.setattr("torch.distributed.get_world_size", lambda: world)
        patch.setattr("torch.distributed.get_rank", lambda: rank)
        return CellSetSampler(np.asarray(rows), np.asarray(groups), distributed=True, **arguments)


def _epoch(sampler, epoch: int = 0):
    sampler.set_epoch(epoch)
    return list(sampler)


def _same(first, second) -> bool:
    return len(first) == len(second) and all(
        np.array_equal(a, b) for one, two in zip(first, second, strict=True) for a, b in zip(one, two, strict=True)
    )


@st.composite
def _settings(draw):
    """Rows, their groups and the options of a sampler: any sizes that do and do not fit to each other."""
    groups = np.array(draw(st.lists(st.integers(0, 4), min_size=1, max_size=120)))
    groups = np.sort(groups) if draw(st.booleans()) else groups
    rows = 2 * np.arange(len(groups)) + 5
    if draw(st.booleans()):
        rows = rows[np.random.default_rng(0).permutation(len(rows))]
    options = {
        "n_cells": draw(st.integers(1, 9)),
        "batch_size": draw(st.integers(1, 30)),
        "block_size": draw(st.integers(1, 20)),
        "buffer_size": draw(st.integers(1, 50)),
        "shuffle": draw(st.booleans()),
        "rule": draw(st.sampled_from(["random", "sequential"])),
        "seed": draw(st.integers(0, 3)),
    }
    return rows, groups, options


SMALLEST = {
    "n_cells": 4,
    "batch_size": 4,
    "block_size": 4,
    "buffer_size": 4,
    "shuffle": True,
    "rule": "random",
    "seed": 0,
}
# two full and two short blocks for three ranks; contexts larger than the buffer, in fewer blocks than ranks
UNEVEN = (np.arange(14), np.repeat([0, 1], 7), SMALLEST)
LARGE_CONTEXTS = (
    np.arange(40),
    np.zeros(40, dtype=int),
    {**SMALLEST, "n_cells": 16, "block_size": 2, "buffer_size": 2},
)


@settings(max_examples=150)
@example(UNEVEN, 3)
@example(LARGE_CONTEXTS, 5)
@given(_settings(), st.integers(1, 5))
def test_every_cell_once_and_all_ranks_equally_long(case, world):
    """Protects blocked epochs: each cell counts once over all ranks, groups stay apart, no rank waits for ever."""
    rows, groups, options = case
    group_of = dict(zip(rows.tolist(), groups.tolist(), strict=True))
    samplers = [_sampler(rows, groups, rank, world, **options) for rank in range(world)]
    for epoch in (0, 3):
        seen, lengths = [], set()
        for sampler in samplers:
            batches = _epoch(sampler, epoch)
            lengths |= {len(batches), len(sampler)}
            for batch_rows, valid in batches:
                seen.extend(batch_rows[valid].tolist())
                for context in batch_rows.reshape(-1, options["n_cells"]):
                    assert len({group_of[row] for row in context.tolist()}) == 1
        assert sorted(seen) == sorted(rows.tolist())
        assert len(lengths) == 1
        assert lengths.pop() > 0


@settings(max_examples=150)
@given(_settings(), st.integers(1, 3))
def test_batches_use_only_cells_that_were_read_or_kept(case, world):
    """Protects bounded memory: a reader that forgets all but one buffer and the kept cells has every cell it needs."""
    rows, groups, options = case
    size = -(-options["block_size"] // options["n_cells"]) * options["n_cells"]
    limit = max(options["buffer_size"], size) * world
    for rank in range(world):
        held: set[int] = set()
        for buffer in _sampler(rows, groups, rank, world, **options).buffers():
            assert np.array_equal(buffer.rows, np.unique(buffer.rows))
            assert len(buffer.rows) <= limit
            available = held | set(buffer.rows.tolist())
            for batch_rows, _ in buffer.batches:
                assert set(batch_rows.tolist()) <= available
            assert set(buffer.kept.tolist()) <= available
            held = set(buffer.kept.tolist())


@settings(max_examples=100)
@given(_settings(), st.integers(0, 40))
def test_a_later_start_skips_exactly_the_first_batches(case, start):
    """Protects resuming inside an epoch: batch k and all after it are the same, also if it begins in a later buffer."""
    rows, groups, options = case
    whole = _epoch(_sampler(rows, groups, **options), 2)
    sampler = _sampler(rows, groups, **options)
    sampler.start_batch = start
    assert _same(_epoch(sampler, 2), whole[start:])
    assert sampler.start_batch == 0
    assert _same(_epoch(sampler, 2), whole)


@settings(max_examples=60)
@given(_settings(), st.integers(0, 40))
def test_kept_cells_survive_a_later_start(case, start):
    """Protects resuming a stream: cells of skipped buffers that a later batch needs are read again."""
    rows, groups, options = case
    sampler = _sampler(rows, groups, **options)
    sampler.start_batch = start
    held: set[int] = set()
    for buffer in sampler.buffers():
        available = held | set(buffer.rows.tolist())
        assert all(set(batch.tolist()) <= available for batch, _ in buffer.batches)
        assert set(buffer.kept.tolist()) <= available
        held = set(buffer.kept.tolist())


def test_a_later_start_reads_little_before_it():
    """Protects the speed of resuming: of skipped buffers only the cells that a later batch needs are read."""
    sampler = _sampler(np.arange(480), np.zeros(480, dtype=int), batch_size=20)
    sampler.start_batch = 12
    sizes = [len(buffer.rows) for buffer in sampler.buffers()]
    assert max(sizes[:8]) < 20
    assert sizes[-1] == 24


def test_order_is_a_function_of_seed_epoch_and_rank():
    """Protects exact repetition: the same triple, the same order; any other, another one."""
    rows, groups = np.arange(200), np.repeat([0, 1], 100)
    np.random.seed(1)
    first = _epoch(_sampler(rows, groups, 1, 2), 3)
    np.random.seed(2)
    torch.manual_seed(2)
    again = _sampler(rows, groups, 1, 2)
    assert not _same(_epoch(again, 0), first)
    assert _same(_epoch(again, 3), first)
    assert not _same(_epoch(_sampler(rows, groups, 0, 2), 3), first)
    assert not _same(_epoch(_sampler(rows, groups, 1, 2, seed=1), 3), first)
    fixed = _sampler(rows, groups, shuffle=False)
    assert _same(_epoch(fixed, 0), _epoch(fixed, 5))


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("rule", ["random", "sequential"])
def test_what_fits_into_one_buffer_is_as_without_blocks(world, rule):
    """Protects small data: blocks change nothing as long as all cells are in memory together."""
    rows, groups = np.arange(60), np.arange(60) % 3
    for rank in range(world):
        blocked = _epoch(_sampler(rows, groups, rank, world, rule=rule, buffer_size=60), 1)
        assert _same(blocked, _epoch(_sampler(rows, groups, rank, world, rule=rule, block_size=None), 1))


def test_sequential_contexts_do_not_depend_on_blocks():
    """Protects parity with the published inference on large files: row order, and the same filling of the last context."""
    rows, groups = np.arange(103), np.zeros(103, dtype=int)
    blocked = _epoch(_sampler(rows, groups, rule="sequential", shuffle=False))
    assert _same(blocked, _epoch(_sampler(rows, groups, rule="sequential", shuffle=False, block_size=None)))


@pytest.mark.parametrize("shuffle", [True, False])
def test_blocks_are_shuffled_over_the_whole_file(shuffle):
    """Protects mixing, also of results: a buffer holds blocks from everywhere, not a window that moves along the file."""
    sampler = _sampler(np.arange(960), np.zeros(960, dtype=int), buffer_size=96, shuffle=shuffle)
    spans = [buffer.rows[-1] - buffer.rows[0] for buffer in sampler.buffers()]
    assert np.mean(spans) > 480
    contexts = np.concatenate([rows.reshape(-1, 4) for rows, _ in sampler])
    assert np.mean(np.ptp(contexts // 8, axis=1) > 0) > 0.9  # cells of a context come from several blocks


def test_small_groups_share_a_buffer():
    """Protects files of many small groups: a buffer is filled with cells, not with a number of blocks."""
    groups = np.repeat(np.arange(50), 2)
    sizes = [len(buffer.rows) for buffer in _sampler(np.arange(100), groups, block_size=8, buffer_size=24).buffers()]
    assert sizes == [24, 24, 24, 24, 4]


def _runs(rows) -> int:
    return 1 + int(np.sum(np.diff(rows) > 1))


def test_a_grouped_file_is_read_in_whole_blocks():
    """Protects the speed of grouped stores: a block of one group is one contiguous run of its size."""
    groups = np.repeat(np.arange(6), 40)
    sampler = _sampler(np.arange(240), groups)
    assert not sampler.is_scattered
    buffers = list(sampler.buffers())
    assert len(buffers) == 10
    assert all(_runs(buffer.rows) <= 3 and len(buffer.rows) == 24 for buffer in buffers)
    assert _sampler(np.arange(240), np.arange(240) % 20).is_scattered
    assert not _sampler(np.arange(240), np.arange(240) % 20, buffer_size=240).is_scattered


@pytest.mark.parametrize("name", ["n_cells", "block_size", "buffer_size"])
def test_sizes_must_be_positive(name):
    """Protects against a silent endless or empty epoch."""
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got -1"):
        _sampler(np.arange(9), np.zeros(9), **{name: -1})


# ---------------------------------------------------------------- loaders


def _manager(adata):
    StackModel.setup_anndata(adata, batch_key="batch", labels_key="cell_type", context_key="donor")
    return StackModel._get_most_recent_anndata_manager(adata, required=True)


def _loader(adata, **options) -> CellSetLoader:
    arguments = {"n_cells": 4, "batch_size": 16, "shuffle": True, "seed": 3, **BLOCKS, **options}
    return CellSetLoader(_manager(adata), **arguments)


def _assert_same_batches(first, second) -> None:
    assert len(first) == len(second) > 0
    for one, two in zip(first, second, strict=True):
        assert one.keys() == two.keys()
        for key, value in one.items():
            if isinstance(value, torch.Tensor):
                dense = [t.to_dense() if t.layout == torch.sparse_csr else t for t in (value, two[key])]
                assert dense[0].dtype == dense[1].dtype
                torch.testing.assert_close(*dense, rtol=0, atol=0)
            else:
                assert value == two[key]


@pytest.fixture
def adata(make_adata) -> AnnData:
    return make_adata(n_cells=150)


STORES = ["backed", "h5ad", "h5ad_dense", "zarr", "zarr_dense", "two_files", "dask"]


@pytest.fixture
def stored(adata, tmp_path):
    """Function from the kind of a store to the same cells in it."""

    def store(kind):
        if kind == "dask":
            other = adata.copy()
            other.X = pytest.importorskip("dask.array").from_array(adata.X.toarray(), chunks=(40, 20))
            return other
        other = adata.copy()
        if kind.endswith("dense"):
            other.X = adata.X.toarray()
        if kind.startswith("zarr"):
            other.write_zarr(tmp_path / "a.zarr")
            return open_store(tmp_path / "a.zarr")
        if kind == "two_files":
            order = np.random.default_rng(0).permutation(adata.n_vars)
            adata[:70].write_h5ad(tmp_path / "a.h5ad")
            adata[70:, order].write_zarr(tmp_path / "b.zarr")
            return open_store([tmp_path / "a.h5ad", tmp_path / "b.zarr"])
        other.write_h5ad(tmp_path / "a.h5ad")
        return ad.read_h5ad(tmp_path / "a.h5ad", backed="r") if kind == "backed" else open_store(tmp_path / "a.h5ad")

    return store


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("kind", STORES)
def test_batches_do_not_depend_on_the_storage(adata, stored, kind, sparse):
    """Protects equal training: bit for bit the batches of memory, in two epochs, with and without a skipped start."""
    memory, disk = _loader(adata, load_sparse_tensor=sparse), _loader(stored(kind), load_sparse_tensor=sparse)
    assert disk.reads_ahead
    assert not memory.reads_ahead
    for epoch, start in [(0, 0), (1, 0), (1, 4)]:
        for loader in (memory, disk):
            loader.sampler.set_epoch(epoch)
            loader.sampler.start_batch = start
        _assert_same_batches(list(memory), list(disk))


def test_worker_processes_read_blocks_of_memory(adata):
    """Protects `num_workers` with blocks: the same batches in the same order from two worker processes."""
    _assert_same_batches(list(_loader(adata)), list(_loader(adata, num_workers=2)))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_worker_processes_have_no_part_in_reading_files(adata, stored, method):
    """Protects open files: no process is started for data on disk, whatever is asked for, and nothing hangs."""
    store = stored("backed")
    loader = _loader(store, num_workers=2, multiprocessing_context=method, persistent_workers=True)
    assert loader.num_workers == 0
    _assert_same_batches(list(_loader(adata)), list(loader))


def test_unblocked_files_give_the_unblocked_order(adata, stored):
    """Protects `block_size=None` on disk: slow reads of single cells, in the order of memory."""
    disk = _loader(stored("h5ad"), block_size=None)
    assert not disk.reads_ahead
    _assert_same_batches(list(_loader(adata, block_size=None)), list(disk))


def _readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("cellweave-reader")]


def test_errors_of_the_reader_reach_the_consumer(stored, monkeypatch):
    """Protects against silence: a failed read ahead is raised where batches are asked for, after the good ones."""
    loader = _loader(stored("h5ad"))
    expected = len(next(loader.sampler.buffers()).batches)
    read, calls = DiskRows.take, []

    def fail(self, rows):
        calls.append(len(rows))
        if len(calls) == 2:
            raise OSError("the disk is gone")
        return read(self, rows)

    monkeypatch.setattr(DiskRows, "take", fail)
    batches = []
    with pytest.raises(OSError, match="the disk is gone"):
        for batch in loader:
            batches.append(batch)
    assert len(batches) == expected
    assert _readers() == []


def test_abandoned_iterators_leave_no_thread(stored):
    """Protects notebooks: a loop that is left early ends its reader."""
    loader = _loader(stored("h5ad"))
    for _ in loader:
        assert len(_readers()) == 1
        break
    assert _readers() == []
    iterator = iter(loader)
    next(iterator)
    iterator.close()
    assert _readers() == []


def test_two_iterators_at_once(stored):
    """Protects validation inside an epoch: iterators of one file do not disturb each other."""
    loader = _loader(stored("h5ad"))
    expected = list(loader)
    first, second = iter(loader), iter(loader)
    pairs = [(next(first), next(second)) for _ in range(len(loader))]
    _assert_same_batches([one for one, _ in pairs], expected)
    _assert_same_batches([two for _, two in pairs], expected)


def test_one_buffer_is_read_ahead_and_no_more(stored, monkeypatch):
    """Protects memory: while batches of a buffer are used, at most the next one is being read."""
    loader = _loader(stored("h5ad"))
    read, reads = DiskRows.take, []
    monkeypatch.setattr(DiskRows, "take", lambda self, rows: reads.append(len(rows)) or read(self, rows))
    iterator, buffers = iter(loader), list(loader.sampler.buffers())
    for number, buffer in enumerate(buffers):
        for _ in buffer.batches:
            next(iterator)
            assert len(reads) <= number + 2
    assert reads == [len(buffer.rows) for buffer in buffers]


def test_scattered_groups_are_reported_for_files_only(make_adata, tmp_path):
    """Protects the user's time: a file whose groups are scattered is slow, and the warning says what to do."""
    adata = make_adata(n_cells=400)
    adata.obs["donor"] = (np.arange(400) % 40).astype(str)
    adata.write_h5ad(tmp_path / "a.h5ad")
    store = open_store(tmp_path / "a.h5ad")
    with pytest.warns(UserWarning, match="groups? .*scattered over the file.*write_store"):
        _loader(store)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *a, **k: pytest.fail(str(a)))
        _loader(store, by_context=False)
        _loader(adata)


def test_memory_is_not_copied_for_blocks(adata):
    """Protects memory: blocks of an object in memory are an order, not copies."""
    loader = _loader(adata)
    assert isinstance(loader._cells.dataset.x, MemoryRows)
    assert np.shares_memory(loader._cells.dataset.x.x.data, adata.X.data)
    (batch, *_) = list(loader)
    rows = batch[LOADER_KEYS.ROW].numpy()
    np.testing.assert_array_equal(batch[REGISTRY_KEYS.X].numpy(), adata.X[rows].toarray())
