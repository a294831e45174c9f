"""Control cells moved to an expected mean and detection rate, zeros and counts apart."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Transport", "expected_transport", "move_cells"]

# A gene that was hardly seen has the level of the average gene, with the weight of this many cells.
_PRIOR_CELLS = 3.0
# The level of the cells that express a gene changes by these factors at most; the rest is detection.
_LEAST_LEVEL, _LARGEST_LEVEL = 0.5, 3.0
# What is kept of an expressed gene is not zero.
_LEAST_VALUE = 0.05
# Standard deviation of newly expressed values, which are logarithms.
_SPREAD = 0.5


class Transport(NamedTuple):
    """How the cells of a context change under a condition, each of the shape ``(..., gene)``."""

    keep: Tensor  # probability that a cell that expresses the gene still does
    add: Tensor  # what is added to its value
    fill: Tensor  # probability that a cell that does not express it begins to
    level: Tensor  # value at which it begins, above the mean value of the genes that the cell expresses


def expected_transport(
    mean: Tensor, detection: Tensor, shift: Tensor, detection_shift: Tensor, n_cells: Tensor
) -> Transport:
    """Transport after which control cells have an expected mean.

    Where the expected change of the detection rate does not go with that of the mean, the rate gives way.

    Parameters
    ----------
    mean, detection
        Mean and share of cells above zero of the control cells ``(..., gene)``.
    shift, detection_shift
        Expected changes of both ``(..., gene)``.
    n_cells
        Number of control cells ``(...)``.

    Returns
    -------
    The transport ``(..., gene)``; without an expected change nothing moves.
    """
    n = n_cells[..., None].to(mean)
    overall = (mean.sum(-1, keepdim=True) / detection.sum(-1, keepdim=True).clamp(min=1e-9)).clamp(min=_LEAST_VALUE)
    usual = (mean * n + _PRIOR_CELLS * overall) / (detection * n + _PRIOR_CELLS)
    before = torch.where(detection > 0, mean / detection.clamp(min=1e-9), usual)
    wanted = (mean + shift).clamp(min=0)
    rate = (detection + detection_shift).clamp(0, 1)
    level = torch.where(rate > 0, wanted / rate.clamp(min=1e-9), usual)
    level = level.clamp(_LEAST_LEVEL * usual, _LARGEST_LEVEL * usual)
    level = torch.maximum(level, wanted)  # a gene is expressed in all cells at most
    rate = wanted / level
    # without an expected change nothing moves, whatever the levels of rare genes
    still = (shift == 0) & (detection_shift == 0)
    keep = (rate / detection.clamp(min=1e-9)).clamp(max=1)
    fill = ((rate - detection) / (1 - detection).clamp(min=1e-9)).clamp(0, 1)
    one, zero = torch.ones_like(keep), torch.zeros_like(keep)
    return Transport(
        torch.where(still, one, keep),
        torch.where(still, zero, level - before),
        torch.where(still, zero, fill),
        level - overall,
    )


def move_cells(control: Tensor, transport: Transport, uniform: Tensor, normal: Tensor) -> Tensor:
    """Cells moved by a transport; which zeros begin and which values end is drawn, all else of a cell stays.

    Parameters
    ----------
    control
        Log-normalised expression ``(cell, gene)``.
    transport
        What moves them, ``(gene,)`` or ``(cell, gene)``.
    uniform, normal
        Draws ``(cell, gene)``.

    Returns
    -------
    Tensor ``(cell, gene)``, not negative.
    """
    expressed = control > 0
    kept = (control + transport.add).clamp(min=_LEAST_VALUE)
    # what a cell expresses at all is seen at a value that depends on its depth; values are logarithms, so factors add up
    own = control.sum(1, keepdim=True) / expressed.sum(1, keepdim=True).clamp(min=1)
    new = (own + transport.level + _SPREAD * normal).clamp(min=_LEAST_VALUE)
    here = expressed & (uniform < transport.keep)
    begins = ~expressed & (uniform < transport.fill)
    return torch.where(here, kept, torch.where(begins, new, 0.0))
