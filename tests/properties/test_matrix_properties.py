"""Properties of checks and gene alignment: what counts mean does not depend on how they are stored or named."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from cellweave.data import align_genes, check_counts, check_groups, gene_shares, looks_like_counts, match_genes
from cellweave.model import StackModel
from cellweave.pp import recover_counts

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning")

SHAPES = array_shapes(min_dims=2, max_dims=2, max_side=7)
COUNTS = arrays(np.float64, SHAPES, elements=st.integers(0, 2**24).map(float))
SMALL = arrays(np.float64, SHAPES, elements=st.integers(0, 100).map(float))
ODD = st.sampled_from([0.0, 1.0, 3.0, 0.5, -1.0, np.nan, np.inf, -np.inf, 2.0**24, 2.0**24 + 2, 1e20])
ANYTHING = arrays(np.float64, SHAPES, elements=ODD)
GENES = st.lists(st.sampled_from([f"g{i}" for i in range(12)]), min_size=1, unique=True)
DTYPES = [np.int8, np.uint16, np.int32, np.int64, np.float16, np.float32, np.float64]


def _in_parts(x: np.ndarray) -> sp.csr_matrix:
    """CSR with every entry stored in two parts and unsorted columns."""
    coo = sp.coo_matrix(x)
    half = np.floor(coo.data / 2)
    half[~np.isfinite(half)] = 0
    data, row, column = np.r_[half, coo.data - half], np.r_[coo.row, coo.row], np.r_[coo.col, coo.col]
    order = np.lexsort((-column, row))
    indptr = np.r_[0, np.cumsum(np.bincount(row, minlength=x.shape[0]))]
    return sp.csr_matrix((data[order], column[order], indptr), shape=x.shape)


STORAGE = {
    "dense": np.asarray,
    "fortran": np.asfortranarray,
    "csr": sp.csr_matrix,
    "csc": sp.csc_matrix,
    "csr_array": sp.csr_array,
    "csc_array": sp.csc_array,
    "parts": _in_parts,
}


def _adata(x, genes=None) -> AnnData:
    genes = [f"g{i}" for i in range(x.shape[1])] if genes is None else list(genes)
    obs = pd.DataFrame(index=[f"c{i}" for i in range(x.shape[0])])
    return AnnData(x, obs=obs, var=pd.DataFrame(index=genes))


def _dense(x) -> np.ndarray:
    return x.toarray() if sp.issparse(x) else np.asarray(x)


def _verdict(adata: AnnData, **options) -> str:
    """The error of the check, or its warnings, or nothing."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            check_counts(adata, **options)
        except ValueError as error:
            return str(error)
    return " | ".join(str(w.message) for w in caught)


@given(ANYTHING, st.booleans())
def test_checks_do_not_depend_on_the_storage(x, allow_noncounts):
    """Protects every user alike: the same verdict, count and first position for dense, CSR, CSC and split entries."""
    verdicts = {
        name: _verdict(_adata(convert(x)), allow_noncounts=allow_noncounts) for name, convert in STORAGE.items()
    }
    assert len(set(verdicts.values())) == 1, verdicts


@given(ANYTHING, st.integers(1, 30))
def test_checks_do_not_depend_on_the_block(x, entries):
    """Protects large matrices: read in blocks of any size, the same matrices are refused, with the same first position."""
    whole = _verdict(_adata(x))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cellweave.data._validate._BLOCK_ENTRIES", entries)
        in_blocks = _verdict(_adata(sp.csr_matrix(x)))
    assert (" has " in whole) == (" has " in in_blocks)
    if "non-integer" in whole or "have no counts" in whole:
        assert in_blocks == whole


@given(ANYTHING)
def test_checks_accept_exactly_the_counts(x):
    """Protects the definition: accepted are finite, non-negative integers up to 2^24 that are not all zero."""
    finite = np.isfinite(x).all()
    is_counts = finite and (x >= 0).all() and (x <= 2**24).all() and (x == np.floor(x)).all() and x.any()
    verdict = _verdict(_adata(x))
    assert (verdict == "" or "have no counts" in verdict) == bool(is_counts)


@given(ANYTHING)
def test_the_guess_of_counts_is_right(x):
    """Protects the proposed layer: what looks like counts holds non-negative integers only, in every storage."""
    assume(np.isfinite(x).all())
    expected = bool((x >= 0).all() and (x == np.floor(x)).all())
    assert {looks_like_counts(STORAGE[name](x)) for name in ("dense", "csr", "csr_array")} == {expected}


@given(SMALL, GENES, st.data())
def test_alignment_does_not_depend_on_the_storage(x, wanted, data):
    """Protects queries: dense, sparse and split entries align to the same counts."""
    genes = data.draw(st.permutations([f"g{i}" for i in range(12)]))[: x.shape[1]]
    assume(set(genes) & set(wanted))
    aligned = [_dense(align_genes(_adata(c(x), genes), wanted, min_overlap=0).X) for c in STORAGE.values()]
    for other in aligned[1:]:
        np.testing.assert_array_equal(other, aligned[0])


@given(SMALL, GENES, st.data())
def test_alignment_does_not_depend_on_the_order_of_columns(x, wanted, data):
    """Protects gene identity: any permutation of the columns of a query aligns to the same matrix."""
    adata = _adata(sp.csr_matrix(x))
    assume(set(adata.var_names) & set(wanted))
    order = data.draw(st.permutations(range(x.shape[1])))
    first, second = (align_genes(a, wanted, min_overlap=0) for a in (adata, adata[:, list(order)].copy()))
    np.testing.assert_array_equal(_dense(first.X), _dense(second.X))


