"""The steps that intensities go through, each with its inverse, and the record of them that stays with the data.

``adata.uns["cellweave_transforms"]`` holds for every matrix (``"X"``, or the name of a layer) its steps in order:
``{"0": {"function": "arcsinh", "markers": [...], "cofactor": [...], ...}, "1": ...}``. It consists of texts, numbers and
arrays only, so that h5ad and zarr files keep it.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
from anndata import AnnData
from numpy.typing import NDArray

from cellweave._keys import OUTPUT_KEYS
from cellweave.io._panel import some

__all__ = ["Arcsinh", "Compensation", "Logicle", "Scaling", "Step", "check_order", "read_steps", "some", "write_steps"]

Floats = NDArray[np.float64]


@dataclasses.dataclass(frozen=True, eq=False)
class Step(ABC):
    """An invertible map of a block ``(cell, marker)`` of float64 values; it may change the block it is given."""

    markers: NDArray[np.object_]  # (marker,)

    function: ClassVar[str]  # the public function that makes the step
    stage: ClassVar[int]  # steps of one matrix come in increasing order of it

    @abstractmethod
    def apply(self, block: Floats) -> Floats:
        """The transformed block."""

    @abstractmethod
    def undo(self, block: Floats) -> Floats:
        """The block before the step."""

    def take(self, markers: Sequence[str]) -> Self:
        """The same step for other columns: some of its markers, in any order.

        Raises
        ------
        ValueError
            If it does not know a marker.
        """
        return self.at(self._positions(markers))

    def at(self, columns: NDArray[np.integer]) -> Self:
        """The same step for some of its columns, which may come more than once."""
        arrays = {name: value[columns] for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        return dataclasses.replace(self, **arrays)

    def _positions(self, markers: Sequence[str]) -> NDArray[np.int64]:
        index = {marker: i for i, marker in enumerate(self.markers)}
        unknown = [marker for marker in markers if marker not in index]
        if unknown:
            raise ValueError(
                f"The recorded `{self.function}` does not know {len(unknown)} marker(s) (first: {some(unknown)}), only "
                f"{some(self.markers)}; give values of these markers, under the names they had."
            )
        return np.array([index[marker] for marker in markers], dtype=np.int64)

    def to_record(self) -> dict[str, Any]:
        """The step as ``uns`` holds it; what is not set is left out."""
        values = {name: value for name, value in vars(self).items() if value is not None}
        return {"function": self.function, **values}


@dataclasses.dataclass(frozen=True, eq=False)
class Compensation(Step):
    """x S^-1, for the spillover S ``(emitting marker, receiving marker)``."""

    spillover: Floats
    function, stage = "compensate", 0

    def apply(self, block: Floats) -> Floats:
        """Remove what spilled over: the rows of ``block`` solve y S = x."""
        return np.asarray(np.linalg.solve(self.spillover.T, block.T).T, dtype=np.float64)

    def undo(self, block: Floats) -> Floats:
        """Let it spill again."""
        return block @ self.spillover

    def take(self, markers: Sequence[str]) -> Self:
        """The step for other columns; markers that are not in the matrix neither give nor receive.

        Raises
        ------
        ValueError
            If a marker that spills into one of them is not among them.
        """
        known = {marker: i for i, marker in enumerate(self.markers)}
        inside = [i for i, marker in enumerate(markers) if marker in known]
        rows = [known[markers[i]] for i in inside]
        absent = sorted(set(range(len(self.markers))) - set(rows))
        needed = [self.markers[i] for i in absent if np.any(self.spillover[i, rows])]
        if needed:
            raise ValueError(
                f"The recorded `compensate` cannot be undone without {len(needed)} marker(s) that spill into the given ones "
                f"(first: {some(needed)}); give values of them too."
            )
        matrix = np.eye(len(markers))
        matrix[np.ix_(inside, inside)] = self.spillover[np.ix_(rows, rows)]
        return dataclasses.replace(self, markers=np.array(markers, dtype=object), spillover=matrix)


@dataclasses.dataclass(frozen=True, eq=False)
class Arcsinh(Step):
    """arcsinh((x - translation) / cofactor)."""

    cofactor: Floats  # (marker,)
    translation: Floats  # (marker,)
    function, stage = "arcsinh", 1

    def apply(self, block: Floats) -> Floats:
        """Linear around ``translation``, logarithmic far from it."""
        block -= self.translation
        block /= self.cofactor
        return np.arcsinh(block, out=block)

    def undo(self, block: Floats) -> Floats:
        """The intensities."""
        np.sinh(block, out=block)
        block *= self.cofactor
        block += self.translation
        return block


@dataclasses.dataclass(frozen=True, eq=False)
class Logicle(Step):
    """The logicle scale without additional negative decades (a = 0), cut off below ``low``."""

    t: Floats  # (marker,): intensity at the top of the scale
    m: Floats  # (marker,): decades of the scale
    w: Floats  # (marker,): decades of its linear part
    low: Floats  # (marker,): smallest transformed value, -inf without one
    function, stage = "logicle", 1

    def apply(self, block: Floats) -> Floats:
        """One marker after the other; NaN stays NaN."""
        for j in range(block.shape[1]):
            block[:, j] = np.maximum(self.of_column(block[:, j], j), self.low[j])
        return block

    def of_column(self, values: Floats, j: int) -> Floats:
        """The scale of marker ``j`` without the cut."""
        result = self._call("logicle", values, j)
        # the compiled root finder gives up without a word near the limits of m and w; its inverse is a formula
        back = self._call("logicle_inverse", result, j)
        lost = ~np.isclose(back, values, rtol=1e-6, atol=1e-9 * self.t[j], equal_nan=True)
        if lost.any():
            result[lost] = self._bisect(values[lost], j)
        return result

    def _bisect(self, values: Floats, j: int) -> Floats:
        """The scale from its inverse, which increases; within +-8 lie more than 16 decades on both sides."""
        low, high = np.full(len(values), -8.0), np.full(len(values), 8.0)
        for _ in range(60):
            middle = (low + high) / 2
            above = self._call("logicle_inverse", middle, j) > values
            low, high = np.where(above, low, middle), np.where(above, middle, high)
        return (low + high) / 2

    def undo(self, block: Floats) -> Floats:
        """The intensities; values that were cut off come back as the intensity of the cut."""
        for j in range(block.shape[1]):
            block[:, j] = self._call("logicle_inverse", block[:, j], j)
        return block

    def _call(self, name: str, values: Floats, j: int) -> Floats:
        function = getattr(_flowutils(), name)
        # a contiguous copy, which the compiled function writes into; it would read NaN as a number
        result = function(np.ascontiguousarray(values), None, t=self.t[j], m=self.m[j], w=self.w[j], a=0)
        result[np.isnan(values)] = np.nan
        return np.asarray(result, dtype=np.float64)


def _flowutils() -> Any:
    try:
        from flowutils import transforms
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            '`logicle` needs flowutils, which is not installed; run `pip install "cellweave[cytometry]"`.'
        ) from error
    return transforms


@dataclasses.dataclass(frozen=True, eq=False)
class Scaling(Step):
    """(x - mean) / std, or x / std - 1 without a mean; cut off at ``max_value`` on both sides."""

    std: Floats  # (marker,)
    mean: Floats | None = None  # (marker,)
    max_value: float | None = None
    function, stage = "scale_markers", 2

    def apply(self, block: Floats) -> Floats:
        """Standard deviation one; without a mean, zero becomes -1."""
        if self.mean is not None:
            block -= self.mean
        block /= self.std
        if self.mean is None:
            block -= 1
        return block if self.max_value is None else np.clip(block, -self.max_value, self.max_value, out=block)

    def undo(self, block: Floats) -> Floats:
        """The values before; those that were cut off come back as the value of the cut."""
        if self.mean is None:
            block += 1
        block *= self.std
        if self.mean is not None:
            block += self.mean
        return block


_STEPS: dict[str, type[Step]] = {step.function: step for step in (Compensation, Arcsinh, Logicle, Scaling)}


# ---------------------------------------------------------------- the record


def _record_key(layer: str | None) -> str:
    """Key of a matrix in the record."""
    return "X" if layer is None else layer


def read_steps(adata: AnnData, layer: str | None) -> list[Step]:
    """The recorded steps of a matrix, in order; none if nothing is recorded.

    Raises
    ------
    ValueError
        If the record cannot be read.
    """
    key = _record_key(layer)
    try:
        records = adata.uns.get(OUTPUT_KEYS.TRANSFORMS, {}).get(key, {})
        return [_from_record(records[number]) for number in sorted(records, key=int)]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"`adata.uns[{OUTPUT_KEYS.TRANSFORMS!r}][{key!r}]` is not a record of cellweave ({error!r}); restore it, or "
            "delete it and start from untransformed values."
        ) from error


def _from_record(record: Mapping[str, Any]) -> Step:
    kind = _STEPS[str(record["function"])]
    values: dict[str, Any] = {"markers": np.array([str(marker) for marker in record["markers"]], dtype=object)}
    for field in dataclasses.fields(kind)[1:]:
        if field.name in record:
            value = np.asarray(record[field.name], dtype=np.float64)
            values[field.name] = value if value.ndim else float(value)
    return kind(**values)


def write_steps(adata: AnnData, layer: str | None, steps: Sequence[Step]) -> None:
    """Record the steps of a matrix."""
    records = {str(number): step.to_record() for number, step in enumerate(steps)}
    # a new dictionary: copies of an AnnData may share the old one
    adata.uns[OUTPUT_KEYS.TRANSFORMS] = {**adata.uns.get(OUTPUT_KEYS.TRANSFORMS, {}), _record_key(layer): records}


def check_order(adata: AnnData, layer: str | None, kind: type[Step]) -> list[Step]:
    """The recorded steps of a matrix, to which a step of this kind can be added.

    Raises
    ------
    ValueError
        If the step was made already, or comes too late.
    """
    steps = read_steps(adata, layer)
    if steps and steps[-1].stage >= kind.stage:
        where = "adata.X" if layer is None else f"adata.layers[{layer!r}]"
        key = _record_key(layer)
        raise ValueError(
            f"`{where}` went through {' and '.join(f'`{step.function}`' for step in steps)} already, after which "
            f"`{kind.function}` is not meant; start from the raw intensities, or, if the values were replaced since, forget "
            f"the record with `del adata.uns[{OUTPUT_KEYS.TRANSFORMS!r}][{key!r}]`."
        )
    return steps
