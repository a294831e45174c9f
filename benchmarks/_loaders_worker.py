"""Measure one loader, or prepare its files, in a process of its own; prints one JSON line. Started by ``loaders.py``."""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

BATCH, N_GENES, N_DRAWN = 1024, 5000, 503
warnings.simplefilter("ignore")


def main() -> None:
    """Run one task."""
    parser = argparse.ArgumentParser()
    parser.add_argument("task", choices=["prepare", "prepare many", "train", *LOADERS])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--cells", type=int, default=200_000)
    parser.add_argument("--limit", type=int, default=0, help="stop a pass after this many batches")
    args = parser.parse_args()
    tasks = {"prepare": prepare, "prepare many": prepare_many, "train": train}
    if args.task in tasks:
        print(json.dumps(tasks[args.task](args.folder, args.cells)))
    else:
        print(json.dumps(measure(LOADERS[args.task], args.folder, args.cells, args.limit)))


# ---------------------------------------------------------------- files


def prepare(folder: Path, n_cells: int) -> dict[str, float]:
    """Write the same counts in every format; those that are there are kept."""
    import anndata as ad

    import cellweave as cw

    folder.mkdir(parents=True, exist_ok=True)
    plain = folder / f"plain-{n_cells}.h5ad"
    if not plain.exists():
        _simulated(n_cells).write_h5ad(plain)
    seconds = {}
    for compression in ("none", "lz4", "zstd") if n_cells <= 200_000 else ():
        target = folder / f"{compression}-{n_cells}.zarr"
        if not target.exists():
            start = time.process_time()
            cw.pp.write_store(plain, target, compression=compression)
            seconds[compression] = time.process_time() - start
    if n_cells <= 200_000:
        adata = ad.read_h5ad(plain)
        gzip, shards = folder / f"gzip-{n_cells}.h5ad", folder / f"shards-{n_cells}"
        if not gzip.exists():
            adata.write_h5ad(gzip, compression="gzip")
        if not shards.exists():
            shutil.rmtree(shards, ignore_errors=True)
            shards.mkdir()
            for i, rows in enumerate(np.array_split(np.arange(n_cells), 20)):
                adata[rows].copy().write_h5ad(shards / f"shard_{i:03d}.h5ad")
    return {"write_store_cpu_s": seconds, "bytes": {p.name: _size(p) for p in sorted(folder.iterdir())}}


