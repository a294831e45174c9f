"""``tl.evaluate_annotation`` and ``tl.population_ratios`` report what scikit-learn and counting by hand report."""

from __future__ import annotations

import json

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score

from cellweave.io import MarkerTable
from cellweave.tl import evaluate_annotation, population_ratios

NAN = np.nan
TABLE = pd.DataFrame(
    {"level": ["T", "T", "B"], "CD3": [1.0, 1.0, -1.0], "CD4": [1.0, -1.0, NAN], "CD19": [-1.0, NAN, 1.0]},
    index=["CD4 T", "CD8 T", "B"],
)
MARKERS = ["CD3", "CD4", "CD19"]
NAMES = list(TABLE.index)


@pytest.fixture
def adata() -> AnnData:
    """300 cells at the modes of the table, with labels, a prediction with errors and rejections, and two samples."""
    rng = np.random.default_rng(0)
    truth = rng.integers(3, size=300)
    mean = TABLE[MARKERS].fillna(0.0).to_numpy()
    x = (mean[truth] + 0.2 * rng.normal(size=(300, 3))).astype(np.float32)
    predicted = np.where(rng.random(300) < 0.2, rng.integers(3, size=300), truth)
    predicted[rng.random(300) < 0.1] = -1
    labels = np.array([*NAMES, "debris"], dtype=object)[np.where(np.arange(300) < 20, 3, truth)]
    labels[20:25] = None
    obs = pd.DataFrame(
        {
            "label": labels,
            "scyan_population": pd.Categorical.from_codes(predicted, NAMES),
            "scyan_population_level": pd.Categorical.from_codes(np.array([0, 0, 1, -1])[predicted], ["T", "B"]),
            "sample": np.where(np.arange(300) < 120, "s1", "s2"),
        },
        index=[f"cell{i}" for i in range(300)],
    )
    return AnnData(x, obs=obs, var=pd.DataFrame(index=MARKERS))


def scored(adata: AnnData) -> tuple[np.ndarray, np.ndarray]:
    """Labels and predictions of the cells that count, rejected ones with a name of their own."""
    keep = adata.obs["label"].isin(NAMES).to_numpy()
    predicted = adata.obs["scyan_population"].astype(object).fillna("none").to_numpy(dtype=str)
    return adata.obs["label"].to_numpy()[keep].astype(str), predicted[keep]


