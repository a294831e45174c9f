"""Faulty storage: every damage is named with its file and place, and the model stays as it was (rows 34 to 36)."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pytest
import scvi
import torch
import zarr
from anndata import AnnData
from zarr.codecs import ZstdCodec

from cellweave.io import open_store
from cellweave.pp import write_store

BLOCKS = {"block_size": 16, "buffer_size": 32}


@pytest.fixture
def adata(make_adata) -> AnnData:
    return make_adata(n_cells=160)


@pytest.fixture
def path(adata, tmp_path, monkeypatch) -> Path:
    """A zarr store of several chunks with checksums."""
    return _write(adata, tmp_path, monkeypatch)


@pytest.fixture
def data(make) -> AnnData:
    """Data of each family in turn."""
    return make(n_cells=160)


@pytest.fixture
def data_path(data, tmp_path, monkeypatch) -> Path:
    """They in a zarr store of several chunks with checksums."""
    return _write(data, tmp_path, monkeypatch)


def _write(adata, tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr("cellweave.pp._store._MIN_CHUNK", 2**8)
    monkeypatch.setattr("cellweave.pp._store._CHUNK_CELLS", 16)
    write_store(adata, tmp_path / "a.zarr", compression="zstd", shuffle=False)
    return tmp_path / "a.zarr"


def _chunks(path: Path, name: str) -> list[Path]:
    found = sorted((path / "X" / name / "c").iterdir(), key=lambda file: int(file.name))
    assert len(found) > 3 or name == "indptr"
    return found


def _flip(file: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.write_bytes(content)


def _model(family, adata):
    return family.create(adata, labels_key=None)


def _train(family, model):
    # pairs are drawn one by one, so that there are no blocks of neighbours to read
    return family.train(model, datasplitter_kwargs={} if family.reads == "expression" else BLOCKS)


def _state(model) -> list[torch.Tensor]:
    return [value.clone() for value in model.module.state_dict().values()]


def _equal(first, second) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# ---------------------------------------------------------------- slow storage


def test_gzip_warns_once_per_file(adata, tmp_path):
    """Protects the user's time (row 34): gzip is slow, which is said once for each file, not at every opening."""
    for name in ("a", "b"):
        adata.write_h5ad(tmp_path / f"{name}.h5ad", compression="gzip")
    with pytest.warns(UserWarning, match="`X` of `.*a.h5ad` is compressed with gzip.*`cellweave.pp.write_store`"):
        open_store(tmp_path / "a.h5ad")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        open_store(tmp_path / "a.h5ad")
    with pytest.warns(UserWarning, match="b.h5ad"):
        open_store(tmp_path / "b.h5ad")


def test_other_compressions_are_silent(adata, tmp_path):
    """Protects against false alarms: plain files give no warning."""
    adata.write_h5ad(tmp_path / "a.h5ad")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        open_store(tmp_path / "a.h5ad")


# ---------------------------------------------------------------- damage that is found on opening


def test_truncated_h5ad(adata, tmp_path):
    """Protects incomplete downloads (row 36): the file is named, whatever part of it is missing."""
    adata.write_h5ad(tmp_path / "a.h5ad")
    content = (tmp_path / "a.h5ad").read_bytes()
    for share in (0.0, 0.1, 0.5, 0.9, 0.999):
        file = tmp_path / f"{share}.h5ad"
        file.write_bytes(content[: int(share * len(content))])
        with pytest.raises(
            OSError, match="cannot be opened as an .h5ad or .zarr file .*restore it from a copy"
        ) as error:
            open_store(file)
        assert str(file) in str(error.value)


@pytest.mark.parametrize("name", ["data", "indices", "indptr"])
def test_missing_chunks(path, name):
    """Protects against silent zeros, which zarr reads for a chunk that is missing."""
    _chunks(path, name)[0].unlink()
    with pytest.raises(OSError, match=rf"1 of \d+ chunks of `X/{name}` in `X` of `.*a.zarr` are missing; restore"):
        open_store(path)


