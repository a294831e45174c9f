"""What setup refuses, what it says, and that a refusal changes nothing."""

from __future__ import annotations

import random
import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from mudata import MuData

from cellweave.data import check_counts, check_groups, looks_like_counts
from cellweave.io import read_model, write_model
from cellweave.model import StackModel

STORAGE = {"dense": lambda x: x.toarray(), "csr": sp.csr_matrix, "csc": sp.csc_matrix, "csr_array": sp.csr_array}


def _put(*entries):
    """Set single values (cell, gene, value) of X, whatever its storage."""

    def change(adata):
        x = adata.X.toarray().astype(np.float64)
        for cell, gene, value in entries:
            x[cell, gene] = value
        adata.X = sp.csr_matrix(x)

    return change


def _repeat_genes(adata):
    adata.var_names = ["gene1", "gene1", "gene2", "gene2", *adata.var_names[4:]]


def _missing_category(adata):
    adata.obs.loc[["cell7", "cell9"], "donor"] = np.nan


def _continuous(adata):
    adata.obs["donor"] = np.linspace(0, 1, adata.n_obs)


# fault -> (change, error, pieces of the message: field, count, first position, what to do)
FAULTS = {
    "nan": (
        _put((5, 3, np.nan), (8, 1, np.nan)),
        ValueError,
        ["`adata.X`", "2 value(s)", "NaN", "'cell5'", "'gene3'", "fix"],
    ),
    "inf": (_put((5, 3, np.inf)), ValueError, ["`adata.X`", "1 value(s)", "infinite", "'cell5'", "'gene3'"]),
    "minus_inf": (_put((0, 0, -np.inf)), ValueError, ["`adata.X`", "1 value(s)", "infinite", "'cell0'", "'gene0'"]),
    "negative": (
        _put((11, 19, -1), (30, 2, -2), (95, 0, -1)),
        ValueError,
        ["`adata.X`", "3 value(s)", "negative", "'cell11'", "'gene19'", "`layer=`"],
    ),
    "all_negative": (
        lambda a: setattr(a, "X", -a.X.toarray() - 1),
        ValueError,
        ["`adata.X`", f"{96 * 20} value(s)", "negative", "'cell0'", "'gene0'"],
    ),
    "too_large": (
        _put((2, 2, 2.0**24 + 2), (3, 1, 1e20)),
        ValueError,
        ["`adata.X`", "2 value(s)", "2^24", "'cell2'", "'gene2'"],
    ),
    "all_zero": (lambda a: setattr(a, "X", 0 * a.X.toarray()), ValueError, ["`adata.X`", "only zeros", "`layer=`"]),
    "repeated_genes": (_repeat_genes, ValueError, ["`adata.var_names`", "2 gene name(s)", "'gene1'", "make_unique"]),
    "missing_category": (
        _missing_category,
        ValueError,
        ["`adata.obs['donor']`", "`context_key`", "2 cell(s)", "'cell7'", "fill or remove"],
    ),
    "continuous_column": (
        _continuous,
        ValueError,
        ["`adata.obs['donor']`", "`context_key`", "distinct numbers in", "continuous", "bin it"],
    ),
}


def _setup(adata, **options):
    StackModel.setup_anndata(adata, **{"batch_key": "batch", "context_key": "donor", **options})


def _snapshot(adata) -> dict:
    x = adata.X.toarray() if sp.issparse(adata.X) else np.array(adata.X)
    return {
        "X": (type(adata.X), adata.X.dtype, x.tobytes()),
        "obs": adata.obs.copy(),
        "keys": [sorted(map(str, part)) for part in (adata.uns, adata.obsm, adata.layers, adata.varm, adata.var)],
        "names": (list(adata.obs_names), list(adata.var_names)),
    }


def _assert_unchanged(adata, before: dict) -> None:
    after = _snapshot(adata)
    pd.testing.assert_frame_equal(after.pop("obs"), before.pop("obs"))
    assert after == before


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_named_and_nothing_is_written(make_adata, fault, storage):
    """Protects the user: one sentence with field, count and first position, and an untouched AnnData."""
    change, error, pieces = FAULTS[fault]
    adata = make_adata(n_cells=96 if fault != "continuous_column" else 150)
    change(adata)
    adata.X = STORAGE[storage](sp.csr_matrix(adata.X))
    before = _snapshot(adata)
    with pytest.raises(error) as caught:
        _setup(adata)
    message = str(caught.value)
    for piece in pieces:
        assert piece in message
    assert "\n" not in message
    _assert_unchanged(adata, before)


