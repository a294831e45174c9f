"""Where the flows of a cascaded flow start: what simple predictions expect of every condition in every context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scvi import settings
from sklearn.decomposition import PCA

from cellweave.data import GroupStarts, Screen, as_dense, row_source
from cellweave.flow import expected_transport
from cellweave.module import AnchorTable
from cellweave.stats import ANCHORS, AnchorRule, Evidence, ShiftTable, choose_anchors, expected_shift, with_contexts

__all__ = ["AnchorMixin", "Means", "anchor_table", "study_anchors"]

# Simple predictions are compared in this many principal components of at most this many training cells.
_N_COMPONENTS, _PCA_CELLS = 50, 4096

# Shifts of expression and of detection rates.
Means = tuple[Evidence, Evidence]


class AnchorMixin:
    """Means of the training cells, and the start of the flow of any condition."""

    @property
    def anchor_rules(self) -> pd.DataFrame:
        """Where flows start: simple predictions by the order in which they are used, and how they did.

        Columns are those of :class:`~cellweave.stats.AnchorRule`. The first row applies that is for the kind of a condition and
        has what it needs; an ``error`` below 1 means nearer to held-out groups than no change.
        """
        return pd.DataFrame([rule.to_dict() for rule in self._anchor_rules])

    @property
    def _anchor_rules(self) -> list[AnchorRule]:
        return [AnchorRule.from_dict(rule) for rule in self._facts["anchors"]]

    def _remember(self, means: Means) -> None:
        """Keep the means of the training cells with the weights."""
        (expression, detection), observed = means, np.nonzero(means[0].table.is_observed)
        kept = {
            "control_mean": np.nan_to_num(expression.table.control_mean),
            "control_detection": np.nan_to_num(detection.table.control_mean),
            "control_count": expression.table.control_count,
            "shift": expression.table.shift[observed],
            "detection_shift": detection.table.shift[observed],
            "variance": expression.variance[observed],
            "detection_variance": detection.variance[observed],
            "control_variance": np.nan_to_num(expression.control_variance),
            "detection_control_variance": np.nan_to_num(detection.control_variance),
            "count": expression.table.count[observed],
            "context": observed[0],
            "condition": observed[1],
        }
        for name, values in kept.items():
            buffer = getattr(self.module.anchors, name)
            buffer.copy_(torch.from_numpy(np.asarray(values)).to(buffer.dtype))

    def _trained_contexts(self, condition: tuple[str, ...]) -> set[str]:
        """Contexts in which the flow was trained on a condition."""
        kept, facts = self.module.anchors, self._facts
        known = [tuple(parts) for parts in facts["conditions"]]
        if condition not in known:
            return set()
        rows = kept.context[kept.trained & (kept.condition == known.index(condition))]
        return {facts["contexts"][row] for row in rows.tolist()}

    def _means(self) -> Means:
        """Means of the training cells."""
        facts, kept = self._facts, {name: b.cpu().numpy() for name, b in self.module.anchors.named_buffers()}
        contexts, genes = tuple(facts["contexts"]), tuple(facts["genes"])
        conditions = tuple(tuple(condition) for condition in facts["conditions"])
        place, shape = (kept["context"], kept["condition"]), (len(contexts), len(conditions))
        count = np.zeros(shape, dtype=np.int64)
        count[place] = kept["count"]
        n_control = kept["control_count"]

        def evidence(mean: str, change: str, prefix: str) -> Evidence:
            shift, variance = np.full((*shape, len(genes)), np.nan), np.full((*shape, len(genes)), np.nan)
            shift[place], variance[place] = kept[change], kept[f"{prefix}variance"]
            control = np.where(n_control[:, None] > 0, kept[mean].astype(np.float64), np.nan)
            table = ShiftTable(contexts, conditions, control, n_control, shift, count, genes)
            return Evidence(table, variance, kept[f"{prefix}control_variance"].astype(np.float64))

        return (
            evidence("control_mean", "shift", ""),
            evidence("control_detection", "detection_shift", "detection_"),
        )

    def _group_starts(self, screen: Screen) -> GroupStarts | None:
        """Where the flow of every group of ``screen`` starts; None from noise."""
        if self.module.start == "noise":
            return None
        n_contexts = len(screen.contexts)
        groups = np.unique(screen.treatment * n_contexts + screen.context)
        row = np.zeros(len(screen.treatments) * n_contexts, dtype=np.int64)
        row[groups] = np.arange(len(groups))
        pairs = [(screen.contexts[g % n_contexts], screen.treatments[g // n_contexts][0]) for g in groups.tolist()]
        return GroupStarts(*self._starts(self._means(), pairs), row)

    def _starts(
        self, means: Means, pairs: Sequence[tuple[str, tuple[str, ...]]]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Expected transport of conditions in contexts ``(pair, 4, gene)``, and what the flow reads ``(pair, 2, gene)``."""
        rules = self._anchor_rules
        rows = [means[0].table.row(context) for context, _ in pairs]
        new = sorted({context for (context, _), row in zip(pairs, rows, strict=True) if row < 0})
        if new:
            raise ValueError(
                f"The data have {len(new)} context(s) of `pairing_keys` that the model was not made for (first: {new[0]!r}); make a "
                "new model from them, or leave these cells out."
            )
        shifts = [np.array([expected_shift(m, *pair, rules) for pair in pairs]) for m in means]
        mean, detection = (np.nan_to_num(m.table.control_mean[rows]) for m in means)
        n_cells = torch.from_numpy(means[0].table.control_count[rows])
        m0, f0, m1, f1 = (torch.from_numpy(a).double() for a in (mean, detection, *shifts))
        transport = torch.stack(expected_transport(m0, f0, m1, f1, n_cells), dim=1).float().numpy()
        return transport, np.stack([mean, shifts[0]], axis=1).astype(np.float32)

    def _means_with(self, contexts: tuple[str, ...], context: NDArray[np.int64], x: NDArray[np.float32]) -> Means:
        """Means of the training cells, and of control cells ``x`` where a context has none in them."""
        means = self._means()
        known = len(means[0].table.contexts)
        new = [context == i for i in range(known, len(contexts))]
        if not new:
            return means
        counts = np.array([part.sum() for part in new])
        expression, detection = (
            with_contexts(m, contexts, np.array([values[part].mean(0, dtype=np.float64) for part in new]), counts)
            for m, values in zip(means, (x, x > 0), strict=True)
        )
        return expression, detection


