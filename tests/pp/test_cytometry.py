"""Transforms of intensities: right values, in the right place, with a record that undoes them."""

from __future__ import annotations

import sys
from collections.abc import Callable

import anndata as ad
import mudata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData

import cellweave as cw
from cellweave.pp import _intensities

KEY = "cellweave_transforms"
MARKERS = ["CD3", "CD4", "CD19"]
SPILLOVER = pd.DataFrame([[1, 0.2, 0.0], [0.1, 1, 0.05], [0.0, 0.3, 1]], index=MARKERS, columns=MARKERS)


def simulate(n_cells: int = 300, seed: int = 0, dtype: type = np.float32) -> AnnData:
    """Intensities of two peaks, with noise below zero."""
    rng = np.random.default_rng(seed)
    peak = np.where(rng.random((n_cells, 3)) < 0.4, 200.0, 2.0)
    x = peak * rng.gamma(4, 0.25, size=peak.shape) + rng.normal(0, 3, size=peak.shape)
    obs = pd.DataFrame({"kind": ["a", "b", "c"] * (n_cells // 3)}, index=[f"cell{i}" for i in range(n_cells)])
    return AnnData(x.astype(dtype), obs=obs, var=pd.DataFrame(index=MARKERS))


@pytest.fixture
def adata() -> AnnData:
    return simulate()


def logicle(adata: AnnData, **arguments) -> None:
    pytest.importorskip("flowutils")
    cw.pp.logicle(adata, **arguments)


TRANSFORMS: dict[str, Callable[..., None]] = {
    "arcsinh": cw.pp.arcsinh,
    "logicle": logicle,
    "scale_markers": cw.pp.scale_markers,
    "compensate": lambda adata, **arguments: cw.pp.compensate(adata, SPILLOVER, **arguments),
}
every_transform = pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)


# ---------------------------------------------------------------- where results go


@pytest.mark.filterwarnings("ignore:.*do not determine a logicle scale")
@every_transform
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, np.int32, np.uint8])
def test_values_of_all_number_types(transform, dtype):
    """Protects integer files: values are computed as real numbers, and stay in the precision they had."""
    x = np.abs(simulate().X).clip(0, 127).astype(dtype)
    adata, expected = (AnnData(x.astype(kind), var=pd.DataFrame(index=MARKERS)) for kind in (dtype, np.float64))
    transform(adata)
    transform(expected)
    assert adata.X.dtype == (np.float64 if dtype == np.float64 else np.float32)
    np.testing.assert_allclose(adata.X, expected.X, rtol=1e-5, atol=1e-5)


@every_transform
def test_only_the_named_matrix_changes(adata, transform):
    """Protects the user's data: `key_added` leaves the source, `layer` leaves X, and arrays that are shared stay."""
    original = adata.X
    before = original.copy()
    adata.layers["same_memory"] = adata.X
    transform(adata, key_added="new")
    assert adata.X is original
    transform(adata, layer="same_memory")
    np.testing.assert_array_equal(adata.X, before)
    np.testing.assert_array_equal(adata.layers["new"], adata.layers["same_memory"])
    assert set(adata.uns[KEY]) == {"new", "same_memory"}
    transform(adata)
    np.testing.assert_array_equal(adata.X, adata.layers["new"])
    np.testing.assert_array_equal(original, before)
    assert list(adata.obs) == ["kind"]


def test_layers_of_others_are_not_replaced(adata):
    """Protects a layer that the user made; one that a transform made is made anew."""
    adata.layers["mine"] = adata.X.copy()
    with pytest.raises(ValueError, match=r"`adata.layers\['mine'\]` already exists .*; choose another `key_added`"):
        cw.pp.arcsinh(adata, key_added="mine")
    cw.pp.arcsinh(adata, key_added="new")
    first = adata.layers["new"]
    cw.pp.arcsinh(adata, key_added="new", cofactor=150)
    assert np.abs(first).max() > np.abs(adata.layers["new"]).max()


def test_blocks_do_not_matter(adata, monkeypatch):
    """Protects large data, which are transformed block by block."""
    whole, blocks = adata.copy(), adata.copy()
    cw.pp.arcsinh(whole)
    monkeypatch.setattr(_intensities, "_BLOCK_VALUES", 20)
    cw.pp.arcsinh(blocks)
    np.testing.assert_array_equal(whole.X, blocks.X)
    pd.testing.assert_frame_equal(cw.pp.inverse_transform(whole), cw.pp.inverse_transform(blocks))


