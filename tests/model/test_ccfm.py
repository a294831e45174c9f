"""CascadedFlowModel: what `predict_perturbation`, `generate` and the getters promise."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from cellweave.data import PCAFeatures, UnseenPerturbationError
from cellweave.model import CascadedFlowModel

sys.path.append(str(Path(__file__).parent))
from ccfm_data import GENES, HELD_OUT, N_GENES, QUICK, SINGLES, create, dense, fit, simulate_screen

CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(scope="module")
def adata():
    """The screen that the shared model was trained on. Never change it."""
    return simulate_screen()


@pytest.fixture(scope="module")
def model(adata):
    """A model without features. Never change it."""
    return fit(adata)


@pytest.fixture(scope="module")
def cascade():
    """A model with features, doses and a covariate. Never change it."""
    adata = simulate_screen()
    adata.obs["dose"] = np.where(adata.obs["perturbation"] == "drug", np.where(adata.obs["day"] == "d1", 1.0, 4.0), 1.0)
    setup = {"dosage_key": "dose", "categorical_covariate_keys": ["day"]}
    return fit(adata, setup, encoder=PCAFeatures(3))


def _x(pred, label=None) -> np.ndarray:
    return np.asarray(pred.X if label is None else pred[pred.obs["perturbation"] == label].X)


# ---------------------------------------------------------------- what a prediction is made of


def test_prediction_is_annotated(model, adata):
    """Protects the output: condition, control cell, its annotation, its genes, and what produced the cells."""
    pred = model.predict_perturbation([HELD_OUT, "drug"], n_cells=7, seed=3)
    assert pred.shape == (14, N_GENES)
    assert pred.X.dtype == np.float32
    assert (pred.X >= 0).all()
    assert pred.obs["perturbation"].tolist() == [HELD_OUT] * 7 + ["drug"] * 7
    assert pred.obs_names.is_unique
    assert pred.var_names.tolist() == GENES
    source = adata.obs.loc[pred.obs["source_cell"]]
    assert (source["perturbation"] == "control").all()
    for column in ("line", "day"):
        assert source[column].tolist() == pred.obs[column].tolist()
    assert not [column for column in pred.obs if column.startswith("_scvi")]
    assert pred.uns["ccfm"]["model"] == "CascadedFlowModel"
    assert pred.uns["ccfm"]["parameters"]["seed"] == 3
    # the same control cells stand behind every condition
    assert pred.obs["source_cell"].tolist()[:7] == pred.obs["source_cell"].tolist()[7:]


def test_prediction_can_be_written(model, tmp_path):
    """Protects files: a prediction survives h5ad."""
    pred = model.predict_perturbation(["drug"], n_cells=3, include_control=True)
    pred.write_h5ad(tmp_path / "p.h5ad")
    np.testing.assert_array_equal(ad.read_h5ad(tmp_path / "p.h5ad").X, pred.X)


@pytest.mark.parametrize("n_cells", [5, 160, 200, None])
def test_number_of_cells(model, n_cells):
    """Protects the choice of control cells: each once as long as there are enough, all with None."""
    pred = model.predict_perturbation("drug", n_cells=n_cells, n_steps=1)
    assert pred.n_obs == (160 if n_cells is None else n_cells)
    times = pred.obs["source_cell"].value_counts()
    assert times.max() == (2 if n_cells == 200 else 1)


def test_control_cells_are_added(model, adata):
    """Protects evaluation: with `include_control` the control cells come along, as they were measured."""
    pred = model.predict_perturbation(["drug", "g00"], n_cells=6, include_control=True)
    assert pred.obs["perturbation"].tolist() == ["drug"] * 6 + ["g00"] * 6 + ["control"] * 6
    control = pred[pred.obs["perturbation"] == "control"]
    np.testing.assert_array_equal(control.X, dense(adata[control.obs["source_cell"]]))


def test_covariates_choose_control_cells(model):
    """Protects predictions for one context: all control cells have the value that was asked for."""
    pred = model.predict_perturbation("drug", n_cells=9, covariates={"line": "RPE1", "day": ["d2"]})
    assert set(pred.obs["line"]) == {"RPE1"}
    assert set(pred.obs["day"]) == {"d2"}
    both = model.predict_perturbation("drug", n_cells=60, covariates={"line": ["RPE1", "K562"]}, n_steps=1)
    assert set(both.obs["line"]) == {"RPE1", "K562"}


def test_indices_choose_control_cells(model, adata):
    """Protects `indices`: only control cells among these rows are used."""
    rows = np.arange(0, adata.n_obs, 2)
    pred = model.predict_perturbation("drug", n_cells=None, indices=rows, n_steps=1)
    control = adata.obs_names[rows][(adata.obs["perturbation"] == "control").to_numpy()[rows]]
    assert pred.obs["source_cell"].tolist() == control.tolist()


def test_selected_genes(model, adata):
    """Protects `genes`: they come in the order that was asked for, with their own columns."""
    genes = ["g07", "g02", "g20"]
    pred = model.predict_perturbation("drug", n_cells=5, genes=genes, include_control=True)
    assert pred.var_names.tolist() == genes
    control = pred[pred.obs["perturbation"] == "control"]
    np.testing.assert_array_equal(control.X, dense(adata[control.obs["source_cell"], genes]))


def test_conditions_differ(model):
    """Protects from a model that ignores the perturbation, and control stays near control."""
    pred = model.predict_perturbation(["g00", "g01", "control"], n_cells=40, include_control=False)
    assert np.abs(_x(pred, "g00").mean(0) - _x(pred, "g01").mean(0)).max() > 0.3


def test_unseen_perturbations(model):
    """Protects questions that cannot be answered: an error that names it, or the average on request."""
    with pytest.raises(UnseenPerturbationError, match=r"1 perturbation\(s\) .*\('aspirin'\).*`unseen='average'`"):
        model.predict_perturbation(["drug", "aspirin+g00"])
    pred = model.predict_perturbation(["aspirin"], n_cells=4, unseen="average")
    assert np.isfinite(pred.X).all()
    # a gene that was never perturbed has a token
    assert np.isfinite(model.predict_perturbation("g29", n_cells=4).X).all()


def test_dosages_change_the_prediction(cascade):
    """Protects doses: the usual one is the default, another one gives other cells and is written down."""
    usual, same, strong = (
        cascade.predict_perturbation("drug", n_cells=6, dosages=dose)
        for dose in (None, {"drug": cascade._facts["doses"]["drug"]}, {"drug": 40.0})
    )
    np.testing.assert_array_equal(usual.X, same.X)
    assert np.abs(usual.X - strong.X).max() > 1e-4
    assert set(strong.obs["dose"]) == {"40"}


def test_generated_features(cascade, model):
    """Protects `return_latent`: one row of features per cell, NaN for control cells, refused without an encoder."""
    pred = cascade.predict_perturbation(["drug", "g00"], n_cells=4, return_latent=True, include_control=True)
    latent = pred.obsm["X_ccfm_latent"]
    assert latent.shape == (12, 3)
    assert np.isfinite(latent[:8]).all()
    assert np.isnan(latent[8:]).all()
    assert np.abs(latent[:4] - latent[4:8]).max() > 0
    with pytest.raises(ValueError, match="`return_latent=True` needs a model with an encoder"):
        model.predict_perturbation("drug", n_cells=2, return_latent=True)


# ---------------------------------------------------------------- independence and repeatability


@pytest.mark.parametrize("which", ["model", "cascade"])
def test_samples_depend_neither_on_batch_size_nor_on_company(which, request):
    """Protects samples from memory settings and from what else is asked: the same cells, in any order of conditions."""
    model = request.getfixturevalue(which)
    whole = model.predict_perturbation([HELD_OUT, "drug", "g00"], n_cells=11)
    for batch_size in (1, 4, 100):
        again = model.predict_perturbation(["g00", HELD_OUT], n_cells=11, batch_size=batch_size)
        for label in ("g00", HELD_OUT):
            np.testing.assert_allclose(_x(again, label), _x(whole, label), **CLOSE)
    # more cells only add cells
    more = model.predict_perturbation("drug", n_cells=30)
    np.testing.assert_allclose(_x(more)[:11], _x(whole, "drug"), **CLOSE)


@pytest.mark.parametrize("which", ["model", "cascade"])
def test_order_of_a_combination(which, request):
    """Protects one answer per condition: B+A is A+B, bit for bit, and control inside a combination is nothing."""
    model = request.getfixturevalue(which)
    first = model.predict_perturbation("g01+g02", n_cells=6)
    for label in ("g02+g01", "g01+control+g02", "ctrl+g02+g01"):
        again = model.predict_perturbation(label, n_cells=6)
        np.testing.assert_array_equal(again.X, first.X)
        assert set(again.obs["perturbation"]) == {"g01+g02"}


def test_repeatable_with_a_seed():
    """Protects repeatability: training and prediction are equal bit for bit with a seed, another one differs."""
    models = [fit(simulate_screen(20), seed=seed) for seed in (0, 0, 1)]
    x = [m.predict_perturbation("drug", n_cells=5).X for m in models]
    np.testing.assert_array_equal(x[0], x[1])
    assert np.abs(x[0] - x[2]).max() > 1e-4
    assert np.abs(x[0] - models[0].predict_perturbation("drug", n_cells=5, seed=1).X).max() > 1e-3
    pd.testing.assert_frame_equal(models[0].history["train_loss"], models[1].history["train_loss"])


def test_training_does_not_touch_the_random_state(adata):
    """Protects the user's own draws through model, training and prediction."""
    np.random.seed(5), torch.manual_seed(5)
    expected = np.random.get_state()[1].copy(), torch.get_rng_state().clone()
    fitted = create(simulate_screen(10), seed=0)
    np.random.seed(5), torch.manual_seed(5)
    fitted.train(**{**QUICK, "max_steps": 2, "calibrate": True})
    fitted.predict_perturbation("drug", n_cells=2)
    np.testing.assert_array_equal(np.random.get_state()[1], expected[0])
    assert torch.equal(torch.get_rng_state(), expected[1])


