"""Accuracy of predicted perturbations on real screens, beside simple predictions and a repeat of the experiment.

    CELLWEAVE_DATA=../shared/data python benchmarks/perturbation.py --output benchmarks/results/perturbation.md

trains :class:`cellweave.model.CascadedFlowModel` with its default settings on the training cells of every screen, once per
encoder and seed (``--encoders none pca stack --seeds 0 1 2``), predicts what was held out, and scores it with
:func:`cellweave.tl.evaluate_perturbation`. ``anchor`` is the same model without training: where its flows start. Records go to
the ``.jsonl`` beside the output as they come, so that an interrupted run continues; ``--only TEXT`` measures some of the data
sets, ``--only ''`` writes the table again. One thread.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scvi
import torch
from _perturbation_tasks import CONTROL, DATA_SETS, KEY, Task, score, tasks

import cellweave as cw

METRICS = {
    "energy_distance": "energy distance",
    "mmd": "MMD",
    "pearson_delta_top20": "Pearson, top 20",
    "pearson_delta": "Pearson",
    "mse": "MSE",
    "zero_fraction_ratio": "zeros",
}
SPLIT = "split_before"
METRICS_SHOWN = {**METRICS, SPLIT: "Pearson, split before"}
MOST_CELLS = 500
# Cells of a flow that is followed all the way whatever the held-out groups say (not for large panels), or of a large panel.
FEW_CELLS, MOST_GENES = 128, 500


def paired(task: Task) -> anndata.AnnData:
    """Training cells of a task; perturbed cells of contexts without control cells cannot be compared and are left out."""
    train, keys = task.train, list(task.pairing_keys)
    if not keys:
        return train.copy()
    context = train.obs[keys].astype(str).agg(" | ".join, axis=1)
    with_control = set(context[(train.obs[KEY] == CONTROL).to_numpy()])
    return train[context.isin(with_control).to_numpy()].copy()


def encoder_of(name: str, train: anndata.AnnData, seed: int) -> object:
    """What the argument `encoder` of the model is."""
    if name != "stack":
        return name
    scvi.settings.seed = seed
    cells = train.copy()
    cw.model.StackModel.setup_anndata(cells, layer="counts")
    stack = cw.model.StackModel(cells, n_hidden=32, token_dim=8, n_layers=2, n_heads=4, n_cells=64)
    stack.train(max_epochs=5, batch_size=256, accelerator="cpu", enable_progress_bar=False)
    return stack


def fit(task: Task, encoder: str, seed: int, steps: int) -> tuple[cw.model.CascadedFlowModel, dict[str, float]]:
    """A model of the training cells of a task."""
    train = paired(task)
    scvi.settings.seed = seed
    keys = list(task.pairing_keys) or None
    cw.model.CascadedFlowModel.setup_anndata(train, KEY, pairing_keys=keys)
    start = time.process_time()
    model = cw.model.CascadedFlowModel(train, encoder=encoder_of(encoder, train, seed))
    if steps:
        model.train(max_steps=steps, accelerator="cpu", enable_progress_bar=False)
    else:
        model.is_trained_ = True
    return model, {"cpu_s": time.process_time() - start, "seen": model.trust.seen, "unseen": model.trust.unseen}


def predict(
    model: cw.model.CascadedFlowModel, task: Task, seed: int, trust: float | None, n_cells: int = MOST_CELLS
) -> anndata.AnnData:
    """Cells of every pair of the task, made of the control cells of its context."""
    parts = []
    for perturbation, context in task.pairs:
        control = task.controls(context)
        options = {
            "n_cells": min(n_cells, control.n_obs),
            "unseen": "average",
            "seed": seed,
            "n_steps": 5,
            "trust": trust,
        }
        parts.append(model.predict_perturbation(perturbation, control, **options))
    return anndata.concat(parts, index_unique="-")


def split_before(task: Task, seed: int) -> float:
    """Correlation of shifts, all genes, of a model that never saw the control cells that the true shift is measured against.

    The evaluation gives predictions one half of the control cells, but a model has learned from both before. Here the start of the
    flow (``trust=0``, no training) is made with one half only.
    """
    train = paired(task)
    context = train.obs[list(task.pairing_keys)].astype(str).agg(" | ".join, axis=1) if task.pairing_keys else None
    control = (train.obs[KEY] == CONTROL).to_numpy()
    half = np.random.default_rng(seed).random(train.n_obs) < 0.5
    scvi.settings.seed = seed
    seen = train[~control | half].copy()
    if (
        context is not None
    ):  # perturbed cells of contexts whose control cells are all in the other half cannot be compared
        kept = set(context[control & half])
        seen = seen[context[~control | half].isin(kept).to_numpy()].copy()
    cw.model.CascadedFlowModel.setup_anndata(seen, KEY, pairing_keys=list(task.pairing_keys) or None)
    model = cw.model.CascadedFlowModel(seen)
    model.is_trained_ = True
    correlations = []
    for perturbation, name in task.pairs:
        here = np.ones(train.n_obs, dtype=bool) if context is None else (context == name).to_numpy()
        ours, theirs = train[control & half & here], train[control & ~half & here]
        if min(ours.n_obs, theirs.n_obs) < 5:
            continue
        options = {"n_cells": None, "unseen": "average", "seed": seed, "trust": 0.0}
        pred = model.predict_perturbation(perturbation, ours.copy(), **options)
        truth = task.truth[_is_pair(task, perturbation, name)]
        shifts = [_mean(pred) - _mean(ours), _mean(truth) - _mean(theirs)]
        correlations.append(np.corrcoef(shifts)[0, 1] if all(np.std(shift) > 0 for shift in shifts) else 0.0)
    return float(np.mean(correlations))


def _is_pair(task: Task, perturbation: str, context: str) -> np.ndarray:
    obs = task.truth.obs
    same = (obs[KEY].astype(str) == perturbation).to_numpy()
    if not task.pairing_keys:
        return same
    return same & (obs[list(task.pairing_keys)].astype(str).agg(" | ".join, axis=1) == context).to_numpy()


def _mean(adata: anndata.AnnData) -> np.ndarray:
    return np.asarray(adata.X.mean(axis=0), dtype=np.float64).ravel()


def record(task: Task, method: str, seed: int, table: pd.DataFrame, facts: dict[str, float]) -> Iterator[dict]:
    """Lines of the table of scores: means over the groups of a task."""
    kept = table[table["metric"].isin(METRICS)]
    for (name, metric), values in kept.groupby(["method", "metric"])["value"]:
        is_ours = name == "prediction"
        if is_ours or method == "anchor":
            yield {
                "task": task.name,
                "method": method if is_ours else name,
                "seed": seed,
                "metric": metric,
                "value": float(np.nanmean(values)),
                "n_groups": len(task.pairs),
                **(facts if is_ours else {}),
            }


def run(name: str, encoders: list[str], seeds: list[int], steps: int, records: Path) -> None:
    """Measure one data set."""
    done = {(r["task"], r["method"], r["seed"]) for r in read(records)}
    models: dict[tuple, tuple] = {}
    for encoder in ["anchor", *encoders]:
        for seed in seeds:
            for task in tasks(name):
                if (task.name, encoder, seed) in done:
                    continue
                at = (task.pairing_keys, encoder, seed)
                if at not in models:
                    models.clear()
                    n_steps = 0 if encoder == "anchor" else steps
                    models[at] = fit(task, "none" if encoder == "anchor" else encoder, seed, n_steps)
                model, facts = models[at]
                is_slow = task.train.n_vars > MOST_GENES and encoder != "anchor" and facts["unseen"] > 0
                n_cells = FEW_CELLS if is_slow else MOST_CELLS
                pred = predict(model, task, seed, 0.0 if encoder == "anchor" else None, n_cells)
                baselines = "auto" if encoder == "anchor" and seed == seeds[0] else []
                lines = [
                    *record(task, encoder, seed, score(pred, task, baselines=baselines, metrics=list(METRICS)), facts)
                ]
                if encoder == "anchor":
                    lines.append({**lines[-1], "method": encoder, "metric": SPLIT, "value": split_before(task, seed)})
                if encoder != "anchor" and seed == seeds[0] and task.train.n_vars <= MOST_GENES:
                    whole = predict(model, task, seed, 1.0, n_cells=FEW_CELLS)
                    table = score(whole, task, baselines=[], metrics=list(METRICS))
                    lines += [
                        {**line, "method": f"{encoder}, all the way"}
                        for line in record(task, encoder, seed, table, facts)
                    ]
                with records.open("a") as file:
                    file.writelines(json.dumps(line) + "\n" for line in lines)
                print(f"{task.name}, {encoder}, seed {seed}: {facts}", flush=True)


def read(records: Path) -> list[dict]:
    """Records of earlier runs."""
    return [json.loads(line) for line in records.read_text().splitlines()] if records.exists() else []


def report(records: Path, command: str) -> str:
    """The tables, one per task."""
    table = pd.DataFrame(read(records))
    lines = ["# Predicted perturbations of real screens", "", f"`{command}`", "", _HEAD, ""]
    order = ["anchor", *(f"{name}{how}" for name in ("none", "pca", "stack") for how in ("", ", all the way"))]
    for task, of_task in table.groupby("task", sort=False):
        lines += [f"## {task} ({int(of_task['n_groups'].iloc[0])} groups)", ""]
        lines += [
            "| method | " + " | ".join(METRICS_SHOWN.values()) + " | trust | CPU-s |",
            "|---" * (len(METRICS_SHOWN) + 3) + "|",
        ]
        ours = [m for m in order if m in set(of_task["method"])]
        for method in [*ours, *[m for m in of_task["method"].unique() if m not in order]]:
            mine = of_task[of_task["method"] == method]
            cells = [_cell(mine[mine["metric"] == metric]["value"]) for metric in METRICS_SHOWN]
            label = f"**CascadedFlowModel, {method}**" if method in order else method
            trained = method in order and method != "anchor"
            extra = [_cell(mine["unseen"]), f"{mine['cpu_s'].mean():.0f}"] if trained else ["", ""]
            lines.append(f"| {label} | " + " | ".join([*cells, *extra]) + " |")
        lines.append("")
    return "\n".join(lines)


_HEAD = (
    "Mean over the groups of a task, and standard deviation over seeds. Pearson correlations are of the mean shifts, with disjoint "
    "control cells for prediction and truth; a model has learned from both halves before, so for `anchor` there is also the correlation "
    "where the control cells were split before it was made. Zeros is the share of zeros relative to that of the measured cells. `anchor` is where "
    "the flows start, before any training. Trust is the share of the way along the flow that predictions of groups go that were not "
    "trained, as groups that were held out of training say; `all the way` ignores it (one seed, 128 cells). `replicate` is one half of the measured cells predicting the other."
)


def _cell(values: pd.Series) -> str:
    values = values.dropna()
    if not len(values):
        return ""
    spread = f" ± {values.std():.3f}" if len(values) > 1 else ""
    return f"{values.mean():.3f}{spread}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/perturbation.md"))
    parser.add_argument("--only", default=None)
    parser.add_argument("--encoders", nargs="*", default=["none", "pca", "stack"])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    records = options.output.with_suffix(".jsonl")
    for name in DATA_SETS:
        if options.only is None or (options.only and options.only in name):
            run(name, options.encoders, options.seeds, options.steps, records)
    command = (
        "CELLWEAVE_DATA=../shared/data python benchmarks/perturbation.py --output benchmarks/results/perturbation.md"
    )
    options.output.write_text(report(records, command))


if __name__ == "__main__":
    main()