@pytest.mark.parametrize("kind", [sp.csr_matrix, sp.csc_matrix, sp.csr_array])
@every_transform
def test_sparse_equals_dense(adata, transform, kind, monkeypatch):
    """Protects sparse matrices: the values are those of the dense matrix; arcsinh keeps zeros and so stays sparse."""
    monkeypatch.setattr(_intensities, "_BLOCK_VALUES", 50)
    adata.X[np.abs(adata.X) < 1] = 0
    sparse = AnnData(kind(adata.X), var=adata.var)
    before = sparse.X
    values = before.toarray()
    transform(sparse)
    transform(adata)
    assert (type(sparse.X) is kind) == (transform is cw.pp.arcsinh)
    result = sparse.X.toarray() if sp.issparse(sparse.X) else sparse.X
    np.testing.assert_allclose(result, adata.X, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(before.toarray(), values)


def test_sparse_with_repeated_entries_and_translation():
    """Protects against transforming the parts of a repeated entry one by one; a translation moves zeros too."""
    parts = sp.csr_matrix((np.array([3.0, 4.0], dtype=np.float32), np.array([1, 1]), np.array([0, 2, 2])), shape=(2, 3))
    adata = AnnData(parts, var=pd.DataFrame(index=MARKERS))
    cw.pp.arcsinh(adata, cofactor={"CD3": 1, "CD4": 2, "CD19": 3}, key_added="a")
    assert adata.layers["a"][0, 1] == pytest.approx(np.arcsinh(3.5))
    cw.pp.arcsinh(adata, translation=5, key_added="b")
    assert isinstance(adata.layers["b"], np.ndarray)
    assert adata.layers["b"][1, 0] == pytest.approx(np.arcsinh(-1))


# ---------------------------------------------------------------- undoing


@pytest.mark.parametrize("curve", [cw.pp.arcsinh, logicle])
@pytest.mark.parametrize("center", [None, True, False])
@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_the_whole_chain_is_undone_from_a_file(adata, tmp_path, curve, center, suffix):
    """Protects the record: it survives a file, and gives intensities back for all markers."""
    raw = adata.X.copy()
    cw.pp.compensate(adata, SPILLOVER)
    curve(adata, **({"quantile_clip": None} if curve is logicle else {"translation": 1}))
    cw.pp.scale_markers(adata, center=center, max_value=None)
    path = tmp_path / f"a.{suffix}"
    getattr(adata, f"write_{suffix}")(path)
    back = cw.pp.inverse_transform(getattr(ad, f"read_{suffix}")(path))
    assert list(back.columns) == MARKERS
    assert list(back.index) == list(adata.obs_names)
    np.testing.assert_allclose(back, raw, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("curve", [cw.pp.arcsinh, logicle])
def test_a_subset_of_markers_is_undone(adata, curve, center):
    """Protects `values` with some markers in any order: the original mixes up the parameters or the rows."""
    raw = adata.to_df()
    curve(adata, **({"quantile_clip": None} if curve is logicle else {}))
    cw.pp.scale_markers(adata, center=center, max_value=None)
    wanted = ["CD19", "CD3"]
    expected = raw[wanted].to_numpy()
    adata.obsm["frame"] = adata.to_df()[wanted]
    adata.obsm["array"] = adata.to_df()[wanted].to_numpy()
    given = {
        "view": cw.pp.inverse_transform(adata[:, wanted]),
        "key": cw.pp.inverse_transform(adata, "frame"),
        "frame": cw.pp.inverse_transform(adata, adata.to_df()[wanted]),
        "obsm array": cw.pp.inverse_transform(adata, "array", markers=wanted),
        "selection": cw.pp.inverse_transform(adata, markers=wanted),
        "array": cw.pp.inverse_transform(adata, adata.obsm["array"], markers=wanted),
        "anndata": cw.pp.inverse_transform(adata, adata[:5, wanted].copy()),
        "sparse": cw.pp.inverse_transform(adata, sp.csr_matrix(adata.obsm["array"]), markers=wanted),
    }
    for name, frame in given.items():
        assert list(frame.columns) == wanted, name
        np.testing.assert_allclose(frame, expected[: len(frame)], rtol=1e-4, atol=1e-3, err_msg=name)


def test_a_layer_with_unmeasured_columns_is_undone(adata):
    """Protects corrected layers, which are NaN outside of the table: these columns stay NaN, the others come back."""
    raw = adata.X.copy()
    cw.pp.arcsinh(adata, key_added="scaled")
    cw.pp.scale_markers(adata, layer="scaled")
    corrected = adata.layers["scaled"].copy()
    corrected[:, 1] = np.nan
    adata.layers["scyan_corrected"] = corrected
    back = cw.pp.inverse_transform(adata, "scyan_corrected", layer="scaled")
    np.testing.assert_allclose(back[["CD3", "CD19"]], raw[:, [0, 2]], rtol=1e-4, atol=1e-3)
    assert back["CD4"].isna().all()
    assert list(cw.pp.inverse_transform(adata, "scyan_corrected", "scaled", ["CD19"])) == ["CD19"]
    permuted = cw.pp.inverse_transform(adata, "scyan_corrected", "scaled", ["CD19", "CD4", "CD3"])
    pd.testing.assert_frame_equal(permuted, back[["CD19", "CD4", "CD3"]])


def test_compensation_of_a_subset(adata):
    """Protects against intensities without the spillover of markers that are not there."""
    raw = adata.to_df()
    cw.pp.compensate(adata, SPILLOVER)
    with pytest.raises(
        ValueError, match=r"cannot be undone without 2 marker\(s\) .*'CD3', 'CD19'.*; give values of them"
    ):
        cw.pp.inverse_transform(adata[:, ["CD4"]])
    both = adata.to_df()[["CD4", "CD3"]]
    with pytest.raises(ValueError, match=r"1 marker\(s\) .*'CD19'"):
        cw.pp.inverse_transform(adata, both)
    two = simulate()
    cw.pp.compensate(two, SPILLOVER.loc[["CD4", "CD3"], ["CD3", "CD4"]])
    np.testing.assert_array_equal(two.X[:, 2], raw["CD19"])
    np.testing.assert_allclose(cw.pp.inverse_transform(two[:, ["CD4", "CD3"]]), raw[["CD4", "CD3"]], atol=1e-3)


def test_cut_values_come_back_as_the_cut(adata):
    """Pins the documented limit of the inverse."""
    cw.pp.arcsinh(adata)
    std = adata.X[:, 0].astype(float).std()
    cw.pp.scale_markers(adata, max_value=0.5)
    assert np.abs(adata.X).max() == 0.5
    assert cw.pp.inverse_transform(adata)["CD3"].max() == pytest.approx(5 * np.sinh(1.5 * std), rel=1e-5)


@pytest.mark.parametrize(
    ("values", "arguments", "error", "message"),
    [
        (None, {"layer": "b"}, ValueError, r"Nothing is recorded for `b`.*only for 'X'; name another `layer`\.$"),
        ("nope", {}, KeyError, r"`values='nope'` not found; `adata.obsm` and `adata.layers` have 'both', "),
        ("both", {}, ValueError, r"`values='both'` is in `adata.obsm` and in `adata.layers`; give one"),
        (
            pd.DataFrame({"CD8": [1.0]}),
            {},
            ValueError,
            r"does not know 1 marker\(s\) \(first: 'CD8'\), only 'CD3'.*; give",
        ),
        (pd.DataFrame({"CD3": ["a"]}), {}, TypeError, r"`values` holds values of type object; give real numbers"),
        (np.zeros((2, 2)), {}, ValueError, r"array of shape \(2, 2\), which needs 3 columns; name its columns"),
        (np.zeros((2, 2)), {"markers": ["CD3"]}, ValueError, r"array of shape \(2, 2\), which needs 1 columns"),
        (pd.DataFrame({"CD3": [1.0]}), {"markers": ["CD4"]}, ValueError, r"lacks 1 of the `markers` \(first: 'CD4'\)"),
        (3, {}, TypeError, r"`values` must be a key, DataFrame, AnnData or array, got int"),
    ],
)
def test_wrong_values_to_undo(adata, values, arguments, error, message):
    """Protects against numbers that would be undone with the parameters of other markers."""
    adata.layers["b"] = adata.X.copy()
    adata.layers["both"] = adata.X.copy()
    adata.obsm["both"] = adata.X.copy()
    cw.pp.arcsinh(adata)
    with pytest.raises(error, match=message):
        cw.pp.inverse_transform(adata, values, **arguments)


def test_a_damaged_record_is_named(adata):
    """Protects against a wrong inverse after the record was edited."""
    adata.uns[KEY] = {"X": {"0": {"function": "cube", "markers": MARKERS}}}
    for call in (cw.pp.inverse_transform, cw.pp.arcsinh):
        with pytest.raises(
            ValueError, match=r"`adata.uns\['cellweave_transforms'\]\['X'\]` is not a record .*; restore it"
        ):
            call(adata)
    with pytest.raises(TypeError, match="`adata` must be an AnnData, got dict"):
        cw.pp.inverse_transform({})


# ---------------------------------------------------------------- order


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("arcsinh", "arcsinh"),
        ("arcsinh", "logicle"),
        ("logicle", "logicle"),
        ("logicle", "arcsinh"),
        ("scale_markers", "scale_markers"),
        ("scale_markers", "arcsinh"),
        ("arcsinh", "compensate"),
        ("compensate", "compensate"),
    ],
)
def test_a_step_is_not_made_twice_or_late(adata, first, second):
    """Protects against the classic mistake of a cell that is run twice, also after a file."""
    TRANSFORMS[first](adata)
    x, uns = adata.X.copy(), str(adata.uns)
    with pytest.raises(
        ValueError, match=rf"`adata.X` went through `{first}` already, after which `{second}` .*; start from"
    ):
        TRANSFORMS[second](adata)
    np.testing.assert_array_equal(adata.X, x)
    assert str(adata.uns) == uns
    del adata.uns[KEY]["X"]
    TRANSFORMS[second](adata)


