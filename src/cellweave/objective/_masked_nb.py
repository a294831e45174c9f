from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Generator, Tensor

from cellweave._keys import STEP_KEYS

from ._base import Objective
from ._shared import shared_mean

__all__ = ["MaskedNegativeBinomial", "negative_binomial_nll"]


def negative_binomial_nll(x: Tensor, px_rate: Tensor, px_r: Tensor, eps: float = 1e-8) -> Tensor:
    r"""Negative log-likelihood of counts under a negative binomial, summed over the last axis.

    .. math::
        -\log p(x) = -\theta\,\log\frac{\theta+\epsilon}{\theta+\mu+\epsilon}
                     -x\,\log\frac{\mu+\epsilon}{\theta+\mu+\epsilon}
                     -\log\frac{\Gamma(x+\theta)}{\Gamma(\theta)\,\Gamma(x+1)}

    Only the first term is left where :math:`x=0`, so the gamma functions are evaluated on the non-zero counts alone.

    Parameters
    ----------
    x
        Counts ``(cell, gene)``.
    px_rate
        Mean :math:`\mu` ``(cell, gene)``.
    px_r
        Inverse dispersion :math:`\theta` ``(cell, gene)``; the variance is :math:`\mu+\mu^2/\theta`.
    eps
        Guard of the logarithms, as in scvi-tools.

    Returns
    -------
    Tensor ``(cell,)`` in nats.
    """
    log_total = torch.log(px_r + px_rate + eps)
    zero_part = px_r * (log_total - torch.log(px_r + eps))
    cell, gene = torch.nonzero(x, as_tuple=True)
    count, theta = x[cell, gene], px_r[cell, gene]
    count_part = (
        count * (log_total[cell, gene] - torch.log(px_rate[cell, gene] + eps))
        + torch.lgamma(theta)
        + torch.lgamma(count + 1)
        - torch.lgamma(count + theta)
    )
    return zero_part.sum(-1).index_add(0, cell, count_part)


class MaskedNegativeBinomial(Objective):
    """Mean negative log-likelihood, in nats per masked entry, of the counts of the masked genes.

    Cells that only fill up a context (``valid`` false) do not count. With no masked gene the value is 0.
    """

    name: ClassVar[str] = "recon_loss"
    requires: ClassVar[frozenset[str]] = frozenset({"target", "px_rate", "px_r", "valid"})

    def __call__(self, outputs: Mapping[str, Tensor], generator: Generator | None = None) -> Tensor:
        target, valid = outputs["target"], outputs["valid"]  # (cell, masked gene), (cell,)
        if target.shape[1] == 0:
            return outputs["px_rate"].sum()  # an empty sum: zero, and still part of the graph
        # likelihoods stay in float32 under autocast: log-gamma differences lose all digits in bfloat16
        nll = negative_binomial_nll(target, outputs["px_rate"], outputs["px_r"])
        return shared_mean(nll, valid, outputs.get(STEP_KEYS.CELLS_PER_PROCESS)) / target.shape[1]
