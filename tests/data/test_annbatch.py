"""annbatch as a reader: the order of cells and the results stay ours. Needs Python 3.12 and the extra `scale`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scvi
import torch
import zarr

import cellweave as cw
from cellweave.data import CellSetLoader
from cellweave.model import StackModel


@pytest.fixture(scope="module")
def collection(make_adata, tmp_path_factory) -> Path:
    """Two data sets of an annbatch collection."""
    annbatch = pytest.importorskip("annbatch", reason="annbatch needs Python 3.12 and the extra `scale`")
    folder = tmp_path_factory.mktemp("annbatch")
    for i in range(2):
        make_adata(n_cells=150, seed=i).write_h5ad(folder / f"{i}.h5ad")
    made = annbatch.DatasetCollection(zarr.open_group(folder / "c.zarr", mode="w"))
    made.add_adatas(
        [folder / "0.h5ad", folder / "1.h5ad"], dataset_size=160, shuffle_chunk_size=10, rng=np.random.default_rng(0)
    )
    return folder / "c.zarr"


def _loader(store, **options) -> CellSetLoader:
    StackModel.setup_anndata(store, context_key="donor")
    manager = StackModel._get_most_recent_anndata_manager(store)
    blocks = {"block_size": 16, "buffer_size": 64}
    return CellSetLoader(manager, n_cells=8, batch_size=16, shuffle=True, seed=1, **blocks, **options)


def test_collections_are_opened_without_annbatch(collection):
    """Protects the plain reader: the data sets of a collection are the cells of one store."""
    store = cw.io.open_store(collection)
    assert store.shape == (300, 20)
    parts = [zarr.open_group(folder)["X"].attrs["shape"][0] for folder in sorted(collection.glob("dataset_*"))]
    assert sum(parts) == 300
    assert len(parts) > 1


@pytest.mark.parametrize("sparse", [False, True])
def test_batches_equal_those_of_the_block_reader(collection, sparse):
    """Protects results from the choice of the reader: every batch of two epochs, also from inside an epoch."""
    loaders = [
        _loader(cw.io.open_store(collection, backend=backend), load_sparse_tensor=sparse)
        for backend in ("blocks", "annbatch")
    ]
    for epoch, start in ((0, 0), (1, 5)):
        for loader in loaders:
            loader.sampler.set_epoch(epoch)
            loader.sampler.start_batch = start
        ours, theirs = map(list, loaders)
        assert len(ours) == len(theirs) == len(loaders[0]) - start
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a["row"], b["row"])
            assert torch.equal(a["valid"], b["valid"])
            dense = [x["X"].to_dense() if sparse else x["X"] for x in (a, b)]
            assert torch.equal(*dense)


def test_training_equals_that_of_the_block_reader(collection, tiny, quick):
    """Protects models: the same weights and embedding from both readers."""
    results = []
    for backend in ("blocks", "annbatch"):
        scvi.settings.seed = 0
        store = cw.io.open_store(collection, backend=backend)
        StackModel.setup_anndata(store, context_key="donor")
        model = StackModel(store, **tiny)
        model.train(**quick)
        results.append(model.get_latent_representation())
    np.testing.assert_array_equal(*results)


def test_only_collections_are_read_by_annbatch(make_adata, tmp_path):
    """Protects from a reader that would not find its files."""
    make_adata().write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(ValueError, match="reads the `X` of one annbatch collection; use `backend='blocks'`"):
        cw.io.open_store(tmp_path / "a.h5ad", backend="annbatch")
    with pytest.raises(ValueError, match="`backend` must be 'blocks' or 'annbatch', got 'zarr'"):
        cw.io.open_store(tmp_path / "a.h5ad", backend="zarr")


def test_missing_annbatch_is_named(make_adata, tmp_path, monkeypatch):
    """Protects users without the extra: one sentence that says what to install and what works without it."""
    import sys

    for i in range(2):
        (tmp_path / "c.zarr").mkdir(exist_ok=True)
        make_adata(seed=i).write_zarr(tmp_path / "c.zarr" / f"dataset_{i}")
    monkeypatch.setitem(sys.modules, "annbatch", None)
    with pytest.raises(ImportError, match=r"needs the package annbatch.*`pip install 'cellweave\[scale\]'`"):
        cw.io.open_store(tmp_path / "c.zarr", backend="annbatch")
