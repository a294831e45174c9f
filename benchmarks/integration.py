"""Integration benchmark: does an embedding remove batch effects and keep cell types?

The protocol is fixed, so that rows can be compared across package versions:

* cells whose label has fewer than 30 cells are dropped (``pbmc_multistudy`` also drops ``label_conf < 0.5``);
* ``X = log1p(1e4 * count / row sum)``; files with more than 2 000 genes keep 2 000 highly variable genes
  (``scanpy.pp.highly_variable_genes``, flavor ``seurat``, chosen per batch); the counts of the same genes stay in
  ``layers["counts"]``;
* PCA has 30 components on the centred, unscaled ``X``; Harmony runs with its defaults on these components; scVI and Stack
  are fitted on the counts;
* scores are the raw scib-metrics table (:func:`cellweave.tl.integration_scores`): no min-max scaling, so that the
  score of one method does not depend on which other methods are in the table.

Every step writes into the work folder and skips what is already there, so that methods can be run one at a time::

    export CELLWEAVE_DATA=<folder with the .h5ad files> OMP_NUM_THREADS=1
    python benchmarks/integration.py prepare worm_embryo_neurons
    python benchmarks/integration.py run worm_embryo_neurons pca
    python benchmarks/integration.py run worm_embryo_neurons scvi-1x10-200ep --seed 1
    python benchmarks/integration.py score worm_embryo_neurons
    python benchmarks/integration.py table --output benchmarks/results/integration.md

``OMP_NUM_THREADS=1`` makes the CPU seconds comparable between methods; the thread count is recorded beside each fit.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, is_dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import pandas as pd
import typer
from _integration_table import group_runs, render

if TYPE_CHECKING:
    from anndata import AnnData

SEEDS = (0, 1, 2)
N_TOP_GENES = 2000
N_PCS = 30
MIN_LABEL_CELLS = 30
BATCH_KEY = "batch"
LABEL_KEY = "label"
PRE_INTEGRATED = "pca"


@dataclass(frozen=True)
class Dataset:
    """One data set of the benchmark: which column is the label, and which cells are not trusted."""

    label_column: str = "cell_type"
    min_label_conf: float | None = None


DATASETS: dict[str, Dataset] = {
    "pbmc_multistudy": Dataset(label_column="cell_type_l1", min_label_conf=0.5),
    "kang_ctrl_8donors": Dataset(),
    "worm_embryo_neurons": Dataset(),
}


@dataclass(frozen=True)
class StackConfig:
    """One named Stack model.

    Parameters
    ----------
    model
        Keyword arguments of ``StackModel`` (sizes, mask rates, loss weights, ``batch_condition``).
    train
        Keyword arguments of ``StackModel.train``, for all data sets.
    train_by_dataset
        Keyword arguments of ``StackModel.train`` that replace those of ``train`` on one data set.
    context_key
        ``obs`` column whose values keep the contexts apart, or None for contexts drawn from all cells.
    use_batch
        Whether the batch column is registered with the model (needed for any batch condition).
    """

    model: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    train_by_dataset: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    context_key: str | None = None
    use_batch: bool = True

    def train_kwargs(self, dataset: str) -> dict[str, Any]:
        """Keyword arguments of ``train`` for one data set."""
        return {**self.train, **self.train_by_dataset.get(dataset, {})}


# One size and one training recipe for all variants, so that a row differs from the next in what its name says. Epochs
# are by data set, because the number of cells differs: 3 000 to 7 000 steps each.
_SIZE = {"n_hidden": 16, "token_dim": 8, "n_layers": 2, "n_cells": 64}
_TRAIN = {"batch_size": 128, "lr": 1e-3, "accelerator": "cpu"}
_EPOCHS = {
    "pbmc_multistudy": {"max_epochs": 60},
    "kang_ctrl_8donors": {"max_epochs": 40},
    "worm_embryo_neurons": {"max_epochs": 200},
}


def _stack(context_key: str | None = None, **model: Any) -> StackConfig:
    return StackConfig(model={**_SIZE, **model}, train=_TRAIN, train_by_dataset=_EPOCHS, context_key=context_key)


_NORMALIZED = {"normalize_input": True}
_INTEGRATED = {**_NORMALIZED, "batch_condition": "both", "sw_weight": 1.0}

STACK_CONFIGS: dict[str, StackConfig] = {
    # the published model and loss weights: raw log counts in, no notion of a batch
    "stack-published": _stack(sw_weight=0.01),
    # depth-normalised input, and a decoder that knows the batch
    "stack-decoder": _stack(**_NORMALIZED, batch_condition="decoder", sw_weight=0.01),
    # encoder and decoder know the batch, and the embedding is pulled towards a standard normal: weakly, strongly
    "stack-both-sw0.1": _stack(**{**_INTEGRATED, "sw_weight": 0.1}),
    "stack-integrated": _stack(**_INTEGRATED),
    # as the last, with contexts that keep batches apart
    "stack-integrated-separate": _stack(context_key=BATCH_KEY, **_INTEGRATED),
}
# Context assignments that are averaged in the embedding.
N_CONTEXT_REPEATS = 8


@dataclass
class Fit:
    """What a method returns: the embedding (cells x dimensions), the cost of the fit and what else is worth a row."""

    embedding: np.ndarray
    cpu_s: float
    wall_s: float
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class Clock:
    """CPU seconds of this process (all threads) and wall seconds of one block."""

    cpu_s: float = 0.0
    wall_s: float = 0.0


@contextmanager
def timed() -> Iterator[Clock]:
    """Measure the block and fill the clock when it ends."""
    clock, cpu, wall = Clock(), time.process_time(), time.perf_counter()
    yield clock
    clock.cpu_s, clock.wall_s = time.process_time() - cpu, time.perf_counter() - wall


# --- the protocol -----------------------------------------------------------------------------------------------------


def filter_labels(adata: AnnData, dataset: Dataset) -> AnnData:
    """Keep trusted cells of labels with enough cells; the label goes to ``obs["label"]``."""
    if dataset.min_label_conf is not None:
        adata = adata[adata.obs["label_conf"].to_numpy() >= dataset.min_label_conf]
    label = adata.obs[dataset.label_column].astype(str)
    kept = label.map(label.value_counts()).to_numpy() >= MIN_LABEL_CELLS
    adata = adata[kept].copy()
    adata.obs[LABEL_KEY] = pd.Categorical(label[kept])
    adata.obs[BATCH_KEY] = pd.Categorical(adata.obs[BATCH_KEY].astype(str))
    return adata


def normalize_and_select(adata: AnnData) -> AnnData:
    """Counts to a layer, log-normalised values to X, then the highly variable genes of files with many genes."""
    import scanpy as sc

    adata.layers["counts"] = adata.X.copy()
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    if adata.n_vars > N_TOP_GENES:
        sc.pp.highly_variable_genes(adata, n_top_genes=N_TOP_GENES, flavor="seurat", batch_key=BATCH_KEY)
        adata = adata[:, adata.var["highly_variable"].to_numpy()].copy()
    return adata


def prepare_dataset(name: str) -> AnnData:
    """Read one data set and apply the protocol; the result holds only what the methods and the scores need."""
    import anndata

    from cellweave import datasets

    raw = getattr(datasets, name)()
    adata = normalize_and_select(filter_labels(raw, DATASETS[name]))
    obs = adata.obs[[BATCH_KEY, LABEL_KEY]]
    return anndata.AnnData(adata.X, obs=obs, var=adata.var[[]], layers={"counts": adata.layers["counts"]})


# --- methods ----------------------------------------------------------------------------------------------------------


def fit_pca(adata: AnnData, dataset: str, seed: int) -> Fit:
    """Thirty principal components of the centred, unscaled log-normalised values."""
    import scanpy as sc

    with timed() as clock:
        embedding = sc.pp.pca(adata.X, n_comps=N_PCS, random_state=seed, return_info=False)
    return Fit(np.asarray(embedding), clock.cpu_s, clock.wall_s)


def fit_harmony(adata: AnnData, dataset: str, seed: int) -> Fit:
    """Harmony with its defaults on the principal components of seed 0; only Harmony itself is timed."""
    import harmonypy

    pcs = fit_pca(adata, dataset, 0).embedding
    with timed() as clock:
        result = harmonypy.run_harmony(pcs, adata.obs, BATCH_KEY, random_state=seed, ncores=1, verbose=False)
    corrected = np.asarray(result.Z_corr)
    # harmonypy 0.x returned components x cells, 2.x returns cells x components
    corrected = corrected if corrected.shape == pcs.shape else corrected.T
    return Fit(corrected, clock.cpu_s, clock.wall_s)


def fit_scvi(adata: AnnData, dataset: str, seed: int, *, n_layers: int, n_latent: int, max_epochs: int) -> Fit:
    """Fit scVI with 128 hidden units and a negative binomial likelihood, without early stopping."""
    import scvi

    scvi.settings.seed = seed
    adata = adata.copy()
    scvi.model.SCVI.setup_anndata(adata, layer="counts", batch_key=BATCH_KEY)
    model = scvi.model.SCVI(adata, n_hidden=128, n_latent=n_latent, n_layers=n_layers, gene_likelihood="nb")
    with timed() as clock:
        model.train(max_epochs=max_epochs, batch_size=256, early_stopping=False, **_QUIET)
    return Fit(model.get_latent_representation(), clock.cpu_s, clock.wall_s)


_QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "logger": False}


def fit_stack(adata: AnnData, dataset: str, seed: int, *, config: StackConfig) -> Fit:
    """Fit a Stack model and measure how well it fills masked genes in the cells it was not trained on."""
    import cellweave as cw

    cw.settings.seed = seed
    adata = adata.copy()
    keys = {"batch_key": BATCH_KEY if config.use_batch else None, "context_key": config.context_key}
    cw.model.StackModel.setup_anndata(adata, layer="counts", **keys)
    model = cw.model.StackModel(adata, **config.model)
    with timed() as clock:
        model.train(**{"enable_progress_bar": False, **config.train_kwargs(dataset)})
    with timed() as embed:
        embedding = model.get_latent_representation(n_context_repeats=N_CONTEXT_REPEATS)
    extra = {"embed_cpu_s": embed.cpu_s, "n_parameters": _n_parameters(model)}
    return Fit(embedding, clock.cpu_s, clock.wall_s, extra | {"held_out": _held_out_metrics(model)})


def _n_parameters(model: Any) -> int:
    return sum(p.numel() for p in model.module.parameters())


def _held_out_metrics(model: Any) -> dict[str, float]:
    """Reconstruction of masked genes in validation cells; empty when the configuration held out no cell."""
    held_out = model.validation_indices
    if held_out is None or len(held_out) == 0:
        return {}
    frame = model.get_reconstruction_metrics(indices=held_out)  # rows: the model and its baseline
    cells = ((row, metric, frame.loc[row, metric]) for metric in frame.columns for row in frame.index)
    return {f"{metric}, {row}": float(value) for row, metric, value in cells if np.isfinite(value)}


def _scvi(n_layers: int, n_latent: int, max_epochs: int) -> Callable[..., Fit]:
    return partial(fit_scvi, n_layers=n_layers, n_latent=n_latent, max_epochs=max_epochs)


METHODS: dict[str, Callable[..., Fit]] = {
    "pca": fit_pca,
    "harmony": fit_harmony,
    "scvi-1x10-40ep": _scvi(1, 10, 40),
    "scvi-1x10-50ep": _scvi(1, 10, 50),
    "scvi-1x10-200ep": _scvi(1, 10, 200),
    "scvi-2x30-100ep": _scvi(2, 30, 100),
    **{name: partial(fit_stack, config=config) for name, config in STACK_CONFIGS.items()},
}


def method_config(method: str) -> dict[str, Any]:
    """The settings of a method as they are stored beside its embedding, to notice when they change."""
    settings = getattr(METHODS[method], "keywords", {})
    return json.loads(json.dumps({key: asdict(v) if is_dataclass(v) else v for key, v in settings.items()}))


# --- the work folder --------------------------------------------------------------------------------------------------


def default_work() -> Path:
    """Cache folder of the user, outside the repository."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "cellweave" / "benchmarks" / "integration"