def test_scores_are_those_of_scikit_learn(adata):
    """Protects the numbers: a rejected cell is wrong, an unlabelled one does not count, and both are counted."""
    truth, predicted = scored(adata)
    row = evaluate_annotation(adata, "label").loc["scyan_population"]
    assert row["accuracy"] == pytest.approx(accuracy_score(truth, predicted))
    assert row["macro_f1"] == pytest.approx(f1_score(truth, predicted, labels=NAMES, average="macro"))
    with pytest.warns(UserWarning, match="not in y_true"):
        assert row["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(truth, predicted))
    assert row["rejected"] == pytest.approx((predicted == "none").mean())
    assert row["rejected"] > 0.05
    assert (row["n_cells"], row["n_left_out"]) == (275, 25)


def test_a_population_without_labels_does_not_pull_the_mean_down(adata):
    """Protects samples that lack a population: its F1 is undefined, not zero."""
    subset = adata[(adata.obs["label"] != "B") & (adata.obs["scyan_population"] != "B")].copy()
    subset.obs["scyan_population"] = subset.obs["label"].astype("category").cat.set_categories(NAMES)
    row = evaluate_annotation(subset, "label").loc["scyan_population"]
    assert row["macro_f1"] == row["balanced_accuracy"] == row["accuracy"] == 1


def test_per_population_scores_add_up(adata):
    """Protects the table per population: its mean F1 is the macro F1, its support the number of cells."""
    overall = evaluate_annotation(adata, "label").loc["scyan_population"]
    each = evaluate_annotation(adata, "label", per_population=True).loc["scyan_population"]
    assert list(each.index) == NAMES
    assert each["f1"].mean() == pytest.approx(overall["macro_f1"])
    assert each["recall"].mean() == pytest.approx(overall["balanced_accuracy"])
    assert each["support"].sum() == overall["n_cells"]
    truth, predicted = scored(adata)
    assert each.at["B", "precision"] == pytest.approx((truth[predicted == "B"] == "B").mean())


def test_samples_have_rows_of_their_own(adata):
    """Protects evaluation on held-out samples: a row is what the sample alone would give."""
    result = evaluate_annotation(adata, "label", sample_key="sample")
    assert result.index.names == ["method", "sample"]
    for sample in ("s1", "s2"):
        alone = evaluate_annotation(adata[adata.obs["sample"] == sample].copy(), "label").loc["scyan_population"]
        pd.testing.assert_series_equal(result.loc[("scyan_population", sample)], alone, check_names=False)
    empty = adata.copy()
    empty.obs.loc[empty.obs["sample"] == "s1", "label"] = "debris"
    row = evaluate_annotation(empty, "label", sample_key="sample").loc[("scyan_population", "s1")]
    assert np.isnan(row["accuracy"]) and row["n_cells"] == 0 and row["n_left_out"] == 120


@pytest.mark.parametrize("storage", ["dense", "sparse", "backed", "layer"])
def test_baselines_find_cells_at_the_modes(adata, tmp_path, storage):
    """Protects the baselines: they read the columns of the markers by name, from any storage."""
    wide = AnnData(
        np.hstack([np.full((300, 1), 7, dtype=np.float32), adata.X[:, ::-1]]),
        obs=adata.obs.copy(),
        var=pd.DataFrame(index=["DNA", *MARKERS[::-1]]),
    )
    layer = None
    if storage == "sparse":
        wide.X = sp.csr_matrix(wide.X)
    if storage == "layer":
        wide.layers["scaled"], wide.X, layer = wide.X.copy(), wide.X * 0, "scaled"
    if storage == "backed":
        wide.write_h5ad(tmp_path / "a.h5ad")
        wide = anndata.read_h5ad(tmp_path / "a.h5ad", backed="r")
    result = evaluate_annotation(wide, "label", (), table=TABLE, layer=layer)
    assert list(result.index) == ["prior only", "Gaussian mixture"]
    assert (result["accuracy"] > 0.98).all()
    assert (result["rejected"] == 0).all()


def test_the_mixture_keeps_populations_and_is_reproducible(adata):
    """Protects the name of a component: EM starts at the table, so the order of its rows must not matter."""
    first = evaluate_annotation(adata, "label", (), table=TABLE, per_population=True)
    state = np.random.get_state()[1].copy()
    again = evaluate_annotation(adata, "label", (), table=TABLE.iloc[::-1], per_population=True)
    np.testing.assert_array_equal(np.random.get_state()[1], state)
    pd.testing.assert_frame_equal(first.sort_index(), again.sort_index())


def test_labels_can_be_translated(adata):
    """Protects labels of other authors: a map brings them in, and what it does not name stays."""
    adata.obs["theirs"] = adata.obs["label"].replace({"B": "B cells"})
    direct = evaluate_annotation(adata, "label", table=TABLE)
    mapped = evaluate_annotation(adata, "theirs", table=TABLE, label_map={"B cells": "B"})
    pd.testing.assert_frame_equal(direct, mapped)
    assert evaluate_annotation(adata, "theirs", table=TABLE)["n_left_out"].iloc[0] > 25


def test_groups_are_compared_at_a_level(adata):
    """Protects coarse labels: a population counts as its group, in labels and in predictions."""
    result = evaluate_annotation(
        adata, "label", ["scyan_population", "scyan_population_level"], table=TABLE, level="level"
    )
    truth, predicted = scored(adata)
    group = {"CD4 T": "T", "CD8 T": "T", "B": "B", "none": "none"}
    expected = np.mean([group[a] == group[b] for a, b in zip(truth, predicted, strict=True)])
    assert result.loc["scyan_population", "accuracy"] == pytest.approx(expected)
    assert result.loc["scyan_population_level", "accuracy"] == pytest.approx(expected)
    assert result.loc["prior only", "accuracy"] > 0.99
    assert expected > accuracy_score(truth, predicted)


def test_the_users_object_stays_as_it_was(adata):
    """Protects the data of the user: evaluation reads only."""
    before = adata.copy()
    evaluate_annotation(adata, "label", table=TABLE, sample_key="sample", level="level")
    pd.testing.assert_frame_equal(adata.obs, before.obs)
    np.testing.assert_array_equal(adata.X, before.X)
    assert not adata.uns


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (KeyError, {"labels_key": "cell_type"}, "`labels_key='cell_type'` is not in `adata.obs`"),
        (KeyError, {"prediction_keys": "mine"}, "`prediction_keys='mine'` is not in"),
        (KeyError, {"sample_key": "donor"}, "`sample_key='donor'` is not in"),
        (KeyError, {"table": TABLE, "layer": "scaled"}, "`layer='scaled'` not found"),
        (ValueError, {"prediction_keys": ()}, "`prediction_keys` is empty and there is no `table`"),
        (ValueError, {"level": "level"}, "has no meaning without `table`"),
        (ValueError, {"table": TABLE, "level": "x"}, "it has the levels"),
        (ValueError, {"labels_key": "sample"}, "has no label that is a population.*translate them with `label_map`"),
        (ValueError, {"label_map": {"debris": "dirt"}}, r"1 name\(s\) that are no population \(first: 'dirt'\)"),
        (
            ValueError,
            {"prediction_keys": "scyan_population_level", "table": TABLE},
            r"predicts 1 name\(s\) that are no population of `table` \(first: 'T'\)",
        ),
        (
            ValueError,
            {"table": TABLE.rename(columns={"CD19": "CD20"})},
            r"lacks 1 of the 3 markers .*\(first: 'CD20'\)",
        ),
        (ValueError, {"table": TABLE, "prior_std": 2.0}, "`prior_std` must be above 0"),
    ],
)
def test_wrong_arguments_are_explained(adata, kind, change, message):
    """Protects from scores of something else: the sentence names the argument and what was found."""
    with pytest.raises(kind, match=message):
        evaluate_annotation(adata, **{"labels_key": "label", **change})


