"""Stores: an AnnData whose counts stay on disk, from one or many files."""

from __future__ import annotations

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp
import zarr
from anndata import AnnData

import cellweave
from cellweave.data._rows import DiskRows, StackedRows
from cellweave.io import CellStore, open_store
from cellweave.model import StackModel


def _write(adata: AnnData, path):
    adata.write_zarr(path) if path.suffix == ".zarr" else adata.write_h5ad(path)
    return path


@pytest.fixture(params=["h5ad", "zarr"])
def suffix(request) -> str:
    return request.param


@pytest.fixture
def adata(make_adata) -> AnnData:
    adata = make_adata()
    adata.obs["depth"] = np.asarray(adata.X.sum(axis=1)).ravel()
    adata.obs["name"] = [f"n{i}" for i in range(adata.n_obs)]
    adata.var["marker"] = np.arange(adata.n_vars) % 2 == 0
    adata.layers["counts"] = adata.X * 2
    return adata


@pytest.fixture
def store(adata, tmp_path) -> CellStore:
    return open_store(_write(adata, tmp_path / "a.h5ad"))


# ---------------------------------------------------------------- one file


def test_one_file(adata, tmp_path, suffix):
    """Protects the promise: cells, genes, annotation and counts of the file, the counts left on disk."""
    store = cellweave.io.open_store(_write(adata, tmp_path / f"a.{suffix}"))
    assert isinstance(store, CellStore)
    assert isinstance(store.X, DiskRows)
    assert store.shape == adata.shape
    pd.testing.assert_frame_equal(store.obs, adata.obs, check_categorical=False)
    pd.testing.assert_frame_equal(store.var, adata.var)
    np.testing.assert_array_equal(store.X[:].toarray(), adata.X.toarray())
    assert "layers" not in str(store)


def test_a_layer_becomes_the_counts(adata, tmp_path, suffix):
    """Protects `layer`: its values, not those of `X`."""
    store = open_store(_write(adata, tmp_path / f"a.{suffix}"), layer="counts")
    np.testing.assert_array_equal(store.X[:].toarray(), adata.layers["counts"].toarray())


def test_some_columns(adata, tmp_path, suffix):
    """Protects memory: only the columns that are asked for, in that order, with their categories and names."""
    path = _write(adata, tmp_path / f"a.{suffix}")
    store = open_store(path, obs_columns=["name", "donor"])
    assert list(store.obs) == ["name", "donor"]
    pd.testing.assert_frame_equal(store.obs, open_store(path).obs[["name", "donor"]])
    assert list(open_store(path, obs_columns=[]).obs_names) == list(adata.obs_names)


def test_columns_of_old_files_keep_their_categories(adata, tmp_path):
    """Protects files of AnnData 0.7, whose categories stand outside of the columns: no codes instead of names."""
    path = tmp_path / "a.h5ad"
    adata.write_h5ad(path)
    with h5py.File(path, "a") as file:
        column, obs = adata.obs["donor"].cat, file["obs"]
        del obs["donor"]
        obs["donor"] = column.codes.to_numpy()
        obs["__categories/donor"] = np.array(list(column.categories), dtype="S")
        obs["donor"].attrs["categories"] = obs["__categories/donor"].ref
        obs.attrs["encoding-version"] = "0.1.0"
    assert open_store(path, obs_columns=["donor"]).obs["donor"].astype(str).tolist() == adata.obs["donor"].tolist()


def test_representation_names_the_files(store):
    """Protects orientation: one sees that the counts are on disk, and where."""
    text = repr(store)
    assert text.startswith("CellStore: AnnData object with n_obs × n_vars = 96 × 20")
    assert text.endswith("X on disk: 1 file(s): a.h5ad")


