"""Scores of the simple predictions on real screens, against a table that was computed without this package."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "_perturbation_tasks.py"

# MSE, Pearson of shifts (shared control cells; disjoint halves), the same of the top 20 genes (shared only: halves vary),
# MSE of the top 20 genes, energy distance, MMD. From the table of reference baselines beside the data.
REFERENCE = {
    "kang_ifnb": {
        ("Kang, unseen cell type", "no_change"): (0.0775, 0.000, 0.000, 0.000, 11.0070, 20.408, 0.4921),
        ("Kang, unseen cell type", "context_mean"): (0.0295, 0.829, 0.821, 0.438, 3.0703, 8.361, 0.2325),
        ("Kang, unseen cell type", "nearest_context"): (0.0127, 0.917, 0.907, 0.777, 0.7279, 2.373, 0.0743),
        ("Kang, unseen cell type", "linear_context"): (0.0134, 0.916, 0.906, 0.756, 0.8885, 2.823, 0.0873),
        ("Kang, unseen donor", "no_change"): (0.0219, 0.000, 0.000, 0.000, 2.3836, 4.528, 0.1178),
        ("Kang, unseen donor", "observed"): (0.0088, 0.788, 0.703, 0.980, 0.1036, 0.340, 0.0101),
        ("Kang, unseen donor", "context_mean"): (0.0196, 0.670, 0.608, 0.945, 0.4692, 2.554, 0.0674),
    },
    "norman_mcfaline_hvg500": {
        ("Norman, double 0/2 seen", "perturbed_mean"): (0.0238, 0.663, None, 0.708, 0.5922, 3.021, 0.1913),
        ("Norman, double 0/2 seen", "additive"): (0.0250, 0.360, None, 0.397, 0.6206, 3.154, 0.1995),
        ("Norman, double 1/2 seen", "perturbed_mean"): (0.0035, -0.099, None, -0.264, 0.0844, 0.406, 0.0255),
        ("Norman, double 1/2 seen", "additive"): (0.0015, 0.922, 0.846, 0.949, 0.0292, 0.142, 0.0085),
        ("Norman, double 2/2 seen", "perturbed_mean"): (0.0032, 0.462, None, 0.501, 0.0788, 0.438, 0.0269),
        ("Norman, double 2/2 seen", "additive"): (0.0004, 0.854, 0.628, 0.884, 0.0058, 0.013, 0.0006),
        ("Norman, unseen single", "no_change"): (0.0009, 0.000, 0.000, 0.000, 0.0213, 0.060, 0.0035),
        ("Norman, unseen single", "perturbed_mean"): (0.0007, 0.517, 0.192, 0.609, 0.0158, 0.049, 0.0028),
        ("McFaline, unseen line x kinase", "no_change"): (0.0089, 0.000, 0.000, 0.000, 0.0986, 0.088, 0.0050),
        ("McFaline, unseen line x kinase", "perturbed_mean"): (0.0051, 0.665, 0.045, 0.844, 0.0359, 0.012, 0.0020),
    },
    "papalexi_thp1_299g": {
        ("Papalexi, unseen knock-out", "no_change"): (0.0577, 0.000, 0.000, 0.000, 0.6109, 0.608, 0.0113),
        ("Papalexi, unseen knock-out", "perturbed_mean"): (0.0494, 0.402, 0.278, 0.658, 0.4894, 0.528, 0.0099),
        ("Papalexi, unseen knock-out", "gene_linear"): (0.0552, 0.772, 0.695, 0.864, 0.5713, 0.633, 0.0116),
        ("Papalexi, unseen replicate", "no_change"): (0.1788, 0.000, 0.000, 0.000, 1.9783, 1.808, 0.0331),
    },
    "gbm_panobinostat_300g": {
        ("GBM, unseen patient", "no_change"): (0.4323, 0.000, 0.000, 0.000, 2.3052, 5.070, 0.0921),
        ("GBM, unseen patient", "context_mean"): (0.3572, 0.499, 0.494, 0.407, 1.3519, 3.938, 0.0738),
    },
    "sim_grn_perturb_800g": {
        ("Sim, double (buffering)", "additive"): (0.0535, 0.551, 0.473, 0.960, 0.0571, 0.357, 0.0072),
        ("Sim, double (additive)", "additive"): (0.0597, 0.385, 0.300, 0.937, 0.1056, 0.397, 0.0084),
        ("Sim, double (synergy)", "perturbed_mean"): (0.0323, 0.302, 0.120, 0.515, 0.5631, 0.119, 0.0032),
        ("Sim, unseen single", "perturbed_mean"): (0.0242, 0.182, 0.008, 0.154, 0.2371, 0.114, 0.0032),
        ("Sim, unseen single", "gene_linear"): (0.0243, 0.179, 0.010, 0.195, 0.2346, 0.113, 0.0032),
    },
}
# One random half predicts the other: MSE and Pearson of shifts with shared control cells, of one halving.
REPLICATE = {
    "Kang, unseen cell type": (0.0013, 0.992),
    "Kang, unseen donor": (0.0146, 0.734),
    "Norman, double 0/2 seen": (0.0015, 0.976),
    "Papalexi, unseen knock-out": (0.0163, 0.801),
    "Papalexi, unseen replicate": (0.0838, 0.801),
    "GBM, unseen patient": (0.0177, 0.976),
    "Sim, double (synergy)": (0.0680, 0.351),
}
SHARED = ["pearson_delta", "pearson_delta_top20"]
# rounding of the table; random halves; at most 500 cells a side
ROUNDING, HALVES = 6e-4, 0.08


@pytest.fixture(scope="module")
def benchmark_tasks() -> ModuleType:
    """The tasks as the benchmark defines them."""
    if not BENCHMARK.exists():
        pytest.skip("the benchmarks are not part of this copy of the package")
    spec = importlib.util.spec_from_file_location("perturbation_tasks", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def scored(benchmark_tasks, real_data) -> Callable[[str], tuple[pd.DataFrame, pd.DataFrame]]:
    """Function from a data set to its mean scores with disjoint halves, and with shared control cells."""
    done: dict[str, tuple[pd.DataFrame, pd.DataFrame]] = {}

    def of(name: str) -> tuple[pd.DataFrame, pd.DataFrame]:
        if name not in done:
            tasks = list(benchmark_tasks.tasks(name, real_data(f"{name}.h5ad").parent))
            options = ({"n_splits": 5}, {"split_control": False, "metrics": SHARED, "n_splits": 1})
            tables = [pd.concat([benchmark_tasks.score(None, task, **extra) for task in tasks]) for extra in options]
            done[name] = tuple(
                table.pivot_table(index=["task", "method"], columns="metric", values="value") for table in tables
            )
        return done[name]

    return of


sets = [
    pytest.param(name, marks=pytest.mark.slow) if name in ("kang_ifnb", "sim_grn_perturb_800g") else name
    for name in REFERENCE
]


@pytest.mark.parametrize("name", sets)
def test_baselines_have_the_reference_scores(scored, name):
    """Protects every number a model is compared with: means, shifts, top genes, distances of populations."""
    split, shared = scored(name)
    for key, (mse, pearson, halves, top, top_mse, energy, mmd) in REFERENCE[name].items():
        row = split.loc[key]
        assert row["mse"] == pytest.approx(mse, abs=6e-5), key
        assert row["mse_top20"] == pytest.approx(top_mse, abs=6e-5), key
        assert shared.loc[key, "pearson_delta"] == pytest.approx(pearson, abs=ROUNDING), key
        assert shared.loc[key, "pearson_delta_top20"] == pytest.approx(top, abs=ROUNDING), key
        assert halves is None or row["pearson_delta"] == pytest.approx(halves, abs=HALVES), key
        assert row["energy_distance"] == pytest.approx(energy, rel=0.05, abs=0.06), key
        assert row["mmd"] == pytest.approx(mmd, rel=0.05, abs=0.0015), key


@pytest.mark.parametrize("name", sets)
def test_replicate_has_the_reference_scores(scored, name):
    """Protects the ceiling: errors and correlations of halves as in the table, and distances around 0."""
    split, shared = scored(name)
    found = [task for task in split.index.get_level_values("task").unique() if task in REPLICATE]
    assert found
    for task in found:
        mse, pearson = REPLICATE[task]
        row = split.loc[task, "replicate"]
        assert mse / 2 < row["mse"] < mse * 2, task
        assert shared.loc[(task, "replicate"), "pearson_delta"] == pytest.approx(pearson, abs=0.07), task
        assert abs(row["energy_distance"]) < 0.15, task
        assert abs(row["mmd"]) < 0.005, task


def test_a_screen_without_effect_is_seen_through(scored):
    """Protects the purpose of disjoint halves: McFaline has no differential gene, and its 0.66 vanishes."""
    split, shared = scored("norman_mcfaline_hvg500")
    key = ("McFaline, unseen line x kinase", "perturbed_mean")
    assert shared.loc[key, "pearson_delta"] > 0.6
    assert shared.loc[key, "pearson_delta_top20"] > 0.8
    assert split.loc[key, ["pearson_delta", "pearson_delta_top20"]].abs().max() < 0.2
    assert split.loc[key, "n_de_true"] == 0


def test_same_gene_of_other_lines(benchmark_tasks, real_data):
    """Protects the shift of other contexts on McFaline alone; the tasks also know the line of the other study."""
    name = "norman_mcfaline_hvg500"
    task = list(benchmark_tasks.tasks(name, real_data(f"{name}.h5ad").parent))[-1]
    glioma = replace(task, train=task.train[(task.train.obs["cell_type"] != "k562").to_numpy()].copy())
    options = {"metrics": ["mse", "pearson_delta"], "split_control": False, "baselines": "context_mean"}
    table = benchmark_tasks.score(None, glioma, **options)
    found = table[table["method"] == "context_mean"].groupby("metric")["value"].mean()
    assert found["mse"] == pytest.approx(0.0151, abs=6e-5)
    assert found["pearson_delta"] == pytest.approx(0.027, abs=ROUNDING)


def test_replicates_pooled_over_the_others(benchmark_tasks, real_data):
    """Protects pooled shifts: with one common context the mean of the perturbations is that of the table."""
    name = "papalexi_thp1_299g"
    task = list(benchmark_tasks.tasks(name, real_data(f"{name}.h5ad").parent))[-1]
    options = {"metrics": ["mse", "pearson_delta"], "split_control": False, "baselines": "perturbed_mean"}
    table = benchmark_tasks.score(None, task, shift_keys=(), **options)
    found = table[table["method"] == "perturbed_mean"].groupby("metric")["value"].mean()
    assert found["mse"] == pytest.approx(0.1510, abs=6e-5)
    assert found["pearson_delta"] == pytest.approx(0.686, abs=ROUNDING)


def test_tasks_are_those_of_the_reference(benchmark_tasks, real_data):
    """Protects the questions: groups and measured cells of every task as in the table, no measured cell in training."""
    expected = {
        "Norman, double 0/2 seen": (1, 100),
        "Norman, double 1/2 seen": (1, 100),
        "Norman, double 2/2 seen": (2, 200),
        "Norman, unseen single": (2, 200),
        "McFaline, unseen line x kinase": (4, 358),
        "Papalexi, unseen knock-out": (3, 1920),
        "Papalexi, unseen replicate": (1, 107),
        "GBM, unseen patient": (1, 500),
        "Sim, double (buffering)": (2, 120),
        "Sim, double (additive)": (3, 180),
        "Sim, double (synergy)": (5, 300),
        "Sim, unseen single": (6, 360),
        "Kang, unseen cell type": (1, 338),
        "Kang, unseen donor": (2, 184),
    }
    found = {}
    for name in benchmark_tasks.DATA_SETS:
        for task in benchmark_tasks.tasks(name, real_data(f"{name}.h5ad").parent):
            found[task.name] = (len(task.pairs), task.truth.n_obs)
            assert not task.truth.obs_names.isin(task.train.obs_names).any()
            assert all(task.controls(context).n_obs >= 15 for _, context in task.pairs)
    assert found == expected
