"""Losses of flow matching: squared errors of velocities, with a weight per cell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from cellweave._keys import STEP_KEYS

from ._base import Objective
from ._shared import shared_mean

__all__ = ["ExpressionVelocity", "LatentVelocity", "ZeroGate", "velocity_error"]


def velocity_error(
    velocity: Tensor, target: Tensor, weight: Tensor, total: Tensor, measured: Tensor | None = None
) -> Tensor:
    """Weighted mean over cells of the mean squared error of a cell.

    Parameters
    ----------
    velocity, target
        ``(cell, ...)``.
    weight
        Weights ``(cell,)``.
    total
        What the weighted sum over cells is divided by.
    measured
        False for genes without a target, ``(gene,)`` or ``(cell, gene)``; they do not count.
    """
    error = (velocity - target).square()
    if error.ndim > 2:
        error = error.flatten(2).mean(2)  # (cell, gene)
    if measured is None:
        per_cell = error.mean(1)
    else:
        used = measured.to(error).expand_as(error)
        per_cell = torch.where(used > 0, error, 0).sum(1) / used.sum(1).clamp(min=1)
    return shared_mean(per_cell, weight.to(per_cell), total.to(per_cell))


def _divisor(outputs: Mapping[str, Tensor], weight: Tensor, own_count: bool) -> Tensor:
    """What a sum over cells is divided by: all cells of the step, or the weights of those that teach the stream.

    Where processes share a step, each divides by the sum of its own weights.
    """
    if own_count:
        return weight.sum().clamp(min=1)
    shared = outputs.get(STEP_KEYS.CELLS_PER_PROCESS)
    return outputs["n_cells"] if shared is None else shared


class ExpressionVelocity(Objective):
    """Squared error of ``v_expr`` to ``u_expr`` ``(cell, gene)`` with the weights ``w_expr`` ``(cell,)``.

    Parameters
    ----------
    weight
        Factor in the total loss.
    own_count
        Divide by the sum of the weights instead of the number of all cells ``n_cells``, which is the published form, so
        that the loss does not shrink with the share of cells that teach this stream.
    """

    name: ClassVar[str] = "expression_loss"
    requires: ClassVar[frozenset[str]] = frozenset({"v_expr", "u_expr", "w_expr", "n_cells"})

    def __init__(self, weight: float = 1.0, own_count: bool = False) -> None:
        super().__init__(weight)
        self.own_count = own_count

    def __call__(self, outputs: Mapping[str, Tensor], generator: Generator | None = None) -> Tensor:
        weight = outputs["w_expr"]
        total = _divisor(outputs, weight, self.own_count)
        return velocity_error(outputs["v_expr"], outputs["u_expr"], weight, total)


class LatentVelocity(Objective):
    """Squared error of ``v_latent`` to ``u_latent`` with the weights ``w_latent`` ``(cell,)``.

    Cells of weight 0 may be absent. The velocities are those of every gene ``(cell, gene, latent)`` or of the cell
    ``(cell, latent)``. Genes for which ``has_latent`` ``(gene,)`` or ``(cell, gene)`` is given and false have no features
    and do not count.

    Parameters
    ----------
    weight
        Factor in the total loss.
    own_count
        Divide by the sum of the weights instead of the number of all cells ``n_cells``, which is the published form, so
        that the loss does not shrink with the share of cells that teach this stream.
    """

    name: ClassVar[str] = "latent_loss"
    requires: ClassVar[frozenset[str]] = frozenset({"v_latent", "u_latent", "w_latent", "n_cells"})

    def __init__(self, weight: float = 1.0, own_count: bool = False) -> None:
        super().__init__(weight)
        self.own_count = own_count

    def __call__(self, outputs: Mapping[str, Tensor], generator: Generator | None = None) -> Tensor:
        weight = outputs["w_latent"]
        total = _divisor(outputs, weight, self.own_count)
        return velocity_error(outputs["v_latent"], outputs["u_latent"], weight, total, outputs.get("has_latent"))


class ZeroGate(Objective):
    """Cross-entropy of ``zero_logit`` and whether ``target`` ``(cell, gene)`` is zero, with the weights ``w_expr``.

    Parameters
    ----------
    weight
        Factor in the total loss.
    """

    name: ClassVar[str] = "zero_loss"
    requires: ClassVar[frozenset[str]] = frozenset({"zero_logit", "target", "w_expr", "n_cells"})

    def __call__(self, outputs: Mapping[str, Tensor], generator: Generator | None = None) -> Tensor:
        logit, zero = outputs["zero_logit"], outputs["target"] == 0
        per_cell = F.binary_cross_entropy_with_logits(logit, zero.to(logit), reduction="none").mean(1)
        weight = outputs["w_expr"].to(per_cell)
        return shared_mean(per_cell, weight, _divisor(outputs, weight, own_count=False).to(per_cell))
