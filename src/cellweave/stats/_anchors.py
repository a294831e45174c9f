"""What to expect of a perturbation before a model is trained, as far as held-out training cells support it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ._shifts import SHIFT_PREDICTORS, Condition, ShiftTable, group_means
from ._shrinkage import SHRINKERS, shrink_effects, shrinkage_risk

__all__ = [
    "ANCHORS",
    "AnchorRule",
    "Evidence",
    "choose_anchors",
    "condition_kind",
    "context_response",
    "expected_shift",
    "similar_contexts",
    "with_contexts",
]

Array = NDArray[np.float64]

# Predictions are made smaller where held-out groups say so, but never larger.
_MAX_SCALE = 1.0
# Groups of fewer cells say too little to choose by.
_LEAST_CELLS = 15
# More groups say little more, and a linear map of more conditions takes too long to be fitted once for each of them.
_MOST_GROUPS, _MANY = 300, 300
# Standard errors by which a factor must differ from one.
_N_ERRORS = 2
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
    variance
        Sampling variances of the means of perturbed cells ``(context, condition, gene)``; NaN where not observed.
    control_variance
        Those of the means of control cells ``(context, gene)``.
    """

    table: ShiftTable
    variance: Array
    control_variance: Array

    @classmethod
    def from_cells(cls, x: Any, conditions: Sequence[Condition], contexts: Sequence[str], genes: Sequence[str]) -> Self:
        """Evidence of measured cells; arguments as in :meth:`ShiftTable.from_cells`."""
        table = ShiftTable.from_cells(x, conditions, contexts, genes)
        columns = {condition: i + 1 for i, condition in enumerate(table.conditions)}
        rows = {name: i for i, name in enumerate(table.contexts)}
        shape = (len(rows), len(columns) + 1)
        pairs = zip(contexts, conditions, strict=True)
        codes = np.array([rows[str(c)] * shape[1] + columns.get(k, 0) for c, k in pairs])
        squares = x.multiply(x).tocsr() if hasattr(x, "multiply") else np.square(np.asarray(x, dtype=np.float64))
        second, count = group_means(squares, codes, shape[0] * shape[1])
        second, count = second.reshape(*shape, -1), count.reshape(shape)[..., None]
        control = table.control_mean[:, None]
        means = np.concatenate([control, control + table.shift], axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            spread = np.where(count > 1, np.maximum(second - means**2, 0) * count / (count - 1), np.nan)
            # a single cell says nothing of its own spread: that of the control cells stands in, or that of all groups
            spread = np.where(np.isnan(spread), spread[:, :1], spread)
            spread = np.where(np.isnan(spread), _mean_over_groups(spread), spread)
            variance = np.where(count > 0, spread / count, np.nan)
        return cls(table, variance[:, 1:], variance[:, 0])

    @property
    def noise(self) -> Array:
        """Sampling variance of every shift, summed over genes ``(context, condition)``."""
        return (self.variance + self.control_variance[:, None]).sum(2)

    def without(self, context: str, condition: Condition) -> Evidence:
        """The evidence as if one condition had not been measured in one context."""
        row, column = self.table.row(context), self.table.column(condition)
        if row < 0 or column < 0 or not self.table.is_observed[row, column]:
            return self
        # no cells, no shift: the shifts themselves, which may take gigabytes, are not copied
        count = self.table.count.copy()
        count[row, column] = 0
        return replace(self, table=replace(self.table, count=count))

    def shrunken(self, how: str) -> Evidence:
        """The evidence with the effects of single perturbations shrunken, each by itself; see :func:`shrink_effects`."""
        if how == "none":
            return self
        if how not in self._shrunken:
            self._shrunken[how] = self._shrink(how)
        return self._shrunken[how]

    @cached_property
    def _shrunken(self) -> dict[str, Evidence]:
        return {}

    def _shrink(self, how: str) -> Evidence:
        shift = self.table.shift.copy()
        for row, column in self._singles():
            variance = self.variance[row, column] + self.control_variance[row]
            shift[row, column] = shrink_effects(shift[row, column], variance, how)
        return replace(self, table=replace(self.table, shift=shift))

    def best_shrinkage(self) -> str:
        """How single perturbations are best shrunken, by the unbiased risk of all of them."""
        risk = dict.fromkeys(SHRINKERS, 0.0)
        for row, column in self._singles():
            chance = self.variance[row, column]
            variance = chance + self.control_variance[row]
            for how in SHRINKERS:
                risk[how] += shrinkage_risk(self.table.shift[row, column], variance, chance, how)
        return min(risk, key=lambda how: risk[how])

    def _singles(self) -> list[tuple[int, int]]:
        where = np.argwhere(self.table.is_observed & (self.table.n_parts == 1) & (self.table.count > 1))
        return [(int(row), int(column)) for row, column in where]


def _mean_over_groups(spread: Array) -> Array:
    """Mean spread of the groups that have one ``(gene,)``; 0 without any."""
    known = ~np.isnan(spread)
    return np.where(known, spread, 0).sum((0, 1)) / np.maximum(known.sum((0, 1)), 1)


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
    # profiles that are the same for all genes correlate with nothing, and are all alike
    centred = table.control_mean[[row, *others]]
    centred = centred - centred.mean(1, keepdims=True)
    length = np.linalg.norm(centred, axis=1)
    length = np.where(length > 0, length, 1)
    likeness = (centred[1:] @ centred[0]) / (length[1:] * length[0])
    weights = np.exp((likeness - likeness.max()) / width)
    return weights / weights.sum()


def similar_contexts(evidence: Evidence, context: str, condition: Condition) -> Array | None:
    """Average effect of a condition in the other contexts, of which those with similar control cells count most.

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
    table = evidence.table
    row, column = table.row(context), table.column(condition)
    if row < 0 or column < 0 or not table.control_count[row]:
        return None
    others = np.flatnonzero(table.is_observed[:, column])
    others = others[others != row]
    return _similar(table, row, others, _SOURCE_WIDTH) @ table.shift[others, column] if len(others) else None


def _simple(name: str) -> Any:
    return lambda evidence, context, condition: SHIFT_PREDICTORS[name](evidence.table, context, condition)


# Expectations by name; "observed" is missing, since it is what a model is trained to find.
ANCHORS: Mapping[str, Any] = {
    "context_response": context_response,
    "similar_contexts": similar_contexts,
    **{name: _simple(name) for name in SHIFT_PREDICTORS if name not in ("observed", "no_change")},
}
# These are tried by cross-validation; the others are variants of them that are rarely better.
_CANDIDATES = ("context_response", "similar_contexts", "perturbed_mean", "additive", "gene_linear")


@dataclass(frozen=True)
class AnchorRule:
    """A simple prediction, how much of it to believe, and how it did.

    Attributes
    ----------
    name
        Name in ``ANCHORS``.
    kind
        What it is for: ``"single"`` perturbations; combinations of which the ``"none"``, ``"some"`` or ``"all"`` of the parts were
        measured alone; any ``"combination"``; or ``"any"`` condition.
    scale
        Factor on what it predicts, in [0, 1].
    error
        Squared error of the scaled prediction for held-out groups, as a share of that of predicting no change; NaN where
        there were none to try it on.
    n_groups
        Groups of cells it was tried on.
    shrinkage
        How the effects of single perturbations are shrunken before, a name in ``SHRINKERS``.
    """

    name: str
    kind: str = "any"
    scale: float = 1.0
    error: float = float("nan")
    n_groups: int = 0
    shrinkage: str = "none"

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return dict(vars(self))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The rule that :meth:`to_dict` wrote."""
        return cls(**values)


def condition_kind(table: ShiftTable, condition: Condition) -> str:
    """``"single"``, or how many parts of a combination were measured alone: ``"none"``, ``"some"`` or ``"all"``."""
    if len(condition) < 2:
        return "single"
    measured = np.flatnonzero(table.is_observed.any(axis=0) & (table.n_parts == 1))
    alone = {table.conditions[i][0] for i in measured}
    n_seen = len(alone.intersection(condition))
    return "none" if n_seen == 0 else "all" if n_seen == len(condition) else "some"


def choose_anchors(evidence: Evidence, axes: Array | None = None) -> list[AnchorRule]:
    """Try simple predictions on every training group, each time without that group; the best comes first.

    What counts is how near the predicted cells come to the measured ones, and these are the control cells plus the predicted
    shift. So the chance error of the control cells is part of what is to be predicted, and it is right that a prediction gains
    by it; no correlation of effects may be read from these errors. A prediction is scaled where the best factor differs
    from one by more than twice its standard error (jackknife over groups): chance errors of the sources pull it below one.

    Parameters
    ----------
    evidence
        Shifts of training cells.
    axes
        Directions in which errors count, such as principal components of the training cells ``(gene, component)``; all
        genes by default.

    Returns
    -------
    Rules, the best first; those that could not be tried last.
    """
    shrinkage = evidence.best_shrinkage()
    shrunken = evidence.shrunken(shrinkage)
    tried: dict[tuple[str, str], list[Array]] = {}
    enough = evidence.table.is_observed & (evidence.table.count >= _LEAST_CELLS)
    enough &= (evidence.table.control_count >= _LEAST_CELLS)[:, None]
    groups = np.argwhere(enough)
    if len(groups) > _MOST_GROUPS:
        groups = groups[np.random.default_rng(0).permutation(len(groups))[:_MOST_GROUPS]]
    candidates = [name for name in _CANDIDATES if name != "gene_linear" or len(evidence.table.conditions) <= _MANY]
    for row, column in groups:
        context, condition = evidence.table.contexts[row], evidence.table.conditions[column]
        truth = _along(evidence.table.shift[row, column], axes)
        rest, small = (e.without(context, condition) for e in (evidence, shrunken))
        kind = condition_kind(rest.table, condition)
        for name in candidates:
            shift = ANCHORS[name](small if name == "additive" else rest, context, condition)
            if shift is not None:
                guess, n = _along(shift, axes), evidence.table.count[row, column]
                sums = n * np.array([guess @ truth, guess @ guess, truth @ truth])
                for group in {kind, "single" if kind == "single" else "combination"}:
                    tried.setdefault((name, group), []).append(sums)
    rules = [_rule(name, kind, np.array(sums), shrinkage) for (name, kind), sums in tried.items()]
    known = {rule.name for rule in rules}
    untried = [AnchorRule(name) for name in ("context_response", "similar_contexts") if name not in known]
    return [*sorted(rules, key=lambda rule: rule.error), *untried]


def expected_shift(evidence: Evidence, context: str, condition: Condition, rules: Sequence[AnchorRule]) -> Array:
    """Shift of a condition in a context that the best applicable rule predicts without having seen it ``(gene,)``.

    Rules for the kind of the condition come first. Without any, a combination whose parts were all measured is their sum, and
    others follow the rules for combinations. A response that could not be tried for lack of contexts, but has two to learn
    from, comes before all: it weighs its own evidence.

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
    for rule in _ordered(rest.table, condition, rules) if condition else ():
        # shrunken once for all conditions, and then without this one
        source = evidence.shrunken(rule.shrinkage).without(context, condition) if rule.name == "additive" else rest
        shift = ANCHORS[rule.name](source, context, condition)
        if shift is not None:
            return rule.scale * shift
    return np.zeros(len(evidence.table.genes))


def _ordered(table: ShiftTable, condition: Condition, rules: Sequence[AnchorRule]) -> list[AnchorRule]:
    kind = condition_kind(table, condition)
    own = [rule for rule in rules if rule.kind in (kind, "any")]
    untried = [rule for rule in own if rule.kind == "any"]
    tried = [rule for rule in own if rule.kind != "any"]
    if kind != "single" and not tried and rules:
        more = [rule for rule in rules if rule.kind == "combination"]
        tried = (
            [AnchorRule("additive", shrinkage=more[0].shrinkage if more else "none"), *more] if kind == "all" else more
        )
    return [*untried, *tried]


def _along(shift: Array, axes: Array | None) -> Array:
    return shift if axes is None else shift @ axes


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
    return Evidence(grown, extended(evidence.variance, np.nan), extended(evidence.control_variance, np.nan))


def _rule(name: str, kind: str, sums: Array, shrinkage: str) -> AnchorRule:
    """Rule of the scaled sums ``(group, 3)`` of products of prediction and truth."""
    cross, own, truth = sums.sum(0)
    scale = _scale(cross, own)
    others = sums.sum(0) - sums
    spread = np.array([_scale(c, o) for c, o, _ in others])
    n = len(sums)
    error = np.sqrt((n - 1) / n * np.square(spread - spread.mean()).sum()) if n > 1 else np.inf
    if abs(scale - 1) <= _N_ERRORS * error:
        scale = 1.0
    left = 1 - (2 * scale * cross - scale**2 * own) / truth if truth > 0 else 1.0
    return AnchorRule(name, kind, scale, float(left), n, shrinkage)


def _scale(cross: float, own: float) -> float:
    return float(np.clip(cross / own, 0, _MAX_SCALE)) if own > 0 else 0.0
