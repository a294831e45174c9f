"""What CascadedFlowModel learns of a screen with known effects, and of representations of perturbations."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.spatial.distance import cdist

from cellweave.data import UnseenPerturbationError
from cellweave.model import CascadedFlowModel

sys.path.append(str(Path(__file__).parent))
from ccfm_data import HELD_OUT, NULL, SINGLES, dense, fit, mean_of, simulate_screen

# ---------------------------------------------------------------- representations of perturbations


def test_represented_perturbations_can_be_predicted():
    """Protects `perturbation_reps`: what has a row is predicted without having been seen, and the row decides how."""
    rng = np.random.default_rng(0)
    rows = {name: rng.normal(size=5) for name in SINGLES}
    rows |= {"twin": rows["drug"] + 1e-3, "other": rng.normal(size=5)}
    reps = pd.DataFrame(rows).T
    model = fit(simulate_screen(20), perturbation_reps=reps, anchor=None, training={"max_steps": 150, "lr": 0.01})
    assert np.isfinite(model.predict_perturbation(["twin", "other+g00"], n_cells=3).X).all()
    vectors = model.get_perturbation_representation(["twin", "other"])
    assert np.abs(vectors.loc["twin"] - vectors.loc["other"]).max() > 1e-3
    with pytest.raises(UnseenPerturbationError, match="aspirin"):
        model.predict_perturbation("aspirin")


def test_representations_are_saved(tmp_path):
    """Protects saved models: what was known of unseen perturbations is in the files."""
    reps = pd.DataFrame(np.random.default_rng(0).normal(size=(3, 4)), index=["drug", "new", "g00"])
    model = fit(simulate_screen(10), perturbation_reps=reps, training={"max_steps": 3})
    model.save(tmp_path / "m")
    loaded = CascadedFlowModel.load(tmp_path / "m", simulate_screen(10), accelerator="cpu")
    np.testing.assert_array_equal(
        loaded.predict_perturbation("new", n_cells=3).X, model.predict_perturbation("new", n_cells=3).X
    )


# ---------------------------------------------------------------- what is learned


@pytest.fixture(scope="module")
def learned():
    """A model trained long enough to learn the screen. Never change it."""
    return fit(simulate_screen(100), training={"max_steps": 200, "batch_size": 32, "lr": 3e-3, "calibrate": True})


@pytest.fixture(scope="module")
def truth():
    """New cells of conditions that the model saw, and of one that it did not."""
    return simulate_screen(80, seed=7, labels=(HELD_OUT, NULL, "g00", "drug"))


def _shift(adata, label, line=None) -> np.ndarray:
    return mean_of(adata, label, line) - mean_of(adata, "control", line)


def test_a_held_out_double_is_predicted(learned, truth):
    """Protects the point of the model: an unseen combination of seen perturbations moves as measured, in both lines."""
    pred = learned.predict_perturbation(HELD_OUT, n_cells=None, include_control=True)
    for line in ("K562", "RPE1"):
        found, expected = _shift(pred, HELD_OUT, line), _shift(truth, HELD_OUT, line)
        assert np.corrcoef(found, expected)[0, 1] > 0.8
        assert 0.5 < np.linalg.norm(found) / np.linalg.norm(expected) < 1.5
        cells = {
            name: dense(data[(data.obs["perturbation"] == label) & (data.obs["line"] == line)])
            for name, data, label in (
                ("found", pred, HELD_OUT),
                ("true", truth, HELD_OUT),
                ("control", truth, "control"),
            )
        }
        distance, nothing = (_energy(cells[name], cells["true"]) for name in ("found", "control"))
        assert distance < 0.5 * nothing


def _energy(first, second) -> float:
    """Energy distance of two samples."""
    return 2 * cdist(first, second).mean() - cdist(first, first).mean() - cdist(second, second).mean()


@pytest.mark.parametrize("label", ["g00", "drug"])
def test_a_seen_single_is_predicted(learned, truth, label):
    """Protects seen conditions: the predicted mean shift is the measured one, in direction and size."""
    pred = learned.predict_perturbation(label, n_cells=None, include_control=True)
    found, expected = _shift(pred, label), _shift(truth, label)
    assert np.corrcoef(found, expected)[0, 1] > 0.9
    assert 0.7 < np.linalg.norm(found) / np.linalg.norm(expected) < 1.3


def test_a_null_perturbation_does_nothing(learned, truth):
    """Protects users from claimed effects: what did nothing is predicted to do almost nothing."""
    pred = learned.predict_perturbation([NULL, "g00"], n_cells=None, include_control=True)
    assert np.linalg.norm(_shift(pred, NULL)) < 0.2 * np.linalg.norm(_shift(pred, "g00"))


def test_control_is_predicted_as_control(learned):
    """Protects the condition of nothing: control cells stay where they are on average."""
    pred = learned.predict_perturbation(["control", "g00"], n_cells=None)
    control = learned.adata[pred[: pred.n_obs // 2].obs["source_cell"]]
    moved = np.abs(np.asarray(pred[: pred.n_obs // 2].X).mean(0) - dense(control).mean(0))
    assert moved.max() < 0.2


def test_effects_have_the_sign_of_the_measured_ones(learned, truth):
    """Protects `get_perturbation_effect`: on single control cells, genes rise and fall as measured."""
    rows = np.flatnonzero((learned.adata.obs["perturbation"] == "control").to_numpy())[:60]
    effect = learned.get_perturbation_effect("g00", indices=rows).mean(0)
    expected = _shift(truth, "g00")
    strong = np.abs(expected) > 0.5
    assert strong.sum() >= 5
    assert (np.sign(effect[strong]) == np.sign(expected[strong])).all()


def test_guidance_makes_effects_larger():
    """Protects `guidance_scale`: above 1 conditions move further from each other than the model learned."""
    model = fit(simulate_screen(40), anchor=None, training={"max_steps": 200, "batch_size": 32, "lr": 0.01})
    gaps = []
    for scale in (1.0, 3.0):
        pred = model.predict_perturbation(["g00", "g01"], n_cells=40, guidance_scale=scale)
        gaps.append(np.linalg.norm(mean_of(pred, "g00") - mean_of(pred, "g01")))
    assert gaps[1] > 1.2 * gaps[0]
    bare = fit(simulate_screen(10), condition_dropout=0.0, training={"max_steps": 1})
    with pytest.raises(ValueError, match="`condition_dropout` above 0"):
        bare.predict_perturbation("g00", guidance_scale=2.0)


def test_trust_is_a_share(learned):
    """Protects calibration: both shares lie in [0, 1], and a model without calibration follows its flow all the way."""
    assert all(0 <= share <= 1 for share in learned.trust)
    assert learned.trust.seen > 0
    assert fit(simulate_screen(10), training={"max_steps": 1}).trust == (1.0, 1.0)
