"""Contexts (sets of cells) as a pure function of rows, groups and a seed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray
from torch.utils.data import DistributedSampler

from cellweave._types import ContextRule

__all__ = ["BUFFER_SIZE", "Buffer", "CellSetSampler", "Contexts", "block_labels", "draw_contexts"]

# Blocks whose cells spread over this many times their number of rows are not read in one go.
_SCATTERED = 8
# Cells that are read together from disk: thousands mix well and take tens of megabytes.
BUFFER_SIZE = 8192

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


class Buffer(NamedTuple):
    """Cells that are read together, and the batches that are cut from them."""

    rows: NDArray[np.int64]  # (cell,): to read now; sorted, unique
    batches: list[tuple[NDArray[np.int64], NDArray[np.bool_]]]  # of these cells, and of those kept by the last buffer
    kept: NDArray[np.int64]  # (cell,): those that the next buffer needs; sorted, unique


class CellSetSampler(DistributedSampler):
    """Yields ``(rows, valid)`` of whole contexts; the order depends on (seed, epoch, rank) only.

    Without ``block_size`` contexts are drawn from all cells. With it, cells are visited in shuffled blocks of neighbouring
    rows, and contexts are drawn from the blocks of one buffer, so that data on disk are read in long runs; data that
    fit into one buffer are drawn from as if there were no blocks. The order does not depend on where the data are.

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
        Share the contexts (with ``block_size`` the blocks) among the ranks of the running process group.
    block_size
        Cells of a block, rounded up to whole contexts.
    buffer_size
        Cells of a buffer, rounded to whole blocks (at least one).
    max_cells
        Cells to visit per epoch at most (of all ranks, rounded up to whole contexts); all by default. With ``shuffle``
        every epoch visits others.

    Attributes
    ----------
    start_batch
        Batches that the next iteration skips: where an interrupted epoch continues. Used once.

    Raises
    ------
    ValueError
        If ``n_cells``, ``block_size``, ``buffer_size`` or ``max_cells`` is not positive.
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
        block_size: int | None = None,
        buffer_size: int = BUFFER_SIZE,
        max_cells: int | None = None,
    ) -> None:
        sizes = {"n_cells": n_cells, "block_size": block_size or 1, "buffer_size": buffer_size}
        sizes["max_cells"] = 1 if max_cells is None else max_cells
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"`{name}` must be at least 1, got {size}.")
        in_group = distributed and dist.is_available() and dist.is_initialized()
        self.num_replicas = dist.get_world_size() if in_group else 1
        self.rank = dist.get_rank() if in_group else 0
        self.rows, self.groups = np.asarray(rows), np.asarray(groups)
        self.n_cells, self.rule = n_cells, rule
        self.contexts_per_batch = max(1, batch_size // n_cells)
        self.shuffle, self.seed, self.epoch = shuffle, seed, 0
        self.start_batch = 0
        self._blocks: _Blocks | None = None
        size = -(-(block_size or 1) // n_cells) * n_cells  # whole contexts
        buffer_size = max(buffer_size, size)
        # then there are more blocks than ranks, so that every rank has some
        if block_size is not None and len(self.rows) > buffer_size * self.num_replicas:
            self._blocks = _Blocks(self.rows, self.groups, n_cells, size, buffer_size, self.num_replicas)
            self.n_contexts_per_rank = self._blocks.n_contexts_per_rank
        else:
            n_contexts = _n_contexts(np.unique(self.groups, return_counts=True)[1], n_cells)
            self.n_contexts_per_rank = -(-n_contexts // self.num_replicas)
        if max_cells is not None:
            self.n_contexts_per_rank = min(self.n_contexts_per_rank, -(-max_cells // (n_cells * self.num_replicas)))

    def __len__(self) -> int:
        """Number of batches of this rank, the same on every rank and in every epoch."""
        return -(-self.n_contexts_per_rank // self.contexts_per_batch)

    @property
    def is_scattered(self) -> bool:
        """Whether the cells of a block are far apart, so that reading them from disk is slow."""
        return self._blocks is not None and self._blocks.is_scattered

    def __iter__(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.bool_]]]:
        for buffer in self.buffers():
            yield from buffer.batches

    def buffers(self) -> Iterator[Buffer]:
        """The batches of this rank, grouped by the cells that are read together."""
        first, self.start_batch = self.start_batch, 0
        size, n_done = self.contexts_per_batch, 0
        waiting: Contexts | None = None  # contexts that do not fill a batch go to the next buffer
        for rows, contexts, is_last in self._drawn():
            both = contexts if waiting is None else _joined(waiting, contexts)
            n_ready = len(both.rows) if is_last else len(both.rows) // size * size
            starts = [start for start in range(0, n_ready, size) if n_done + start >= first * size]
            batches = [(both.rows[i : i + size].ravel(), both.valid[i : i + size].ravel()) for i in starts]
            n_done += n_ready
            waiting = Contexts(both.rows[n_ready:], both.valid[n_ready:])
            kept = np.unique(waiting.rows)
            if batches or len(kept):
                yield Buffer(rows if batches else kept, batches, kept)

    def _drawn(self) -> Iterator[tuple[NDArray[np.int64], Contexts, bool]]:
        """Cells of each buffer and the contexts of this rank in them; and whether it is the last."""
        rng = np.random.default_rng([self.seed, self.epoch if self.shuffle else 0])
        if self._blocks is None:
            contexts = self._shuffled(draw_contexts(self.rows, self.groups, self.n_cells, rng, self.rule), rng)
            mine = self._share(contexts)
            is_whole = self.num_replicas == 1 and bool(np.all(np.diff(self.rows) > 0))
            yield self.rows if is_whole else np.unique(mine.rows), mine, True
            return
        n_left = self.n_contexts_per_rank
        # fixed contexts are drawn from shuffled blocks too: a sorted file must not decide who keeps whom company
        members = self._blocks.buffers(rng, self.rank, self.shuffle or self.rule == "random")
        rng = np.random.default_rng([self.seed, self.epoch if self.shuffle else 0, 1 + self.rank])
        for i, position in enumerate(members):
            drawn = draw_contexts(self.rows[position], self.groups[position], self.n_cells, rng, self.rule)
            contexts, is_last = self._shuffled(drawn, rng), i + 1 == len(members) or n_left <= len(drawn.rows)
            if is_last:
                contexts = _extended(contexts, n_left)
            n_left -= len(contexts.rows)
            yield np.sort(self.rows[position]), contexts, is_last
            if is_last:
                return

    def _shuffled(self, contexts: Contexts, rng: np.random.Generator) -> Contexts:
        if not self.shuffle:
            return contexts
        order = rng.permutation(len(contexts.rows))
        return Contexts(contexts.rows[order], contexts.valid[order])

    def _share(self, contexts: Contexts) -> Contexts:
        """The contexts of this rank in this epoch; repeated ones, which even out the ranks, carry no valid cell."""
        rows, valid = _extended(contexts, self.n_contexts_per_rank * self.num_replicas)
        return Contexts(rows[self.rank :: self.num_replicas], valid[self.rank :: self.num_replicas])


class _Blocks:
    """Cells cut into blocks of neighbouring cells of one group, dealt to the ranks.

    Every block but the last of a group holds whole contexts, so that the number of contexts of a rank is the same in every
    epoch. Full blocks are dealt anew every epoch, the others once.
    """

    def __init__(
        self,
        rows: NDArray[np.int64],
        groups: NDArray[np.integer],
        n_cells: int,
        size: int,
        buffer_size: int,
        n_ranks: int,
    ) -> None:
        order = np.lexsort((rows, groups))
        labels = block_labels(groups[order], size)
        blocks = np.split(order, np.flatnonzero(np.diff(labels)) + 1)
        # unshuffled blocks come in the order of the storage
        blocks.sort(key=lambda block: rows[block[0]])
        self.rows, self.buffer_size, self.n_ranks = rows, buffer_size, n_ranks
        self.full = [block for block in blocks if len(block) == size]
        self.short = sorted((block for block in blocks if len(block) < size), key=len, reverse=True)
        spans = np.array([rows[block[-1]] - rows[block[0]] + 1 for block in blocks])
        self.is_scattered = bool(spans.sum() > _SCATTERED * len(rows))
        counts = []
        for rank in range(n_ranks):
            short = _n_contexts(np.array([len(block) for block in self._short_of(rank)], dtype=int), n_cells)
            counts.append(len(range(rank, len(self.full), n_ranks)) * (size // n_cells) + short)
        self.n_contexts_per_rank = max(counts)

    def buffers(self, rng: np.random.Generator, rank: int, shuffle: bool) -> list[NDArray[np.int64]]:
        """Positions of the cells of each buffer of a rank; ``rng`` is in the same state on all ranks."""
        order = rng.permutation(len(self.full)) if shuffle else np.arange(len(self.full))
        mine = [self.full[i] for i in order[rank :: self.n_ranks]] + self._short_of(rank)
        if shuffle:
            mine = [mine[i] for i in rng.permutation(len(mine))]
        else:
            mine.sort(key=lambda block: self.rows[block[0]])
        buffers: list[list[NDArray[np.int64]]] = []
        n_free = 0
        for block in mine:
            if len(block) > n_free:
                buffers.append([])
                n_free = self.buffer_size
            buffers[-1].append(block)
            n_free -= len(block)
        return [np.concatenate(buffer) for buffer in buffers]

    def _short_of(self, rank: int) -> list[NDArray[np.int64]]:
        """From the last rank on: the first ranks are those with one more full block."""
        return self.short[self.n_ranks - 1 - rank :: self.n_ranks]


def block_labels(groups: NDArray[np.integer], size: int) -> NDArray[np.int64]:
    """Number of the block of each cell, for cells sorted by group: ``size`` cells of the same group each."""
    starts = np.flatnonzero(np.diff(groups, prepend=groups[:1] - 1))  # first cell of each group
    lengths = np.diff([*starts, len(groups)])
    within = np.arange(len(groups)) - np.repeat(starts, lengths)
    per_group = -(-lengths // size)
    return np.repeat(np.cumsum(per_group) - per_group, lengths) + within // size


def _joined(first: Contexts, second: Contexts) -> Contexts:
    return Contexts(np.concatenate([first.rows, second.rows]), np.concatenate([first.valid, second.valid]))


def _n_contexts(sizes: NDArray[np.integer], n_cells: int) -> int:
    return int(np.sum(-(-sizes // n_cells)))


def _extended(contexts: Contexts, length: int) -> Contexts:
    """``contexts`` cut or repeated to ``length``; repetitions hold no valid cell."""
    is_extra = np.arange(length) >= len(contexts.rows)
    rows = np.resize(contexts.rows, (length, contexts.rows.shape[1]))
    valid = np.resize(contexts.valid, (length, contexts.valid.shape[1]))
    return Contexts(rows, valid & ~is_extra[:, None])
