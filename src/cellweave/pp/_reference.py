"""Parameters of a transform that come from other data or from a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray

from ._intensities import Intensities, per_marker
from ._transforms import Arcsinh, Step, read_steps, some

__all__ = ["check_same_transform", "reference_step", "table_column"]

S = TypeVar("S", bound=Step)


def table_column(table: pd.DataFrame, name: str, markers: list[str]) -> NDArray[np.float64]:
    if name not in table:
        raise ValueError(f"`reference` has no column {name!r}, only {some(table.columns)}; add it.")
    if not table.index.is_unique:
        raise ValueError("`reference` has several rows for one marker; keep one row per marker.")
    return per_marker(table[name], markers, f"reference[{name!r}]")


def reference_step(reference: Any, values: Intensities, kind: type[S]) -> tuple[S, list[Step]]:
    """The step of ``reference`` for the markers of the data, and the steps before it."""
    if not isinstance(reference, AnnData):
        raise TypeError(
            f"`reference` must be an AnnData or a DataFrame, got {type(reference).__name__}; give one of them."
        )
    steps = _steps_with(reference, values.target, kind)
    position = next(i for i, step in enumerate(steps) if isinstance(step, kind))
    step = steps[position]
    missing = [marker for marker in values.markers if marker not in set(step.markers)]
    if missing:
        raise ValueError(
            f"`reference` lacks {len(missing)} marker(s) of `adata` (first: {some(missing)}); keep the markers that both have."
        )
    assert isinstance(step, kind)
    return step.take(values.markers), steps[:position]


def _steps_with(reference: AnnData, layer: str | None, kind: type[Step]) -> list[Step]:
    """The steps of the same layer of ``reference``, or of the only one that has such a step."""
    recorded = {
        key: read_steps(reference, key) for key in (None, *(key for key in reference.layers if key is not None))
    }
    found = {key: steps for key, steps in recorded.items() if any(isinstance(step, kind) for step in steps)}
    if layer in found:
        return found[layer]
    if len(found) != 1:
        raise ValueError(
            f"`reference` has {len(found)} matrices with a recorded `{kind.function}`, and none under the name of the result "
            f"(`{'adata.X' if layer is None else layer}`); write the result to the layer that `reference` has."
        )
    return next(iter(found.values()))


def check_same_transform(before: Sequence[Step], values: Intensities) -> None:
    """The steps before scaling must agree, or the statistics mean something else."""
    theirs = {step.function: step for step in before if step.stage == Arcsinh.stage}
    ours = {step.function: step for step in values.steps if step.stage == Arcsinh.stage}
    if theirs.keys() != ours.keys():
        raise ValueError(
            f"`reference` was scaled after {some(theirs)}, `{values.where}` went through {some(ours)}; transform both in "
            "the same way."
        )
    for name, step in theirs.items():
        first, second = step.take(values.markers), ours[name].take(values.markers)
        for key, value in vars(first).items():
            # the cut is no part of the scale
            if key not in ("markers", "low") and np.any(value != getattr(second, key)):
                j = int(np.argmax(value != getattr(second, key)))
                raise ValueError(
                    f"`reference` went through `{name}` with {key}={value[j]:g} for marker {values.markers[j]!r}, "
                    f"`{values.where}` with {key}={getattr(second, key)[j]:g}; transform both with the same parameters."
                )
