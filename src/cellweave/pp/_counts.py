from __future__ import annotations

from typing import TYPE_CHECKING, Any

from anndata import AnnData

from cellweave.data import _recover

if TYPE_CHECKING:
    import scipy.sparse as sp

__all__ = ["recover_counts"]


def recover_counts(data: AnnData | Any, layer: str | None = None, tolerance: float | None = None) -> sp.csr_matrix:
    r"""Recover raw integer counts from log-normalised expression.

    Many public files keep only :math:`x = \log(1 + s\,c)`, where c is the count and :math:`s` = target sum / library size
    is one unknown number per cell. Because the counts are integers, s and c follow from the values of the cell. Nothing is
    approximated: a cell whose values do not determine its counts raises an error.

    Parameters
    ----------
    data
        AnnData, or a dense or sparse matrix (cells x genes), with ``log1p`` (natural log) of depth-normalised counts. For
        values in ``adata.raw``, pass ``adata.raw.to_adata()``.
    layer
        Layer of the AnnData; default ``X``.
    tolerance
        Largest error of a stored value in natural log units, for example 5e-4 for values rounded to three decimals.
        Default: half of the last decimal if all values are rounded to two to five decimals, otherwise 0. The error of
        the floating-point type is always added.

    Returns
    -------
    scipy.sparse.csr_matrix
        Counts as float32, cells x genes, in the order of ``data``. Nothing is written into ``data``.

    Raises
    ------
    KeyError
        The layer does not exist.
    ValueError
        Values are negative, not finite or all integers, or do not determine integer counts; the message names the cell
        and how far its worst value is from an integer multiple.

    Notes
    -----
    If all counts of a cell share a divisor (a cell with counts 2 and 4 only), the smallest counts that fit are returned.

    Examples
    --------
    >>> import cellweave as cw, scanpy as sc
    >>> adata = sc.datasets.pbmc68k_reduced().raw.to_adata()
    >>> adata.layers["counts"] = cw.pp.recover_counts(adata)
    """
    if not isinstance(data, AnnData):
        if layer is not None:
            raise ValueError(f"layer='{layer}' needs an AnnData, found {type(data).__name__}; pass the matrix alone.")
        return _recover.recover_counts(data, tolerance=tolerance).counts
    values = data.X if layer is None else _layer(data, layer)
    if values is None:
        raise ValueError(f"adata.X is empty; choose a layer among {_names(data)}.")
    return _recover.recover_counts(values, tolerance=tolerance, cell_names=list(data.obs_names)).counts


def _layer(adata: AnnData, layer: str) -> Any:
    if layer not in adata.layers:
        raise KeyError(f"Layer '{layer}' is not in adata.layers; it has {_names(adata)}.")
    return adata.layers[layer]


def _names(adata: AnnData) -> list[str]:
    return sorted(key for key in adata.layers if key is not None)  # anndata 0.13 lists `X` as the layer None
