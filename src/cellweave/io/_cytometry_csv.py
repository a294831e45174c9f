"""Events as text tables: one row per cell, one column per channel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from anndata import AnnData

from ._panel import (
    MARKER_REGEX,
    PathLike,
    Paths,
    as_paths,
    check_unique,
    chosen_obs,
    columns_of,
    dense,
    join_samples,
    marker_columns,
    new_file,
)

__all__ = ["read_cytometry_csv", "write_cytometry_csv"]

# Later versions of pandas read all digits by themselves, and deprecate the argument.
_ALL_DIGITS: dict[str, Any] = {"float_precision": "round_trip"} if int(pd.__version__.split(".")[0]) < 3 else {}


def read_cytometry_csv(
    path: Paths,
    marker_regex: str | None = MARKER_REGEX,
    exclude_markers: Sequence[str] | None = None,
    sep: str = ",",
    join: Literal["inner", "outer"] = "inner",
) -> AnnData:
    """Read tables of events: markers become ``X``, all other columns go to ``obs``.

    Parameters
    ----------
    path
        A file with a header line, or several whose events are put below each other. A first column without a name holds
        the names of the cells.
    marker_regex
        A column is a marker if this expression is found in its lower-cased name. The default knows CD, HLA and CCR names
        and EpCAM; None takes all columns.
    exclude_markers
        Names of columns that are no markers although they match.
    sep
        What separates columns.
    join
        As in :func:`~cellweave.io.read_fcs`.

    Returns
    -------
    AnnData
        ``X``: float32 (event, marker), NaN where the table has no value. ``obs``: the other columns and ``sample``, the name
        of the file.

    Raises
    ------
    FileNotFoundError
        If a file does not exist.
    ValueError
        If a file has no header, no marker or no event, repeats a column, or has text in a marker.
    """
    samples = {name: _read(file, marker_regex, exclude_markers, sep) for name, file in as_paths(path).items()}
    return join_samples(samples, join)


def _read(file: Path, marker_regex: str | None, exclude_markers: Sequence[str] | None, sep: str) -> AnnData:
    names = _header(file, sep)
    try:
        # nothing but an empty field is missing: "NA" may be a label, and in a marker it is text
        table = pd.read_csv(
            file, sep=sep, header=None, skiprows=1, names=names, keep_default_na=False, na_values=[""], index_col=False,
            low_memory=False, **_ALL_DIGITS,
        )  # fmt: skip
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"`{file}` is no table separated by {sep!r} ({error}); check `sep` and the file.") from error
    if table.empty:
        raise ValueError(f"`{file}` holds no events; leave it out.")
    if names[0] == "":
        table = table.set_index(table.pop("").astype(str))
    table.index = pd.Index([str(name) for name in table.index])
    is_marker = marker_columns(list(table.columns), file, marker_regex, exclude_markers)
    markers = table.loc[:, is_marker]
    _check_numbers(markers, file)
    return AnnData(
        markers.to_numpy(dtype=np.float32), obs=table.loc[:, ~is_marker], var=pd.DataFrame(index=markers.columns)
    )


def _header(file: Path, sep: str) -> list[str]:
    """Names of the columns; pandas would rename those that come twice."""
    try:
        header = pd.read_csv(file, sep=sep, header=None, nrows=1, dtype=str, keep_default_na=False)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ValueError(f"`{file}` is no table separated by {sep!r} ({error}); check `sep` and the file.") from error
    names = [str(name).strip() for name in header.iloc[0]]
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise ValueError(f"`{file}` has {names.count(repeated[0])} columns named {repeated[0]!r}; rename them.")
    return names


def _check_numbers(markers: pd.DataFrame, file: Path) -> None:
    for name in markers:
        if not pd.api.types.is_numeric_dtype(markers[name]):
            numbers = pd.to_numeric(markers[name], errors="coerce")
            bad = numbers.isna() & markers[name].notna()
            row = int(np.argmax(bad))
            raise ValueError(
                f"`{file}` has {int(bad.sum())} value(s) in marker {name!r} that are no numbers (first: "
                f"{markers[name].iloc[row]!r} in line {row + 2}); correct them, or leave the column out of the markers with "
                "`exclude_markers`."
            )


def write_cytometry_csv(
    adata: AnnData,
    path: PathLike,
    layer: str | None = None,
    obs_columns: Sequence[str] | None = None,
    obsm_keys: Sequence[str] = (),
    sep: str = ",",
    overwrite: bool = False,
) -> None:
    """Write cells as a table that :func:`~cellweave.io.read_cytometry_csv` reads; numbers keep all their digits.

    Parameters
    ----------
    adata
        Cells x markers; nothing is written into it.
    path
        The file, which appears when it is complete.
    layer
        Layer with the values; ``adata.X`` by default.
    obs_columns
        Columns of ``obs`` to write; all by default.
    obsm_keys
        Entries of ``obsm`` to write, under the names ``{key}1``, ``{key}2``, ... (``{key}_{column}`` for DataFrames).
    sep
        What separates columns.
    overwrite
        Replace a file.

    Raises
    ------
    FileExistsError
        If there is a file and ``overwrite`` is false.
    KeyError
        If there is no such layer, column or entry.
    ValueError
        If column names come twice.
    """
    x = pd.DataFrame(dense(adata, layer), index=adata.obs_names, columns=adata.var_names)
    obs = chosen_obs(adata, list(adata.obs.columns) if obs_columns is None else obs_columns)
    table = pd.concat([x, obs, columns_of(adata, obsm_keys)], axis=1)
    check_unique([str(name) for name in table.columns], "column names")
    with new_file(path, overwrite) as staging:
        table.to_csv(staging, sep=sep, index_label="")
