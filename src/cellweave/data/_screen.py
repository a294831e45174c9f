"""What was done to which cell of a perturbation screen, and which control cells belong to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ._conditions import CONTROL_SYNONYMS, ConditionNames
from ._validate import _some, _warn, check_groups

__all__ = ["Screen", "context_names", "parse_doses"]

# Fewer cells than this say little about a condition.
_FEW_CELLS = 5
# Joins the values of several columns to the name of a context.
_JOIN = " | "


@dataclass(frozen=True)
class Screen:
    """Treatments (what was perturbed, at which doses) and contexts (cell type, batch, patient) of cells.

    Attributes
    ----------
    names
        How conditions are spelt.
    treatments
        What was perturbed, ``()`` for control cells, which come first, each with its doses (empty without doses).
    treatment
        Treatment of every cell ``(cell,)``.
    contexts
        Names of the contexts; a single empty one without pairing columns.
    context
        Context of every cell ``(cell,)``.
    """

    names: ConditionNames
    treatments: tuple[tuple[tuple[str, ...], tuple[float, ...]], ...]
    treatment: NDArray[np.int64]
    contexts: tuple[str, ...]
    context: NDArray[np.int64]

    @classmethod
    def from_obs(cls, obs: pd.DataFrame, setup: Mapping[str, Any], genes: Sequence[str] = ()) -> Self:
        """Read the columns that setup arguments name, and check them.

        Parameters
        ----------
        obs
            Annotation of the cells.
        setup
            ``perturbation_key``, ``control_key``, ``sep``, ``dosage_key`` and ``pairing_keys``.
        genes
            Names of the genes, among which perturbed genes may be.

        Raises
        ------
        KeyError
            If a column does not exist.
        ValueError
            If values are missing, labels or doses cannot be read, there are no control cells at all or in a context, or
            there is nothing but control cells.
        """
        key = setup["perturbation_key"]
        names = ConditionNames(setup["control_key"], setup["sep"])
        check_groups(obs, key, "perturbation_key")
        labels = pd.Categorical(obs[key].astype(str))
        used = labels.remove_unused_categories()
        names.check_separator(used.categories, set(genes))
        doses = _dose_column(obs, setup["dosage_key"])
        treatments, treatment = _treatments(used, doses, names, setup["dosage_key"])
        if treatments[0][0] != ():
            raise ValueError(_no_control(used.categories.tolist(), key, names))
        if len(treatments) == 1:
            raise ValueError(
                f"`adata.obs[{key!r}]` (`perturbation_key`) holds control cells only; a screen needs perturbed cells as well."
            )
        contexts, context = context_names(obs, setup["pairing_keys"])
        screen = cls(names, treatments, treatment, contexts, context)
        screen._check_contexts(setup["pairing_keys"])
        screen._warn_few(key)
        return screen

    @property
    def is_control(self) -> NDArray[np.bool_]:
        """Whether each cell is a control cell ``(cell,)``."""
        return self.treatment == 0

    @property
    def conditions(self) -> list[tuple[str, ...]]:
        """What was perturbed in each treatment ``(treatment,)``."""
        return [parts for parts, _ in self.treatments]

    @property
    def parts(self) -> list[str]:
        """Everything that was perturbed in any treatment, sorted."""
        return sorted({part for parts in self.conditions for part in parts})

    def _check_contexts(self, pairing_keys: Sequence[str] | None) -> None:
        n_control = np.bincount(self.context[self.is_control], minlength=len(self.contexts))
        without = [name for name, n in zip(self.contexts, n_control, strict=True) if n == 0]
        if without:
            raise ValueError(
                f"`pairing_keys={list(pairing_keys or ())}` give {len(without)} group(s) of cells without a control cell "
                f"({_some(without)}); leave these cells out, or pair by fewer columns."
            )

    def _warn_few(self, key: str) -> None:
        sizes = np.bincount(self.treatment, minlength=len(self.treatments))
        few = [self.names.name(self.treatments[i][0]) for i in np.flatnonzero(sizes < _FEW_CELLS)]
        if few:
            _warn(
                f"{len(few)} condition(s) of `adata.obs[{key!r}]` have fewer than {_FEW_CELLS} cells ({_some(few)}); what they "
                "do can hardly be learned from so few."
            )


def context_names(
    obs: pd.DataFrame, keys: Sequence[str] | None, known: Sequence[str] = ()
) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Contexts of cells: the combinations of the values of columns.

    Parameters
    ----------
    obs
        Annotation of the cells.
    keys
        The columns (``pairing_keys``); without any, all cells are of one context with an empty name.
    known
        Contexts that come first, in this order, whether a cell is of them or not.

    Returns
    -------
    Names, and the position of each cell's among them ``(cell,)``.

    Raises
    ------
    TypeError
        If ``keys`` is a text instead of a list.
    KeyError
        If there is no such column.
    ValueError
        If values are missing.
    """
    if isinstance(keys, str):
        raise TypeError(f"`pairing_keys` must be a list of column names, got {keys!r}; pass `[{keys!r}]`.")
    if not keys:
        return ("",), np.zeros(len(obs), dtype=np.int64)
    for key in keys:
        check_groups(obs, key, "pairing_keys")
    columns = [obs[key].astype(str).to_numpy(dtype=object) for key in keys]
    names = columns[0]
    for column in columns[1:]:
        names = names + _JOIN + column
    new = sorted(set(names) - set(known))
    every = [*known, *new]
    return tuple(every), pd.Index(every).get_indexer(pd.Index(names)).astype(np.int64)


