"""Tokens of genes and perturbations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ._validate import _some

__all__ = ["SPECIAL_TOKENS", "PerturbationTokens", "UnseenPerturbationError"]

# The published vocabulary: special tokens, then genes in alphabetical order.
SPECIAL_TOKENS = ("<pad>", "<cls>", "<mask>", "control")


class UnseenPerturbationError(ValueError):
    """A perturbation that the model knows nothing of."""


@dataclass(frozen=True)
class PerturbationTokens:
    """Special tokens, genes in alphabetical order, and perturbations that are no genes.

    A perturbed gene is the token of that gene, so what the model learned of its expression helps to predict what its
    perturbation does.

    Attributes
    ----------
    genes
        Names of the genes, in the order of the data ``(gene,)``.
    others
        Perturbations that are not among the genes, sorted.
    """

    genes: tuple[str, ...]
    others: tuple[str, ...] = ()

    @classmethod
    def of(cls, genes: Sequence[str], perturbed: Iterable[str]) -> Self:
        """Tokens of genes and of everything that was perturbed.

        Raises
        ------
        ValueError
            If a gene is named twice.
        """
        index = pd.Index(genes)
        if twice := index[index.duplicated()].unique().tolist():
            raise ValueError(
                f"{len(twice)} gene(s) have the same name ({_some(twice)}); perturbed genes are found by name, so give unique "
                "names, for example with another `gene_symbols_key`."
            )
        return cls(tuple(genes), tuple(sorted(set(perturbed) - set(genes))))

    @property
    def names(self) -> list[str]:
        """Name of every token, in their order."""
        return [*SPECIAL_TOKENS, *sorted(self.genes), *self.others]

    @property
    def n_tokens(self) -> int:
        """Number of tokens."""
        return len(SPECIAL_TOKENS) + len(self.genes) + len(self.others)

    def gene_tokens(self) -> NDArray[np.int64]:
        """Token of every gene, in the order of the data ``(gene,)``."""
        return self._index().get_indexer(pd.Index(self.genes)).astype(np.int64)

    def encode(
        self, conditions: Sequence[Sequence[str]], pad_with_control: bool = False, unknown: int | None = None
    ) -> NDArray[np.int64]:
        """Tokens of conditions.

        Parameters
        ----------
        conditions
            What was perturbed in each of them.
        pad_with_control
            Fill conditions of fewer than two parts with the token ``control``, as the published scDFM does.
        unknown
            Stands for parts without a token; an error by default.

        Returns
        -------
        Array ``(condition, slot)``, -1 where there is no token.

        Raises
        ------
        UnseenPerturbationError
            If a part is neither a gene nor a perturbation of the training data.
        """
        index = self._index()
        n_slots = max([2 if pad_with_control else 1, *(len(parts) for parts in conditions)])
        out = np.full((len(conditions), n_slots), -1, dtype=np.int64)
        for row, parts in zip(out, conditions, strict=True):
            row[: len(parts)] = index.get_indexer(pd.Index(list(parts), dtype=object))
            if pad_with_control:
                row[len(parts) : 2] = SPECIAL_TOKENS.index("control")
        missing = [
            p for row, parts in zip(out, conditions, strict=True) for p, t in zip(parts, row, strict=False) if t < 0
        ]
        if missing and unknown is None:
            strange = sorted(set(missing))
            raise UnseenPerturbationError(
                f"{len(strange)} perturbation(s) are neither genes of the model nor perturbed in its training data "
                f"({_some(strange)}); train with `perturbation_reps` that describe them, ask for one of "
                f"{_some(self.others or self.genes)}, or predict with `unseen='average'`."
            )
        for row, parts in zip(out, conditions, strict=True):
            row[: len(parts)] = np.where(row[: len(parts)] < 0, -1 if unknown is None else unknown, row[: len(parts)])
        return out

    def pad(self, forbidden: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Mask of special tokens and genes, extended to perturbations that are no genes, which see only themselves."""
        padded = np.pad(forbidden, (0, len(self.others)), constant_values=True)
        np.fill_diagonal(padded, False)
        return padded

    def _index(self) -> pd.Index:
        return pd.Index(self.names, dtype=object)
