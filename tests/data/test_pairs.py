"""Batches of perturbed cells beside control cells."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scvi
from anndata import AnnData
from hypothesis import given
from hypothesis import strategies as st
from scvi.data import AnnDataManager
from scvi.data.fields import LayerField

from cellweave.data import PairSampler, PairSplitter, PairTables, Screen, pair_within_sets


def _sampler(n_cells=6, n_sets=4, seed=0, control_fraction=0.0, **options):
    rng = np.random.default_rng(1)
    treatment = np.repeat([0, 1, 2, 3], [60, 100, 30, 10])
    context = rng.integers(2, size=len(treatment))
    rows = rng.permutation(1000)[: len(treatment)]
    options = {"n_batches": 50, "shuffle": True, **options}
    sampler = PairSampler(
        rows,
        treatment,
        context,
        n_contexts=2,
        n_sets=n_sets,
        n_cells=n_cells,
        seed=seed,
        control_fraction=control_fraction,
        **options,
    )
    return (
        sampler,
        dict(zip(rows.tolist(), treatment.tolist(), strict=True)),
        dict(zip(rows.tolist(), context.tolist(), strict=True)),
    )


@given(st.integers(0, 2**31), st.integers(1, 7), st.integers(1, 5))
def test_every_set_is_of_one_condition_and_context(seed, n_cells, n_sets):
    """Protects the pairing: a perturbed cell never meets a control cell of another context, nor another condition."""
    sampler, treatment, context = _sampler(n_cells, n_sets, seed, n_batches=3)
    for rows, controls, group in sampler:
        assert rows.shape == controls.shape == group.shape == (n_cells * n_sets,)
        assert [treatment[r] * 2 + context[r] for r in rows.tolist()] == group.tolist()
        assert [context[r] for r in rows.tolist()] == [context[r] for r in controls.tolist()]
        assert {treatment[r] for r in controls.tolist()} == {0}
        assert all(len(set(of_set)) == 1 for of_set in group.reshape(n_sets, n_cells).tolist())


def test_conditions_are_drawn_alike_whatever_their_number_of_cells():
    """Protects rare conditions: they must not be drowned by the one with most cells."""
    sampler, _, _ = _sampler(n_batches=500)
    drawn = np.concatenate([group[::6] // 2 for _, _, group in sampler])
    shares = np.bincount(drawn, minlength=4) / len(drawn)
    assert shares[0] == 0
    np.testing.assert_allclose(shares[1:], 1 / 3, atol=0.04)


def test_control_cells_are_a_condition_of_their_own():
    """Protects that a model can learn what "no perturbation" means, as often as asked for."""
    sampler, treatment, _ = _sampler(n_batches=500, control_fraction=0.25)
    share = np.mean([treatment[int(rows[0])] == 0 for rows, _, _ in sampler])
    assert 0.2 < share < 0.3


def test_draws_depend_on_seed_and_epoch_only():
    """Protects repeatability and exact resume: the same epoch gives the same steps, from any step on."""
    sampler, _, _ = _sampler()
    first = [np.stack(pairs) for pairs in sampler]
    again = [np.stack(pairs) for pairs in _sampler()[0]]
    np.testing.assert_array_equal(first, again)
    sampler.start_batch = 30
    np.testing.assert_array_equal(first[30:], [np.stack(pairs) for pairs in sampler])
    sampler.set_epoch(1)
    assert not np.array_equal(first, [np.stack(pairs) for pairs in sampler])


def test_a_context_without_control_cells_is_refused():
    """Protects from an index error in the middle of training."""
    with pytest.raises(ValueError, match="2 cells have no control cell"):
        PairSampler(
            np.arange(4),
            np.array([0, 1, 1, 1]),
            np.array([0, 0, 1, 1]),
            n_contexts=2,
            n_sets=1,
            n_cells=1,
            n_batches=1,
            shuffle=True,
            seed=0,
        )


def test_optimal_pairs_lie_closest():
    """Protects pairing by optimal transport: within a set, no other pairing is shorter, and sets stay apart."""
    rng = np.random.default_rng(0)
    control = rng.normal(size=(12, 3)).astype(np.float32)
    order = np.concatenate([rng.permutation(6), 6 + rng.permutation(6)])
    target = control[order] + 1e-3 * rng.normal(size=(12, 3)).astype(np.float32)
    np.testing.assert_array_equal(pair_within_sets(target, control, 6), order)


# ---------------------------------------------------------------- splitter


@pytest.fixture
def splitter():
    """Function that splits a screen of two lines, with the options of the splitter."""
    rng = np.random.default_rng(0)
    obs = pd.DataFrame(
        {
            "p": np.repeat(["control", "A", "B", "A+B"], [40, 30, 20, 1]),
            "line": np.where(np.arange(91) % 2 == 0, "x", "y"),
        }
    )
    adata = AnnData(rng.random((91, 3), dtype=np.float32), obs=obs)
    setup = {
        "perturbation_key": "p",
        "control_key": "control",
        "sep": "+",
        "dosage_key": None,
        "pairing_keys": ["line"],
    }
    with pytest.warns(UserWarning, match="fewer than 5 cells"):
        screen = Screen.from_obs(obs, setup, [])
    manager = AnnDataManager([LayerField("X", None, is_count_data=False)], setup_method_args={})
    manager.register_fields(adata)
    tables = PairTables(screen, np.arange(3), np.zeros((4, 1), dtype=np.int64))
    return lambda **options: PairSplitter(manager, tables=tables, **options)


def test_every_group_keeps_its_share(splitter):
    """Protects small conditions: each is split by itself, and one cell alone is for training."""
    split = splitter(train_size=0.8, validation_size=0.2)
    assert sorted(np.concatenate([split.train_idx, split.val_idx, split.test_idx]).tolist()) == list(range(91))
    screen = split.tables.screen
    groups = screen.treatment * 2 + screen.context
    for group, size in zip(*np.unique(groups, return_counts=True), strict=True):
        n_train = (groups[split.train_idx] == group).sum()
        assert n_train == max(1, int(np.ceil(0.8 * size)))


def test_the_split_depends_on_the_seed_only(splitter):
    """Protects repeatability, and the user's choice of an unshuffled split."""
    scvi.settings.seed = 3
    first, again = splitter(), splitter()
    np.testing.assert_array_equal(first.val_idx, again.val_idx)
    scvi.settings.seed = 4
    assert not np.array_equal(first.val_idx, splitter().val_idx)
    plain = splitter(train_size=0.5, shuffle_set_split=False)
    control_x = np.flatnonzero((plain.tables.screen.treatment == 0) & (plain.tables.screen.context == 0))
    np.testing.assert_array_equal(np.intersect1d(plain.train_idx, control_x), control_x[:10])