def parse_doses(value: Any, n_parts: int, names: ConditionNames) -> tuple[float, ...]:
    """Doses of the parts of a label, in the order in which the label names them.

    Parameters
    ----------
    value
        A number, or numbers joined by the separator of conditions (``"0.5+1"``); one number holds for all parts.
    n_parts
        Number of parts.
    names
        How conditions are spelt.

    Raises
    ------
    ValueError
        If a dose is not a positive number, or their number does not fit.
    """
    texts = str(value).split(names.sep) if isinstance(value, str) else [value]
    try:
        doses = [float(text) for text in texts]
    except (TypeError, ValueError):
        doses = []
    if not doses or not all(np.isfinite(dose) and dose > 0 for dose in doses) or len(doses) not in (1, n_parts):
        raise ValueError(
            f"The dose {value!r} of a condition with {n_parts} part(s) is not a positive number for each; write numbers "
            f"joined by {names.sep!r}, in the order of the label."
        )
    return tuple(doses * n_parts if len(doses) == 1 else doses)


def _dose_column(obs: pd.DataFrame, key: str | None) -> NDArray[Any] | None:
    if key is None:
        return None
    if key not in obs:
        raise KeyError(f"`dosage_key={key!r}` not found; `adata.obs` has {_some(obs.columns)}.")
    return obs[key].to_numpy(dtype=object)


def _treatments(
    labels: pd.Categorical, doses: NDArray[Any] | None, names: ConditionNames, dosage_key: str | None
) -> tuple[tuple[tuple[tuple[str, ...], tuple[float, ...]], ...], NDArray[np.int64]]:
    """Distinct treatments, control first, and that of each cell."""
    frame = pd.DataFrame({"label": labels.codes, "dose": 0 if doses is None else doses})
    pairs = frame.groupby(["label", "dose"], dropna=False, observed=True, sort=False).ngroup().to_numpy()
    first = np.unique(pairs, return_index=True)[1]
    found = []
    for row in first:
        label = str(labels.categories[labels.codes[row]])
        try:
            found.append(_treatment(label, None if doses is None else doses[row], names))
        except ValueError as error:
            where = "`perturbation_key`" if doses is None else f"`perturbation_key`, `dosage_key={dosage_key!r}`"
            raise ValueError(f"{str(error)[:-1]} ({where}, label {label!r}).") from None
    distinct = sorted(set(found), key=lambda t: (len(t[0]) > 0, t))
    code = {treatment: i for i, treatment in enumerate(distinct)}
    return tuple(distinct), np.array([code[t] for t in found], dtype=np.int64)[pairs]


def _treatment(label: str, dose: Any, names: ConditionNames) -> tuple[tuple[str, ...], tuple[float, ...]]:
    parts = names.parts(label)
    if dose is None or not parts:  # what the dose of control cells says does not matter
        return parts, ()
    every = [part.strip() for part in label.split(names.sep)]
    written = [part for part in every if part in parts]
    if isinstance(dose, str) and dose.count(names.sep) + 1 == len(every):  # "A+ctrl" may have a dose for "ctrl" as well
        texts = [text for part, text in zip(every, dose.split(names.sep), strict=True) if part in parts]
        dose = names.sep.join(texts)
    value = dict(zip(written, parse_doses(dose, len(written), names), strict=True))
    return parts, tuple(value[part] for part in parts)


def _no_control(labels: list[str], key: str, names: ConditionNames) -> str:
    lower = {synonym.lower() for synonym in CONTROL_SYNONYMS}
    likely = [label for label in labels if label.lower() in lower]
    advice = f"set `control_key={likely[0]!r}`" if likely else f"it has {_some(labels)}"
    return f"`adata.obs[{key!r}]` (`perturbation_key`) has no control cells, labelled {names.control_key!r}; {advice}."
