from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Generator, Tensor

from cellweave._keys import STEP_KEYS

from ._base import Objective
from ._shared import shared_mean

__all__ = ["LabelCrossEntropy"]


class LabelCrossEntropy(Objective):
    r"""Mean of :math:`-\log\sum_{z \in S} p(z|u)` over the labelled cells, in nats per labelled cell.

    :math:`S` are the populations that the label of a cell allows: one, the children of a group, or all of them for a cell
    without a label, which then adds nothing.

    Parameters
    ----------
    weight
        Factor of this term in the total loss.
    share
        Share of labelled cells among all training cells. Dividing by this constant in place of the labelled cells of a
        batch keeps the mean of batches that hold few or no labelled cells unbiased.
    """

    name: ClassVar[str] = "label_loss"
    requires: ClassVar[frozenset[str]] = frozenset({"log_prob_contrast", "log_pi", "allowed", "valid"})

    def __init__(self, weight: float = 1.0, share: float = 1.0) -> None:
        super().__init__(weight)
        if not 0 < share <= 1:
            raise ValueError(f"`share` must be above 0 and at most 1, got {share}.")
        self.share = share

    def __call__(self, outputs: Mapping[str, Tensor], generator: Generator | None = None) -> Tensor:
        joint = outputs["log_prob_contrast"] + outputs["log_pi"]  # (cell, population)
        allowed = outputs["allowed"]  # bool (cell, population)
        within = torch.logsumexp(joint.masked_fill(~allowed, -torch.inf), -1)
        value = torch.logsumexp(joint, -1) - within
        return shared_mean(value, outputs["valid"], outputs.get(STEP_KEYS.CELLS_PER_PROCESS)) / self.share