def test_views_hold_the_rows_in_memory(store, adata):
    """Protects slicing: cells and genes by name, mask and number, as with any AnnData; a copy of them is in memory."""
    store.obsm["X_a"], store.uns["u"] = np.arange(96.0)[:, None], {"k": [1]}
    assert store[[7, 3]].copy().obsm["X_a"].ravel().tolist() == [7, 3]
    assert store[[7, 3]].copy().uns["u"] == {"k": [1]}
    mask = (adata.obs["donor"] == "w").to_numpy()
    keys = [
        mask,
        [5, 3, 90],
        slice(10, 4, -1),
        "cell7",
        (slice(None), ["gene3", "gene1"]),
        (mask, slice(2, 9)),
        ([4, 1], [7, 2]),
    ]
    for key in keys:
        view = store[key]
        np.testing.assert_array_equal(view.X.toarray(), adata[key].X.toarray())
        copied = view.copy()
        assert not isinstance(copied, CellStore)
        for other in (copied, view.to_memory(), store.to_memory()[key]):
            np.testing.assert_array_equal(other.X.toarray(), adata[key].X.toarray())
            assert list(other.obs_names) == list(adata[key].obs_names)
    nested = store[10:50][:, ["gene2", "gene1"]][[5, 1]].copy()
    np.testing.assert_array_equal(nested.X.toarray(), adata[[15, 11]][:, ["gene2", "gene1"]].X.toarray())
    StackModel.setup_anndata(nested)
    np.testing.assert_array_equal(store.obs_vector("gene4"), adata.obs_vector("gene4"))


def test_to_memory_is_an_ordinary_object(store, adata, tmp_path):
    """Protects the way back: everything is there, can be written, and shares nothing with the store."""
    store.obsm["X_a"], store.varm["v"], store.uns["u"] = np.ones((96, 2)), np.ones((20, 3)), {"k": [1]}
    loaded = store.to_memory()
    assert type(loaded) is AnnData
    np.testing.assert_array_equal(loaded.X.toarray(), adata.X.toarray())
    loaded.obsm["X_a"][:], loaded.uns["u"]["k"][0] = 0, 2
    assert (store.obsm["X_a"] == 1).all()
    assert store.uns["u"]["k"] == [1]
    assert loaded.varm["v"].shape == (20, 3)
    loaded.write_h5ad(tmp_path / "b.h5ad")


def test_copies_share_the_files_only(store, adata):
    """Protects `copy`: results of one are not those of the other; the counts are not loaded."""
    store.obsm["X_a"] = np.ones((96, 2))
    twin = store.copy()
    twin.obs["new"], twin.obsm["X_a"][0] = 1, 5
    assert isinstance(twin, CellStore)
    assert twin.X is store.X
    assert "new" not in store.obs
    assert (store.obsm["X_a"] == 1).all()
    with pytest.raises(ValueError, match=r"`filename` is not supported; write a store with `cellweave.pp.write_store`"):
        store.copy("b.h5ad")


def test_counts_cannot_be_replaced(store):
    """Protects the files and the user: an assignment that would be lost is refused."""
    with pytest.raises(ValueError, match=r"on disk and cannot be replaced; use `to_memory\(\)`"):
        store.X = np.ones(store.shape)


def test_results_are_written_without_the_counts(store, tmp_path):
    """Protects disk and memory: a store is not silently loaded to be written; the sentence says what to do, and it works."""
    store.obsm["X_a"] = np.ones((96, 2))
    for write in (store.write_h5ad, store.write, store.write_zarr):
        with pytest.raises(ValueError, match="is not written as a whole") as error:
            write(tmp_path / "b.h5ad")
    assert list(tmp_path.glob("b*")) == []
    assert "`AnnData(obs=store.obs, obsm=dict(store.obsm)).write_h5ad(...)`" in str(error.value)
    AnnData(obs=store.obs, obsm=dict(store.obsm)).write_h5ad(tmp_path / "b.h5ad")
    assert ad.read_h5ad(tmp_path / "b.h5ad").obsm["X_a"].shape == (96, 2)


