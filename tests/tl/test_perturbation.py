"""Scores of predicted perturbations on screens whose truth is known."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from hypothesis import given, settings
from hypothesis import strategies as st
from perturbation_data import KEY, Panel, cells

import cellweave as cw
from cellweave.stats import SHIFT_PREDICTORS, ShiftTable


def evaluate(pred, true, train=None, **options) -> pd.DataFrame:
    """The scores; warnings about predictions without source cells are not the matter here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The prediction .* does not name")
        return cw.tl.evaluate_perturbation(pred, true, train=train, perturbation_key=KEY, **options)


def means(table: pd.DataFrame) -> pd.DataFrame:
    """Mean score of every method."""
    return table.pivot_table(index="method", columns="metric", values="value")


@pytest.fixture(scope="module")
def panel() -> Panel:
    return Panel()


@pytest.fixture(scope="module")
def behaviour(panel: Panel) -> pd.DataFrame:
    """Scores of predictions whose quality is known."""
    rng = np.random.default_rng(1)
    strong = {name: 3 * effect for name, effect in panel.effect.items()}
    random = {name: rng.permutation(strong[name]) for name in panel.names}
    average = np.mean(list(panel.effect.values()), axis=0)
    predictions = {
        "controls": panel.resampled(),
        "panel mean": panel.of("pred", dict.fromkeys(panel.names, average)),
        "truth again": panel.of("pred", panel.effect),
        "too strong": panel.of("pred", strong),
        "random": panel.of("pred", random),
    }
    return means(evaluate(predictions, panel.true, panel.seen(), baselines=["no_change", "perturbed_mean", "observed"]))


def test_the_truth_again_is_best_in_everything(behaviour):
    """Protects the sense of the scores: new cells of the true distribution beat all that know less."""
    least = ["mse", "mae", "mse_top20", "energy_distance", "mmd"]
    most = ["pearson_delta", "pearson_delta_top20", "de_overlap_top20"]
    others = behaviour.drop(index=["truth again", "replicate", "observed"])
    assert (behaviour.loc["truth again", least] < others[least].min()).all()
    assert (behaviour.loc["truth again", most] > others[most].max()).all()
    assert behaviour.loc["truth again", "discrimination_l1"] == 1
    assert behaviour.loc["truth again", "variance_ratio"] == pytest.approx(1, abs=0.1)
    assert behaviour.loc["truth again", "zero_fraction_ratio"] == pytest.approx(1, abs=0.05)


def test_discrimination_cannot_see_the_size_of_effects(behaviour):
    """Protects readers of a single score: an effect three times too strong is found, but its errors are large."""
    score = behaviour["discrimination_l1"]
    assert score["too strong"] > 0.9
    assert behaviour.loc["too strong", "mse"] > behaviour.loc["controls", "mse"] > behaviour.loc["truth again", "mse"]
    assert behaviour.loc["too strong", "energy_distance"] > behaviour.loc["truth again", "energy_distance"]


def test_knowing_nothing_is_chance(behaviour):
    """Protects the zero of the scores: no change and random effects discriminate and correlate by chance."""
    for method in ("controls", "panel mean", "random", "no_change"):
        assert behaviour.loc[method, "discrimination_l1"] == pytest.approx(0.5, abs=0.2), method
    assert abs(behaviour.loc["random", "pearson_delta"]) < 0.2
    assert (
        behaviour.loc["no_change", ["pearson_delta", "pearson_delta_top20", "de_overlap_top20", "n_de_pred"]]
        .eq(0)
        .all()
    )
    assert behaviour.loc["controls", "n_de_pred"] < 1 < behaviour.loc["truth again", "n_de_pred"]


