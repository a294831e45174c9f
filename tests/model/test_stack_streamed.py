"""Results that stream to disk, queries that are aligned on disk, and training without data in the model."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
import scvi
import torch
from anndata import AnnData

import cellweave as cw
from cellweave.data import CellSetSplitter, DiskRows
from cellweave.io import CellStore
from cellweave.model import StackModel


@pytest.fixture
def store(make_adata, tmp_path) -> CellStore:
    """The cells of the shared model in a store of their own, in the same order."""
    return cw.pp.write_store(make_adata(), tmp_path / "s.zarr", shuffle=False)


# ---------------------------------------------------------------- layers on disk


def test_denoised_layer_streams_to_the_store(trained, store):
    """Protects results larger than memory: the layer on disk holds the numbers that the getter returns otherwise."""
    expected = trained.get_normalized_expression(store, library_size=100, return_numpy=True)
    written = trained.get_normalized_expression(store, library_size=100, key_added="stack_normalized")
    assert isinstance(written, CellStore)
    np.testing.assert_array_equal(written[:].X, expected)
    np.testing.assert_array_equal(ad.read_zarr(store.paths[0]).layers["stack_normalized"], expected)
    assert not store.layers


def test_denoised_layer_of_some_cells_and_genes(trained, store):
    """Protects partial layers: other cells and genes are NaN, the asked ones are in their places."""
    cells, genes = [7, 3, 50], ["gene4", "gene1"]
    expected = trained.get_normalized_expression(store, indices=cells, gene_list=genes, return_numpy=True)
    trained.get_normalized_expression(store, indices=cells, gene_list=genes, key_added="part")
    layer = ad.read_zarr(store.paths[0]).layers["part"]
    np.testing.assert_array_equal(layer[np.ix_(cells, [4, 1])], expected)
    assert np.isfinite(layer).sum() == 6


def test_layer_on_disk_belongs_to_who_wrote_it(trained, store):
    """Protects row 38 on disk: a second run of the same model class replaces the layer, anything else is an error."""
    first = trained.get_normalized_expression(store, key_added="z")[:].X
    second = trained.get_normalized_expression(store, key_added="z", library_size=2)[:].X
    np.testing.assert_allclose(second, 2 * first, rtol=1e-6)
    with cw.io.LayerWriter(store.paths[0], "mine", store.shape) as writer:
        writer.write(np.arange(store.n_obs), np.ones(store.shape, dtype=np.float32))
    with pytest.raises(ValueError, match="has a layer 'mine' already"):
        trained.get_normalized_expression(store, key_added="mine")
    trained.get_normalized_expression(store, key_added="mine", overwrite=True)


def test_layers_need_one_store_and_one_assignment(trained, store, make_adata, tmp_path):
    """Protects from layers that could not be written right: several files, and averages over assignments."""
    with pytest.raises(ValueError, match="`n_context_repeats` must be 1 for a layer on disk"):
        trained.get_normalized_expression(store, key_added="z", n_context_repeats=2)
    for name, cells in (("a", slice(0, 50)), ("b", slice(50, None))):
        make_adata()[cells].write_h5ad(tmp_path / f"{name}.h5ad")
    two = cw.io.open_store([tmp_path / "a.h5ad", tmp_path / "b.h5ad"])
    with pytest.raises(ValueError, match="store of one file that is opened as it is.*write_store"):
        trained.get_normalized_expression(two, key_added="z")


# ---------------------------------------------------------------- queries aligned on disk


@pytest.mark.parametrize("kind", ["store", "backed"])
def test_queries_on_disk_are_aligned_without_loading_them(trained, make_adata, tmp_path, kind, monkeypatch):
    """Protects memory: a query on disk with other genes is aligned block by block, with the results of one in memory."""
    query = make_adata(seed=3)[:, ::-1][:, 2:].copy()
    query.write_h5ad(tmp_path / "q.h5ad")
    expected = trained.get_latent_representation(query)
    disk = cw.io.open_store(tmp_path / "q.h5ad") if kind == "store" else ad.read_h5ad(tmp_path / "q.h5ad", backed="r")
    aligned = cw.pp.align_genes(disk, trained.genes)
    assert isinstance(aligned, CellStore)
    whole = DiskRows.read
    monkeypatch.setattr(
        DiskRows, "read", lambda self, a, b: pytest.fail("read at once") if b - a == 96 else whole(self, a, b)
    )
    np.testing.assert_array_equal(aligned[:5].X.toarray()[:, 3], query[:5, "gene3"].X.toarray().ravel())
    monkeypatch.undo()
    np.testing.assert_allclose(trained.get_latent_representation(disk), expected, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------- training without data in the model


def _splitter(adata: AnnData, tiny: dict) -> CellSetSplitter:
    StackModel.setup_anndata(adata, batch_key="batch", context_key="donor")
    manager = StackModel._get_most_recent_anndata_manager(adata)
    return CellSetSplitter(manager, n_cells=tiny["n_cells"], batch_size=32)


def test_a_model_without_data_trains_from_a_data_module(store, tiny, quick):
    """Protects `StackModel(registry=...)` and `train(datamodule=...)`: the same weights as with data in the model."""
    scvi.settings.seed = 0
    with_data = StackModel(_splitter(store, tiny).adata_manager.adata, **tiny)
    with_data.train(**quick)
    scvi.settings.seed = 0
    source = _splitter(store.copy(), tiny)
    without = StackModel(registry=source.registry, **tiny)
    without.train(**quick, datamodule=source)
    assert without.adata is None
    assert without.is_trained
    for name, weight in with_data.module.state_dict().items():
        assert torch.equal(weight, without.module.state_dict()[name]), name
    np.testing.assert_array_equal(without.get_latent_representation(store), with_data.get_latent_representation())


def test_a_model_without_data_says_so(store, tiny, quick):
    """Protects from a failure deep inside: no data and no data module is one sentence."""
    model = StackModel(registry=_splitter(store, tiny).registry, **tiny)
    with pytest.raises(ValueError, match="has no data to train on.*`datamodule=`"):
        model.train(**quick)


def test_a_run_is_not_continued_in_another_order(make_adata, tiny, quick, tmp_path):
    """Protects exact resume: with other blocks the cells would come in another order, so the checkpoint is refused."""
    adata = make_adata()
    StackModel.setup_anndata(adata, batch_key="batch")
    options = {**quick, "checkpoint_dir": tmp_path / "c", "resume": "auto"}
    StackModel(adata, **tiny).train(**options, datasplitter_kwargs={"block_size": 16})
    with pytest.raises(ValueError, match="block_size"):
        StackModel(adata, **tiny).train(**options, datasplitter_kwargs={"block_size": 32})
