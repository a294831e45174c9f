from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Generator, Tensor

from ._base import Objective

__all__ = ["MarkerMonotonicity", "marker_discordance"]


def marker_discordance(x: Tensor, u: Tensor, valid: Tensor | None = None, batch: Tensor | None = None) -> Tensor:
    r"""How far each latent marker is from rising with its measured marker, ``(marker,)`` between 0 and 1.

    Every cell is compared with the one after it, which in shuffled data is a random one. With :math:`\Delta x` and
    :math:`\Delta u` the differences of a pair in a marker, the discordance of the marker is

    .. math::
        \frac{\sum \max(-\Delta x\,\Delta u,\, 0)}{\sum |\Delta x\,\Delta u|}

    It is 0 if the latent marker rises with the measured one, whatever the shape of the curve; 1 if it falls; near a half if
    the two have nothing to do with each other. It does not depend on the scale or the offset of either. Markers without a
    single pair to compare have 0.

    Parameters
    ----------
    x
        Measured markers ``(cell, marker)``; NaN where a marker was not measured, which leaves those pairs out.
    u
        Latent markers ``(cell, marker)``.
    valid
        False for rows that are no cells, ``(cell,)``; all are cells by default.
    batch
        Batch of each cell, ``(cell,)``: only cells of the same batch are compared, as a flow that aligns batches moves
        them against each other. One batch by default.
    """
    if batch is not None:
        order = batch.argsort(stable=True)
        x, u, batch = x[order], u[order], batch[order]
        valid = None if valid is None else valid[order]
    measured = ~x.isnan()
    measured = measured if valid is None else measured & valid.bool()[:, None]
    pair = measured & measured.roll(1, 0)  # (cell, marker)
    if batch is not None:
        pair &= (batch == batch.roll(1, 0))[:, None]
    # unmeasured values must not reach the product: its gradient there would be NaN even behind a mask
    x = x.nan_to_num(0.0)
    product = torch.where(pair, (x - x.roll(1, 0)) * (u - u.roll(1, 0)), 0)
    total = product.abs().sum(0)
    return product.neg().relu().sum(0) / total.clamp(min=torch.finfo(total.dtype).tiny)


class MarkerMonotonicity(Objective):
    r"""Latent markers must rise with the measured ones: sum over markers of :func:`marker_discordance`.

    A flow is free to give a marker another meaning than the table does: it may map a large population to the mode of a
    sibling from which one marker separates it, by shifting that marker where the others are as in this population. The
    likelihood hardly notices, labels are wrong. Cells with more of the marker then have less of the latent one, which
    is what this term counts. Weights are in nats per cell and marker.

    Pairs are made among the cells of a process; where processes share a step, the value is the mean over processes.
    """

    name: ClassVar[str] = "monotone_loss"
    requires: ClassVar[frozenset[str]] = frozenset({"x", "u", "valid"})  # and "batch" where cells have batches

    def __call__(self, outputs: Mapping[str, Tensor], generator: Generator | None = None) -> Tensor:
        return marker_discordance(outputs["x"], outputs["u"], outputs["valid"], outputs.get("batch")).sum()
