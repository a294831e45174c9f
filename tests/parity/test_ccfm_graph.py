"""Numerical parity of the co-expression graph with the published one."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from ccfm_numbers import meta, numbers

from cellweave.data import coexpression, coexpression_mask, pad_mask, top_k_mask

pytestmark = pytest.mark.parity

as_stored = pytest.mark.parametrize("as_stored", [np.asarray, sp.csr_matrix, sp.csc_array], ids=["dense", "csr", "csc"])


@as_stored
def test_correlation(as_stored):
    """Protects the correlation: second logarithm, and genes that do not vary, whatever the storage."""
    a = numbers("ccfm_graph")
    np.testing.assert_allclose(coexpression(as_stored(a["x"])), a["corr"], rtol=1e-9, atol=1e-12)


@as_stored
@pytest.mark.parametrize("negative", [False, True])
def test_mask(negative, as_stored):
    """Protects the choice of links, their symmetry, the order of the genes and the place of special tokens."""
    a, graph = numbers("ccfm_graph"), meta()["graph"]
    mask = top_k_mask(a["corr"], graph["topk"], negative)
    np.testing.assert_array_equal(mask, a[f"mask_neg{int(negative)}"])
    n_special = len(graph["specials"])
    padded = coexpression_mask(as_stored(a["x"]), list(a["names"]), graph["topk"], negative, n_special)
    np.testing.assert_array_equal(padded, a[f"padded_neg{int(negative)}"])
    order = np.argsort(a["names"])
    np.testing.assert_array_equal(padded, pad_mask(mask[np.ix_(order, order)], n_special))
    assert [graph["vocab"][name] for name in a["names"][order]] == list(range(n_special, len(padded)))
