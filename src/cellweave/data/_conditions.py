"""Names of perturbation conditions: ``A+B`` is ``B+A``, and ``A+ctrl`` is ``A``."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

__all__ = ["CONTROL_SYNONYMS", "ConditionNames"]

# What screens call their unperturbed cells; named in advice only.
CONTROL_SYNONYMS = ("control", "ctrl", "non-targeting", "nontargeting", "NT", "DMSO", "vehicle", "mock", "unperturbed")
# Parts of a combination that stand for "nothing" in the files of published screens, whatever control cells are called.
_NOTHING = ("ctrl", "control")


class ConditionNames(NamedTuple):
    """How labels of conditions are read and written.

    A condition is the sorted tuple of the things that were perturbed: genes, drugs, cytokines; empty for control cells.

    Parameters
    ----------
    control_key
        Label of control cells.
    sep
        What stands between the parts of a combination.
    """

    control_key: str = "control"
    sep: str = "+"

    def parts(self, label: str) -> tuple[str, ...]:
        """What a label says was perturbed, sorted, each once; parts that mean "nothing" are left out.

        Raises
        ------
        ValueError
            If the label is no text, is empty, or has an empty part.
        """
        if not isinstance(label, str) or not label.strip():
            raise ValueError(
                f"A `perturbation` must be a text that is not empty, got {label!r}; name what was perturbed."
            )
        if label == self.control_key:
            return ()
        parts = [part.strip() for part in label.split(self.sep)]
        if not all(parts):
            raise ValueError(
                f"The perturbation {label!r} has an empty part between {self.sep!r}; write it as 'A{self.sep}B', or choose "
                "another `sep`."
            )
        nothing = {self.control_key, *(_NOTHING if len(parts) > 1 else ())}
        return tuple(sorted(set(parts) - nothing))

    def name(self, parts: Iterable[str]) -> str:
        """Label of what was perturbed."""
        return self.sep.join(parts) or self.control_key

    def canonical(self, label: str) -> str:
        """The one spelling of a label."""
        return self.name(self.parts(label))

    def check_separator(self, labels: Iterable[str], genes: Collection[str]) -> None:
        """Refuse labels that are, as a whole, a gene with the separator in its name.

        Parameters
        ----------
        labels
            Labels of conditions.
        genes
            Names of the genes of the data.

        Raises
        ------
        ValueError
            If a label could be a single gene as well as a combination.
        """
        known = {gene for gene in genes if self.sep in gene}
        both = sorted(known.intersection(labels))
        if both:
            raise ValueError(
                f"{len(both)} perturbation(s) are the name of a gene that holds the separator {self.sep!r} (first: {both[0]!r}); "
                "choose a `sep` that no gene name has, and write combinations with it."
            )