def test_baselines_and_replicate_stand_beside(behaviour):
    """Protects honest tables: the ceiling is near the truth, and unbiased distances are near 0 there."""
    assert behaviour.loc["replicate", "pearson_delta"] > behaviour.loc["perturbed_mean", "pearson_delta"]
    assert abs(behaviour.loc["replicate", "energy_distance"]) < 0.1 * behaviour.loc["no_change", "energy_distance"]
    assert behaviour.loc["observed", "mse"] < behaviour.loc["perturbed_mean", "mse"]
    assert behaviour.loc["replicate", "null"] == 0


@pytest.fixture(scope="module")
def null() -> Panel:
    """A screen in which no perturbation does anything; few control cells."""
    return Panel(n_perturbations=10, effect=0.0, n_cells=40, n_control=40, seed=3)


def test_shared_control_cells_invent_a_correlation(null):
    """Protects the split of control cells: without an effect the correlation is about 0, and the shared one is not.

    Of three methods: the mean of the training perturbations, independent cells of the null, and the replicate.
    """
    pred = {"new cells": null.of("pred", null.effect)}
    options = {"baselines": ["perturbed_mean"], "metrics": ["pearson_delta"], "n_splits": 20}
    honest, usual = (
        means(evaluate(pred, null.true, null.seen(), split_control=split, **options))["pearson_delta"]
        for split in (True, False)
    )
    assert honest.abs().max() < 0.12
    assert usual.min() > 0.3


def test_top_genes_do_not_bring_the_noise_back(null):
    """Protects the choice of genes: choosing by all control cells would let the shared noise in again."""
    options = {"baselines": ["perturbed_mean"], "metrics": ["pearson_delta_top20"], "n_splits": 20}
    table = means(evaluate(None, null.true, null.seen(), **options))["pearson_delta_top20"]
    assert table.abs().max() < 0.2


def test_source_cells_keep_the_halves_apart(null):
    """Protects predictions made from control cells: their own noise does not count as an effect, and a shift is found."""
    shift = {name: np.random.default_rng(i).normal(size=null.n_genes) for i, name in enumerate(null.names)}
    made = null.resampled()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        table = cw.tl.evaluate_perturbation(
            {"same": made, "moved": null.resampled(shift)}, null.true, train=null.seen(), perturbation_key=KEY,
            metrics=["pearson_delta", "n_de_pred"], baselines=None,
        )  # fmt: skip
    scores = means(table)
    assert scores.loc["same", "pearson_delta"] == 0  # every cell is its source: no shift at all
    assert abs(scores.loc["moved", "pearson_delta"]) < 0.1
    assert scores.loc["moved", "n_de_pred"] > 10


def test_null_perturbations_are_flagged(null, panel):
    """Protects against claimed effects: nothing to find is said, and what a prediction claims stands beside it."""
    pred = {"effects": null.of("pred", panel.effect | {name: panel.effect[name] for name in null.names})}
    table = evaluate(pred, null.true, null.seen(), metrics=["null", "n_de_true", "n_de_pred", "energy_p_true"])
    scores = means(table)
    assert scores.loc["effects", "null"] >= 0.7
    assert scores.loc["effects", "n_de_true"] < 0.5
    assert scores.loc["effects", "n_de_pred"] > 5 > scores.loc["perturbed_mean", "n_de_pred"]


def test_result_does_not_depend_on_the_order_of_cells(panel):
    """Protects repeatability: the same cells in any order, and genes in another order, give the same numbers."""
    rng = np.random.default_rng(0)
    pred, seen = panel.resampled(), panel.seen()
    first = evaluate(pred, panel.true, seen, max_cells=30, n_splits=2)
    shuffled = [adata[rng.permutation(adata.n_obs)].copy() for adata in (pred, panel.true, seen)]
    second = evaluate(*shuffled, max_cells=30, n_splits=2)
    pd.testing.assert_frame_equal(first, second)
    genes = rng.permutation(seen.n_vars)
    third = evaluate(pred[:, genes].copy(), panel.true, seen, max_cells=30, n_splits=2)
    pd.testing.assert_frame_equal(first, third)