def test_scanpy_reads_results_of_a_store(store):
    """Protects what comes after: neighbours and clusters of an embedding are found on the store itself."""
    store.obsm["X_a"] = np.random.default_rng(0).normal(size=(96, 4))
    sc.pp.neighbors(store, use_rep="X_a", n_neighbors=5, method="gauss", transformer="sklearn")
    sc.tl.diffmap(store, n_comps=3)
    assert store.obsm["X_diffmap"].shape == (96, 3)
    assert isinstance(store, CellStore)


def test_opening_for_a_model_writes_nothing_to_the_file(adata, tmp_path):
    """Protects the user's file: setup and results stay in the object."""
    path = _write(adata, tmp_path / "a.h5ad")
    before = path.read_bytes()
    store = open_store(path)
    StackModel.setup_anndata(store, context_key="donor")
    store.obsm["X_a"] = np.ones((96, 2))
    del store
    assert path.read_bytes() == before


# ---------------------------------------------------------------- several files


def test_several_files_share_genes_by_name(adata, tmp_path):
    """Protects joined files: cells in the order of the files, genes of all in the order of the first."""
    order = np.random.default_rng(0).permutation(20)
    first, second = adata[:40, :15], adata[40:][:, [g for g in order if g >= 5]]
    paths = [_write(first.copy(), tmp_path / "a.h5ad"), _write(second.copy(), tmp_path / "b.zarr")]
    store = open_store(paths)
    assert isinstance(store.X, StackedRows)
    assert list(store.var_names) == [f"gene{g}" for g in range(5, 15)]
    assert list(store.obs_names) == list(adata.obs_names)
    np.testing.assert_array_equal(store.X[:].toarray(), adata.X[:, 5:15].toarray())
    assert repr(store).endswith("X on disk: 2 file(s): a.h5ad, b.zarr")
    assert store.var["marker"].tolist() == adata.var["marker"][5:15].tolist()


def test_outer_join_fills_with_zeros(adata, tmp_path):
    """Protects `join="outer"`: all genes, those of the first file first, zero where a file lacks one."""
    paths = [_write(adata[:40, :15].copy(), tmp_path / "a.h5ad"), _write(adata[40:, 5:].copy(), tmp_path / "b.h5ad")]
    store = open_store(paths, join="outer")
    expected = adata.X.toarray()
    expected[:40, 15:] = expected[40:, :5] = 0
    assert list(store.var_names) == list(adata.var_names)
    np.testing.assert_array_equal(store.X[:].toarray(), expected)
    assert store.var["marker"].dtype == bool
    assert store.var["marker"].tolist() == adata.var["marker"].tolist()


def test_categories_are_joined(adata, tmp_path):
    """Protects `context_key`: the categories of all files; a column that a file lacks is missing there, not lost."""
    first, second = adata[:40].copy(), adata[40:].copy()
    first.obs["donor"] = pd.Categorical(["d1"] * 20 + ["d0"] * 20)
    second.obs["donor"] = pd.Categorical(["d2"] * 56, categories=["d2", "d1"])
    first.obs["plate"], second.obs["plate"] = pd.Categorical([1] * 40), pd.Categorical(["1"] * 56)
    first.obs["kept"], first.obs["site"] = True, pd.Categorical(["s"] * 40)
    first.obs["mixed"], second.obs["mixed"] = "x", np.arange(56)
    store = open_store([_write(first, tmp_path / "a.h5ad"), _write(second, tmp_path / "b.h5ad")])
    assert list(store.obs["donor"].cat.categories) == ["d0", "d1", "d2"]
    assert store.obs["donor"].tolist() == first.obs["donor"].tolist() + second.obs["donor"].tolist()
    assert store.obs["plate"].tolist() == ["1"] * 96
    assert store.obs["kept"].dtype == "boolean"
    assert store.obs["kept"].isna().sum() == store.obs["site"].isna().sum() == 56
    assert list(store.obs["site"].cat.categories) == ["s"]
    assert store.obs["mixed"].tolist() == ["x"] * 40 + [str(i) for i in range(56)]


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        (None, {"layer": "raw"}, KeyError, r"`.*a.h5ad` has no `layers/raw`; its layers are \['counts'\]"),
        (
            None,
            {"obs_columns": ["donor", "age"]},
            KeyError,
            "`obs_columns` names 'age', which `obs` of `.*a.h5ad` lacks",
        ),
        (None, {"join": "left"}, ValueError, "`join` must be 'inner' or 'outer', got 'left'"),
        (lambda a: setattr(a, "X", a.X.tocsc()), {}, ValueError, r"stored by genes \(CSC\).*load it with AnnData"),
        (lambda a: setattr(a, "var_names", ["g"] * 20), {}, ValueError, "`var_names` of `.*a.h5ad` repeat 'g'"),
    ],
)
@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_refusals(adata, tmp_path, change, options, error, message):
    """Protects the user from guessing: one sentence that names the file, what is wrong and what to do."""
    if change is not None:
        change(adata)
    path = _write(adata, tmp_path / "a.h5ad")
    with pytest.raises(error, match=message):
        open_store(path, **options)


