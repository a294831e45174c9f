"""``pp.check_marker_table`` finds what a table cannot tell, and what does not fit the data."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData

from cellweave.pp import check_marker_table

NAN = np.nan
COLUMNS = ["check", "severity", "population", "other", "marker", "value", "message"]


def frame(rows: dict[str, list[float]], markers: str = "CD3 CD19 CD56 CD14") -> pd.DataFrame:
    names = markers.split()[: len(next(iter(rows.values())))]
    return pd.DataFrame.from_dict(rows, orient="index", columns=names)


CLEAN = {"T": [1.0, -1.0, 1.0, -1.0], "B": [-1.0, 1.0, 1.0, -1.0], "NK": [-1.0, -1.0, -1.0, 1.0]}


def scaled(markers: list[str], n: int = 200, seed: int = 0) -> AnnData:
    """Expression with mean 0 and standard deviation 1 of every marker."""
    x = np.random.default_rng(seed).normal(size=(n, len(markers)))
    x = ((x - x.mean(0)) / x.std(0)).astype(np.float32)
    return AnnData(x, var=pd.DataFrame(index=markers))


def found(result: pd.DataFrame, check: str) -> pd.DataFrame:
    return result[result["check"] == check]


def pairs(result: pd.DataFrame, check: str = "unseparable") -> list[tuple[str, str]]:
    rows = found(result, check)
    return list(zip(rows["population"], rows["other"], strict=True))


def test_the_bmmc_table_has_its_four_pairs(real_data):
    """Protects the finding that explains the worst F1 values of the original."""
    result = check_marker_table(real_data("cytometry/table_bmmc.csv"))
    assert pairs(result) == [
        ("Pre-B I", "Plasma cell"),
        ("Pre-B II", "Plasma cell"),
        ("NK", "Plasmacytoid DC"),
        ("NK", "GMP"),
    ]
    assert (found(result, "unseparable")["value"] == 0).all()


@pytest.mark.parametrize(
    ("name", "expected"),
    [("aml", []), ("oncology_levels", []), ("poised_levels", [("pDCs", "DC others")]), ("multicenter", [])],
)
def test_other_published_tables_have_the_known_pairs(real_data, name, expected):
    """Protects from false alarms on tables that separate everything."""
    assert pairs(check_marker_table(real_data(f"cytometry/table_{name}.csv"))) == expected


def test_a_good_table_gives_an_empty_frame(real_data):
    """Protects the reading "empty means well", with columns and types that a filter needs."""
    for table in (frame(CLEAN), real_data("cytometry/table_debarcoding.csv")):
        result = check_marker_table(table)
        assert result.empty
        assert list(result.columns) == COLUMNS
        assert result["value"].dtype == float
    adata = scaled(["CD3", "CD19", "CD56", "CD14", "DNA"])
    assert check_marker_table(frame(CLEAN), adata).empty


def test_one_separating_marker_is_a_note():
    """Protects the difference between no marker and one marker, and names that one."""
    result = check_marker_table(frame({"a": [1, -1, 1, NAN], "b": [1, 1, NAN, -1], "c": [-1, -1, -1, 1]}))
    assert pairs(result) == []
    near = found(result, "near_unseparable")
    assert near[["population", "other", "marker", "severity"]].to_numpy().tolist() == [["a", "b", "CD19", "note"]]


def test_markers_without_contrast_are_named():
    """Protects from markers whose latent position nothing fixes; 0 and -1 are a contrast."""
    rows = {"a": [1, -1, NAN, -1], "b": [0.5, 1, NAN, 0], "c": [NAN, -1, NAN, -1]}
    result = check_marker_table(frame(rows))
    sided = found(result, "one_sided_marker")
    assert sided[["marker", "value", "severity"]].to_numpy().tolist() == [["CD3", 1.0, "warning"]]
    assert found(result, "unknown_marker")["marker"].tolist() == ["CD56"]


def test_a_row_that_is_almost_blank_is_named():
    """Protects from a population that takes every leftover cell: 80 % is the limit, included."""
    table = pd.DataFrame(np.where(np.eye(5), 1.0, -1.0), index=list("abcde"), columns=list("vwxyz"))
    table.loc["b", ["v", "x", "y", "z"]] = NAN
    table.loc["c", ["v", "w", "z"]] = NAN
    blank = found(check_marker_table(table), "over_blank")
    assert blank["population"].tolist() == ["b"]
    assert blank["value"].tolist() == [0.8]


def test_imbalance_is_measured_among_siblings_only():
    """Protects from comparing a lymphocyte with a monocyte: groups differ in what is known about them."""
    markers = [f"m{i}" for i in range(8)]
    table = pd.DataFrame(np.where(np.eye(5, 8), 1.0, -1.0), index=list("abcde"), columns=markers)
    table.loc["c", markers[3:]] = NAN  # 3 known entries among 8
    table.loc[["d", "e"], markers[5:]] = NAN
    table.loc["d", "m0"] = table.loc["e", "m1"] = NAN  # 4 each, beside each other only
    result = found(check_marker_table(table.assign(level=list("xxxyy"))), "sibling_imbalance")
    assert result[["population", "other", "value"]].to_numpy().tolist() == [["c", "x", 3.0]]
    everyone = found(check_marker_table(table), "sibling_imbalance")
    assert everyone[["population", "other"]].to_numpy().tolist() == [["c", None]]
    alone = found(check_marker_table(table.assign(level=list("xxzyy"))), "sibling_imbalance")
    assert alone.empty


def test_graded_entries_are_listed():
    """Protects from a typing error such as 0.1 for 1; zero is graded, too."""
    result = found(check_marker_table(frame({**CLEAN, "T": [1, 0, 2, -1]})), "graded")
    assert result[["population", "marker", "value"]].to_numpy().tolist() == [["T", "CD19", 0.0], ["T", "CD56", 2.0]]


def test_missing_markers_come_first_with_close_names():
    """Protects from the most frequent mistake: the same marker in another spelling."""
    adata = scaled(["CD3", "cd-19", "170Er_CD56_NCAM", "CD1", "CD141", "DNA1"])
    result = check_marker_table(frame({**CLEAN, "B": [-1, 0.5, 1, -1]}), adata)
    missing = found(result, "missing_marker")
    assert missing["marker"].tolist() == ["CD19", "CD56", "CD14"]
    assert result["severity"].tolist() == ["error"] * 3 + ["note"] * (len(result) - 3)
    assert len(result) > 3
    assert "the closest are ['cd-19']" in missing["message"].iloc[0]
    assert "the closest are ['170Er_CD56_NCAM']" in missing["message"].iloc[1]
    assert "rename it or leave it out" in missing["message"].iloc[2]


@pytest.mark.parametrize("storage", ["dense", "sparse", "backed"])
def test_unscaled_data_are_noticed(tmp_path, storage):
    """Protects from raw intensities, in memory or not; markers that the table lacks do not matter."""
    adata = scaled(["CD3", "CD19", "CD56", "CD14", "Time"])
    adata.X[:, 4] *= 1000
    assert check_marker_table(frame(CLEAN), adata).empty
    adata.layers["raw"] = np.abs(adata.X) * 40
    adata.X, adata.layers["scaled"] = adata.layers["raw"], adata.X
    if storage == "sparse":
        adata.X = sp.csr_matrix(adata.X)
    if storage == "backed":
        adata.write_h5ad(tmp_path / "a.h5ad")
        adata = anndata.read_h5ad(tmp_path / "a.h5ad", backed="r")
    [row] = check_marker_table(frame(CLEAN), adata).itertuples()
    assert row.check == "not_scaled"
    assert row.value == pytest.approx(40 * np.sqrt(1 - 2 / np.pi), rel=0.1)
    assert "`adata.X`" in row.message
    assert check_marker_table(frame(CLEAN), adata, layer="scaled").empty


def test_values_that_are_no_numbers_or_constant_are_noticed():
    """Protects from NaN, which would become the loss, and from a dead channel."""
    adata = scaled(["CD3", "CD19", "CD56", "CD14"])
    adata.X[3, 1], adata.X[5, 3], adata.X[:, 0] = NAN, np.inf, 0
    before = adata.X.copy()
    result = check_marker_table(frame(CLEAN), adata)
    assert found(result, "not_finite")["marker"].tolist() == ["CD19", "CD14"]
    assert found(result, "constant_marker")["marker"].tolist() == ["CD3"]
    np.testing.assert_array_equal(adata.X, before)
    assert not adata.uns


def test_wrong_arguments_are_explained():
    """Protects from a layer that is silently ignored, and from another matrix than the one meant."""
    with pytest.raises(ValueError, match="`layer='scaled'` has no meaning without `adata`"):
        check_marker_table(frame(CLEAN), layer="scaled")
    with pytest.raises(KeyError, match="`layer='scaled'` not found"):
        check_marker_table(frame(CLEAN), scaled(["CD3"]), layer="scaled")
    with pytest.raises(ValueError, match="identical rows"):
        check_marker_table(frame({"a": [1, 1], "b": [1, 1]}))