def test_copies_have_their_own_record(adata):
    """Protects a copy of the AnnData, and layers, from the record of the other."""
    other = adata.copy()
    cw.pp.arcsinh(adata)
    shallow = AnnData(adata.X, var=adata.var, uns=dict(adata.uns))
    cw.pp.scale_markers(shallow)
    cw.pp.arcsinh(other)
    assert [list(a.uns[KEY]["X"]) for a in (adata, shallow, other)] == [["0"], ["0", "1"], ["0"]]


# ---------------------------------------------------------------- new data


@pytest.mark.parametrize("center", [None, True])
@pytest.mark.parametrize("layers", [{}, {"key_added": "scaled"}])
def test_new_data_get_the_scale_of_the_reference(center, layers):
    """Protects predictions on new samples: they are scaled with the statistics of the training data, by marker name."""
    train, new = simulate(), simulate(60, seed=1)[:, ["CD19", "CD3"]].copy()
    new.X *= 3
    expected = (np.arcsinh(new.X / 5), np.arcsinh(train[:, ["CD19", "CD3"]].X / 5).astype(float))
    for adata in (train, new):
        cw.pp.arcsinh(adata)
    cw.pp.scale_markers(train, center=center, max_value=2, **layers)
    cw.pp.scale_markers(new, reference=train, **layers)
    result = new.layers["scaled"] if layers else new.X
    x, reference = expected
    scaled = (x - reference.mean(0)) / reference.std(0) if center else x / reference.std(0) - 1
    np.testing.assert_allclose(result, scaled.clip(-2, 2), rtol=1e-4, atol=1e-5)
    assert new.uns[KEY]["scaled" if layers else "X"]["1"]["max_value"] == 2


