"""Removing the light of one fluorochrome from the detectors of the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray

from ._intensities import Intensities
from ._transforms import Compensation, some

__all__ = ["compensate"]

_KEY = "spillover"
# Above this condition number, digits of float32 intensities are lost altogether.
_MAX_CONDITION = 1e7


def compensate(
    adata: AnnData,
    spillover: pd.DataFrame | str | None = None,
    layer: str | None = None,
    key_added: str | None = None,
) -> None:
    """Compensate fluorescence intensities: X S^-1 for the spillover matrix S.

    A row of S is a fluorochrome, a column a detector, and the diagonal is 1, as in FCS files and flowCore: what is
    measured is the true signal times S.

    Parameters
    ----------
    adata
        Cells x markers, with intensities as they were measured. A sparse matrix becomes dense.
    spillover
        Spillover with the same names as index and columns: ``var_names``, or the detectors in ``adata.var["channel"]``.
        Or a key of ``adata.varp`` or ``adata.uns``. By default the key ``"spillover"``, where
        :func:`~cellweave.io.read_fcs` puts the matrix of the file. Markers that it does not name stay as they are.
    layer
        Layer to compensate; ``adata.X`` by default.
    key_added
        Layer for the result; the compensated matrix itself by default.

    Returns
    -------
    Nothing. Writes the values (float32, float64 where they were) and, for
    :func:`~cellweave.pp.inverse_transform`, the matrix to ``adata.uns["cellweave_transforms"]``.

    Raises
    ------
    KeyError
        If there is no such layer or spillover.
    TypeError
        If ``adata`` is no AnnData or holds no numbers, or ``spillover`` is no table.
    ValueError
        If the spillover is not square, not finite, singular, in percent, or names other channels, if a value is NaN or
        infinite, if ``adata`` is a view or backed, or if the matrix was transformed already. Nothing is written then.
    """
    values = Intensities(adata, layer, key_added, Compensation)
    table = _table(adata, spillover)
    names = _as_markers(adata, [str(name) for name in table.columns])
    matrix = _checked(table)
    values.replace(Compensation(np.array(names, dtype=object), matrix))


def _table(adata: AnnData, spillover: Any) -> pd.DataFrame:
    if isinstance(spillover, pd.DataFrame):
        return spillover
    if spillover is not None and not isinstance(spillover, str):
        raise TypeError(
            f"`spillover` must be a DataFrame or a key, got {type(spillover).__name__}; name the channels of an array with "
            "`pd.DataFrame(array, index=names, columns=names)`."
        )
    key = _KEY if spillover is None else spillover
    if key in adata.varp:
        matrix = adata.varp[key]
        matrix = matrix.toarray() if hasattr(matrix, "toarray") else matrix
        return pd.DataFrame(np.asarray(matrix), index=adata.var_names, columns=adata.var_names)
    if key not in adata.uns:
        raise KeyError(
            f"`spillover={key!r}` is neither in `adata.varp` nor in `adata.uns`; give the matrix as a DataFrame, or skip "
            "compensation if the data need none."
        )
    return _of_uns(adata.uns[key], key)


def _of_uns(stored: Any, key: str) -> pd.DataFrame:
    if isinstance(stored, pd.DataFrame):
        return stored
    if not isinstance(stored, Mapping) or not {"channels", "matrix"} <= stored.keys():
        raise TypeError(
            f"`adata.uns[{key!r}]` must be a DataFrame, or hold `channels` and `matrix` as `read_fcs` writes them, got "
            f"{type(stored).__name__}; give the matrix as a DataFrame."
        )
    channels = [str(channel) for channel in stored["channels"]]
    matrix = np.asarray(stored["matrix"])
    if matrix.shape != (len(channels),) * 2:
        raise ValueError(
            f"`adata.uns[{key!r}]` has {len(channels)} channels and a matrix of shape {matrix.shape}; give one row and column "
            "per channel."
        )
    return pd.DataFrame(matrix, index=channels, columns=channels)


def _as_markers(adata: AnnData, names: list[str]) -> list[str]:
    """The markers that the names of a spillover mean; detectors are translated."""
    markers = [str(name) for name in adata.var_names]
    known = {name: name for name in markers}
    if "channel" in adata.var:
        known = {**dict(zip(adata.var["channel"].astype(str), markers, strict=True)), **known}
    missing = [name for name in names if name not in known]
    if missing:
        raise ValueError(
            f"`spillover` names {len(missing)} channel(s) that are neither in `adata.var_names` nor in `adata.var['channel']` "
            f"(first: {some(missing)}); read all its channels as markers, or leave them out of the matrix if they were not "
            "used."
        )
    return [known[name] for name in names]


def _checked(table: pd.DataFrame) -> NDArray[np.float64]:
    """The matrix with rows in the order of its columns."""
    if table.shape[0] != table.shape[1] or table.empty:
        raise ValueError(f"`spillover` must be square, got shape {table.shape}; give one row and column per channel.")
    rows, columns = table.index.astype(str), table.columns.astype(str)
    repeated = columns[columns.duplicated()]
    if len(repeated):
        raise ValueError(f"`spillover` names channel {repeated[0]!r} more than once; keep one row and column of it.")
    if set(rows) != set(columns):
        raise ValueError(
            f"`spillover` has other names in its rows than in its columns (first: {some(sorted(set(rows) ^ set(columns)))}); "
            "name both alike."
        )
    try:
        matrix = table.set_axis(rows, axis=0).loc[columns].to_numpy(dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`spillover` holds something that is no number ({error}); give fractions.") from error
    if not np.isfinite(matrix).all():
        row, column = np.argwhere(~np.isfinite(matrix))[0]
        raise ValueError(
            f"`spillover` is NaN or infinite from {columns[row]!r} into {columns[column]!r}; fill in 0 for no spillover."
        )
    _check_solvable(matrix, columns)
    return matrix


def _check_solvable(matrix: NDArray[np.float64], names: pd.Index) -> None:
    other = np.flatnonzero(np.abs(np.diag(matrix) - 1) > 1e-3)
    if len(other):
        raise ValueError(
            f"`spillover` must be 1 on its diagonal, got {matrix[other[0], other[0]]:g} for {names[other[0]]!r}; divide each "
            "row by its diagonal (percentages by 100)."
        )
    condition = np.linalg.cond(matrix)
    if not condition < _MAX_CONDITION:
        raise ValueError(
            f"`spillover` is singular (condition number {condition:.1g}), so that the signals cannot be told apart; look for "
            "two rows that are alike."
        )
