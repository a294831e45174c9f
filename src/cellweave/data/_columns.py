from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse as sp

__all__ = ["take_columns"]


def take_columns(x: Any, position: np.ndarray) -> sp.csr_matrix | np.ndarray:
    """Columns ``position`` of ``x``, zero where ``position`` is -1."""
    found = position >= 0
    if not isinstance(x, np.ndarray) and not sp.issparse(x):
        x = x[:]  # a backed matrix
    if sp.issparse(x):
        # a selection matrix does the reordering, dropping and zero filling in one sparse product
        n_found = int(found.sum())
        select = sp.csr_matrix(
            (np.ones(n_found, dtype=x.dtype), (position[found], np.flatnonzero(found))),
            shape=(x.shape[1], len(position)),
        )
        return sp.csr_matrix(x) @ select
    out = np.zeros((x.shape[0], len(position)), dtype=x.dtype)
    out[:, found] = x[:, position[found]]
    return out
