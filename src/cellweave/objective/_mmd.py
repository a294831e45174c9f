"""Maximum mean discrepancy between generated and measured cells of one condition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Generator, Tensor

from ._base import Objective

__all__ = ["ConditionalMMD", "median_bandwidths", "squared_distances", "squared_mmd"]

_SCALES = (0.5, 1.0, 2.0, 4.0)
# Smallest median squared distance: cells that are all equal have no scale of their own.
_MIN_SQUARED = 1e-12


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Squared Euclidean distances ``(row of x, row of y)``, in float64 where the device has it.

    The product form subtracts large numbers that are almost equal; after centring, and in double precision, close points
    keep ten digits, and its gradient is defined where two points coincide.

    Parameters
    ----------
    x, y
        Points ``(point, dim)``.
    """
    if x.device.type != "mps":  # Apple GPUs have no float64
        x, y = x.double(), y.double()
    centre = y.mean(0, keepdim=True).detach()
    x, y = x - centre, y - centre
    return (x.square().sum(1)[:, None] + y.square().sum(1)[None, :] - 2 * x @ y.T).clamp(min=0)


def median_bandwidths(target: Tensor, scales: Sequence[float] = _SCALES) -> Tensor:
    r"""Kernel widths :math:`\sigma_s = \sqrt{s\,m}`, :math:`m` the (lower) median squared distance between points.

    Parameters
    ----------
    target
        At least two points ``(point, dim)``.
    scales
        The factors :math:`s`.

    Returns
    -------
    Tensor ``(scale,)`` without gradient.
    """
    with torch.no_grad():
        n = len(target)
        above = torch.triu(torch.ones(n, n, dtype=torch.bool, device=target.device), diagonal=1)
        median = squared_distances(target, target)[above].median().clamp(min=_MIN_SQUARED)
        return (median * torch.tensor(scales, dtype=median.dtype, device=median.device)).sqrt()


def squared_mmd(x: Tensor, y: Tensor, sigmas: Tensor) -> Tensor:
    r"""Unbiased squared maximum mean discrepancy with Gaussian kernels, averaged over their widths.

    .. math::
        \frac{\sum_{i\ne j}k(x_i,x_j)}{m(m-1)} + \frac{\sum_{i\ne j}k(y_i,y_j)}{n(n-1)} - \frac{2}{mn}\sum_{ij}k(x_i,y_j),
        \qquad k(a,b) = e^{-\|a-b\|^2/2\sigma^2}

    It can be negative, and has the mean 0 where both samples come from one distribution.

    Parameters
    ----------
    x, y
        At least two points each, ``(point, dim)``.
    sigmas
        Widths ``(scale,)``.

    Returns
    -------
    0-d tensor of the type of ``x``.

    References
    ----------
    Gretton et al., *A kernel two-sample test*, JMLR 13 (2012).
    """
    xx, yy, xy = (_kernel_sums(a, b, sigmas) for a, b in ((x, x), (y, y), (x, y)))
    m, n = len(x), len(y)
    # the diagonal of a kernel is 1
    mmd = (xx - m) / (m * (m - 1)) + (yy - n) / (n * (n - 1)) - 2 * xy / (m * n)
    return mmd.mean().to(x.dtype)


def _kernel_sums(x: Tensor, y: Tensor, sigmas: Tensor) -> Tensor:
    """Sums of the kernel matrices ``(scale,)``."""
    squared = squared_distances(x, y)
    beta = 0.5 / sigmas.to(squared).square().clamp(min=_MIN_SQUARED)
    return torch.exp(-beta[:, None, None] * squared).sum((1, 2))


class ConditionalMMD(Objective):
    """Make the expected end points of the flow distributed as the measured cells of their condition.

    Reads ``end`` and ``target`` ``(cell, gene)``, ``w_expr`` ``(cell,)``, and, where a step holds several conditions,
    ``condition`` ``(cell,)``. Cells without weight take no part. Conditions count by their cells; one with fewer than two
    cells is left out, and without any the term is 0.

    Parameters
    ----------
    weight
        Factor in the total loss.
    scales
        Factors of the kernel widths, see :func:`median_bandwidths`.
    """

    name: ClassVar[str] = "mmd_loss"
    requires: ClassVar[frozenset[str]] = frozenset({"end", "target", "w_expr"})

    def __init__(self, weight: float = 0.5, scales: Sequence[float] = _SCALES) -> None:
        super().__init__(weight)
        self.scales = tuple(scales)

    def __call__(self, outputs: Mapping[str, Tensor], generator: Generator | None = None) -> Tensor:
        end, target, used = outputs["end"], outputs["target"], outputs["w_expr"] > 0
        condition = outputs.get("condition", torch.zeros_like(used, dtype=torch.int64))
        groups = [(condition == code) & used for code in condition[used].unique()]
        sizes = [int(group.sum()) for group in groups]
        n_cells = sum(size for size in sizes if size > 1)
        total = end.sum() * 0  # keeps the graph, also where no condition has two cells
        for group, size in zip(groups, sizes, strict=True):
            if size > 1:
                x, y = end[group], target[group]
                total = total + squared_mmd(x, y, median_bandwidths(y, self.scales)) * (size / n_cells)
        return total