def test_flipped_bit_in_the_offsets(path):
    """Protects against cells with the counts of others: damaged offsets are found by their checksum."""
    _flip(_chunks(path, "indptr")[0])
    with pytest.raises(OSError, match=r"Cells 0 to 159 of `X` of `.*a.zarr` cannot be read"):
        open_store(path)


@pytest.mark.parametrize("change", [lambda p: p[::-1], lambda p: p + 1, lambda p: p[:-1], lambda p: p * 2])
def test_wrong_offsets(adata, tmp_path, change):
    """Protects against cells with the counts of others, where there is no checksum: offsets must fit to the data."""
    adata.write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "a") as file:
        indptr = file["X/indptr"][:]
        del file["X/indptr"]
        file["X/indptr"] = change(indptr)
    with pytest.raises(OSError, match="`indptr` does not fit to `data` and `indices`"):
        open_store(tmp_path / "a.h5ad")


def test_damaged_annotation(path):
    """Protects `obs`: a damaged column is an error that names the file."""
    file = next(file for file in (path / "obs" / "donor" / "codes" / "c").rglob("*") if file.is_file())
    file.write_bytes(file.read_bytes()[:5])
    with pytest.raises(OSError, match=r"`obs` or `var` of `.*a.zarr` cannot be read .*restore it from a copy"):
        open_store(path)


# ---------------------------------------------------------------- damage that is found while reading


def _gene_beyond_the_last(adata, tmp_path) -> AnnData:
    adata.write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "a") as file:
        file["X/indices"][int(file["X/indptr"][90])] = 5000
    return open_store(tmp_path / "a.h5ad")


def test_gene_numbers_beyond_the_last(adata, tmp_path):
    """Protects the memory of the process: a wrong gene number is an error, not a write into foreign memory."""
    store = _gene_beyond_the_last(adata, tmp_path)
    with pytest.raises(OSError, match=r"Cells 80 to 99 of `X` of `.*a.h5ad` cannot be read \(gene 5000 of 20\)"):
        store.X.read(80, 100)
    assert store.X.read(91, 100).shape == (9, 20)


