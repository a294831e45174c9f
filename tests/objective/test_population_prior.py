"""The density of a table of populations, its mixture, and the two objectives made of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cellweave._keys import STEP_KEYS
from cellweave.objective import (
    LogDeterminant,
    MixtureLikelihood,
    PopulationLogProb,
    PopulationPrior,
    mixture_log_likelihood,
    population_posterior,
)

NA = math.nan
TABLE = torch.tensor([[1.0, -1.0, NA, 0.5], [NA, 1.0, -1.0, NA], [-1.0, NA, NA, 1.0]], dtype=torch.float64)
CONTINUUM = torch.tensor([False, True, False, False])
LOG_PI = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64).log()
CELLS = arrays(np.float64, (3, 4), elements=st.floats(-100, 100))
STDS = st.floats(0.05, 1.0)


def _cells(n_cells=6, dtype=torch.float64, scale=1.0):
    return scale * torch.randn(n_cells, 4, dtype=dtype, generator=torch.Generator().manual_seed(2))


def _one_marker(value: float, std=0.3, continuum=False):
    """Density of a single marker with one table entry, as a function of a number."""
    prior = PopulationPrior(torch.tensor([[value]], dtype=torch.float64), std, torch.tensor([continuum]))
    return lambda u: prior.log_prob(torch.tensor([[u]], dtype=torch.float64)).total().exp().item()


# ---------------------------------------------------------------- one marker


@pytest.mark.parametrize("value", [-1.0, 0.0, 0.5, 1.0])
@pytest.mark.parametrize("std", [0.2, 0.35, 1.0])
def test_a_known_entry_is_a_normal(value, std):
    """Protects known entries: the normal density of scipy, and of a fifth of the entry for continuum markers."""
    for u in (-3.0, -0.1, 0.0, value, 2.0):
        assert _one_marker(value, std)(u) == pytest.approx(scipy.stats.norm.pdf(u, value, std), rel=1e-12)
        share = scipy.stats.norm.pdf(u, value / 5, std)
        assert _one_marker(value, std, continuum=True)(u) == pytest.approx(share, rel=1e-12)


@pytest.mark.parametrize("std", [0.05, 0.2, 0.35, 1.0])
def test_an_unknown_entry_is_flat_between_gaussian_tails(std):
    """Protects unknown entries: normalised, flat up to the radius, even, with the tail of a normal beyond it."""
    density, radius = _one_marker(NA, std), 1 - std
    total, _ = scipy.integrate.quad(density, -4 - 10 * std, 4 + 10 * std, points=(-radius, radius), epsabs=1e-10)
    assert total == pytest.approx(1, abs=1e-8)
    assert density(0.0) == pytest.approx(density(0.999 * radius), rel=1e-12)
    for u in (radius + 0.1, radius + 3 * std):
        tail = scipy.stats.norm.pdf(u - radius, 0, std) / scipy.stats.norm.pdf(0, 0, std)
        assert density(u) == density(-u) == pytest.approx(density(0.0) * tail, rel=1e-12)


@pytest.mark.parametrize("std", [0.1, 0.2, 0.35])
def test_an_unknown_entry_is_close_to_the_convolution(std):
    """Protects the model behind the shortcut: it misplaces less than 5 % of a uniform entry with normal noise."""
    density = _one_marker(NA, std)
    grid = np.linspace(-3, 3, 301)
    convolution = (scipy.stats.norm.cdf((grid + 1) / std) - scipy.stats.norm.cdf((grid - 1) / std)) / 2
    misplaced = 0.5 * scipy.integrate.trapezoid(np.abs([density(u) for u in grid] - convolution), grid)
    assert misplaced < 0.05


# ---------------------------------------------------------------- whole cells


@given(CELLS, STDS)
def test_matrix_products_are_the_sum_over_markers(u, std):
    """Protects the fast form: the product of the densities of the markers, each written as it is defined."""
    u = torch.from_numpy(u)
    prior = PopulationPrior(TABLE, std, CONTINUUM)
    expected = torch.zeros(3, 3, dtype=torch.float64)
    radius = 1 - std
    gamma = 1 / (1 + radius / std * math.sqrt(2 / math.pi))
    for z in range(3):
        for m in range(4):
            mode = TABLE[z, m].item() * (0.2 if CONTINUUM[m] else 1)
            away = u[:, m] - mode if not math.isnan(mode) else (u[:, m].abs() - radius).clamp(min=0)
            normal = -0.5 * (away / std) ** 2 - math.log(std * math.sqrt(2 * math.pi))
            expected[:, z] += normal + (math.log(gamma) if math.isnan(mode) else 0)
    torch.testing.assert_close(prior.log_prob(u).total(), expected, rtol=1e-10, atol=1e-8)
    torch.testing.assert_close(prior.log_prob_per_marker(u).sum(-1), expected, rtol=1e-10, atol=1e-8)


def test_mixture_and_posterior_are_those_of_the_double_loop():
    """Protects the likelihood and the labels: sums over populations, cell by cell."""
    log_prob = PopulationPrior(TABLE, 0.3).log_prob(_cells())
    mixture, posterior = mixture_log_likelihood(log_prob, LOG_PI), population_posterior(log_prob, LOG_PI)
    for i, row in enumerate(log_prob.total().tolist()):
        joint = [math.exp(p + w) for p, w in zip(row, LOG_PI.tolist(), strict=True)]
        assert mixture[i].item() == pytest.approx(math.log(sum(joint)), rel=1e-12)
        assert posterior[i].tolist() == pytest.approx([j / sum(joint) for j in joint], rel=1e-10)


@pytest.mark.parametrize("scale", [1.0, 30.0, 1000.0])
def test_float32_keeps_posteriors_far_from_the_table(scale):
    """Protects early training, where latent values reach hundreds: what tells populations apart keeps its digits.

    With squares inside, the differences at 1000 would be off by tens of nats.
    """
    u = _cells(200, scale=scale).float()
    single, double = PopulationPrior(TABLE.float(), 0.2), PopulationPrior(TABLE, 0.2)
    contrast = double.log_prob(u.double()).contrast
    torch.testing.assert_close(single.log_prob(u).contrast.double(), contrast, rtol=1e-6, atol=2e-5 * max(1, scale))
    posterior = population_posterior(double.log_prob(u.double()), LOG_PI)
    torch.testing.assert_close(
        population_posterior(single.log_prob(u), LOG_PI.float()).double(), posterior, rtol=0, atol=1e-5 * scale**0.5
    )


@pytest.mark.parametrize("size", [0.0, 1e-30, 0.7, 1e6, 1e15])
def test_extreme_cells_stay_finite(size):
    """Protects float32: values and gradients are numbers, and posteriors add up to one."""
    u = (_cells(dtype=torch.float32).sign() * size).requires_grad_()
    log_prob = PopulationPrior(TABLE.float(), 0.3).log_prob(u)
    mixture = mixture_log_likelihood(log_prob, LOG_PI.float())
    mixture.sum().backward()
    assert torch.isfinite(mixture).all() and torch.isfinite(u.grad).all()
    torch.testing.assert_close(population_posterior(log_prob, LOG_PI.float()).sum(-1), torch.ones(6))


def test_gradients_are_those_of_finite_differences():
    """Protects training: derivatives of the mixture after cells and weights."""
    prior = PopulationPrior(TABLE, 0.3, CONTINUUM)
    value = lambda u, log_pi: mixture_log_likelihood(prior.log_prob(u), log_pi)
    assert torch.autograd.gradcheck(value, (_cells().requires_grad_(), LOG_PI.clone().requires_grad_()))


def test_half_precision_does_not_reach_the_density():
    """Protects mixed precision: autocast changes nothing, and half-precision cells are read in the table's precision."""
    prior, u = PopulationPrior(TABLE.float(), 0.3), _cells(dtype=torch.float32)
    expected = prior.log_prob(u).total()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(prior.log_prob(u).total(), expected)
    assert prior.log_prob(u.bfloat16()).total().dtype == torch.float32


