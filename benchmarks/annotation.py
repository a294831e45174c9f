"""Accuracy of ScyanModel on labelled cytometry data, beside the published package and beside no flow at all.

Every fit is one command, which adds a line to the results; steps that are there are not run again::

    export CELLWEAVE_DATA=<folder with the data> OMP_NUM_THREADS=1
    python benchmarks/annotation.py prepare --folder <folder>
    python benchmarks/annotation.py run bmmc default --seed 0 --folder <folder>
    original/bin/python -P benchmarks/annotation.py run bmmc original --seed 0 --folder <folder>
    python benchmarks/annotation.py new-samples --folder <folder>
    python benchmarks/annotation.py table --folder <folder> --output benchmarks/results/annotation.md

``original`` runs in an environment of its own, with ``scyan`` from PyPI and its defaults (``-P``: the file ``scyan.py`` beside this one
would be found before the package). Data are transformed as the notes
beside them say and are the same for all; every cell gets a label (no rejection), and cells whose label is not in the table
take part in training but not in the scores, except where the notes remove them. The table alone (no flow) and a Gaussian mixture
started at the table stand beside every data set.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

# Arguments of the model and of its training, beyond the defaults.
PUBLISHED: dict[str, Any] = {"n_hidden_layers": 6, "identity_init": False, "temperature_period": 3}
PUBLISHED |= {"monotone_weight": 0.0, "weight_prior": 0.0}
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": ({}, {}),
    "ensemble of 5": ({"n_ensemble": 5}, {}),
    "no cells held out": ({}, {"train_size": 1.0}),
    "5 labels per population": ({}, {}),
    "without monotone_weight": ({"monotone_weight": 0.0}, {}),
    "without weight_prior": ({"weight_prior": 0.0}, {}),
    "without both": ({"monotone_weight": 0.0, "weight_prior": 0.0}, {}),
    "random start": ({"identity_init": False}, {}),
    "temperature": ({"temperature_period": 3}, {}),
    "published depth and rate": ({"n_hidden_layers": 6}, {"lr": 5e-4}),
    "three times the steps": ({}, {"max_epochs": 3}),
    "published settings": (PUBLISHED, {"train_size": 1.0, "batch_size": 8192, "lr": 5e-4}),
}
# Data set: file, table, batch column, transformation, epochs at which the published early stopping ended.
DATASETS: dict[str, tuple[str, str, str | None, str, int]] = {
    "bmmc": ("bmmc_basal1.h5ad", "table_bmmc.csv", None, "asinh1", 17),
    "levine32": ("levine32_stratified.h5ad", "table_aml.csv", None, "study", 100),
    "aml-short": ("aml_short.h5ad", "table_aml.csv", None, "none", 100),
    "debarcoding": ("debarcoding_catalyst.h5ad", "table_debarcoding.csv", None, "asinh0", 11),
    "debarcoding-logicle": ("debarcoding_catalyst.h5ad", "table_debarcoding.csv", None, "logicle", 8),
    "multicenter": ("multicenter_6samples.h5ad", "table_multicenter.csv", None, "asinh1", 14),
    "multicenter-batch": ("multicenter_6samples.h5ad", "table_multicenter.csv", "sample", "asinh1", 11),
}
# What the tables do not say by themselves.
NOTES = """\
Seeds differ in the start of the network, the order of cells and the held-out tenth; `±` is the standard deviation over them.
`original` is the published package with its defaults. `published settings` are its settings in our model. `no flow` is what the
table says alone. The recipe (`default`) was chosen on the labels of `levine32` and of 40,000 cells of `bmmc`, so these two are no
held-out figures; the others took no part in the choice, but `aml-short` (280 cells) is of the study of `levine32`. Its spread needs
ten seeds: over seeds 0 to 2 it is .006 for the published package and .013 for ours, over 0 to 9 it is .043 and .009, and the Gaussian
mixture is as good as either of ours there. `5 labels per population` are among the scored cells (at most 5 % of `levine32`, 0.1 % of the
others).

What the spread on `aml-short` comes from (macro F1, five seeds each, the other seed fixed at 0): other starts of the network with the
same split and order .932 ± .008, other splits and orders with the same start .923 ± .002. Without held-out cells: other orders .923 ±
.002, other starts with all cells in one step .938 ± .009.

Where the table alone is hard to beat (`multicenter`), so it stays: there the flow has the better macro F1 and accuracy and the
worse balanced accuracy.

## Variants tried while the recipe was searched

One or two seeds with a plain training loop of the same module; macro F1 on `levine32` / 40,000 cells of `bmmc`. The first block
has neither `monotone_weight` nor `weight_prior`, six hidden layers and a learning rate of 0.0005.

