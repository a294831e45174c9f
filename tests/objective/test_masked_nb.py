"""The negative binomial of the masked genes, and the metrics beside it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scvi.distributions import NegativeBinomial

from cellweave.objective import MaskedNegativeBinomial, masked_correlation, masked_mae, negative_binomial_nll

SHAPE = (3, 5)
COUNTS = arrays(np.float64, SHAPE, elements=st.one_of(st.just(0), st.integers(0, 10**5)))
MEANS = arrays(np.float64, SHAPE, elements=st.floats(1e-6, 1e5))
DISPERSIONS = arrays(np.float64, SHAPE, elements=st.floats(1e-4, 1e4))


def _outputs(n_cells=4, n_genes=6, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.rand(n_cells, n_genes, dtype=dtype, generator=generator)
    return {
        "target": torch.poisson(3 * draw(), generator=generator),
        "px_rate": 0.1 + 3 * draw(),
        "px_r": 0.1 + 3 * draw(),
        "valid": torch.ones(n_cells, dtype=dtype),
    }


@given(COUNTS, MEANS, DISPERSIONS)
def test_likelihood_is_that_of_scvi_tools(x, mu, theta):
    """Protects the likelihood over nine orders of magnitude: the distribution of scvi-tools, in float64."""
    x, mu, theta = map(torch.from_numpy, (x, mu, theta))
    expected = -NegativeBinomial(mu=mu, theta=theta, validate_args=False).log_prob(x).sum(-1)
    torch.testing.assert_close(negative_binomial_nll(x, mu, theta), expected, rtol=1e-10, atol=1e-8)


def test_probabilities_sum_to_one():
    """Protects the normalisation, independently of any library: the probabilities of all counts add up."""
    x = torch.arange(2000, dtype=torch.float64)[:, None]
    nll = negative_binomial_nll(x, torch.full_like(x, 5.0), torch.full_like(x, 0.7))
    assert torch.exp(-nll).sum().item() == pytest.approx(1, abs=1e-6)


def test_value_is_the_mean_over_valid_entries():
    """Protects the reduction: nats per masked entry of the valid cells."""
    outputs = _outputs()
    nll = negative_binomial_nll(outputs["target"], outputs["px_rate"], outputs["px_r"])
    outputs["valid"] = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    expected = (nll[0] + nll[2]) / (2 * 6)
    torch.testing.assert_close(MaskedNegativeBinomial()(outputs), expected)


def test_filling_cells_count_for_nothing():
    """Protects padded contexts: whatever a filling cell holds, value and gradients stay the same."""
    results = []
    for filler in (1.0, 77.0):
        outputs = _outputs()
        outputs["valid"][2:] = 0
        outputs["target"][2:], outputs["px_r"][2:] = filler, filler
        outputs["px_rate"].requires_grad_()
        value = MaskedNegativeBinomial()(outputs)
        value.backward()
        results.append((value.detach(), outputs["px_rate"].grad))
        assert (outputs["px_rate"].grad[2:] == 0).all()
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_gradients():
    """Protects training: analytic and numerical gradients of mean and dispersion agree."""
    outputs = _outputs()
    outputs["valid"][1] = 0

    def value(px_rate, px_r):
        return MaskedNegativeBinomial()({**outputs, "px_rate": px_rate, "px_r": px_r})

    assert torch.autograd.gradcheck(value, (outputs["px_rate"].requires_grad_(), outputs["px_r"].requires_grad_()))


def test_no_masked_gene_gives_zero_with_a_gradient():
    """Protects steps whose mask is empty: zero, finite, and still part of the graph."""
    outputs = {k: v[:, :0] if v.ndim == 2 else v for k, v in _outputs().items()}
    outputs["px_rate"].requires_grad_()
    value = MaskedNegativeBinomial()(outputs)
    value.backward()
    assert value.item() == 0


def test_no_valid_cell_gives_zero():
    """Protects ranks that only repeat contexts: zero, not 0/0."""
    outputs = _outputs()
    outputs["valid"][:] = 0
    assert MaskedNegativeBinomial()(outputs).item() == 0


def test_extreme_counts_stay_finite_in_float32():
    """Protects against overflow: the largest accepted count, tiny means and dispersions."""
    x = torch.tensor([[2.0**24, 0.0, 1.0]])
    for mu, theta in [(1e-8, 1e-6), (1e6, 1e4), (1e-8, 1e4), (1e6, 1e-6)]:
        nll = negative_binomial_nll(x, torch.full_like(x, mu), torch.full_like(x, theta))
        assert torch.isfinite(nll).all()


def test_mean_absolute_error():
    """Protects the metric: counts, averaged over masked genes, one value per cell; zero without genes."""
    x, rate = torch.tensor([[0.0, 2.0], [5.0, 5.0]]), torch.tensor([[1.0, 4.0], [5.0, 5.0]])
    torch.testing.assert_close(masked_mae(x, rate), torch.tensor([1.5, 0.0]))
    torch.testing.assert_close(masked_mae(x[:, :0], rate[:, :0]), torch.zeros(2))


def test_correlation_is_pearson():
    """Protects the metric: numpy's Pearson correlation per cell, within the guard of the norm."""
    outputs = _outputs(n_genes=30)
    actual = masked_correlation(outputs["target"], outputs["px_rate"])
    expected = [np.corrcoef(*pair)[0, 1] for pair in zip(outputs["target"], outputs["px_rate"], strict=True)]
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


@pytest.mark.parametrize("n_genes", [0, 1])
def test_correlation_needs_two_genes(n_genes):
    """Protects tiny masks: zero, not NaN, where a correlation is undefined."""
    x = torch.ones(3, n_genes)
    assert (masked_correlation(x, x) == 0).all()


def test_correlation_of_constant_counts_is_finite():
    """Protects empty cells: constant counts give zero, not NaN."""
    assert (masked_correlation(torch.zeros(2, 4), torch.rand(2, 4)) == 0).all()
