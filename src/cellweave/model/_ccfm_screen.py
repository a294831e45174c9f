"""What a cascaded flow learns of a screen before it is trained: tokens, gene graph, features, and what is simple to predict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from anndata import AnnData
from numpy.typing import NDArray
from scvi import settings

from cellweave.data import (
    SPECIAL_TOKENS,
    ConditionNames,
    FeatureCache,
    FeatureEncoder,
    PairTables,
    PerturbationTokens,
    Screen,
    coexpression_mask,
    pad_mask,
    row_source,
)
from cellweave.module import AnchorTable
from cellweave.stats import ANCHORS, AnchorRule, Evidence, ShiftTable, choose_anchors, expected_shift, with_contexts

from ._setup_perturbation import _gene_names, read_split

__all__ = ["ScreenMixin", "ScreenStudy"]

_FACTS = "screen"  # where the registry keeps what was learned
# Parts of the control cells, of which each is once what predictions are compared with.
_N_FOLDS = 5


class ScreenStudy(NamedTuple):
    """What the constructor of the model finds in the data."""

    facts: dict[str, Any]  # plain values, kept in the registry
    forbidden: NDArray[np.bool_] | None  # gene graph
    evidence: Evidence  # means of the training cells


class ScreenMixin:
    """Study of the screen that a model is made with, and what follows from it for any data."""

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
        evidence = _evidence(x, screen, rows, genes)
        table = evidence.table
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
            "anchors": [rule.to_dict() for rule in _rules(anchor, x, screen, rows, genes)],
        }
        self._screen_cache = (adata, screen)
        return ScreenStudy(facts, _forbidden(gene_graph, graph_top_k, x, rows, tokens), evidence)

    def _training_rows(self, adata: AnnData) -> NDArray[np.int64]:
        """Cells that may be learned from, whatever the random split will be."""
        key = self._setup["split_key"]
        return np.arange(adata.n_obs) if key is None else np.flatnonzero(read_split(adata.obs, key) == 0)

    # ---------------------------------------------------------------- what was learned

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
    def _anchor_rules(self) -> list[AnchorRule]:
        return [AnchorRule.from_dict(rule) for rule in self._facts["anchors"]]

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

    # ---------------------------------------------------------------- anchors

    def _remember(self, evidence: Evidence) -> None:
        """Keep the means of the training cells with the weights."""
        table = evidence.table
        rows, columns = np.nonzero(table.is_observed)
        kept = {
            "control_mean": np.nan_to_num(table.control_mean),
            "control_count": table.control_count,
            "shift": table.shift[rows, columns],
            "noise": evidence.noise[rows, columns],
            "count": table.count[rows, columns],
            "context": rows,
            "condition": columns,
        }
        for name, values in kept.items():
            buffer = getattr(self.module.anchors, name)
            buffer.copy_(torch.from_numpy(np.asarray(values)).to(buffer.dtype))

    def _evidence(self) -> Evidence:
        """Means of the training cells."""
        facts, kept = self._facts, self.module.anchors
        conditions = tuple(tuple(condition) for condition in facts["conditions"])
        shape = (len(facts["contexts"]), len(conditions))
        rows, columns = kept.context.cpu().numpy(), kept.condition.cpu().numpy()
        shift = np.full((*shape, len(facts["genes"])), np.nan)
        shift[rows, columns] = kept.shift.cpu().numpy()
        count = np.zeros(shape, dtype=np.int64)
        count[rows, columns] = kept.count.cpu().numpy()
        control_count = kept.control_count.cpu().numpy()
        control_mean = np.where(control_count[:, None] > 0, kept.control_mean.cpu().numpy().astype(np.float64), np.nan)
        contexts, genes = tuple(facts["contexts"]), tuple(facts["genes"])
        noise = np.full(shape, np.nan)
        noise[rows, columns] = kept.noise.cpu().numpy()
        return Evidence(ShiftTable(contexts, conditions, control_mean, control_count, shift, count, genes), noise)

    def _anchor_tables(self, screen: Screen) -> tuple[NDArray[np.float32], NDArray[np.int64]] | None:
        """Expected shift of every group of ``screen``: rows, and the row of each group."""
        rules = self._anchor_rules
        if not rules:
            return None
        evidence, n_contexts = self._evidence(), len(screen.contexts)
        groups = np.unique(screen.treatment * n_contexts + screen.context)
        row = np.zeros(len(screen.treatments) * n_contexts, dtype=np.int64)
        row[groups] = np.arange(len(groups))
        shifts = [
            expected_shift(evidence, screen.contexts[g % n_contexts], screen.treatments[g // n_contexts][0], rules)
            for g in groups.tolist()
        ]
        return np.asarray(shifts, dtype=np.float32), row

    # ---------------------------------------------------------------- batches

    def _pair_tables(self) -> PairTables:
        """What training batches hold beyond expression."""
        screen, tokens = self._screen(), self._tokens
        doses = None
        known = {*self._facts["genes"], *self._facts["others"]}
        # conditions that are held out may have parts that the model does not know; they are never drawn
        usable = [parts if known.issuperset(parts) else () for parts in screen.conditions]
        encoded = tokens.encode(usable, self._pad_with_control)
        if self._setup["dosage_key"] is not None:
            doses = np.ones(encoded.shape, dtype=np.float32)
            for row, (_, given) in zip(doses, screen.treatments, strict=True):
                row[: len(given)] = given
        features = self._training_features()
        return PairTables(
            screen,
            tokens.gene_tokens(),
            encoded,
            doses,
            self._anchor_tables(screen),
            None if features is None else features.get,
            None if features is None else features.has_features,
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
                f"The encoder {self._facts['encoder']['name']!r} is not saved with the model; make these embeddings with the "
                "model that was trained, or use `kind='noise'`."
            )
        return self._features.transform(adata, self._expression_of(adata), rows)


def _feature_facts(cache: FeatureCache) -> dict[str, Any]:
    compression = None if cache.compression is None else cache.compression.to_dict()
    return {"level": cache.level, "dim": cache.dim, "statistics": cache.statistics.to_dict(), "compression": compression}


def _evidence(
    x: Any, screen: Screen, rows: NDArray[np.int64], genes: Sequence[str], keep: NDArray[np.bool_] | None = None
) -> Evidence:
    """Means of training cells, or of those that ``keep`` says ``(cell,)``; contexts in the order of the screen."""
    used = np.sort(rows if keep is None else rows[keep[rows]])
    conditions, contexts = screen.conditions, screen.contexts
    evidence = Evidence.from_cells(
        row_source(x).take(used),
        [conditions[i] for i in screen.treatment[used].tolist()],
        [contexts[i] for i in screen.context[used].tolist()],
        genes,
    )
    return with_contexts(evidence, contexts)


def _rules(
    anchor: str | None, x: Any, screen: Screen, rows: NDArray[np.int64], genes: Sequence[str]
) -> list[AnchorRule]:
    """Rules of the anchor: chosen by cross-validation, or the one that was named."""
    if anchor is None:
        return []
    if anchor not in ("auto", *ANCHORS):
        raise ValueError(f"`anchor` must be 'auto', None or one of {', '.join(ANCHORS)}, got {anchor!r}; choose one of them.")
    if anchor != "auto":
        return [AnchorRule(anchor)]
    control = screen.is_control
    fold = np.random.default_rng(settings.seed or 0).integers(_N_FOLDS, size=len(control))
    parts = [[~control | side for side in (fold != i, fold == i)] for i in range(_N_FOLDS)]
    folds = [[_evidence(x, screen, rows, genes, keep) for keep in pair] for pair in parts]
    return choose_anchors([(seen, held_out.table) for seen, held_out in folds])


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
    linked = graph.toarray() if sp.issparse(graph) else np.asarray(graph)
    if linked.shape != (len(genes), len(genes)):
        raise ValueError(
            f"`gene_graph` must be a matrix (gene, gene) of the {len(genes)} genes of the data, got the shape {linked.shape}; "
            "order it like `adata.var_names`."
        )
    allowed = (linked != 0) | (linked != 0).T | np.eye(len(genes), dtype=bool)
    order = np.argsort(np.asarray(genes, dtype=object), kind="stable")
    return tokens.pad(pad_mask(~allowed[np.ix_(order, order)], len(SPECIAL_TOKENS)))


def anchor_table(facts: Mapping[str, Any]) -> AnchorTable:
    """Empty table of the size of the training cells."""
    return AnchorTable(len(facts["contexts"]), facts["n_observed"], len(facts["genes"]))