def test_new_data_get_the_logicle_scale_of_the_reference(adata):
    """Protects new samples with another largest intensity: equal intensities must become equal values."""
    pytest.importorskip("flowutils")
    new = adata[:50].copy()
    cw.pp.logicle(adata)
    cw.pp.logicle(new, reference=adata, key_added="logicle")
    np.testing.assert_array_equal(new.layers["logicle"], adata.X[:50])
    table = pd.DataFrame({"t": 500.0, "m": 4.0, "w": [0.5, 1.0, 1.5]}, index=MARKERS)
    cw.pp.logicle(new, reference=table.iloc[::-1])
    assert new.uns[KEY]["X"]["0"]["w"].tolist() == [0.5, 1.0, 1.5]
    np.testing.assert_allclose(cw.pp.inverse_transform(new), simulate().X[:50], rtol=1e-4, atol=1e-3)


def test_the_reference_must_fit(adata):
    """Protects against a scale that belongs to other values or markers."""
    reference = simulate(seed=2)
    cw.pp.arcsinh(adata)
    with pytest.raises(ValueError, match=r"`reference` has 0 matrices with a recorded `scale_markers`"):
        cw.pp.scale_markers(adata, reference=reference)
    cw.pp.arcsinh(reference, key_added="a", cofactor={"CD3": 5, "CD4": 6, "CD19": 5})
    cw.pp.scale_markers(reference, layer="a")
    with pytest.raises(
        ValueError, match=r"`arcsinh` with cofactor=6 for marker 'CD4', `adata.X` with cofactor=5; transform"
    ):
        cw.pp.scale_markers(adata, reference=reference)
    with pytest.raises(ValueError, match=r"scaled after 'arcsinh', `adata.X` went through nothing; transform both"):
        cw.pp.scale_markers(simulate(), reference=reference)
    with pytest.raises(
        ValueError, match=r"`center=True` contradicts `reference`, which was scaled with `center=False`"
    ):
        cw.pp.scale_markers(adata, center=True, reference=reference)
    adata.var_names = ["CD3", "CD8", "CD19"]
    with pytest.raises(ValueError, match=r"`reference` lacks 1 marker\(s\) of `adata` \(first: 'CD8'\); keep"):
        cw.pp.scale_markers(adata, reference=reference)
    cw.pp.scale_markers(reference)
    with pytest.raises(ValueError, match=r"`reference` has 2 matrices .* none under the name of the result \(`b`\)"):
        cw.pp.scale_markers(adata, reference=reference, key_added="b")
    with pytest.raises(TypeError, match=r"`reference` must be an AnnData or a DataFrame, got int"):
        cw.pp.scale_markers(adata, reference=3)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"mean": 1.0}, r"`reference` has no column 'std', only 'mean'; add it\.$"),
        ({"std": [1.0, 0.0, 1.0]}, r"`reference\['std'\]` must be larger than 0, which it is not for marker 'CD4'"),
        ({"std": [1.0, np.nan, 1.0]}, r"`reference\['std'\]` is NaN or infinite for marker 'CD4'"),
    ],
)
def test_wrong_tables_of_statistics(adata, table, message):
    """Protects against division by nothing."""
    with pytest.raises(ValueError, match=message):
        cw.pp.scale_markers(adata, reference=pd.DataFrame(table, index=MARKERS))


