"""Contexts: every cell once, groups apart, the same for the same seed, shared fairly among ranks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cellweave.data import CellSetSampler, draw_contexts

GROUPS = st.lists(st.integers(0, 4), min_size=1, max_size=60).map(np.array)
RULES = st.sampled_from(["random", "sequential"])
SIZES = st.integers(1, 17)


def _contexts(groups, n_cells, rule, seed=0):
    # positions that are not 0..n-1, so that a confusion of positions and ranks is noticed
    rows = 3 * np.arange(len(groups)) + 7
    return rows, draw_contexts(rows, groups, n_cells, np.random.default_rng(seed), rule)


def _sampler(groups, **options):
    arguments = {"n_cells": 4, "batch_size": 8, "shuffle": True, "seed": 0, **options}
    return CellSetSampler(np.arange(len(groups)), np.asarray(groups), **arguments)


def _epoch(sampler, epoch: int = 0):
    sampler.set_epoch(epoch)
    return list(sampler)


@given(GROUPS, SIZES, RULES)
def test_every_cell_is_valid_exactly_once(groups, n_cells, rule):
    """Protects the promise behind every getter: no cell is lost, none counts twice."""
    rows, contexts = _contexts(groups, n_cells, rule)
    assert contexts.rows.shape == contexts.valid.shape
    assert contexts.rows.shape[1] == n_cells
    np.testing.assert_array_equal(np.sort(contexts.rows[contexts.valid]), rows)


@given(GROUPS, SIZES, RULES)
def test_contexts_never_mix_groups(groups, n_cells, rule):
    """Protects `context_key`: cells of different donors never attend to each other, not even as filling."""
    rows, contexts = _contexts(groups, n_cells, rule)
    group_of = dict(zip(rows, groups, strict=True))
    for context in contexts.rows:
        assert len({group_of[row] for row in context}) == 1


@given(GROUPS, SIZES, RULES)
def test_number_of_contexts_is_the_smallest_possible(groups, n_cells, rule):
    """Protects against wasted contexts: each group needs ceil(size / n_cells) of them."""
    _, contexts = _contexts(groups, n_cells, rule)
    sizes = np.unique(groups, return_counts=True)[1]
    assert len(contexts.rows) == np.ceil(sizes / n_cells).sum()


@given(st.integers(1, 60), SIZES)
def test_random_rule_fills_without_replacement(n, n_cells):
    """Protects the documented filling: other cells at most once, small groups repeated as evenly as possible."""
    _, contexts = _contexts(np.zeros(n, dtype=int), n_cells, "random")
    for context in contexts.rows:
        counts = np.unique(context, return_counts=True)[1]
        assert counts.max() - counts.min() <= 1
        assert len(counts) == min(n, n_cells)


@given(GROUPS, SIZES)
def test_sequential_rule_keeps_the_order_and_fills_from_its_own_context(groups, n_cells):
    """Protects parity with the published inference: row order, last context filled from its own cells."""
    rows, contexts = _contexts(groups, n_cells, "sequential")
    np.testing.assert_array_equal(contexts.rows[contexts.valid], rows[np.argsort(groups, kind="stable")])
    for context, valid in zip(contexts.rows, contexts.valid, strict=True):
        assert set(context[~valid]) <= set(context[valid])


def test_sequential_rule_equals_the_published_filling(stack_tiny):
    """Protects the exact cells that the published Stack inference puts into its last context."""
    expected = stack_tiny[0]["tail_padding"]
    n = expected["n_cells_total"]
    zeros = np.zeros(n, dtype=int)
    contexts = draw_contexts(np.arange(n), zeros, expected["sample_size"], np.random.default_rng(0), "sequential")
    np.testing.assert_array_equal(contexts.rows, expected["contexts"])


def test_random_rule_depends_on_the_generator_only():
    """Protects reproducibility: one seed, one assignment; another seed, another; the global state has no say."""
    groups = np.repeat([0, 1], 20)
    np.random.seed(1)
    first = _contexts(groups, 8, "random", seed=5)[1].rows
    np.random.seed(2)
    np.testing.assert_array_equal(first, _contexts(groups, 8, "random", seed=5)[1].rows)
    assert not np.array_equal(first, _contexts(groups, 8, "random", seed=6)[1].rows)


def test_unknown_rule_is_refused():
    """Protects against a misspelt rule, which would otherwise silently mean another one."""
    with pytest.raises(ValueError, match="must be 'random' or 'sequential', got 'sorted'"):
        _contexts(np.zeros(5, dtype=int), 2, "sorted")


def test_order_is_a_function_of_seed_and_epoch():
    """Protects exact resume: an epoch can be repeated, and each epoch sees new contexts."""
    groups = np.repeat([0, 1], 25)
    assert _same(_epoch(_sampler(groups), 3), _epoch(_sampler(groups), 3))
    assert not _same(_epoch(_sampler(groups), 3), _epoch(_sampler(groups), 4))
    assert not _same(_epoch(_sampler(groups), 3), _epoch(_sampler(groups, seed=1), 3))


def test_fixed_order_ignores_the_epoch():
    """Protects comparable validation curves: without shuffling all epochs see the same contexts."""
    sampler = _sampler(np.repeat([0, 1], 25), shuffle=False)
    assert _same(_epoch(sampler, 0), _epoch(sampler, 9))


def test_batches_hold_whole_contexts():
    """Protects the flat set-major contract: every batch is a multiple of `n_cells`, at least one context."""
    for batch_size, expected in [(8, 8), (11, 8), (3, 4), (1000, 40)]:
        batches = _epoch(_sampler(np.zeros(40, dtype=int), batch_size=batch_size))
        assert {len(rows) for rows, _ in batches} == {expected}


@settings(max_examples=40)
@given(GROUPS, st.integers(1, 7), st.integers(1, 30), st.integers(1, 4), st.booleans(), RULES)
def test_ranks_share_all_cells_once_and_take_equally_many_batches(groups, n_cells, batch_size, world, shuffle, rule):
    """Protects training on several devices: no cell is counted twice, and no rank waits for another for ever."""
    options = {"n_cells": n_cells, "batch_size": batch_size, "shuffle": shuffle, "rule": rule, "distributed": True}
    seen, lengths, batches = [], set(), set()
    for rank in range(world):
        with pytest.MonkeyPatch.context() as patch:
            _pretend_rank(patch, rank, world)
            sampler = _sampler(groups, **options)
        epoch = _epoch(sampler, 1)
        lengths.add(len(sampler))
        batches.add(len(epoch))
        seen.extend(row for rows, valid in epoch for row in rows[valid])
    assert sorted(seen) == list(range(len(groups)))
    assert len(lengths) == 1
    assert lengths == batches


def test_sampler_outside_a_process_group_visits_everything():
    """Protects single-device runs with a DDP strategy name: without a process group one rank gets all cells."""
    rows = [row for rows, valid in _epoch(_sampler(np.zeros(10, dtype=int), distributed=True)) for row in rows[valid]]
    assert sorted(rows) == list(range(10))


def _pretend_rank(patch: pytest.MonkeyPatch, rank: int, world: int) -> None:
    patch.setattr("torch.distributed.is_available", lambda: True)
    patch.setattr("torch.distributed.is_initialized", lambda: True)
    patch.setattr("torch.distributed.get_world_size", lambda: world)
    patch.setattr("torch.distributed.get_rank", lambda: rank)


def _same(first, second) -> bool:
    return len(first) == len(second) and all(
        np.array_equal(a, b) for one, two in zip(first, second, strict=True) for a, b in zip(one, two, strict=True)
    )
