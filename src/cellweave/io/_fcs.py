"""FCS files of cytometers, read and written by flowio."""

from __future__ import annotations

import json
import re
import struct
import warnings
from array import array
from collections.abc import Mapping, Sequence
from importlib import import_module
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray
from scvi import settings

from cellweave._keys import OUTPUT_KEYS

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

__all__ = ["read_fcs", "write_fcs"]

_SPILLOVER, _KEYWORDS = "spillover", "fcs"
# Lowest or highest byte first; mixed orders belong to machines of the past.
_BYTE_ORDERS = ("1,2,3,4", "4,3,2,1", "1,2", "2,1")


def read_fcs(
    path: Paths,
    marker_regex: str | None = MARKER_REGEX,
    exclude_markers: Sequence[str] | None = None,
    channel_suffix: Literal["S", "N"] = "S",
    join: Literal["inner", "outer"] = "inner",
    ignore_offsets: bool = False,
) -> AnnData:
    """Read FCS files (2.0 to 3.1): markers become ``X``, all other channels columns of ``obs``.

    Needs ``pip install "cellweave[cytometry]"``.

    Parameters
    ----------
    path
        A file, or several whose events are put below each other.
    marker_regex
        A channel is a marker if this expression is found in its lower-cased name. The default knows CD, HLA and CCR names
        and EpCAM; None takes all channels.
    exclude_markers
        Names of channels that are no markers although they match.
    channel_suffix
        ``"S"``: channels are called by their description (``$PnS``), or by their detector (``$PnN``) where that is missing or
        not unique. ``"N"``: by their detector.
    join
        Of files with different markers keep those that all have (``"inner"``, with a warning), or all of them (``"outer"``):
        then ``X`` is NaN where a marker was not measured, and the layer ``"_nan_mask"`` is 0 there and 1 elsewhere.
    ignore_offsets
        Read files whose header gives a wrong place of the data, as some programs write it.

    Returns
    -------
    AnnData
        ``X``: float32 (event, marker), on a linear scale: logarithmic amplification and gain are undone as the standard says.
        ``obs``: the other channels (time in seconds where the file has a time step) and ``sample``, the name of the file
        (a channel of that name becomes ``sample_in_file``). ``var["channel"]``: detectors. ``varp["spillover"]``: spillover (row: fluorochrome, column: detector), if the file
        has one and all its channels are markers; otherwise ``uns["spillover"]`` with ``channels`` and ``matrix``.
        ``uns["fcs"]``: ``sample`` and ``keywords``, the keywords of each file as JSON.

    Raises
    ------
    FileNotFoundError
        If a file does not exist.
    ModuleNotFoundError
        If ``flowio`` is not installed.
    ValueError
        If a file is no FCS file, or damaged, or holds no marker or no event.

    Examples
    --------
    >>> adata = cw.io.read_fcs(["a.fcs", "b.fcs"], exclude_markers=["CD235a"])
    >>> cw.pp.arcsinh(adata, cofactor=5)
    """
    if channel_suffix not in ("S", "N"):
        raise ValueError(f"`channel_suffix` must be 'S' or 'N', got {channel_suffix!r}; choose one of them.")
    samples, spillovers, keywords = {}, {}, []
    for name, file in as_paths(path).items():
        flow = _open(file, ignore_offsets)
        samples[name] = _events(flow, file, marker_regex, exclude_markers, channel_suffix)
        spillovers[name] = _spillover(flow, file)
        keywords.append(json.dumps(flow.text))
    adata = join_samples(samples, join)
    adata.uns[_KEYWORDS] = {"sample": np.array(list(samples)), "keywords": np.array(keywords)}
    _add_spillover(adata, spillovers)
    return adata


