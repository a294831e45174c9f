"""Latent and measured markers of `ScyanModel`: batch correction, drawn cells, and what shows that a fit is wrong."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pandas as pd
import pytest
import scvi
import torch

from cellweave.model import ScyanModel


def _batch_means(frame: pd.DataFrame, adata) -> np.ndarray:
    """Mean over populations of the distance of the batch means of every marker, so that shares do not matter."""
    groups = frame.groupby(
        [adata.obs["truth"].astype(str).to_numpy(), adata.obs["batch"].astype(str).to_numpy()]
    ).mean()
    return (groups.xs("b1", level=1) - groups.xs("b0", level=1)).mean().to_numpy()


# ---------------------------------------------------------------- batch correction


def test_correction_brings_batches_together(scyan):
    """Protects `correct_batch`: batches that are 0.65 to 1.2 apart end within 0.25, without turning a marker around."""
    adata = scyan.adata
    raw = adata[:, list(scyan.markers)].to_df()
    assert np.abs(_batch_means(raw, adata)).min() > 0.5
    for reference in ("b0", "b1", "average", None):
        corrected = scyan.correct_batch(reference=reference)
        assert np.abs(_batch_means(corrected, adata)).max() < 0.25, reference
        assert list(corrected) == list(scyan.markers)
        for marker in corrected:
            assert np.corrcoef(raw[marker], corrected[marker])[0, 1] > 0.6


def test_cells_of_the_reference_stay_as_they_are(scyan):
    """Protects the scale: a cell of the reference batch is mapped to itself, one of the other batch is not."""
    raw = scyan.adata[:, list(scyan.markers)].to_df()
    for reference in ("b0", "b1"):
        same = (scyan.adata.obs["batch"] == reference).to_numpy()
        moved = (scyan.correct_batch(reference=reference) - raw).abs().max(axis=1)
        assert moved[same].max() < 1e-3
        assert moved[~same].min() > 0.1


def test_average_is_the_mean_of_the_references(scyan):
    """Protects "average": the mean of what each batch would show, for cells of all batches."""
    both = [scyan.correct_batch(reference=name).to_numpy() for name in ("b0", "b1")]
    np.testing.assert_allclose(scyan.correct_batch(reference="average"), np.mean(both, axis=0), atol=1e-5)


def test_default_reference_is_the_most_frequent_batch(scyan, scyan_data):
    """Protects the default: the largest batch of the data that are corrected, not of those of the model."""
    for name in ("b0", "b1"):
        one = np.flatnonzero(scyan_data.obs["batch"] == name)[:60]
        other = np.flatnonzero(scyan_data.obs["batch"] != name)[:20]
        part = scyan_data[np.sort(np.concatenate([one, other]))].copy()
        pd.testing.assert_frame_equal(scyan.correct_batch(part), scyan.correct_batch(part, reference=name))
    scyan.correct_batch(part, key_added="c")
    assert part.uns["cellweave"]["c"]["parameters"]["reference"] == "b1"


def test_other_covariates_stay_those_of_the_cell(scyan, scyan_data):
    """Protects the stimulus: correction maps back with each cell's own condition and age, not with those of others."""
    corrected = scyan.correct_batch(reference="b0")
    u = torch.tensor(scyan.get_latent_representation().to_numpy())
    obs = scyan_data.obs[["batch", "condition", "age"]].copy()
    obs["batch"] = "b0"
    own = scyan.module.to_expression(u, scyan._covariate_matrix(obs)).detach().numpy()
    np.testing.assert_allclose(corrected, own, atol=1e-4)
    obs["condition"] = "rest"
    others = scyan.module.to_expression(u, scyan._covariate_matrix(obs)).detach().numpy()
    assert np.abs(others - own).max() > 0.05


def test_correction_is_refused(scyan, scyan_data, make_markers, fit_scyan, tmp_path):
    """Protects against a meaningless result: no batch in the model, an unknown reference, unknown batches, no data."""
    with pytest.raises(
        ValueError, match=r"`reference='b7'` is not a batch of the model; choose one of \['b0', 'b1'\], or 'average'"
    ):
        scyan.correct_batch(reference="b7")
    no_batch = fit_scyan(make_markers(100), setup={"batch_key": None}, training={"max_epochs": 1})
    with pytest.raises(
        ValueError, match="`correct_batch` needs a model that knows the batch of a cell; name its column"
    ):
        no_batch.correct_batch()
    scyan_data.obs["batch"] = "new"
    with pytest.raises(ValueError, match=r"`adata.obs\['batch'\]` .*1 value\(s\) in 500 cell.*'new'"):
        scyan.correct_batch(scyan_data)
    del scyan_data.obs["batch"]
    with pytest.raises(KeyError, match="`batch_key='batch'` not found; "):
        scyan.correct_batch(scyan_data)
    scyan.save(tmp_path / "m")
    with pytest.raises(ValueError, match="loaded without data; pass `adata=`"):
        ScyanModel.load(tmp_path / "m", accelerator="cpu").correct_batch()


