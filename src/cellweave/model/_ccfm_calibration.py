"""How far a trained flow is to be trusted beyond where it started, as cells that it did not see say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from anndata import AnnData
from numpy.typing import NDArray
from scvi import settings

from cellweave.data import Screen

__all__ = ["CalibrationMixin", "Trust", "held_out_groups"]

# With fewer groups none can be spared; of more, this share is held out, within these numbers.
_LEAST_GROUPS, _SHARE, _LEAST_HELD_OUT, _MOST_HELD_OUT = 6, 0.15, 2, 12
# Cells and genes by which a group is judged, and groups of a kind.
_CELLS, _GENES, _GROUPS = 32, 500, 8


class Trust(NamedTuple):
    """Share of the way from the start of the flow to its end that predictions go."""

    seen: float  # for conditions in contexts in which they were trained
    unseen: float  # for others


def held_out_groups(screen: Screen, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Groups (condition and context) that training leaves out to see what the flow is worth for such.

    Parameters
    ----------
    screen
        The screen.
    rows
        Cells that may be learned from.
    """
    group = (screen.treatment * len(screen.contexts) + screen.context)[rows]
    groups = np.unique(group[screen.treatment[rows] > 0])
    if len(groups) < _LEAST_GROUPS:
        return np.zeros(0, dtype=np.int64)
    n_held = int(np.clip(round(_SHARE * len(groups)), _LEAST_HELD_OUT, _MOST_HELD_OUT))
    return np.sort(np.random.default_rng([settings.seed or 0, 1]).permutation(groups)[:n_held])


class CalibrationMixin:
    """Calibration of a trained flow."""

    @property
    def trust(self) -> Trust:
        """Share of the way from the start of the flow to its end that predictions go.

        With ``start="control"`` an untrained flow gives the simple prediction it starts from. What training adds helps where
        it learned something general and hurts where it memorised the training groups, so each of the two numbers is the
        share of it, between 0 and 1, that brings the means of held-out cells closest: cells of conditions in contexts in which
        they were trained, and groups of cells that were left out of training altogether. What could not be checked for
        unseen groups, for lack of groups, is not trusted (0). Both are 1 with ``start="noise"``, before training, and after
        training with ``calibrate=False``.
        """
        return Trust(*self.module.anchors.trust.tolist())

    def _calibrate(self, held_out: NDArray[np.int64]) -> None:
        """Measure both shares on cells that training did not see."""
        if self.module.start != "control" or self.adata is None:
            return
        screen, kept = self._screen(), self.module.anchors
        n_contexts = len(screen.contexts)
        group = screen.treatment * n_contexts + screen.context
        left_out = {(screen.conditions[g // n_contexts], screen.contexts[g % n_contexts]) for g in held_out.tolist()}
        conditions = [tuple(parts) for parts in self._facts["conditions"]]
        pairs = zip(kept.condition.tolist(), kept.context.tolist(), strict=True)
        trained = [(conditions[i], self._facts["contexts"][j]) not in left_out for i, j in pairs]
        kept.trained.copy_(torch.tensor(trained))
        cells = self.validation_indices
        cells = cells[~screen.is_control[cells]]
        is_left_out = np.isin(group[cells], held_out)
        seen = self._share(screen, group, cells[~is_left_out])
        unseen = self._share(screen, group, cells[is_left_out])
        # without held-out cells of a seen group there is nothing to say against what was learned of it
        self.module.anchors.trust.copy_(
            torch.tensor([1.0 if seen is None else seen, 0.0 if unseen is None else unseen])
        )

    def _share(self, screen: Screen, group: NDArray[np.int64], cells: NDArray[np.int64]) -> float | None:
        """Share of the move of the flow that brings the means of held-out cells closest; None without cells."""
        data, n_contexts = self.adata, len(screen.contexts)
        kept, sums = self._judged_genes(), []
        rng = np.random.default_rng([settings.seed or 0, 2])
        known = np.union1d(self.train_indices, self.validation_indices)
        groups, sizes = np.unique(group[cells], return_counts=True)
        for code in groups[np.argsort(-sizes, kind="stable")][:_GROUPS].tolist():
            treatment, context = divmod(code, n_contexts)
            controls = known[screen.is_control[known] & (screen.context[known] == context)]
            drawn = self._cells(data, np.sort(rng.choice(controls, min(_CELLS, len(controls)), replace=False)))
            ends = self._ends(data, drawn, screen.treatments[treatment][0], kept)
            truth = self._cells(data, cells[group[cells] == code]).x[:, kept].mean(0)
            move, wanted = (ends[1] - ends[0]).mean(0), truth - ends[0].mean(0)
            n = float((group[cells] == code).sum())
            weight = n / (n + len(drawn.rows))
            sums.append([weight * float(move @ wanted), weight * float(move @ move)])
        return _cautious(np.array(sums)) if sums else None

    def _judged_genes(self) -> NDArray[np.int64]:
        """The genes that perturbations move most in the training cells."""
        shift = self.module.anchors.shift.cpu().numpy()
        return np.sort(np.argsort(-np.square(shift).sum(0), kind="stable")[:_GENES])

    def _ends(
        self, data: AnnData, cells: object, parts: Sequence[str], kept: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Start and end of the flow of control cells under a condition ``(cell, gene)``."""
        how = self._solver("midpoint", 5, 1.0)
        at_start, at_end = (
            self._predicted(data, cells, [tuple(parts)], how, 0, None, kept, None, False, trust)[0]
            for trust in (0.0, 1.0)
        )
        return at_start, at_end


def _cautious(sums: NDArray[np.float64]) -> float:
    """Share of least squared error of the products ``(group, 2)`` of move with wanted and with itself, less its error."""

    def best(total: NDArray[np.float64]) -> float:
        return float(np.clip(total[0] / total[1], 0, 1)) if total[1] > 0 else 0.0

    n = len(sums)
    if n < 2:  # a single group says nothing of others
        return 0.0
    without = np.array([best(sums.sum(0) - own) for own in sums])
    error = np.sqrt((n - 1) / n * np.square(without - without.mean()).sum())
    return max(best(sums.sum(0)) - float(error), 0.0)
