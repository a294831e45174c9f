"""Checks of log-normalised expression, made before anything is written to the user's AnnData."""

from __future__ import annotations

from typing import Any

import numpy as np
from anndata import AnnData

from ._validate import _describe, _row_blocks, _values, get_counts

__all__ = ["check_expression"]

# log1p of a million counts per cell is below 14; what is larger was never taken the logarithm of.
_MAX_LOG = np.float32(20)
_HOW = "run `sc.pp.normalize_total(adata)` and `sc.pp.log1p(adata)`"


def check_expression(adata: AnnData, layer: str | None = None) -> None:
    """Check that ``adata.X`` or a layer holds log-normalised expression.

    Parameters
    ----------
    adata
        The data.
    layer
        Name of the layer; ``adata.X`` by default.

    Raises
    ------
    KeyError
        If there is no such layer, or no ``X``.
    ValueError
        If a value is NaN, infinite or negative, or the values are counts, normalised but not logarithmised, or all zero.
    """
    where = "adata.X" if layer is None else f"adata.layers[{layer!r}]"
    largest, is_integer = 0.0, True
    for start, block in _row_blocks(get_counts(adata, layer)):
        values = _values(block)
        if values.size == 0:
            continue
        _check_block(block, values, start, where, adata)
        largest = max(largest, float(values.max()))
        is_integer = is_integer and bool(np.all(values == np.rint(values)))
    if largest == 0:
        raise ValueError(f"`{where}` holds only zeros; give log-normalised expression with `layer=`.")
    if is_integer:
        raise ValueError(
            f"`{where}` holds integers up to {largest:g}, which look like counts, but the model reads log-normalised "
            f"expression; {_HOW}, or name a layer that holds it with `layer=`."
        )
    if largest > _MAX_LOG:
        raise ValueError(
            f"`{where}` has values up to {largest:.4g}, too large for log-normalised expression; {_HOW}, or name a layer that "
            "holds it with `layer=`."
        )


def _check_block(block: Any, values: np.ndarray, start: int, where: str, adata: AnnData) -> None:
    faults = [
        (~np.isfinite(values), "NaN or infinite", "fix or remove them"),
        (values < 0, "negative", "give expression that is log-normalised but not scaled, with `layer=`"),
    ]
    for bad, kind, advice in faults:
        if n_bad := int(np.count_nonzero(bad)):
            first = _describe(block, int(np.argmax(bad)), start, adata)
            raise ValueError(
                f"`{where}` has {n_bad} value(s) that are {kind} in cells {start} to {start + block.shape[0] - 1} "
                f"({first}); {advice}."
            )