# ---------------------------------------------------------------- drawn cells


def test_drawn_cells_look_like_the_data(scyan):
    """Protects `sample`: shares follow the population weights, means of populations those of the data, covariates too."""
    drawn = scyan.sample(6000, seed=0)
    assert drawn.shape == (6000, 6)
    assert list(drawn.var_names) == list(scyan.markers)
    assert drawn.obs_names.is_unique
    shares = drawn.obs["population"].value_counts(normalize=True)[scyan.populations]
    np.testing.assert_allclose(shares, scyan.population_weights, atol=0.025)  # four standard deviations
    np.testing.assert_allclose(
        (drawn.obs["batch"] == "b1").mean(), (scyan.adata.obs["batch"] == "b1").mean(), atol=0.03
    )
    np.testing.assert_allclose(drawn.obs["age"].mean(), scyan.adata.obs["age"].mean(), atol=1)
    assert set(drawn.obs["condition"]) == {"rest", "stim"}
    observed = scyan.get_population_profiles(values="measured")
    means = drawn.to_df().groupby(drawn.obs["population"].astype(str)).mean().loc[scyan.populations]
    assert np.abs(means - observed).to_numpy().mean() < 0.25
    np.testing.assert_allclose(
        drawn.obsm["X_scyan"].groupby(drawn.obs["population"].astype(str)).mean().loc["B", "CD19"], 1, atol=0.1
    )
    assert np.corrcoef(drawn.obs["batch"] == "b1", drawn.to_df()["CD14"])[0, 1] > 0.3


def test_drawn_cells_are_labelled_as_what_they_were_drawn_as(scyan):
    """Protects consistency: the model gives nearly all of its own cells the population they were drawn from."""
    drawn = scyan.sample(500, seed=1)
    labels = scyan.predict(drawn, log_density_threshold=-np.inf)
    assert (labels.astype(str).to_numpy() == drawn.obs["population"].astype(str).to_numpy()).mean() > 0.98


def test_population_and_covariates_can_be_chosen(scyan):
    """Protects the arguments: one population, a group, one per cell; covariates for all cells or for each."""
    assert set(scyan.sample(20, "NK", seed=0).obs["population"]) == {"NK"}
    groups = scyan.sample(2000, "T", seed=0).obs["population"].value_counts(normalize=True)
    weights = scyan.population_weights[["CD4 T", "CD8 T"]]
    np.testing.assert_allclose(groups[["CD4 T", "CD8 T"]], weights / weights.sum(), atol=0.05)
    assert groups[["B", "NK", "Mono"]].sum() == 0
    names = ["B", "Mono", "B"]
    chosen = scyan.sample(
        3, names, covariates={"batch": "b1", "age": [20, 50.0, np.float32(80)], "condition": ["rest"] * 3}
    )
    assert chosen.obs["population"].tolist() == names
    assert chosen.obs["batch"].tolist() == ["b1"] * 3
    assert chosen.obs["age"].tolist() == [20, 50, 80]
    frame = scyan.adata.obs[["batch", "condition", "age"]].iloc[:3]
    pd.testing.assert_frame_equal(
        scyan.sample(3, covariates=frame).obs[["batch", "condition", "age"]].reset_index(drop=True).astype(str),
        frame.reset_index(drop=True).astype(str),
    )


def test_seed_decides_what_is_drawn(scyan):
    """Protects reproducibility: one seed gives one result, others others; the default is the seed of scvi-tools."""
    first, again, other = (scyan.sample(30, seed=seed) for seed in (3, 3, 4))
    pd.testing.assert_frame_equal(first.to_df(), again.to_df())
    pd.testing.assert_frame_equal(first.obs, again.obs)
    assert not np.array_equal(first.X, other.X)
    scvi.settings.seed = 3
    np.testing.assert_array_equal(scyan.sample(30).X, first.X)


