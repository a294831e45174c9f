"""What a step of the cascaded flow draws, and small helpers of its module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from cellweave._keys import STEP_KEYS
from cellweave.flow import FlowTimes, Transport, move_cells
from cellweave.objective import derive_seed

__all__ = ["CELLS", "GENES", "FlowDraws", "evaluating", "expected_change", "own_generator", "rows_with_weight", "take"]

# Streams of the random draws of a step.
GENES, CELLS = 0, 1


class FlowDraws(NamedTuple):
    """Everything that is drawn in a training step."""

    genes: Tensor | None  # int64 (used gene,): positions of the genes of this step; all where None
    times: FlowTimes
    expression: Tensor  # (cell, used gene): noise
    latent: Tensor | None  # of the shape of the features of the used genes
    hidden: Tensor  # bool (cell,): whose perturbation is hidden
    moves: tuple[Tensor, Tensor] | None = None  # uniform and normal (cell, gene): of the expected transport


@contextmanager
def evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode for a while."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


def own_generator(tensors: dict[str, Any]) -> Generator | None:
    """Generator of the draws of single cells, another one in every process that shares the step."""
    seed = tensors.get(STEP_KEYS.SEED)
    if seed is None:
        return None
    place = tensors.get(STEP_KEYS.POSITION)
    first = int(place[0]) if place is not None and len(place) else 0
    return Generator().manual_seed(derive_seed(int(seed), CELLS, first))


def expected_change(control: Tensor, transport: Tensor, uniform: Tensor, normal: Tensor) -> Tensor:
    """What a transport ``(cell, 4, gene)`` changes in control cells ``(cell, gene)``."""
    moved = move_cells(control, Transport(*transport.unbind(1)), uniform.to(control), normal.to(control))
    return moved - control


def take(a: Tensor, keep: Tensor | None, dim: int) -> Tensor:
    """Dense ``a``, or the entries ``keep`` of it along ``dim``."""
    a = a.to_dense() if a.layout != torch.strided else a
    return a if keep is None else a.index_select(dim, keep)


def rows_with_weight(n_cells: int, weight: Tensor | None, device: torch.device) -> Tensor:
    """Cells with a weight; the first one if there is none, so that every parameter has a gradient in every step."""
    every = torch.arange(n_cells, device=device)
    if weight is None:
        return every
    rows = every[weight > 0]
    return rows if len(rows) else every[:1]
