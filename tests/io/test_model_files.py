"""Model directories: complete or absent, verified before use, and never executed."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch

from cellweave.io import ModelFileError, SavedModel, read_model, write_model
from cellweave.io import _model_files as files

NAMES = ["weights.safetensors", "config.json", "registry.json", "history.json", "indices.npz", "MANIFEST.json"]


def _content(value: float = 1.0) -> SavedModel:
    categories = {
        "text": np.array(["a", "é ü", "slash/back\\", "new\nline", "", "日本"], dtype=object),
        "int": np.array([3, 1, 2]),
        "bool": np.array([False, True]),
        "float": np.array([0.1, 2.5, 1e300]),
    }
    history = {"train_loss": pd.DataFrame({"train_loss": [2.0, value]}, index=pd.RangeIndex(2, name="epoch"))}
    return SavedModel(
        weights={"a.weight": torch.full((3, 2), value), "b": torch.arange(4).double()},
        config={"model": "M", "init_params": {"kwargs": {}, "non_kwargs": {"n": 3, "x": None}}, "is_trained": True},
        registry={"field_registries": categories, "setup_args": {"layer": None}},
        history=history,
        indices={"train_indices": np.array([5, 1, 3]), "test_indices": np.array([], dtype=np.int64)},
    )


def _assert_same(first: SavedModel, second: SavedModel) -> None:
    assert first.weights.keys() == second.weights.keys()
    assert all(torch.equal(first.weights[k], second.weights[k]) for k in first.weights)
    assert first.config == second.config
    for key, value in first.registry["field_registries"].items():
        other = second.registry["field_registries"][key]
        assert value.dtype == other.dtype
        assert value.tolist() == other.tolist()
    for key, frame in first.history.items():
        pd.testing.assert_frame_equal(frame, second.history[key], check_index_type=False)
    assert first.indices.keys() == second.indices.keys()
    assert all(np.array_equal(first.indices[k], second.indices[k]) for k in first.indices)


def _value(path) -> float:
    return read_model(path).weights["a.weight"][0, 0].item()


@pytest.fixture
def saved(tmp_path):
    write_model(tmp_path / "m", _content())
    return tmp_path / "m"


# ---------------------------------------------------------------- round trip


def test_round_trip(saved):
    """Protects everything a model needs: weights, arguments, categories of any kind, history and indices."""
    _assert_same(read_model(saved), _content())
    assert sorted(os.listdir(saved)) == sorted(NAMES)


def test_model_without_history(tmp_path):
    """Protects untrained models: no history, no indices."""
    write_model(tmp_path / "m", _content()._replace(history=None, indices={}))
    back = read_model(tmp_path / "m")
    assert back.history is None
    assert back.indices == {}


def test_views_and_transposes_are_saved_by_value(tmp_path):
    """Protects shared and non-contiguous weights, which safetensors refuses."""
    base = torch.arange(6.0).view(2, 3)
    write_model(tmp_path / "m", _content()._replace(weights={"t": base.T, "part": base[:, 1]}))
    back = read_model(tmp_path / "m").weights
    assert torch.equal(back["t"], base.T)
    assert torch.equal(back["part"], base[:, 1])


def test_parents_are_created_and_nothing_else_is_left(tmp_path):
    """Protects the folder of the user: missing parents appear, temporary directories do not stay."""
    write_model(tmp_path / "x" / "y" / "m", _content())
    write_model(tmp_path / "x" / "y" / "m", _content(2.0), overwrite=True)
    assert os.listdir(tmp_path / "x" / "y") == ["m"]
    assert _value(tmp_path / "x" / "y" / "m") == 2


# ---------------------------------------------------------------- overwriting


def test_existing_directory_needs_overwrite(saved):
    """Protects a saved model: it is replaced only on request."""
    with pytest.raises(FileExistsError, match="already exists; choose another directory or pass `overwrite=True`"):
        write_model(saved, _content(2.0))
    assert _value(saved) == 1


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_what_is_no_model_is_never_overwritten(tmp_path, kind):
    """Protects other data of the user: `overwrite=True` replaces model directories only."""
    target = tmp_path / "thesis"
    target.mkdir() if kind == "directory" else target.write_text("x")
    (target / "chapter1.txt").write_text("x") if kind == "directory" else None
    with pytest.raises(FileExistsError, match="is not a cellweave model directory and will not be overwritten"):
        write_model(target, _content(), overwrite=True)
    assert target.is_file() or os.listdir(target) == ["chapter1.txt"]
    assert os.listdir(tmp_path) == ["thesis"]


def test_empty_directory_may_be_used(tmp_path):
    """Protects directories made in advance, for instance by `tempfile`."""
    (tmp_path / "m").mkdir()
    write_model(tmp_path / "m", _content(), overwrite=True)
    assert _value(tmp_path / "m") == 1


# ---------------------------------------------------------------- damage


def test_every_flipped_bit_is_noticed(saved):
    """Protects against silent corruption: 100 random single-bit flips over all files are detected."""
    rng = np.random.default_rng(0)
    for i in range(100):
        path = saved / NAMES[i % len(NAMES)]
        intact = path.read_bytes()
        damaged = bytearray(intact)
        damaged[rng.integers(len(intact))] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(ModelFileError, match=f"{path.name}` (does not match its checksum|is damaged)"):
            read_model(saved)
        path.write_bytes(intact)
    _assert_same(read_model(saved), _content())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damage", ["empty", "truncated", "longer", "missing"])
def test_damaged_files_are_named(saved, name, damage):
    """Protects the user: which file is empty, cut, grown or missing, and what to do."""
    path = saved / name
    content = path.read_bytes()
    new = {"empty": b"", "truncated": content[:-3], "longer": content + b"\0"}.get(damage)
    path.unlink() if new is None else path.write_bytes(new)
    with pytest.raises(ModelFileError, match=name) as caught:
        read_model(saved)
    assert "\n" not in str(caught.value)


def test_swapped_files_are_noticed(saved, tmp_path):
    """Protects against mixing two models: a file of another model does not match the manifest."""
    write_model(tmp_path / "other", _content(2.0))
    shutil.copy(tmp_path / "other" / NAMES[0], saved / NAMES[0])
    with pytest.raises(ModelFileError, match="weights.safetensors` does not match"):
        read_model(saved)


@pytest.mark.parametrize("exists", [False, True])
def test_no_model_at_all(tmp_path, exists):
    """Protects against a bare FileNotFoundError: the message says what the directory lacks."""
    if exists:
        (tmp_path / "m").mkdir()
    with pytest.raises(ModelFileError, match="is not a cellweave model directory: it has no MANIFEST.json"):
        read_model(tmp_path / "m")


def test_newer_schema_is_named(saved, monkeypatch, tmp_path):
    """Protects files of the future: the message says which version reads them."""
    monkeypatch.setattr(files, "SCHEMA", files.SCHEMA + 1)
    write_model(tmp_path / "new", _content())
    monkeypatch.undo()
    with pytest.raises(
        ModelFileError, match=rf"has file schema 2, this version of cellweave reads up to {files.SCHEMA}"
    ):
        read_model(tmp_path / "new")


# ---------------------------------------------------------------- untrusted files


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return (self.path.touch, ())


def test_model_of_scvi_tools_is_refused(make_adata, tmp_path):
    """Protects against pickles: a directory of scvi-tools' own `save` is recognised and not opened."""
    import scvi

    adata = make_adata()
    scvi.model.SCVI.setup_anndata(adata)
    scvi.model.SCVI(adata, n_hidden=4, n_latent=2).save(tmp_path / "scvi")
    with pytest.raises(ModelFileError, match="written by the save method of scvi-tools itself: `model.pt` is a pickle"):
        read_model(tmp_path / "scvi")