def test_wrong_tables(adata):
    """Protects against statistics that are assigned to the wrong markers, and scales that do not exist."""
    with pytest.raises(ValueError, match=r"`reference\['std'\]` has no value for 1 marker\(s\) \(first: 'CD19'\)"):
        cw.pp.scale_markers(adata, reference=pd.DataFrame({"std": 1.0}, index=["CD3", "CD4"]))
    with pytest.raises(ValueError, match=r"`reference` has several rows for one marker"):
        cw.pp.scale_markers(adata, reference=pd.DataFrame({"std": 1.0}, index=[*MARKERS, "CD3"]))
    with pytest.raises(ValueError, match=r"no logicle scale for 3 marker\(s\) \(first: 'CD3' with t=-1, m=4, w=1\)"):
        cw.pp.logicle(adata, reference=pd.DataFrame({"t": -1, "m": 4, "w": 1}, index=MARKERS))
    assert KEY not in adata.uns


# ---------------------------------------------------------------- bad input


def spoil(adata: AnnData, how: str) -> AnnData:
    """The data with one fault."""
    if how == "nan":
        adata.X[7, 1] = np.nan
    elif how == "infinite":
        adata.X[7, 1] = np.inf
    elif how == "text":
        adata = AnnData(adata.X.astype(complex), obs=adata.obs, var=adata.var)
    elif how == "view":
        adata = adata[:10]
    elif how == "empty":
        adata = adata[:0].copy()
    elif how == "repeated":
        adata.var_names = ["CD3", "CD4", "CD3"]
    elif how == "no X":
        adata = AnnData(obs=adata.obs, var=adata.var)
    elif how == "MuData":
        return mudata.MuData({"prot": adata})
    return adata


