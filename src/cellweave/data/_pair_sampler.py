"""Which perturbed cells and which control cells meet in a training step, as a pure function of a seed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray
from torch.utils.data import DistributedSampler

__all__ = ["CellPairs", "PairSampler"]


class CellPairs(NamedTuple):
    """Perturbed cells of a step and the control cells beside them."""

    rows: NDArray[np.int64]  # (cell,): positions of the perturbed cells
    controls: NDArray[np.int64]  # (cell,): positions of the control cells
    group: NDArray[np.int64]  # (cell,): group of the perturbed cells


class _Members(NamedTuple):
    """Cells sorted by a code."""

    rows: NDArray[np.int64]
    start: NDArray[np.int64]  # (code,)
    size: NDArray[np.int64]  # (code,)

    @classmethod
    def of(cls, rows: NDArray[np.int64], codes: NDArray[np.int64], n_codes: int) -> _Members:
        size = np.bincount(codes, minlength=n_codes)
        return cls(rows[np.argsort(codes, kind="stable")], np.cumsum(size) - size, size)

    def draw(self, codes: NDArray[np.int64], uniform: NDArray[np.float64]) -> NDArray[np.int64]:
        """A cell of each code, with replacement."""
        return self.rows[self.start[codes] + (uniform * self.size[codes]).astype(np.int64)]


class PairSampler(DistributedSampler):
    """Yields :class:`CellPairs` of a few conditions; the draws depend on (seed, epoch, rank) only.

    Each set of a step draws a treatment, all with the same probability whatever their number of cells, then one of its cells
    for the context, then cells of this treatment and context, and as many control cells of the context; all with
    replacement. So every set is a sample of one distribution.

    It subclasses ``DistributedSampler`` because Lightning replaces any other sampler under several devices.

    Parameters
    ----------
    rows
        Positions of the cells that may be drawn ``(cell,)``, control cells included.
    treatment
        Treatment of each of these cells ``(cell,)``; 0 is control.
    context
        Context of each of these cells ``(cell,)``.
    n_contexts
        Number of contexts.
    n_sets
        Conditions per step, of all ranks together.
    n_cells
        Cells per condition.
    n_batches
        Steps per epoch.
    shuffle
        Draw anew every epoch.
    seed
        Seed of all draws.
    control_fraction
        Share of the sets that are control cells beside control cells, which teaches what "no perturbation" means.
    distributed
        Share the sets of each step among the ranks of the running process group.

    Attributes
    ----------
    start_batch
        Batches that the next iteration skips: where an interrupted epoch continues. Used once.

    Raises
    ------
    ValueError
        If a number is not positive, or a perturbed cell has no control cell in its context.
    """

    def __init__(
        self,
        rows: NDArray[np.int64],
        treatment: NDArray[np.int64],
        context: NDArray[np.int64],
        *,
        n_contexts: int,
        n_sets: int,
        n_cells: int,
        n_batches: int,
        shuffle: bool,
        seed: int,
        control_fraction: float = 0.0,
        distributed: bool = False,
    ) -> None:
        for name, size in {"n_sets": n_sets, "n_cells": n_cells, "n_batches": n_batches}.items():
            if size < 1:
                raise ValueError(f"`{name}` must be at least 1, got {size}.")
        in_group = distributed and dist.is_available() and dist.is_initialized()
        self.num_replicas = dist.get_world_size() if in_group else 1
        self.rank = dist.get_rank() if in_group else 0
        self.n_sets = -(-n_sets // self.num_replicas) * self.num_replicas
        self.n_cells, self.n_batches, self.n_contexts = n_cells, n_batches, n_contexts
        self.shuffle, self.seed, self.epoch, self.start_batch = shuffle, seed, 0, 0
        self.control_fraction = control_fraction
        control = treatment == 0
        self._controls = _Members.of(rows[control], context[control], n_contexts)
        group = treatment * n_contexts + context
        self._groups = _Members.of(rows, group, int(group.max()) + 1)
        self._treatments = np.unique(treatment[~control])
        self._by_treatment = _Members.of(np.arange(len(rows)), treatment, int(treatment.max()) + 1)
        self._group = group
        if len(self._treatments) == 0:
            raise ValueError("There are no perturbed cells to train on; check the split of the cells.")
        lonely = self._controls.size[context] == 0
        if lonely.any():
            raise ValueError(
                f"{int(lonely.sum())} cells have no control cell of their context among the cells of this split; raise "
                "`train_size`, or pair by fewer columns."
            )

    def __len__(self) -> int:
        """Number of batches, the same on every rank and in every epoch."""
        return self.n_batches

    def __iter__(self) -> Iterator[CellPairs]:
        first, self.start_batch = self.start_batch, 0
        rng = np.random.default_rng([self.seed, self.epoch if self.shuffle else 0])
        sets = (self.n_batches, self.n_sets)
        treatment = self._treatments[rng.integers(len(self._treatments), size=sets)]
        treatment = np.where(rng.random(sets) < self.control_fraction, 0, treatment)
        group = self._group[self._by_treatment.draw(treatment, rng.random(sets))]
        cells = (*sets, self.n_cells)
        group = np.broadcast_to(group[..., None], cells)
        rows = self._groups.draw(group, rng.random(cells))
        controls = self._controls.draw(group % self.n_contexts, rng.random(cells))
        mine = slice(self.rank, None, self.num_replicas)
        for i in range(first, self.n_batches):
            yield CellPairs(*(a[i, mine].ravel() for a in (rows, controls, group)))
