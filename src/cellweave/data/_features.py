"""Features of cells that a flow generates beside the expression: what other methods say about a cell, or about its genes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from anndata import AnnData
from numpy.typing import ArrayLike, NDArray
from sklearn.decomposition import PCA

from cellweave._compat import SCVI_UUID_KEY

from ._densify import as_dense
from ._rows import row_source

__all__ = [
    "CallableFeatures",
    "FeatureEncoder",
    "FeatureLevel",
    "GeneTableFeatures",
    "ModelFeatures",
    "ObsmFeatures",
    "PCAFeatures",
    "encode_checked",
    "make_encoder",
]

FeatureLevel = Literal["gene", "cell"]

_CHOICES = "'none', 'pca', 'obsm:KEY', a trained model with `get_latent_representation`, a function or a FeatureEncoder"
# Models that a user may ask for by name; they come as objects, since their weights do.
_MODELS = ("geneformer", "scgpt", "scvi", "stack")
# Cells that a function gets at once.
_BLOCK = 1024
# Cells that tell how many features a model gives.
_PROBE = 64


@runtime_checkable
class FeatureEncoder(Protocol):
    """What turns cells into features. It is used before training only: neither trained nor needed for predictions.

    Attributes
    ----------
    name
        Short name, for messages and saved models.
    level
        ``"cell"`` for features of the whole cell, ``"gene"`` for features of every gene of a cell.
    dim
        Number of features; 0 before :meth:`fit`.

    Notes
    -----
    An encoder of the level ``"gene"`` may also have the attribute ``has_features``, bool ``(gene,)``, which tells after
    :meth:`fit` which genes have features; without it all have.
    """

    name: str
    level: FeatureLevel
    dim: int

    def fit(self, adata: AnnData, x: Any, rows: NDArray[np.int64]) -> None:
        """Learn what is needed from training cells; the same cells give the same encoder.

        Parameters
        ----------
        adata
            All cells.
        x
            Their log-normalised expression ``(cell, gene)``: an array, a sparse matrix or :class:`Rows`.
        rows
            Training cells.
        """

    def encode(self, adata: AnnData, x: Any, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Features of some cells, ``(cell, dim)`` or ``(cell, gene, dim)``, without NaN.

        Parameters
        ----------
        adata, x
            As in :meth:`fit`.
        rows
            The wanted cells.
        """

    def config(self) -> dict[str, Any]:
        """What tells this encoder from others, as plain JSON."""


# ---------------------------------------------------------------- encoders