def test_values_that_are_not_finite_are_refused(adata):
    """Protects the baselines: NaN is no population, and the cell and marker are named."""
    adata.X[7, 1] = NAN
    with pytest.raises(ValueError, match="`adata.X` has 1 NaN .*cell 'cell7', marker 'CD4'"):
        evaluate_annotation(adata, "label", table=TABLE)
    adata.obs.loc["cell3", "sample"] = None
    with pytest.raises(ValueError, match=r"is missing in 1 cell\(s\)"):
        evaluate_annotation(adata, "label", sample_key="sample")


def asinh(adata: AnnData) -> np.ndarray:
    return np.arcsinh((adata.X - 1) / 5)


def test_the_bmmc_baseline_is_that_of_the_original(real_data):
    """Protects the lower bound that every result stands beside: .811 / .543 / .643 as the original's Baseline."""
    adata = anndata.read_h5ad(real_data("cytometry/bmmc_basal1.h5ad"))
    adata = adata[adata.obs["cell_type"] != "CD11bmid Monocyte"].copy()
    x = asinh(adata)
    adata.X = np.clip(x / x.std(axis=0) - 1, -10, 10)
    result = evaluate_annotation(adata, "cell_type", (), table=real_data("cytometry/table_bmmc.csv"))
    row = result.loc["prior only", ["accuracy", "macro_f1", "balanced_accuracy"]].astype(float)
    assert row.round(3).tolist() == [0.811, 0.543, 0.643]
    assert result["n_cells"].tolist() == [100_754] * 2


def test_the_levine_baseline_is_that_of_the_original(real_data):
    """Protects the lower bound on the second set: .731 / .734 / .731."""
    adata = anndata.read_h5ad(real_data("cytometry/levine32_stratified.h5ad"))
    scale = pd.read_csv(real_data("cytometry/aml_marker_mean_std.csv"), index_col=0).loc[adata.var_names]
    adata.X = np.clip((asinh(adata) - scale["mean"].to_numpy()) / scale["std"].to_numpy(), -10, 10)
    result = evaluate_annotation(adata, "cell_type", (), table=real_data("cytometry/table_aml.csv"))
    row = result.loc["prior only", ["accuracy", "macro_f1", "balanced_accuracy"]].astype(float)
    assert row.round(3).tolist() == [0.731, 0.734, 0.731]
    assert result["n_left_out"].tolist() == [100] * 2


