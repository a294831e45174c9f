"""What a cascaded flow learns of a screen before it is trained: tokens, gene graph, features, and what is simple to predict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from anndata import AnnData
from numpy.typing import NDArray
from scvi import settings
from scvi.model.base import BaseModelClass

from cellweave.data import (
    SPECIAL_TOKENS,
    ConditionNames,
    FeatureCache,
    FeatureEncoder,
    PairTables,
    PerturbationTokens,
    Screen,
    UnseenPerturbationError,
    as_dense,
    coexpression_mask,
    pad_mask,
    row_source,
)
from cellweave.module import NOTHING
from cellweave.stats import Evidence

from ._ccfm_anchors import AnchorMixin, study_anchors
from ._setup_perturbation import _gene_names, read_split

__all__ = ["ScreenMixin", "ScreenStudy"]

_FACTS = "screen"  # where the registry keeps what was learned


class ScreenStudy(NamedTuple):
    """What the constructor of the model finds in the data."""

    facts: dict[str, Any]  # plain values, kept in the registry
    forbidden: NDArray[np.bool_] | None  # gene graph
    evidence: tuple[Evidence, Evidence]  # means and detection rates of the training cells


class ScreenMixin(AnchorMixin):
    """Study of the screen that a model is made with, and what follows from it for any data."""

    registry_: dict[str, Any]
    _features: FeatureCache | None = None  # of the training data; not saved
    _screen_cache: tuple[AnnData, Screen] | None = None

    # ---------------------------------------------------------------- the study

    def _study(
        self,
        adata: AnnData,
        encoder: FeatureEncoder | None,
        latent_dim: int | None,
        gene_graph: str | NDArray | sp.spmatrix | None,
        graph_top_k: int,
        anchor: str | None,
        represented: Sequence[str],
    ) -> ScreenStudy:
        """Everything that is computed from training cells before training."""
        setup = self._setup
        genes = _gene_names(adata, setup["gene_symbols_key"])
        screen = Screen.from_obs(adata.obs, setup, genes)
        rows = self._training_rows(adata)
        seen = sorted({part for i in np.unique(screen.treatment[rows]) for part in screen.treatments[i][0]})
        tokens = PerturbationTokens.of(genes, [*seen, *represented])
        x = self._expression_of(adata)
        cache = None
        if encoder is not None:
            cache = FeatureCache(encoder, adata, x, rows, latent_dim=latent_dim, seed=settings.seed or 0)
        self._features = cache
        rules, evidence = study_anchors(anchor, x, screen, rows, genes)
        table = evidence[0].table
        facts = {
            "genes": genes,
            "others": list(tokens.others),
            "seen": seen,
            "contexts": list(screen.contexts),
            "conditions": [list(condition) for condition in table.conditions],
            "n_observed": int(table.is_observed.sum()),
            "doses": _median_doses(screen, rows),
            "encoder": None if encoder is None else {"name": encoder.name, **encoder.config()},
            "features": None if cache is None else _feature_facts(cache),
            "has_graph": gene_graph is not None,
            "anchors": [rule.to_dict() for rule in rules],
        }
        self._screen_cache = (adata, screen)
        return ScreenStudy(facts, _forbidden(gene_graph, graph_top_k, x, rows, tokens), evidence)

    def _training_rows(self, adata: AnnData) -> NDArray[np.int64]:
        """Cells that may be learned from, whatever the random split will be."""
        key = self._setup["split_key"]
        return np.arange(adata.n_obs) if key is None else np.flatnonzero(read_split(adata.obs, key) == 0)

    # ---------------------------------------------------------------- what was learned

    @property
    def adata(self) -> Any:
        """Data of the model."""
        return self._adata

    @adata.setter
    def adata(self, adata: Any) -> None:
        facts = self.registry_.get(_FACTS)
        BaseModelClass.adata.fset(self, adata)  # which takes the registry of the data
        if facts is not None:
            self.registry_ = {**self.registry_, _FACTS: facts}

    @property
    def _facts(self) -> dict[str, Any]:
        return self.registry_[_FACTS]

    @property
    def _names(self) -> ConditionNames:
        return ConditionNames(self._setup["control_key"], self._setup["sep"])

    @property
    def _tokens(self) -> PerturbationTokens:
        return PerturbationTokens(tuple(self._facts["genes"]), tuple(self._facts["others"]))

    @property
    def perturbations(self) -> list[str]:
        """What was perturbed in the training cells, each alone or in combinations."""
        return list(self._facts["seen"])

    def _screen(self) -> Screen:
        """Treatments and contexts of the data of the model."""
        adata = self.adata
        if self._screen_cache is None or self._screen_cache[0] is not adata:
            self._screen_cache = (adata, Screen.from_obs(adata.obs, self._setup, self._facts["genes"]))
        return self._screen_cache[1]

    def _expression_of(self, adata: AnnData) -> Any:
        layer = self._setup["layer"]
        return adata.X if layer is None else adata.layers[layer]

    def _describe(self, reps: pd.DataFrame) -> None:
        """Give the network the representations of perturbations."""
        tokens = torch.from_numpy(self._tokens.encode([(name,) for name in reps.index])[:, 0])
        trained = torch.from_numpy(reps.index.isin(self._facts["seen"]))
        self.module.descriptions.describe(tokens, torch.from_numpy(reps.to_numpy(dtype=np.float32)), trained)

    # ---------------------------------------------------------------- batches

    def _pair_tables(self) -> PairTables:
        """What training batches hold beyond expression."""
        screen, tokens = self._screen(), self._tokens
        doses = None
        # conditions that are held out may have parts that the model does not know; they are never drawn
        encoded = tokens.encode(screen.conditions, self._pad_with_control, NOTHING)
        self._check_known(screen)
        if self._setup["dosage_key"] is not None:
            doses = np.ones(encoded.shape, dtype=np.float32)
            usual = self._facts["doses"]
            for row, (parts, given) in zip(doses, screen.treatments, strict=True):
                row[: len(given)] = [dose / usual.get(part, dose) for part, dose in zip(parts, given, strict=True)]
        features = self._training_features()
        return PairTables(
            screen,
            tokens.gene_tokens(),
            encoded,
            doses,
            self._group_starts(screen),
            None if features is None else features.get,
            None if features is None else features.has_features,
        )

    def _check_known(self, screen: Screen) -> None:
        """Refuse to train on perturbations of other data that the model was not made for."""
        used = np.unique(screen.treatment[self._training_rows(self.adata)])
        known = set(self._tokens.names)
        new = sorted({part for i in used for part in screen.conditions[i]} - known)
        if new:
            raise UnseenPerturbationError(
                f"The training cells have {len(new)} perturbation(s) (`perturbation_key`) that the model was not made for "
                f"(first: {new[0]!r}); make a new model, or leave these cells out."
            )

    def _training_features(self) -> FeatureCache | None:
        """Features of the data of the model; those of a loaded model are not there."""
        if self._facts["features"] is None:
            return None
        if self._features is None or self._features.adata is not self.adata:
            raise ValueError(
                f"The encoder {self._facts['encoder']['name']!r} is not saved with the model and is needed to train it; make a "
                "new model from the data."
            )
        return self._features

    def _encoded(self, adata: AnnData, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Standardised features of any cells ``(cell, latent)`` or ``(cell, gene, latent)``."""
        facts = self._facts["features"]
        if facts is None:
            raise ValueError("The model has no features (`encoder='none'`); use another `kind`.")
        if self._features is None:
            raise ValueError(
                f"The encoder {self._facts['encoder']['name']!r} is not saved with the model; use the model that was trained, "
                "before it was saved, for what needs features of measured cells."
            )
        return self._features.transform(adata, self._expression_of(adata), rows)