@pytest.mark.parametrize("which", ["model", "cascade"])
def test_order_of_the_genes_of_a_query(which, request):
    """Protects gene identity: control cells with shuffled genes give the same predictions, gene by gene."""
    model = request.getfixturevalue(which)
    adata = model.adata
    control = adata[adata.obs["perturbation"] == "control"].copy()
    shuffled = control[:, np.random.default_rng(0).permutation(N_GENES)].copy()
    first = model.predict_perturbation("drug", control, n_cells=6)
    again = model.predict_perturbation("drug", shuffled, n_cells=6)
    np.testing.assert_allclose(again[:, first.var_names].X, first.X, **CLOSE)
    first = model.generate(control, "drug", indices=[0, 4])
    again = model.generate(shuffled, "drug", indices=[0, 4])
    np.testing.assert_allclose(again, first, **CLOSE)


def test_order_of_the_genes_of_the_training_data():
    """Protects equivariance: the same weights on data with shuffled genes give shuffled predictions.

    What is drawn for a gene belongs to its position, so nothing is drawn: the flow starts at the control cells themselves.
    """
    plain = simulate_screen(20)
    order = np.random.default_rng(0).permutation(N_GENES)
    shuffled = plain[:, order].copy()
    first, second = (create(a, anchor=None) for a in (plain, shuffled))
    second.module.load_state_dict({**second.module.state_dict(), **_network(first)})
    first.is_trained_ = second.is_trained_ = True
    with torch.no_grad():  # the velocity is zero before training
        for parameters in zip(first.module.parameters(), second.module.parameters(), strict=True):
            noise = torch.randn(parameters[0].shape, generator=torch.Generator().manual_seed(0)) * 0.1
            for parameter in parameters:
                parameter.add_(noise)
    x = [m.predict_perturbation("g01", n_cells=6) for m in (first, second)]
    assert x[0].obs["source_cell"].tolist() == x[1].obs["source_cell"].tolist()
    assert np.abs(x[0].X - dense(plain[x[0].obs["source_cell"]])).max() > 0.05
    np.testing.assert_allclose(x[1][:, GENES].X, x[0].X, rtol=1e-4, atol=1e-5)


