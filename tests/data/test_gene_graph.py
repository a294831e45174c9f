"""The co-expression graph: the correlation is Pearson's, links are symmetric, bad input is named."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from cellweave.data import _gene_graph as graph
from cellweave.data import coexpression, coexpression_mask, pad_mask, top_k_mask


def _expression(n_cells=60, n_genes=9, seed=0):
    x = np.random.default_rng(seed).gamma(1.0, size=(n_cells, n_genes))
    x[x < 0.5] = 0
    x[:, 3] = x[:, 2] + 0.1 * x[:, 3]
    return x.astype(np.float32)


def test_correlation_is_that_of_numpy(monkeypatch):
    """Protects the blocks: the correlation does not depend on how many cells are dense at once, nor on the storage."""
    x = _expression()
    expected = np.corrcoef(np.log1p(x.astype(np.float64)), rowvar=False)
    monkeypatch.setattr(graph, "_BLOCK", 7)
    for stored in (x, sp.csr_matrix(x), sp.csc_array(x)):
        np.testing.assert_allclose(coexpression(stored), expected, atol=1e-12)


def test_input_is_left_alone():
    """Protects the user's matrix."""
    x = _expression().astype(np.float64)
    before = x.copy()
    coexpression_mask(x, [f"g{i}" for i in range(9)], 2)
    np.testing.assert_array_equal(x, before)


def test_genes_that_do_not_vary_have_no_links():
    """Protects constant genes: no NaN, no link, and they still see themselves."""
    x = _expression()
    x[:, 1], x[:, 5] = 0, 0.3
    correlation = coexpression(x)
    assert np.isfinite(correlation).all()
    mask = top_k_mask(correlation, 3)
    for gene in (1, 5):
        assert (~mask[gene]).nonzero()[0].tolist() == [gene]


def test_links_are_symmetric_and_the_strongest():
    """Protects the choice: each gene keeps at least its strongest partners, in both directions, whatever their sign."""
    correlation = np.eye(5)
    for i, j, r in ((0, 1, 0.9), (0, 2, -0.8), (3, 4, 0.2), (1, 2, -0.1)):
        correlation[i, j] = correlation[j, i] = r
    allowed = ~top_k_mask(correlation, 1)
    np.testing.assert_array_equal(allowed, allowed.T)
    assert {(i, j) for i, j in zip(*allowed.nonzero(), strict=True) if i < j} == {(0, 1), (0, 2), (3, 4)}
    # gene 2 chose gene 0, but gene 0 chose gene 1: without the flag that negative link is lost
    assert top_k_mask(correlation, 1, negative_edges=False)[0, 2]


def test_more_partners_than_genes():
    """Protects small panels: every gene is linked to all others."""
    assert not top_k_mask(coexpression(_expression()), 30).any()


def test_special_tokens_are_alone():
    """Protects the place of special tokens: first, seeing and seen by nobody else."""
    padded = pad_mask(np.zeros((3, 3), dtype=bool), 2)
    assert (~padded[:2]).sum() == 2
    assert (~padded[:, :2]).sum() == 2
    assert not padded[2:, 2:].any()


def test_mask_follows_the_names():
    """Protects gene identity: the order of the columns does not matter."""
    x, names = _expression(), np.array([f"g{i}" for i in "zyxabcdef"])
    order = np.random.default_rng(1).permutation(9)
    np.testing.assert_array_equal(
        coexpression_mask(x, list(names), 2), coexpression_mask(x[:, order], list(names[order]), 2)
    )


def test_bad_input_is_named():
    """Protects from a graph of noise: each failure is one sentence."""
    x = _expression()
    names = [f"g{i}" for i in range(9)]
    with pytest.raises(ValueError, match="`names` must name the 9 genes of `x`, got 8"):
        coexpression_mask(x, names[:8])
    with pytest.raises(ValueError, match=r"`names` has 1 repeated genes \(first: 'g0'\); make the names unique."):
        coexpression_mask(x, ["g0", *names[:8]])
    with pytest.raises(ValueError, match="`x` must hold at least two cells for a correlation, got 1"):
        coexpression(x[:1])
    with pytest.raises(ValueError, match="`top_k` must be at least 1, got 0"):
        top_k_mask(np.eye(3), 0)
    x[4, 6] = np.nan
    with pytest.raises(ValueError, match=r"`x` has values that are not finite in 1 genes \(first: column 6\)"):
        coexpression(x)
