"""What is known about populations before any cell was measured: which markers they express, and how they nest."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

__all__ = ["MarkerTable"]

# Entries are about -1 to 1; a value this far out is an intensity or a percentage.
_LARGEST = 10.0
# Text that stands for an unknown entry in a file.
_BLANK = frozenset({"", "na", "n/a", "nan", "<na>", "none", "null"})
_DICT_KEYS = ("populations", "markers", "rho", "levels")


@dataclass(frozen=True, eq=False, repr=False)
class MarkerTable:
    """Knowledge table: expected expression of markers (columns) in populations (rows), with an optional hierarchy.

    An entry is -1 where the population does not express the marker, 1 where it does, between where expression is graded,
    and NaN where nothing is known. Make one with :meth:`parse`; every instance has passed all checks.

    Parameters
    ----------
    populations
        Names of the leaf populations in table order.
    markers
        Names of the markers in table order, as in ``adata.var_names``.
    rho
        The entries ``(population, marker)``, NaN for unknown. Kept as a read-only copy.
    levels
        Level name -> group of every population ``(population,)``, from fine to coarse; empty without hierarchy.

    Raises
    ------
    ValueError
        If there is no population or marker, a name is missing or repeated, an entry is infinite or beyond 10 in absolute
        value, nothing is known about a population, two rows are the same, or the hierarchy contradicts itself.

    Examples
    --------
    >>> table = cw.io.MarkerTable.parse("table.csv")
    >>> table.to_frame()
    """

    populations: tuple[str, ...]
    markers: tuple[str, ...]
    rho: NDArray[np.float64]
    levels: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rho = np.array(self.rho, dtype=np.float64)
        rho.setflags(write=False)
        values = {
            "populations": tuple(self.populations),
            "markers": tuple(self.markers),
            "rho": rho,
            "levels": {name: tuple(groups) for name, groups in self.levels.items()},
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)  # the dataclass is frozen
        _check_names(self)
        _check_entries(self)
        _check_hierarchy(self)

    def __repr__(self) -> str:
        levels = f", levels {list(self.levels)}" if self.levels else ""
        return f"MarkerTable with {len(self.populations)} populations, {len(self.markers)} markers{levels}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MarkerTable) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash((self.populations, self.markers))

    @classmethod
    def parse(cls, table: pd.DataFrame | str | os.PathLike | Mapping[str, Any] | MarkerTable) -> MarkerTable:
        """Read and check a table in any form that users have.

        Parameters
        ----------
        table
            A frame with populations as index and markers as columns; the path of a CSV file whose first column holds the
            populations; what :meth:`to_dict` returned; or a table, which is returned as it is. Columns whose name
            contains "level" in any letter case, and further levels of the index of a frame, are levels of the hierarchy,
            from fine to coarse. Empty entries and NA are unknown.

        Raises
        ------
        ValueError
            If the file is missing, empty or no CSV, if an entry is no number, or if the table is refused for one of the
            reasons that :class:`MarkerTable` names. The message names the population, the marker and the value.
        TypeError
            If the table is of another kind.
        """
        if isinstance(table, MarkerTable):
            return table
        if isinstance(table, Mapping):
            return cls._of_dict(table)
        if isinstance(table, str | os.PathLike):
            table = _read_csv(Path(table))
        if not isinstance(table, pd.DataFrame):
            raise TypeError(
                "`table` must be a DataFrame, the path of a CSV file, a dictionary or a MarkerTable, got "
                f"{type(table).__name__}."
            )
        parsed = cls._of_frame(table)
        if len(parsed.populations) == 1:
            warnings.warn(
                f"`table` has one population only ({parsed.populations[0]!r}), so every cell gets its label or "
                "none; add the other populations of the sample.",
                UserWarning,
                stacklevel=2,
            )
        return parsed

    @classmethod
    def _of_dict(cls, table: Mapping[str, Any]) -> MarkerTable:
        if missing := [key for key in _DICT_KEYS if key not in table]:
            raise ValueError(
                f"`table` lacks {missing}; a dictionary must have the keys {list(_DICT_KEYS)}, as "
                "`MarkerTable.to_dict` writes them."
            )
        populations, markers = tuple(table["populations"]), tuple(table["markers"])
        entries = table["rho"]
        if len(entries) != len(populations) or any(len(row) != len(markers) for row in entries):
            raise ValueError(
                f"`rho` of `table` must have {len(populations)} rows of {len(markers)} entries, as there are "
                "populations and markers."
            )
        return cls(populations, markers, _numbers(entries, populations, markers), dict(table["levels"]))

    @classmethod
    def _of_frame(cls, frame: pd.DataFrame) -> MarkerTable:
        _check_axes(frame)
        is_level = np.array([_is_level(name) for name in frame.columns], dtype=bool)
        populations = _names(frame.index.get_level_values(0))
        levels = [(str(name), frame.index.get_level_values(i)) for i, name in enumerate(frame.index.names) if i]
        levels += [(str(frame.columns[j]), frame.iloc[:, j]) for j in np.flatnonzero(is_level)]
        _refuse_repeated([name for name, _ in levels], "level")
        markers = _names(frame.columns[~is_level])
        entries = frame.iloc[:, np.flatnonzero(~is_level)].astype(object).to_numpy()
        groups = {name: _names(column) for name, column in levels}
        return cls(populations, markers, _numbers(entries, populations, markers), groups)

    def to_dict(self) -> dict[str, Any]:
        """The table in plain JSON types, with None for unknown entries; :meth:`parse` reads it back."""
        return {
            "populations": list(self.populations),
            "markers": list(self.markers),
            "rho": [[None if math.isnan(value) else value for value in row] for row in self.rho.tolist()],
            "levels": {name: list(groups) for name, groups in self.levels.items()},
        }

    def to_frame(self) -> pd.DataFrame:
        """The table as a frame ``(population, marker)``; its index has the levels of the hierarchy behind the names."""
        index = pd.Index(self.populations, name="population")
        if self.levels:
            index = pd.MultiIndex.from_arrays(
                [self.populations, *self.levels.values()], names=["population", *self.levels]
            )
        return pd.DataFrame(self.rho.copy(), index=index, columns=list(self.markers))

    def groups(self, level: str) -> tuple[tuple[str, ...], NDArray[np.bool_]]:
        """Groups of a level.

        Parameters
        ----------
        level
            Name of the level.

        Returns
        -------
        Names of the groups in table order, and which populations each of them has ``(group, population)``.

        Raises
        ------
        ValueError
            If the table has no such level.
        """
        if level not in self.levels:
            raise ValueError(f"`level={level!r}` is not in `table`; it has the levels {list(self.levels)}.")
        names = tuple(dict.fromkeys(self.levels[level]))
        return names, np.array([[group == name for group in self.levels[level]] for name in names])

    def members_of(self, name: str) -> NDArray[np.bool_]:
        """Which leaf populations belong to a population or group.

        Parameters
        ----------
        name
            Name of a population or of a group of any level.

        Returns
        -------
        Array ``(population,)``.

        Raises
        ------
        ValueError
            If the table has no such name.
        """
        return np.array([group == name for group in self._layers[self._depths(name)[0]]])

    def parent_of(self, name: str) -> str | None:
        """Group of the next coarser level that holds a population or group; None at the top.

        A group with one member of the same name counts as that member.

        Parameters
        ----------
        name
            Name of a population or of a group of any level.

        Raises
        ------
        ValueError
            If the table has no such name.
        """
        depth = self._depths(name)[-1]
        if depth + 1 == len(self._layers):
            return None
        return self._layers[depth + 1][self._layers[depth].index(name)]

    def children_of(self, name: str) -> tuple[str, ...]:
        """Populations or groups of the next finer level in a group, in table order; none for a population.

        A group with one member of the same name counts as that member.

        Parameters
        ----------
        name
            Name of a population or of a group of any level.

        Raises
        ------
        ValueError
            If the table has no such name.
        """
        depth = self._depths(name)[0]
        if depth == 0:
            return ()
        pairs = zip(self._layers[depth - 1], self._layers[depth], strict=True)
        return tuple(dict.fromkeys(child for child, group in pairs if group == name))

    def separating_markers(self) -> NDArray[np.bool_]:
        """Markers that tell two populations apart: known in both, with different values.

        Returns
        -------
        Array ``(population, population, marker)``, symmetric in the populations.
        """
        known = ~np.isnan(self.rho)
        return known[:, None] & known[None] & (self.rho[:, None] != self.rho[None])

    @property
    def _layers(self) -> list[tuple[str, ...]]:
        """Names of every population from the leaves to the coarsest level."""
        return [self.populations, *self.levels.values()]

    def _depths(self, name: str) -> list[int]:
        """Levels at which a name occurs, 0 for the leaves."""
        depths = [depth for depth, names in enumerate(self._layers) if name in names]
        if not depths:
            raise ValueError(
                f"`table` has no population or group {name!r}; its populations are {list(self.populations)}"
                + "".join(f", its groups of {level!r} {list(self.groups(level)[0])}" for level in self.levels)
                + "."
            )
        return depths


# ---------------------------------------------------------------------------------------------------------- reading


def _read_csv(path: Path) -> pd.DataFrame:
    """All cells of a file as text: pandas itself would rename repeated markers and lose a population called "NA"."""
    if not path.is_file():
        raise ValueError(f"`table`: there is no file '{path}'; check the path.")
    try:
        cells = pd.read_csv(path, header=None, dtype=str, keep_default_na=False)
    except pd.errors.EmptyDataError:
        raise ValueError(f"`table` '{path}' is empty; it needs a header line and a line per population.") from None
    except (pd.errors.ParserError, UnicodeDecodeError) as error:
        raise ValueError(f"`table` '{path}' is no CSV text file ({str(error).strip()}); save it as one.") from error
    if cells.shape[1] == 1:
        raise ValueError(f"`table` '{path}' has one column only, so it has no markers; separate the columns by commas.")
    columns = pd.Index(cells.iloc[0, 1:].tolist(), dtype=object)
    index = pd.Index(cells.iloc[1:, 0].tolist(), dtype=object, name=cells.iloc[0, 0])
    return pd.DataFrame(cells.iloc[1:, 1:].to_numpy(dtype=object), index=index, columns=columns)


def _check_axes(frame: pd.DataFrame) -> None:
    """The kind of index and columns that can be read."""
    if isinstance(frame.columns, pd.MultiIndex):
        raise ValueError("The columns of `table` have several levels; use one marker name per column.")
    first, *others = frame.index.names
    if first is not None and _is_level(first):
        raise ValueError(
            f"The first column of `table` is the level column {first!r}; put the names of the populations first."
        )
    if None in others:
        raise ValueError("A level of the index of `table` has no name; name all of them, `index.names = [...]`.")
    if not len(frame.columns):
        raise ValueError("`table` has no markers; it needs a column for each of them.")
    if isinstance(frame.index, pd.RangeIndex) and pd.api.types.infer_dtype(frame.iloc[:, 0]) == "string":
        raise ValueError(
            f"The index of `table` is numbers, and its column {frame.columns[0]!r} holds text; use "
            f"`table.set_index({frame.columns[0]!r})`, because the index names the populations."
        )


def _is_level(name: Hashable) -> bool:
    return "level" in str(name).lower()


def _names(values: Iterable[Any]) -> tuple[str, ...]:
    """Names as text; an empty string where there is none."""
    return tuple("" if _is_missing(value) else str(value) for value in values)


def _is_missing(value: Any) -> bool:
    return value is None or value is pd.NA or value is pd.NaT or (isinstance(value, float) and math.isnan(value))


def _numbers(
    entries: Iterable[Iterable[Any]], populations: Sequence[str], markers: Sequence[str]
) -> NDArray[np.float64]:
    rows = [
        [_number(value, population, marker) for value, marker in zip(row, markers, strict=True)]
        for row, population in zip(entries, populations, strict=True)
    ]
    return np.array(rows, dtype=np.float64).reshape(len(populations), len(markers))


def _number(value: Any, population: str, marker: str) -> float:
    if _is_missing(value) or (isinstance(value, str) and value.strip().lower() in _BLANK):
        return math.nan
    try:
        # a truth value could mean -1 or 0 where it is false
        return float("truth value" if isinstance(value, bool | np.bool_) else value)
    except (TypeError, ValueError):
        raise ValueError(
            f"`table` has {value!r} at population {population!r}, marker {marker!r}; entries are numbers (-1 "
            "negative, 1 positive), or empty where unknown."
        ) from None


# ---------------------------------------------------------------------------------------------------------- checking


def _check_names(table: MarkerTable) -> None:
    for what, names in (("population", table.populations), ("marker", table.markers)):
        if not names:
            raise ValueError(f"`table` has no {what}s; it needs a {_LINE[what]} for each of them.")
        for i, name in enumerate(names):
            if not isinstance(name, str) or not name.strip():
                raise ValueError(f"The {what} in {_LINE[what]} {i + 1} of `table` has no name; give it one.")
        _refuse_repeated(names, what)
    for level, groups in table.levels.items():
        if len(groups) != len(table.populations):
            raise ValueError(
                f"Level {level!r} of `table` has {len(groups)} entries for {len(table.populations)} populations; "
                "name the group of each of them."
            )
        for population, group in zip(table.populations, groups, strict=True):
            if not isinstance(group, str) or not group.strip():
                raise ValueError(
                    f"Level {level!r} of `table` is missing for population {population!r}; name its group (a "
                    "population on its own is a group with its name)."
                )


_LINE = {"population": "row", "marker": "column"}


def _refuse_repeated(names: Sequence[str], what: str) -> None:
    for i, name in enumerate(names):
        if name in names[:i]:
            advice = "merge them or rename one" if what == "population" else "keep one of the columns"
            raise ValueError(f"`table` has the {what} {name!r} {list(names).count(name)} times; {advice}.")


def _check_entries(table: MarkerTable) -> None:
    rho, shape = table.rho, (len(table.populations), len(table.markers))
    if rho.shape != shape:
        raise ValueError(f"`rho` has shape {rho.shape}, but `table` has {shape[0]} populations and {shape[1]} markers.")
    far = np.abs(np.nan_to_num(rho, nan=0.0, posinf=np.inf, neginf=-np.inf)) > _LARGEST
    if far.any():
        i, j = np.argwhere(far)[0]
        where = f"{rho[i, j]:g} at population {table.populations[i]!r}, marker {table.markers[j]!r}"
        if np.isinf(rho[i, j]):
            raise ValueError(f"`table` has the infinite value {where}; use a number from -1 to 1, or leave it empty.")
        raise ValueError(
            f"`table` has {int(far.sum())} value(s) beyond +-{_LARGEST:g}, the first is {where}; entries are -1 "
            "(negative) to 1 (positive), not percentages or intensities."
        )
    empty = np.isnan(rho).all(axis=1)
    if empty.any():
        raise ValueError(
            f"`table` has {int(empty.sum())} population(s) about which nothing is known (first: "
            f"{table.populations[int(np.argmax(empty))]!r}); fill in at least one marker, or leave the population out."
        )
    seen: dict[bytes, str] = {}
    for name, row in zip(table.populations, rho + 0.0, strict=True):  # -0.0 becomes 0.0
        key = np.where(np.isnan(row), np.nan, row).tobytes()
        if key in seen:
            raise ValueError(
                f"The populations {seen[key]!r} and {name!r} of `table` have identical rows, so nothing tells them "
                "apart; add a marker that differs, or merge them."
            )
        seen[key] = name


def _check_hierarchy(table: MarkerTable) -> None:
    layers = [("populations", table.populations), *table.levels.items()]
    for (_, fine), (level, coarse) in zip(layers, layers[1:], strict=False):
        parent: dict[str, str] = {}
        for child, group in zip(fine, coarse, strict=True):
            if parent.setdefault(child, group) != group:
                raise ValueError(
                    f"Group {child!r} of `table` lies in two groups of level {level!r}, {parent[child]!r} and "
                    f"{group!r}; levels go from fine to coarse, and a group has one parent."
                )
    members: dict[str, set[int]] = {}
    for _, names in layers:
        here: dict[str, set[int]] = {}
        for i, name in enumerate(names):
            here.setdefault(name, set()).add(i)
        for name, rows in here.items():
            if members.setdefault(name, rows) != rows:
                raise ValueError(
                    f"The name {name!r} of `table` stands for different populations at different levels; rename "
                    "one of them."
                )
