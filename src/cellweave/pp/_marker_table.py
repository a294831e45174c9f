"""What a marker table cannot tell, and what does not fit the data, found before a model is trained on it."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray

from cellweave.io import MarkerTable

from ._statistics import gene_moments

__all__ = ["check_marker_table"]

# A population with this share of unknown entries attracts cells that fit nowhere else.
_OVER_BLANK = 0.8
# A population with fewer known entries than this share of the median of its siblings, and at least this many fewer, has
# an advantage over them: every known entry is a condition that a cell can fail.
_FEW_SHARE, _FEW_LESS = 0.75, 3
# Scaled markers have a standard deviation of one; Scyan warns from this mean difference on.
_SCALE_TOLERANCE = 0.1
_DIGITS = re.compile(r"\d+")
_SEVERITIES = ("error", "warning", "note")


class _Finding(NamedTuple):
    """One row of the result."""

    check: str
    severity: str
    population: str | None
    other: str | None
    marker: str | None
    value: float
    message: str


def check_marker_table(
    table: pd.DataFrame | str | os.PathLike | Mapping[str, Any] | MarkerTable,
    adata: AnnData | None = None,
    layer: str | None = None,
) -> pd.DataFrame:
    """Look for weaknesses of a marker table before a model is trained with it.

    Populations that the table does not tell apart are those that a model confuses: the four pairs of the BMMC table of
    Scyan (Blampey et al., 2023) without a separating marker hold its populations with the lowest F1.

    ======================= ======== ================================================================================
    check                   severity meaning
    ======================= ======== ================================================================================
    ``missing_marker``      error    a marker is not in ``adata.var_names``; the message proposes close names
    ``not_finite``          error    a marker has NaN or infinite values in the data
    ``unseparable``         warning  no marker is known in both populations with different values
    ``one_sided_marker``    warning  all known entries of a marker have the same sign
    ``over_blank``          warning  at least 80 % of a row is unknown; ``value`` is the share
    ``constant_marker``     warning  a marker has the same value in all cells
    ``not_scaled``          warning  the standard deviations of the markers, ``value`` in the mean, are far from 1
    ``near_unseparable``    note     one marker alone tells two populations apart
    ``unknown_marker``      note     nothing is known about a marker in any population
    ``sibling_imbalance``   note     fewer known entries (``value``) than most others of its group (``other``)
    ``graded``              note     an entry (``value``) is neither -1 nor 1
    ======================= ======== ================================================================================

    Parameters
    ----------
    table
        The marker table; anything that :meth:`cellweave.io.MarkerTable.parse` reads.
    adata
        Data to compare the table with; only the table is checked by default. Nothing is written into it.
    layer
        Layer with the scaled expression; ``adata.X`` by default.

    Returns
    -------
    Frame with a row per finding, errors first, and the columns ``check``, ``severity``, ``population``, ``other`` (the
    second population of a pair), ``marker``, ``value`` and ``message``; None or NaN where a column does not apply. Empty
    when all is well.

    Raises
    ------
    ValueError
        If the table is no valid :class:`~cellweave.io.MarkerTable`, or ``layer`` is given without ``adata``.
    KeyError
        If the data have no such layer.

    Examples
    --------
    >>> found = cw.pp.check_marker_table("table.csv", adata, layer="scaled")
    >>> found[found["check"] == "unseparable"]
    """
    if adata is None and layer is not None:
        raise ValueError(f"`layer={layer!r}` has no meaning without `adata`; pass the data too.")
    parsed = MarkerTable.parse(table)
    findings = [*_pairs(parsed), *_markers(parsed), *_rows(parsed), *_siblings(parsed), *_graded(parsed)]
    if adata is not None:
        findings += [*_missing(parsed, adata), *_values(parsed, adata, layer)]
    findings.sort(key=lambda finding: _SEVERITIES.index(finding.severity))  # stable: table order within a check
    # None stays None only in columns that are declared as objects
    columns = {name: [getattr(finding, name) for finding in findings] for name in _Finding._fields}
    return pd.DataFrame(
        {name: pd.Series(column, dtype=float if name == "value" else object) for name, column in columns.items()}
    )


def _pairs(table: MarkerTable) -> Iterator[_Finding]:
    separating = table.separating_markers()
    counts = separating.sum(-1)
    for i, j in np.argwhere(np.triu(counts == 0, k=1)):
        a, b = table.populations[i], table.populations[j]
        advice = "fill in a marker that differs, or merge them"
        message = f"No marker is known in both {a!r} and {b!r} with different values; {advice}."
        yield _Finding("unseparable", "warning", a, b, None, 0.0, message)
    for i, j in np.argwhere(np.triu(counts == 1, k=1)):
        a, b, marker = table.populations[i], table.populations[j], table.markers[int(separating[i, j].argmax())]
        message = f"Only {marker!r} tells {a!r} and {b!r} apart; a second marker would make it safer."
        yield _Finding("near_unseparable", "note", a, b, marker, 1.0, message)


def _markers(table: MarkerTable) -> Iterator[_Finding]:
    for marker, column in zip(table.markers, table.rho.T, strict=True):
        known = column[~np.isnan(column)]
        if not len(known):
            message = f"Nothing is known about {marker!r}; it helps to find new populations, not to label cells."
            yield _Finding("unknown_marker", "note", None, None, marker, 0.0, message)
        elif len(sign := np.unique(np.sign(known))) == 1 and len(table.populations) > 1:
            what = {-1.0: "negative", 0.0: "zero", 1.0: "positive"}[float(sign[0])]
            message = (
                f"All {len(known)} known entries of {marker!r} are {what}; name a population of the opposite, or the "
                "position of this marker stays open."
            )
            yield _Finding("one_sided_marker", "warning", None, None, marker, float(sign[0]), message)


def _rows(table: MarkerTable) -> Iterator[_Finding]:
    for name, share in zip(table.populations, np.isnan(table.rho).mean(axis=1), strict=True):
        if share >= _OVER_BLANK:
            message = f"{share:.0%} of the entries of {name!r} are unknown, so most cells fit; fill in more markers."
            yield _Finding("over_blank", "warning", name, None, None, float(share), message)


def _siblings(table: MarkerTable) -> Iterator[_Finding]:
    n_known = (~np.isnan(table.rho)).sum(axis=1)
    for parent, members in _families(table).items():
        for i in members if len(members) > 1 else ():
            median = float(np.median(n_known[members[members != i]]))
            if n_known[i] < _FEW_SHARE * median and n_known[i] <= median - _FEW_LESS:
                name = table.populations[i]
                beside = f"the other populations of {parent!r}" if parent else "the other populations"
                message = (
                    f"{name!r} has {n_known[i]} known entries, {beside} {median:g} in the median; it has fewer conditions "
                    "to fail and may take cells of the others."
                )
                yield _Finding("sibling_imbalance", "note", name, parent, None, float(n_known[i]), message)


def _families(table: MarkerTable) -> dict[str | None, NDArray[np.intp]]:
    """Populations that lie beside each other: those of one group of the finest level, or all."""
    if not table.levels:
        return {None: np.arange(len(table.populations))}
    names, members = table.groups(next(iter(table.levels)))
    return {name: np.flatnonzero(member) for name, member in zip(names, members, strict=True)}


def _graded(table: MarkerTable) -> Iterator[_Finding]:
    for i, j in np.argwhere(~np.isnan(table.rho) & (np.abs(table.rho) != 1)):
        population, marker, value = table.populations[i], table.markers[j], float(table.rho[i, j])
        message = (
            f"{population!r} has the graded entry {value:g} for {marker!r}; most entries should be -1, 1 or empty."
        )
        yield _Finding("graded", "note", population, None, marker, value, message)


# ---------------------------------------------------------------------------------------------------- with the data


def _missing(table: MarkerTable, adata: AnnData) -> Iterator[_Finding]:
    names = set(adata.var_names)
    for marker in table.markers:
        if marker not in names:
            close = _close_names(marker, adata.var_names)
            advice = f"rename it, the closest are {close}" if close else "rename it or leave it out"
            message = f"Marker {marker!r} is not among the {adata.n_vars} `adata.var_names`; {advice}."
            yield _Finding("missing_marker", "error", None, None, marker, np.nan, message)


def _close_names(marker: str, names: pd.Index) -> list[str]:
    """At most three names that mean the same as far as letter case, punctuation and additions go; CD4 is not CD45."""
    numbers = set(_DIGITS.findall(marker))
    plain = {name: _plain(name) for name in names.astype(str) if numbers <= set(_DIGITS.findall(name))}
    wanted = _plain(marker)
    near = difflib.get_close_matches(wanted, plain.values(), n=3, cutoff=0.6)
    close = [name for text in near for name in plain if plain[name] == text]
    return list(dict.fromkeys([*close, *(name for name, text in plain.items() if wanted in text)]))[:3]


def _plain(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalnum())


def _values(table: MarkerTable, adata: AnnData, layer: str | None) -> Iterator[_Finding]:
    with np.errstate(invalid="ignore"):  # infinite values are reported below
        moments = gene_moments(adata, layer, ddof=0)
    where = "adata.X" if layer is None else f"adata.layers[{layer!r}]"
    markers = [marker for marker in table.markers if marker in moments.index]
    std = moments["std"][~moments.index.duplicated()].reindex(markers)
    for marker in std.index[std.isna()]:
        message = f"`{where}` has NaN or infinite values for {marker!r}; remove these cells or fill the values in."
        yield _Finding("not_finite", "error", None, None, marker, np.nan, message)
    for marker in std.index[std == 0]:
        message = f"`{where}` has the same value in all cells for {marker!r}; leave the marker out."
        yield _Finding("constant_marker", "warning", None, None, marker, 0.0, message)
    mean = float(std.mean())  # of the finite ones
    if abs(mean - 1) > _SCALE_TOLERANCE:
        message = (
            f"The markers have a standard deviation of {mean:.3g} in the mean in `{where}`, scaled ones have 1; transform "
            "(asinh or logicle) and scale the intensities first."
        )
        yield _Finding("not_scaled", "warning", None, None, None, mean, message)