def test_validation_pairs_are_fixed(splitter):
    """Protects the validation loss: the same pairs in every epoch, of validation cells beside control cells seen in training."""
    split = splitter(train_size=0.7, validation_size=0.2, batch_size=8)
    loader = split.val_dataloader()
    batches = [batch["X"] for batch in loader]
    assert all((a == b["X"]).all() for a, b in zip(batches, loader, strict=True))
    x = split.adata_manager.adata.X
    of = {tuple(row): i for i, row in enumerate(x.tolist())}
    rows = {of[tuple(row)] for batch in batches for row in batch.tolist()}
    assert rows <= set(split.val_idx.tolist())
    controls = {of[tuple(row)] for batch in loader for row in batch["control"].tolist()}
    assert controls <= set(split.train_idx.tolist()) | set(split.val_idx.tolist())
    assert split.test_idx.size > 0


def test_a_given_split_is_kept(splitter):
    """Protects held-out conditions: training draws cells of part 0 only, and without validation cells there is no loader."""
    part = np.full(91, 2)
    part[:70] = 0
    split = splitter(split=part, batch_size=8, n_batches=30)
    x = split.adata_manager.adata.X[:70].tolist()
    drawn = [row for batch in split.train_dataloader() for name in ("X", "control") for row in batch[name].tolist()]
    assert all(row in x for row in drawn)
    assert split.val_dataloader() == []
    with pytest.raises(ValueError, match="leaves no training cell"):
        splitter(split=np.full(91, 2))