def test_crafted_pickle_named_model_pt_is_not_executed(tmp_path):
    """Protects the user: a `model.pt` that would run code is refused, and no code runs."""
    (tmp_path / "m").mkdir()
    torch.save({"model_state_dict": Payload(tmp_path / "executed")}, tmp_path / "m" / "model.pt")
    with pytest.raises(ModelFileError, match="pickle that can run code"):
        read_model(tmp_path / "m")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", NAMES[:-1])
def test_pickles_with_valid_checksums_are_not_executed(saved, tmp_path, name):
    """Protects against a forged manifest: even with right checksums, a pickle in any place runs no code."""
    payload = Payload(tmp_path / "executed")
    if name == "indices.npz":
        np.savez(saved / name, train_indices=np.array([payload], dtype=object))
    else:
        (saved / name).write_bytes(pickle.dumps(payload))
    _forge_manifest(saved)
    with pytest.raises(ModelFileError, match=name):
        read_model(saved)
    assert not (tmp_path / "executed").exists()


def test_manifest_cannot_leave_a_file_unchecked(saved):
    """Protects the checks: a manifest that does not list a file is refused, however consistent it is."""
    _forge_manifest(saved, leave_out="weights.safetensors")
    with pytest.raises(ModelFileError, match="weights.safetensors"):
        read_model(saved)