@pytest.mark.parametrize(
    ("options", "pieces"),
    [
        ({"layer": "counts"}, ["`layer='counts'`", "`adata.layers` has 'scaled'"]),
        ({"batch_key": "plate"}, ["`batch_key='plate'`", "`adata.obs` has 'cell_type', 'batch', 'donor'"]),
        ({"labels_key": "plate"}, ["`labels_key='plate'`", "`adata.obs` has"]),
        ({"context_key": "plate"}, ["`context_key='plate'`", "`adata.obs` has"]),
    ],
)
def test_missing_layer_or_column(make_adata, options, pieces):
    """Protects against a bare KeyError: the argument, what it named, and what there is."""
    adata = make_adata()
    adata.layers["scaled"] = adata.X
    before = _snapshot(adata)
    with pytest.raises(KeyError) as caught:
        _setup(adata, **options)
    for piece in pieces:
        assert piece in str(caught.value)
    _assert_unchanged(adata, before)


def test_missing_x(make_adata):
    """Protects an AnnData that keeps its counts in a layer only."""
    adata = make_adata()
    adata.layers["counts"] = adata.X
    adata.X = None
    with pytest.raises(KeyError, match=r"`adata.X` is empty; name the counts with `layer=`.*'counts'"):
        _setup(adata)
    _setup(adata, layer="counts")


@pytest.mark.parametrize(("n_cells", "n_genes", "word"), [(0, 20, "no cells"), (96, 0, "no genes")])
def test_empty_object(make_adata, n_cells, n_genes, word):
    """Protects filtered-away data: an error that shows the shape."""
    adata = make_adata()[:n_cells, :n_genes].copy()
    with pytest.raises(ValueError, match=rf"{word} \(shape \({n_cells}, {n_genes}\)\)"):
        _setup(adata)


def test_view_is_refused(make_adata):
    """Protects views: nothing is written into a view, which would copy it behind the user's back."""
    view = make_adata()[:50]
    with pytest.raises(ValueError, match=r"is a view.*adata.copy\(\)"):
        _setup(view)
    assert view.is_view


@pytest.mark.parametrize("storage", STORAGE)
def test_fractional_values_are_refused_and_the_layer_with_counts_is_named(make_adata, storage):
    """Protects users with log-normalised X: count, first position, where counts seem to be, and how to go on anyway."""
    adata = make_adata()
    adata.layers["raw"] = adata.X.copy()
    adata.layers["logged"] = np.log1p(adata.X.toarray())
    x = sp.csr_matrix(adata.layers["raw"].toarray())
    x[0, :3] = 0
    x.eliminate_zeros()
    n_fractional, first = x.nnz, x.indices[0]
    adata.X = STORAGE[storage](x.log1p())
    before = _snapshot(adata)
    found = rf"`adata.X` has {n_fractional} non-integer value\(s\) \(first: cell 'cell0', gene 'gene{first}'\)"
    with pytest.raises(ValueError, match=rf"{found}, .*look like counts: `layer='raw'`, .*`allow_noncounts=True`\."):
        _setup(adata)
    _assert_unchanged(adata, before)
    with pytest.warns(UserWarning, match=rf"{found} .*`allow_noncounts=True` allows; .*`layer='raw'`\."):
        _setup(adata, allow_noncounts=True)


def test_fractional_values_without_a_layer_of_counts(make_adata):
    """Protects the advice: where no layer looks like counts, none is suggested."""
    adata = make_adata()
    adata.X = adata.X.log1p()
    with pytest.raises(ValueError, match="non-integer value.*; give raw counts with `layer=`, or set up"):
        _setup(adata)


def test_counts_in_x_are_suggested_for_a_faulty_layer(make_adata):
    """Protects the advice: counts may also be in X."""
    adata = make_adata()
    adata.layers["logged"] = adata.X.log1p()
    with pytest.raises(ValueError, match=r"`adata.layers\['logged'\]` has .*look like counts: `adata.X`, or"):
        _setup(adata, layer="logged")


def test_faulty_layer_is_not_suggested_in_its_own_place(make_adata):
    """Protects the advice: a layer whose first cells look like counts is not the answer to its own error."""
    adata = make_adata(n_cells=150)
    adata.layers["mixed"] = adata.X.toarray()
    adata.layers["mixed"][120:] /= 3
    adata.X = adata.X / 3
    with pytest.raises(ValueError, match="non-integer value.*'cell120'.*give raw counts with `layer=`"):
        check_counts(adata, "mixed")