def anchor_table(facts: Mapping[str, Any]) -> AnchorTable:
    """Empty table of the size of the training cells."""
    return AnchorTable(len(facts["contexts"]), facts["n_observed"], len(facts["genes"]))


def study_anchors(
    anchor: str | None, x: Any, screen: Screen, rows: NDArray[np.int64], genes: Sequence[str]
) -> tuple[list[AnchorRule], Means]:
    """Rules of the anchor, chosen by cross-validation or named, and the means of the training cells."""
    if anchor not in (None, "auto", *ANCHORS):
        raise ValueError(
            f"`anchor` must be 'auto', None or one of {', '.join(ANCHORS)}, got {anchor!r}; choose one of them."
        )
    means = (_evidence(x, screen, rows, genes, is_rate=False), _evidence(x, screen, rows, genes, is_rate=True))
    if anchor is None:
        return [], means
    if anchor != "auto":
        return [AnchorRule(anchor)], means
    return choose_anchors(means[0], _axes(x, rows)), means


def _axes(x: Any, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """First principal components of training cells ``(gene, component)``."""
    rng = np.random.default_rng(settings.seed or 0)
    used = np.sort(rows if len(rows) <= _PCA_CELLS else rng.choice(rows, _PCA_CELLS, replace=False))
    cells = as_dense(row_source(x).take(used))
    n_components = min(_N_COMPONENTS, *(size - 1 for size in cells.shape))
    if n_components < 1:
        return np.eye(cells.shape[1])
    return PCA(n_components, random_state=0).fit(cells).components_.T.astype(np.float64)


def _evidence(x: Any, screen: Screen, rows: NDArray[np.int64], genes: Sequence[str], is_rate: bool) -> Evidence:
    """Means, or detection rates, of the training cells; contexts in the order of the screen."""
    used = np.sort(rows)
    values: Any = row_source(x).take(used)
    if is_rate:
        values = (values > 0).astype(np.float32)
    conditions, contexts = screen.conditions, screen.contexts
    evidence = Evidence.from_cells(
        values,
        [conditions[i] for i in screen.treatment[used].tolist()],
        [contexts[i] for i in screen.context[used].tolist()],
        genes,
    )
    return with_contexts(evidence, contexts)
