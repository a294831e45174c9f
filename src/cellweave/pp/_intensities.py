"""A matrix of intensities: checked, read column by column or block by block, and replaced as a whole."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from numpy.typing import NDArray

from cellweave.data import get_counts

from ._transforms import Step, check_order, read_steps, some, write_steps

__all__ = ["Intensities", "blocks", "check_matrix", "per_marker", "precision"]

logger = logging.getLogger(__name__)

Floats = NDArray[np.float64]
# Values that are in memory in float64 at a time.
_BLOCK_VALUES = 2**20


class Intensities:
    """The matrix that a function transforms, checked before anything is written.

    Parameters
    ----------
    adata
        The user's data.
    layer
        Layer to transform; ``X`` by default.
    key_added
        Layer that gets the result; the matrix itself by default.
    kind
        Step that will be made; its place among the recorded ones is checked.
    allow_nan
        Accept NaN.

    Raises
    ------
    KeyError
        If there is no such layer.
    TypeError
        If ``adata`` is no AnnData, or the matrix holds no numbers.
    ValueError
        If the data cannot be transformed in place, were transformed already, or have values that are no numbers.
    """

    def __init__(
        self, adata: AnnData, layer: str | None, key_added: str | None, kind: type[Step], allow_nan: bool = False
    ) -> None:
        _check_object(adata)
        for name, key in (("layer", layer), ("key_added", key_added)):
            if key is not None and (not isinstance(key, str) or key in ("", "X")):
                raise ValueError(
                    f"`{name}={key!r}` cannot name a layer here; give another text, or None for `adata.X`."
                )
        self.adata, self.layer, self.kind = adata, layer, kind
        self.target = layer if key_added is None else key_added
        self.x = get_counts(adata, layer)
        self.where = "adata.X" if layer is None else f"adata.layers[{layer!r}]"
        self.markers = [str(name) for name in adata.var_names]
        self.steps = check_order(adata, layer, kind)
        _check_target(adata, layer, self.target)
        check_matrix(self.x, self.where)
        self._check_values(allow_nan)

    def columns(self) -> Iterator[tuple[int, Floats]]:
        """The values of one marker after the other, in float64, without NaN."""
        x = self.x.tocsc() if sp.issparse(self.x) else self.x
        for j in range(x.shape[1]):
            column = x[:, [j]].toarray()[:, 0] if sp.issparse(x) else x[:, j]
            values = np.asarray(column, dtype=np.float64)
            yield j, values[~np.isnan(values)]

    def replace(self, step: Step, keep_sparse: bool = False) -> None:
        """Write the transformed matrix as a new array, and the record of the step.

        Parameters
        ----------
        step
            The step.
        keep_sparse
            The step leaves zeros as they are, so that a sparse matrix can stay sparse.
        """
        aligned = step.take(self.markers)
        is_sparse = sp.issparse(self.x)
        result = _sparse(self.x, aligned) if is_sparse and keep_sparse else self._dense(aligned)
        if self.target is None:
            self.adata.X = result
        else:
            self.adata.layers[self.target] = result
        write_steps(self.adata, self.target, [*self.steps, step])

    def _dense(self, step: Step) -> NDArray[Any]:
        if sp.issparse(self.x):
            logger.info(
                "%s is sparse and becomes dense (%.2g GB): `%s` does not keep zeros.",
                self.where,
                np.prod(self.x.shape) * precision(self.x).itemsize / 1e9,
                step.function,
            )
        # never into the array that is there: other layers, or variables of the user, may be the same memory
        out = np.empty(self.x.shape, dtype=precision(self.x))
        for start, block in blocks(self.x):
            out[start : start + len(block)] = step.apply(block)
        return out

    def _check_values(self, allow_nan: bool) -> None:
        for start, block in blocks(self.x):
            bad = np.isinf(block) if allow_nan else ~np.isfinite(block)
            if bad.any():
                row, column = np.unravel_index(int(np.argmax(bad)), bad.shape)
                advice = "remove or repair them" if allow_nan else "remove them, or see `allow_nan`"
                raise ValueError(
                    f"`{self.where}` has {int(bad.sum())} value(s) that are NaN or infinite in cells {start} to "
                    f"{start + len(block) - 1} (first: cell {str(self.adata.obs_names[start + row])!r}, marker "
                    f"{self.markers[column]!r}); {advice}."
                )


def per_marker(value: Any, markers: list[str], argument: str) -> Floats:
    """One finite number per marker, from one number for all or a number by name.

    Raises
    ------
    ValueError
        If it lacks markers, or is not a finite number.
    """
    if isinstance(value, pd.Series):
        value = value.to_dict()
    if isinstance(value, Mapping):
        missing = [marker for marker in markers if marker not in value]
        if missing:
            raise ValueError(
                f"`{argument}` has no value for {len(missing)} marker(s) (first: {some(missing)}); give one number for all, "
                "or one for each marker."
            )
        value = [value[marker] for marker in markers]
    try:
        numbers = np.array(np.broadcast_to(np.asarray(value, dtype=np.float64), (len(markers),)))
    except (TypeError, ValueError) as error:
        raise ValueError(f"`{argument}={value!r}` is not a number; give one number, or one by marker name.") from error
    if not np.isfinite(numbers).all():
        first = markers[int(np.argmin(np.isfinite(numbers)))]
        raise ValueError(f"`{argument}` is NaN or infinite for marker {first!r}; give a finite number.")
    return numbers


# ---------------------------------------------------------------- checks


def _check_object(adata: Any) -> None:
    if not isinstance(adata, AnnData):
        raise TypeError(
            f"`adata` must be an AnnData, got {type(adata).__name__}; of a MuData give one modality, such as `mdata['prot']`."
        )
    if adata.is_view:
        raise ValueError("`adata` is a view of another AnnData; run `adata = adata.copy()` first.")
    if adata.isbacked:
        raise ValueError(
            f"`adata` is backed by the file {str(adata.filename)!r}, which is not changed; run `adata = "
            "adata.to_memory()` first."
        )
    if adata.n_obs == 0 or adata.n_vars == 0:
        raise ValueError(f"`adata` has no cells or no markers (shape {adata.shape}); check the filters applied to it.")
    repeated = adata.var_names[adata.var_names.duplicated()].unique()
    if len(repeated):
        raise ValueError(
            f"`adata.var_names` repeats {len(repeated)} marker name(s) (first: {some(repeated)}); markers are known by "
            "name, so run `adata.var_names_make_unique()`."
        )


def _check_target(adata: AnnData, layer: str | None, target: str | None) -> None:
    if target is not None and target != layer and target in adata.layers and not read_steps(adata, target):
        raise ValueError(
            f"`adata.layers[{target!r}]` already exists and was not written by this package; choose another `key_added` "
            "or delete the layer."
        )


def check_matrix(x: Any, where: str) -> None:
    if not (isinstance(x, np.ndarray) or sp.issparse(x)):
        raise TypeError(f"`{where}` is held by {type(x).__name__}; load it into memory as a numpy or scipy array.")
    if x.dtype.kind not in "fiu":
        raise TypeError(f"`{where}` holds values of type {x.dtype}; give real numbers.")


# ---------------------------------------------------------------- reading and writing


def precision(x: Any) -> np.dtype:
    """Results are float32, and float64 where the values were."""
    return np.dtype(np.float64 if x.dtype == np.float64 else np.float32)


def blocks(x: Any) -> Iterator[tuple[int, Floats]]:
    """Blocks of cells as new float64 arrays, each with the number of its first cell."""
    x = x.tocsr() if sp.issparse(x) else x
    step = max(1, _BLOCK_VALUES // max(1, x.shape[1]))
    for start in range(0, x.shape[0], step):
        block = x[start : start + step]
        yield start, np.array(block.toarray() if sp.issparse(block) else block, dtype=np.float64)


def _sparse(x: Any, step: Step) -> Any:
    """The entries of a sparse matrix transformed, in its own format."""
    result = x.tocsr(copy=True)
    result.sum_duplicates()
    data = np.empty(result.nnz, dtype=precision(x))
    for start in range(0, result.nnz, _BLOCK_VALUES):
        part = slice(start, start + _BLOCK_VALUES)
        values = result.data[part].astype(np.float64)
        # every entry is a block of one cell and one marker, side by side
        data[part] = step.at(result.indices[part]).apply(values[None])[0]
    result.data = data
    return result.asformat(x.format)
