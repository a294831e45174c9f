"""Numbers that compare predicted with measured perturbed cells; arrays in, arrays out."""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist
from scipy.special import ndtr
from scipy.stats import false_discovery_control, rankdata

__all__ = [
    "discrimination",
    "energy_and_mmd",
    "mean_test",
    "n_significant",
    "overlap",
    "permutation_p",
    "rank_test",
    "rowwise_pearson",
    "top_genes",
]

Array = NDArray[np.float64]

# Factors of the inverse squared width of the five kernels of the MMD.
_KERNELS = (0.1, 0.5, 1.0, 2.0, 10.0)
_FDR = 0.05
_PERMUTATIONS = 200
# Genes that are ranked at a time.
_GENES = 1024


def rowwise_pearson(predicted: Array, true: Array) -> Array:
    """Pearson correlation of every row ``(group,)``; 0 where the prediction does not vary, NaN where the truth does not."""
    a = predicted - predicted.mean(axis=1, keepdims=True)
    b = true - true.mean(axis=1, keepdims=True)
    product = (a * b).sum(axis=1)
    norm_a, norm_b = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        value = product / (norm_a * norm_b)
    flat = norm_a <= 1e-12 * (1 + np.abs(predicted).max(axis=1, initial=0))
    return np.where(norm_b == 0, np.nan, np.where(flat, 0.0, value))


def rank_test(x: NDArray, y: NDArray) -> tuple[Array, Array]:
    """Two-sided Wilcoxon rank-sum test of every gene.

    Parameters
    ----------
    x, y
        Dense expression ``(cell, gene)`` of two groups.

    Returns
    -------
    tuple
        ``z`` without correction for ties, by which genes are ranked, and p-values of the normal approximation with
        correction for ties and continuity, both ``(gene,)``.
    """
    m, n = len(x), len(y)
    rank_sum, ties = np.empty(x.shape[1]), np.empty(x.shape[1])
    for start in range(0, x.shape[1], _GENES):
        part = slice(start, start + _GENES)
        # sorting gene by gene in contiguous memory, and one merge, cost less than ranking the pooled cells
        _rank_sums(_sorted(x[:, part]), _sorted(y[:, part]), rank_sum[part], ties[part])
    excess = rank_sum - m * (m + n + 1) / 2
    variance = m * n * (m + n + 1) / 12
    z = excess / np.sqrt(variance)
    spread = np.sqrt(np.maximum(variance - m * n * ties / (12 * (m + n) * max(m + n - 1, 1)), 0))
    distance = np.maximum(np.abs(excess) - 0.5, 0)
    p = np.where(spread > 0, 2 * ndtr(-distance / np.where(spread > 0, spread, 1)), 1.0)
    return z, np.minimum(p, 1.0)


def _sorted(x: NDArray) -> NDArray:
    """Values of every gene in order ``(gene, cell)``."""
    return np.sort(np.ascontiguousarray(x.T), axis=1)


@numba.njit(cache=True, nogil=True)
def _rank_sums(x, y, rank_sum, ties):  # type: ignore[no-untyped-def]
    """Sum of the midranks of ``x`` among both, and sum of t^3 - t over groups of t equal values; both sorted by gene."""
    m, n = x.shape[1], y.shape[1]
    for gene in range(x.shape[0]):
        i, j, total, tied = 0, 0, 0.0, 0.0
        while i < m or j < n:
            value = x[gene, i] if j == n or (i < m and x[gene, i] < y[gene, j]) else y[gene, j]
            before, from_x = i + j, i
            while i < m and x[gene, i] == value:
                i += 1
            while j < n and y[gene, j] == value:
                j += 1
            size = i + j - before
            total += (i - from_x) * (before + (size + 1) / 2)
            tied += float(size) ** 3 - size
        rank_sum[gene], ties[gene] = total, tied


def mean_test(shift: Array, std: Array, n_cells: int, n_control: int) -> tuple[Array, Array]:
    """Scores and p-values ``(gene,)`` of shifts of the mean, as if cells that vary like the control cells had shifted.

    The median standard deviation is added to that of every gene, so that hardly expressed genes do not come first.
    """
    positive = std[std > 0]
    floor = float(np.median(positive)) if len(positive) else 1.0
    scale = (std + floor) * np.sqrt(1 / n_cells + 1 / n_control)
    z = shift / scale
    return z, 2 * ndtr(-np.abs(z))