def test_covariate_called_population(make_markers, fit_scyan):
    """Protects data with such a column: the drawn population has another name then."""
    adata = make_markers(100)
    adata.obs["population"] = adata.obs["condition"]
    model = fit_scyan(adata, setup={"categorical_covariate_keys": ["population"]}, training={"max_epochs": 1})
    obs = model.sample(5, "B").obs
    assert set(obs["scyan_population"]) == {"B"}
    assert set(obs["population"]) <= {"rest", "stim"}


DRAWS = {
    "unknown population": (
        {"n_samples": 3, "population": "X"},
        "`table` has no population or group 'X'; its populations are",
    ),
    "unknown in a list": (
        {"n_samples": 2, "population": ["B", "X"]},
        "`population` has 'X', which the table does not have",
    ),
    "group in a list": ({"n_samples": 2, "population": ["B", "T"]}, "`population` has 'T', .*; give one population"),
    "too few populations": (
        {"n_samples": 3, "population": ["B"]},
        "`population` has 1 names; give one .* each of 3 cells",
    ),
    "no cells": ({"n_samples": 0}, "`n_samples` must be a positive integer, got 0; "),
    "half a cell": ({"n_samples": 1.5}, "`n_samples` must be a positive integer, got 1.5; "),
    "unknown batch": (
        {"n_samples": 3, "covariates": {"batch": "b9"}},
        r"`covariates\['batch'\]` has 'b9', .*; use \['b0', 'b1'\]",
    ),
    "unknown covariate": (
        {"n_samples": 3, "covariates": {"dose": 1}},
        "`covariates` has 'dose', which is no covariate .*; it has",
    ),
    "too few values": (
        {"n_samples": 3, "covariates": {"batch": ["b0"]}},
        r"`covariates\['batch'\]` has 1 values; give one, or 3",
    ),
    "text for a number": (
        {"n_samples": 3, "covariates": {"age": "old"}},
        r"`covariates\['age'\]` has 'old', .*; give numbers",
    ),
    "NaN for a number": (
        {"n_samples": 3, "covariates": {"age": [1, 2, np.nan]}},
        r"`covariates\['age'\]` has nan, .*; give",
    ),
}


@pytest.mark.parametrize("fault", DRAWS)
def test_draws_are_refused(scyan, fault):
    """Protects `sample`: each wrong argument is one sentence that names it."""
    arguments, message = DRAWS[fault]
    with pytest.raises(ValueError, match=message) as error:
        scyan.sample(**arguments)
    assert str(error.value).endswith(".")
    assert "\n" not in str(error.value)


def test_drawing_without_data(scyan, scyan_data, tmp_path):
    """Protects shared models: with all covariates given no data are needed; without, the message names the rest."""
    scyan.save(tmp_path / "m")
    loaded = ScyanModel.load(tmp_path / "m", accelerator="cpu")
    given = {"batch": "b0", "condition": "rest", "age": 40}
    np.testing.assert_array_equal(
        loaded.sample(4, covariates=given, seed=1).X, scyan.sample(4, covariates=given, seed=1).X
    )
    with pytest.raises(ValueError, match=r"`covariates` lacks \['condition', 'age'\], and the model has no data"):
        loaded.sample(4, covariates={"batch": "b0"})
    ScyanModel.setup_anndata(scyan_data)
    with pytest.raises(RuntimeError, match="(?i)train"):
        ScyanModel(scyan_data, scyan.table).sample(3)


# ---------------------------------------------------------------- profiles, table, diagnostics


def test_profiles_follow_the_table(scyan, marker_table):
    """Protects `get_population_profiles`: latent means near the known entries, measured means those of the data."""
    latent = scyan.get_population_profiles()
    assert list(latent.index) == scyan.populations
    known = marker_table.notna().to_numpy()
    assert np.abs(latent.to_numpy() - marker_table.to_numpy())[known].max() < 0.4
    measured = scyan.get_population_profiles(values="measured", indices=(scyan.adata.obs["truth"] == "B").to_numpy())
    truth = scyan.adata[scyan.adata.obs["truth"] == "B", list(scyan.markers)].X.mean(axis=0)
    np.testing.assert_allclose(measured.loc["B"], truth, atol=0.05)
    assert measured.loc["Mono"].isna().all()
    with pytest.raises(ValueError, match="`values` must be 'latent' or 'measured', got 'raw'; choose"):
        scyan.get_population_profiles(values="raw")


