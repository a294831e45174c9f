"""Checks of log-normalised expression: every value, in every form in which it can be stored."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st

from cellweave.data import _validate as validate
from cellweave.data import check_expression

FORMS = {"csr": sp.csr_matrix, "csc": sp.csc_matrix, "csr_array": sp.csr_array, "dense": np.asarray}


def _adata(x) -> ad.AnnData:
    n_cells, n_genes = x.shape
    obs = pd.DataFrame(index=[f"cell{i}" for i in range(n_cells)])
    return ad.AnnData(x, obs=obs, var=pd.DataFrame(index=[f"gene{j}" for j in range(n_genes)]))


def _log_normalised(n_cells: int = 30) -> np.ndarray:
    counts = np.random.default_rng(0).poisson(1.0, size=(n_cells, 8)).astype(np.float32)
    return np.log1p(1e4 * counts / np.maximum(counts.sum(1, keepdims=True), 1))


@pytest.mark.parametrize(
    ("form", "dtype"), [("dense", np.float16), *((form, dtype) for form in FORMS for dtype in (np.float32, np.float64))]
)
def test_log_normalised_expression_is_accepted(form, dtype):
    """Protects clean data from false alarms, in any storage and precision."""
    check_expression(_adata(FORMS[form](_log_normalised().astype(dtype))))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.nan, "1 value.*NaN or infinite"),
        (np.inf, "1 value.*NaN or infinite"),
        (-np.inf, "1 value.*NaN or infinite"),
        (-1e-3, "1 value.*negative"),
        (21.0, "values up to 21, too large"),
    ],
)
def test_one_wrong_value_is_found(form, value, message, monkeypatch):
    """Protects from a single bad value, wherever it is: all blocks are read, and cell and gene are named."""
    monkeypatch.setattr(validate, "_BLOCK_ENTRIES", 5 * 8)  # five cells at a time
    x = _log_normalised()
    x[27, 5] = value
    with pytest.raises(ValueError, match=message) as error:
        check_expression(_adata(FORMS[form](x)))
    if "value(s) that" in str(error.value):
        assert "cell 'cell27', gene 'gene5'" in str(error.value)
        assert "in cells 25 to 29" in str(error.value)


@pytest.mark.parametrize("form", FORMS)
def test_counts_are_refused(form):
    """Protects from integers, also when a block of them stands beside others; one fraction is enough to pass."""
    counts = np.random.default_rng(0).poisson(2.0, size=(30, 8)).astype(np.float32)
    with pytest.raises(ValueError, match=r"`adata.X` holds integers up to \d+, which look like counts"):
        check_expression(_adata(FORMS[form](counts)))
    counts[29, 7] = 0.5
    check_expression(_adata(FORMS[form](counts)))


def test_entries_that_are_stored_in_pieces():
    """Protects matrices with repeated entries: parts of an entry say nothing about its value."""
    x = sp.csr_matrix(_log_normalised())
    coo = x.tocoo()
    twice = sp.csr_matrix(
        (np.concatenate([coo.data + 1, -np.ones_like(coo.data)]), (np.tile(coo.row, 2), np.tile(coo.col, 2))),
        shape=x.shape,
    )
    assert np.isclose(twice.toarray(), x.toarray(), atol=1e-5).all()
    pieces = sp.csr_matrix(
        (np.repeat(coo.data / 2, 2), np.repeat(coo.col, 2), 2 * x.indptr),
        shape=x.shape,
    )
    check_expression(_adata(pieces))


def test_layers_and_files(tmp_path):
    """Protects layers and backed files: the layer that was named is checked, and a file is read in blocks."""
    adata = _adata(_log_normalised())
    adata.layers["scaled"] = adata.X - 3
    check_expression(adata)
    with pytest.raises(ValueError, match=r"`adata.layers\['scaled'\]` has \d+ value\(s\) that are negative"):
        check_expression(adata, "scaled")
    with pytest.raises(KeyError, match="`layer='raw'` not found"):
        check_expression(adata, "raw")
    adata.write_h5ad(tmp_path / "a.h5ad")
    check_expression(ad.read_h5ad(tmp_path / "a.h5ad", backed="r"))


def test_nothing_but_zeros_is_refused():
    """Protects from an empty layer, sparse or dense."""
    for form in FORMS.values():
        with pytest.raises(ValueError, match="`adata.X` holds only zeros; give"):
            check_expression(_adata(form(np.zeros((4, 3), dtype=np.float32))))


@given(st.integers(0, 29), st.integers(0, 7), st.sampled_from([np.nan, np.inf, -0.5]), st.sampled_from(sorted(FORMS)))
def test_a_wrong_value_is_found_anywhere(cell, gene, value, form):
    """Protects the check from looking at a sample of the values only."""
    x = _log_normalised()
    x[cell, gene] = value
    with pytest.raises(ValueError, match=f"cell 'cell{cell}', gene 'gene{gene}'"):
        check_expression(_adata(FORMS[form](x)))