def prepare_many(folder: Path, n_cells: int) -> dict[str, float]:
    """Write a store of more cells than fit into the memory goal, from files of 50 000 cells; peak memory of the writing."""
    import cellweave as cw

    shards, target = folder / f"many-{n_cells}", folder / f"many-{n_cells}.zarr"
    shards.mkdir(parents=True, exist_ok=True)
    paths = [shards / f"{i:03d}.h5ad" for i in range(-(-n_cells // 50_000))]
    for seed, path in enumerate(paths):
        if not path.exists():
            _simulated(50_000, n_genes=1000, n_drawn=105, seed=seed).write_h5ad(path)
    start = time.process_time()
    if not target.exists():
        cw.pp.write_store(paths, target, group_by="donor")
    return {"write_store_cpu_s": time.process_time() - start, "peak_mb": _peak_memory(), "bytes": _size(target)}


def _simulated(n_cells: int, n_genes: int = N_GENES, n_drawn: int = N_DRAWN, seed: int = 0) -> Any:
    """Counts of which about one in ten is not zero, and eight groups of cells."""
    import anndata as ad
    import pandas as pd
    import scipy.sparse as sp

    rng = np.random.default_rng(seed)
    blocks = []
    for start in range(0, n_cells, 50_000):
        n = min(50_000, n_cells - start)
        indices = np.sort(rng.integers(n_genes, size=(n, n_drawn), dtype=np.int32), axis=1)
        data = rng.geometric(0.5, size=indices.size).astype(np.float32)
        block = sp.csr_matrix((data, indices.ravel(), np.arange(0, indices.size + 1, n_drawn)), shape=(n, n_genes))
        block.sum_duplicates()
        blocks.append(block)
    donor = pd.Categorical.from_codes(rng.integers(8, size=n_cells), [f"donor{i}" for i in range(8)])
    obs = pd.DataFrame({"donor": donor}, index=[f"{seed}-{i}" for i in range(n_cells)])
    var = pd.DataFrame(index=[f"gene{i}" for i in range(n_genes)])
    return ad.AnnData(sp.vstack(blocks, format="csr"), obs=obs, var=var)


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(p.stat().st_size for p in files)


# ---------------------------------------------------------------- loaders


def measure(make: Callable[[Path, int], Iterable[Any]], folder: Path, n_cells: int, limit: int) -> dict[str, float]:
    """Cells per CPU second of the second pass, and the peak memory that the loader adds to the imports."""
    import torch

    torch.set_num_threads(1)
    loader, size_of = make(folder, n_cells), lambda batch: len(batch["x_ng"] if "x_ng" in batch else batch["X"])
    before = IMPORTED["mb"]
    for n_pass in range(2):
        start, wall, n = time.process_time(), time.perf_counter(), 0
        for i, batch in enumerate(loader):
            n += size_of(batch)
            if i + 1 == (min(limit, 20) if n_pass == 0 and limit else limit):
                break
        seconds, wall = time.process_time() - start, time.perf_counter() - wall
    return {
        "cells_per_cpu_s": n / seconds,
        "cells_per_s": n / wall,
        "memory_mb": _peak_memory() - before,
        "cells": n,
    }


IMPORTED = {"mb": 0.0}


def _imported() -> None:
    """Remember the memory of the process once everything is imported."""
    IMPORTED["mb"] = _peak_memory()


def _scvi(name: str, backed: bool, **options: Any) -> Callable[[Path, int], Iterable[Any]]:
    def make(folder: Path, n_cells: int) -> Iterable[Any]:
        import anndata as ad
        import scvi
        from scvi.dataloaders import AnnDataLoader

        _imported()
        adata = ad.read_h5ad(folder / f"{name}-{n_cells}.h5ad", backed="r" if backed else None)
        scvi.model.SCVI.setup_anndata(adata)
        manager = scvi.model.SCVI._get_most_recent_anndata_manager(adata)
        return AnnDataLoader(manager, batch_size=BATCH, shuffle=True, **options)

    return make


def _cellweave(name: str, in_memory: bool = False, sparse: bool = False) -> Callable[[Path, int], Iterable[Any]]:
    def make(folder: Path, n_cells: int) -> Iterable[Any]:
        import anndata as ad

        import cellweave as cw
        from cellweave.data import CellSetLoader
        from cellweave.model import StackModel

        _imported()
        path = folder / (name if "." in name else f"{name}.h5ad").replace(".", f"-{n_cells}.")
        adata = ad.read_h5ad(path) if in_memory else cw.io.open_store(path, obs_columns=[])
        StackModel.setup_anndata(adata)
        manager = StackModel._get_most_recent_anndata_manager(adata)
        return CellSetLoader(manager, n_cells=256, batch_size=BATCH, shuffle=True, load_sparse_tensor=sparse)

    return make


def _cellarium(folder: Path, n_cells: int) -> Iterable[Any]:
    from cellarium.ml.data import DistributedAnnDataCollection, IterableDistributedAnnDataCollectionDataset
    from cellarium.ml.utilities.data import AnnDataField, densify

    _imported()
    shards = sorted(str(path) for path in (folder / f"shards-{n_cells}").iterdir())
    collection = DistributedAnnDataCollection(shards, shard_size=n_cells // len(shards), max_cache_size=2)
    return IterableDistributedAnnDataCollectionDataset(
        collection, batch_keys={"x_ng": AnnDataField(attr="X", convert_fn=densify)}, batch_size=BATCH, shuffle=True
    )


LOADERS: dict[str, Callable[[Path, int], Iterable[Any]]] = {
    "scvi memory dense": _scvi("plain", backed=False),
    "scvi memory sparse": _scvi("plain", backed=False, load_sparse_tensor=True),
    "scvi backed gzip": _scvi("gzip", backed=True),
    "cellarium shards": _cellarium,
    "cellweave memory dense": _cellweave("plain", in_memory=True),
    "cellweave memory sparse": _cellweave("plain", in_memory=True, sparse=True),
    "cellweave h5ad dense": _cellweave("plain"),
    "cellweave h5ad sparse": _cellweave("plain", sparse=True),
    "cellweave h5ad gzip": _cellweave("gzip"),
    "cellweave zarr dense": _cellweave("none.zarr"),
    "cellweave zarr lz4 dense": _cellweave("lz4.zarr"),
    "cellweave zarr zstd dense": _cellweave("zstd.zarr"),
}


# ---------------------------------------------------------------- training


def train(folder: Path, n_cells: int) -> dict[str, float]:
    """Train and embed from a zarr store; peak memory of the whole process."""
    import cellweave as cw

    start = time.process_time()
    store = cw.io.open_store(folder / f"many-{n_cells}.zarr", obs_columns=["donor"])
    cw.model.StackModel.setup_anndata(store, context_key="donor")
    model = cw.model.StackModel(store, n_hidden=8, token_dim=4, n_layers=1)
    setup = time.process_time()
    model.train(max_epochs=1, accelerator="cpu", batch_size=BATCH, enable_progress_bar=False)
    trained, after_training = time.process_time(), _peak_memory()
    z = model.get_latent_representation(batch_size=4096)
    return {
        "setup_cpu_s": setup - start,
        "train_cpu_s": trained - setup,
        "embed_cpu_s": time.process_time() - trained,
        "train_peak_mb": after_training,
        "peak_mb": _peak_memory(),
        "finite": bool(np.isfinite(z).all() and z.shape[0] == n_cells),
        "loss": float(model.history["train_loss"].iloc[-1, 0]),
    }


def _peak_memory() -> float:
    """Peak resident memory of this process in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
