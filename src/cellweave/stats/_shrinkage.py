"""Effects without most of their chance error."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["SHRINKERS", "posterior_effects", "shrink_effects", "shrinkage_risk"]

Array = NDArray[np.float64]

# Shares of the posterior mean in an effect.
SHRINKERS = {"none": 0.0, "half": 0.5, "full": 1.0}

_N_ITERATIONS = 60
# Weight of the null component beyond what the data say, in genes: effects must show themselves.
_NULL_GENES = 9.0
# Smallest prior standard deviation, as a share of the usual chance error; the next one is larger by the root of 2.
_SMALLEST = 0.2


def posterior_effects(effects: Array, variance: Array) -> Array:
    """Posterior means of many effects of which most may be zero.

    The effects are drawn from a mixture of normal distributions around zero, of widths from nothing to the largest effect,
    whose shares are fitted by expectation maximisation.

    Parameters
    ----------
    effects
        Estimates ``(gene,)``.
    variance
        Their sampling variances ``(gene,)``.

    Returns
    -------
    Posterior means ``(gene,)``, all between the estimate and zero.

    References
    ----------
    Stephens, *False discovery rates: a new deal*, Biostatistics 18 (2017).
    """
    variance = np.maximum(variance, 1e-8)
    largest = max(float(np.square(effects).max()), 4 * float(variance.max()))
    smallest = _SMALLEST**2 * float(np.median(variance))
    n_widths = max(1, int(np.ceil(np.log2(largest / smallest))) + 1)
    widths = np.concatenate([[0.0], smallest * 2.0 ** np.arange(n_widths)])  # variances of the components
    total = widths[None] + variance[:, None]  # (gene, component)
    log_likelihood = -0.5 * (np.log(total) + np.square(effects)[:, None] / total)
    likelihood = np.exp(log_likelihood - log_likelihood.max(1, keepdims=True))
    prior = np.full(len(widths), 1 / len(widths))
    for _ in range(_N_ITERATIONS):
        prior = _responsibilities(likelihood, prior).sum(0)
        prior[0] += _NULL_GENES
        prior /= prior.sum()
    weights = _responsibilities(likelihood, prior)
    return (weights * (widths / total)).sum(1) * effects


def _responsibilities(likelihood: Array, prior: Array) -> Array:
    weights = likelihood * prior
    return weights / weights.sum(1, keepdims=True)


def shrink_effects(effects: Array, variance: Array, how: str) -> Array:
    """Effects moved towards their posterior means.

    Parameters
    ----------
    effects
        Estimates ``(gene,)``.
    variance
        Their sampling variances ``(gene,)``.
    how
        Name in ``SHRINKERS``.
    """
    share = SHRINKERS[how]
    return effects if share == 0 else effects + share * (posterior_effects(effects, variance) - effects)


def shrinkage_risk(effects: Array, variance: Array, chance: Array, how: str) -> float:
    r"""Unbiased estimate of the squared error of shrunken effects, summed over genes (Stein).

    .. math::
        \sum_g (f(d_g)-d_g)^2 + 2 s_g^2 f'(d_g) - s_g^2

    Parameters
    ----------
    effects
        Estimates ``(gene,)``.
    variance
        Sampling variances by which they are shrunken ``(gene,)``.
    chance
        The part :math:`s^2` of it that is an error for the use at hand ``(gene,)``. Where an effect is added to the very control
        cells that it was measured against, their chance error belongs to it.
    how
        Name in ``SHRINKERS``.

    References
    ----------
    Stein, *Estimation of the mean of a multivariate normal distribution*, Annals of Statistics 9 (1981).
    """
    step = 1e-3 * np.sqrt(np.maximum(variance, 1e-8))
    shrunk = shrink_effects(effects, variance, how)
    slope = (shrink_effects(effects + step, variance, how) - shrink_effects(effects - step, variance, how)) / (2 * step)
    return float((np.square(shrunk - effects) + 2 * chance * slope - chance).sum())