@every_transform
@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        (
            "nan",
            ValueError,
            r"`adata.X` has 1 value\(s\) that are NaN or infinite .*cell 'cell7', marker 'CD4'\); .*\.$",
        ),
        ("infinite", ValueError, r"`adata.X` has 1 value\(s\) that are NaN or infinite .*cell 'cell7', marker 'CD4'\)"),
        ("text", TypeError, r"`adata.X` holds values of type complex128; give real numbers\.$"),
        ("view", ValueError, r"`adata` is a view of another AnnData; run `adata = adata.copy\(\)` first\.$"),
        ("empty", ValueError, r"`adata` has no cells or no markers \(shape \(0, 3\)\); check the filters"),
        (
            "repeated",
            ValueError,
            r"`adata.var_names` repeats 1 marker name\(s\) \(first: 'CD3'\); .*`adata.var_names_make",
        ),
        ("no X", KeyError, r"`adata.X` is empty"),
        ("MuData", TypeError, r"`adata` must be an AnnData, got MuData; of a MuData give one modality"),
    ],
)
@pytest.mark.filterwarnings("ignore:Variable names are not unique", "ignore::FutureWarning")
def test_faulty_data_are_refused(adata, transform, how, error, message):
    """Protects every transform against values that it would spread or hide; nothing is written."""
    faulty = spoil(adata, how)
    with pytest.raises(error, match=message):
        transform(faulty)
    assert KEY not in faulty.uns
    assert not faulty.layers if how != "MuData" else True


@every_transform
def test_layers_are_checked(adata, transform):
    """Protects against a mistyped layer, which would otherwise be X, and names that the record keeps for X."""
    adata.layers["counts"] = adata.X.copy()
    with pytest.raises(KeyError, match=r"`layer='count'` not found; `adata.layers` has 'counts'"):
        transform(adata, layer="count")
    with pytest.raises(ValueError, match=r"`key_added='X'` cannot name a layer here; give another text"):
        transform(adata, key_added="X")
    assert KEY not in adata.uns


@every_transform
def test_backed_data_are_refused(adata, tmp_path, transform):
    """Protects the file behind a backed AnnData, and names the way out."""
    adata.write_h5ad(tmp_path / "a.h5ad")
    content = (tmp_path / "a.h5ad").read_bytes()
    backed = ad.read_h5ad(tmp_path / "a.h5ad", backed="r+")
    with pytest.raises(ValueError, match=r"`adata` is backed by the file '.*a\.h5ad', .*`adata = adata.to_memory\(\)`"):
        transform(backed)
    backed.file.close()
    assert (tmp_path / "a.h5ad").read_bytes() == content
    transform(ad.read_h5ad(tmp_path / "a.h5ad", backed="r").to_memory())


@pytest.mark.parametrize("transform", [cw.pp.arcsinh, logicle, cw.pp.scale_markers])
def test_nan_of_unmeasured_markers(adata, transform):
    """Protects panels that differ between batches: with `allow_nan` NaN stays, and all other values are as without it."""
    adata.X[:100, 1] = np.nan
    measured = adata[100:].copy()
    transform(adata, allow_nan=True)
    transform(measured)
    assert np.isnan(adata.X[:100, 1]).all()
    np.testing.assert_allclose(adata.X[100:, 1], measured.X[:, 1], rtol=1e-6)
    back = cw.pp.inverse_transform(adata)
    np.testing.assert_array_equal(np.isnan(back), np.isnan(adata.X))
    adata.layers["b"] = adata.X.copy()
    adata.layers["b"][0, 0] = np.inf
    with pytest.raises(ValueError, match=r"NaN or infinite .*marker 'CD3'\); remove or repair them"):
        transform(adata, layer="b", allow_nan=True)


def test_constant_markers_are_named(adata):
    """Protects against a division by zero, also where rounding hides it; a marker without values is constant too."""
    adata.X[:, 1] = 0.1
    with pytest.raises(
        ValueError, match=r"is constant in 1 marker\(s\) \(first: 'CD4'\), .*var_names.isin\(\['CD4'\]\)"
    ):
        cw.pp.scale_markers(adata)
    adata.X[:, 2] = np.nan
    with pytest.raises(ValueError, match=r"is constant in 2 marker\(s\) \(first: 'CD4', 'CD19'\)"):
        cw.pp.scale_markers(adata, allow_nan=True)
    cw.pp.scale_markers(adata[:, ["CD3"]].copy())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cofactor": 0}, r"`cofactor` must be larger than 0, got 0 for marker 'CD3'"),
        ({"cofactor": -5}, r"`cofactor` must be larger than 0, got -5 for marker 'CD3'; take about 5"),
        ({"cofactor": {"CD3": 5, "CD4": -1, "CD19": 5}}, r"got -1 for marker 'CD4'"),
        ({"cofactor": {"CD3": 5}}, r"`cofactor` has no value for 2 marker\(s\) \(first: 'CD4', 'CD19'\); give one"),
        ({"cofactor": np.nan}, r"`cofactor` is NaN or infinite for marker 'CD3'"),
        ({"cofactor": "five"}, r"`cofactor='five'` is not a number"),
        ({"translation": np.inf}, r"`translation` is NaN or infinite for marker 'CD3'"),
        ({"translation": [1, 2]}, r"`translation=\[1, 2\]` is not a number"),
    ],
)
def test_wrong_parameters_of_arcsinh(adata, arguments, message):
    """Protects against a curve that turns around or vanishes."""
    before = adata.X.copy()
    with pytest.raises(ValueError, match=message):
        cw.pp.arcsinh(adata, **arguments)
    np.testing.assert_array_equal(adata.X, before)
    assert KEY not in adata.uns