@pytest.mark.parametrize("name", ["data", "indices"])
@pytest.mark.parametrize("fault", ["flip", "truncate", "delete"])
def test_damage_in_the_middle_of_training(family, data_path, name, fault):
    """Protects the model (row 36): the error names file and cells, the model says truthfully whether it is trained.

    A training run that failed leaves a usable model, and with the file restored it trains again, to the same weights as
    a model that has never seen the damage.
    """
    model = _model(family, open_store(data_path))
    chunk = _chunks(data_path, name)[2]
    good = chunk.read_bytes()
    if fault == "flip":
        _flip(chunk)
    elif fault == "truncate":
        chunk.write_bytes(good[: len(good) // 2])
    else:
        chunk.unlink()
    with pytest.raises(OSError, match=r"a\.zarr.*(cannot be read|are missing).*restore the (file|store) from a copy"):
        _train(family, model)
    assert not model.is_trained
    chunk.write_bytes(good)
    again = _train(family, _model(family, open_store(data_path)))
    fresh = _model(family, open_store(data_path))
    scvi.settings.seed = 0
    assert _equal(_state(_train(family, fresh)), _state(again))
    assert _train(family, model).is_trained
    assert np.isfinite(np.asarray(model.get_latent_representation())).all()


def test_a_trained_model_survives_a_failed_second_training(family, data_path):
    """Protects what was learned: after a failed continuation the model is still trained and embeds other data."""
    model = _train(family, _model(family, open_store(data_path)))
    clean = ad.read_zarr(data_path)
    _flip(_chunks(data_path, "data")[1])
    with pytest.raises(OSError, match="cannot be read"):
        _train(family, model)
    assert model.is_trained
    with pytest.raises(OSError, match="cannot be read"):
        model.get_latent_representation()
    assert np.isfinite(np.asarray(model.get_latent_representation(clean))).all()


def test_training_continues_on_other_data(family, data_path, data, tmp_path):
    """Protects the way out: the model of a damaged store goes on with the same cells from another file."""
    store = open_store(data_path)
    model = _model(family, store)
    _flip(_chunks(data_path, "data")[1])
    with pytest.raises(OSError, match="cannot be read"):
        _train(family, model)
    data.write_h5ad(tmp_path / "b.h5ad")
    other = open_store(tmp_path / "b.h5ad")
    family.register(other, batch_key="batch")
    model.adata = other
    assert _train(family, model).is_trained


def test_store_deleted_between_setup_and_training(family, data_path):
    """Protects against training on zeros: a zarr store that is gone is an error, not a matrix without counts."""
    model = _model(family, open_store(data_path))
    before = _state(model)
    shutil.rmtree(data_path)
    with pytest.raises(OSError, match=r"a\.zarr"):
        _train(family, model)
    assert not model.is_trained
    assert _equal(before, _state(model))


def test_h5ad_deleted_between_setup_and_training(family, data, tmp_path):
    """Protects running jobs: an open HDF5 file can be read to the end after its name was deleted."""
    data.write_h5ad(tmp_path / "a.h5ad")
    model = _model(family, open_store(tmp_path / "a.h5ad"))
    (tmp_path / "a.h5ad").unlink()
    assert _train(family, model).is_trained


def test_damaged_chunk_of_an_h5ad(adata, tmp_path):
    """Protects compressed h5ad files: HDF5's complaint is given with file and cells."""
    adata.write_h5ad(tmp_path / "a.h5ad", compression="gzip")
    with h5py.File(tmp_path / "a.h5ad") as file:
        where = file["X/data"].id.get_chunk_info(0)
    content = bytearray((tmp_path / "a.h5ad").read_bytes())
    middle = where.byte_offset + where.size // 2
    content[middle : middle + 8] = b"\xff" * 8
    (tmp_path / "a.h5ad").write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        store = open_store(tmp_path / "a.h5ad")
    with pytest.raises(OSError, match=r"Cells \d+ to \d+ of `X` of `.*a.h5ad` cannot be read .*restore the file"):
        store.X[:]


def test_damaged_dense_chunk(adata, tmp_path):
    """Protects dense stores: a chunk that cannot be decoded is named with file and cells."""
    group = zarr.open_group(tmp_path / "a.zarr", mode="w", zarr_format=3)
    ad.io.write_elem(group, "/", AnnData(obs=adata.obs, var=adata.var))
    group.create_array(
        "X", data=adata.X.toarray(), chunks=(40, 20), compressors=ZstdCodec(checksum=True), overwrite=True
    )
    group["X"].attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    store = open_store(tmp_path / "a.zarr")
    np.testing.assert_array_equal(store.X[:], adata.X.toarray())
    _flip(tmp_path / "a.zarr" / "X" / "c" / "2" / "0")
    with pytest.raises(OSError, match=r"Cells 70 to 89 of `X` of `.*a.zarr` cannot be read"):
        store.X.read(70, 90)
    assert store.X.read(0, 80).shape == (80, 20)


# ---------------------------------------------------------------- dask


def test_dask_is_read_like_memory(family, data):
    """Protects delayed arrays (row 35): sparse and dense chunks train to the weights of the counts in memory."""
    array = pytest.importorskip("dask.array")
    states = []
    for x in (
        data.X,
        array.from_array(data.X, chunks=(50, 20), asarray=False),
        array.from_array(data.X.toarray(), chunks=(30, 7)),
    ):
        other = data.copy()
        other.X = x
        states.append(_state(_train(family, _model(family, other))))
    assert _equal(states[0], states[1])
    assert _equal(states[0], states[2])
