"""What predictions of a perturbation screen are compared with: measured cells, control cells, their random halves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.spatial.distance import pdist
from sklearn.decomposition import PCA

from cellweave.stats import ShiftTable, group_means

from ._perturbation_inputs import Cells, Columns
from ._perturbation_metrics import n_significant, permutation_p, rank_test

__all__ = ["Screen", "Settings", "halve", "rows_of"]

Array = NDArray[np.float64]

# Cells that the principal components and the scale of the kernels rest on, and cells of a group that are ranked.
_MAX_PCA_CELLS = 20_000
_SCALE_CELLS = 800
_MAX_TEST_CELLS = 5_000


class Settings:
    """How a screen is scored; see :func:`cellweave.tl.evaluate_perturbation`."""

    def __init__(self, split_control: bool, n_splits: int, n_top: int, n_pcs: int, max_cells: int, seed: int) -> None:
        at_least = {
            "n_splits": (n_splits, 1),
            "n_top_genes": (n_top, 2),
            "n_pcs": (n_pcs, 1),
            "max_cells": (max_cells, 2),
        }
        for argument, (value, least) in at_least.items():
            if value < least:
                raise ValueError(f"`{argument}` must be at least {least}, got {value}; choose a larger number.")
        self.split_control, self.n_splits, self.n_top = split_control, n_splits, n_top
        self.n_pcs, self.max_cells, self.seed = n_pcs, max_cells, seed

    def generator(self, *purpose: int) -> np.random.Generator:
        """A stream of its own for every purpose: what is drawn for one never changes another."""
        return np.random.default_rng([self.seed, *purpose])


def halve(strata: NDArray[np.integer], rng: np.random.Generator) -> NDArray[np.bool_]:
    """A random half of the cells of every stratum ``(cell,)``; of an odd number, one more or one fewer by chance."""
    order = np.lexsort((rng.random(len(strata)), strata))
    _, start, inverse = np.unique(strata[order], return_index=True, return_inverse=True)
    place = np.arange(len(strata)) - start[inverse] + rng.integers(2, size=len(start))[inverse]
    half = np.empty(len(strata), dtype=bool)
    half[order] = place % 2 == 0
    return half


def rows_of(codes: NDArray[np.integer], n_groups: int) -> list[NDArray[np.intp]]:
    """Positions of the cells of every group; cells with a negative code belong to none."""
    order = np.argsort(codes, kind="stable")
    return np.split(order, np.searchsorted(codes[order], np.arange(n_groups + 1)))[1:-1]


@dataclass(eq=False)
class Screen:
    """Measured perturbed cells by group, and control cells by context.

    Parameters
    ----------
    groups
        Perturbation and context of every group that is scored.
    truth
        Measured perturbed cells.
    control
        Control cells.
    train
        Cells that predictors could see, for the principal components and the simple predictions; None without them.
    columns
        Columns of ``obs``.
    settings
        How to score.
    """

    groups: pd.MultiIndex
    truth: Cells
    control: Cells
    train: Cells | None
    columns: Columns
    settings: Settings

    def __post_init__(self) -> None:
        self.contexts = pd.Index(self.control.obs["context"].unique())
        self.context = self.contexts.get_indexer(self.groups.get_level_values("context"))
        self.truth_code = self.groups.get_indexer(self.truth.groups)
        self.control_code = self.contexts.get_indexer(self.control.obs["context"])
        self.truth_rows = rows_of(self.truth_code, len(self.groups))
        self.control_rows = rows_of(self.control_code, len(self.contexts))
        self.n_true = np.array([len(rows) for rows in self.truth_rows])
        self.conditions = [self.columns.names.parts(name) for name in self.groups.get_level_values("perturbation")]

    # ------------------------------------------------------------------------------------------------- means

    @cached_property
    def truth_mean(self) -> Array:
        """Measured means ``(group, gene)``."""
        return group_means(self.truth.x, self.truth_code, len(self.groups))[0]

    @cached_property
    def control_mean(self) -> Array:
        """Means of all control cells ``(context, gene)``."""
        return group_means(self.control.x, self.control_code, len(self.contexts))[0]

    @cached_property
    def control_std(self) -> Array:
        """Standard deviations of the control cells ``(context, gene)``."""
        x = self.control.x
        squares, _ = group_means(x.power(2) if hasattr(x, "power") else x**2, self.control_code, len(self.contexts))
        return np.sqrt(np.maximum(squares - self.control_mean**2, 0))

    @cached_property
    def control_in_first(self) -> NDArray[np.bool_]:
        """Whether every control cell is in the first half of every split ``(split, cell)``."""
        strata = pd.factorize(self.control.obs["stratum"])[0]
        draws = [halve(strata, self.settings.generator(1, i)) for i in range(self.settings.n_splits)]
        return np.stack(draws)

    @cached_property
    def half_means(self) -> list[tuple[Array, Array]]:
        """Means of the control cells that the prediction and the truth of every split subtract ``(context, gene)``."""
        if not self.settings.split_control:
            return [(self.control_mean, self.control_mean)] * self.settings.n_splits
        n, halves = len(self.contexts), []
        for first in self.control_in_first:
            means, _ = group_means(self.control.x, self.control_code + n * ~first, 2 * n)
            halves.append((means[:n], means[n:]))
        return halves

    def rows_of_half(self, context: int, split: int, second: bool) -> NDArray[np.intp]:
        """Control cells of a context in one half of a split, or all if control cells are shared."""
        rows = self.control_rows[context]
        return rows[self.control_in_first[split, rows] != second] if self.settings.split_control else rows

    # ------------------------------------------------------------------------------------------------- single cells

    def draw(self, rows: NDArray[np.intp], size: int, *purpose: int) -> NDArray[np.intp]:
        """At most ``size`` of some cells."""
        if len(rows) <= size:
            return rows
        return np.sort(self.settings.generator(*purpose).choice(rows, size, replace=False))

    def truth_cells(self, group: int) -> NDArray[np.float32]:
        """At most ``max_cells`` measured cells of a group."""
        return self.truth.dense(self.draw(self.truth_rows[group], self.settings.max_cells, 2, group))

    def control_cells(self, group: int) -> NDArray[np.float32]:
        """At most ``max_cells`` control cells of the context of a group."""
        return self.control.dense(self.draw(self.control_rows[self.context[group]], self.settings.max_cells, 3, group))

    @cached_property
    def _pca(self) -> PCA:
        return self._components([self.control if self.train is None else self.train])

    @cached_property
    def _pooled_pca(self) -> PCA:
        """Components of measured and control cells alike: those of one of them alone would make them look different."""
        return self._components([self.truth, self.control])

    def _components(self, parts: list[Cells]) -> PCA:
        drawn = [self.draw(np.arange(cells.x.shape[0]), _MAX_PCA_CELLS // len(parts), 4) for cells in parts]
        blocks = [cells.x[rows].astype(np.float64) for cells, rows in zip(parts, drawn, strict=True)]
        x = sp.vstack(blocks, format="csr") if all(map(sp.issparse, blocks)) else np.concatenate([*map(_dense, blocks)])
        n_pcs = min(self.settings.n_pcs, min(x.shape) - 1)
        # the sparse solver finds few of many components
        exact = n_pcs < 1 or 2 * n_pcs > min(x.shape)
        pca = PCA(max(1, n_pcs), svd_solver="full" if exact else "arpack", random_state=self.settings.seed)
        return pca.fit(_dense(x) if exact else x)

    def project(self, x: NDArray) -> Array:
        """Principal components of the training cells ``(cell, component)``."""
        return _project(self._pca, x)

    @cached_property
    def gamma(self) -> float:
        """Inverse of the median squared distance of training cells."""
        cells = self.control if self.train is None else self.train
        rows = self.draw(np.arange(cells.x.shape[0]), _SCALE_CELLS, 5)
        distances = pdist(self.project(cells.dense(rows)), "sqeuclidean")
        median = float(np.median(distances)) if len(distances) else 0.0
        return 1 / median if median > 0 else 1.0

    # ------------------------------------------------------------------------------------------------- tests

    def rank(self, cells: Cells, rows: NDArray[np.intp], control: NDArray[np.intp]) -> tuple[Array, Array]:
        """Wilcoxon test of some cells against some control cells: z and p-values ``(gene,)``."""
        few, few_control = (self.draw(some, _MAX_TEST_CELLS, 6) for some in (rows, control))
        if not (len(few) and len(few_control)):
            return np.full(self.control.x.shape[1], np.nan), np.ones(self.control.x.shape[1])
        return rank_test(cells.dense(few), self.control.dense(few_control))

    @cached_property
    def truth_test(self) -> tuple[Array, NDArray[np.int64]]:
        """Wilcoxon z of the measured cells against all control cells ``(group, gene)``, and numbers of DE genes."""
        pairs = zip(self.truth_rows, self.context, strict=True)
        tests = [self.rank(self.truth, rows, self.control_rows[context]) for rows, context in pairs]
        return np.stack([z for z, _ in tests]), np.array([n_significant(p) for _, p in tests])

    @cached_property
    def truth_scores(self) -> list[Array]:
        """Wilcoxon z of the measured cells against the control cells that define the truth of each split.

        A choice of genes by all control cells would let the noise of the other half in again: ``(group, gene)`` per split.
        """
        if not self.settings.split_control:
            return [self.truth_test[0]] * self.settings.n_splits
        return [
            np.stack([self._score(g, split) for g in range(len(self.groups))])
            for split in range(self.settings.n_splits)
        ]

    def _score(self, group: int, split: int) -> Array:
        control = self.rows_of_half(self.context[group], split, second=True)
        return self.rank(self.truth, self.truth_rows[group], control)[0]

    @cached_property
    def truth_energy_p(self) -> Array:
        """Permutation p-values of the energy distance of the measured cells to control cells ``(group,)``."""
        cells = ((self.truth_cells(g), self.control_cells(g)) for g in range(len(self.groups)))
        pairs = ((_project(self._pooled_pca, x), _project(self._pooled_pca, y)) for x, y in cells)
        return np.array([permutation_p(x, y, self.settings.generator(8, g)) for g, (x, y) in enumerate(pairs)])

    # ------------------------------------------------------------------------------------------------- training shifts

    def shift_tables(self, min_cells: int) -> Iterator[ShiftTable]:
        """Shifts of the training cells: with all control cells, then with the first half of them in every split.

        One after the other: a table of many contexts and conditions is large.
        """
        train = self.control if self.train is None else self.train
        labels = train.obs["perturbation"]
        parts = {label: self.columns.names.parts(label) for label in labels.unique()}
        contexts, genes = train.obs["shift_context"].tolist(), train.genes.astype(str).tolist()
        table = ShiftTable.from_cells(train.x, [*map(parts.__getitem__, labels)], contexts, genes).at_least(min_cells)
        yield table
        codes = pd.Index(table.contexts).get_indexer(self.control.obs["shift_context"])
        for first in self.control_in_first if self.settings.split_control else ():
            half = np.where(first, codes, -1)
            yield table.with_control(*group_means(self.control.x, half, len(table.contexts)))


def _project(pca: PCA, x: NDArray) -> Array:
    return (np.asarray(x, dtype=np.float64) - pca.mean_) @ pca.components_.T


def _dense(x: Any) -> NDArray:
    return x.toarray() if sp.issparse(x) else x