def _network(model) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.module.state_dict().items() if not name.startswith("anchors.")}


@pytest.mark.parametrize("which", ["model", "cascade"])
def test_midpoint_converges_to_rk4(which, request):
    """Protects the solvers: the error of the midpoint rule falls fast with the number of steps."""
    model = request.getfixturevalue(which)
    fine = model.predict_perturbation(HELD_OUT, n_cells=8, solver="rk4", n_steps=40).X
    errors = [
        np.abs(model.predict_perturbation(HELD_OUT, n_cells=8, n_steps=n, solver="midpoint").X - fine).max()
        for n in (2, 8, 32)
    ]
    assert errors[2] < 1e-3
    assert errors[2] <= errors[1] / 4 + 1e-5
    assert errors[1] <= errors[0]


def test_weights_do_not_move_with_predictions(cascade):
    """Protects models: nothing that reads a model changes it, and it stays in evaluation mode."""
    before = {name: value.clone() for name, value in cascade.module.state_dict().items()}
    cascade.predict_perturbation("drug", n_cells=3)
    cascade.get_latent_representation(indices=[0, 1])
    cascade.get_perturbation_effect("g00", indices=[0, 1])
    assert not cascade.module.training
    assert all(torch.equal(value, before[name]) for name, value in cascade.module.state_dict().items())


