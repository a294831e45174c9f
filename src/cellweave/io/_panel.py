"""Tables of events: which columns are markers, and several files as one AnnData."""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeAlias
from uuid import uuid4

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from numpy.typing import NDArray
from scvi import settings

from cellweave.data import get_counts

__all__ = [
    "MARKER_REGEX",
    "PathLike",
    "Paths",
    "as_paths",
    "check_unique",
    "chosen_obs",
    "columns_of",
    "dense",
    "join_samples",
    "marker_columns",
    "new_file",
    "some",
]

PathLike: TypeAlias = str | os.PathLike[str]
Paths: TypeAlias = PathLike | Sequence[PathLike]
# Names of surface markers; scatter, time, beads and identifiers are none.
MARKER_REGEX = "^cd|^hla|epcam|^ccr"
# Layer that tells models which values were measured; CytoVI of scvi-tools uses the same name and values.
_MASK = "_nan_mask"


def as_paths(path: Paths) -> dict[str, Path]:
    """Existing files by the name of their sample: the file name without its ending, with the folder where needed.

    Raises
    ------
    FileNotFoundError
        If a file does not exist.
    ValueError
        If there is no file, or two are the same.
    """
    paths = [Path(one) for one in ([path] if isinstance(path, str | os.PathLike) else path)]
    if not paths:
        raise ValueError("`path` names no file; give at least one.")
    for one in paths:
        if not one.is_file():
            raise FileNotFoundError(f"`{one}` is no file; check the path.")
    names = [one.stem for one in paths]
    if len(set(names)) < len(names):
        names = [f"{one.parent.name}/{one.stem}" for one in paths]
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise ValueError(
            f"`path` has {len(repeated)} files named {repeated[0]!r}; samples are called after their files."
        )
    return dict(zip(names, paths, strict=True))


def marker_columns(
    names: Sequence[str], where: Path, marker_regex: str | None, exclude_markers: Sequence[str] | None
) -> NDArray[np.bool_]:
    """Which columns are markers ``(column,)``.

    Parameters
    ----------
    names
        Names of the columns.
    where
        The file.
    marker_regex
        Searched in the lower-cased names; None takes all.
    exclude_markers
        Names that are no markers although they match.

    Raises
    ------
    ValueError
        If the expression is not valid, an excluded name is unknown, or no column is a marker.
    """
    excluded = {exclude_markers} if isinstance(exclude_markers, str) else set(exclude_markers or ())
    unknown = sorted(excluded - set(names))
    if unknown:
        raise ValueError(
            f"`exclude_markers` names {len(unknown)} column(s) that `{where}` lacks (first: {some(unknown)}); it has "
            f"{some(names, 30)}."
        )
    try:
        pattern = re.compile(marker_regex or "")
    except re.error as error:
        raise ValueError(f"`marker_regex={marker_regex!r}` is no regular expression: {error}; correct it.") from error
    found = np.array([name not in excluded and pattern.search(name.lower()) is not None for name in names], dtype=bool)
    if not found.any():
        raise ValueError(
            f"`{where}` has no column that matches `marker_regex={marker_regex!r}`; it has {some(names, 30)}, so choose "
            "another expression, or None to read all as markers."
        )
    return found


def join_samples(samples: Mapping[str, AnnData], join: Literal["inner", "outer"]) -> AnnData:
    """Files as one AnnData with ``obs["sample"]``; one file is left as it is, apart from that column.

    Raises
    ------
    ValueError
        If the files share no marker, or have a column called ``sample``.
    """
    if join not in ("inner", "outer"):
        raise ValueError(f"`join` must be 'inner' or 'outer', got {join!r}; choose one of them.")
    for name, adata in samples.items():
        if "sample" in adata.obs:
            adata.obs = adata.obs.rename(columns={"sample": "sample_in_file"})
        adata.obs["sample"] = pd.Categorical([name] * adata.n_obs, categories=list(samples))
    if len(samples) == 1:
        return next(iter(samples.values()))
    _check_panels(samples, join)
    joined = anndata.concat(
        samples, join=join, merge="same", index_unique="-", fill_value=np.nan if join == "outer" else None
    )
    obs = pd.concat([adata.obs for adata in samples.values()])  # with the columns that only some files have
    joined.obs = obs.set_axis(joined.obs_names)
    if join == "outer":
        joined.layers[_MASK] = (~np.isnan(joined.X)).astype(np.float32)
    return joined


