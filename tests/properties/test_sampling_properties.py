"""Properties of splits, contexts and batches, for any number of cells, groups, sizes, ranks and seeds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cellweave.data import CellSetSampler, draw_contexts, split_cells

GROUPS = st.lists(st.integers(0, 4), min_size=1, max_size=60).map(np.array)
RULES = st.sampled_from(["random", "sequential"])
SEEDS = st.integers(0, 2**32 - 1)
OPTIONS = st.fixed_dictionaries(
    {
        "n_cells": st.integers(1, 17),
        "batch_size": st.integers(1, 50),
        "shuffle": st.booleans(),
        "seed": SEEDS,
        "rule": RULES,
    }
)


def _sampler(groups, options, rank: int = 0, world: int = 1) -> CellSetSampler:
    """A sampler over rows 7, 10, 13, ..., as rank ``rank`` of ``world``."""
    rows = 3 * np.arange(len(groups)) + 7
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.distributed.is_available", lambda: True)
        patch.setattr("torch.distributed.is_initialized", lambda: True)
        patch.setattr("torch.distributed.get_world_size", lambda: world)
        patch.setattr("torch.distributed.get_rank", lambda: rank)
        return CellSetSampler(rows, groups, distributed=world > 1, **options)


def _epoch(sampler, epoch: int = 0) -> list[tuple[list[int], list[bool]]]:
    sampler.set_epoch(epoch)
    return [(rows.tolist(), valid.tolist()) for rows, valid in sampler]


@given(GROUPS, OPTIONS, st.integers(1, 4), st.integers(0, 5))
def test_every_row_once_per_epoch_over_all_ranks(groups, options, world, epoch):
    """Protects training: each cell counts exactly once per epoch, and all ranks take equally many steps."""
    samplers = [_sampler(groups, options, rank, world) for rank in range(world)]
    epochs = [_epoch(sampler, epoch) for sampler in samplers]
    seen = [row for batches in epochs for rows, valid in batches for row, ok in zip(rows, valid, strict=True) if ok]
    assert sorted(seen) == (3 * np.arange(len(groups)) + 7).tolist()
    assert {len(batches) for batches in epochs} == {len(sampler) for sampler in samplers}
    assert len({len(sampler) for sampler in samplers}) == 1


@given(GROUPS, OPTIONS, st.integers(0, 5), SEEDS)
def test_order_is_a_function_of_seed_and_epoch(groups, options, epoch, noise):
    """Protects exact resume: neither earlier epochs nor the global random state have a say."""
    fresh = _epoch(_sampler(groups, options), epoch)
    used = _sampler(groups, options)
    np.random.seed(noise)
    torch.manual_seed(noise)
    for earlier in range(3):
        _epoch(used, earlier)
    assert _epoch(used, epoch) == fresh


@given(GROUPS, OPTIONS, st.integers(0, 5), st.integers(0, 60))
def test_start_batch_skips_exactly_these_batches_once(groups, options, epoch, start):
    """Protects resume inside an epoch: the rest of the epoch is what an uninterrupted run would have seen."""
    everything = _epoch(_sampler(groups, options), epoch)
    sampler = _sampler(groups, options)
    sampler.start_batch = start
    assert _epoch(sampler, epoch) == everything[start:]
    assert _epoch(sampler, epoch) == everything


@given(GROUPS, OPTIONS)
def test_batches_hold_whole_contexts_of_one_group_each(groups, options):
    """Protects the set-major layout and `context_key`: whole contexts, as many as fit, never of two groups."""
    group_of = dict(zip((3 * np.arange(len(groups)) + 7).tolist(), groups.tolist(), strict=True))
    n_cells, per_batch = options["n_cells"], max(1, options["batch_size"] // options["n_cells"])
    batches = _epoch(_sampler(groups, options))
    for i, (rows, valid) in enumerate(batches):
        assert len(rows) == len(valid)
        assert len(rows) % n_cells == 0
        assert len(rows) == n_cells * per_batch or i == len(batches) - 1
        for start in range(0, len(rows), n_cells):
            assert len({group_of[row] for row in rows[start : start + n_cells]}) == 1


@given(GROUPS, st.permutations(range(5)), st.integers(1, 17), RULES, SEEDS)
def test_names_of_groups_do_not_matter(groups, names, n_cells, rule, seed):
    """Protects category names: renaming donors gives the same contexts, only in another order."""

    def contexts(codes):
        drawn = draw_contexts(np.arange(len(codes)), codes, n_cells, np.random.default_rng(seed), rule)
        return sorted(zip(drawn.rows.tolist(), drawn.valid.tolist(), strict=True))

    assert contexts(groups) == contexts(np.array(names)[groups])


@given(GROUPS, st.integers(1, 17), RULES, SEEDS, st.integers(1, 1000))
def test_positions_of_cells_do_not_matter(groups, n_cells, rule, seed, offset):
    """Protects `indices`: contexts of a selection are those of the selected cells counted from zero."""
    rows = np.cumsum(np.arange(len(groups)) % 3 + 1) + offset
    chosen = draw_contexts(rows, groups, n_cells, np.random.default_rng(seed), rule)
    counted = draw_contexts(np.arange(len(groups)), groups, n_cells, np.random.default_rng(seed), rule)
    np.testing.assert_array_equal(chosen.rows, rows[counted.rows])
    np.testing.assert_array_equal(chosen.valid, counted.valid)


@given(GROUPS, st.floats(0.01, 1), st.floats(0, 1), st.sampled_from(["cell", "context"]), SEEDS)
def test_split_is_a_partition(groups, train_size, share, split_by, seed):
    """Protects scores on held-out cells: no cell is in two parts or in none, and whole groups stay whole."""
    parts = split_cells(groups, train_size, share * (1 - train_size), np.random.default_rng(seed), split_by)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(groups)))
    assert all((np.diff(part) > 0).all() for part in parts)
    n_units = len(groups) if split_by == "cell" else len(np.unique(groups))
    sizes = [len(part) if split_by == "cell" else len(np.unique(groups[part])) for part in parts]
    assert sum(sizes) == n_units
    assert sizes[0] == np.ceil(train_size * n_units)