def test_data_and_random_state_stay_as_they_were(panel):
    """Protects the user's objects: nothing is written into them, and the global generator is not used."""
    pred, true, seen = panel.resampled(), panel.true.copy(), panel.seen()
    before = [adata.copy() for adata in (pred, true, seen)]
    state = np.random.get_state()[1].copy()
    evaluate(pred, true, seen, n_splits=1)
    np.testing.assert_array_equal(np.random.get_state()[1], state)
    for adata, copy in zip((pred, true, seen), before, strict=True):
        assert (adata.X != copy.X).nnz == 0
        pd.testing.assert_frame_equal(adata.obs, copy.obs)
        assert list(adata.uns) == list(copy.uns) and list(adata.layers) == list(copy.layers)


def test_dense_sparse_and_layer_agree(panel):
    """Protects all storages: dense, CSR, CSC and a layer hold the same numbers."""
    seen, true, pred = panel.seen(), panel.true, panel.resampled()
    options = {"n_splits": 1, "baselines": ["perturbed_mean"]}
    first = evaluate(pred, true, seen, **options)

    def changed(adata: AnnData, change) -> AnnData:
        copy = adata.copy()
        copy.X = change(copy.X)
        return copy

    for change in (lambda x: x.toarray(), lambda x: x.tocsc(), lambda x: x.astype(np.float64)):
        other = evaluate(*(changed(adata, change) for adata in (pred, true, seen)), **options)
        np.testing.assert_allclose(other["value"], first["value"], rtol=1e-6, atol=1e-9)
    layered = [changed(adata, lambda x: x * 3) for adata in (true, seen)]
    for adata, source in zip(layered, (true, seen), strict=True):
        adata.layers["log"] = source.X
    pd.testing.assert_frame_equal(evaluate(pred, *layered, layer="log", **options), first)


def contexts_panel() -> tuple[AnnData, AnnData, AnnData]:
    """Two lines whose control cells differ; training cells, measured cells and a prediction of the second line."""
    rng = np.random.default_rng(0)
    lines = {"u": rng.gamma(1.0, 1.0, size=40), "v": rng.gamma(1.0, 1.0, size=40)}
    effect = np.where(np.arange(40) < 8, 1.5, 0.0)

    def draw(line: str, effect: np.ndarray | float, n: int = 40) -> np.ndarray:
        return np.log1p(rng.poisson(lines[line] * np.exp(effect), size=(n, 40)) * 1.3).astype(np.float32)

    blocks = [("u", "control", 0), ("v", "control", 0), ("u", "A", effect), ("u", "B", -effect)]
    x = np.concatenate([draw(line, shift) for line, _, shift in blocks])
    labels, line = (np.repeat([block[i] for block in blocks], 40) for i in (1, 0))
    train = cells(x, labels, "train", line=line, donor=np.tile(["d1", "d2"], 80))
    true = cells(draw("v", effect), ["A"] * 40, "true", line="v", donor="d1")
    pred = cells(draw("v", effect), ["A"] * 40, "pred", line="v", donor="d1")
    return train, true, pred


def test_contexts_are_compared_with_their_own_control_cells():
    """Protects pairing: the control mean of the wrong line would look like an effect."""
    train, true, pred = contexts_panel()
    paired = evaluate(pred, true, train, pairing_keys="line", n_splits=2)
    mixed = evaluate(pred, true, train, n_splits=2)
    assert set(paired["context"]) == {"v"} and set(mixed["context"]) == {""}
    no_change = [means(table).loc["no_change", "mse"] for table in (paired, mixed)]
    assert no_change[0] < no_change[1]
    scores = means(paired)
    assert scores.loc["context_mean", "mse"] < scores.loc["no_change", "mse"]
    assert scores.loc["context_mean", "pearson_delta"] > 0.7
    # the other line has both perturbations, which cancel
    assert scores.loc["perturbed_mean", "mse"] > scores.loc["context_mean", "mse"]


