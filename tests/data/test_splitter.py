"""The split: sizes, whole groups, reproducibility, and refusals."""

from __future__ import annotations

import numpy as np
import pytest
import scvi
from hypothesis import given
from hypothesis import strategies as st

from cellweave._keys import LOADER_KEYS
from cellweave.data import CellSetSplitter, open_store, split_cells
from cellweave.model import StackModel

SHARES = st.sampled_from([0.05, 0.1, 0.25, 0.5, 0.75, 0.8, 0.9, 1.0])


@pytest.fixture
def manager(make_adata):
    adata = make_adata(n_cells=90)
    StackModel.setup_anndata(adata, context_key="donor")
    return StackModel._get_most_recent_anndata_manager(adata, required=True)


def _splitter(manager, **options) -> CellSetSplitter:
    return CellSetSplitter(manager, **{"n_cells": 8, **options})


def _parts(splitter):
    return splitter.train_idx, splitter.val_idx, splitter.test_idx


@given(st.lists(st.integers(0, 5), min_size=1, max_size=80).map(np.array), SHARES, SHARES, st.booleans())
def test_every_cell_is_in_exactly_one_part(groups, train_size, validation_size, by_group):
    """Protects against leakage and loss: training, validation and test rows partition the cells."""
    validation_size = min(validation_size, 1 - train_size)
    split_by = "context" if by_group else "cell"
    parts = split_cells(groups, train_size, validation_size, np.random.default_rng(0), split_by)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(len(groups)))
    if by_group:
        sets = [set(groups[part]) for part in parts]
        assert sum(map(len, sets)) == len(set(groups))


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=120).map(np.array),
    SHARES,
    SHARES,
    st.integers(1, 20),
    st.booleans(),
)
def test_blocks_stay_whole(groups, train_size, validation_size, block_size, is_sorted):
    """Protects long reads of each part: neighbouring cells of a group are in the same part, and no cell is lost."""
    groups = np.sort(groups) if is_sorted else groups
    sizes = train_size, min(validation_size, 1 - train_size)
    parts = split_cells(groups, *sizes, np.random.default_rng(0), block_size=block_size)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(len(groups)))
    part_of = np.empty(len(groups), dtype=int)
    for number, part in enumerate(parts):
        part_of[part] = number
    for group in set(groups):
        members = np.flatnonzero(groups == group)
        for start in range(0, len(members), block_size):
            assert len(set(part_of[members[start : start + block_size]])) == 1


@pytest.mark.parametrize(
    ("options", "is_whole"),
    [
        ({}, False),
        ({"block_size": 5}, True),
        ({"block_size": 5, "buffer_size": 90}, False),
        ({"block_size": None}, False),
    ],
)
def test_the_split_is_by_blocks_when_reading_is(manager, options, is_whole):
    """Protects equal splits of memory and disk: the split follows `block_size`, and cells that fit into a buffer are free."""
    splitter = _splitter(manager, by_context=False, train_size=0.5, **{"buffer_size": 20, **options})
    part = np.zeros(90, dtype=int)
    part[splitter.val_idx] = 1
    assert bool((part.reshape(18, 5) == part.reshape(18, 5)[:, :1]).all()) == is_whole
    assert abs(splitter.n_train - 45) <= 5


def test_files_are_split_by_blocks(make_adata, tmp_path, monkeypatch):
    """Protects the defaults: a file with more cells than a buffer is split by blocks of its own, memory by cell."""
    monkeypatch.setattr("cellweave.data._loader._BLOCK_SIZE", 5)
    adata = make_adata(n_cells=90)
    adata.write_h5ad(tmp_path / "a.h5ad")
    wholes = []
    for data in (adata, open_store(tmp_path / "a.h5ad")):
        StackModel.setup_anndata(data)
        manager = StackModel._get_most_recent_anndata_manager(data, required=True)
        part = np.zeros(90, dtype=int)
        part[_splitter(manager, train_size=0.5, buffer_size=20).val_idx] = 1
        wholes.append(bool((part.reshape(18, 5) == part.reshape(18, 5)[:, :1]).all()))
    assert wholes == [False, True]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({}, (81, 9, 0)),
        ({"train_size": 0.8}, (72, 18, 0)),
        ({"train_size": 0.33}, (30, 60, 0)),
        ({"train_size": 0.333, "validation_size": 0.333}, (30, 30, 30)),
        ({"validation_size": 0.2}, (72, 18, 0)),
        ({"train_size": 0.5, "validation_size": 0.25}, (45, 22, 23)),
        ({"train_size": 1.0}, (90, 0, 0)),
        ({"train_size": 0.5, "validation_size": 0.0}, (45, 0, 45)),
    ],
)
def test_sizes(manager, sizes, expected):
    """Protects the meaning of the shares, which is that of scvi-tools; what neither names is the test set."""
    splitter = _splitter(manager, **sizes)
    assert tuple(map(len, _parts(splitter))) == expected
    assert (splitter.n_train, splitter.n_val) == expected[:2]