def test_the_multicentre_baselines_are_strong(real_data):
    """Protects from forgetting that a panel can be easy: without a flow the table alone labels 98 % of the cells."""
    adata = anndata.read_h5ad(real_data("cytometry/multicenter_6samples.h5ad"))
    x = asinh(adata)
    adata.X = np.clip(x / x.std(axis=0) - 1, -10, 10)
    result = evaluate_annotation(adata, "cell_type", (), real_data("cytometry/table_multicenter.csv"))
    assert result.loc["prior only", ["accuracy", "macro_f1"]].astype(float).round(3).tolist() == [0.986, 0.981]
    assert result["n_left_out"].tolist() == [10_847] * 2


# ---------------------------------------------------------------------------------------------------------- ratios


def test_ratios_are_counts_with_wilson_intervals(adata):
    """Protects frequencies: every pair of sample and population, rejected cells in the total, the formula of Wilson."""
    result = population_ratios(adata, "sample")
    assert list(result.columns) == ["sample", "population", "count", "total", "ratio", "ci_low", "ci_high"]
    assert result["population"].tolist() == NAMES * 2
    row = result[(result["sample"] == "s1") & (result["population"] == "B")].iloc[0]
    k = int(((adata.obs["sample"] == "s1") & (adata.obs["scyan_population"] == "B")).sum())
    assert (row["count"], row["total"]) == (k, 120)
    n, z, p = 120, 1.959963984540054, k / 120
    centre, half = p + z**2 / (2 * n), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert row["ratio"] == pytest.approx(p)
    assert row["ci_low"] == pytest.approx((centre - half) / (1 + z**2 / n))
    assert row["ci_high"] == pytest.approx((centre + half) / (1 + z**2 / n))
    narrow = population_ratios(adata, "sample", ci=0.5).iloc[0]
    assert narrow["ci_high"] - narrow["ci_low"] < result.iloc[0]["ci_high"] - result.iloc[0]["ci_low"]


def test_ratios_among_a_group_use_its_cells(adata):
    """Protects "CD4 among T": the parent's cells are the total, also those without a finer label."""
    adata.obs.iloc[0, adata.obs.columns.get_loc("scyan_population")] = None
    adata.obs.iloc[0, adata.obs.columns.get_loc("scyan_population_level")] = "T"
    result = population_ratios(adata, "sample", among="T")
    assert result["population"].tolist() == ["CD4 T", "CD8 T"] * 2
    first = adata.obs["sample"] == "s1"
    assert result["total"].iloc[0] == int((first & (adata.obs["scyan_population_level"] == "T")).sum())
    assert result["ratio"].iloc[:2].sum() < 1


def test_populations_without_cells_have_rows(adata):
    """Protects comparisons between samples: a population that vanished is a zero, and no row is missing."""
    adata.obs.loc[adata.obs["scyan_population"] == "CD8 T", "scyan_population"] = None
    adata.obs.loc[adata.obs["sample"] == "s2", "scyan_population_level"] = "B"
    whole = population_ratios(adata, "sample")
    assert (whole.loc[whole["population"] == "CD8 T", "count"] == 0).all()
    assert (whole.loc[whole["population"] == "CD8 T", "ci_low"].abs() < 1e-12).all()
    assert population_ratios(adata, "sample", among="T")["population"].tolist() == ["CD4 T"] * 2
    text = json.dumps(MarkerTable.parse(TABLE).to_dict())
    adata.uns["cellweave"] = {"scyan_population": {"parameters": {"table": text}}}
    among = population_ratios(adata, "sample", among="T").set_index(["sample", "population"])
    assert among.at[("s1", "CD8 T"), "count"] == 0
    assert among.at[("s2", "CD4 T"), "total"] == 0
    assert np.isnan(among.at[("s2", "CD4 T"), "ratio"])


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (KeyError, {"sample_key": "donor"}, "`sample_key='donor'` is not in"),
        (KeyError, {"groupby": "mine"}, "`groupby='mine'` is not in"),
        (ValueError, {"among": "Mono"}, r"`among='Mono'` is no population or group.*'T'"),
        (ValueError, {"ci": 95}, "`ci` must be between 0 and 1, got 95"),
        (ValueError, {"sample_key": "label"}, r"is missing in 5 cell\(s\)"),
    ],
)
def test_wrong_arguments_of_ratios_are_explained(adata, kind, change, message):
    """Protects from empty tables: the sentence names what there is."""
    with pytest.raises(kind, match=message):
        population_ratios(adata, **{"sample_key": "sample", **change})