def test_shift_keys_pool_over_finer_contexts():
    """Protects coarser shifts: contexts are line and donor, shifts are those of the line."""
    train, true, pred = contexts_panel()
    keys = ["line", "donor"]
    table = evaluate(pred, true, train, pairing_keys=keys, shift_keys="line", min_cells=10, n_splits=2)
    assert set(table["context"]) == {"v | d1"}
    found = means(table).loc["context_mean", "mse"]
    conditions = [() if label == "control" else (label,) for label in train.obs[KEY]]
    shifts = ShiftTable.from_cells(train.X, conditions, train.obs["line"].tolist(), list(train.var_names))
    control = train[
        ((train.obs[KEY] == "control") & (train.obs["line"] == "v") & (train.obs["donor"] == "d1")).to_numpy()
    ]
    predicted = np.asarray(control.X.mean(axis=0)).ravel() + SHIFT_PREDICTORS["context_mean"](shifts, "v", ("A",))
    assert found == pytest.approx(np.square(predicted - np.asarray(true.X.mean(axis=0)).ravel()).mean(), rel=1e-5)


def test_without_training_cells_only_no_change_is_there(panel):
    """Protects the default: control cells come from the measured data, and nothing is known about perturbations."""
    both = cells(
        np.concatenate([panel.control.X.toarray(), panel.true.X.toarray()]),
        [*["control"] * panel.control.n_obs, *panel.true.obs[KEY].astype(str)],
        "cell",
    )
    table = evaluate(panel.of("pred", panel.effect), both, n_splits=1)
    assert set(table["method"]) == {"prediction", "no_change", "replicate"}
    assert list(table) == ["perturbation", "context", "method", "metric", "value", "n_true"]
    assert not table.duplicated(["perturbation", "context", "method", "metric"]).any()
    assert (table["n_true"] == panel.n_cells).all()


labels = st.lists(st.sampled_from("ABCDE"), min_size=1, max_size=3, unique=True)


@settings(max_examples=10)
@given(labels, st.permutations(range(3)), st.sampled_from(["+", "_", " & "]), st.booleans())
def test_spelling_of_combinations_does_not_matter(parts, order, sep, with_nothing):
    """Protects names: the order of the parts, and parts that mean nothing, change neither scores nor the label."""
    rng = np.random.default_rng(0)
    spelled = [parts[i] for i in order if i < len(parts)] + (["ctrl"] if with_nothing else [])
    x = np.log1p(rng.poisson(2.0, size=(60, 6)) * 1.1)
    control, true, pred = np.split(x, 3)
    train = cells(control, ["none"] * 20, "c")
    plain = cells(true, [sep.join(parts)] * 20, "t"), cells(pred, [sep.join(sorted(parts))] * 20, "p")
    other = cells(pred, [sep.join(spelled)] * 20, "p")
    options = {"train": train, "sep": sep, "control_key": "none", "n_splits": 1}
    first, second = (evaluate(prediction, plain[0], **options) for prediction in (plain[1], other))
    pd.testing.assert_frame_equal(first, second)
    assert set(first["perturbation"]) == {sep.join(sorted(parts))}


@pytest.mark.parametrize(
    "metrics", [["mse"], ["pearson_delta_top7", "mmd"], ["null"], ["n_de_pred", "discrimination_l1"]]
)
def test_chosen_metrics_are_those_of_the_full_table(panel, metrics):
    """Protects partial tables: fewer metrics are computed, and they have the same values."""
    pred, seen = panel.resampled(), panel.seen()
    options = {"n_top_genes": 7, "n_splits": 2, "baselines": ["perturbed_mean"]}
    full = evaluate(pred, panel.true, seen, **options)
    some = evaluate(pred, panel.true, seen, metrics=metrics, **options)
    assert set(some["metric"]) == set(metrics)
    expected = full[full["metric"].isin(metrics)].reset_index(drop=True)
    pd.testing.assert_frame_equal(some, expected)