@given(SMALL, GENES)
def test_alignment_is_idempotent(x, wanted):
    """Protects repeated alignment: data that have the genes of a model stay as they are."""
    adata = _adata(sp.csr_matrix(x))
    assume(set(adata.var_names) & set(wanted))
    once = align_genes(adata, wanted, min_overlap=0)
    twice = align_genes(once, wanted, min_overlap=1)
    assert list(twice.var_names) == list(wanted)
    np.testing.assert_array_equal(_dense(once.X), _dense(twice.X))


@given(SMALL, GENES, GENES)
def test_alignment_through_more_genes_changes_nothing(x, wanted, more):
    """Protects stores that hold the union of genes: a detour over a superset gives the same counts."""
    adata = _adata(sp.csr_matrix(x))
    assume(set(adata.var_names) & set(wanted))
    union = [*more, *(gene for gene in wanted if gene not in more)]
    detour = align_genes(align_genes(adata, union, min_overlap=0), wanted, min_overlap=0)
    np.testing.assert_array_equal(_dense(detour.X), _dense(align_genes(adata, wanted, min_overlap=0).X))


@given(SMALL, st.sampled_from(DTYPES), st.sampled_from(["dense", "csr"]))
def test_number_types_mean_the_same_counts(x, dtype, storage):
    """Protects mixed dtypes: checks and alignment of any number type equal those of float64."""
    assume(storage == "dense" or dtype is not np.float16)  # scipy has no sparse float16
    plain, cast = _adata(x), _adata(STORAGE[storage](x.astype(dtype)))
    assert _verdict(cast) == _verdict(plain)
    genes = list(plain.var_names[::-1])
    np.testing.assert_array_equal(_dense(align_genes(cast, genes).X), align_genes(plain, genes).X)


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=12, unique=True),
    st.lists(st.integers(1, 40), min_size=1, max_size=12, unique=True),
    st.lists(st.integers(0, 30), min_size=24, max_size=24),
)
def test_versions_are_no_part_of_the_identity(present, wanted, versions):
    """Protects Ensembl identifiers: any version on either side, or none, matches the same genes."""

    def named(numbers, suffixes):
        return pd.Index([f"ENSG{n:011d}" + (f".{v}" if v else "") for n, v in zip(numbers, suffixes, strict=False)])

    expected = pd.Index(present).get_indexer(wanted)
    actual = match_genes(named(present, versions), named(wanted, versions[::-1]))
    np.testing.assert_array_equal(actual, expected)


@given(GENES, GENES)
def test_matches_are_equal_names_at_the_right_place(names, wanted):
    """Protects gene identity: a match is an equal name, and no equal name is missed."""
    position = match_genes(pd.Index(names), pd.Index(wanted))
    for gene, at in zip(wanted, position, strict=True):
        assert names[at] == gene if at >= 0 else gene not in names


@given(
    arrays(np.int64, st.tuples(st.integers(1, 6), st.integers(2, 12)), elements=st.integers(0, 60)),
    st.sampled_from([1e3, 1e4, 1e6]),
)
def test_recovered_counts_invert_the_normalisation(counts, target):
    """Protects `recover_counts`: log1p of scaled counts leads back to them, wherever a cell has a count of one."""
    counts[:, 0] = 1  # fixes the scale: a common divisor of a cell cannot be seen in its values
    logged = np.log1p(counts * (target / counts.sum(axis=1, keepdims=True)))
    assume(not np.array_equal(logged, np.rint(logged)))
    np.testing.assert_array_equal(recover_counts(logged).toarray(), counts)


@given(SMALL, st.data())
def test_gene_shares_are_shares(x, data):
    """Protects the baseline of the metrics: shares sum to one, and are those of the pooled counts of the chosen cells."""
    rows = np.sort(data.draw(st.lists(st.integers(0, x.shape[0] - 1), min_size=1, unique=True)))
    assume(x[rows].any())
    adata = _adata(sp.csr_matrix(x))
    StackModel.setup_anndata(adata)
    shares = gene_shares(StackModel(adata, n_hidden=2, token_dim=2, n_heads=1, n_layers=1).adata_manager, rows)
    assert shares.sum() == pytest.approx(1)
    np.testing.assert_allclose(shares, x[rows].sum(0) / x[rows].sum(), rtol=1e-9)


@given(
    st.lists(st.sampled_from(["a", "b", "é", "1", None]), min_size=1, max_size=12),
    st.sampled_from([object, "string", "category"]),
)
def test_checks_of_columns_do_not_depend_on_the_text_type(values, dtype):
    """Protects pandas dtypes: missing values are found and counted in text columns of every type."""
    index = [f"c{i}" for i in range(len(values))]
    obs = pd.DataFrame({"k": pd.Series(values, index=index, dtype=object).astype(dtype)})
    missing = [i for i, value in enumerate(values) if value is None]
    if missing:
        with pytest.raises(ValueError, match=rf"missing in {len(missing)} cell\(s\) \(first: 'c{missing[0]}'\)"):
            check_groups(obs, "k", "batch_key")
    else:
        check_groups(obs, "k", "batch_key")