@pytest.mark.parametrize(
    ("transform", "arguments", "message"),
    [
        (cw.pp.scale_markers, {"max_value": 0}, r"`max_value` must be a number larger than 0, got 0; pass None"),
        (cw.pp.scale_markers, {"max_value": -1}, r"`max_value` must be a number larger than 0, got -1"),
        (cw.pp.logicle, {"q": 1.5}, r"`q` must be between 0 and 1, got 1.5"),
        (cw.pp.logicle, {"quantile_clip": -1}, r"`quantile_clip` must be between 0 and 1, got -1"),
        (cw.pp.logicle, {"m": 1}, r"`m` must be at least 2 decades, got 1"),
    ],
)
def test_wrong_parameters(adata, transform, arguments, message):
    """Protects the other transforms likewise."""
    with pytest.raises(ValueError, match=message):
        transform(adata, **arguments)
    assert KEY not in adata.uns


# ---------------------------------------------------------------- logicle


def test_logicle_falls_back_with_one_warning(adata):
    """Protects markers without negative values (mass cytometry): the scale of the original, and a sentence that says so."""
    pytest.importorskip("flowutils")
    adata.X[:, 0] = np.abs(adata.X[:, 0])
    adata.X[:, 2] = -np.abs(adata.X[:, 2])
    with pytest.warns(
        UserWarning, match=r"2 marker\(s\) \(first: 'CD3', 'CD19'\) do not determine a logicle scale"
    ) as seen:
        cw.pp.logicle(adata)
    assert len(seen) == 1
    record = adata.uns[KEY]["X"]["0"]
    assert record["t"][[0, 2]].tolist() == [5e5, 5e5]
    assert record["w"][[0, 2]].tolist() == [1, 1]
    assert 0 < record["w"][1] <= 2


def test_logicle_cuts_at_the_quantile(adata):
    """Protects `quantile_clip`: values below the quantile of the transformed values are raised to it."""
    pytest.importorskip("flowutils")
    cw.pp.logicle(adata, quantile_clip=None, key_added="free")
    cw.pp.logicle(adata, quantile_clip=0.1234)
    low = np.quantile(adata.layers["free"].astype(np.float64), 0.1234, axis=0)
    np.testing.assert_allclose(adata.X, np.maximum(adata.layers["free"], low), atol=1e-6)


def test_values_that_the_library_does_not_find():
    """Protects values near zero on scales without a linear part, for which flowutils returns -1 without a word."""
    transforms = pytest.importorskip("flowutils.transforms")
    x = np.array([1e-12, -1e-12, 1.0, -2070.0])
    assert (transforms.logicle(x, None, t=5000, m=2, w=0, a=0) == -1).any()
    adata = AnnData(x[:, None], var=pd.DataFrame(index=["CD3"]))
    cw.pp.logicle(adata, reference=pd.DataFrame({"t": 5000.0, "m": 2.0, "w": 0.0}, index=["CD3"]))
    assert (np.diff(adata.X.ravel()[[3, 1, 2]]) > 0).all()
    np.testing.assert_allclose(cw.pp.inverse_transform(adata).to_numpy().ravel(), x, rtol=1e-9, atol=1e-9)


def test_missing_flowutils_is_named(adata, monkeypatch):
    """Protects users without the extra: one sentence with the command, and unchanged data."""
    monkeypatch.setitem(sys.modules, "flowutils", None)
    with pytest.raises(
        ModuleNotFoundError, match=r'needs flowutils, .*; run `pip install "cellweave\[cytometry\]"`\.$'
    ):
        cw.pp.logicle(adata)
    assert KEY not in adata.uns