def test_the_deviation_can_change():
    """Protects annealing: a new deviation acts at once, and a senseless one is refused."""
    prior = PopulationPrior(TABLE, 0.5)
    prior.prior_std = 0.3
    torch.testing.assert_close(prior.log_prob(_cells()), PopulationPrior(TABLE, 0.3).log_prob(_cells()))
    for wrong in (0.0, -1.0, 1.5, NA):
        with pytest.raises(ValueError, match="`prior_std` must be above 0 and at most 1"):
            prior.prior_std = wrong


@pytest.mark.parametrize(
    ("rho", "continuum", "message"),
    [
        (torch.zeros(3), None, r"at least one population and one marker, got shape \(3,\)"),
        (torch.zeros(0, 2), None, r"got shape \(0, 2\)"),
        (torch.tensor([[0.0, 1.0], [math.inf, -math.inf]]), None, "2 infinite values, the first in row 1, column 0"),
        (torch.zeros(2, 3), torch.zeros(2), r"one entry for each of the 3 markers, got shape \(2,\)"),
    ],
)
def test_impossible_tables_are_refused(rho, continuum, message):
    """Protects the user: one sentence that says what was found."""
    with pytest.raises(ValueError, match=message):
        PopulationPrior(rho, 0.3, continuum)


def test_the_table_of_the_caller_stays_as_it_was():
    """Protects the caller: unknown entries are replaced in a copy, and restored by the state dict."""
    table = TABLE.clone()
    prior = PopulationPrior(table, 0.3)
    assert torch.equal(table.isnan(), TABLE.isnan()) and not prior.rho.isnan().any()
    other = PopulationPrior(torch.zeros_like(TABLE), 0.3)
    other.load_state_dict(prior.state_dict())
    torch.testing.assert_close(other.log_prob(_cells()), prior.log_prob(_cells()), rtol=0, atol=0)