def n_significant(p: Array) -> int:
    """Genes that are significant at a false discovery rate of 5 % (Benjamini-Hochberg)."""
    return int((false_discovery_control(p) <= _FDR).sum()) if len(p) else 0


def top_genes(score: Array, k: int) -> NDArray[np.intp]:
    """Positions of the ``k`` genes with the largest absolute score, largest first."""
    return np.argsort(-np.abs(score), kind="stable")[:k]


def overlap(predicted: Array, true: Array, k: int) -> float:
    """Share of the ``k`` first genes of the truth that are among the ``k`` first predicted ones.

    Genes with the score 0 are never among the first: a prediction of no change has no first genes.
    """
    chosen, target = (top[score[top] != 0] for score in (predicted, true) for top in [top_genes(score, k)])
    return len(np.intersect1d(chosen, target)) / len(target) if len(target) else float("nan")


def energy_and_mmd(x: Array, y: Array, gamma: float) -> tuple[float, float]:
    r"""Unbiased energy distance and squared maximum mean discrepancy of two samples.

    The energy distance is :math:`2E\|X-Y\| - E\|X-X'\| - E\|Y-Y'\|`; the kernel is the average of five Gaussian ones,
    :math:`e^{-s\gamma d^2}` with :math:`s` in 0.1, 0.5, 1, 2, 10. Pairs of a cell with itself are left out, so both can be
    negative and are 0 on average for samples of one distribution. NaN if a sample has one cell only.

    Parameters
    ----------
    x, y
        Samples ``(cell, component)``.
    gamma
        Inverse of the squared scale of the data.
    """
    if min(len(x), len(y)) < 2:
        return float("nan"), float("nan")
    (xx, kxx), (yy, kyy), (xy, kxy) = (_mean_distance(a, b, gamma, a is b) for a, b in ((x, x), (y, y), (x, y)))
    return 2 * xy - xx - yy, kxx + kyy - 2 * kxy


def _mean_distance(x: Array, y: Array, gamma: float, same: bool) -> tuple[float, float]:
    """Mean distance and mean kernel over the pairs of different cells."""
    squared = cdist(x, y, "sqeuclidean")
    n_pairs, n_self = squared.size - (len(x) if same else 0), len(x) if same else 0
    kernel = np.mean([(np.exp(-s * gamma * squared).sum() - n_self) / n_pairs for s in _KERNELS])
    return float(np.sqrt(squared).sum() / n_pairs), float(kernel)


def permutation_p(x: Array, y: Array, rng: np.random.Generator) -> float:
    """Permutation p-value of the energy distance of two samples; 1 if a sample has one cell only."""
    m, n = len(x), len(y)
    if min(m, n) < 2:
        return 1.0
    pooled = np.concatenate([x, y])
    distance = cdist(pooled, pooled)
    member = np.zeros((_PERMUTATIONS + 1, m + n))
    member[:, :m] = 1
    member[1:] = rng.permuted(member[1:], axis=1)
    # the sums over all pairs within and between the samples of every permutation are quadratic forms
    within = ((member @ distance) * member).sum(axis=1)
    rows = member @ distance.sum(axis=1)
    between, other = rows - within, distance.sum() - 2 * rows + within
    energy = 2 * between / (m * n) - within / (m * (m - 1)) - other / (n * (n - 1))
    # rounding must not decide whether a permutation that equals the data counts
    return float((1 + (energy[1:] >= energy[0] - 1e-9 * distance.mean()).sum()) / (1 + _PERMUTATIONS))


def discrimination(predicted: Array, true: Array, targets: NDArray[np.bool_]) -> Array:
    """How well every predicted shift finds its own measured one among all of a context ``(perturbation,)``.

    The true shifts are ranked by their L1 distance from the predicted one; the score is ``1 - rank / (perturbations - 1)``,
    1 if the own is the closest and 0.5 on average for a prediction that knows nothing. Ties count half. The perturbed
    genes themselves are left out of the distances. NaN if there is one perturbation only.

    Parameters
    ----------
    predicted, true
        Shifts ``(perturbation, gene)``.
    targets
        The genes that were perturbed ``(perturbation, gene)``.
    """
    n = len(true)
    score = np.full(n, np.nan)
    for i in range(n if n > 1 else 0):
        kept = ~targets[i]
        distance = np.abs(predicted[i, kept] - true[:, kept]).sum(axis=1)
        score[i] = 1 - (rankdata(distance)[i] - 1) / (n - 1)
    return score
