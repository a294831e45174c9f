"""Two panels in one data set: markers that were not measured in a batch."""

from __future__ import annotations

import numpy as np
import pytest

from cellweave.model import ScyanModel


@pytest.fixture
def panels(make_markers):
    """Cells of two batches; the second lacks CD56, where it holds nonsense."""
    adata = make_markers(400, shift=0.3)
    second = (adata.obs["batch"] == "b1").to_numpy()
    measured = np.ones(adata.shape, dtype=np.int8)
    measured[np.ix_(second, [4])] = 0
    adata.layers["measured"] = measured
    adata.X[np.ix_(second, [4])] = np.nan
    return adata


def test_a_missing_marker_is_integrated_out(panels, fit_scyan, make_markers):
    """Protects merged panels: training is finite, labels are right where the other markers decide, nonsense has no effect."""
    training = {"max_epochs": 30}
    other = panels.copy()
    other.X[np.isnan(other.X)] = 1e6
    model = fit_scyan(panels, setup={"nan_layer": "measured"}, training=training)
    again = fit_scyan(other, setup={"nan_layer": "measured"}, training=training)
    labels = model.predict(log_density_threshold=-np.inf)
    assert (labels == panels.obs["truth"].astype(str)).mean() > 0.9
    assert (again.predict_proba().to_numpy() == model.predict_proba().to_numpy()).all()


def test_results_of_cells_with_missing_markers(panels, fit_scyan):
    """Protects readers of results: the embedding is complete, corrected values stay missing where nothing was measured."""
    model = fit_scyan(panels, setup={"nan_layer": "measured"})
    missing = np.isnan(panels[:, model.markers].X)
    latent = model.get_latent_representation(key_added="X_scyan")
    assert np.isfinite(latent.to_numpy()).all()
    corrected = model.correct_batch(reference="b0").to_numpy()
    assert (np.isnan(corrected) == missing).all()
    markers = model.get_marker_diagnostics()
    populations = model.get_population_diagnostics()
    assert markers["spearman"].between(-1, 1).all()
    counts = model.predict(log_density_threshold=-np.inf).value_counts()
    assert (populations["n_cells"] == counts.reindex(populations.index)).all()
    assert populations["agreement"].dropna().between(0, 1).all()
    # the table alone leaves out what was not measured, too: nearly all cells are clear without CD56
    assert populations["prior_only_share"].max() < 0.6


def test_the_mask_travels_with_new_data(panels, fit_scyan, tmp_path):
    """Protects queries of a saved model: variables in another order, mask included, give the same probabilities."""
    model = fit_scyan(panels, setup={"nan_layer": "measured"})
    expected = model.predict_proba().to_numpy()
    model.save(tmp_path / "model")
    query = panels[:, ["SSC", "CD14", "CD56", "CD19", "CD8", "CD4", "CD3"]].copy()
    found = ScyanModel.load(tmp_path / "model").predict_proba(query)
    np.testing.assert_allclose(found.to_numpy(), expected, rtol=1e-5, atol=1e-6)
    del query.layers["measured"]
    with pytest.raises(KeyError, match="`nan_layer='measured'` not found"):
        ScyanModel.load(tmp_path / "model").predict_proba(query)


def test_ensembles_of_models(make_markers, fit_scyan, tmp_path):
    """Protects `n_ensemble`: the same methods, files that load, and probabilities that differ from a single network's."""
    adata = make_markers(200)
    adata.obs["label"] = np.where(np.arange(200) < 20, adata.obs["truth"].astype(str), "unknown")
    setup = {"labels_key": "label", "continuous_covariate_keys": ["age"]}
    model = fit_scyan(adata, setup=setup, n_ensemble=3, identity_init=False)
    probs = model.predict_proba()
    np.testing.assert_allclose(probs.sum(1), 1, rtol=1e-5)
    assert model.population_weights.sum() == pytest.approx(1, rel=1e-5)
    assert model.sample(20, seed=0).shape == (20, 6)
    assert model.correct_batch().shape == (200, 6)
    assert model.get_population_diagnostics()["n_cells"].sum() == 200
    model.save(tmp_path / "model")
    assert (ScyanModel.load(tmp_path / "model").predict_proba(model.adata).to_numpy() == probs.to_numpy()).all()
    single = fit_scyan(make_markers(200), identity_init=False)
    assert np.abs(single.predict_proba().to_numpy() - probs.to_numpy()).max() > 1e-3
    with pytest.raises(ValueError, match="`n_ensemble` must be a positive integer, got 0"):
        ScyanModel(model.adata, model.table, n_ensemble=0)
