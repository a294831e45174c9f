from __future__ import annotations

from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

__all__ = ["Moments"]


class Moments(NamedTuple):
    r"""Mean and sum of squared deviations of every gene, in float64.

    Two halves of the data are joined by

    .. math::
        \delta = \mu_b - \mu_a,\quad \mu = \mu_a + \delta\,\frac{n_b}{n},\quad
        M = M_a + M_b + \delta^2\,\frac{n_a n_b}{n},

    which is exact in real arithmetic, associative and commutative, so that any split of the cells over files, processes
    or workers gives the same result up to rounding.

    Parameters
    ----------
    n_cells
        Number of cells :math:`n`.
    mean
        Means :math:`\mu` ``(gene,)``.
    m2
        Sums of squared deviations from the mean :math:`M` ``(gene,)``.
    n_expressed
        Cells in which the value is not zero ``(gene,)``.

    References
    ----------
    Chan, Golub and LeVeque, *Algorithms for computing the sample variance* (1983).
    """

    n_cells: int
    mean: NDArray[np.float64]
    m2: NDArray[np.float64]
    n_expressed: NDArray[np.int64]

    @classmethod
    def empty(cls, n_genes: int) -> Self:
        """Moments of no cells."""
        return cls(0, np.zeros(n_genes), np.zeros(n_genes), np.zeros(n_genes, dtype=np.int64))

    @classmethod
    def of_dense(cls, values: NDArray[np.number]) -> Self:
        """Moments of a dense block ``(cell, gene)``."""
        values = np.asarray(values, dtype=np.float64)
        if len(values) == 0:
            return cls.empty(values.shape[1])
        mean = values.mean(axis=0)
        return cls(len(values), mean, np.square(values - mean).sum(axis=0), np.count_nonzero(values, axis=0))

    @classmethod
    def of_sparse(cls, data: NDArray[np.number], genes: NDArray[np.integer], n_cells: int, n_genes: int) -> Self:
        """Moments of a sparse block, from its stored values and the gene of each (no gene twice in a cell)."""
        if n_cells == 0:
            return cls.empty(n_genes)
        data = np.asarray(data, dtype=np.float64)
        mean = np.bincount(genes, data, minlength=n_genes) / n_cells
        n_stored = np.bincount(genes, minlength=n_genes)
        # stored values by their deviations, which never cancel, and the zeros that are not stored
        m2 = np.bincount(genes, np.square(data - mean[genes]), minlength=n_genes)
        m2 = m2 + (n_cells - n_stored) * np.square(mean)
        n_expressed = np.bincount(genes[data != 0], minlength=n_genes).astype(np.int64)
        return cls(n_cells, mean, np.asarray(m2, dtype=np.float64), n_expressed)

    def merge(self, other: Moments) -> Self:
        """Moments of the cells of both."""
        n_cells = self.n_cells + other.n_cells
        if n_cells == 0:
            return self
        delta, share = other.mean - self.mean, other.n_cells / n_cells
        m2 = self.m2 + other.m2 + np.square(delta) * (self.n_cells * share)
        return type(self)(n_cells, self.mean + delta * share, m2, self.n_expressed + other.n_expressed)

    def variance(self, ddof: int = 1) -> NDArray[np.float64]:
        """Variance of every gene ``(gene,)``; NaN when there are not more than ``ddof`` cells."""
        if self.n_cells <= ddof:
            return np.full_like(self.m2, np.nan)
        return self.m2 / (self.n_cells - ddof)