def _check_panels(samples: Mapping[str, AnnData], join: str) -> None:
    panels = {name: set(adata.var_names) for name, adata in samples.items()}
    shared, everything = set.intersection(*panels.values()), set.union(*panels.values())
    partial = sorted(everything - shared)
    if not shared:
        raise ValueError(
            f"The {len(samples)} files share no marker (first: {some(partial)}); read them one by one and rename the markers."
        )
    if partial and join == "inner":
        lacking = next(name for name, panel in panels.items() if partial[0] not in panel)
        warnings.warn(
            f"{len(partial)} marker(s) are not in all files and are left out (first: {partial[0]!r}, which {lacking!r} lacks); "
            f'`join="outer"` keeps them, with NaN and the layer {_MASK!r} where they were not measured.',
            UserWarning,
            stacklevel=settings.warnings_stacklevel,
        )


# ---------------------------------------------------------------- writing


def dense(adata: AnnData, layer: str | None) -> NDArray[Any]:
    """``X`` or a layer as an array ``(cell, marker)`` in memory.

    Raises
    ------
    KeyError
        If there is no such layer.
    """
    x = get_counts(adata, layer)[:]
    return x.toarray() if sp.issparse(x) else np.asarray(x)


def columns_of(adata: AnnData, obsm_keys: Sequence[str]) -> pd.DataFrame:
    """Columns of ``obsm`` under the names ``{key}{number}``, or ``{key}_{column}`` where they have names.

    Raises
    ------
    KeyError
        If a key is missing.
    """
    parts = [pd.DataFrame(index=adata.obs_names)]
    for key in obsm_keys:
        if key not in adata.obsm:
            raise KeyError(f"`obsm_keys` names {key!r}, which `adata.obsm` lacks; it has {some(adata.obsm)}.")
        values = adata.obsm[key]
        if not isinstance(values, pd.DataFrame):
            values = values.toarray() if sp.issparse(values) else values
            names = [f"{key}{i + 1}" for i in range(values.shape[1])]
            parts.append(pd.DataFrame(values, index=adata.obs_names, columns=names))
        else:
            parts.append(values.rename(columns=lambda name, key=key: f"{key}_{name}"))
    return pd.concat(parts, axis=1)


def chosen_obs(adata: AnnData, obs_columns: Sequence[str]) -> pd.DataFrame:
    """Some columns of ``obs``.

    Raises
    ------
    KeyError
        If one is missing.
    """
    missing = [name for name in obs_columns if name not in adata.obs]
    if missing:
        raise KeyError(
            f"`obs_columns` names {some(missing)}, which `adata.obs` lacks; it has {some(adata.obs.columns)}."
        )
    check_unique(list(obs_columns), "columns")
    return adata.obs[list(obs_columns)]


def check_unique(names: Sequence[str], what: str) -> None:
    """Check that a file gets every name once.

    Raises
    ------
    ValueError
        If a name comes twice.
    """
    repeated = [name for name, n in Counter(names).items() if n > 1]
    if repeated:
        raise ValueError(
            f"{len(repeated)} {what} would come more than once in the file (first: {some(repeated)}); rename the markers, or "
            "leave out columns with `obs_columns` and `obsm_keys`."
        )


@contextmanager
def new_file(path: PathLike, overwrite: bool) -> Iterator[Path]:
    """A hidden file beside ``path`` to write into; it takes the name at the end, if nothing failed.

    Raises
    ------
    FileExistsError
        If there is a file and ``overwrite`` is false.
    """
    target = Path(path)
    if target.exists() and (not overwrite or not target.is_file()):
        raise FileExistsError(f"`{target}` already exists; pass `overwrite=True` to replace a file.")
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.with_name(f".{target.name}.{uuid4().hex[:8]}")
    try:
        yield staging
        staging.replace(target)
    finally:
        staging.unlink(missing_ok=True)


def some(names: Any, n: int = 5) -> str:
    """The first few names, for a message."""
    listed = [repr(str(name)) for name in list(names)[: n + 1]]
    return ", ".join(listed[:n]) + (", ..." if len(listed) > n else "") if listed else "nothing"