def _feature_facts(cache: FeatureCache) -> dict[str, Any]:
    compression = None if cache.compression is None else cache.compression.to_dict()
    return {
        "level": cache.level,
        "dim": cache.dim,
        "statistics": cache.statistics.to_dict(),
        "compression": compression,
    }


def _median_doses(screen: Screen, rows: NDArray[np.int64]) -> dict[str, float]:
    """Usual dose of everything that was perturbed; empty without doses."""
    given: dict[str, list[float]] = {}
    for code in np.unique(screen.treatment[rows]):
        parts, doses = screen.treatments[code]
        for part, dose in zip(parts, doses, strict=False):
            given.setdefault(part, []).append(dose)
    return {part: float(np.median(doses)) for part, doses in given.items()}


def _forbidden(
    graph: str | NDArray | sp.spmatrix | None,
    top_k: int,
    x: Any,
    rows: NDArray[np.int64],
    tokens: PerturbationTokens,
) -> NDArray[np.bool_] | None:
    """Mask of the gene graph over all tokens."""
    if graph is None:
        return None
    genes = list(tokens.genes)
    if isinstance(graph, str):
        if graph != "coexpression":
            raise ValueError(
                f"`gene_graph` must be 'coexpression', None or a matrix, got {graph!r}; choose one of them."
            )
        x = row_source(x).take(np.sort(rows))
        return tokens.pad(coexpression_mask(x, genes, top_k, n_special=len(SPECIAL_TOKENS)))
    linked = as_dense(graph)
    if linked.shape != (len(genes), len(genes)):
        raise ValueError(
            f"`gene_graph` must be a matrix (gene, gene) of the {len(genes)} genes of the data, got the shape {linked.shape}; "
            "order it like `adata.var_names`."
        )
    allowed = (linked != 0) | (linked != 0).T | np.eye(len(genes), dtype=bool)
    order = np.argsort(np.asarray(genes, dtype=object), kind="stable")
    return tokens.pad(pad_mask(~allowed[np.ix_(order, order)], len(SPECIAL_TOKENS)))


def check_representations(reps: pd.DataFrame, names: ConditionNames) -> pd.DataFrame:
    """Representations of single perturbations, checked.

    Raises
    ------
    TypeError
        If they are no frame.
    ValueError
        If names are repeated or no single perturbations, or values are not finite numbers.
    """
    if not isinstance(reps, pd.DataFrame):
        raise TypeError(
            f"`perturbation_reps` must be a DataFrame with one row per perturbation, got {type(reps).__name__}; make one with "
            "the names as index."
        )
    reps = reps.set_axis(reps.index.astype(str))
    wrong = [name for name in reps.index if names.parts(name) != (name,)]
    wrong += reps.index[reps.index.duplicated()].tolist()
    if wrong:
        raise ValueError(
            f"`perturbation_reps` has {len(wrong)} row(s) that are no single perturbation or are repeated (first: {wrong[0]!r}); give "
            "every perturbation one row."
        )
    values = reps.apply(pd.to_numeric, errors="coerce").to_numpy(dtype=np.float64)
    if not values.size or not np.isfinite(values).all():
        bad = reps.index[~np.isfinite(values).all(1)].tolist() or ["nothing"]
        raise ValueError(
            f"`perturbation_reps` has values that are no finite numbers (first in row: {bad[0]!r}); fill or leave out these rows."
        )
    return reps