def test_parts_of_a_repeated_entry_are_no_values(make_adata):
    """Protects sparse matrices that store an entry in parts: their sum counts, in the checks as in the model."""
    adata = make_adata()
    x = sp.csr_matrix(adata.X)
    row = np.repeat(np.arange(96), np.diff(x.indptr))
    parts = np.concatenate([x.data + 0.5, np.full(x.nnz, -0.5, dtype=np.float32)])
    order = np.argsort(np.tile(row, 2), kind="stable")
    adata.X = sp.csr_matrix((parts[order], np.tile(x.indices, 2)[order], 2 * x.indptr), shape=x.shape)
    stored = adata.X.nnz
    check_counts(adata)
    assert adata.X.nnz == stored


@pytest.mark.parametrize("method", ["setup_anndata", "setup_mudata"])
def test_the_choice_is_kept_for_queries_and_files(make_adata, tiny, quick, tmp_path, method):
    """Protects `allow_noncounts`: replayed for queries and by `load`; without it queries are refused as well."""

    def data(logged):
        adata = make_adata()
        if logged:
            adata.X = adata.X.log1p()
        return MuData({"rna": adata}) if method == "setup_mudata" else adata

    for allowed in (True, False):
        first = data(allowed)
        getattr(StackModel, method)(first, allow_noncounts=allowed)
        model = StackModel(first, **tiny)
        model.train(**quick)
        folder = tmp_path / str(allowed)
        model.save(folder)
        calls = [
            lambda model=model: model.get_latent_representation(data(True)),
            lambda folder=folder: StackModel.load(folder, data(True), accelerator="cpu").get_latent_representation(),
            lambda folder=folder: StackModel.load(folder, accelerator="cpu").get_latent_representation(data(True)),
        ]
        for call in calls:
            if allowed:
                with pytest.warns(UserWarning, match="non-integer value"):
                    assert np.isfinite(call()).all()
            else:
                with pytest.raises(ValueError, match="non-integer value.*`allow_noncounts=True`"):
                    call()


def test_models_saved_before_the_choice_still_load(trained, make_adata, tmp_path):
    """Protects old files: without the argument in the registry, non-integer data are accepted as they were, warned of."""
    trained.save(tmp_path / "new")
    saved = read_model(tmp_path / "new")
    del saved.registry["setup_args"]["allow_noncounts"]
    write_model(tmp_path / "old", saved)
    old = StackModel.load(tmp_path / "old", make_adata(), accelerator="cpu")
    np.testing.assert_array_equal(old.get_latent_representation(), trained.get_latent_representation())
    logged = make_adata()
    logged.X = logged.X.log1p()
    with pytest.warns(UserWarning, match="non-integer value"):
        old.get_latent_representation(logged)
    with pytest.warns(UserWarning, match="non-integer value"):
        StackModel.load(tmp_path / "old", logged.copy(), accelerator="cpu")