def write_fit(folder: Path, stem: str, fit: Fit, record: Mapping[str, Any]) -> None:
    """Write ``stem.npz`` with the embedding and ``stem.json`` with its cost; the .npz comes last and marks success."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {**record, "cpu_s": fit.cpu_s, "wall_s": fit.wall_s, **fit.extra, "environment": environment()}
    _write_json(folder / f"{stem}.json", record)
    partial_file = folder / f".{stem}.npz"
    np.savez_compressed(partial_file, embedding=fit.embedding.astype(np.float32))
    partial_file.rename(folder / f"{stem}.npz")


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, default=str) + "\n")


def environment() -> dict[str, str]:
    """Versions and thread count that a reader needs in order to repeat a run."""
    packages = ("torch", "scvi-tools", "scanpy", "scib-metrics", "harmonypy", "cellweave")
    versions = {package: found for package in packages if (found := _version(package))}
    return {"python": platform.python_version(), "threads": os.environ.get("OMP_NUM_THREADS", "unset"), **versions}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def is_current(record: Mapping[str, Any]) -> bool:
    """Whether a stored embedding belongs to the settings that this script has now."""
    return record["method"] in METHODS and record["config"] == method_config(record["method"])


def load_prepared(work: Path, dataset: str) -> AnnData:
    """Read the prepared data set, or say which step is missing."""
    import anndata

    path = work / dataset / "prepared.h5ad"
    if not path.exists():
        raise typer.BadParameter(f"{dataset} is not prepared in {work}: run the step 'prepare {dataset}' first.")
    return anndata.read_h5ad(path)


def pending_embeddings(folder: Path) -> list[Path]:
    """Embeddings without a score, narrowest first, because scib-metrics compiles its kernels once per width."""
    paths = [path for path in sorted((folder / "embeddings").glob("*.npz")) if not path.name.startswith(".")]
    todo = [path for path in paths if not (folder / "scores" / f"{path.stem}.json").exists()]
    return sorted(todo, key=lambda path: np.load(path)["embedding"].shape[1])


def score_embedding(adata: AnnData, embedding: np.ndarray) -> dict[str, float]:
    """Raw scib-metrics scores of one embedding against the unintegrated principal components."""
    from cellweave.tl import integration_scores

    adata.obsm["embedding"] = embedding
    table = integration_scores(adata, ["embedding"], BATCH_KEY, LABEL_KEY, pre_integrated_key=PRE_INTEGRATED)
    return {column: float(value) for column, value in table.loc["embedding"].items()}


# --- the results ------------------------------------------------------------------------------------------------------


def collect_runs(work: Path) -> list[dict[str, Any]]:
    """One record per scored embedding of the present configuration: data set, method, seed, scores, cost."""
    runs = []
    for path in sorted(work.glob("*/scores/*.json")):
        record = json.loads((path.parent.parent / "embeddings" / path.name).read_text())
        if is_current(record):
            runs.append({**record, "scores": json.loads(path.read_text())["scores"]})
        else:
            typer.echo(f"left out, its configuration has changed: {path}", err=True)
    return runs


# --- command line -----------------------------------------------------------------------------------------------------

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False)
Work = Annotated[Path, typer.Option(help="Folder for prepared data, embeddings and scores.")]


def _check(value: str, allowed: Mapping[str, Any], kind: str) -> str:
    if value not in allowed:
        raise typer.BadParameter(f"unknown {kind} '{value}'; choose one of {', '.join(allowed)}.")
    return value


@app.command()
def prepare(dataset: str, work: Work = default_work(), force: bool = False) -> None:
    """Apply the protocol to one data set and store the result."""
    path = work / _check(dataset, DATASETS, "data set") / "prepared.h5ad"
    if path.exists() and not force:
        return typer.echo(f"{dataset}: already prepared")
    path.parent.mkdir(parents=True, exist_ok=True)
    adata = prepare_dataset(dataset)
    adata.write_h5ad(path, compression="gzip")
    typer.echo(
        f"{dataset}: {adata.n_obs} cells x {adata.n_vars} genes, "
        f"{adata.obs[BATCH_KEY].nunique()} batches, {adata.obs[LABEL_KEY].nunique()} labels"
    )


@app.command()
def run(dataset: str, method: str, seed: int = 0, work: Work = default_work(), force: bool = False) -> None:
    """Fit one method with one seed and store its embedding."""
    _check(dataset, DATASETS, "data set")
    fitter = METHODS[_check(method, METHODS, "method")]
    folder, stem = work / dataset / "embeddings", f"{method}_seed{seed}"
    if (folder / f"{stem}.npz").exists() and not force:
        if is_current(json.loads((folder / f"{stem}.json").read_text())):
            return typer.echo(f"{dataset} {stem}: already there")
        typer.echo(f"{dataset} {stem}: the configuration has changed, fitting again")
    fit = fitter(load_prepared(work, dataset), dataset, seed)
    write_fit(folder, stem, fit, {"dataset": dataset, "method": method, "seed": seed, "config": method_config(method)})
    (work / dataset / "scores" / f"{stem}.json").unlink(missing_ok=True)  # the score of a replaced embedding is stale
    typer.echo(f"{dataset} {stem}: {fit.cpu_s:.1f} CPU-s, {fit.wall_s:.1f} s wall, {fit.embedding.shape[1]} dimensions")


@app.command()
def score(dataset: str, work: Work = default_work()) -> None:
    """Score every embedding of one data set that has no score yet."""
    folder = work / _check(dataset, DATASETS, "data set")
    adata = load_prepared(work, dataset)
    reference = folder / "embeddings" / f"{PRE_INTEGRATED}_seed0.npz"
    if not reference.exists():
        raise typer.BadParameter(f"the unintegrated embedding is missing: run the step 'run {dataset} pca' first.")
    adata.obsm[PRE_INTEGRATED] = np.load(reference)["embedding"]
    for path in pending_embeddings(folder):
        with timed() as clock:
            scores = score_embedding(adata, np.load(path)["embedding"])
        _write_json(folder / "scores" / f"{path.stem}.json", {"scores": scores, "score_cpu_s": clock.cpu_s})
        typer.echo(f"{dataset} {path.stem}: total {scores['total']:.3f} ({clock.cpu_s:.0f} CPU-s)")


@app.command()
def table(
    work: Work = default_work(), output: Annotated[Path | None, typer.Option(help="Markdown file.")] = None
) -> None:
    """Print the result table, or write it to a file."""
    runs = collect_runs(work)
    if not runs:
        raise typer.BadParameter(f"no scores in {work}: run the steps 'prepare', 'run' and 'score' first.")
    command = "python benchmarks/integration.py table" + (f" --output {output}" if output else "")
    text = render(group_runs(runs, DATASETS, METHODS), command)
    if output is None:
        return typer.echo(text)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text)


@app.command()
def methods() -> None:
    """List the data sets and methods."""
    typer.echo("data sets: " + ", ".join(DATASETS) + "\nmethods: " + ", ".join(METHODS))


if __name__ == "__main__":
    app()
