"""What users do wrong with the scores of predicted perturbations ends in one sentence that says what to do."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData, concat
from perturbation_data import KEY, Panel, cells

import cellweave as cw


@pytest.fixture(scope="module")
def panel() -> Panel:
    return Panel(n_perturbations=3, n_cells=20, n_genes=30, n_control=30)


def evaluate(panel: Panel, pred=None, true=None, train=None, **options) -> pd.DataFrame:
    """Scores of valid data where nothing else is given."""
    pred = panel.resampled() if pred is None else pred
    arguments = {"perturbation_key": KEY, "n_splits": 1} | options
    true, train = panel.true if true is None else true, panel.seen() if train is None else train
    return cw.tl.evaluate_perturbation(pred, true, train=train, **arguments)


def with_value(adata: AnnData, value: float) -> AnnData:
    """The data with one value changed, of cell 7 and gene 4."""
    x = adata.X.toarray()
    x[7, 4] = value
    return cells(x, adata.obs[KEY].to_numpy(), "bad", **{c: adata.obs[c].to_numpy() for c in adata.obs if c != KEY})


def relabelled(adata: AnnData, change: Callable[[str], object]) -> AnnData:
    copy = adata.copy()
    copy.obs[KEY] = [change(str(label)) for label in adata.obs[KEY]]
    return copy


def counts(adata: AnnData) -> AnnData:
    copy = adata.copy()
    copy.X = sp.csr_matrix(np.rint(adata.X.toarray() * 9))
    return copy


def without(adata: AnnData, label: str) -> AnnData:
    return adata[(adata.obs[KEY] != label).to_numpy()].copy()


# name -> (arguments, type of the error, part of the message)
WRONG = {
    "genes missing": (
        lambda p: {"pred": p.resampled()[:, :-2].copy()},
        ValueError,
        "2 of 30 are missing in `pred['pre",
    ),
    "genes of train": (
        lambda p: {"train": p.seen()[:, 1:].copy()},
        ValueError,
        "`train` and `true` must have the same g",
    ),
    "no control": (lambda p: {"train": p.train}, ValueError, "`train.obs['perturbation']` has no control cells"),
    "other control": (
        lambda p: {"train": relabelled(p.seen(), lambda s: "NT" if s == "control" else s)},
        ValueError,
        "the label 'NT' may be it",
    ),
    "absent in truth": (
        lambda p: {"true": without(p.true, "p01")},
        ValueError,
        "1 predicted group(s) that `true` has no cells of (first: 'p01')",
    ),
    "absent in pred": (
        lambda p: {"pred": without(p.resampled(), "p02")},
        ValueError,
        "no cells of 1 of the 3 measured group(s) (first: 'p02')",
    ),
    "counts predicted": (
        lambda p: {"pred": counts(p.resampled())},
        ValueError,
        "`pred['prediction'].X` holds whole num",
    ),
    "counts measured": (lambda p: {"true": counts(p.true)}, ValueError, "`true.X` holds whole numbers only"),
    "NaN": (
        lambda p: {"pred": with_value(p.resampled(), np.nan)},
        ValueError,
        "1 NaN or infinite value(s) (first: cell 'bad00007', gene 'g4'",
    ),
    "infinite": (lambda p: {"true": with_value(p.true, np.inf)}, ValueError, "`true.X` has 1 NaN or infinite value(s)"),
    "negative": (lambda p: {"true": with_value(p.true, -1.5)}, ValueError, "gene 'g4', value -1.5"),
    "not logged": (
        lambda p: {"train": with_value(p.seen(), 900.5)},
        ValueError,
        "value 900.5); such values are 0 or more",
    ),
    "empty prediction": (lambda p: {"pred": p.true[:0]}, ValueError, "has no cells or no genes"),
    "empty truth": (lambda p: {"true": p.control}, ValueError, "`true` has no perturbed cells"),
    "one-cell groups": (
        lambda p: {"true": p.true[:: p.n_cells].copy()},
        ValueError,
        "3 of 3 measured group(s) have fewer than `min_cells=15` measured cells in `true` (3)",
    ),
    "no such column": (lambda p: {"perturbation_key": "gene"}, KeyError, "`true.obs` has no column 'gene'"),
    "no such context": (
        lambda p: {"pairing_keys": "line"},
        KeyError,
        "`true.obs` has no column 'line' (`pairing_keys`)",
    ),
    "label missing": (
        lambda p: {"true": relabelled(p.true, lambda s: None if s == "p00" else s)},
        ValueError,
        "is missing in 20 of 60 cell(s) (first: 'true00000')",
    ),
    "empty part": (lambda p: {"true": relabelled(p.true, lambda s: s + "+")}, ValueError, "has an empty part"),
    "no AnnData": (lambda p: {"pred": {"mine": np.zeros((3, 3))}}, TypeError, "`pred['mine']` must be an AnnData"),
    "taken name": (lambda p: {"name": "additive"}, ValueError, "The name 'additive' of a prediction in `pred`"),
    "repeated genes": (
        lambda p: {"true": concat([p.true, p.true[:, :1].copy()], axis=1)},
        ValueError,
        "`true.var_names` repeats 1 gene name(s) (first: 'g0')",
    ),
    "unknown metric": (
        lambda p: {"metrics": ["mse", "R2"]},
        ValueError,
        "`metrics` has 1 unknown name(s) (first: 'R2')",
    ),
    "no metric": (lambda p: {"metrics": []}, ValueError, "`metrics` is empty"),
    "unknown baseline": (
        lambda p: {"baselines": ["mean"]},
        ValueError,
        "`baselines` has 1 unknown name(s) (first: 'mean')",
    ),
    "unknown profile": (
        lambda p: {"cell_eval": "vcc2026"},
        ValueError,
        "`cell_eval='vcc2026'` is no profile of cell-eval",
    ),
    "no split": (lambda p: {"n_splits": 0}, ValueError, "`n_splits` must be at least 1, got 0"),
    "finer shifts": (
        lambda p: {"shift_keys": "donor"},
        ValueError,
        "`shift_keys` has 'donor', which is not in `pairing_k",
    ),
    "no such layer": (lambda p: {"layer": "log"}, KeyError, "`layer='log'` not found"),
}


@pytest.mark.parametrize("case", WRONG)
def test_mistakes_are_explained(panel, case):
    """Protects users: every mistake is named with its field and count, and with what to do, in one sentence."""
    make, kind, part = WRONG[case]
    with warnings.catch_warnings(), pytest.raises(kind, match=re.escape(part)) as caught:
        warnings.simplefilter("ignore")
        evaluate(panel, **make(panel))
    message = str(caught.value.args[0])
    assert message.endswith(".") and "; " in message or kind is KeyError


def test_baselines_need_training_cells(panel):
    """Protects against baselines out of nothing: without training cells they are refused by name."""
    both = concat([panel.control, panel.true])
    with pytest.raises(ValueError, match="`baselines` names 'additive', which rests on training cells"):
        cw.tl.evaluate_perturbation(None, both, perturbation_key=KEY, baselines="additive")


def test_small_groups_are_left_out_with_a_warning(panel):
    """Protects the average from groups of a few cells: they are left out, counted and named; the rest is scored."""
    few = panel.true[(panel.true.obs[KEY] != "p00").to_numpy() | (np.arange(panel.true.n_obs) < 3)].copy()
    with pytest.warns(UserWarning, match=r"1 of 3 measured group\(s\).*first: 'p00'\); they are left out"):
        table = evaluate(panel, true=few)
    assert set(table["perturbation"]) == {"p01", "p02"}


def test_single_cells_have_means_but_no_distances(panel):
    """Protects groups and predictions of one cell: the mean is scored, what needs two cells is NaN, and nothing breaks."""
    one = panel.resampled()[:: panel.n_cells].copy()
    true = panel.true[:: panel.n_cells].copy()
    table = evaluate(panel, pred=one, true=true, min_cells=1)
    wide = table.pivot_table(index="method", columns="metric", values="value", dropna=False)
    assert wide.loc["prediction", ["mse", "mae"]].notna().all()
    assert wide.loc["prediction", ["energy_distance", "mmd", "variance_ratio"]].isna().all()
    assert "replicate" not in wide.index


def test_measured_cells_among_the_training_cells_are_noticed(panel):
    """Protects honest baselines: a truth that is also training data is said, and equal names alone are no proof."""
    seen = panel.seen()
    leak = seen[(seen.obs[KEY] != "control").to_numpy()].copy()
    with pytest.warns(UserWarning, match="`train` and `true` share 60 names of perturbed cells"):
        evaluate(panel, true=leak)
    renamed = relabelled(leak, lambda s: {"p00": "p01", "p01": "p02", "p02": "p00"}[s])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        evaluate(panel, true=renamed)


def test_predictions_without_known_sources_are_noticed(panel):
    """Protects the disjoint halves: predicted cells that may rest on all control cells are said to do so, and why."""
    nameless, foreign = panel.resampled(), panel.resampled()
    del nameless.obs["source_cell"]
    foreign.obs["source_cell"] = "elsewhere"
    for pred, reason in ((nameless, "does not name the control cells"), (foreign, "has 60 cell.s. whose")):
        with pytest.warns(UserWarning, match=f"The prediction 'prediction' {reason}"):
            evaluate(panel, pred=pred, metrics=["pearson_delta"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        evaluate(panel, pred=nameless, metrics=["pearson_delta"], split_control=False)


def test_negative_predictions_are_scored(panel):
    """Protects models that do not clip: slightly negative predicted values are their own error, not a mistake."""
    pred = with_value(panel.resampled(), -0.2)
    pred.obs["source_cell"] = panel.seen().obs_names[0]
    table = evaluate(panel, pred=pred, baselines=None)
    assert table.query("metric == 'mse'")["value"].notna().all()
