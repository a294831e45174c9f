"""Contexts (sets of cells) as a pure function of rows, groups and a seed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray
from torch.utils.data import DistributedSampler

from cellweave._types import ContextRule

__all__ = ["CellSetSampler", "Contexts", "draw_contexts"]

# The published Stack inference fills the last context with draws from this state.
_TAIL_SEED = 42


class Contexts(NamedTuple):
    """Cells grouped into contexts."""

    rows: NDArray[np.int64]  # (context, cell): positions in the AnnData
    valid: NDArray[np.bool_]  # (context, cell): false where a cell only fills up its context


def draw_contexts(
    rows: NDArray[np.integer],
    groups: NDArray[np.integer],
    n_cells: int,
    rng: np.random.Generator,
    rule: ContextRule = "random",
) -> Contexts:
    """Cut cells into contexts of ``n_cells`` cells of the same group; every cell is valid in exactly one of them.

    Parameters
    ----------
    rows
        Positions of the cells ``(cell,)``.
    groups
        Group of each cell ``(cell,)``.
    n_cells
        Cells per context.
    rng
        Source of the order of cells (``rule="random"``).
    rule
        ``"random"`` shuffles the cells of each group; the last context of a group is filled with other cells of the
        group, each at most once, and a group smaller than ``n_cells`` repeats its cells as evenly as possible.
        ``"sequential"`` keeps the given order and fills the last context with draws, with replacement, from its own
        cells, as the published Stack inference does.

    Raises
    ------
    ValueError
        If ``rule`` is unknown.
    """
    if rule not in ("random", "sequential"):
        raise ValueError(f"The rule of contexts must be 'random' or 'sequential', got {rule!r}.")
    order = rng.permutation(len(rows)) if rule == "random" else np.arange(len(rows))
    order = order[np.argsort(groups[order], kind="stable")]
    boundaries = np.flatnonzero(np.diff(groups[order])) + 1
    blocks, valid = [], []
    for members in np.split(rows[order], boundaries):
        n_contexts = -(-len(members) // n_cells)
        blocks.append(_fill(members, n_contexts * n_cells, n_cells, rule).reshape(n_contexts, n_cells))
        valid.append((np.arange(n_contexts * n_cells) < len(members)).reshape(n_contexts, n_cells))
    return Contexts(np.concatenate(blocks).astype(np.int64), np.concatenate(valid))


def _fill(members: NDArray, length: int, n_cells: int, rule: ContextRule) -> NDArray:
    n_missing = length - len(members)
    if rule == "random":
        return np.resize(members, length)  # repeats from the start: cells of other contexts, in random order
    if n_missing == 0:
        return members
    tail = members[length - n_cells :]
    drawn = np.random.RandomState(_TAIL_SEED).choice(len(tail), n_missing, replace=True)
    return np.concatenate([members, tail[drawn]])


class CellSetSampler(DistributedSampler):
    """Yields ``(rows, valid)`` of whole contexts; the order depends on (seed, epoch, rank) only.

    It subclasses ``DistributedSampler`` because Lightning replaces any other sampler under several devices.

    Parameters
    ----------
    rows
        Positions of the cells to visit ``(cell,)``.
    groups
        Group of each of these cells ``(cell,)``; contexts never mix groups.
    n_cells
        Cells per context.
    batch_size
        Cells per batch, rounded down to whole contexts (at least one).
    shuffle
        Draw new contexts every epoch and visit them in random order.
    seed
        Seed of all draws.
    rule
        See :func:`draw_contexts`.
    distributed
        Share the contexts among the ranks of the running process group.

    Raises
    ------
    ValueError
        If ``n_cells`` is not positive.
    """

    def __init__(
        self,
        rows: NDArray[np.integer],
        groups: NDArray[np.integer],
        *,
        n_cells: int,
        batch_size: int,
        shuffle: bool,
        seed: int,
        rule: ContextRule = "random",
        distributed: bool = False,
    ) -> None:
        if n_cells < 1:
            raise ValueError(f"`n_cells` must be at least 1, got {n_cells}.")
        in_group = distributed and dist.is_available() and dist.is_initialized()
        self.num_replicas = dist.get_world_size() if in_group else 1
        self.rank = dist.get_rank() if in_group else 0
        self.rows, self.groups = np.asarray(rows), np.asarray(groups)
        self.n_cells, self.rule = n_cells, rule
        self.contexts_per_batch = max(1, batch_size // n_cells)
        self.shuffle, self.seed, self.epoch = shuffle, seed, 0
        self.start_batch = 0  # batches that the next iteration skips: where an interrupted epoch continues
        sizes = np.unique(self.groups, return_counts=True)[1]
        n_contexts = int(np.sum(-(-sizes // n_cells)))
        self.n_contexts_per_rank = -(-n_contexts // self.num_replicas)

    def __len__(self) -> int:
        """Number of batches of this rank, the same on every rank."""
        return -(-self.n_contexts_per_rank // self.contexts_per_batch)

    def __iter__(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.bool_]]]:
        rng = np.random.default_rng([self.seed, self.epoch if self.shuffle else 0])
        rows, valid = draw_contexts(self.rows, self.groups, self.n_cells, rng, self.rule)
        if self.shuffle:
            order = rng.permutation(len(rows))
            rows, valid = rows[order], valid[order]
        rows, valid = self._share(rows, valid)
        step = self.contexts_per_batch
        first, self.start_batch = self.start_batch, 0
        for start in range(first * step, len(rows), step):
            yield rows[start : start + step].ravel(), valid[start : start + step].ravel()

    def _share(self, rows: NDArray, valid: NDArray) -> tuple[NDArray, NDArray]:
        """The contexts of this rank; repeated ones, which even out the ranks, carry no valid cell."""
        total = self.n_contexts_per_rank * self.num_replicas
        is_extra = np.arange(total) >= len(rows)
        rows, valid = np.resize(rows, (total, self.n_cells)), np.resize(valid, (total, self.n_cells))
        valid = valid & ~is_extra[:, None]
        return rows[self.rank :: self.num_replicas], valid[self.rank :: self.num_replicas]