# ---------------------------------------------------------------- data at prediction


def test_data_without_labels_are_control_cells(model, adata):
    """Protects new samples of untreated cells: no column of perturbations is needed."""
    control = adata[adata.obs["perturbation"] == "control"].copy()
    plain = control.copy()
    del plain.obs["perturbation"]
    first = model.predict_perturbation("drug", control, n_cells=6)
    again = model.predict_perturbation("drug", plain, n_cells=6)
    np.testing.assert_array_equal(again.X, first.X)
    assert set(again.obs["perturbation"]) == {"drug"}


def test_control_cells_only_with_labels(model, adata, tmp_path):
    """Protects new samples of untreated cells, given to a saved model with their label."""
    control = adata[adata.obs["perturbation"] == "control"].copy()
    model.save(tmp_path / "m")
    loaded = CascadedFlowModel.load(tmp_path / "m", control, accelerator="cpu")
    np.testing.assert_array_equal(
        loaded.predict_perturbation("drug", n_cells=5).X, model.predict_perturbation("drug", control, n_cells=5).X
    )


def test_other_genes(model, adata):
    """Protects panels: extra genes change nothing, missing ones count as zero and are announced."""
    control = adata[adata.obs["perturbation"] == "control"].copy()
    extra = simulate_screen()[control.obs_names].copy()
    more = pd.DataFrame(index=[*GENES, "x1", "x2"])
    wide = ad.AnnData(sp.hstack([extra.X, sp.csr_matrix(np.ones((extra.n_obs, 2)))]).tocsr(), obs=extra.obs, var=more)
    first = model.predict_perturbation("drug", control, n_cells=5)
    again = model.predict_perturbation("drug", wide, n_cells=5)
    np.testing.assert_array_equal(again.X, first.X)
    assert again.var_names.tolist() == GENES
    zeroed = control.copy()
    zeroed.X = sp.csr_matrix(np.where(np.arange(N_GENES) < 25, dense(control), 0))
    with pytest.warns(UserWarning, match="25 of the 30 genes"):
        narrow = model.predict_perturbation("drug", control[:, :25].copy(), n_cells=5)
    np.testing.assert_array_equal(narrow.X, model.predict_perturbation("drug", zeroed, n_cells=5).X)


def test_new_contexts(model, adata):
    """Protects predictions for a line that was not in the screen: finite, and the same alone, in batches and beside others."""
    new = simulate_screen(20, seed=9, labels=())
    new.obs["line"] = new.obs["line"].replace("RPE1", "HepG2")
    whole = model.predict_perturbation("drug", new, n_cells=None)
    assert np.isfinite(whole.X).all()
    alone = model.predict_perturbation("drug", new, n_cells=None, batch_size=3, covariates={"line": "HepG2"})
    here = whole[whole.obs["line"] == "HepG2"]
    assert alone.obs["source_cell"].tolist() == here.obs["source_cell"].tolist()
    assert (np.abs(alone.X - dense(new[here.obs["source_cell"]])).mean()) > 0.05


