"""``pl.training_curves`` draws the numbers of a history and nothing else."""

from __future__ import annotations

from types import SimpleNamespace

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from cellweave.pl import training_curves

TERMS = ("loss", "recon_loss", "sw_loss")
TITLES = ["Loss", "Reconstruction of hidden genes", "Sliced Wasserstein", "Error at hidden genes",
          "Correlation at hidden genes"]  # fmt: skip


@pytest.fixture(autouse=True)
def _no_window():
    with mpl.rc_context({"backend": "Agg"}):
        yield
    plt.close("all")


def history(n_epochs: int = 5) -> dict[str, pd.DataFrame]:
    """As scvi-tools keeps it: one-column frames of dtype object, indexed by epoch from zero."""
    names = ["validation_loss", "recon_loss_validation", "sw_loss_validation", "masked_mae_validation",
             "masked_corr_validation", "train_loss", "recon_loss_train", "sw_loss_train"]  # fmt: skip
    index = pd.RangeIndex(n_epochs, name="epoch")
    return {
        name: pd.DataFrame({name: np.linspace(k, k + 1, n_epochs)}, index=index, dtype=object)
        for k, name in enumerate(names)
    }


def test_every_term_has_a_panel_with_its_own_numbers():
    """A curve under the wrong title, or training and validation swapped, would mislead silently."""
    given = history()
    figure = training_curves(given)
    assert [ax.get_title(loc="left") for ax in figure.axes] == TITLES
    for ax, term in zip(figure.axes, (*TERMS, "masked_mae", "masked_corr"), strict=True):
        drawn = {line.get_label(): line for line in ax.lines}
        keys = {"training": "train_loss", "validation": "validation_loss"} if term == "loss" else {
            "training": f"{term}_train", "validation": f"{term}_validation"}  # fmt: skip
        assert set(drawn) == {split for split, key in keys.items() if key in given}
        for split, line in drawn.items():
            np.testing.assert_array_equal(line.get_xdata(), [1, 2, 3, 4, 5])
            np.testing.assert_allclose(line.get_ydata(), given[keys[split]].iloc[:, 0].astype(float))


def test_units_are_written_and_one_legend_serves_all():
    """The y axes have different units; a reader must not compare their heights."""
    figure = training_curves(history())
    units = [ax.get_ylabel() for ax in figure.axes]
    assert units[1] == "nats per hidden count"
    assert len(set(units)) == 5
    legends = [ax.get_legend() for ax in figure.axes if ax.get_legend()]
    assert [[t.get_text() for t in legend.get_texts()] for legend in legends] == [["training", "validation"]]


def test_a_model_may_be_given_in_place_of_its_history():
    """``training_curves(model)`` is what people type first."""
    assert len(training_curves(SimpleNamespace(history=history())).axes) == 5


@pytest.mark.parametrize(("n_epochs", "dots"), [(1, True), (3, True), (400, False)])
def test_short_and_long_runs_are_readable(n_epochs: int, dots: bool):
    """A line through one epoch is invisible; dots on 400 epochs hide the line. No run ends at a fraction of an epoch."""
    ax = training_curves(history(n_epochs), "recon_loss").axes[0]
    assert (ax.lines[0].get_marker() == "o") is dots
    assert all(float(tick).is_integer() for tick in ax.get_xticks())
    low, high = ax.get_xlim()
    assert low < 1
    assert high > n_epochs


def test_terms_choose_panels_and_their_order():
    """Chosen terms appear as asked, also in the user's own axes."""
    figure = training_curves(history(), ["masked_corr", "loss"])
    assert [ax.get_title(loc="left") for ax in figure.axes] == [TITLES[4], TITLES[0]]
    own, (left, right) = plt.subplots(1, 2)
    assert training_curves(history(), "sw_loss", ax=right) is own
    assert (len(left.lines), len(right.lines)) == (0, 2)


def test_terms_of_other_models_are_drawn_under_their_own_name():
    """Any scvi-tools model has a history; scalars without a split, such as a weight schedule, are not losses."""
    given = {
        "elbo_train": pd.Series([2.0, 1.0]),
        "elbo_validation": pd.Series([2.5, np.nan]),
        "kl_weight": pd.Series([0.0, 1.0]),
    }
    [ax] = training_curves(given).axes
    assert ax.get_title(loc="left") == "elbo"
    assert [len(line.get_ydata()) for line in ax.lines] == [2, 1]  # an epoch without validation leaves no gap


def test_wrong_histories_and_terms_are_explained():
    """The message says what is there, so that the next call works."""
    with pytest.raises(ValueError, match="train the model first"):
        training_curves(SimpleNamespace(history=None))
    with pytest.raises(ValueError, match="no training or validation curve among"):
        training_curves({"lr": pd.Series([1.0])})
    with pytest.raises(ValueError, match=r"\['kl'\].*'recon_loss'"):
        training_curves(history(), "kl")
    with pytest.raises(ValueError, match="name one in `terms`"):
        training_curves(history(), ax=plt.subplots()[1])