def _extra(name: str) -> Any:
    """A module of the extra `cytometry`."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'FCS files need {name}, which is not installed; run `pip install "cellweave[cytometry]"`.'
        ) from error


def _open(file: Path, ignore_offsets: bool) -> Any:
    """The file as flowio reads it, complete."""
    flowio = _extra("flowio")
    with file.open("rb") as handle:
        start = handle.read(3)
        if start != b"FCS":
            raise ValueError(f"`{file}` is no FCS file: it begins with {start!r} instead of b'FCS'; check the path.")
        try:
            flow = flowio.FlowData(handle, ignore_offset_error=ignore_offsets, ignore_offset_discrepancy=ignore_offsets)
        except flowio.exceptions.DataOffsetDiscrepancyError as error:
            raise ValueError(
                f"`{file}` contradicts itself about the place of its data ({error}); take another copy, or read it with "
                "`ignore_offsets=True` and look at the values."
            ) from error
        except flowio.exceptions.MultipleDataSetsError as error:
            raise ValueError(f"`{file}` holds several data sets; write each to a file of its own first.") from error
        # what the parser raises where bytes are missing or make no sense
        except (
            flowio.exceptions.FlowIOException, ValueError, KeyError, IndexError, TypeError, EOFError, OSError,
            OverflowError, MemoryError, NotImplementedError, ZeroDivisionError, struct.error, re.error,
        ) as error:  # fmt: skip
            raise ValueError(f"`{file}` is damaged or incomplete ({error!r}); take another copy.") from error
    _check_complete(flow, file)
    return flow


def _check_complete(flow: Any, file: Path) -> None:
    order, mode = flow.text["byteord"].replace(" ", ""), flow.text["mode"].strip().upper()
    if order not in _BYTE_ORDERS or mode != "L":
        raise ValueError(
            f"`{file}` has the byte order {order!r} and the mode {mode!r}, which cannot be read; save it again as a list of "
            "events with a newer program."
        )
    n_values, n_channels = 0 if flow.events is None else len(flow.events), len(flow.pnn_labels)
    if flow.channel_count != n_channels or n_values != n_channels * flow.event_count:
        raise ValueError(
            f"`{file}` is damaged or incomplete: it announces {flow.event_count} events of {flow.channel_count} channels and "
            f"holds {n_values} values of {n_channels} channels; take another copy."
        )
    if flow.event_count == 0 or n_channels == 0:
        raise ValueError(f"`{file}` holds no events; leave it out.")


def _events(
    flow: Any, file: Path, marker_regex: str | None, exclude_markers: Sequence[str] | None, channel_suffix: str
) -> AnnData:
    channels = [label.strip() for label in flow.pnn_labels]
    names = _names(channels, [label.strip() for label in flow.pns_labels] if channel_suffix == "S" else channels, file)
    is_marker = marker_columns(names, file, marker_regex, exclude_markers)
    values = _linear(flow, file)
    others = {names[j]: values[:, j].copy() for j in np.flatnonzero(~is_marker)}
    return AnnData(
        np.ascontiguousarray(values[:, is_marker], dtype=np.float32),
        obs=pd.DataFrame(others, index=[str(i) for i in range(len(values))]),
        var=pd.DataFrame(
            {"channel": np.array(channels, dtype=object)[is_marker]},
            index=[name for name, there in zip(names, is_marker, strict=True) if there],
        ),
    )


def _names(channels: list[str], labels: list[str], file: Path) -> list[str]:
    """Descriptions of the channels, and detectors where these are missing or not unique."""
    names = [
        label if label and labels.count(label) == 1 else channel
        for channel, label in zip(channels, labels, strict=True)
    ]
    if len(set(names)) < len(names):  # a description that is the detector of another channel
        names = channels
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise ValueError(
            f"`{file}` names several channels {repeated[0]!r}; rename them in the program that wrote the file."
        )
    return names


def _linear(flow: Any, file: Path) -> NDArray[Any]:
    """Values ``(event, channel)``; float64 copies are made only where something has to be computed."""
    is_linear = all(c["pne"][0] <= 0 and c["png"] in (0.0, 1.0) for c in flow.channels.values())
    if is_linear and not ("timestep" in flow.text and flow.time_index is not None):
        return np.asarray(flow.events).reshape(-1, flow.channel_count)
    try:
        with np.errstate(divide="raise"):  # a range of zero
            return flow.as_array()
    except (ValueError, ArithmeticError) as error:
        raise ValueError(f"`{file}` describes its channels wrongly ({error}); take another copy.") from error


# ---------------------------------------------------------------- spillover


def _spillover(flow: Any, file: Path) -> tuple[list[str], NDArray[np.float64]] | None:
    text = next((flow.text[key] for key in ("spillover", "spill", "comp") if flow.text.get(key, "").strip()), None)
    if text is None:
        return None
    compensate = _extra("flowutils.compensate")
    try:
        matrix, channels = compensate.get_spill(text)
    except (ValueError, IndexError) as error:
        warnings.warn(
            f"The spillover of `{file}` cannot be read ({error}) and is left out; give it to `cellweave.pp.compensate`.",
            UserWarning,
            stacklevel=settings.warnings_stacklevel,
        )
        return None
    return channels, matrix


def _add_spillover(adata: AnnData, spillovers: Mapping[str, tuple[list[str], NDArray[np.float64]] | None]) -> None:
    distinct = {None if s is None else (tuple(s[0]), s[1].tobytes()) for s in spillovers.values()}
    if len(distinct) > 1:
        warnings.warn(
            f"The {len(spillovers)} files have {len(distinct)} different spillovers, of which none is kept; read and compensate "
            "each file before putting them together.",
            UserWarning,
            stacklevel=settings.warnings_stacklevel,
        )
        return
    first = next(iter(spillovers.values()))
    if first is None:
        return
    channels, matrix = first
    where = {
        channel: i for i, channel in enumerate(adata.var["channel"] if "channel" in adata.var else adata.var_names)
    }
    if not set(channels) <= where.keys():
        adata.uns[_SPILLOVER] = {"channels": np.array(channels), "matrix": matrix}
        return
    whole = np.eye(adata.n_vars)
    positions = [where[channel] for channel in channels]
    whole[np.ix_(positions, positions)] = matrix
    adata.varp[_SPILLOVER] = whole


# ---------------------------------------------------------------- writing


def write_fcs(
    adata: AnnData,
    path: PathLike,
    layer: str | None = None,
    obs_columns: Sequence[str] | None = None,
    obsm_keys: Sequence[str] = (),
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> dict[str, dict[str, int]]:
    """Write cells as an FCS 3.1 file of 32-bit floats: markers, columns of ``obs``, and columns of ``obsm``.

    The file appears when it is complete. A spillover in ``varp["spillover"]`` is written with intensities that were not
    transformed. Needs ``pip install "cellweave[cytometry]"``.

    Parameters
    ----------
    adata
        Cells x markers; nothing is written into it.
    path
        The file.
    layer
        Layer with the values; ``adata.X`` by default.
    obs_columns
        Columns to write; by default those with numbers. Others, such as labels, are written as numbers if they are named
        here.
    obsm_keys
        Entries of ``obsm`` to write, under the names ``{key}1``, ``{key}2``, ... (``{key}_{column}`` for DataFrames).
    metadata
        More keywords of the file, for example ``{"$CYT": "my cytometer"}``.
    overwrite
        Replace a file.

    Returns
    -------
    For every column of labels the number that stands for each label; missing labels are NaN in the file.

    Raises
    ------
    FileExistsError
        If there is a file and ``overwrite`` is false.
    KeyError
        If there is no such layer, column or entry.
    ModuleNotFoundError
        If ``flowio`` is not installed.
    ValueError
        If names come twice, or cannot be written in an FCS file.
    """
    obs = chosen_obs(adata, _numeric(adata.obs) if obs_columns is None else obs_columns)
    coded, codes = _coded(obs)
    others = pd.concat([coded, columns_of(adata, obsm_keys)], axis=1)
    x = dense(adata, layer)
    values = np.empty((x.shape[0], x.shape[1] + others.shape[1]), dtype=np.float32)
    values[:, : x.shape[1]] = x
    values[:, x.shape[1] :] = others.to_numpy(dtype=np.float64)
    _warn_rounding(others, values[:, x.shape[1] :])
    labels = [*map(str, adata.var_names), *map(str, others.columns)]
    detectors = adata.var["channel"] if "channel" in adata.var else adata.var_names
    # a comma would end the name in a spillover matrix
    channels = [str(name).replace(",", "_") for name in (*detectors, *others.columns)]
    check_unique(labels, "names")
    check_unique(channels, "detectors")
    text = {**_ranges(values), **_spillover_text(adata, layer, channels), **(metadata or {})}
    with new_file(path, overwrite) as staging:
        _write(staging, values, channels, labels, text)
    return codes


def _numeric(obs: pd.DataFrame) -> list[str]:
    return [name for name in obs if pd.api.types.is_numeric_dtype(obs[name])]


def _coded(obs: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, dict[str, int]]]:
    """Columns as numbers, and what the numbers of labels mean."""
    columns, codes = {}, {}
    for name in obs:
        if pd.api.types.is_numeric_dtype(obs[name]):
            columns[name] = obs[name].astype(np.float64)
            continue
        category = obs[name].astype("category").cat
        codes[str(name)] = {str(label): i for i, label in enumerate(category.categories)}
        columns[name] = category.codes.astype(np.float64).where(category.codes >= 0)
    return pd.DataFrame(columns, index=obs.index), codes


def _warn_rounding(others: pd.DataFrame, written: NDArray[np.float32]) -> None:
    rounded = [
        name
        for j, name in enumerate(others)
        if ((others[name] % 1 == 0) & (written[:, j].astype(np.float64) != others[name].to_numpy())).any()
    ]
    if rounded:
        warnings.warn(
            f"{len(rounded)} column(s) hold whole numbers that 32-bit floats round (first: {rounded[0]!r}); leave them out with "
            "`obs_columns` if they are identifiers.",
            UserWarning,
            stacklevel=settings.warnings_stacklevel,
        )


def _ranges(values: NDArray[np.float32]) -> dict[str, str]:
    """``$PnR``: some readers cut off what is larger."""
    top = np.fmax.reduce(np.where(np.isfinite(values), values, 0), axis=0, initial=0)
    return {f"P{j + 1}R": str(int(np.ceil(value)) + 1) for j, value in enumerate(top)}


def _spillover_text(adata: AnnData, layer: str | None, channels: list[str]) -> dict[str, str]:
    key = "X" if layer is None else layer
    if _SPILLOVER not in adata.varp or key in adata.uns.get(OUTPUT_KEYS.TRANSFORMS, {}):
        return {}
    matrix = np.asarray(adata.varp[_SPILLOVER], dtype=np.float64)
    numbers = ",".join(repr(float(value)) for value in matrix.ravel())
    return {"SPILLOVER": f"{len(matrix)},{','.join(channels[: len(matrix)])},{numbers}"}


def _write(
    staging: Path, values: NDArray[np.float32], channels: list[str], labels: list[str], text: dict[str, str]
) -> None:
    flowio = _extra("flowio")
    events = array("f")
    events.frombytes(np.ascontiguousarray(values).view(np.uint8).data)
    with staging.open("wb") as handle:
        flowio.create_fcs(handle, events, channels, opt_channel_names=labels, metadata_dict=text)
    # separators inside of names are ambiguous in the format: what is read back decides
    try:
        back = flowio.FlowData(str(staging), only_text=True)
    except (flowio.exceptions.FlowIOException, ValueError, KeyError, IndexError) as error:
        raise ValueError(
            f"The names or `metadata` cannot be written in an FCS file ({error!r}); simplify them."
        ) from error
    written, read = channels + labels, [name.strip() for name in back.pnn_labels + back.pns_labels]
    changed = [name for name, other in zip_longest(written, read) if not name or name != other]
    if changed:
        raise ValueError(
            f"{len(changed)} name(s) cannot be written in an FCS file (first: {changed[0]!r}); rename them, without '$', and "
            "without '/' or spaces at their ends."
        )