def test_files_without_a_common_gene(adata, tmp_path):
    """Protects against an empty model: symbols in one file and identifiers in the other are named."""
    first, second = adata.copy(), adata.copy()
    second.var_names = [f"ENSG{i}" for i in range(20)]
    paths = [_write(first, tmp_path / "a.h5ad"), _write(second, tmp_path / "b.h5ad")]
    with pytest.raises(ValueError, match=r"share no gene.*'gene0'.*'ENSG0'"):
        open_store(paths)
    assert open_store(paths, join="outer").n_vars == 40


def test_no_file_and_missing_files(adata, tmp_path):
    """Protects against typing errors in paths, also in the second of them."""
    with pytest.raises(ValueError, match="`paths` is empty; name at least one"):
        open_store([])
    path = _write(adata, tmp_path / "a.h5ad")
    with pytest.raises(FileNotFoundError, match="`.*b.h5ad` does not exist; check the path"):
        open_store([path, tmp_path / "b.h5ad"])


def _text(folder):
    (folder / "a.h5ad").write_text("cell,gene\n1,2\n")
    return folder / "a.h5ad"


def _folder(folder):
    (folder / "a.zarr").mkdir()
    return folder / "a.zarr"


def _other_hdf5(folder):
    with h5py.File(folder / "a.h5ad", "w") as file:
        file["X"] = np.ones((3, 2))
    return folder / "a.h5ad"


def _old_hdf5(folder):
    """The layout of AnnData before 0.7."""
    with h5py.File(folder / "a.h5ad", "w") as file:
        x = file.create_group("X")
        x.attrs["h5sparse_format"], x.attrs["h5sparse_shape"] = "csr", (3, 2)
        file["obs"], file["var"] = np.zeros(3, dtype=[("index", "S3")]), np.zeros(2, dtype=[("index", "S3")])
    return folder / "a.h5ad"


def _other_zarr(folder):
    zarr.open_group(folder / "a.zarr", mode="w").create_array("X", data=np.ones((3, 2)))
    return folder / "a.zarr"


def _wrong_shape(folder):
    AnnData(sp.eye(4, format="csr")).write_h5ad(folder / "a.h5ad")
    with h5py.File(folder / "a.h5ad", "a") as file:
        file["X"].attrs["shape"] = (4, 9)
    return folder / "a.h5ad"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_text, "cannot be opened as an .h5ad or .zarr file"),
        (_folder, "cannot be opened as an .h5ad or .zarr file"),
        (_other_hdf5, "is not laid out as AnnData 0.7 or later writes it"),
        (_old_hdf5, "is not laid out as AnnData 0.7 or later writes it"),
        (_other_zarr, "is not laid out as AnnData 0.7 or later writes it"),
        (_wrong_shape, r"has shape \(4, 9\), but `obs` and `var` have 4 and 4 rows"),
    ],
)
def test_other_files_are_refused(tmp_path, make, message):
    """Protects against errors deep inside a library: a file of another kind is named and refused."""
    path = make(tmp_path)
    with pytest.raises(OSError, match=message) as error:
        open_store(path)
    assert str(path) in str(error.value)