class PCAFeatures:
    """Principal components of the log-normalised expression of training cells; sparse input stays sparse.

    Parameters
    ----------
    n_components
        Number of components; must be smaller than the numbers of training cells and of genes.
    """

    name = "pca"
    level: FeatureLevel = "cell"

    def __init__(self, n_components: int = 30) -> None:
        if n_components < 1:
            raise ValueError(f"`n_components` must be at least 1, got {n_components}; choose a positive number.")
        self.n_components, self.dim = n_components, 0

    def fit(self, adata: AnnData, x: Any, rows: NDArray[np.int64]) -> None:
        """Find the components of the training cells; see :class:`FeatureEncoder`."""
        cells = row_source(x)[rows]
        if min(cells.shape) <= self.n_components:
            raise ValueError(
                f"`n_components`={self.n_components} needs more training cells and genes than that, got {cells.shape[0]} "
                f"cells and {cells.shape[1]} genes; use `encoder=PCAFeatures(n)` with a smaller number."
            )
        # the only solver that takes sparse and dense cells in all supported versions, and never makes sparse ones dense
        self._pca = PCA(self.n_components, svd_solver="arpack", random_state=0).fit(_double(cells))
        self.dim = self.n_components

    def encode(self, adata: AnnData, x: Any, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Scores ``(cell, component)``; see :class:`FeatureEncoder`."""
        source, starts = row_source(x), range(0, len(rows), _BLOCK)
        blocks = [self._pca.transform(_double(source[rows[i : i + _BLOCK]])).astype(np.float32) for i in starts]
        return np.concatenate([np.empty((0, self.dim), dtype=np.float32), *blocks])

    def config(self) -> dict[str, Any]:
        """See :class:`FeatureEncoder`."""
        return {"name": self.name, "level": self.level, "dim": self.dim, "n_components": self.n_components}


class ObsmFeatures:
    """Features that are already in ``adata.obsm``, such as an embedding of another method.

    Parameters
    ----------
    key
        Key in ``obsm``: an array, sparse matrix or DataFrame of numbers ``(cell, feature)``.
    """

    level: FeatureLevel = "cell"

    def __init__(self, key: str) -> None:
        self.key, self.name, self.dim = key, f"obsm:{key}", 0

    def fit(self, adata: AnnData, x: Any, rows: NDArray[np.int64]) -> None:
        """Count the features; see :class:`FeatureEncoder`."""
        self.dim = self.encode(adata, x, rows[:1]).shape[1]

    def encode(self, adata: AnnData, x: Any, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Rows of the stored array; see :class:`FeatureEncoder`."""
        if self.key not in adata.obsm:
            found = ", ".join(map(repr, sorted(adata.obsm))) or "nothing"
            raise ValueError(
                f"`adata.obsm` has no {self.key!r}, it has {found}; compute it first, or name another key."
            )
        values = adata.obsm[self.key]
        values = values.iloc[rows] if isinstance(values, pd.DataFrame) else values[rows]
        values = values.toarray() if sp.issparse(values) else values
        try:
            return np.asarray(values, dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"`adata.obsm[{self.key!r}]` holds values that are no numbers ({error}); keep numeric columns only."
            ) from error

    def config(self) -> dict[str, Any]:
        """See :class:`FeatureEncoder`."""
        return {"name": self.name, "level": self.level, "dim": self.dim}


class ModelFeatures:
    """Embedding of cells by a trained model of cellweave or scvi-tools.

    The model gets the AnnData as it is, so it must find there what it needs: for most models a layer of counts. The
    AnnData is not changed.

    Parameters
    ----------
    model
        Trained model with ``get_latent_representation(adata, indices)``.
    """

    level: FeatureLevel = "cell"

    def __init__(self, model: Any) -> None:
        kind = type(model).__name__
        if not getattr(model, "is_trained", True):
            raise ValueError(f"`encoder` is a {kind} that is not trained; train it first.")
        self.model, self.name, self.dim = model, f"model:{kind}", 0

    def fit(self, adata: AnnData, x: Any, rows: NDArray[np.int64]) -> None:
        """Count the features of a few cells; see :class:`FeatureEncoder`."""
        self.dim = self.encode(adata, x, rows[:_PROBE]).shape[1]

    def encode(self, adata: AnnData, x: Any, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Embedding ``(cell, dim)``; see :class:`FeatureEncoder`."""
        unique, place = np.unique(rows, return_inverse=True)
        known = adata.isbacked or getattr(self.model, "adata", None) is adata
        data = adata if known else _shallow(adata)
        with _kept_random_state():
            values = self.model.get_latent_representation(adata=data, indices=unique)
        if not known:
            _forget(self.model, data)
        return np.asarray(values, dtype=np.float32)[place]

    def config(self) -> dict[str, Any]:
        """See :class:`FeatureEncoder`; ``weights`` is a checksum of the model."""
        module = getattr(self.model, "module", None)
        state = module.state_dict() if isinstance(module, torch.nn.Module) else {}
        arrays = {name: value.detach().cpu().numpy() for name, value in state.items() if hasattr(value, "detach")}
        return {"name": self.name, "level": self.level, "dim": self.dim, "weights": _digest(arrays)}


class CallableFeatures:
    """Features by a function of the expression.

    Parameters
    ----------
    function
        From log-normalised expression, a dense float32 array ``(cell, gene)``, to features ``(cell, dim)`` or
        ``(cell, gene, dim)``. It gets blocks of cells, so the features of a cell must not depend on other cells.
    level
        Whether these are features of the ``"cell"`` or of every ``"gene"``.
    name
        Name of the encoder; that of the function by default.
    """

    def __init__(
        self,
        function: Callable[[NDArray[np.float32]], ArrayLike],
        level: FeatureLevel = "cell",
        name: str | None = None,
    ) -> None:
        if level not in ("gene", "cell"):
            raise ValueError(f"`level` must be 'gene' or 'cell', got {level!r}; choose one of them.")
        self.function, self.dim = function, 0
        self.level: FeatureLevel = level
        self.name = str(name or getattr(function, "__name__", type(function).__name__))

    def fit(self, adata: AnnData, x: Any, rows: NDArray[np.int64]) -> None:
        """Count the features of one cell; see :class:`FeatureEncoder`."""
        self.dim = self.encode(adata, x, rows[:1]).shape[-1]

    def encode(self, adata: AnnData, x: Any, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """What the function gives; see :class:`FeatureEncoder`."""
        source, ndim = row_source(x), 3 if self.level == "gene" else 2
        starts = range(0, max(len(rows), 1), _BLOCK)
        blocks = [np.asarray(self.function(as_dense(source[rows[i : i + _BLOCK]])), dtype=np.float32) for i in starts]
        if wrong := [block for block in blocks if block.ndim != ndim]:
            raise ValueError(
                f"`encoder` {self.name!r} of `level`={self.level!r} must give {ndim} axes, got the shape {wrong[0].shape}; "
                "give (cell, dim) at the level 'cell' and (cell, gene, dim) at the level 'gene'."
            )
        return np.concatenate(blocks)

    def config(self) -> dict[str, Any]:
        """See :class:`FeatureEncoder`."""
        return {"name": self.name, "level": self.level, "dim": self.dim}


class GeneTableFeatures:
    """A fixed vector per gene, times the expression of the gene in the cell.

    Parameters
    ----------
    table
        Vectors ``(gene, feature)``, with the names of genes as index; genes of the data without a vector have no features.
    gene_symbols_key
        Column of ``adata.var`` with the names that the table uses; ``var_names`` by default.
    """

    name = "gene_features"
    level: FeatureLevel = "gene"

    def __init__(self, table: pd.DataFrame, gene_symbols_key: str | None = None) -> None:
        if not isinstance(table, pd.DataFrame):
            raise ValueError(
                f"`table` must be a DataFrame (gene, feature), got a {type(table).__name__}; name its genes."
            )
        if twice := table.index[table.index.duplicated()].unique().tolist():
            raise ValueError(f"`table` has {len(twice)} repeated genes (first: {twice[0]!r}); keep one row per gene.")
        try:
            values = table.to_numpy(dtype=np.float32, na_value=np.nan)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"`table` holds values that are no numbers ({error}); keep numeric columns only."
            ) from error
        if bad := table.index[~np.isfinite(values).all(1)].tolist():
            raise ValueError(
                f"`table` has values that are not finite in {len(bad)} genes (first: {bad[0]!r}); fill or drop them."
            )
        self.table = pd.DataFrame(values, index=table.index)
        self.gene_symbols_key, self.dim = gene_symbols_key, table.shape[1]
        self.has_features: NDArray[np.bool_] | None = None

    def fit(self, adata: AnnData, x: Any, rows: NDArray[np.int64]) -> None:
        """Find the genes in the table; see :class:`FeatureEncoder`."""
        names = self._names(adata)
        self.has_features = np.asarray(names.isin(self.table.index))
        if not self.has_features.any():
            raise ValueError(
                f"`table` has none of the {len(names)} genes of the data (first: {names[0]!r}, in the table "
                f"{self.table.index[0]!r}); use the same gene names, or `gene_symbols_key`."
            )

    def encode(self, adata: AnnData, x: Any, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Expression times vectors ``(cell, gene, dim)``, 0 for genes without; see :class:`FeatureEncoder`."""
        vectors = self.table.reindex(self._names(adata)).to_numpy(dtype=np.float32)
        return as_dense(row_source(x)[rows])[:, :, None] * np.nan_to_num(vectors)[None]

    def _names(self, adata: AnnData) -> pd.Index:
        if self.gene_symbols_key is None:
            return adata.var_names
        if self.gene_symbols_key not in adata.var:
            raise ValueError(
                f"`gene_symbols_key`={self.gene_symbols_key!r} is not in `adata.var`; name one of its columns."
            )
        return pd.Index(adata.var[self.gene_symbols_key].astype(str))

    def config(self) -> dict[str, Any]:
        """See :class:`FeatureEncoder`; ``table`` is a checksum."""
        names = "\n".join(map(str, self.table.index)).encode()
        checksum = _digest({"names": np.frombuffer(names, dtype=np.uint8), "values": self.table.to_numpy()})
        return {"name": self.name, "level": self.level, "dim": self.dim, "table": checksum}


# ---------------------------------------------------------------- choosing and using one


def make_encoder(spec: Any) -> FeatureEncoder | None:
    """The encoder that a user asks for.

    Parameters
    ----------
    spec
        ``"none"`` or None, ``"pca"``, ``"obsm:KEY"``, a trained model with ``get_latent_representation``, a function of the
        expression, or an encoder.

    Returns
    -------
    The encoder, not fitted; None for no features.

    Raises
    ------
    ValueError
        If it is none of these.
    """
    if spec is None or isinstance(spec, str):
        return _named(spec or "none")
    if not isinstance(spec, type):  # a class instead of an object is a common slip, and callable
        if isinstance(spec, FeatureEncoder):
            return spec
        if hasattr(spec, "get_latent_representation"):
            return ModelFeatures(spec)
        if callable(spec):
            return CallableFeatures(spec)
    raise ValueError(f"`encoder` must be {_CHOICES}, got {spec!r}; choose one of them.")


def _named(name: str) -> FeatureEncoder | None:
    if name == "none":
        return None
    if name == "pca":
        return PCAFeatures()
    if name.startswith("obsm:") and len(name) > len("obsm:"):
        return ObsmFeatures(name.removeprefix("obsm:"))
    if name.lower() in _MODELS:
        raise ValueError(f"`encoder` got the name {name!r} of a model; pass the trained model object instead.")
    raise ValueError(f"`encoder` must be {_CHOICES}, got {name!r}; choose one of them.")


def encode_checked(encoder: FeatureEncoder, adata: AnnData, x: Any, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """Features of some cells, after a look at their shape and for NaN.

    Parameters
    ----------
    encoder
        Fitted encoder.
    adata, x
        See :class:`FeatureEncoder`.
    rows
        The wanted cells.

    Raises
    ------
    ValueError
        If the encoder gives another shape than it says, or values that are not finite; names the first cell.
    """
    values = np.asarray(encoder.encode(adata, x, rows), dtype=np.float32)
    genes = (adata.n_vars,) if encoder.level == "gene" else ()
    expected = (len(rows), *genes, encoder.dim)
    if values.shape != expected:
        raise ValueError(
            f"`encoder` {encoder.name!r} must give features of the shape {expected}, got {values.shape}; mend its `encode`."
        )
    if not np.isfinite(values).all():
        bad = np.flatnonzero(~np.isfinite(values).reshape(len(rows), -1).all(1))
        first = adata.obs_names[rows[bad[0]]]
        raise ValueError(
            f"`encoder` {encoder.name!r} gives values that are not finite in {len(bad)} cells (first: {first!r}); compute "
            "its features for all cells, or leave these cells out."
        )
    return values


def _double(block: Any) -> Any:
    """In double precision, so that the components do not depend on the order of sums."""
    return block.astype(np.float64)


def _digest(arrays: Mapping[str, NDArray]) -> str:
    digest = hashlib.sha256()
    for name, values in arrays.items():
        digest.update(f"{name} {values.dtype} {values.shape}".encode() + np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()[:12]


def _shallow(adata: AnnData) -> AnnData:
    """The same matrices in another AnnData, to which a model of scvi-tools may add its columns."""
    copied = {name: dict(getattr(adata, name)) for name in ("layers", "obsm", "varm", "uns")}
    return AnnData(adata.X, obs=adata.obs.copy(), var=adata.var.copy(), **copied)


def _forget(model: Any, adata: AnnData) -> None:
    """Let a model of scvi-tools forget data that it registered, which it would keep for as long as it lives."""
    registered = getattr(model, "_per_instance_manager_store", {}).get(getattr(model, "id", None), {})
    if getattr(model, "adata", None) is not adata:
        registered.pop(adata.uns.get(SCVI_UUID_KEY), None)


@contextmanager
def _kept_random_state() -> Iterator[None]:
    """Models of scvi-tools draw from the global generators even where they return means."""
    state = np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        np.random.set_state(state)