| variant | F1 |
| --- | --- |
| published settings | .907 / .751 |
| random start, 256 cells per step | .934 / - |
| identity start, published stopping | .922 / .775 |
| identity start, 475 to 600 steps | .954 / .733 |
| same, no temperature | .950 / .729 |
| same, learning rate 0.001; 0.0002 | .950 / .721; .946 / .730 |
| identity start, 500 steps (reference of the rows below) | .958 / .745 |
| + weight decay 1 | .957 / .740 |
| + prior_std 0.25; 0.4; 0.5 | .954 / .745; .936 / .707; .923 / .676 |
| + noise of 0.2 on the input | .942 / .748 |
| + penalty on transport near modes, 0.1; 1 | .959 / .739; .962 / .694 |
| + penalty on means of populations off their modes, 1; 10 | .958 / .741; .958 / .726 |
| + penalty on the variance of the transport | .960 / .746 |
| + uniform population weights, fixed | .960 / .755 |
| + weight_prior 1 | .960 / .760 |
| + monotone penalty (about 0.2; 0.8; 4; 40 in today's weight) | .958 / .745; .957 / .750; .960 / .757; .957 / .764 |
| + weight_prior 1 and monotone penalty (about 15; 75; 150; 300) | .959 / .763; .953 / .777; .948 / .780; .944 / .779 |
| + weight_prior 1 and 1 - correlation of the marker, 50; 150 | .950 / .778; .941 / .787 |
| both terms, learning rate 0.001, two hidden layers (`default`) | .954 / .789 |
| same with 1,560 steps | - / .769 |
"""
METRICS = ("f1_macro", "balanced_accuracy", "accuracy")
LABELLED, UNLABELLED = 5, "unknown"


# ---------------------------------------------------------------- data


def prepare(folder: Path) -> None:
    """Write transformed cells and tables of all data sets, for both environments."""
    import anndata as ad

    import cellweave as cw

    source = Path(os.environ.get("CELLWEAVE_DATA", "shared/data")) / "cytometry"
    folder.mkdir(parents=True, exist_ok=True)
    for name, (file, rows, _, transformation, _) in DATASETS.items():
        adata, table = ad.read_h5ad(source / file), pd.read_csv(source / rows, index_col=0)
        if name == "bmmc":
            adata = adata[adata.obs["cell_type"] != "CD11bmid Monocyte"].copy()
        if name == "levine32":
            adata = adata[adata.obs["cell_type"] != "unassigned"].copy()
        if name.startswith("debarcoding"):
            clear = adata.obs["top3_separation"] >= 0.3
            adata.obs["cell_type"] = np.where(clear, adata.obs["top3_barcode"].astype(str), UNLABELLED)
        adata = adata[:, table.columns].copy()
        adata.X = np.asarray(adata.X.toarray() if hasattr(adata.X, "toarray") else adata.X, dtype=np.float32)
        if transformation == "logicle":
            cw.pp.logicle(adata)
        elif transformation != "none":
            cw.pp.arcsinh(adata, cofactor=5, translation=0 if transformation == "asinh0" else 1)
        if transformation == "study":  # a few cells per population: moments of the whole study
            moments = pd.read_csv(source / "aml_marker_mean_std.csv", index_col=0).loc[adata.var_names]
            scaled = (adata.X - moments["mean"].to_numpy()) / moments["std"].to_numpy()
            adata.X = scaled.clip(-10, 10).astype(np.float32)
        elif transformation != "none":
            cw.pp.scale_markers(adata)  # centred after logicle, zero at -1 after arcsinh
        obs = adata.obs[[key for key in ("cell_type", "sample") if key in adata.obs]].astype(str)
        ad.AnnData(adata.X, obs=obs, var=pd.DataFrame(index=adata.var_names)).write_h5ad(folder / f"{name}.h5ad")
        table.to_csv(folder / f"{name}.csv")


def read(folder: Path, name: str) -> tuple[Any, pd.DataFrame]:
    """Prepared cells and table."""
    import anndata as ad

    adata = ad.read_h5ad(folder / f"{name}.h5ad")
    adata.obs["cell_type"] = adata.obs["cell_type"].astype(str)
    return adata, pd.read_csv(folder / f"{name}.csv", index_col=0)


# ---------------------------------------------------------------- fits


def run(folder: Path, name: str, variant: str, seed: int) -> None:
    """Fit once, score every cell, add a line to the results."""
    if any((r["data"], r["variant"], r["seed"]) == (name, variant, seed) for r in results(folder)):
        return
    warnings.simplefilter("ignore")
    import torch

    torch.set_num_threads(1)
    adata, table = read(folder, name)
    start = time.process_time()
    fit: Callable[..., tuple[np.ndarray, int]] = _original if variant == "original" else _ours
    predicted, epochs = fit(adata, table, name, variant, seed)
    seconds = time.process_time() - start
    package = "scyan" if variant == "original" else "cellweave"
    record = {"data": name, "variant": variant, "seed": seed, "epochs": epochs, "cpu_s": round(seconds, 1)}
    save(folder, {**record, "version": f"{package} {version(package)}", **scores(adata, table, predicted)})


def _original(adata: Any, table: pd.DataFrame, name: str, variant: str, seed: int) -> tuple[np.ndarray, int]:
    import lightning
    import scyan

    lightning.seed_everything(seed, verbose=False)
    model = scyan.Scyan(adata, table, batch_key=DATASETS[name][2])
    model.fit(enable_progress_bar=False, enable_model_summary=False)
    return np.asarray(model.predict(log_prob_th=-np.inf), dtype=str), int(model.trainer.current_epoch)


def _ours(adata: Any, table: pd.DataFrame, name: str, variant: str, seed: int) -> tuple[np.ndarray, int]:
    import cellweave as cw

    cw.settings.seed = seed
    labels_key = None
    if variant.endswith("labels per population"):
        labels_key = "given"
        adata.obs[labels_key] = few_labels(adata, table, seed)
    batch_key = DATASETS[name][2]
    cw.model.ScyanModel.setup_anndata(adata, batch_key=batch_key, labels_key=labels_key, unlabeled_category=UNLABELLED)
    arguments, training = VARIANTS[variant]
    model = cw.model.ScyanModel(adata, table, **arguments)
    if variant == "published settings":
        training = {**training, "max_epochs": DATASETS[name][4]}
    if "max_epochs" in training and variant != "published settings":
        training = {**training, "max_epochs": training["max_epochs"] * model._steps(None, None, None, 200_000)[1]}
    model.train(accelerator="cpu", enable_progress_bar=False, **training)
    predicted = model.predict(log_density_threshold=-np.inf)
    return predicted.to_numpy(dtype=str), len(model.history["train_loss"])


def few_labels(adata: Any, table: pd.DataFrame, seed: int) -> np.ndarray:
    """The label of five random cells of every population of the table; all others are not labelled."""
    rng = np.random.default_rng(seed)
    labels = adata.obs["cell_type"].to_numpy()
    given = np.full(len(labels), UNLABELLED, dtype=object)
    for population in table.index:
        cells = np.flatnonzero(labels == population)
        chosen = rng.permutation(cells)[:LABELLED]
        given[chosen] = population
    return given


def scores(adata: Any, table: pd.DataFrame, predicted: np.ndarray) -> dict[str, float]:
    """Scores over the cells whose label is in the table."""
    from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score

    labels = adata.obs["cell_type"].to_numpy()
    known = np.isin(labels, table.index)
    labels, predicted = labels[known], predicted[known]
    return {
        "f1_macro": float(f1_score(labels, predicted, labels=np.unique(labels), average="macro", zero_division=0)),
        "balanced_accuracy": float(balanced_accuracy_score(labels, predicted)),
        "accuracy": float(accuracy_score(labels, predicted)),
    }


def baselines(folder: Path, name: str) -> None:
    """The table alone, and a Gaussian mixture started at it."""
    import cellweave as cw

    if any(r["data"] == name and r["variant"] == "no flow" for r in results(folder)):
        return
    adata, table = read(folder, name)
    adata.obs["cell_type"] = adata.obs["cell_type"].astype("category")
    frame = cw.tl.evaluate_annotation(adata, "cell_type", prediction_keys=(), table=table)
    for label, row in frame.iterrows():
        variant = "no flow" if "prior" in str(label).lower() else "Gaussian mixture"
        save(
            folder,
            {
                "data": name,
                "variant": variant,
                "seed": 0,
                **{m: float(row["macro_f1" if m == "f1_macro" else m]) for m in METRICS},
            },
        )


# ---------------------------------------------------------------- new samples and batch correction


def new_samples(folder: Path) -> None:
    """Train on five samples and predict the sixth, each in turn; mixing of samples and scores with and without batches."""
    from scib_metrics import ilisi_knn
    from scib_metrics.nearest_neighbors import pynndescent

    import cellweave as cw

    adata, table = read(folder, "multicenter")
    samples = adata.obs["sample"].to_numpy()
    for sample in np.unique(samples):
        cw.settings.seed = 0
        train, query = adata[samples != sample].copy(), adata[samples == sample].copy()
        cw.model.ScyanModel.setup_anndata(train)
        model = cw.model.ScyanModel(train, table)
        model.train(accelerator="cpu", enable_progress_bar=False)
        predicted = model.predict(query, log_density_threshold=-np.inf).to_numpy(dtype=str)
        save(folder, {"data": "new sample", "variant": sample, "seed": 0, **scores(query, table, predicted)})
    cw.model.ScyanModel.setup_anndata(adata, batch_key="sample")
    rows = np.random.default_rng(0).permutation(adata.n_obs)[:20_000]
    for seed in (0, 1, 2):
        cw.settings.seed = seed
        model = cw.model.ScyanModel(adata, table)
        model.train(accelerator="cpu", enable_progress_bar=False)
        predicted = model.predict(log_density_threshold=-np.inf).to_numpy(dtype=str)
        spaces = {"measured": adata[:, table.columns].X, "corrected": model.correct_batch().to_numpy()}
        spaces["latent"] = model.get_latent_representation().to_numpy()
        mixing = {
            f"ilisi_{space}": float(ilisi_knn(pynndescent(np.asarray(values)[rows], 90), samples[rows]))
            for space, values in spaces.items()
        }
        save(
            folder,
            {"data": "batches", "variant": "batch_key", "seed": seed, **scores(adata, table, predicted), **mixing},
        )


# ---------------------------------------------------------------- results


def results(folder: Path) -> list[dict[str, Any]]:
    """All lines so far."""
    path = folder / "annotation.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def save(folder: Path, record: dict[str, Any]) -> None:
    """Add a line."""
    with (folder / "annotation.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
    print(json.dumps(record))


def table(folder: Path) -> str:
    """All results as Markdown: mean and standard deviation over seeds."""
    frame = pd.DataFrame(results(folder))
    lines = ["# Annotation: accuracy on labelled cytometry data", ""]
    lines += [
        "Command: see the head of `benchmarks/annotation.py`. " + "; ".join(sorted(frame["version"].dropna().unique())),
        "",
    ]
    order = ["original", *VARIANTS, "no flow", "Gaussian mixture"]
    for name in DATASETS:
        lines += [f"## {name}", "", "| method | seeds | macro F1 | balanced accuracy | accuracy | epochs | CPU-s |"]
        lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
        rows = frame[frame["data"] == name]
        for variant in [v for v in order if v in set(rows["variant"])]:
            of = rows[rows["variant"] == variant]
            cells = [
                f"{of[m].mean():.3f} ± {of[m].std(ddof=1):.3f}" if len(of) > 1 else f"{of[m].mean():.3f}"
                for m in METRICS
            ]
            timing = [f"{of[k].mean():.0f}" if of[k].notna().any() else "" for k in ("epochs", "cpu_s")]
            lines.append(f"| {variant} | {len(of)} | " + " | ".join([*cells, *timing]) + " |")
        lines.append("")
    lines += [NOTES]
    unseen, mixing = frame[frame["data"] == "new sample"], frame[frame["data"] == "batches"]
    if len(unseen):
        lines += ["## New samples", "", "Multi-centre: trained on five samples, the sixth predicted.", ""]
        lines += ["| sample | macro F1 | accuracy |", "| --- | --- | --- |"]
        lines += [f"| {r.variant} | {r.f1_macro:.3f} | {r.accuracy:.3f} |" for r in unseen.itertuples()] + [""]
    if len(mixing):
        keys = [k for k in mixing if k.startswith("ilisi") and mixing[k].notna().any()]
        lines += ["## Batches", "", "Multi-centre with `batch_key`; iLISI (scib-metrics, 0 to 1) of 20,000 cells.", ""]
        lines += ["| seed | macro F1 | " + " | ".join(keys) + " |", "| --- | --- |" + " --- |" * len(keys)]
        lines += [
            f"| {r['seed']} | {r['f1_macro']:.3f} | " + " | ".join(f"{r[k]:.3f}" for k in keys) + " |"
            for _, r in mixing.iterrows()
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=["prepare", "run", "baselines", "new-samples", "table"])
    parser.add_argument("data", nargs="?", choices=DATASETS)
    parser.add_argument("variant", nargs="?", choices=["original", *VARIANTS])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.command == "prepare":
        prepare(args.folder)
    elif args.command == "run":
        run(args.folder, args.data, args.variant, args.seed)
    elif args.command == "baselines":
        for name in DATASETS:
            baselines(args.folder, name)
    elif args.command == "new-samples":
        new_samples(args.folder)
    else:
        text = table(args.folder)
        args.output.write_text(text) if args.output else sys.stdout.write(text)


if __name__ == "__main__":
    main()
