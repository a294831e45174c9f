"""What is known about perturbations from measured cells, and the simple predictions that follow from it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "SHIFT_PREDICTORS",
    "Predictor",
    "ShiftTable",
    "additive",
    "context_mean",
    "gene_linear",
    "group_means",
    "linear_context",
    "nearest_context",
    "no_change",
    "observed",
    "perturbed_mean",
]

Condition = tuple[str, ...]
Array = NDArray[np.float64]
Result = TypeVar("Result")

# Values summed at a time: bounds the memory of the float64 copies.
_BLOCK_VALUES = 2**24
# Size of the linear maps and of their ridge, as in the reference tables of the package.
_CONTEXT_COMPONENTS = 5
_GENE_COMPONENTS = 10
_GENE_SHARE = 0.4
_RIDGE = 0.1


def group_means(x: Any, codes: NDArray[np.integer], n_groups: int) -> tuple[Array, NDArray[np.int64]]:
    """Means of groups of cells, in float64.

    Parameters
    ----------
    x
        Values ``(cell, gene)``, dense or a scipy sparse matrix.
    codes
        Group of every cell ``(cell,)``; cells with a negative code are left out.
    n_groups
        Number of groups.

    Returns
    -------
    tuple
        Means ``(group, gene)``, NaN for a group without cells, and numbers of cells ``(group,)``.
    """
    group = np.asarray(codes).astype(np.int64)
    count = np.bincount(group[group >= 0], minlength=n_groups)
    sums = _sparse_sums(x.tocsr(), group, n_groups) if hasattr(x, "tocsr") else _dense_sums(x, group, n_groups)
    with np.errstate(invalid="ignore"):
        return sums / np.where(count > 0, count, np.nan)[:, None], count


def _sparse_sums(x: Any, codes: NDArray[np.int64], n_groups: int) -> Array:
    """Sums over cells, from the stored values alone."""
    n_genes = x.shape[1]
    sums = np.zeros(n_groups * n_genes)
    indptr = np.asarray(x.indptr, dtype=np.int64)
    # rows whose stored values fill a block; a row is never cut
    edges = np.searchsorted(indptr, np.arange(0, indptr[-1] + 1, _BLOCK_VALUES))
    for start, stop in zip(edges, [*edges[1:], len(indptr) - 1], strict=True):
        low, high = indptr[start], indptr[stop]
        group = np.repeat(codes[start:stop], np.diff(indptr[start : stop + 1]))
        used = group >= 0
        target = group[used] * n_genes + x.indices[low:high][used]
        sums += np.bincount(target, np.asarray(x.data[low:high], dtype=np.float64)[used], minlength=len(sums))
    return sums.reshape(n_groups, n_genes)


def _dense_sums(x: Any, codes: NDArray[np.int64], n_groups: int) -> Array:
    """Sums over cells that were brought in the order of their groups."""
    sums = np.zeros((n_groups, x.shape[1]))
    order = np.argsort(codes, kind="stable")
    order = order[np.searchsorted(codes[order], 0) :]
    step = max(1, _BLOCK_VALUES // max(1, x.shape[1]))
    for start in range(0, len(order), step):
        rows = order[start : start + step]
        groups, first = np.unique(codes[rows], return_index=True)
        sums[groups] += np.add.reduceat(np.asarray(x[rows], dtype=np.float64), first, axis=0)
    return sums


@dataclass(frozen=True, eq=False)
class ShiftTable:
    """Mean shifts of perturbed cells against control cells of the same context.

    A context is a stratum within which cells are compared: a cell type, a batch, a patient, a cell line. A condition is
    the sorted tuple of what was perturbed.

    Parameters
    ----------
    contexts
        Names of the contexts.
    conditions
        Conditions, never the empty one.
    control_mean
        Mean of the control cells ``(context, gene)``; NaN where a context has none.
    control_count
        Number of control cells ``(context,)``.
    shift
        Mean of the perturbed cells minus ``control_mean`` ``(context, condition, gene)``; NaN where not observed.
    count
        Number of perturbed cells ``(context, condition)``.
    genes
        Names of the genes.
    """

    contexts: tuple[str, ...]
    conditions: tuple[Condition, ...]
    control_mean: Array
    control_count: NDArray[np.int64]
    shift: Array
    count: NDArray[np.int64]
    genes: tuple[str, ...]

    @classmethod
    def from_cells(cls, x: Any, conditions: Sequence[Condition], contexts: Sequence[str], genes: Sequence[str]) -> Self:
        """Table of measured cells.

        Parameters
        ----------
        x
            Log-normalised expression ``(cell, gene)``, dense or a scipy sparse matrix.
        conditions
            What was perturbed in every cell, as a sorted tuple; empty for control cells.
        contexts
            Context of every cell.
        genes
            Names of the genes.

        Raises
        ------
        ValueError
            If the lengths of the arguments do not fit together.
        """
        n_cells, n_genes = x.shape
        if not len(conditions) == len(contexts) == n_cells or len(genes) != n_genes:
            raise ValueError(
                f"`x` has {n_cells} cells and {n_genes} genes, but there are {len(conditions)} `conditions`, "
                f"{len(contexts)} `contexts` and {len(genes)} `genes`; give one condition and context per row and one "
                "gene per column."
            )
        names = tuple(sorted(set(map(str, contexts))))
        known = ((), *sorted(set(conditions) - {()}))
        row = {name: i for i, name in enumerate(names)}
        column = {condition: i for i, condition in enumerate(known)}
        codes = np.fromiter(map(row.__getitem__, map(str, contexts)), np.int64, n_cells) * len(known)
        codes += np.fromiter(map(column.__getitem__, conditions), np.int64, n_cells)
        means, count = group_means(x, codes, len(names) * len(known))
        means = means.reshape(len(names), len(known), n_genes)
        count = count.reshape(len(names), len(known))
        shift = means[:, 1:] - means[:, :1]
        return cls(names, tuple(known[1:]), means[:, 0], count[:, 0], shift, count[:, 1:], tuple(map(str, genes)))

    def without(self, context: str, condition: Condition) -> Self:
        """The table as if one condition had not been measured in one context.

        Parameters
        ----------
        context
            Name of the context.
        condition
            What was perturbed.

        Returns
        -------
        ShiftTable
            A copy in which that shift is NaN and its count 0; equal to this table where it was not observed anyway.
        """
        if context not in self.contexts or condition not in self.conditions:
            return self
        gone = np.zeros(self.count.shape, dtype=bool)
        gone[self.contexts.index(context), self.conditions.index(condition)] = True
        return self._forget(gone)

    def at_least(self, n_cells: int) -> Self:
        """The table with only those shifts that rest on at least ``n_cells`` perturbed cells.

        Parameters
        ----------
        n_cells
            Smallest number of perturbed cells.
        """
        return self._forget(self.count < n_cells)

    def with_control(self, control_mean: Array, control_count: NDArray[np.int64]) -> Self:
        """The same perturbed cells against other control cells.

        Parameters
        ----------
        control_mean
            Means of these control cells ``(context, gene)``.
        control_count
            Their numbers ``(context,)``.
        """
        shift = self.shift + (self.control_mean - control_mean)[:, None, :]
        return replace(self, control_mean=control_mean, control_count=control_count, shift=shift)

    def row(self, context: str) -> int:
        """Position of a context, -1 if it is unknown."""
        return self.contexts.index(context) if context in self.contexts else -1

    def column(self, condition: Condition) -> int:
        """Position of a condition, -1 if it is unknown."""
        return self.conditions.index(condition) if condition in self.conditions else -1

    @cached_property
    def is_observed(self) -> NDArray[np.bool_]:
        """Whether there is a shift ``(context, condition)``."""
        return (self.count > 0) & (self.control_count > 0)[:, None]

    @cached_property
    def n_parts(self) -> NDArray[np.int64]:
        """Number of things perturbed together ``(condition,)``."""
        return np.array([len(condition) for condition in self.conditions], dtype=np.int64)

    @cached_property
    def gene_position(self) -> dict[str, int]:
        """Position of every gene."""
        return {gene: i for i, gene in enumerate(self.genes)}

    def remember(self, key: Hashable, compute: Callable[[], Result]) -> Result:
        """What ``compute`` returned when it was first asked for ``key``: predictors share it between conditions."""
        if key not in self._memory:
            self._memory[key] = compute()
        return self._memory[key]

    @cached_property
    def _memory(self) -> dict[Hashable, Any]:
        return {}

    def _forget(self, gone: NDArray[np.bool_]) -> Self:
        shift = np.where(gone[:, :, None], np.nan, self.shift)
        return replace(self, shift=shift, count=np.where(gone, 0, self.count))


# A prediction of the mean shift ``(gene,)`` of a condition in a context, None where it does not apply.
Predictor = Callable[[ShiftTable, str, Condition], Array | None]


def no_change(table: ShiftTable, context: str, condition: Condition) -> Array:
    """Nothing happens."""
    return np.zeros(len(table.genes))


def observed(table: ShiftTable, context: str, condition: Condition) -> Array | None:
    """The shift of the same condition in the same context, where it was measured."""
    row, column = table.row(context), table.column(condition)
    if row < 0 or column < 0 or not table.is_observed[row, column]:
        return None
    return table.shift[row, column]


def perturbed_mean(table: ShiftTable, context: str, condition: Condition) -> Array | None:
    """Average shift of the perturbations of this context, or of all contexts where this one has none."""
    return _average(table, context, single_only=False)


def additive(table: ShiftTable, context: str, condition: Condition) -> Array | None:
    """Sum of the shifts of the parts of a combination; an unknown part counts as the average single perturbation.

    The single perturbations of this context are used, or those of all contexts (averaged) where this one has none.
    """
    average = _average(table, context, single_only=True)
    if len(condition) < 2 or average is None:
        return None
    shifts, used = _shifts_near(table, context, table.n_parts == 1)
    row = {table.conditions[i][0]: shift for i, shift in zip(used, shifts, strict=True)}
    return np.sum([row.get(part, average) for part in condition], axis=0)


def context_mean(table: ShiftTable, context: str, condition: Condition) -> Array | None:
    """Average shift of the same condition in the other contexts."""
    others = _others(table, context, condition)
    return table.shift[others, table.column(condition)].mean(axis=0) if len(others) else None


def nearest_context(table: ShiftTable, context: str, condition: Condition) -> Array | None:
    """Shift of the same condition in the context whose control cells are most alike (Pearson correlation of means)."""
    others, row = _others(table, context, condition), table.row(context)
    if not len(others) or row < 0 or not table.control_count[row]:
        return None
    likeness = np.atleast_2d(np.corrcoef(table.control_mean[[row, *others]]))[0, 1:]
    return table.shift[others[int(np.argmax(likeness))], table.column(condition)]


def linear_context(table: ShiftTable, context: str, condition: Condition) -> Array | None:
    r"""Ridge regression of the shift of a condition on where the control cells of a context lie.

    Control means are centred and projected on their first ``min(5, contexts - 1)`` principal axes; the intercept is the
    mean shift, and the ridge is :math:`0.1\,\mathrm{tr}(Z^\top Z)/k`. Needs the condition in two other contexts.
    """
    others, row = _others(table, context, condition), table.row(context)
    if len(others) < 2 or row < 0 or not table.control_count[row]:
        return None
    control, shift = table.control_mean[others], table.shift[others, table.column(condition)]
    centre, mean = control.mean(axis=0), shift.mean(axis=0)
    k = min(_CONTEXT_COMPONENTS, len(others) - 1)
    axes = np.linalg.svd(control - centre, full_matrices=False)[2][:k].T
    z = (control - centre) @ axes
    gram = z.T @ z
    ridge = _RIDGE * np.trace(gram) / k
    if ridge == 0:  # all contexts have the same control cells
        return mean
    weights = np.linalg.solve(gram + ridge * np.eye(k), z.T @ (shift - mean))
    return mean + (table.control_mean[row] - centre) @ axes @ weights


def gene_linear(table: ShiftTable, context: str, condition: Condition) -> Array | None:
    r"""Bilinear map from the perturbed gene to the shift, for genes that are themselves measured.

    :math:`\hat Y = G W P^\top + b`: :math:`G` are the first right singular vectors of the shifts of the perturbations of
    this context (of all contexts, averaged, where it has none), two for every five perturbations and at most ten; the rows
    of :math:`P` are those of :math:`G` that belong to the perturbed genes. :math:`b` is the mean shift of the single
    perturbations whose gene is measured, and :math:`W` is fitted to them with a ridge of 0.1.

    References
    ----------
    Ahlmann-Eltze, Huber and Anders, *Deep-learning-based gene perturbation effect prediction does not yet outperform
    simple linear baselines*, Nature Methods (2025).
    """
    position = table.gene_position
    if len(condition) != 1 or condition[0] not in position:
        return None
    found = table.remember(("gene_map", table.row(context)), lambda: _gene_map(table, context))
    if found is None:
        return None
    left, genes, intercept = found
    return left @ genes[position[condition[0]]] + intercept


SHIFT_PREDICTORS: Mapping[str, Predictor] = MappingProxyType(
    {
        "no_change": no_change,
        "observed": observed,
        "perturbed_mean": perturbed_mean,
        "context_mean": context_mean,
        "nearest_context": nearest_context,
        "linear_context": linear_context,
        "additive": additive,
        "gene_linear": gene_linear,
    }
)


def _others(table: ShiftTable, context: str, condition: Condition) -> NDArray[np.intp]:
    """Rows of the other contexts in which a condition was measured."""
    column = table.column(condition)
    if column < 0:
        return np.zeros(0, dtype=np.intp)
    seen = table.is_observed[:, column].copy()
    if (row := table.row(context)) >= 0:
        seen[row] = False
    return np.flatnonzero(seen)


def _shifts_near(table: ShiftTable, context: str, chosen: NDArray[np.bool_]) -> tuple[Array, NDArray[np.intp]]:
    """Shifts ``(condition, gene)`` of the chosen conditions in this context, or averaged over all where it has none."""
    seen, row = table.is_observed & chosen, table.row(context)
    if row >= 0 and seen[row].any():
        used = np.flatnonzero(seen[row])
        return table.shift[row, used], used
    used = np.flatnonzero(seen.any(axis=0))
    weight = seen[:, used, None]
    total = np.where(weight, table.shift[:, used], 0.0).sum(axis=0)
    return total / np.maximum(weight.sum(axis=0), 1), used


def _average(table: ShiftTable, context: str, single_only: bool) -> Array | None:
    """Mean of the shifts near a context, the same for all conditions and therefore remembered."""

    def mean() -> Array | None:
        shifts, used = _shifts_near(table, context, table.n_parts == 1 if single_only else table.n_parts > 0)
        return shifts.mean(axis=0) if len(used) else None

    return table.remember(("average", table.row(context), single_only), mean)


def _gene_map(table: ShiftTable, context: str) -> tuple[Array, Array, Array] | None:
    """The matrices G W and G, and the intercept b of :func:`gene_linear`."""
    shifts, used = _shifts_near(table, context, table.n_parts > 0)
    position = table.gene_position
    conditions = [table.conditions[i] for i in used]
    measured = np.array([len(c) == 1 and c[0] in position for c in conditions], dtype=bool)
    if measured.sum() < 2:
        return None
    k = min(_GENE_COMPONENTS, round(_GENE_SHARE * len(used)))
    g = np.linalg.svd(shifts, full_matrices=False)[2][:k].T
    p = g[[position[c[0]] for c, here in zip(conditions, measured, strict=True) if here]]
    b = shifts[measured].mean(axis=0)
    # G is orthonormal: only the side of the perturbed genes is regression, and needs a ridge
    projected = g.T @ (shifts[measured] - b).T @ p
    weights = np.linalg.solve(p.T @ p + _RIDGE * np.eye(k), projected.T).T
    return g @ weights, g, b