def test_empty_parts_have_no_loader(manager):
    """Protects Lightning from an empty loader: no validation or test cells, no batches."""
    splitter = _splitter(manager, train_size=1.0)
    assert list(splitter.val_dataloader()) == list(splitter.test_dataloader()) == []


def test_split_by_context_keeps_groups_whole(manager):
    """Protects against leakage between donors: no donor has cells in two parts."""
    splitter = _splitter(manager, split_by="context", train_size=0.5, validation_size=0.25)
    donors = manager.adata.obs["donor"].to_numpy()
    sets = [set(donors[part]) for part in _parts(splitter)]
    assert set.union(*sets) == set(donors)
    assert sum(map(len, sets)) == len(set(donors))


def test_split_is_reproducible_with_the_scvi_seed(manager):
    """Protects reproducibility: `scvi.settings.seed` decides the split, the global numpy state does not."""
    splits = []
    for seed, noise in [(1, 5), (1, 6), (2, 5)]:
        scvi.settings.seed = seed
        np.random.seed(noise)
        splits.append(_splitter(manager).val_idx)
    np.testing.assert_array_equal(splits[0], splits[1])
    assert not np.array_equal(splits[0], splits[2])


def test_split_without_shuffling_follows_the_row_order(manager):
    """Protects `shuffle_set_split=False`: the first rows train, the next validate, the rest test."""
    splitter = _splitter(manager, shuffle_set_split=False, train_size=0.5, validation_size=0.2)
    np.testing.assert_array_equal(np.concatenate(_parts(splitter)), np.arange(90))


def test_loaders_visit_their_own_part(manager):
    """Protects the split itself: each loader yields exactly the cells of its part, once."""
    splitter = _splitter(manager, train_size=0.6, validation_size=0.2)
    loaders = (splitter.train_dataloader(), splitter.val_dataloader(), splitter.test_dataloader())
    for loader, expected in zip(loaders, _parts(splitter), strict=True):
        rows = np.concatenate([b[LOADER_KEYS.ROW][b[LOADER_KEYS.VALID]].numpy() for b in loader])
        np.testing.assert_array_equal(np.sort(rows), expected)


def test_only_training_contexts_change_with_the_epoch(manager):
    """Protects comparable validation losses: training contexts are new every epoch, validation contexts fixed."""
    splitter = _splitter(manager)
    changes = []
    for loader in (splitter.train_dataloader(), splitter.val_dataloader()):
        orders = []
        for epoch in (0, 1):
            loader.sampler.set_epoch(epoch)
            orders.append([b[LOADER_KEYS.ROW].tolist() for b in loader])
        changes.append(orders[0] != orders[1])
    assert changes == [True, False]


@pytest.mark.parametrize(
    "sizes",
    [
        {"train_size": 0.0},
        {"train_size": -0.1},
        {"train_size": 1.1},
        {"train_size": 80},
        {"validation_size": 1.0},
        {"validation_size": -0.1},
        {"train_size": 0.9, "validation_size": 0.2},
    ],
)
def test_impossible_sizes_are_refused(manager, sizes):
    """Protects against silent nonsense: shares outside their range, or that add up to more than all cells."""
    with pytest.raises(ValueError, match=r"`train_size` must be in \(0, 1\], `validation_size` in \[0, 1\)"):
        _splitter(manager, **sizes)


def test_split_by_context_needs_groups(make_adata):
    """Protects `split_by="context"` without `context_key`, which would leave no validation cells."""
    adata = make_adata()
    StackModel.setup_anndata(adata)
    manager = StackModel._get_most_recent_anndata_manager(adata, required=True)
    with pytest.raises(ValueError, match="needs at least two groups; set `context_key`"):
        _splitter(manager, split_by="context")


def test_unknown_split_is_refused(manager):
    """Protects against a misspelt `split_by`, which would otherwise silently split groups."""
    with pytest.raises(ValueError, match="`split_by` must be 'cell' or 'context', got 'donor'"):
        _splitter(manager, split_by="donor")


def test_several_processes_need_a_seed(manager):
    """Protects against leakage under DDP: without a seed every process would draw its own split."""
    scvi.settings._seed = None
    with pytest.raises(ValueError, match="needs `scvi.settings.seed`"):
        _splitter(manager, distributed_sampler=True)


def test_split_without_a_seed_still_works(manager):
    """Protects the default of scvi-tools, no seed: a fresh split, again a partition."""
    scvi.settings._seed = None
    np.testing.assert_array_equal(np.sort(np.concatenate(_parts(_splitter(manager)))), np.arange(90))
