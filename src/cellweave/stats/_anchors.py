"""What to expect of a perturbation before a model is trained, as far as held-out training cells support it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ._shifts import SHIFT_PREDICTORS, Condition, ShiftTable, group_means

__all__ = [
    "ANCHORS",
    "AnchorRule",
    "Evidence",
    "choose_anchors",
    "context_response",
    "expected_shift",
    "with_contexts",
]

Array = NDArray[np.float64]

# A prediction is never blown up by more than this.
_MAX_SCALE = 1.2
# Differences of correlation by which a context counts less: as a source of an effect, and as an example of a transfer.
_SOURCE_WIDTH, _EXAMPLE_WIDTH = 0.03, 0.1
# Share of the energy of both terms that is added to the diagonal of the fit.
_RIDGE = 1e-3
# Effects as large as their own chance error are no ground for a correction of it.
_MIN_SIGNAL = 1.0


@dataclass(frozen=True, eq=False)
class Evidence:
    """Mean shifts of training cells, and how sure they are.

    Attributes
    ----------
    table
        The shifts.
    noise
        Sampling variance of every shift, summed over genes ``(context, condition)``; NaN where not observed.
    """

    table: ShiftTable
    noise: Array

    @classmethod
    def from_cells(cls, x: Any, conditions: Sequence[Condition], contexts: Sequence[str], genes: Sequence[str]) -> Self:
        """Evidence of measured cells; arguments as in :meth:`ShiftTable.from_cells`."""
        table = ShiftTable.from_cells(x, conditions, contexts, genes)
        columns = {condition: i + 1 for i, condition in enumerate(table.conditions)}
        rows = {name: i for i, name in enumerate(table.contexts)}
        n_columns = len(columns) + 1
        codes = np.array(
            [rows[str(c)] * n_columns + columns.get(k, 0) for c, k in zip(contexts, conditions, strict=True)]
        )
        squares = np.asarray(x.multiply(x).sum(1) if hasattr(x, "multiply") else (x.astype(np.float64) ** 2).sum(1))
        energy, count = group_means(squares.reshape(-1, 1), codes, len(rows) * n_columns)
        energy, count = energy.reshape(len(rows), n_columns), count.reshape(len(rows), n_columns)
        control = table.control_mean
        means = np.concatenate([control[:, None], control[:, None] + table.shift], axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            variance = (energy - (means**2).sum(2)) / (count - 1)  # of a mean, summed over genes
        # a single cell says nothing of its own spread: that of the control cells stands in
        variance = np.where(count == 1, variance[:, :1] * count[:, :1], variance)
        return cls(table, np.maximum(variance[:, 1:] + variance[:, :1], 0))

    def without(self, context: str, condition: Condition) -> Evidence:
        """The evidence as if one condition had not been measured in one context."""
        return replace(self, table=self.table.without(context, condition))


def context_response(evidence: Evidence, context: str, condition: Condition) -> Array | None:
    r"""Effect of a condition in a context, from its effects in other contexts.

    :math:`\hat\delta = a\,\delta_o + b\,(m_o - m)`, where :math:`\delta_o` and :math:`m_o` are the effect and the control
    mean of similar contexts (averaged with weights that fall with the difference of the correlation of control means), and
    :math:`m` is the control mean here. The second term says that treated cells of different contexts become more alike than
    their control cells. :math:`a` and :math:`b` are fitted to the other contexts, each predicted from the rest; similar ones
    count more, and the chance error of the effects does not make :math:`a` smaller.

    Needs the condition in two other contexts.

    Parameters
    ----------
    evidence
        Shifts of training cells.
    context
        Where.
    condition
        What is perturbed.

    Returns
    -------
    Expected shift ``(gene,)``, or None where it does not apply.
    """
    table, column = evidence.table, evidence.table.column(condition)
    row = table.row(context)
    others = np.flatnonzero(table.is_observed[:, column]) if column >= 0 else np.zeros(0, dtype=np.intp)
    others = others[others != row]
    if len(others) < 2 or row < 0 or not table.control_count[row]:
        return None
    gram, cross, noise = np.zeros((2, 2)), np.zeros(2), 0.0
    weights = _similar(table, row, others, _EXAMPLE_WIDTH)
    for target, weight in zip(others, weights, strict=True):
        rest = others[others != target]
        n, m = table.count[target, column], table.control_count[target]
        weight = weight * n * m / (n + m)  # inverse variance
        terms, chance = _terms(evidence, target, rest, column)
        gram += weight * terms @ terms.T
        cross += weight * terms @ table.shift[target, column]
        noise += weight * chance
    if gram[0, 0] - noise > _MIN_SIGNAL * noise:
        gram[0, 0] -= noise
    coefficients = np.linalg.solve(gram + _RIDGE * np.trace(gram) / 2 * np.eye(2), cross) if gram.any() else cross
    coefficients = np.clip(coefficients, 0, [_MAX_SCALE, 1])
    return coefficients @ _terms(evidence, row, others, column)[0]


def _terms(evidence: Evidence, row: int, others: NDArray[np.intp], column: int) -> tuple[Array, float]:
    """The two terms ``(2, gene)`` of a response in a context, and the sampling variance of the first."""
    table = evidence.table
    weights = _similar(table, row, others, _SOURCE_WIDTH)
    effect = weights @ table.shift[others, column]
    gap = weights @ table.control_mean[others] - table.control_mean[row]
    return np.stack([effect, gap]), float(weights**2 @ np.nan_to_num(evidence.noise[others, column]))


def _similar(table: ShiftTable, row: int, others: NDArray[np.intp], width: float) -> Array:
    """Weights of other contexts, by the correlation of their control means with those of one."""
    likeness = np.atleast_2d(np.corrcoef(table.control_mean[[row, *others]]))[0, 1:]
    weights = np.exp((likeness - likeness.max()) / width)
    return weights / weights.sum()


def _simple(name: str) -> Any:
    return lambda evidence, context, condition: SHIFT_PREDICTORS[name](evidence.table, context, condition)


# Expectations by name; "observed" is missing, since it is what a model is trained to find.
ANCHORS: Mapping[str, Any] = {
    "context_response": context_response,
    **{name: _simple(name) for name in SHIFT_PREDICTORS if name not in ("observed", "no_change")},
}


@dataclass(frozen=True)
class AnchorRule:
    """A simple prediction, how much of it to believe, and how it did.

    Attributes
    ----------
    name
        Name in ``ANCHORS``.
    combination
        Whether the rule is for combinations or for single perturbations; None for both.
    scale
        Factor on what it predicts, in [0, 1.2]: the one of least squared error for held-out groups.
    error
        Squared error of the scaled prediction for held-out groups, as a share of that of predicting no change.
    n_groups
        Groups of cells it was tried on.
    """

    name: str
    combination: bool | None = None
    scale: float = 1.0
    error: float = 0.0
    n_groups: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return dict(vars(self))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The rule that :meth:`to_dict` wrote."""
        return cls(**values)