def test_refined_table_fills_only_what_is_unknown(scyan, marker_table, fit_scyan, make_markers):
    """Protects `refine_table`: known entries stay, unknown ones are near their true value, and the result trains."""
    refined = scyan.refine_table()
    known = marker_table.notna()
    assert refined.index.equals(marker_table.index)
    np.testing.assert_array_equal(refined.to_numpy()[known], marker_table.to_numpy()[known])
    np.testing.assert_allclose(refined.to_numpy()[~known], 0.3, atol=0.35)
    few = scyan.refine_table(min_cells=100)
    assert few.loc["NK"].isna().any(axis=None), "50 cells are fewer than 100"
    model = fit_scyan(make_markers(200), refined, training={"max_epochs": 1})
    assert not np.isnan(model.table.rho).any()


def test_diagnostics_are_quiet_about_a_good_fit(scyan, marker_table):
    """Protects against false alarms: all markers follow, all populations are found, as the table alone finds most."""
    markers = scyan.get_marker_diagnostics()
    assert (markers["flag"] == "").all()
    assert markers["spearman"].between(0.7, 1).all()
    assert markers["n_known"].tolist() == marker_table.notna().sum().tolist()
    populations = scyan.get_population_diagnostics()
    assert populations["n_cells"].sum() == 500
    np.testing.assert_allclose(populations["share"], [0.15, 0.3, 0.25, 0.1, 0.2], atol=0.06)
    assert (populations["probability"] > 0.95).all()
    assert (populations["agreement"] > 0.5).all()
    assert populations["offset"].between(0, 0.4).all()
    assert set(populations["marker"]) <= set(scyan.markers)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        scyan._warn_about_fit()


class _Flipped(torch.nn.Module):
    """A flow that turns one latent marker around, or makes it up."""

    def __init__(self, flow, marker: int, factor: float) -> None:
        super().__init__()
        self.flow, self.marker, self.factor = flow, marker, factor

    def forward(self, x, covariates=None):
        u, log_det = self.flow(x, covariates)
        u = u.clone()
        u[:, self.marker] = self.factor * u[:, self.marker] + (1 - abs(self.factor)) * u[:, 0]
        return u, log_det


@pytest.mark.parametrize(("factor", "flag"), [(-1.0, "flipped"), (0.1, "ignored")])
def test_marker_that_was_turned_around_is_named(scyan, factor, flag):
    """Protects labels: a latent marker that no longer is the measured marker is flagged, and named in a warning."""
    model = copy.deepcopy(scyan)
    model.module.real_nvp = _Flipped(model.module.real_nvp, 3, factor)
    markers = model.get_marker_diagnostics()
    assert markers.index[markers["flag"] != ""].tolist() == ["CD19"]
    assert markers.at["CD19", "flag"] in (flag, "flipped")
    with pytest.warns(
        UserWarning, match=r"1 latent marker\(s\) do not follow .*'CD19' \(-?[01]\.\d\d\).*`get_marker_diagnostics`"
    ):
        model._warn_about_fit()


def test_population_that_is_not_there_is_named(make_markers, fit_scyan, marker_table):
    """Protects users of large tables: populations without a cell are named after training."""
    marker_table.loc[("Baso", "Baso", "myeloid"), :] = [1, 1, 1, 1, 1, 1]
    with pytest.warns(
        UserWarning, match=r"1 of 6 populations have no cell \('Baso'\); see `get_population_diagnostics`"
    ):
        model = fit_scyan(make_markers(200), marker_table)
    row = model.get_population_diagnostics().loc["Baso"]
    assert row["n_cells"] == 0
    assert np.isnan([row["probability"], row["agreement"], row["offset"]]).all()
    assert model.get_population_profiles().loc["Baso"].isna().all()


def test_continuum_markers_are_refined_on_the_scale_of_the_table(make_markers, fit_scyan, marker_table):
    """Protects `refine_table` of continuum markers, whose modes stand at a fifth of the table's values."""
    model = fit_scyan(make_markers(), marker_table, continuum_markers=["CD14"], training={"max_epochs": 3})
    means = model.get_population_profiles()
    refined = model.refine_table()
    assert refined["CD14"].iloc[1] == pytest.approx(5 * means.at["CD4 T", "CD14"], rel=0.5)
    with pytest.raises(
        ValueError, match=r"`continuum_markers` names 1 marker\(s\) that the table does not have \(first: 'FSC'\); "
    ):
        fit_scyan(make_markers(100), marker_table, continuum_markers=["FSC"])
