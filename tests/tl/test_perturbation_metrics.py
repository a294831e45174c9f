"""The numbers behind the scores of predicted perturbations, against libraries and by their properties."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu, norm, pearsonr

from cellweave.objective import squared_mmd
from cellweave.tl import _perturbation_metrics as metrics
from cellweave.tl._perturbation_screen import halve, rows_of


def test_rank_test_equals_scipy():
    """Protects DE genes: p-values are those of scipy with corrections for ties and continuity."""
    rng = np.random.default_rng(0)
    x, y = rng.poisson(1.0, size=(23, 40)).astype(np.float32), rng.poisson(1.6, size=(31, 40)).astype(np.float32)
    x[:, 0] = y[0, 0]
    y[:, 0] = y[0, 0]  # nothing but ties
    z, p = metrics.rank_test(x, y)
    # scipy computes in the precision of its input
    expected = mannwhitneyu(x.astype(float), y.astype(float), method="asymptotic", use_continuity=True, axis=0)
    np.testing.assert_allclose(p[1:], expected.pvalue[1:], rtol=1e-9)
    assert p[0] == 1 and z[0] == 0
    plain = (expected.statistic - 23 * 31 / 2) / np.sqrt(23 * 31 * 55 / 12)
    np.testing.assert_allclose(z, plain, atol=1e-12)


def test_rank_test_in_blocks_of_genes(monkeypatch):
    """Protects wide data: cutting between genes changes nothing."""
    rng = np.random.default_rng(0)
    x, y = rng.random((9, 20)), rng.random((8, 20))
    whole = metrics.rank_test(x, y)
    monkeypatch.setattr(metrics, "_GENES", 7)
    np.testing.assert_array_equal(metrics.rank_test(x, y), whole)


@given(st.integers(0, 2**16))
def test_pearson_equals_scipy(seed):
    """Protects the correlation: row by row that of scipy, and 0 where nothing is predicted."""
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(3, 12)), rng.normal(size=(3, 12))
    np.testing.assert_allclose(metrics.rowwise_pearson(a, b), [pearsonr(x, y)[0] for x, y in zip(a, b, strict=True)])
    assert metrics.rowwise_pearson(np.full((1, 12), 0.1), b[:1]) == 0
    assert np.isnan(metrics.rowwise_pearson(a[:1], np.zeros((1, 12))))


def test_mmd_is_that_of_the_training_objective():
    """Protects one definition of the MMD in the package: kernels exp(-s gamma d2), pairs of different cells."""
    rng = np.random.default_rng(0)
    x, y, gamma = rng.normal(size=(20, 4)), rng.normal(0.5, 1, size=(30, 4)), 0.3
    sigmas = torch.tensor([1 / np.sqrt(2 * s * gamma) for s in (0.1, 0.5, 1.0, 2.0, 10.0)])
    expected = float(squared_mmd(torch.from_numpy(x), torch.from_numpy(y), sigmas))
    assert metrics.energy_and_mmd(x, y, gamma)[1] == pytest.approx(expected, rel=1e-9)


def test_distances_of_equal_distributions_are_zero_on_average():
    """Protects the unbiased estimators: their mean is 0, so they are negative half of the time."""
    rng = np.random.default_rng(0)
    pairs = np.array(
        [metrics.energy_and_mmd(rng.normal(size=(15, 3)), rng.normal(size=(25, 3)), 0.2) for _ in range(300)]
    )
    standard_error = pairs.std(axis=0) / np.sqrt(300)
    assert (np.abs(pairs.mean(axis=0)) < 3.5 * standard_error).all()
    assert (pairs < 0).mean() > 0.3


def test_energy_distance_by_hand():
    """Protects the formula 2E|X-Y| - E|X-X'| - E|Y-Y'| without pairs of a cell with itself."""
    x, y = np.array([[0.0], [2.0]]), np.array([[1.0], [5.0]])
    between = (1 + 5 + 1 + 3) / 4
    assert metrics.energy_and_mmd(x, y, 1.0)[0] == pytest.approx(2 * between - 2 - 4)
    assert np.isnan(metrics.energy_and_mmd(x[:1], y, 1.0)).all()


def test_permutation_p_is_uniform_without_an_effect():
    """Protects the flag of null perturbations: small p-values are rare without an effect, and certain with a strong one."""
    rng = np.random.default_rng(0)
    p = np.array([metrics.permutation_p(rng.normal(size=(12, 2)), rng.normal(size=(9, 2)), rng) for _ in range(100)])
    assert (p <= 0.05).mean() < 0.15
    assert 0.35 < p.mean() < 0.65
    assert metrics.permutation_p(rng.normal(size=(12, 2)) + 4, rng.normal(size=(9, 2)), rng) == pytest.approx(1 / 201)


def test_permutation_energy_is_the_energy_distance(monkeypatch):
    """Protects the quadratic forms of the permutations: the first one is the energy distance itself."""
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(6, 2)), rng.normal(1, 1, size=(5, 2))

    class Recorder:
        def permuted(self, member, axis):
            """Every "permutation" swaps nothing but one pair, in a known way."""
            moved = member.copy()
            moved[:, [0, 6]] = moved[:, [6, 0]]
            return moved

    swapped_x, swapped_y = np.concatenate([y[:1], x[1:]]), np.concatenate([x[:1], y[1:]])
    larger = metrics.energy_and_mmd(swapped_x, swapped_y, 1.0)[0] >= metrics.energy_and_mmd(x, y, 1.0)[0]
    assert metrics.permutation_p(x, y, Recorder()) == pytest.approx(1.0 if larger else 1 / 201)


def test_discrimination_ranks_with_half_ties():
    """Protects the rank: perfect is 1, the worst is 0, knowing nothing is 0.5, and perturbed genes do not help."""
    true = np.diag([5.0, 6.0, 7.0]) + np.arange(3)[:, None] * 0.1
    none = np.zeros((3, 3), dtype=bool)
    np.testing.assert_array_equal(metrics.discrimination(true, true, none), 1)
    same = np.ones((4, 3))
    np.testing.assert_array_equal(metrics.discrimination(np.zeros((4, 3)), same, np.zeros((4, 3), dtype=bool)), 0.5)
    # without its own gene on the diagonal, the first perturbation looks like all others
    only_own_gene = metrics.discrimination(np.eye(3), np.eye(3) * 1.0, np.ones((3, 3), dtype=bool))
    np.testing.assert_array_equal(only_own_gene, 0.5)
    assert metrics.discrimination(
        np.array([[0.0, 9], [9, 0]]), np.array([[9.0, 0], [0, 9]]), none[:2, :2]
    ).tolist() == [0, 0]
    assert np.isnan(metrics.discrimination(true[:1], true[:1], none[:1])).all()


def test_overlap_ignores_genes_that_do_not_change():
    """Protects predictions of no change from a lucky overlap by the order of the genes."""
    true = np.array([9.0, -8, 7, 0, 0, 0])
    assert metrics.overlap(np.zeros(6), true, 3) == 0
    assert metrics.overlap(np.array([1.0, 1, 0, 0, 0, 0.5]), true, 3) == pytest.approx(2 / 3)
    assert metrics.overlap(true, true, 5) == 1
    assert np.isnan(metrics.overlap(true, np.zeros(6), 3))


def test_mean_test_uses_the_spread_of_control_cells():
    """Protects the ranking of mean-type predictions: shift over spread, damped for genes that hardly vary."""
    std = np.array([1.0, 1.0, 3.0, 0.0])
    z, p = metrics.mean_test(np.array([1.0, -2.0, 2.0, 0.0]), std, 10, 40)
    scale = np.sqrt(1 / 10 + 1 / 40)
    np.testing.assert_allclose(z, np.array([1 / 2, -2 / 2, 2 / 4, 0]) / scale)
    np.testing.assert_allclose(p, 2 * norm.sf(np.abs(z)))
    assert np.isfinite(metrics.mean_test(np.ones(2), np.zeros(2), 10, 10)[0]).all()


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(0, 99))
def test_halves_are_balanced_in_every_stratum(strata, seed):
    """Protects disjoint control halves: every stratum gives half of its cells to each, up to one cell."""
    codes = np.array(strata)
    half = halve(codes, np.random.default_rng(seed))
    for code in np.unique(codes):
        assert abs(int(half[codes == code].sum()) * 2 - int((codes == code).sum())) <= 1


@given(st.lists(st.integers(-1, 3), max_size=30))
def test_rows_of_groups(codes):
    """Protects the grouping: every group gets its cells, groups without cells and cells without group included."""
    codes = np.array(codes, dtype=int)
    for group, rows in enumerate(rows_of(codes, 4)):
        np.testing.assert_array_equal(np.sort(rows), np.flatnonzero(codes == group))
