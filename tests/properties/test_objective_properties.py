"""Properties of losses, metrics and schedules."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from cellweave.objective import (
    MaskedNegativeBinomial,
    draw_slices,
    masked_correlation,
    masked_mae,
    negative_binomial_nll,
    sliced_wasserstein,
)
from cellweave.train._schedules import SCHEDULES, warmup_constant, warmup_cosine

SHAPE = st.tuples(st.integers(1, 5), st.integers(1, 6))
SEEDS = st.integers(0, 2**31)


def _positive(low: float, high: float):
    return st.floats(np.log(low), np.log(high)).map(lambda x: float(np.exp(x)))


@st.composite
def negative_binomials(draw):
    """Counts, means and inverse dispersions ``(cell, gene)``."""
    shape = draw(SHAPE)
    x = draw(arrays(np.float64, shape, elements=st.integers(0, 10_000).map(float)))
    mu = draw(arrays(np.float64, shape, elements=_positive(1e-3, 1e4)))
    theta = draw(arrays(np.float64, shape, elements=_positive(1e-2, 1e3)))
    return tuple(torch.tensor(a) for a in (x, mu, theta))


@st.composite
def clouds(draw):
    """Embeddings ``(context, cell, dim)`` in float64."""
    n_contexts, n_cells, dim = draw(st.integers(1, 3)), draw(st.integers(1, 40)), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(SEEDS))
    return draw(_positive(0.1, 10)) * torch.randn(n_contexts, n_cells, dim, generator=generator, dtype=torch.float64)


@given(negative_binomials())
def test_likelihood_is_that_of_scipy(parameters):
    """Protects the loss: the negative log-likelihood of an independent implementation."""
    x, mu, theta = parameters
    expected = -stats.nbinom.logpmf(x.numpy(), theta.numpy(), (theta / (theta + mu)).numpy()).sum(axis=1)
    np.testing.assert_allclose(negative_binomial_nll(x, mu, theta).numpy(), expected, rtol=1e-5, atol=1e-4)


@given(negative_binomials(), st.data())
def test_likelihood_is_a_sum_over_genes(parameters, data):
    """Protects masking: the likelihood of all genes is that of any part plus that of the rest, in any order."""
    n_genes = parameters[0].shape[1]
    order, cut = data.draw(st.permutations(range(n_genes))), data.draw(st.integers(0, n_genes))
    parts = [negative_binomial_nll(*(p[:, part] for p in parameters)) for part in (order[:cut], order[cut:])]
    torch.testing.assert_close(parts[0] + parts[1], negative_binomial_nll(*parameters), rtol=1e-9, atol=1e-9)


@given(negative_binomials(), st.data())
def test_cells_that_fill_up_have_no_weight(parameters, data):
    """Protects padding: the loss is the mean over valid cells, whatever the others hold."""
    x, mu, theta = parameters
    valid = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(x), max_size=len(x))))
    assume(bool(valid.any()))
    objective = MaskedNegativeBinomial()
    filled = {"target": x, "px_rate": mu, "px_r": theta, "valid": valid.double()}
    only = {key: value[valid] for key, value in filled.items()}
    torch.testing.assert_close(objective(filled), objective(only))
    other = {**filled, "target": torch.where(valid[:, None], x, x + 1)}
    torch.testing.assert_close(objective(other), objective(filled))


@given(clouds(), SEEDS)
def test_distance_of_the_prior_from_itself_is_zero(z, seed):
    """Protects the definition of a distance: identical clouds are at zero, and no cloud is below."""
    slices = draw_slices(z, 5, n_cells=z.shape[1], generator=torch.Generator().manual_seed(seed))
    assert sliced_wasserstein(z, slices) >= 0
    drawn = z[:, slices.cells]
    same = slices._replace(prior=drawn - drawn.mean(dim=1, keepdim=True))
    assert float(sliced_wasserstein(z, same)) == pytest.approx(0, abs=1e-20)


@given(clouds(), SEEDS, st.data())
def test_distance_ignores_the_order_of_cells(z, seed, data):
    """Protects sets: cells have no order, neither in the cloud nor in the prior."""
    slices = draw_slices(z, 5, n_cells=z.shape[1], generator=torch.Generator().manual_seed(seed))
    order = list(data.draw(st.permutations(range(z.shape[1]))))
    other = slices._replace(prior=slices.prior[:, order])
    torch.testing.assert_close(sliced_wasserstein(z[:, order], other), sliced_wasserstein(z, slices))


@given(clouds(), SEEDS, st.floats(-100, 100))
def test_distance_ignores_the_place_of_a_context(z, seed, shift):
    """Protects centring: moving all cells of a context together changes nothing."""
    slices = draw_slices(z, 5, generator=torch.Generator().manual_seed(seed))
    moved = z + shift * torch.arange(1, z.shape[0] + 1)[:, None, None]
    torch.testing.assert_close(sliced_wasserstein(moved, slices), sliced_wasserstein(z, slices), rtol=1e-6, atol=1e-9)


@given(clouds(), SEEDS)
def test_distance_has_no_preferred_axes(z, seed):
    """Protects against a bias: rotating cloud, prior and directions together, or rescaling directions, changes nothing."""
    slices = draw_slices(z, 5, generator=torch.Generator().manual_seed(seed))
    rotation = torch.tensor(stats.ortho_group.rvs(z.shape[2], random_state=seed)) if z.shape[2] > 1 else -torch.eye(1)
    rotation = rotation.double()
    turned = slices._replace(prior=slices.prior @ rotation, directions=3 * slices.directions @ rotation)
    torch.testing.assert_close(sliced_wasserstein(z @ rotation, turned), sliced_wasserstein(z, slices))


@given(clouds(), SEEDS, st.integers(1, 300))
def test_draws_follow_their_generator(z, seed, n_cells):
    """Protects determinism: a seed fixes all draws, cells are distinct, and never more than there are."""
    first, second = (draw_slices(z, 3, n_cells, torch.Generator().manual_seed(seed)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert len(set(first.cells.tolist())) == len(first.cells) == min(n_cells, z.shape[1])


@given(negative_binomials(), st.floats(0.01, 100))
def test_correlation_is_bounded_and_has_no_scale(parameters, scale):
    """Protects the reported correlation: in [-1, 1], one for a multiple of the counts, unchanged by units."""
    x, mu, _ = parameters
    correlation = masked_correlation(x, mu, eps=0)
    assert torch.nan_to_num(correlation).abs().max() <= 1 + 1e-9
    torch.testing.assert_close(masked_correlation(x, scale * mu, eps=0), correlation, equal_nan=True, atol=1e-6, rtol=0)
    varied = x.std(dim=1, correction=0) > 0
    assert (masked_correlation(x, scale * x, eps=0)[varied] > 1 - 1e-6).all()


@given(negative_binomials())
def test_error_is_a_distance(parameters):
    """Protects the reported error: zero only for equal counts, symmetric, in the units of the counts."""
    x, mu, _ = parameters
    assert torch.equal(masked_mae(x, x), torch.zeros(len(x), dtype=x.dtype))
    torch.testing.assert_close(masked_mae(x, mu), masked_mae(mu, x))
    torch.testing.assert_close(masked_mae(x, mu), masked_mae(2 * x, 2 * mu) / 2)


@given(st.sampled_from(sorted(SCHEDULES)), st.integers(0, 500), st.integers(1, 5000), st.floats(0, 1), st.data())
def test_schedules_are_bounded_and_continuous(name, n_warmup, n_total, floor, data):
    """Protects learning rates: within (0, 1], and no step jumps by more than a warm-up step or the slope of the cosine."""
    step = data.draw(st.integers(0, n_warmup + n_total + 10))
    now, then = (SCHEDULES[name](s, n_warmup, n_total, floor) for s in (step, step + 1))
    assert 0 <= now <= 1
    assert now > 0 or floor == 0
    slope = (1 - floor) * np.pi / 2 / max(1, n_total - n_warmup)
    assert abs(then - now) <= max(1 / (n_warmup + 1), slope) + 1e-12


@given(st.integers(0, 500), st.integers(1, 5000), st.floats(0, 1), st.data())
def test_schedules_rise_then_fall(n_warmup, n_rest, floor, data):
    """Protects the shape: up to one at the end of the warm-up, then never up again, and the floor at the end."""
    n_total = n_warmup + n_rest
    early = sorted(data.draw(st.lists(st.integers(0, n_warmup), min_size=2, max_size=5)))
    late = sorted(data.draw(st.lists(st.integers(n_warmup, n_total + 10), min_size=2, max_size=5)))
    for schedule in (warmup_cosine, warmup_constant):
        rise, fall = ([schedule(step, n_warmup, n_total, floor) for step in steps] for steps in (early, late))
        assert rise == sorted(rise)
        assert fall == sorted(fall, reverse=True)
        assert schedule(n_warmup, n_warmup, n_total, floor) == pytest.approx(1)
    assert warmup_cosine(n_total, n_warmup, n_total, floor) == pytest.approx(floor, abs=1e-12)
