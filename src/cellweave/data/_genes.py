"""Genes are known by name: bring any AnnData into the gene order of a model."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray

from ._columns import take_columns
from ._rows import StackedRows, is_on_disk, row_source
from ._store import CellStore
from ._validate import _some, _warn, get_counts

__all__ = ["align_genes", "match_genes"]

logger = logging.getLogger(__name__)

_WARN_BELOW = 0.9
# Ensembl identifiers only: the point in a clone name such as RP11-34P13.7 belongs to the name.
_VERSION = re.compile(r"^(ENS[A-Z]*\d+)\.\d+$")


def align_genes(adata: AnnData, genes: Sequence[str], layer: str | None = None, min_overlap: float = 0.5) -> AnnData:
    """Return the counts of ``adata`` for exactly ``genes``, in that order.

    Genes are matched by name, as :func:`match_genes` describes. Genes that ``adata`` lacks become zero columns, genes
    that are not asked for are left out. The result shares ``obs`` values with ``adata`` but is a new object; ``adata``
    is not changed. How many genes were found is logged, and is a warning below 90 %.

    Parameters
    ----------
    adata
        Data whose ``var_names`` are gene names of the same kind as ``genes``.
    genes
        Names of the wanted genes, in the wanted order.
    layer
        Layer that holds the counts; ``adata.X`` by default. It is found under the same name in the result, and in
        its ``X``.
    min_overlap
        Least share of ``genes`` that must be found.

    Returns
    -------
    AnnData ``(cell, len(genes))`` with CSR or dense counts of the dtype of the input. Counts on disk stay there: a backed
    AnnData or a :class:`~cellweave.io.CellStore` gives a CellStore that aligns what it reads.

    Raises
    ------
    KeyError
        If there is no such layer, or no ``X``.
    ValueError
        If gene names are repeated, or fewer than ``min_overlap`` of ``genes`` are found.

    Examples
    --------
    Embed data that measured few of the genes of a model:

    >>> panel = cw.pp.align_genes(adata, model.genes, min_overlap=0.1)
    >>> adata.obsm["X_stack"] = model.get_latent_representation(panel)
    """
    wanted = pd.Index(genes)
    repeated = adata.var_names[adata.var_names.duplicated()].unique()
    if len(repeated):
        raise ValueError(
            f"`adata.var_names` repeats {len(repeated)} gene name(s) (first: {repeated[0]!r}); run "
            "`adata.var_names_make_unique()` or merge the columns before aligning."
        )
    position = match_genes(adata.var_names, wanted)
    _report(position, wanted, adata, min_overlap)
    x = get_counts(adata, layer)
    if layer is None and is_on_disk(x):
        paths = adata.paths if isinstance(adata, CellStore) else [Path(adata.filename)] if adata.filename else []
        return CellStore(StackedRows([row_source(x)], [position]), adata.obs.copy(), pd.DataFrame(index=wanted), paths)
    x = take_columns(x, position)
    aligned = AnnData(X=x, obs=adata.obs.copy(), var=pd.DataFrame(index=wanted))
    if layer is not None:
        aligned.layers[layer] = aligned.X
    return aligned


def match_genes(names: pd.Index, wanted: pd.Index) -> NDArray[np.intp]:
    """Position in ``names`` of every wanted gene.

    Equal names match. What is left is compared without the version suffix of Ensembl identifiers
    (``ENSG00000141510.12``). Letter case is never ignored.

    Parameters
    ----------
    names
        Unique gene names of data ``(column,)``.
    wanted
        Gene names of a model ``(gene,)``.

    Returns
    -------
    Positions ``(gene,)``, -1 where a gene is missing.

    Raises
    ------
    ValueError
        If identifiers that would match differ in nothing but their version.
    """
    position = names.get_indexer(wanted)
    left = np.flatnonzero(position < 0)
    free = np.setdiff1d(np.arange(len(names)), position)
    ours, theirs = _without_version(wanted[left]), _without_version(names[free])
    for owner, kept, others, full in (("model", ours, theirs, wanted[left]), ("data", theirs, ours, names[free])):
        twice = kept[kept.duplicated() & kept.isin(others)].unique()
        if len(twice):
            raise ValueError(
                f"The genes of the {owner} hold {len(twice)} identifier(s) in several versions (first: "
                f"{_some(full[kept == twice[0]])}), so which one to match is unclear; keep one version of each."
            )
    column = dict(zip(theirs, free, strict=True))
    position[left] = [column.get(name, -1) for name in ours]
    return position


def _without_version(names: pd.Index) -> pd.Index:
    return pd.Index([_VERSION.sub(r"\1", name) for name in names.astype(str)], dtype=object)


def _report(position: NDArray[np.intp], wanted: pd.Index, adata: AnnData, min_overlap: float) -> None:
    """Say how many genes were found, and how; refuse too few of them."""
    n_found = int((position >= 0).sum())
    overlap = n_found / len(wanted)
    found = f"{n_found} of the {len(wanted)} genes of the model are in `adata.var_names`"
    advice = _better_names(adata, wanted, position)
    if n_found == 0 or overlap < min_overlap:
        kinds = advice or "use the same kind of gene names (symbols or Ensembl identifiers)"
        fewer = ", or accept fewer with `cellweave.pp.align_genes(adata, model.genes, min_overlap=...)`"
        raise ValueError(
            f"Only {found} (first of the model: {wanted[:1].tolist()}, first of `adata`: "
            f"{adata.var_names[:1].tolist()}), less than `min_overlap={min_overlap}`; {kinds}{fewer if n_found else ''}."
        )
    _report_versions(position, wanted, adata)
    if overlap == 1:
        logger.info("All %d genes of the model are in the data.", n_found)
        return
    message = f"{found}; the others count as zero (first missing: {wanted[position < 0][0]!r})"
    if overlap < _WARN_BELOW or advice:
        _warn(f"{message}; {advice}." if advice else f"{message}.")
    else:
        logger.info("%s.", message)


def _report_versions(position: NDArray[np.intp], wanted: pd.Index, adata: AnnData) -> None:
    """A notice where names match only without their version suffix."""
    found = position >= 0
    matched = adata.var_names[position[found]]
    differs = np.flatnonzero(matched != wanted[found])
    if len(differs):
        first = differs[0]
        _warn(
            f"{len(differs)} of the {len(wanted)} genes match only without the version suffix of their Ensembl "
            f"identifier (first: {wanted[found][first]!r} and {matched[first]!r})."
        )


def _better_names(adata: AnnData, wanted: pd.Index, position: NDArray[np.intp]) -> str:
    """Advice where a column of ``var``, or another letter case, would find more genes; empty where nothing does."""
    n_found, stripped = int((position >= 0).sum()), _without_version(wanted).unique()
    missing = wanted[position < 0]
    best, advice = 0, ""
    for key in adata.var:
        if not pd.api.types.is_numeric_dtype(adata.var[key]):
            names = _without_version(pd.Index(adata.var[key].dropna().astype(str)))
            n_more = int(stripped.isin(names).sum()) - n_found
            if n_more > best:
                best, fix = n_more, f"set `adata.var_names = adata.var[{key!r}]`"
                advice = f"`adata.var[{key!r}]` would match {n_found + n_more} of them: {fix}"
    lower = {name.lower(): name for name in adata.var_names}
    same = [name for name in missing if name.lower() in lower]
    if len(same) > best:
        return (
            f"{len(same)} more would match in another letter case (first: {same[0]!r} and "
            f"{lower[same[0].lower()]!r}): rename them if they are genes of the same species"
        )
    return advice