def choose_anchors(folds: Sequence[tuple[Evidence, ShiftTable]]) -> list[AnchorRule]:
    """Try simple predictions on every training group, each time without that group; the best comes first.

    The shift of a held-out group is measured against control cells that no prediction sees. Otherwise the chance error of
    shared control cells would make every prediction look as if it found an effect. :func:`context_response`, which weighs its
    own evidence, comes before all others.

    Parameters
    ----------
    folds
        Pairs made with disjoint control cells: what predictions see, and what they are compared with.

    Returns
    -------
    Rules, for single perturbations and for combinations.
    """
    sums = {(name, many): np.zeros(4) for name in ANCHORS for many in (False, True)}
    for seen, held_out in folds:
        for context, condition, truth in _groups(held_out):
            rest = seen.without(context, condition)
            for name, predict in ANCHORS.items():
                shift = None if name == "context_response" else predict(rest, context, condition)
                if shift is not None:
                    sums[name, len(condition) > 1] += [shift @ truth, shift @ shift, truth @ truth, 1]
    rules = [_rule(name, many, total, len(folds)) for (name, many), total in sums.items() if total[3]]
    return [AnchorRule("context_response"), *sorted(rules, key=lambda rule: rule.error)]


def expected_shift(evidence: Evidence, context: str, condition: Condition, rules: Sequence[AnchorRule]) -> Array:
    """Shift of a condition in a context that the best applicable rule predicts without having seen it ``(gene,)``.

    Parameters
    ----------
    evidence
        Shifts of the training cells.
    context
        Where.
    condition
        What was perturbed; nothing gives no shift.
    rules
        Rules, the best first; without an applicable one nothing is expected to happen.
    """
    rest = evidence.without(context, condition)
    for rule in rules if condition else ():
        if rule.combination in (None, len(condition) > 1):
            shift = ANCHORS[rule.name](rest, context, condition)
            if shift is not None:
                return rule.scale * shift
    return np.zeros(len(evidence.table.genes))


def with_contexts(
    evidence: Evidence, contexts: Sequence[str], control_mean: Array | None = None, control_count: Any = None
) -> Evidence:
    """The evidence with contexts in a given order, among them some in which nothing was perturbed.

    Parameters
    ----------
    evidence
        The evidence.
    contexts
        Names, among which all of the evidence are.
    control_mean, control_count
        Means ``(new context, gene)`` and numbers of the control cells of the contexts that the evidence does not have, in
        the order of ``contexts``; unknown by default.
    """
    table = evidence.table
    n_new = len(contexts) - len(table.contexts)
    if control_mean is None:
        control_mean, control_count = np.full((n_new, len(table.genes)), np.nan), np.zeros(n_new, dtype=np.int64)
    place = {name: i for i, name in enumerate(table.contexts)}
    new = iter(range(len(table.contexts), len(contexts)))
    order = [place[name] if name in place else next(new) for name in contexts]

    def extended(values: Any, fill: float) -> Any:
        return np.concatenate([values, np.full((n_new, *values.shape[1:]), fill, dtype=values.dtype)])[order]

    grown = replace(
        table,
        contexts=tuple(contexts),
        control_mean=np.concatenate([table.control_mean, control_mean])[order],
        control_count=np.concatenate([table.control_count, control_count])[order],
        shift=extended(table.shift, np.nan),
        count=extended(table.count, 0),
    )
    return Evidence(grown, extended(evidence.noise, np.nan))


def _groups(table: ShiftTable) -> Iterator[tuple[str, Condition, Array]]:
    for row, column in np.argwhere(table.is_observed):
        yield table.contexts[row], table.conditions[column], table.shift[row, column]


def _rule(name: str, many: bool, total: Array, n_folds: int) -> AnchorRule:
    cross, own, truth, n = total
    scale = float(np.clip(cross / own, 0, _MAX_SCALE)) if own > 0 else 0.0
    error = 1 - (2 * scale * cross - scale**2 * own) / truth if truth > 0 else 1.0
    return AnchorRule(name, many, scale, float(error), int(n) // n_folds)