def _forge_manifest(folder, leave_out: str = "") -> None:
    names = [name for name in NAMES[:-1] if name != leave_out]
    listed = {n: {"sha256": files._sha256(folder / n), "size": (folder / n).stat().st_size} for n in names}
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    content = {"schema": manifest["schema"], "cellweave": manifest["cellweave"], "files": listed}
    (folder / "MANIFEST.json").write_bytes(files._manifest_bytes(content))


# ---------------------------------------------------------------- interrupted saves

OPERATIONS = ["rename", "replace", "mkdir", "fsync", "rmdir", "unlink"]


def _count_and_stop(patch, stop_at: int, when: str, stop) -> list[str]:
    """Call ``stop`` before or after the ``stop_at``-th change of the file system; returns the list of changes."""
    calls = []

    def wrap(name, function):
        def wrapped(*args, **kwargs):
            calls.append(name)
            is_it = len(calls) == stop_at
            if is_it and when == "before":
                stop()
            try:
                return function(*args, **kwargs)
            finally:
                if is_it and when == "after":
                    stop()

        return wrapped

    for name in OPERATIONS:
        patch.setattr(os, name, wrap(name, getattr(os, name)))
    patch.setattr(safetensors.torch, "save_file", wrap("weights", safetensors.torch.save_file))
    patch.setattr(files.np, "savez", wrap("indices", np.savez))
    return calls


def _number_of_operations(tmp_path, overwrite: bool) -> int:
    target = tmp_path / "count" / "m"
    if overwrite:
        write_model(target, _content())
    with pytest.MonkeyPatch.context() as patch:
        calls = _count_and_stop(patch, -1, "before", lambda: None)
        write_model(target, _content(), overwrite=True)
        return len(calls)


def _full_disk():
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("overwrite", [False, True])
def test_failed_save_keeps_the_old_model_and_cleans_up(tmp_path, overwrite):
    """Protects against a full disk at any moment: the old model stays in its place, no temporary directory stays."""
    outcomes = set()
    for stop_at in range(1, _number_of_operations(tmp_path, overwrite) + 1):
        folder = tmp_path / str(stop_at)
        if overwrite:
            write_model(folder / "m", _content(1.0))
        with pytest.MonkeyPatch.context() as patch:
            _count_and_stop(patch, stop_at, "before", _full_disk)
            try:
                write_model(folder / "m", _content(2.0), overwrite=overwrite)
                outcomes.add("saved")
            except OSError:
                outcomes.add("failed")
        left = os.listdir(folder) if folder.exists() else []
        assert [name for name in left if name not in ("m", ".m.previous")] == []
        if overwrite:
            assert _value(folder / "m") in (1, 2)
        elif left:
            assert _value(folder / "m") == 2
    assert "failed" in outcomes


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork to kill a process while it saves")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_save_leaves_a_loadable_model(tmp_path, overwrite, when):
    """Protects against a kill at any moment of a save: the old or the new model loads, and saving works again."""
    seen = set()
    for stop_at in range(1, _number_of_operations(tmp_path, overwrite) + 1):
        target = tmp_path / f"{stop_at}" / "m"
        target.parent.mkdir()
        if overwrite:
            write_model(target, _content(1.0))
        _save_and_die(target, stop_at, when)
        if overwrite or target.exists():
            seen.add(_value(target))
        write_model(target, _content(3.0), overwrite=True)
        assert _value(target) == 3
    assert seen == ({1.0, 2.0} if overwrite else {2.0})


def _save_and_die(target, stop_at: int, when: str) -> None:
    """Save in a child process that ends without any clean-up at the given operation."""
    child = os.fork()
    if child == 0:
        try:
            _count_and_stop(pytest.MonkeyPatch(), stop_at, when, lambda: os._exit(0))
            write_model(target, _content(2.0), overwrite=True)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0, "the child must die at the operation, not before or after it"
