"""What is scored: predicted cells, simple predictions, and one half of the measured cells."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scvi import settings as scvi_settings

from cellweave.stats import Predictor, group_means

from ._perturbation_inputs import Cells
from ._perturbation_metrics import mean_test, n_significant
from ._perturbation_screen import Screen, halve, rows_of

__all__ = ["Baseline", "Method", "PredictedCells", "Replicate"]

Array = NDArray[np.float64]
Block = NDArray[np.float32]


class Method(ABC):
    """Something that is scored on the groups of a screen.

    Parameters
    ----------
    name
        What the table calls it.
    screen
        What it is compared with.
    """

    def __init__(self, name: str, screen: Screen) -> None:
        self.name, self.screen = name, screen
        self.applies: NDArray[np.bool_] = np.ones(len(screen.groups), dtype=bool)

    @abstractmethod
    def means(self, split: int) -> tuple[Array, Array]:
        """Predicted and true means ``(group, gene)``."""

    @abstractmethod
    def shifts(self, split: int) -> tuple[Array, Array]:
        """Predicted and true shifts against the control cells of the split ``(group, gene)``."""

    @abstractmethod
    def populations(self, group: int) -> list[tuple[Block, Block]]:
        """Predicted and measured cells ``(cell, gene)``, several times where they are drawn at random."""

    @abstractmethod
    def half_populations(self, group: int) -> tuple[Block, Block]:
        """The same once, the predicted cells resting on the first half of the control cells of the first split."""

    @abstractmethod
    def test(self, group: int) -> tuple[Array, int]:
        """Scores by which genes are called changed, against the first half of the first split, and number of DE genes.

        The number counts against all control cells, with as many predicted cells as there are measured ones.
        """

    def true_scores(self, split: int) -> Array:
        """The same scores of the measured cells, against the other half of a split ``(group, gene)``."""
        return self.screen.truth_scores[split]


class PredictedCells(Method):
    """Cells that a model predicts.

    Where cells name the control cell they were made from, shifts are those of the cells made from the first half of the
    control cells against these control cells, so that nothing of the other half is in them. Otherwise the mean of the
    first half is subtracted from the mean of all predicted cells.
    """

    def __init__(self, name: str, screen: Screen, cells: Cells) -> None:
        super().__init__(name, screen)
        self.cells = cells
        self.code = screen.groups.get_indexer(cells.groups)
        self.rows = rows_of(self.code, len(screen.groups))
        self.mean, _ = group_means(cells.x, self.code, len(screen.groups))
        self.source = _sources(cells, screen.control, name) if screen.settings.split_control else None

    def means(self, split: int) -> tuple[Array, Array]:
        return self.mean, self.screen.truth_mean

    def shifts(self, split: int) -> tuple[Array, Array]:
        screen = self.screen
        first, second = screen.half_means[split]
        true = screen.truth_mean - second[screen.context]
        if self.source is None:
            return self.mean - first[screen.context], true
        used = np.flatnonzero(screen.control_in_first[split, self.source] & (self.code >= 0))
        code, source = self.code[used], self.source[used]
        made, _ = group_means(self.cells.x[used], code, len(screen.groups))
        # paired: the mean of the very control cells that these cells were made from
        origin, _ = group_means(screen.control.x[source], code, len(screen.groups))
        return made - origin, true

    def populations(self, group: int) -> list[tuple[Block, Block]]:
        rows = self.screen.draw(self.rows[group], self.screen.settings.max_cells, 10, group)
        return [(self.cells.dense(rows), self.screen.truth_cells(group))]

    def half_populations(self, group: int) -> tuple[Block, Block]:
        rows = self.screen.draw(self._half(group), self.screen.settings.max_cells, 10, group)
        return self.cells.dense(rows), self.screen.truth_cells(group)

    def test(self, group: int) -> tuple[Array, int]:
        screen, context, n_true = self.screen, self.screen.context[group], int(self.screen.n_true[group])
        z, p = screen.rank(self.cells, screen.draw(self.rows[group], n_true, 11, group), screen.control_rows[context])
        if screen.settings.split_control:
            half = screen.rows_of_half(context, 0, second=False)
            z, _ = screen.rank(self.cells, screen.draw(self._half(group), n_true, 11, group), half)
        return z, n_significant(p)

    def _half(self, group: int) -> NDArray[np.intp]:
        """Cells of a group that were made from the first half, or all where that is not known."""
        rows = self.rows[group]
        return rows if self.source is None else rows[self.screen.control_in_first[0, self.source[rows]]]


class Baseline(Method):
    """Control cells, shifted by what the training cells say: ``max(control + shift, 0)``.

    A shift of the mean says nothing about single cells, and moves every zero. Genes are therefore ranked by the shift in
    units of the spread of the control cells, instead of by a rank test of shifted cells.
    """

    def __init__(self, name: str, screen: Screen, shifts: list[Array]) -> None:
        super().__init__(name, screen)
        # with all control cells, and with the first half of every split
        self.shift, *halves = shifts
        self.split_shifts = halves or [self.shift] * screen.settings.n_splits
        self.applies = np.isfinite(self.shift[:, 0])

    @classmethod
    def fit(cls, predictors: Mapping[str, Predictor], screen: Screen, min_cells: int) -> list[Baseline]:
        """One of every predictor that applies to any group."""
        pairs = list(zip(_shift_contexts(screen), screen.conditions, strict=True))
        nothing = np.full(len(screen.truth.genes), np.nan)
        shifts: dict[str, list[Array]] = {name: [] for name in predictors}
        for table in screen.shift_tables(min_cells):
            for name, predict in predictors.items():
                found = (predict(table, context, condition) for context, condition in pairs)
                shifts[name].append(np.stack([nothing if shift is None else shift for shift in found]))
        fitted = [cls(name, screen, found) for name, found in shifts.items()]
        return [baseline for baseline in fitted if baseline.applies.any()]

    def means(self, split: int) -> tuple[Array, Array]:
        screen = self.screen
        return screen.control_mean[screen.context] + self.shift, screen.truth_mean

    def shifts(self, split: int) -> tuple[Array, Array]:
        screen = self.screen
        return self.split_shifts[split], screen.truth_mean - screen.half_means[split][1][screen.context]

    def populations(self, group: int) -> list[tuple[Block, Block]]:
        moved = _moved(self.screen.control_cells(group), self.shift[group])
        return [(moved, self.screen.truth_cells(group))]

    def half_populations(self, group: int) -> tuple[Block, Block]:
        screen = self.screen
        rows = screen.draw(screen.rows_of_half(screen.context[group], 0, False), screen.settings.max_cells, 3, group)
        return _moved(screen.control.dense(rows), self.split_shifts[0][group]), screen.truth_cells(group)

    def test(self, group: int) -> tuple[Array, int]:
        screen, context = self.screen, self.screen.context[group]
        spread, n_control = screen.control_std[context], len(screen.control_rows[context])
        n_true = int(screen.n_true[group])
        score, _ = mean_test(self.split_shifts[0][group], spread, n_true, n_control)
        return score, n_significant(mean_test(self.shift[group], spread, n_true, n_control)[1])


class Replicate(Method):
    """One random half of the measured cells predicts the other half: what a repeat of the experiment would reach.

    Both halves have half of the cells only. A predictor that rests on more cells can be better.
    """

    def __init__(self, screen: Screen) -> None:
        super().__init__("replicate", screen)
        n, generator = len(screen.groups), screen.settings.generator
        self.in_first = np.stack([halve(screen.truth_code, generator(9, i)) for i in range(screen.settings.n_splits)])
        offset = np.where(screen.truth_code < 0, -2 * n, screen.truth_code)
        halves = [group_means(screen.truth.x, offset + n * ~first, 2 * n)[0] for first in self.in_first]
        self.halves = [(means[:n], means[n:]) for means in halves]
        self.applies = screen.n_true >= 2

    def means(self, split: int) -> tuple[Array, Array]:
        return self.halves[split]

    def shifts(self, split: int) -> tuple[Array, Array]:
        pairs = zip(self.halves[split], self.screen.half_means[split], strict=True)
        predicted, true = (mean - control[self.screen.context] for mean, control in pairs)
        return predicted, true

    def populations(self, group: int) -> list[tuple[Block, Block]]:
        return [
            (self._cells(group, split, False), self._cells(group, split, True)) for split in range(len(self.halves))
        ]

    def half_populations(self, group: int) -> tuple[Block, Block]:
        return self._cells(group, 0, False), self._cells(group, 0, True)

    def test(self, group: int) -> tuple[Array, int]:
        screen, rows = self.screen, self._rows(group, 0, second=False)
        _, p = screen.rank(screen.truth, rows, screen.control_rows[screen.context[group]])
        return self._score(group, 0, second=False), n_significant(p)

    def true_scores(self, split: int) -> Array:
        if not self.screen.settings.split_control:
            return self.screen.truth_scores[split]
        return np.stack([self._score(group, split, second=True) for group in range(len(self.screen.groups))])

    def _rows(self, group: int, split: int, second: bool) -> NDArray[np.intp]:
        rows = self.screen.truth_rows[group]
        return rows[self.in_first[split, rows] != second]

    def _cells(self, group: int, split: int, second: bool) -> Block:
        screen = self.screen
        drawn = screen.draw(self._rows(group, split, second), screen.settings.max_cells, 13, group, split, second)
        return screen.truth.dense(drawn)

    def _score(self, group: int, split: int, second: bool) -> Array:
        screen = self.screen
        control = screen.rows_of_half(screen.context[group], split, second)
        return screen.rank(screen.truth, self._rows(group, split, second), control)[0]


def _moved(cells: Block, shift: Array) -> Block:
    return np.maximum(cells + shift, 0).astype(np.float32)


def _shift_contexts(screen: Screen) -> list[str]:
    """Context of every group over which shifts are carried."""
    obs = screen.control.obs
    coarse = obs.drop_duplicates("context").set_index("context")["shift_context"]
    return coarse.loc[screen.groups.get_level_values("context")].tolist()


def _sources(cells: Cells, control: Cells, name: str) -> NDArray[np.intp] | None:
    """Position of the control cell that every predicted cell was made from; None, with a warning, if it is not known."""
    sources = cells.obs["source"]
    if sources.isna().all():
        reason = "does not name the control cells it was made from in `obs['source_cell']`"
    elif not control.obs.index.is_unique:
        reason = "names control cells in `obs['source_cell']`, but the names of the control cells are not unique"
    else:
        position = pd.Index(control.obs.index).get_indexer(sources)
        if (position >= 0).all():
            return position
        lost = int((position < 0).sum())
        reason = f"has {lost} cell(s) whose `obs['source_cell']` is no control cell (first: {sources[position < 0].iloc[0]!r})"
    warnings.warn(
        f"The prediction {name!r} {reason}; its shifts are taken from all predicted cells, so control cells that also "
        "define the true shifts may be in them.",
        UserWarning,
        stacklevel=scvi_settings.warnings_stacklevel,
    )
    return None
