"""Curves of a model over all of its runs, the same in every process and part of every checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

__all__ = ["History"]


class History:
    """Values by name and epoch.

    Parameters
    ----------
    earlier
        Curves of earlier runs of the model, whose epochs are counted on.
    """

    def __init__(self, earlier: Mapping[str, pd.DataFrame] | None = None) -> None:
        frames = {name: frame.iloc[:, 0] for name, frame in (earlier or {}).items()}
        self._values = {name: {int(k): float(v) for k, v in column.items()} for name, column in frames.items()}
        self.n_earlier = max((1 + epoch for column in self._values.values() for epoch in column), default=0)

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def add(self, name: str, epoch: int, value: float) -> None:
        """Add a value of an epoch of the running training, counted from zero."""
        self._values.setdefault(name, {})[self.n_earlier + epoch] = float(value)

    def frames(self) -> dict[str, pd.DataFrame]:
        """One-column frames indexed by epoch."""
        columns = {name: pd.Series(values, dtype=float) for name, values in self._values.items()}
        return {name: column.rename_axis("epoch").to_frame(name) for name, column in columns.items()}

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, for a checkpoint."""
        return {"values": {name: dict(column) for name, column in self._values.items()}, "n_earlier": self.n_earlier}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace all curves by those of ``state``."""
        self._values = {name: dict(column) for name, column in state["values"].items()}
        self.n_earlier = state["n_earlier"]
