"""`ScyanModel` on simulated cells with a known answer: training, labels, probabilities, densities."""

from __future__ import annotations

import copy
import json
import pickle

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import scvi
import torch
from lightning.pytorch import Callback

from cellweave.io import MarkerTable
from cellweave.model import ScyanModel

TERMS = ("prior_loss", "log_det_loss", "monotone_loss", "weight_loss", "pi_entropy")


def _accuracy(model, adata=None, **options) -> float:
    data = model.adata if adata is None else adata
    labels = model.predict(adata, **{"log_density_threshold": -np.inf, **options})
    return float((labels.astype(str).to_numpy() == data.obs["truth"].astype(str).to_numpy()).mean())


def _same_weights(first, second) -> bool:
    pairs = zip(first.module.state_dict().values(), second.module.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


# ---------------------------------------------------------------- what is learned


def test_populations_are_found(scyan, make_markers, fit_scyan, marker_table):
    """Protects the annotation: nearly every cell gets its label, more than the table gives without a flow (0.96)."""
    assert _accuracy(scyan) > 0.985
    diagnostics = scyan.get_population_diagnostics()
    assert 0.9 < (diagnostics["prior_only_share"] @ np.ones(5)) <= 1.001
    wrong = marker_table.copy()
    wrong["CD3"] = -wrong["CD3"]
    assert _accuracy(fit_scyan(make_markers(), wrong)) < 0.8, "a table with a wrong marker must not give these labels"


def test_the_flow_beats_the_table_alone(scyan):
    """Protects the purpose of training: labels of cells that their batch moved across the middle."""
    untrained = copy.deepcopy(scyan)
    for layer in untrained.module.real_nvp.module_list:
        for network in (layer.sfun, layer.tfun):
            torch.nn.init.zeros_(network[-1].weight)
            torch.nn.init.zeros_(network[-1].bias)
    assert _accuracy(scyan) - _accuracy(untrained) > 0.02


def test_population_weights_are_shares(scyan):
    """Protects `population_weights`: a named distribution, close to the simulated shares."""
    weights = scyan.population_weights
    assert list(weights.index) == ["B", "CD4 T", "CD8 T", "NK", "Mono"]
    assert weights.sum() == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(weights, [0.15, 0.3, 0.25, 0.1, 0.2], atol=0.06)


def test_history_has_every_term(scyan, fit_scyan, make_markers):
    """Protects the curves: every term of training and validation; with temperature, validation once per cycle."""
    curves = scyan.history
    assert set(curves) == {"train_loss", "validation_loss", "lr"} | {
        f"{t}_{s}" for t in TERMS for s in ("train", "validation")
    }
    weights = {"prior_loss": 1.0, "log_det_loss": 1.0, "monotone_loss": 100.0, "weight_loss": 1.0}
    total = sum(weight * curves[f"{term}_train"].iloc[:, 0] for term, weight in weights.items())
    np.testing.assert_allclose(curves["train_loss"].iloc[:, 0].to_numpy(float), total.to_numpy(float), rtol=1e-5)
    assert list(curves["validation_loss"].index)[:2] == [0, 1]
    cycles = fit_scyan(make_markers(), temperature_period=3)
    assert list(cycles.history["validation_loss"].index) == [2, 5]
    labelled = fit_scyan(make_markers(), setup={"labels_key": "truth"})
    assert {"label_loss_train", "label_loss_validation"} <= set(labelled.history)


def test_temperature_leaves_the_population_weights_alone(make_markers, fit_scyan):
    """Protects the schedule: weights of populations move in the first epoch of a cycle only, the flow in all."""
    curves = (
        fit_scyan(make_markers(), temperature_period=3, training={"early_stopping": False})
        .history["pi_entropy_train"]
        .iloc[:, 0]
        .to_numpy(float)
    )
    last = curves[1]  # of epochs 1 and 2, after the weights of epoch 0
    assert curves[2] == last
    assert curves[0] != last
    assert curves[3] != last
    assert curves[4] == curves[5]
    always = fit_scyan(make_markers(), temperature_period=1, training={"early_stopping": False})
    assert len(set(always.history["pi_entropy_train"].iloc[:, 0])) == 6


def test_seeds_repeat(make_markers, scyan_quick, marker_table):
    """Protects reproducibility: the same seed gives the same weights whatever was drawn before; another one does not."""

    def fit(seed: int, draws: int):
        scvi.settings.seed = seed
        adata = make_markers(100)
        ScyanModel.setup_anndata(adata, batch_key="batch")
        model = ScyanModel(adata, marker_table, n_layers=2)
        torch.rand(draws), np.random.rand(draws)
        model.train(**{**scyan_quick, "max_epochs": 2})
        return model

    assert _same_weights(fit(1, 0), fit(1, 3))
    assert not _same_weights(fit(1, 0), fit(2, 0))


def test_large_data_are_seen_in_parts(make_markers, fit_scyan):
    """Protects `max_cells_per_epoch`: an epoch has that many cells, and others each time."""
    rows: list[set[int]] = []

    class Record(Callback):
        def on_train_epoch_start(self, trainer, plan):
            rows.append(set())

        def on_train_batch_end(self, trainer, plan, outputs, batch, batch_idx):
            rows[-1] |= set(batch["row"][batch["valid"]].tolist())

    fit_scyan(make_markers(), training={"max_cells_per_epoch": 128, "callbacks": [Record()], "early_stopping": False})
    assert {len(seen) for seen in rows} == {128}
    assert len(set.union(*rows)) > 300


def test_small_data_get_more_steps(make_markers, marker_table, monkeypatch):
    """Protects small data sets: 40 equal steps per epoch if they have 128 cells, and about 520 steps in all."""
    for n_cells, expected in ((200, (90, 260)), (500, (113, 130)), (5000, (125, 15)), (6000, (135, 13))):
        adata = make_markers(n_cells)
        ScyanModel.setup_anndata(adata)
        model = ScyanModel(adata, marker_table)
        assert model._steps(None, None, None, None) == expected
    assert model._steps(None, None, None, 2700) == (123, 24)  # 22 steps: an epoch has some of the cells only
    assert model._steps(1000, None, 1.0, None) == (1000, 87)
    monkeypatch.setattr("cellweave.model._scyan._LARGEST_BATCH", 101)
    assert model._steps(None, None, None, None) == (100, 10)  # 54 steps of 5,400 cells


def test_parameters_change_the_model(make_markers, fit_scyan):
    """Protects the constructor: sizes, continuum markers and the random start of the published model arrive."""
    sizes = {"n_hidden": 3, "n_hidden_layers": 1, "n_layers": 2}
    model = fit_scyan(make_markers(100), continuum_markers=["CD56"], identity_init=False, prior_std=0.4, **sizes)
    assert model.module.prior.prior_std == 0.4
    assert model.module.prior.continuum.tolist() == [name == "CD56" for name in model.markers]
    assert [tuple(layer.sfun[0].weight.shape) for layer in model.module.real_nvp.module_list] == [(3, 8)] * 2
    assert "5 populations, 6 markers" in repr(model)


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_other_precisions(make_markers, fit_scyan, precision):
    """Protects `precision`: likelihoods stay exact enough that labels are right, and the module ends in float32."""
    model = fit_scyan(make_markers(), training={"precision": precision})
    assert _accuracy(model) > 0.985
    assert all(p.dtype == torch.float32 for p in model.module.parameters())


@pytest.mark.slow
def test_compiled_training_is_the_same(make_markers, fit_scyan):
    """Protects `compile=True`: the losses of training without it."""
    options = {"early_stopping": False, "max_epochs": 4}
    eager, compiled = (fit_scyan(make_markers(200), training={**options, "compile": c}) for c in (False, True))
    for name, curve in eager.history.items():
        np.testing.assert_allclose(
            compiled.history[name].to_numpy(float), curve.to_numpy(float), rtol=1e-3, atol=1e-3, err_msg=name
        )


# ---------------------------------------------------------------- a few labels


def _few_labels(adata, n: int, names=None, seed: int = 0):
    """Labels of ``n`` cells of every population, or of their groups; all others unknown."""
    rng, truth = np.random.default_rng(seed), adata.obs["truth"].astype(str).to_numpy()
    labels = np.full(adata.n_obs, "unknown", dtype=object)
    for name in np.unique(truth):
        chosen = rng.choice(np.flatnonzero(truth == name), n, replace=False)
        labels[chosen] = name if names is None else names.get(name, name)
    adata.obs["label"] = labels
    return adata


@pytest.mark.parametrize("groups", [None, {"B": "lymphoid", "NK": "lymphoid"}])
def test_few_labels_help(make_markers, fit_scyan, marker_table, groups):
    """Protects `labels_key`: a few labels, some of groups only, tell T cells apart that the table confounds."""
    marker_table.loc[["CD4 T", "CD8 T"], ["CD4", "CD8", "CD56"]] = np.nan
    marker_table.iloc[1:3, 5] = [-1, np.nan]  # in truth the other way round
    options = {
        "n_hidden_layers": 1,
        "monotone_weight": 0.0,  # the table is wrong, so a latent marker has to turn around
        "training": {"max_epochs": 30, "early_stopping": False, "batch_size": 32, "lr": 5e-3},
    }
    few = _few_labels(make_markers(300, shift=0.3), 15, groups)
    assert _accuracy(fit_scyan(few.copy(), marker_table, **options)) < 0.65
    assert _accuracy(fit_scyan(few, marker_table, setup={"labels_key": "label"}, label_weight=5.0, **options)) > 0.85


def test_label_weight_zero_is_no_label(make_markers, fit_scyan):
    """Protects comparisons: with `label_weight=0`, or only unlabelled cells, training is that without labels."""
    plain = fit_scyan(make_markers(200))
    few, none = _few_labels(make_markers(200), 5), make_markers(200)
    none.obs["label"] = "unknown"
    for adata, weight in ((few, 0.0), (none, 2.0)):
        model = fit_scyan(adata, setup={"labels_key": "label"}, label_weight=weight)
        assert "label_loss_train" not in model.history
        assert _same_weights(plain, model)


# ---------------------------------------------------------------- labels, probabilities, densities


def test_new_data_are_annotated_like_the_same_data(scyan, scyan_data):
    """Protects queries: a fresh copy, in other variable order and with other variables, gives the same results."""
    extra = scyan_data[:, ::-1].copy()
    extra.var_names = [f"other_{n}" if n in ("FSC", "SSC") else n for n in extra.var_names]
    for query in (scyan_data, extra, scyan_data[:], scyan_data[:, ::-1]):
        pd.testing.assert_series_equal(scyan.predict(query), scyan.predict())
        pd.testing.assert_frame_equal(scyan.predict_proba(query), scyan.predict_proba())
        pd.testing.assert_series_equal(scyan.get_log_density(query), scyan.get_log_density())
        pd.testing.assert_frame_equal(scyan.get_latent_representation(query), scyan.get_latent_representation())
    assert list(extra.obs) == list(scyan_data.obs)[: len(extra.obs.columns)]


def test_unseen_cells_are_annotated(scyan, make_markers):
    """Protects what the published model cannot do: labels of cells that it was not trained on."""
    assert _accuracy(scyan, make_markers(400, seed=7, effect=0.4)) > 0.97


def test_results_do_not_depend_on_batches_and_rows(scyan):
    """Protects getters: `batch_size`, `indices` and their order change nothing in the result of a cell."""
    rows = np.array([400, 3, 3, 77, -1])
    for name in ("predict_proba", "get_log_density", "get_latent_representation"):
        whole = getattr(scyan, name)()
        np.testing.assert_allclose(getattr(scyan, name)(batch_size=7), whole, rtol=1e-4, atol=1e-4)
        part = getattr(scyan, name)(indices=rows)
        assert list(part.index) == list(scyan.adata.obs_names[rows])
        np.testing.assert_allclose(part, whole.iloc[rows], rtol=1e-4, atol=1e-4)
    labels = scyan.predict(indices=rows, log_density_threshold=-np.inf)
    assert labels.tolist() == scyan.predict(log_density_threshold=-np.inf).iloc[rows].tolist()
    mask = np.arange(scyan.adata.n_obs) % 7 == 0
    assert scyan.predict(indices=mask).tolist() == scyan.predict()[mask].tolist()
    with pytest.raises(ValueError, match="`indices` has row 900"):
        scyan.predict(indices=[900])


def test_probabilities_are_a_distribution_of_the_labels(scyan):
    """Protects `predict_proba`: rows sum to one, and the largest is the label."""
    probabilities = scyan.predict_proba()
    assert list(probabilities) == scyan.populations
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    labels = scyan.predict(log_density_threshold=-np.inf)
    assert labels.tolist() == probabilities.idxmax(axis=1).tolist()
    assert list(labels.cat.categories) == scyan.populations


def test_levels_are_sums_of_leaves(scyan, marker_table):
    """Protects the hierarchy: probabilities of groups are sums, and their labels the largest of these sums."""
    leaves = scyan.predict_proba()
    for level in ("lineage", "origin"):
        groups = scyan.predict_proba(level=level)
        members = marker_table.index.get_level_values(level)
        assert list(groups) == list(dict.fromkeys(members))
        for group in groups:
            np.testing.assert_allclose(groups[group], leaves.loc[:, members == group].sum(axis=1), atol=1e-6)
        labels = scyan.predict(level=level, log_density_threshold=-np.inf)
        assert labels.tolist() == groups.idxmax(axis=1).tolist()
        assert list(labels.cat.categories) == list(groups)


def test_group_of_a_cell_may_be_known_where_its_population_is_not(scyan, scyan_data):
    """Protects `min_probability`: a cell between CD4 and CD8 T cells is a T cell, and neither of them."""
    between = scyan_data[:50].copy()
    between.obs["batch"] = "b0"
    between.X[:, :6] = [1, 0, 0, -1, -0.7, -0.7]
    share = scyan.predict_proba(between)
    uncertain = (share[["CD4 T", "CD8 T"]].max(axis=1) < 0.999).to_numpy()
    limit = {"log_density_threshold": -np.inf, "min_probability": 0.9999}
    assert uncertain.any()
    assert scyan.predict(between, **limit)[uncertain].isna().all()
    assert (scyan.predict(between, level="lineage", **limit)[uncertain] == "T").all()
    with pytest.raises(ValueError, match="`min_probability` must be from 0 to 1, got 1.5; "):
        scyan.predict(min_probability=1.5)


def test_thresholds(scyan, scyan_data):
    """Protects rejection: -inf labels every cell, inf none, a number those above; "auto" rejects cells far away only."""
    density = scyan.get_log_density()
    assert scyan.predict(log_density_threshold=-np.inf).notna().all()
    assert scyan.predict(log_density_threshold=np.inf).isna().all()
    middle = float(density.median())
    np.testing.assert_array_equal(scyan.predict(log_density_threshold=middle).isna(), density < middle)
    assert scyan.predict().isna().mean() < 0.03
    far = scyan_data[:60].copy()
    far.X[:, :6] = 8.0
    assert scyan.predict(far).isna().all()
    assert scyan.get_log_density(far).max() < density.min()
    for wrong in ("high", np.nan, None):
        with pytest.raises(ValueError, match="`log_density_threshold` must be a number or 'auto'.*; -inf labels all"):
            scyan.predict(log_density_threshold=wrong)


def test_log_density_is_that_of_the_prior(scyan):
    """Protects the meaning of the density: log p(u|z) of the most probable population, from the latent markers."""
    u = torch.tensor(scyan.get_latent_representation().to_numpy())
    per_marker = scyan.module.prior.log_prob_per_marker(u).sum(-1)
    best = scyan.predict(log_density_threshold=-np.inf).cat.codes.to_numpy()
    np.testing.assert_allclose(scyan.get_log_density(), per_marker[np.arange(len(u)), best], rtol=1e-3, atol=1e-3)


def test_everything_is_written_with_its_record(scyan, scyan_data, tmp_path):
    """Protects results in the AnnData: columns, frames, NaN for other rows, provenance with the table, h5ad and back."""
    import anndata as ad

    rows = np.arange(0, 500, 2)
    returned = scyan.predict(scyan_data, indices=rows, key_added="scyan_population", log_density_threshold=-20)
    probabilities = scyan.predict_proba(scyan_data, key_added="scyan_proba")
    latent = scyan.get_latent_representation(scyan_data, key_added="X_scyan")
    groups = scyan.predict_proba(scyan_data, key_added="lineages", level="lineage")
    density = scyan.get_log_density(scyan_data, key_added="density")
    corrected = scyan.correct_batch(scyan_data, key_added="scyan_corrected", reference="b0")
    scyan_data.write_h5ad(tmp_path / "a.h5ad")
    for adata in (scyan_data, ad.read_h5ad(tmp_path / "a.h5ad")):
        column = adata.obs["scyan_population"]
        assert column.iloc[rows].tolist() == returned.tolist()
        assert column.iloc[1::2].isna().all()
        assert list(column.cat.categories) == scyan.populations
        assert list(adata.obs["scyan_population_lineage"].cat.categories) == ["B", "T", "NK", "Mono"]
        assert list(adata.obs["scyan_population_origin"].cat.categories) == ["lymphoid", "myeloid"]
        np.testing.assert_allclose(adata.obs["scyan_population_log_density"].iloc[rows], density.iloc[rows], rtol=1e-4)
        entropy = -(probabilities * np.log(probabilities.clip(1e-30))).sum(axis=1)
        np.testing.assert_allclose(adata.obs["scyan_population_entropy"].iloc[rows], entropy.iloc[rows], atol=1e-4)
        assert adata.obs["scyan_population_entropy"].iloc[1::2].isna().all()
        np.testing.assert_allclose(adata.obs["density"], density, rtol=1e-6)
        pd.testing.assert_frame_equal(adata.obsm["scyan_proba"], probabilities)
        pd.testing.assert_frame_equal(adata.obsm["X_scyan"], latent)
        pd.testing.assert_frame_equal(adata.obsm["lineages"], groups)
        np.testing.assert_array_equal(adata.layers["scyan_corrected"][:, :6], corrected)
        assert np.isnan(adata.layers["scyan_corrected"][:, 6:]).all()
        record = adata.uns["cellweave"]["scyan_population"]
        assert record["model"] == "ScyanModel"
        assert record["parameters"]["log_density_threshold"] == -20
        assert MarkerTable.parse(json.loads(record["parameters"]["table"])) == scyan.table
        assert adata.uns["cellweave"]["scyan_corrected"]["parameters"]["reference"] == "b0"


def test_taken_keys_are_refused_before_anything_is_written(scyan, scyan_data):
    """Protects the user's columns: one of the many keys of `predict` is taken, so none is written."""
    scyan_data.obs["mine_lineage"] = 1
    before = list(scyan_data.obs)
    with pytest.raises(ValueError, match=r"`adata.obs\['mine_lineage'\]` already exists.*; choose another"):
        scyan.predict(scyan_data, key_added="mine")
    assert list(scyan_data.obs) == before
    scyan.predict(scyan_data, key_added="mine", overwrite=True)
    scyan.predict(scyan_data, key_added="mine")  # our own is replaced
    assert isinstance(scyan_data.obs["mine_lineage"].dtype, pd.CategoricalDtype)


def test_sparse_equals_dense(make_markers, fit_scyan):
    """Protects sparse matrices: the same weights and results as dense ones."""
    results = []
    for convert in (np.asarray, sp.csr_matrix, sp.csc_matrix, np.float64):
        adata = make_markers(200)
        adata.X = convert(adata.X)
        model = fit_scyan(adata)
        assert model.correct_batch(reference="average").shape == (200, 6)
        results.append(model.predict_proba().to_numpy())
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


def test_layers_are_read(make_markers, fit_scyan):
    """Protects `layer`: the model reads the layer and not `X`, in its own data and in queries."""
    plain, layered = make_markers(200), make_markers(200)
    layered.layers["scaled"], layered.X = layered.X.copy(), layered.X * 0 + 5000
    first, second = fit_scyan(plain), fit_scyan(layered, setup={"layer": "scaled"})
    pd.testing.assert_frame_equal(first.predict_proba(), second.predict_proba())
    query = layered[:, ::-1].copy()
    pd.testing.assert_frame_equal(second.predict_proba(query), first.predict_proba())


def test_model_can_be_copied(scyan):
    """Protects notebooks and worker processes: a deep copy and a pickle give the same labels."""
    for other in (copy.deepcopy(scyan), pickle.loads(pickle.dumps(scyan))):
        pd.testing.assert_series_equal(other.predict(), scyan.predict())
