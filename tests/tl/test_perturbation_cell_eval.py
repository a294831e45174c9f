"""Export to cell-eval, and its metrics beside ours."""

from __future__ import annotations

import sys
import warnings

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from perturbation_data import KEY, Panel, cells

import cellweave as cw


@pytest.fixture(scope="module")
def panel() -> Panel:
    return Panel(n_perturbations=4, n_cells=40, n_genes=60, n_control=80)


def test_export_has_what_cell_eval_wants(panel):
    """Protects the export: same genes in one order, same labels, measured control cells in both, and nothing negative."""
    pred = panel.resampled()
    pred.X = sp.csr_matrix(np.where(np.arange(60) == 3, -0.1, pred.X.toarray()).astype(np.float32))
    fake = cells(np.full((5, 60), 0.5), ["control"] * 5, "fake")
    mixed = cells(
        np.concatenate([pred.X.toarray(), fake.X.toarray()]),
        [*pred.obs[KEY].astype(str), *fake.obs[KEY].astype(str)],
        "mixed",
    )[:, ::-1].copy()
    predicted, measured = cw.tl.to_cell_eval(mixed, panel.true, perturbation_key=KEY, train=panel.seen())
    assert list(predicted.var_names) == list(measured.var_names) == list(panel.true.var_names)
    assert set(predicted.obs[KEY]) == set(measured.obs[KEY]) == {"control", *panel.names}
    assert predicted.X.dtype == np.float32 and predicted.X.min() >= 0
    assert (mixed.X < 0).nnz == panel.n_cells * 4  # the user's values are as they were
    control = {
        name: a.X[(a.obs[KEY] == "control").to_numpy()] for name, a in zip("pm", (predicted, measured), strict=True)
    }
    assert [x.shape[0] for x in control.values()] == [40, 40]
    # disjoint halves of the measured control cells, and not the invented ones
    seen = panel.seen()
    all_control = seen.X[(seen.obs[KEY] == "control").to_numpy()].toarray()
    stacked = sp.vstack(list(control.values())).toarray()
    np.testing.assert_array_equal(np.sort(stacked.sum(axis=1)), np.sort(all_control.sum(axis=1)))
    shared = cw.tl.to_cell_eval(mixed, panel.true, perturbation_key=KEY, train=seen, split_control=False)
    assert [int((adata.obs[KEY] == "control").sum()) for adata in shared] == [80, 80]


def test_export_needs_equal_perturbations_and_control_cells(panel):
    """Protects cell-eval from pairs that it would refuse or, worse, silently accept."""
    some = panel.resampled()[: 3 * panel.n_cells].copy()
    with pytest.raises(ValueError, match=r"1 of 4 are missing in `pred` and 0 are in `pred` only \(first: 'p03'\)"):
        cw.tl.to_cell_eval(some, panel.true, perturbation_key=KEY, train=panel.seen())
    with pytest.raises(ValueError, match="`true.obs.'perturbation'.` has no control cells"):
        cw.tl.to_cell_eval(panel.resampled(), panel.true, perturbation_key=KEY)


def test_missing_package_is_one_sentence(panel, monkeypatch):
    """Protects users without the extra: they learn which one is missing."""
    monkeypatch.setitem(sys.modules, "cell_eval", None)
    with pytest.raises(ImportError, match=r'cell-eval, which is not installed: run `pip install "cellweave\[eval\]"`'):
        cw.tl.evaluate_perturbation(
            panel.resampled(), panel.true, train=panel.seen(), perturbation_key=KEY, cell_eval=True
        )


def test_metrics_are_those_of_cell_eval(panel, tmp_path):
    """Protects the numbers: with shared control cells they equal a direct call on the exported pair, and the order is right."""
    cell_eval = pytest.importorskip("cell_eval", reason="cell-eval is not installed (extra `eval`)")
    pred, seen = panel.of("pred", panel.effect), panel.seen()
    options = {"train": seen, "perturbation_key": KEY, "split_control": False}
    table = cw.tl.evaluate_perturbation(
        {"truth again": pred}, panel.true, baselines=["no_change"], metrics=["mse"], cell_eval="minimal", **options
    )
    found = table[table["method"] == "truth again"].pivot(index="perturbation", columns="metric", values="value")
    predicted, measured = cw.tl.to_cell_eval(pred, panel.true, **options)
    before = measured.X.copy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluator = cell_eval.MetricsEvaluator(
            predicted, measured, control_pert="control", pert_col=KEY, num_threads=1, outdir=str(tmp_path / "out")
        )
        direct, _ = evaluator.compute(profile="minimal", write_csv=False, break_on_error=True)
    assert (measured.X != before).nnz == 0
    direct = pd.DataFrame(direct.to_dict(as_series=False)).set_index("perturbation").sort_index()
    assert {"mae", "discrimination_score_l1", "overlap_at_N"} <= set(direct)
    np.testing.assert_allclose(found[[f"cell_eval:{name}" for name in direct]], direct, rtol=1e-6)
    # its errors of the mean are ours, up to its float32
    np.testing.assert_allclose(found["cell_eval:mse"], found["mse"], rtol=1e-4)
    scores = table.pivot_table(index="method", columns="metric", values="value")
    assert scores["cell_eval:overlap_at_N"].idxmin() == "no_change"
    assert scores["cell_eval:mae"].idxmax() == "no_change"
    assert set(table["method"]) == {"truth again", "no_change", "replicate"}
