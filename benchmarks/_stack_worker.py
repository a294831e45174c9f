"""Measure one implementation of Stack in its own process; prints one JSON line. Started by ``benchmarks/stack.py``.

Both implementations get the same weights, counts, masked genes and random draws, and run the same number of threads.
"""

from __future__ import annotations

import argparse
import json
import pickle
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

MASK_RATE = 0.45


def main() -> None:
    """Run one task of one implementation."""
    parser = argparse.ArgumentParser()
    parser.add_argument("implementation", choices=["cellweave", "original"])
    parser.add_argument("task", choices=["train", "embed"])
    parser.add_argument("--config", type=json.loads, required=True)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    task = train if args.task == "train" else embed
    print(json.dumps(task(args.implementation, args.config, args.precision, args.repeats)))


def train(implementation: str, config: dict, precision: str, repeats: int) -> dict[str, float]:
    """CPU seconds of one optimiser step (median), memory it adds to the loaded model, and the first loss."""
    n_contexts, n_cells = config["n_contexts"], config["model"]["n_cells"]
    module, loss_of = _build(implementation, config)
    counts = _counts(n_contexts * n_cells, config["model"]["n_genes"])
    # fused in float32 as our training plan chooses; the original trains with the default of torch
    fused = implementation == "cellweave" and precision == "float32"
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, weight_decay=3e-3, fused=fused)
    before = _peak_memory()

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            loss = loss_of(counts)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    torch.manual_seed(1)
    first_loss = step()
    seconds = _median_cpu(step, repeats)
    cells = n_contexts * n_cells
    return {
        "cpu_s": seconds,
        "cells_per_cpu_s": cells / seconds,
        "memory_mb": _peak_memory() - before,
        "loss": first_loss,
    }


def embed(implementation: str, config: dict, precision: str, repeats: int) -> dict[str, float]:
    """End to end from an .h5ad on disk: CPU seconds to embed its cells, and a checksum of the embedding."""
    module, _ = _build(implementation, config)
    module.eval()
    cells = config["n_contexts"] * config["model"]["n_cells"]
    before = _peak_memory()
    with tempfile.TemporaryDirectory() as folder:
        path, genes = _write_h5ad(Path(folder), cells, config["model"]["n_genes"])
        prepare = _cellweave_embedder if implementation == "cellweave" else _original_embedder
        run = prepare(module, path, genes, config)
        embedding = run()
        seconds = _median_cpu(run, repeats)
    return {
        "cpu_s": seconds,
        "cells_per_cpu_s": cells / seconds,
        "memory_mb": _peak_memory() - before,
        "loss": float(np.abs(embedding).sum() / embedding.size),
    }


def _cellweave_embedder(module: torch.nn.Module, path: str, genes: list[str], config: dict) -> Callable[[], np.ndarray]:
    import anndata

    from cellweave.model import StackModel

    adata = anndata.read_h5ad(path)
    StackModel.setup_anndata(adata)
    model = StackModel(adata, **_model_arguments(config))
    model.module, model.is_trained = module, True
    batch_size = config["n_contexts"] * config["model"]["n_cells"]
    options = {"contexts": "sequential", "batch_size": batch_size}
    return lambda: model.get_latent_representation(anndata.read_h5ad(path), **options)


def _original_embedder(module: torch.nn.Module, path: str, genes: list[str], config: dict) -> Callable[[], np.ndarray]:
    gene_list = Path(path).with_suffix(".pkl")
    gene_list.write_bytes(pickle.dumps(genes))
    batch_size = config["n_contexts"]
    options = {"batch_size": batch_size, "show_progress": False, "num_workers": 0}
    return lambda: np.asarray(module.get_latent_representation(path, str(gene_list), **options)[0])


def _build(implementation: str, config: dict) -> tuple[torch.nn.Module, Callable[[torch.Tensor], torch.Tensor]]:
    """The module with reproducible weights, and its training loss for flat counts ``(cell, gene)``."""
    arguments = config["model"] | {"dropout": 0.0, "mask_rate_min": MASK_RATE, "mask_rate_max": MASK_RATE}
    n_cells = arguments["n_cells"]
    if implementation == "cellweave":
        from cellweave.module import StackModule

        module = StackModule(**arguments)

        def loss_of(counts: torch.Tensor) -> torch.Tensor:
            return module({"X": counts, "n_cells": n_cells})[2].loss
    else:
        from stack.models import StateICLModel

        module = StateICLModel(**arguments)

        def loss_of(counts: torch.Tensor) -> torch.Tensor:
            return module(counts.view(-1, n_cells, counts.shape[1]))["loss"]

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            scale = 1.0 if parameter.ndim < 2 else parameter.shape[1] ** -0.5
            offset = 1.0 if "_norm.weight" in name else 0.0
            parameter.copy_(offset + 0.1 * scale * torch.randn(parameter.shape, generator=generator))
    return module.train(), loss_of


def _model_arguments(config: dict) -> dict:
    return {key: value for key, value in config["model"].items() if key != "n_genes"}


def _counts(n_cells: int, n_genes: int) -> torch.Tensor:
    """About 10 % non-zero counts, the density of single-cell data."""
    generator = torch.Generator().manual_seed(0)
    rates = 0.2 * torch.rand(n_genes, generator=generator).expand(n_cells, -1)
    return torch.poisson(rates, generator=generator)


def _write_h5ad(folder: Path, n_cells: int, n_genes: int) -> tuple[str, list[str]]:
    import anndata
    import pandas as pd
    import scipy.sparse as sp

    genes = [f"G{i}" for i in range(n_genes)]
    obs = pd.DataFrame({"organism": "Homo sapiens"}, index=[f"c{i}" for i in range(n_cells)])
    adata = anndata.AnnData(sp.csr_matrix(_counts(n_cells, n_genes).numpy()), obs=obs, var=pd.DataFrame(index=genes))
    adata.write_h5ad(folder / "cells.h5ad")
    return str(folder / "cells.h5ad"), genes


def _median_cpu(function: Callable[[], object], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds)


def _peak_memory() -> float:
    """Peak resident memory of this process in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
