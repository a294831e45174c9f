"""Gene alignment: by name, for every matrix type, with a clear report."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData
from hypothesis import given
from hypothesis import strategies as st

from cellweave.data import align_genes

NAMES = [f"g{i}" for i in range(12)]
STORAGE = {
    "csr": sp.csr_matrix,
    "csc": sp.csc_matrix,
    "csr_array": sp.csr_array,
    "dense": np.asarray,
    "fortran": np.asfortranarray,
    "int": lambda x: sp.csr_matrix(x.astype(np.int32)),
    "bool": lambda x: sp.csr_matrix(x > 2),
}


def _adata(genes, storage="csr") -> AnnData:
    """Counts in which each value tells its gene and cell."""
    number = np.array([int(g.removeprefix("g")) for g in genes], dtype=np.float32)
    x = 100 * number[None, :] + np.arange(1, 6)[:, None]
    obs = pd.DataFrame({"kind": list("aabbc")}, index=[f"c{i}" for i in range(5)])
    return AnnData(STORAGE[storage](x), obs=obs, var=pd.DataFrame(index=list(genes)))


def _dense(x) -> np.ndarray:
    return x.toarray() if sp.issparse(x) else np.asarray(x)


@given(
    st.permutations(NAMES).flatmap(lambda p: st.integers(1, len(p)).map(lambda k: p[:k])),
    st.permutations(NAMES).flatmap(lambda p: st.integers(1, len(p)).map(lambda k: p[:k])),
    st.sampled_from(sorted(STORAGE)),
)
@pytest.mark.filterwarnings("ignore:.*genes of the model are in:UserWarning")
def test_alignment_is_by_name(present, wanted, storage):
    """Protects against silent gene mix-ups: any permutation, missing and extra genes, any storage."""
    adata = _adata(present, storage)
    if not set(present) & set(wanted):
        with pytest.raises(ValueError, match=f"Only 0 of the {len(wanted)} genes"):
            align_genes(adata, wanted, min_overlap=0)
        return
    aligned = align_genes(adata, wanted, min_overlap=0)
    frame = pd.DataFrame(_dense(adata.X), columns=present)
    expected = frame.reindex(columns=wanted).fillna(0).to_numpy()
    assert list(aligned.var_names) == list(wanted)
    assert aligned.X.dtype == adata.X.dtype
    np.testing.assert_array_equal(_dense(aligned.X), expected.astype(aligned.X.dtype))


@pytest.mark.parametrize("storage", STORAGE)
def test_sparse_stays_sparse_and_the_input_is_untouched(storage):
    """Protects memory and the user's object: CSR or dense as given, no change to `adata`."""
    adata = _adata(NAMES, storage)
    before = _dense(adata.X).copy()
    aligned = align_genes(adata, NAMES[::-1])
    assert sp.issparse(aligned.X) == sp.issparse(adata.X)
    assert not sp.issparse(aligned.X) or aligned.X.format == "csr"
    aligned.obs["new"] = 1
    np.testing.assert_array_equal(_dense(adata.X), before)
    assert list(adata.obs) == ["kind"]
    assert list(adata.var_names) == NAMES


def test_observations_are_kept():
    """Protects cell annotations: names and columns of `obs` come along in order."""
    adata = _adata(NAMES)
    pd.testing.assert_frame_equal(align_genes(adata, NAMES[:8], min_overlap=0).obs, adata.obs)


def test_layer_is_found_under_its_name():
    """Protects models registered with `layer=`: the aligned object has that layer, taken from that layer."""
    adata = _adata(NAMES)
    adata.layers["counts"] = 2 * adata.X
    aligned = align_genes(adata, NAMES[::-1], layer="counts")
    np.testing.assert_array_equal(_dense(aligned.layers["counts"]), 2 * _dense(adata.X)[:, ::-1])


@pytest.mark.parametrize("storage", ["csr", "dense"])
def test_backed_data(tmp_path, storage):
    """Protects backed AnnData: the aligned copy is in memory and right."""
    _adata(NAMES, storage).write_h5ad(tmp_path / "a.h5ad")
    backed = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    aligned = align_genes(backed, NAMES[::-1])
    assert not aligned.isbacked
    np.testing.assert_array_equal(_dense(aligned.X), _dense(_adata(NAMES[::-1]).X))


@pytest.mark.parametrize(("n_found", "outcome"), [(12, "silent"), (11, "silent"), (10, "warning"), (6, "warning")])
def test_report_above_the_threshold(n_found, outcome, recwarn):
    """Protects the stated thresholds: silent from 90 % of the genes, a warning with the first missing gene below."""
    align_genes(_adata(NAMES[:n_found]), NAMES)
    messages = [str(w.message) for w in recwarn if issubclass(w.category, UserWarning)]
    if outcome == "silent":
        assert messages == []
    else:
        (message,) = messages
        assert f"{n_found} of the 12 genes" in message
        assert f"first missing: 'g{n_found}'" in message


def test_too_small_overlap_is_refused():
    """Protects against embeddings of almost empty cells: below `min_overlap` an error with both kinds of names."""
    other = _adata(NAMES[:5])
    with pytest.raises(ValueError, match=r"Only 5 of the 12 genes .*'g0'.*`min_overlap=0.5`"):
        align_genes(other, NAMES)
    with pytest.warns(UserWarning, match="5 of the 12 genes"):
        assert align_genes(other, NAMES, min_overlap=0.4).n_vars == 12


def test_no_overlap_is_always_refused():
    """Protects symbols against Ensembl identifiers: no common gene is an error even with `min_overlap=0`."""
    with pytest.raises(ValueError, match="symbols or Ensembl"):
        align_genes(_adata(NAMES), ["ENSG1", "ENSG2"], min_overlap=0)


def test_repeated_gene_names_are_refused():
    """Protects matching by name: with two columns of one name there is no right answer."""
    adata = _adata(NAMES)
    adata.var_names = ["g0", "g0", "g1", "g1", *NAMES[4:]]
    with pytest.raises(ValueError, match=r"repeats 2 gene name\(s\) \(first: 'g0'\)"):
        align_genes(adata, NAMES)


def test_unknown_layer_is_named():
    """Protects against a bare KeyError: the message lists the layers there are."""
    adata = _adata(NAMES)
    adata.layers["counts"] = adata.X
    with pytest.raises(KeyError, match=r"`layer='raw'` not found.*'counts'"):
        align_genes(adata, NAMES, layer="raw")


def test_data_without_genes_are_refused():
    """Protects empty objects: zero genes is no overlap, not an IndexError."""
    with pytest.raises(ValueError, match="Only 0 of the 12 genes"):
        align_genes(_adata([]), NAMES)
