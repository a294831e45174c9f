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
from cellweave.io import CellStore

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
    """Protects backed AnnData: the aligned object reads the right counts from the file when it is asked for them."""
    _adata(NAMES, storage).write_h5ad(tmp_path / "a.h5ad")
    backed = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    aligned = align_genes(backed, NAMES[::-1])
    assert isinstance(aligned, CellStore)
    np.testing.assert_array_equal(_dense(aligned.X[:]), _dense(_adata(NAMES[::-1]).X))


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


# ---------------------------------------------------------------- other kinds of names

IDS = [f"ENSG{i:011d}" for i in range(12)]


def _named(names) -> AnnData:
    adata = _adata(NAMES)
    adata.var_names = list(names)
    return adata


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        ([f"{i}.3" for i in IDS], IDS),
        (IDS, [f"{i}.12" for i in IDS]),
        ([f"{i}.3" for i in IDS], [f"{i}.12" for i in IDS]),
    ],
    ids=["data", "model", "both"],
)
def test_versions_are_ignored_with_a_notice(names, wanted):
    """Protects Ensembl identifiers: version suffixes are no part of the identity; the warning says how many and which."""
    with pytest.warns(UserWarning, match=rf"12 of the 12 genes match only without.*'{wanted[-1]}' and '{names[-1]}'"):
        aligned = align_genes(_named(names), wanted[::-1])
    assert list(aligned.var_names) == wanted[::-1]
    np.testing.assert_array_equal(_dense(aligned.X), _dense(_adata(NAMES[::-1]).X))


def test_equal_names_come_before_versions(recwarn):
    """Protects exact matches: a column of the very version that is asked for is taken, the other one left out."""
    aligned = align_genes(_named([IDS[0], f"{IDS[0]}.3", *IDS[2:]]), [f"{IDS[0]}.3", *IDS[2:]])
    np.testing.assert_array_equal(_dense(aligned.X)[:, 0], _dense(_adata(NAMES).X)[:, 1])
    assert not [w for w in recwarn if "version" in str(w.message)]


@pytest.mark.parametrize("swap", [False, True])
def test_several_versions_are_refused(swap):
    """Protects against a guess: two versions of one identifier have no right answer."""
    several, one = [f"{IDS[0]}.3", f"{IDS[0]}.4", *IDS[2:]], [IDS[0], *IDS[1:]]
    names, wanted = (one, several) if swap else (several, one)
    owner = "model" if swap else "data"
    with pytest.raises(ValueError, match=rf"of the {owner} hold 1 identifier.*'{several[0]}', '{several[1]}'"):
        align_genes(_named(names), wanted)


@pytest.mark.parametrize("clone", ["RP11-34P13", "AL627309"])
def test_points_in_other_names_are_kept(clone):
    """Protects symbols: AL627309.1 and AL627309.5 are two genes."""
    names, others = ([f"{clone}.{i + start}" for i in range(12)] for start in (0, 50))
    for present, wanted in [(names, others), (names[:1] + IDS[1:], others[:1] + NAMES[1:])]:
        with pytest.raises(ValueError, match="Only 0 of the 12 genes"):
            align_genes(_named(present), wanted, min_overlap=0)


@pytest.mark.parametrize("dtype", [object, "string", "category"])
def test_column_with_the_right_names_is_proposed(dtype):
    """Protects symbols against Ensembl: the column of `var` that matches best is named with what to do."""
    adata = _named(IDS)
    adata.var["few"] = [*NAMES[:7], *"abcde"]
    adata.var["symbol"] = pd.Series(NAMES, index=adata.var_names).astype(dtype)
    adata.var["length"] = np.arange(12.0)
    message = r"`adata.var\['symbol'\]` would match 12 of them: set `adata.var_names = adata.var\['symbol'\]`"
    with pytest.raises(ValueError, match=message):
        align_genes(adata, NAMES)
    adata.var_names = adata.var["symbol"].astype(str)
    assert align_genes(adata, NAMES).shape == (5, 12)


def test_versions_in_the_proposed_column_do_not_matter():
    """Protects the proposal: identifiers with versions in a column are counted as they would be matched."""
    adata = _named(NAMES)
    adata.var["gene_id"] = [f"{i}.2" for i in IDS]
    with pytest.raises(ValueError, match=r"`adata.var\['gene_id'\]` would match 12"):
        align_genes(adata, IDS)


def test_letter_case_is_proposed_and_never_matched():
    """Protects species: `MT-CO1` is not `mt-CO1`; the error says that another case would match, and how many."""
    human = [f"MT-{i}" for i in range(12)]
    with pytest.raises(ValueError, match="12 more would match in another letter case .*'MT-0' and 'mt-0'.*species"):
        align_genes(_named([name.lower() for name in human]), human, min_overlap=0)


def test_few_genes_in_another_case_are_not_lost_silently():
    """Protects mitochondrial genes: one of twelve in another case is above 90 % overlap, and still a warning."""
    with pytest.warns(UserWarning, match="11 of the 12 genes.*first missing: 'G0'.*1 more would match.*'G0' and 'g0'"):
        align_genes(_adata(NAMES), ["G0", *NAMES[1:]])


def test_report_is_logged(caplog):
    """Protects row 30: also a silent match is reported in the log, with the first missing gene."""
    with caplog.at_level("INFO", logger="cellweave"):
        align_genes(_adata(NAMES), NAMES[::-1])
        align_genes(_adata(NAMES[:11]), NAMES)
    assert "All 12 genes of the model are in the data" in caplog.text
    assert "11 of the 12 genes of the model are in `adata.var_names`; the others count as zero" in caplog.text


def test_error_says_how_to_accept_fewer_genes():
    """Protects users of small panels: the way to lower `min_overlap` is in the error; not where nothing matches."""
    with pytest.raises(ValueError, match=r"`cellweave.pp.align_genes\(adata, model.genes, min_overlap=\.\.\.\)`\."):
        align_genes(_adata(NAMES[:5]), NAMES)
    with pytest.raises(ValueError, match=r"symbols or Ensembl identifiers\)\.$"):
        align_genes(_adata(NAMES), IDS)
