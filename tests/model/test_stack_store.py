"""`StackModel` on data that stay on disk: the same weights and results as in memory."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
import scvi
import torch
from anndata import AnnData

from cellweave.data import CellSetLoader
from cellweave.io import open_store
from cellweave.model import StackModel
from cellweave.pp import write_store

SETUP = {"batch_key": "batch", "labels_key": "cell_type", "context_key": "donor"}
# smaller than the data, so that there are several buffers
BLOCKS = {"block_size": 16, "buffer_size": 48}


@pytest.fixture(scope="module")
def adata(make_adata) -> AnnData:
    return make_adata(n_cells=150)


@pytest.fixture(scope="module")
def opened(adata, tmp_path_factory):
    """Function from the kind of a store to the same cells in the same order in it."""

    def store(kind: str) -> AnnData:
        folder = tmp_path_factory.mktemp("stores")  # an HDF5 file that is open cannot be written again
        if kind == "memory":
            return adata.copy()
        if kind == "dask":
            other = adata.copy()
            other.X = pytest.importorskip("dask.array").from_array(adata.X.toarray(), chunks=(40, 20))
            return other
        if kind == "zarr":
            return write_store(adata, folder / "a.zarr", shuffle=False, compression="zstd", overwrite=True)
        if kind == "two_files":
            order = np.random.default_rng(0).permutation(adata.n_vars)
            adata[:70].write_h5ad(folder / "1.h5ad")
            adata[70:, order].write_h5ad(folder / "2.h5ad")
            return open_store([folder / "1.h5ad", folder / "2.h5ad"])
        adata.write_h5ad(folder / f"{kind}.h5ad")
        return open_store(folder / "h5ad.h5ad") if kind == "h5ad" else ad.read_h5ad(folder / "backed.h5ad", backed="r")

    return store


def _fit(adata, tiny, quick, **splitter) -> StackModel:
    scvi.settings.seed = 0
    StackModel.setup_anndata(adata, **SETUP)
    model = StackModel(adata, **tiny)
    model.train(**quick, datasplitter_kwargs={**BLOCKS, **splitter})
    return model


@pytest.fixture(scope="module")
def in_memory(adata, tiny, quick) -> StackModel:
    return _fit(adata.copy(), tiny, quick)


@pytest.mark.parametrize("kind", ["backed", "h5ad", "zarr", "two_files", "dask"])
def test_training_does_not_depend_on_the_storage(in_memory, opened, tiny, quick, kind):
    """Protects reproducibility (R5): bit for bit the weights, losses and embedding of training in memory."""
    model = _fit(opened(kind), tiny, quick)
    for (name, expected), value in zip(
        in_memory.module.state_dict().items(), model.module.state_dict().values(), strict=True
    ):
        assert torch.equal(expected, value), name
    for name, curve in in_memory.history.items():
        np.testing.assert_array_equal(model.history[name].to_numpy(), curve.to_numpy())
    np.testing.assert_array_equal(model.get_latent_representation(), in_memory.get_latent_representation())
    metrics = [m.get_reconstruction_metrics() for m in (in_memory, model)]
    np.testing.assert_array_equal(metrics[0].to_numpy(), metrics[1].to_numpy())


def test_blocks_change_the_order_of_training(in_memory, adata, tiny, quick):
    """Protects the tests above: with the sizes used here blocks are in effect, and lead to other weights."""
    model = _fit(adata.copy(), tiny, quick, block_size=None)
    assert any(
        not torch.equal(a, b)
        for a, b in zip(in_memory.module.state_dict().values(), model.module.state_dict().values(), strict=True)
    )


@pytest.fixture
def small_buffers(monkeypatch):
    """Results are read with the defaults of the loader: make them small enough for several buffers."""
    defaults = {**CellSetLoader.__init__.__kwdefaults__, "buffer_size": 48}
    monkeypatch.setattr(CellSetLoader.__init__, "__kwdefaults__", defaults)
    monkeypatch.setattr("cellweave.data._loader._BLOCK_SIZE", 16)


def test_results_of_a_store_equal_those_of_a_backed_file(in_memory, opened, small_buffers):
    """Protects one meaning of "on disk": the same cells in the same contexts, in the order of `obs`."""
    results = [in_memory.get_latent_representation(opened(kind)) for kind in ("backed", "h5ad", "two_files", "zarr")]
    for other in results[1:]:
        np.testing.assert_array_equal(results[0], other)
    assert not np.array_equal(results[0], in_memory.get_latent_representation())  # drawn from buffers


def test_order_of_cells(in_memory, opened, small_buffers):
    """Protects obs order: with one fixed context rule, disk and memory agree cell by cell."""
    options = {"contexts": "sequential", "by_context": False}
    expected = in_memory.get_latent_representation(**options)
    np.testing.assert_allclose(
        in_memory.get_latent_representation(opened("h5ad"), **options), expected, rtol=1e-4, atol=1e-5
    )


def test_chosen_cells(in_memory, opened, small_buffers):
    """Protects `indices`: the chosen cells in the asked order, repeated ones too, and fewer cells than a context has."""
    store, backed = opened("h5ad"), opened("backed")
    rows = np.array([140, 3, 77, 3, 0, 149])
    z = in_memory.get_latent_representation(store, indices=rows)
    np.testing.assert_array_equal(z, in_memory.get_latent_representation(backed, indices=rows))
    np.testing.assert_array_equal(z[1], z[3])
    order = np.argsort(rows, kind="stable")
    np.testing.assert_array_equal(z[order], in_memory.get_latent_representation(store, indices=rows[order]))


def test_fewer_cells_than_a_context(in_memory, adata, tmp_path):
    """Protects small stores: five cells in contexts of sixteen."""
    adata[:5].write_h5ad(tmp_path / "a.h5ad")
    z = in_memory.get_latent_representation(open_store(tmp_path / "a.h5ad"))
    np.testing.assert_array_equal(z, in_memory.get_latent_representation(adata[:5].copy()))


def test_results_are_written_into_the_store(opened, tiny, quick):
    """Protects `key_added`: results stand in `obsm` of the store, with a record of how they were made."""
    store = opened("h5ad")
    model = _fit(store, tiny, quick)
    z = model.get_latent_representation(key_added="X_stack")
    np.testing.assert_array_equal(store.obsm["X_stack"], z)
    assert "X_stack" in str(store.uns["cellweave"])
    np.testing.assert_array_equal(store.to_memory().obsm["X_stack"], z)


def test_a_model_of_a_store_is_saved_and_loaded(opened, tiny, quick, tmp_path):
    """Protects persistence: a model trained on a store is used with any other storage of the same genes."""
    store = opened("h5ad")
    model = _fit(store, tiny, quick)
    z = model.get_latent_representation()
    model.save(tmp_path / "model")
    loaded = StackModel.load(tmp_path / "model", adata=opened("backed"))
    np.testing.assert_array_equal(loaded.get_latent_representation(), z)


def test_workers_are_no_obstacle(in_memory, opened, tiny, quick, monkeypatch):
    """Protects `settings.dl_num_workers` with files: no process is started, and the weights are the same."""
    monkeypatch.setattr(scvi.settings, "dl_num_workers", 2)
    model = _fit(opened("backed"), tiny, quick)
    for expected, value in zip(in_memory.module.state_dict().values(), model.module.state_dict().values(), strict=True):
        assert torch.equal(expected, value)
