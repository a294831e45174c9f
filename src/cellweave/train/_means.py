"""Means over an epoch that can be stored in a checkpoint and continued."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["EpochMeans"]


class EpochMeans:
    """Weighted means of named scalars over the batches of an epoch.

    Sums stay on the device, so that adding a batch does not wait for it, and in float64 where the device has it.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all batches."""
        self._names: list[str] = []
        self._sums = torch.zeros(0)  # (term + 1,): weighted sums, then the sum of the weights

    def __bool__(self) -> bool:
        return bool(self._names)

    def add(self, terms: Mapping[str, Tensor], weight: Tensor | float) -> None:
        """Add the values of one batch.

        Parameters
        ----------
        terms
            0-d tensors by name, the same names in every batch.
        weight
            Number of cells that the values are a mean of.
        """
        values = torch.stack([*terms.values(), torch.ones_like(next(iter(terms.values())))]).detach()
        values = values.to(torch.float32 if values.device.type == "mps" else torch.float64) * weight
        if self._names:
            self._sums = self._sums.to(values.device) + values
        else:
            self._names, self._sums = list(terms), values

    def compute(self, reduce: Callable[[Tensor], Tensor] = lambda sums: sums) -> dict[str, float]:
        """Means by name; ``reduce`` sums or averages over processes."""
        *sums, weight = reduce(self._sums.clone()).tolist()
        return {name: value / weight if weight else float("nan") for name, value in zip(self._names, sums, strict=True)}

    def state_dict(self, reduce: Callable[[Tensor], Tensor] = lambda sums: sums) -> dict[str, Any]:
        """What :meth:`load_state_dict` continues from."""
        return {"names": list(self._names), "sums": reduce(self._sums.clone()).cpu()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the batches of ``state``."""
        self._names, self._sums = list(state["names"]), state["sums"].clone()