# ---------------------------------------------------------------- draws


def test_drawn_cells_follow_the_table():
    """Protects sampling: normals around known modes, the convolution of uniform and normal for unknown entries."""
    prior, n_cells = PopulationPrior(TABLE, 0.3, CONTINUUM), 4000
    generator = torch.Generator().manual_seed(3)
    u = prior.latent_cells(torch.zeros(n_cells, dtype=torch.int64), *prior.draw_noise(n_cells, generator)).numpy()
    for marker, mode in ((0, 1.0), (1, -0.2), (3, 0.5)):
        assert scipy.stats.kstest(u[:, marker], scipy.stats.norm(mode, 0.3).cdf).pvalue > 1e-3
    integral = lambda v: v * scipy.stats.norm.cdf(v) + scipy.stats.norm.pdf(v)
    convolution = lambda v: 0.15 * (integral((v + 1) / 0.3) - integral((v - 1) / 0.3))
    assert scipy.stats.kstest(u[:, 2], convolution).pvalue > 1e-3


def test_draws_come_from_the_generator():
    """Protects the random state of the user: same generator, same draws, and the global state is not touched."""
    prior, state = PopulationPrior(TABLE, 0.3), torch.get_rng_state()
    first, again, other = (prior.draw_noise(5, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[1], other[1])
    assert torch.equal(torch.get_rng_state(), state)


# ---------------------------------------------------------------- objectives


def _outputs(u):
    log_prob = PopulationPrior(TABLE, 0.3).log_prob(u)
    return {
        "log_prob_common": log_prob.common,
        "log_prob_contrast": log_prob.contrast,
        "log_pi": LOG_PI,
        "log_det": u.sum(-1),
        "valid": torch.ones(len(u), dtype=u.dtype),
    }


@pytest.mark.parametrize("objective", [MixtureLikelihood(), LogDeterminant()], ids=lambda o: o.name)
def test_objectives_are_means_over_valid_cells(objective):
    """Protects padding and several processes: fillers count for nothing, shares average to the mean of the step."""
    u = _cells()
    outputs = _outputs(u)
    log_prob = PopulationLogProb(outputs["log_prob_common"], outputs["log_prob_contrast"])
    values = -(mixture_log_likelihood(log_prob, LOG_PI) if objective.name == "prior_loss" else outputs["log_det"])
    outputs["valid"][4:] = 0
    expected = values[:4].mean()
    torch.testing.assert_close(objective(outputs), expected)
    shares = []
    for part in (slice(0, 3), slice(3, 6)):
        share = {k: v if k == "log_pi" else v[part] for k, v in outputs.items()}
        share[STEP_KEYS.CELLS_PER_PROCESS] = torch.tensor(2.0)
        shares.append(objective(share))
    torch.testing.assert_close(torch.stack(shares).mean(), expected)


@pytest.mark.parametrize("objective", [MixtureLikelihood(2.0), LogDeterminant(2.0)], ids=lambda o: o.name)
def test_objectives_read_what_they_require(objective):
    """Protects composition: ``requires`` is neither too short nor too long, and the weight is left to the module."""
    outputs = _outputs(_cells())
    needed = {k: outputs[k] for k in objective.requires}
    torch.testing.assert_close(objective(needed), type(objective)()(outputs))
    for missing in objective.requires:
        with pytest.raises(KeyError):
            objective({k: v for k, v in needed.items() if k != missing})


def test_populations_out_of_reach_are_left_out_exactly():
    """Protects speed without a price: sums are those of all terms, and no posterior or gradient is a subnormal number."""
    contrast = torch.tensor([[0.0, -95.0, -1e4], [-500.0, -3.0, -100.0]], requires_grad=True)
    log_prob, log_pi = PopulationLogProb(torch.tensor([1.0, -2.0]), contrast), torch.tensor([-1.0, -1.5, -0.7])
    value = mixture_log_likelihood(log_prob, log_pi)
    torch.testing.assert_close(value, log_prob.common + torch.logsumexp(contrast + log_pi, -1))
    posterior = population_posterior(log_prob, log_pi)
    torch.testing.assert_close(posterior, torch.softmax(contrast + log_pi, -1), rtol=1e-6, atol=1e-25)
    (gradient,) = torch.autograd.grad(value.sum(), contrast)
    for values in (gradient, posterior.detach()):
        tiny = values.abs() < torch.finfo(torch.float32).tiny
        assert not values[tiny].any()