def test_the_anchor_of_a_new_context_is_that_of_all_its_control_cells(model):
    """Protects cells of a new context from company: what is expected there is told by its control cells, not by the batch."""
    new = simulate_screen(6, seed=9, labels=("g00",))
    new.obs["line"] = "HepG2"
    for call in (
        lambda **o: model.get_perturbation_effect("drug", new, **o),
        lambda **o: model.get_latent_representation(new, kind="noise", **o),
        lambda **o: model.generate(new, "drug", **o),
    ):
        whole = call()
        np.testing.assert_allclose(call(batch_size=3), whole, **CLOSE)
        np.testing.assert_allclose(call(indices=[5, 2]), whole[[5, 2]], **CLOSE)


def test_storage_does_not_matter():
    """Protects results from how expression is stored: sparse, dense, a layer and doubles give the same model."""
    plain = simulate_screen(20)
    forms = {"sparse": plain, "dense": plain.copy(), "layer": plain.copy(), "double": plain.copy()}
    forms["dense"].X = dense(plain)
    forms["double"].X = dense(plain).astype(np.float64)
    forms["layer"].layers["log"] = plain.X.copy()
    forms["layer"].X = sp.csr_matrix(np.rint(dense(plain)))
    x = {
        name: fit(data, {"layer": "log"} if name == "layer" else None).predict_perturbation("drug", n_cells=4).X
        for name, data in forms.items()
    }
    for name in ("dense", "layer", "double"):
        np.testing.assert_allclose(x[name], x["sparse"], rtol=1e-5, atol=1e-5, err_msg=name)


# ---------------------------------------------------------------- generate


def test_generate_writes_a_layer(model, adata):
    """Protects `generate`: one row per cell, the layer has NaN for cells that were not asked for."""
    data = simulate_screen(5, seed=4)
    rows = [3, 1, 8]
    values = model.generate(data, "B+g00".replace("B", "g01"), key_added="moved", indices=rows)
    assert values.shape == (3, N_GENES)
    np.testing.assert_array_equal(data.layers["moved"][rows], values)
    assert np.isnan(np.delete(data.layers["moved"], rows, axis=0)).all()
    assert data.uns["cellweave"]["moved"]["parameters"]["perturbation"] == "g00+g01"
    np.testing.assert_allclose(model.generate(data, "g01+g00")[rows], values, **CLOSE)
    shuffled = data[:, ::-1].copy()
    model.generate(shuffled, "g00+g01", key_added="again", indices=rows)
    np.testing.assert_allclose(shuffled.layers["again"][rows][:, ::-1], values, **CLOSE)


def test_generate_from_the_models_own_data(model, adata):
    """Protects the default: without an AnnData the cells of the model are moved, and nothing is written."""
    layers = set(adata.layers)
    assert model.generate(perturbation="drug", indices=[0, 1]).shape == (2, N_GENES)
    assert set(adata.layers) == layers


# ---------------------------------------------------------------- embeddings and effects


def test_kinds_of_embeddings(cascade, model):
    """Protects `get_latent_representation`: shapes, order of `indices`, batch size, and what is not there."""
    sizes = {"backbone": 8, "noise": N_GENES, "features": 3}
    for kind, size in sizes.items():
        whole = cascade.get_latent_representation(kind=kind)
        assert whole.shape == (cascade.adata.n_obs, size)
        assert whole.dtype == np.float32
        assert np.isfinite(whole).all()
        some = cascade.get_latent_representation(kind=kind, indices=[7, 2, 7], batch_size=2)
        np.testing.assert_allclose(some, whole[[7, 2, 7]], rtol=1e-4, atol=1e-5)
        assert whole.std(0).max() > 0
    with pytest.raises(ValueError, match="no features"):
        model.get_latent_representation(kind="features")
    with pytest.raises(ValueError, match="`kind` must be one of backbone, noise, features"):
        model.get_latent_representation(kind="latent")


