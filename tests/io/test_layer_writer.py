"""Layers written to a store on disk while they are computed."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import zarr

import cellweave as cw
from cellweave.io import LayerWriter, _layer_writer

N_CELLS, N_GENES = 90, 20


@pytest.fixture
def path(make_adata, tmp_path) -> Path:
    cw.pp.write_store(make_adata(n_cells=N_CELLS), tmp_path / "s.zarr")
    return tmp_path / "s.zarr"


@pytest.fixture
def values() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(N_CELLS, N_GENES)).astype(np.float32)


def _files(path: Path) -> set[str]:
    return {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file() and p.name != "zarr.json"}


@pytest.mark.parametrize("buffer", [1, 16, 8192])
def test_rows_in_any_order_make_the_layer(path, values, buffer, monkeypatch):
    """Protects streamed results: batches of shuffled rows, written in runs or scattered, give the layer in obs order."""
    monkeypatch.setattr(_layer_writer, "_BUFFER", buffer)
    monkeypatch.setattr(_layer_writer, "_CHUNK_CELLS", 16)
    with LayerWriter(path, "z", (N_CELLS, N_GENES)) as writer:
        for rows in np.array_split(np.random.default_rng(1).permutation(N_CELLS), 11):
            writer.write(rows, values[rows])
    np.testing.assert_array_equal(ad.read_zarr(path).layers["z"], values)
    np.testing.assert_array_equal(cw.io.open_store(path, layer="z")[3:7].X, values[3:7])


def test_missing_rows_and_columns_are_nan(path, values):
    """Protects partial results: cells that were not asked for and genes the model does not know are NaN, not zero."""
    columns = np.array([5, 2])
    with LayerWriter(path, "z", (N_CELLS, N_GENES), columns=columns) as writer:
        writer.write(np.arange(10, 30), values[10:30, :2])
    layer = ad.read_zarr(path).layers["z"]
    np.testing.assert_array_equal(layer[10:30][:, columns], values[10:30, :2])
    assert np.isnan(layer).sum() == N_CELLS * N_GENES - 40


def test_failure_leaves_the_store_as_it_was(path, values):
    """Protects the user's store: an error in the middle of the work leaves no trace in it."""
    before = _files(path)
    with pytest.raises(KeyError, match="stop"), LayerWriter(path, "z", (N_CELLS, N_GENES)) as writer:
        writer.write(np.arange(N_CELLS), values)
        writer._flush()
        raise KeyError("stop")
    assert _files(path) == before
    assert not ad.read_zarr(path).layers


def test_existing_layer_is_replaced_only_on_request(path, values):
    """Protects earlier results: the error comes before the work, and `overwrite=True` replaces the values."""
    with LayerWriter(path, "z", (N_CELLS, N_GENES)) as writer:
        writer.write(np.arange(N_CELLS), values)
    with pytest.raises(ValueError, match="has a layer 'z' already.*`overwrite=True`"):
        LayerWriter(path, "z", (N_CELLS, N_GENES))
    with LayerWriter(path, "z", (N_CELLS, N_GENES), overwrite=True) as writer:
        writer.write(np.arange(N_CELLS), -values)
    np.testing.assert_array_equal(ad.read_zarr(path).layers["z"], -values)
    assert "layers/z" in zarr.open_group(path, mode="r")


def test_stores_written_by_anndata_show_the_new_layer(make_adata, values, tmp_path):
    """Protects stores with consolidated metadata, whose readers do not look at the directories."""
    adata = make_adata(n_cells=N_CELLS)
    adata.write_zarr(tmp_path / "a.zarr")
    if not (tmp_path / "a.zarr" / "zarr.json").exists():
        pytest.skip("this anndata writes zarr version 2 by default")
    with LayerWriter(tmp_path / "a.zarr", "z", (N_CELLS, N_GENES)) as writer:
        writer.write(np.arange(N_CELLS), values)
    np.testing.assert_array_equal(ad.read_zarr(tmp_path / "a.zarr").layers["z"], values)


def test_only_zarr_stores_take_layers(make_adata, tmp_path):
    """Protects h5ad files, which are opened for reading only."""
    make_adata().write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(ValueError, match="is not a zarr store of the present format.*write_store"):
        LayerWriter(tmp_path / "a.h5ad", "z", (1, 1))
