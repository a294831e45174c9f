"""Which genes are expressed together, as a mask of the interaction of their vectors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

__all__ = ["coexpression", "coexpression_mask", "pad_mask", "top_k_mask"]

# Cells that are dense at once.
_BLOCK = 4096


def coexpression(x: NDArray | sp.spmatrix | sp.sparray) -> NDArray[np.float64]:
    """Pearson correlation of genes over cells, after ``log1p`` of the (already log-normalised) expression.

    Genes that do not vary have the correlation 0 with every other gene. Sparse input stays sparse: only blocks of cells
    are made dense.

    Parameters
    ----------
    x
        Log-normalised expression ``(cell, gene)``; negative values count as 0.

    Returns
    -------
    Matrix ``(gene, gene)`` in [-1, 1] with the diagonal 1.

    Raises
    ------
    ValueError
        If there are fewer than two cells, or values that are not finite.
    """
    n_cells, n_genes = x.shape
    if n_cells < 2:
        raise ValueError(f"`x` must hold at least two cells for a correlation, got {n_cells}; give more cells.")
    total = np.zeros(n_genes)
    for block in _blocks(x):
        total += block.sum(0)
    if bad := int((~np.isfinite(total)).sum()):
        first = int((~np.isfinite(total)).argmax())
        raise ValueError(
            f"`x` has values that are not finite in {bad} genes (first: column {first}); replace NaN and infinite values."
        )
    mean, cross = total / n_cells, np.zeros((n_genes, n_genes))
    for block in _blocks(x):
        block -= mean
        cross += block.T @ block
    return _correlation(cross, mean)


def _correlation(cross: NDArray[np.float64], mean: NDArray[np.float64]) -> NDArray[np.float64]:
    """Correlation from centred cross products."""
    length = np.sqrt(cross.diagonal())
    # a gene that is the same number in all cells varies by rounding only
    varies = length > 1e-12 * np.maximum(np.abs(mean), 1)
    scale = np.divide(1, length, where=varies, out=np.zeros_like(length))
    out = np.clip(cross * scale[:, None] * scale[None, :], -1, 1)
    np.fill_diagonal(out, 1)
    return out


def _blocks(x: NDArray | sp.spmatrix | sp.sparray) -> Iterator[NDArray[np.float64]]:
    rows = sp.csr_matrix(x) if sp.issparse(x) else x
    for start in range(0, x.shape[0], _BLOCK):
        block = rows[start : start + _BLOCK]
        dense = block.toarray() if isinstance(block, sp.csr_matrix) else np.asarray(block)
        yield np.log1p(np.maximum(dense.astype(np.float64), 0))


def top_k_mask(correlation: NDArray[np.floating], top_k: int = 30, negative_edges: bool = True) -> NDArray[np.bool_]:
    """Link every gene to those it correlates with most, and forbid all other pairs.

    Every gene chooses the ``top_k`` genes of largest absolute correlation, without those of correlation 0; a link holds
    in both directions as soon as one gene chose the other.

    Parameters
    ----------
    correlation
        Matrix ``(gene, gene)``.
    top_k
        Genes that every gene chooses.
    negative_edges
        False keeps a link of negative correlation only where both genes chose each other, as published.

    Returns
    -------
    True where a gene must not see another ``(gene, gene)``; symmetric, the diagonal is false.

    Raises
    ------
    ValueError
        If ``top_k`` is below 1.
    """
    if top_k < 1:
        raise ValueError(f"`top_k` must be at least 1, got {top_k}; choose how many genes every gene is linked to.")
    weight = np.abs(correlation) if negative_edges else np.array(correlation, copy=True)
    n_genes = len(weight)
    strength = np.abs(weight)
    np.fill_diagonal(strength, -1)  # never chosen
    k = min(top_k, n_genes - 1)
    chosen = np.argpartition(-strength, k - 1, axis=1)[:, :k] if k else np.empty((n_genes, 0), dtype=np.intp)
    kept = np.zeros_like(weight)
    np.put_along_axis(kept, chosen, np.take_along_axis(weight, chosen, 1), 1)
    allowed = np.maximum(kept, kept.T) != 0
    np.fill_diagonal(allowed, True)
    return ~allowed


def pad_mask(mask: NDArray[np.bool_], n_special: int = 4) -> NDArray[np.bool_]:
    """Put special tokens before the genes; they see only themselves, and no gene sees them.

    Parameters
    ----------
    mask
        True where a gene must not see another ``(gene, gene)``.
    n_special
        Number of special tokens.

    Returns
    -------
    Mask ``(token, token)``.
    """
    padded = np.pad(mask, (n_special, 0), constant_values=True)
    np.fill_diagonal(padded, False)
    return padded


def coexpression_mask(
    x: NDArray | sp.spmatrix | sp.sparray,
    names: Sequence[str],
    top_k: int = 30,
    negative_edges: bool = True,
    n_special: int = 4,
) -> NDArray[np.bool_]:
    """Mask of the interaction of gene vectors, for special tokens followed by the genes in alphabetical order.

    Parameters
    ----------
    x
        Log-normalised expression of training cells ``(cell, gene)``.
    names
        Names of the genes ``(gene,)``.
    top_k
        Genes that every gene is linked to, at least.
    negative_edges
        See :func:`top_k_mask`.
    n_special
        Number of special tokens before the genes.

    Returns
    -------
    True where a token must not see another ``(token, token)``.

    Raises
    ------
    ValueError
        If the names do not fit, are not unique, or the expression cannot be used.

    References
    ----------
    The graph of scDFM, arXiv 2602.07103 (2026).
    """
    if len(names) != x.shape[1]:
        raise ValueError(f"`names` must name the {x.shape[1]} genes of `x`, got {len(names)}; give one name per gene.")
    order = np.argsort(np.asarray(names, dtype=object), kind="stable")
    ordered = [names[i] for i in order]
    if twice := [a for a, b in zip(ordered, ordered[1:], strict=False) if a == b]:
        raise ValueError(f"`names` has {len(twice)} repeated genes (first: {twice[0]!r}); make the names unique.")
    mask = top_k_mask(coexpression(x), top_k, negative_edges)
    return pad_mask(mask[np.ix_(order, order)], n_special)