# ---------------------------------------------------------------- spillover


def test_spillover_is_found_and_ordered(adata):
    """Protects the order of rows, columns and markers, which may all differ, and names of detectors."""
    expected = adata.X @ np.linalg.inv(SPILLOVER.to_numpy())
    adata.varp["spillover"] = SPILLOVER.to_numpy()
    adata.uns["by_detector"] = {
        "channels": np.array(["v3", "v1", "v2"]),
        "matrix": SPILLOVER.to_numpy()[[2, 0, 1]][:, [2, 0, 1]],
    }
    adata.var["channel"] = ["v1", "v2", "v3"]
    shuffled = SPILLOVER.loc[["CD19", "CD3", "CD4"], ["CD4", "CD19", "CD3"]]
    adata.uns["table"] = shuffled
    for number, spillover in enumerate([None, "by_detector", "table", shuffled]):
        cw.pp.compensate(adata, spillover, key_added=f"c{number}")
        np.testing.assert_allclose(adata.layers[f"c{number}"], expected, rtol=1e-4, atol=1e-3)


def broken(change: Callable[[pd.DataFrame], object]) -> object:
    table = SPILLOVER.copy()
    return change(table)


@pytest.mark.parametrize(
    ("spillover", "error", "message"),
    [
        (None, KeyError, r"`spillover='spillover'` is neither in `adata.varp` nor in `adata.uns`; give"),
        ("mine", KeyError, r"`spillover='mine'` is neither in"),
        (np.eye(3), TypeError, r"`spillover` must be a DataFrame or a key, got ndarray; name the channels"),
        ("list", TypeError, r"`adata.uns\['list'\]` must be a DataFrame, or hold `channels` and `matrix`"),
        ("odd", ValueError, r"`adata.uns\['odd'\]` has 3 channels and a matrix of shape \(2, 2\)"),
        (broken(lambda s: s.iloc[:2]), ValueError, r"`spillover` must be square, got shape \(2, 3\)"),
        (
            broken(lambda s: s.rename(index={"CD3": "CD8"})),
            ValueError,
            r"other names in its rows .*'CD3', 'CD8'\); name",
        ),
        (
            broken(lambda s: s.set_axis(["CD3", "CD3", "CD4"], axis=1)),
            ValueError,
            r"names channel 'CD3' more than once",
        ),
        (
            broken(lambda s: s.rename({"CD3": "CD8"}, axis=0).rename({"CD3": "CD8"}, axis=1)),
            ValueError,
            r"1 channel.*'CD8'",
        ),
        (broken(lambda s: s.replace(0.3, np.nan)), ValueError, r"NaN or infinite from 'CD19' into 'CD4'; fill in 0"),
        (broken(lambda s: s * 100), ValueError, r"must be 1 on its diagonal, got 100 for 'CD3'; .*percentages by 100"),
        (
            broken(lambda s: s * 0 + 1),
            ValueError,
            r"`spillover` is singular \(condition number .*\), .*; look for two rows",
        ),
        (broken(lambda s: s.astype(object).where(s != 0.3, "x")), ValueError, r"holds something that is no number"),
    ],
)
def test_wrong_spillover(adata, spillover, error, message):
    """Protects against a compensation that mixes markers at random."""
    adata.uns |= {"list": [1], "odd": {"channels": np.array(MARKERS), "matrix": np.eye(2)}}
    before = adata.X.copy()
    with pytest.raises(error, match=message):
        cw.pp.compensate(adata, spillover)
    np.testing.assert_array_equal(adata.X, before)
    assert KEY not in adata.uns


def test_real_debarcoding_data(real_data):
    """Protects automatic logicle on real barcode channels: bounded values, exact inverse, order of cells kept."""
    pytest.importorskip("flowutils")
    adata = ad.read_h5ad(real_data("cytometry/debarcoding_catalyst.h5ad"))
    raw = adata.X.toarray() if sp.issparse(adata.X) else np.array(adata.X)
    cw.pp.logicle(adata, quantile_clip=None)
    assert (np.argsort(adata.X[:, 0], kind="stable") == np.argsort(raw[:, 0], kind="stable")).mean() > 0.9
    np.testing.assert_allclose(cw.pp.inverse_transform(adata), raw, rtol=1e-3, atol=1e-2)