def test_embedding_does_not_see_the_label(model, adata):
    """Protects the backbone embedding from leaking the condition: renaming a perturbation does not move its cells."""
    data = simulate_screen()
    swapped = data.copy()
    swapped.obs["perturbation"] = data.obs["perturbation"].replace({"g00": "g01", "g01": "g00"})
    np.testing.assert_allclose(model.get_latent_representation(swapped), model.get_latent_representation(data), **CLOSE)


def test_embedding_is_written(model):
    """Protects `key_added`: rows that were not asked for are NaN."""
    data = simulate_screen(5)
    z = model.get_latent_representation(data, indices=[4, 1], key_added="X_flow")
    np.testing.assert_array_equal(data.obsm["X_flow"][[4, 1]], z)
    assert np.isnan(np.delete(data.obsm["X_flow"], [4, 1], axis=0)).all()
    assert data.uns["cellweave"]["X_flow"]["parameters"]["kind"] == "backbone"


def test_no_effect_under_the_own_condition(cascade, model):
    """Protects counterfactuals: moving a cell to the condition it is in does nothing."""
    for each in (model, cascade):
        rows = np.flatnonzero(each.adata.obs["perturbation"] == "drug")[:5]
        own = each.get_perturbation_effect("drug", indices=rows)
        np.testing.assert_allclose(own, 0, atol=1e-6)
        assert np.abs(each.get_perturbation_effect("g00", indices=rows)).max() > 0.1
        rows = np.flatnonzero(each.adata.obs["perturbation"] == "control")[:5]
        np.testing.assert_allclose(each.get_perturbation_effect("control", indices=rows), 0, atol=1e-6)


def test_a_dose_is_for_the_other_condition_only(cascade):
    """Protects counterfactuals with doses: a dose moves cells of the same drug, too, and says nothing of other cells."""
    control, drug = (np.flatnonzero(cascade.adata.obs["perturbation"] == name)[:4] for name in ("control", "drug"))
    usual, strong = (cascade.get_perturbation_effect("drug", indices=drug, dosages=d) for d in (None, {"drug": 50.0}))
    np.testing.assert_allclose(usual, 0, atol=1e-6)
    assert np.abs(strong).max() > 1e-4
    strong = cascade.get_perturbation_effect("drug", indices=control, dosages={"drug": 50.0})
    assert np.abs(strong - cascade.get_perturbation_effect("drug", indices=control)).max() > 1e-4


def test_effects_are_aligned_with_cells(model):
    """Protects the order of effects, in any selection and batch size, and the layer they are written to."""
    data = simulate_screen(5)
    whole = model.get_perturbation_effect("g00", data, key_added="effect")
    np.testing.assert_array_equal(data.layers["effect"], whole)
    some = model.get_perturbation_effect("g00", data, indices=[9, 3], batch_size=1)
    np.testing.assert_allclose(some, whole[[9, 3]], rtol=1e-4, atol=1e-5)


def test_vectors_of_perturbations(model):
    """Protects `get_perturbation_representation`: one row per condition, of which the order of parts does not matter."""
    vectors = model.get_perturbation_representation()
    assert vectors.index.tolist() == sorted(SINGLES)
    assert vectors.shape[1] == 8
    both = model.get_perturbation_representation(["g00+g01", "g01+g00"])
    np.testing.assert_array_equal(both.iloc[0], both.iloc[1])
    assert np.abs(vectors.loc["g00"] - vectors.loc["g01"]).max() > 0
    with pytest.raises(UnseenPerturbationError, match="aspirin"):
        model.get_perturbation_representation(["aspirin"])


def test_what_was_perturbed(model):
    """Protects users who ask what they can ask for."""
    assert model.perturbations == sorted(SINGLES)
    assert "CascadedFlowModel" in repr(model)


def test_no_warnings_from_a_whole_run():
    """Protects users from noise: setup, training and predictions of clean data warn of nothing of ours."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        each = fit(simulate_screen(20))
        each.predict_perturbation("drug", n_cells=3)
        each.get_latent_representation()
        each.get_perturbation_effect("drug", indices=[0])
    ours = [w for w in caught if "cellweave" in w.filename]
    assert ours == []