def test_integers_stored_as_floats_are_silent(make_adata):
    """Protects the usual case from noise: float32 counts cause no warning of ours."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(integer|counts|unique).*")
        _setup(make_adata())


@pytest.mark.parametrize("storage", STORAGE)
def test_cells_without_counts_warn_once(make_adata, storage):
    """Protects users from unnoticed empty cells: one warning with their number and the first name."""
    adata = make_adata()
    x = adata.X.toarray()
    x[[4, 17, 80]] = 0
    adata.X = STORAGE[storage](sp.csr_matrix(x))
    with pytest.warns(UserWarning, match=r"3 cell\(s\) have no counts in `adata.X` \(first: 'cell4'\)") as caught:
        _setup(adata)
    assert sum("no counts" in str(w.message) for w in caught) == 1


def test_repeated_cell_names_warn(make_adata):
    """Protects joining by name: repeated cell names are accepted, results go by position."""
    adata = make_adata()
    adata.obs_names = ["x"] * adata.n_obs
    with pytest.warns(UserWarning, match="`adata.obs_names` are not unique; results are written by position"):
        _setup(adata)


@pytest.mark.parametrize("entries", [20, 100, 10**6])
@pytest.mark.parametrize("storage", STORAGE)
def test_position_is_right_in_any_block(make_adata, monkeypatch, storage, entries):
    """Protects the message for large matrices, which are checked block by block: the position is global."""
    monkeypatch.setattr("cellweave.data._validate._BLOCK_ENTRIES", entries)
    adata = make_adata()
    _put((93, 17, np.nan), (94, 2, np.nan))(adata)
    adata.X = STORAGE[storage](adata.X)
    with pytest.raises(ValueError, match="first: cell 'cell93', gene 'gene17'"):
        _setup(adata)


@pytest.mark.parametrize("storage", ["dense", "csr", "csc"])
def test_backed_file_is_checked_completely(make_adata, tmp_path, monkeypatch, storage):
    """Protects data on disk: a single NaN in the last cell is found, in bounded memory."""
    monkeypatch.setattr("cellweave.data._validate._BLOCK_ENTRIES", 200)
    adata = make_adata()
    _put((95, 19, np.nan))(adata)
    adata.X = STORAGE[storage](adata.X)
    adata.write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(ValueError, match="first: cell 'cell95', gene 'gene19'"):
        _setup(ad.read_h5ad(tmp_path / "a.h5ad", backed="r"))


def test_layer_is_named_in_the_message(make_adata):
    """Protects users of `layer=`: the message names the layer, and X is not looked at."""
    adata = make_adata()
    bad = adata.X.toarray()
    bad[3, 4] = -1
    adata.layers["bad"] = bad
    adata.layers["good"] = adata.X.copy()
    adata.X = bad
    with pytest.raises(ValueError, match=r"`adata.layers\['bad'\]` has 1 value.*'cell3', gene 'gene4'"):
        _setup(adata, layer="bad")
    _setup(adata, layer="good")


def test_largest_exact_count_is_accepted(make_adata):
    """Protects the limit itself: 2^24 is exact in float32 and stays allowed."""
    adata = make_adata()
    _put((0, 0, 2.0**24))(adata)
    check_counts(adata)


@pytest.mark.parametrize(
    ("storage", "dtype"),
    [("dense", np.float16)]  # scipy has no sparse float16
    + [
        (s, t) for s in ("dense", "csr") for t in (np.int8, np.uint16, np.int32, np.int64, np.float32, np.float64, bool)
    ],
)
def test_every_number_type_is_checked_without_noise(make_adata, storage, dtype):
    """Protects the checks themselves: no overflow or warning for any dtype of proper counts."""
    adata = make_adata()
    adata.X = adata.X.toarray().astype(dtype) if storage == "dense" else adata.X.astype(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_counts(adata)


@pytest.mark.parametrize(
    ("values", "is_refused"),
    [
        (np.arange(300) / 3, True),
        (np.arange(300), True),
        (np.arange(300) % 100, False),
        (np.arange(300).astype(str), False),
        (pd.Categorical(np.arange(300)), False),
        (np.arange(300) % 2 == 0, False),
    ],
)
def test_continuous_columns(values, is_refused):
    """Protects against one category per cell: many distinct numbers are refused, names and few numbers are not."""
    obs = pd.DataFrame({"column": values})
    if is_refused:
        with pytest.raises(
            ValueError, match=r"`adata.obs\['column'\]` \(`batch_key`\) has 300 distinct numbers in 300"
        ):
            check_groups(obs, "column", "batch_key")
    else:
        check_groups(obs, "column", "batch_key")


def test_looks_like_counts():
    """Protects the layer suggestion: counts yes; fractions, negative values and NaN no."""
    counts = np.array([[0, 3.0], [2, 1]])
    assert looks_like_counts(counts)
    assert looks_like_counts(sp.csr_matrix(counts))
    for bad in (0.5, -1.0, np.nan):
        assert not looks_like_counts(sp.csr_matrix(np.where(counts == 3, bad, counts)))


def test_setup_leaves_the_random_state_alone(make_adata):
    """Protects the user's own random draws (trap R4 of scvi-tools, which draws from numpy's global generator)."""
    adata = make_adata()
    before = (np.random.get_state()[1].copy(), np.random.get_state()[2], torch.get_rng_state(), random.getstate())
    _setup(adata, labels_key="cell_type")
    after = (np.random.get_state()[1], np.random.get_state()[2], torch.get_rng_state(), random.getstate())
    np.testing.assert_array_equal(before[0], after[0])
    assert torch.equal(before[2], after[2])
    assert (before[1], before[3]) == (after[1], after[3])


def test_setup_writes_only_what_is_documented(make_adata):
    """Protects the user's object: only `obs["_scvi_*"]` and identifiers in `uns` are added."""
    adata = make_adata()
    before = _snapshot(adata)
    _setup(adata)
    added = set(adata.obs) - set(before["obs"])
    assert added == {"_scvi_batch", "_scvi_labels", "_scvi_context"}
    assert set(adata.uns) == {"_scvi_uuid", "_scvi_manager_uuid"}
    adata.obs = adata.obs.drop(columns=added)
    adata.uns.clear()
    _assert_unchanged(adata, before)
