"""Model directories: complete or absent, verified before use, and never executed."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil

import numpy as np
import pytest
import torch

from cellweave.io import ModelFileError, inspect_model, read_model, write_model
from cellweave.io import _model_files as files

NAMES = ["weights.safetensors", "config.json", "registry.json", "history.json", "indices.npz", "MANIFEST.json"]


# ---------------------------------------------------------------- round trip


def test_round_trip(saved, make_content, assert_same):
    """Protects everything a model needs: weights, arguments, categories of any kind, history and indices."""
    assert_same(read_model(saved), make_content())
    assert sorted(os.listdir(saved)) == sorted(NAMES)


def test_model_without_history(tmp_path, make_content):
    """Protects untrained models: no history, no indices."""
    write_model(tmp_path / "m", make_content()._replace(history=None, indices={}))
    back = read_model(tmp_path / "m")
    assert back.history is None
    assert back.indices == {}


def test_views_and_transposes_are_saved_by_value(tmp_path, make_content):
    """Protects shared and non-contiguous weights, which safetensors refuses."""
    base = torch.arange(6.0).view(2, 3)
    write_model(tmp_path / "m", make_content()._replace(weights={"t": base.T, "part": base[:, 1]}))
    back = read_model(tmp_path / "m").weights
    assert torch.equal(back["t"], base.T)
    assert torch.equal(back["part"], base[:, 1])


def test_parents_are_created_and_nothing_else_is_left(tmp_path, make_content, value_of):
    """Protects the folder of the user: missing parents appear, temporary directories do not stay."""
    write_model(tmp_path / "x" / "y" / "m", make_content())
    write_model(tmp_path / "x" / "y" / "m", make_content(2.0), overwrite=True)
    assert os.listdir(tmp_path / "x" / "y") == ["m"]
    assert value_of(tmp_path / "x" / "y" / "m") == 2


# ---------------------------------------------------------------- overwriting


def test_existing_directory_needs_overwrite(saved, make_content, value_of):
    """Protects a saved model: it is replaced only on request."""
    with pytest.raises(FileExistsError, match="already exists; choose another directory or pass `overwrite=True`"):
        write_model(saved, make_content(2.0))
    assert value_of(saved) == 1


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_what_is_no_model_is_never_overwritten(tmp_path, kind, make_content):
    """Protects other data of the user: `overwrite=True` replaces model directories only."""
    target = tmp_path / "thesis"
    target.mkdir() if kind == "directory" else target.write_text("x")
    (target / "chapter1.txt").write_text("x") if kind == "directory" else None
    with pytest.raises(FileExistsError, match="is not a cellweave model directory and will not be overwritten"):
        write_model(target, make_content(), overwrite=True)
    assert target.is_file() or os.listdir(target) == ["chapter1.txt"]
    assert os.listdir(tmp_path) == ["thesis"]


def test_empty_directory_may_be_used(tmp_path, make_content, value_of):
    """Protects directories made in advance, for instance by `tempfile`."""
    (tmp_path / "m").mkdir()
    write_model(tmp_path / "m", make_content(), overwrite=True)
    assert value_of(tmp_path / "m") == 1


# ---------------------------------------------------------------- damage


def test_every_flipped_bit_is_noticed(saved, make_content, assert_same):
    """Protects against silent corruption: 100 random single-bit flips over all files are detected."""
    rng = np.random.default_rng(0)
    for i in range(100):
        path = saved / NAMES[i % len(NAMES)]
        intact = path.read_bytes()
        _flip(path, int(rng.integers(len(intact))), int(rng.integers(8)))
        with pytest.raises(ModelFileError, match=f"{path.name}` (does not match its checksum|is damaged)"):
            read_model(saved)
        path.write_bytes(intact)
    assert_same(read_model(saved), make_content())


def _flip(path, byte: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 1 << bit
    path.write_bytes(content)


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


def test_swapped_files_are_noticed(saved, tmp_path, make_content):
    """Protects against mixing two models: a file of another model does not match the manifest."""
    write_model(tmp_path / "other", make_content(2.0))
    shutil.copy(tmp_path / "other" / NAMES[0], saved / NAMES[0])
    with pytest.raises(ModelFileError, match="weights.safetensors` does not match"):
        read_model(saved)


@pytest.mark.parametrize("exists", [False, True])
def test_no_model_at_all(tmp_path, exists):
    """Protects against a bare FileNotFoundError: the message says what the directory lacks."""
    if exists:
        (tmp_path / "m").mkdir()
    message = "is not a cellweave model directory: it " + ("has no MANIFEST.json" if exists else "does not exist")
    with pytest.raises(ModelFileError, match=message):
        read_model(tmp_path / "m")


def test_file_in_place_of_a_directory(saved):
    """Protects against a wrong path: a file, such as the weights themselves, is named as what it is."""
    with pytest.raises(ModelFileError, match="weights.safetensors` is a file; give the model directory"):
        read_model(saved / "weights.safetensors")


def test_directory_in_place_of_a_file(saved):
    """Protects against a half-copied model: a folder that has the name of a file counts as missing."""
    (saved / "config.json").unlink()
    (saved / "config.json").mkdir()
    with pytest.raises(ModelFileError, match="config.json` is missing"):
        read_model(saved)


@pytest.mark.parametrize("name", NAMES)
def test_unreadable_file_is_named(saved, name, monkeypatch):
    """Protects against a bare PermissionError: one sentence says which file cannot be read."""
    opened = type(saved).open

    def refuse(path, *args, **kwargs):
        if path.name == name:
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(type(saved), "open", refuse)
    monkeypatch.setattr(type(saved), "read_bytes", lambda path: path.open("rb").read())
    with pytest.raises(ModelFileError, match=f"{name}` cannot be read: Permission denied"):
        read_model(saved)


@pytest.mark.skipif(getattr(os, "geteuid", lambda: 0)() == 0, reason="permissions do not bind root")
def test_permissions_are_named(saved, make_content, value_of):
    """Protects shared folders: a model that may not be read or replaced is named, and stays as it is."""
    saved.parent.chmod(0o555)
    (saved / NAMES[0]).chmod(0)
    try:
        with pytest.raises(ModelFileError, match="cannot be read: Permission denied"):
            read_model(saved)
        with pytest.raises(PermissionError, match="could not be saved to .*: Permission denied"):
            write_model(saved, make_content(2.0), overwrite=True)
    finally:
        saved.parent.chmod(0o755)
        (saved / NAMES[0]).chmod(0o644)
    assert value_of(saved) == 1


def test_newer_schema_is_named(saved):
    """Protects files of the future: the message says which version reads them."""
    _forge_manifest(saved, schema=files.SCHEMA + 1, cellweave="9.9")
    message = rf"has file schema {files.SCHEMA + 1}, this .* reads up to {files.SCHEMA}; upgrade cellweave to .* 9\.9"
    with pytest.raises(ModelFileError, match=message):
        read_model(saved)


def test_schema_that_is_no_longer_read_is_named(saved):
    """Protects very old files: the message says which version wrote them."""
    _forge_manifest(saved, schema=0, cellweave="0.0.1")
    with pytest.raises(ModelFileError, match=r"file schema 0, this .* reads 1 to .* was written by 0\.0\.1"):
        read_model(saved)


def test_older_schema_goes_through_every_migration(saved, monkeypatch):
    """Protects old models: each migration is applied once, in order, to the decoded files."""

    def to_2(content):
        history = content.pop("history.json")
        return {**content, "curves.json": history}

    def to_3(content):
        content["config.json"]["init_params"]["non_kwargs"]["added"] = len(content["curves.json"])
        return {**content, "history.json": content.pop("curves.json")}

    monkeypatch.setattr(files, "SCHEMA", 3)
    monkeypatch.setattr(files, "_FILES", {**files._FILES, 3: files._FILES[1]})
    monkeypatch.setattr(files, "_MIGRATIONS", {1: to_2, 2: to_3})
    migrated = read_model(saved)
    assert migrated.config["init_params"]["non_kwargs"] == {"n": 3, "x": None, "added": 1}
    assert migrated.history.keys() == {"train_loss"}


def test_every_readable_schema_has_a_way_to_the_present_one():
    """Protects a future change of the format: a new schema without a migration from the last one fails here."""
    assert max(files._FILES) == files.SCHEMA
    assert set(files._MIGRATIONS) == set(range(min(files._FILES), files.SCHEMA))


# ---------------------------------------------------------------- description


def test_inspect_says_what_a_model_is(saved, make_content):
    """Protects `inspect_model`: class, state, genes and sizes are those of the files, and damage is noticed."""
    content = make_content()
    fields = {"X": {"summary_stats": {"n_vars": 3, "n_cells": 1234}}, "batch": {"summary_stats": {"n_batch": 2}}}
    registry = {"field_registries": fields, "setup_args": {"layer": "counts"}}
    write_model(saved, content._replace(registry=registry), overwrite=True)
    info = inspect_model(saved)
    assert info[:6] == ("M", files.version("cellweave"), files.SCHEMA, True, 3, 1234)
    assert info.arguments == {"n": 3, "x": None}
    assert info.setup == {"layer": "counts"}
    assert info.sizes == {name: (saved / name).stat().st_size for name in NAMES[:-1]}
    assert "M(n=3, x=None)\n  3 genes, set up with 1,234 cells; trained" in repr(info)
    _flip(saved / NAMES[0], 99, 1)
    with pytest.raises(ModelFileError, match=NAMES[0]):
        inspect_model(saved)


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
    with pytest.raises(ModelFileError, match="does not list 'weights.safetensors'"):
        read_model(saved)


@pytest.mark.parametrize("name", ["../outside.json", "/etc/hostname", "model.pt"])
def test_manifest_cannot_name_other_files(saved, name):
    """Protects files outside the directory, and pickles in it: a manifest that lists more is refused."""
    (saved.parent / "outside.json").write_text("{}")
    _forge_manifest(saved, extra={name: {"sha256": "0" * 64, "size": 2}})
    with pytest.raises(ModelFileError, match=f"MANIFEST.json` lists '{name}'"):
        read_model(saved)


@pytest.mark.parametrize("schema", [None, "1", 1.5, [1]])
def test_forged_schema_is_refused(saved, schema):
    """Protects against a bare TypeError: a manifest whose schema is no number is damaged."""
    _forge_manifest(saved, schema=schema)
    with pytest.raises(ModelFileError, match="MANIFEST.json` is damaged"):
        read_model(saved)


@pytest.mark.parametrize("content", [b"[]", b'{"model": "M"}', b"[" * 100_000])
def test_forged_config_is_refused(saved, content):
    """Protects against a bare KeyError: a config that lacks what a model needs is refused in one sentence."""
    (saved / "config.json").write_bytes(content)
    _forge_manifest(saved)
    with pytest.raises(ModelFileError, match="does not describe a model|config.json` is not what"):
        read_model(saved)


def test_linked_files_are_read_and_checked(saved, tmp_path, make_content, assert_same):
    """Protects downloads: the cache of a model hub links to its files; what counts is that the content is right."""
    (tmp_path / "blobs").mkdir()
    for name in NAMES:
        shutil.move(saved / name, tmp_path / "blobs" / name)
        (saved / name).symlink_to(tmp_path / "blobs" / name)
    assert_same(read_model(saved), make_content())
    _flip(tmp_path / "blobs" / NAMES[0], 99, 1)
    with pytest.raises(ModelFileError, match=NAMES[0]):
        read_model(saved)


def test_other_files_are_neither_read_nor_lost(saved, tmp_path, make_content, value_of, assert_same):
    """Protects what users and hubs put beside a model: it is never opened, and kept when the model is saved again."""
    (saved / "README.md").write_text("mine")
    (saved / "figures").mkdir()
    (saved / "figures" / "1.txt").write_text("one")
    (saved / "link").symlink_to("README.md")
    torch.save({"x": Payload(tmp_path / "executed")}, saved / "model.pt")
    assert_same(read_model(saved), make_content())
    write_model(saved, make_content(2.0), overwrite=True)
    assert value_of(saved) == 2
    assert (saved / "README.md").read_text() == (saved / "link").read_text() == "mine"
    assert (saved / "link").is_symlink()
    assert (saved / "figures" / "1.txt").read_text() == "one"
    assert not (tmp_path / "executed").exists()
    assert os.listdir(tmp_path) == ["m"]


def test_saving_through_a_link_replaces_what_it_points_to(saved, tmp_path, make_content, value_of):
    """Protects links such as `best -> run7`: the model behind it is replaced, the link stays."""
    (tmp_path / "best").symlink_to(saved)
    write_model(tmp_path / "best", make_content(2.0), overwrite=True)
    assert (tmp_path / "best").is_symlink()
    assert value_of(saved) == value_of(tmp_path / "best") == 2
    assert sorted(os.listdir(tmp_path)) == ["best", "m"]


def _forge_manifest(folder, leave_out: str = "", extra: dict | None = None, **fields) -> None:
    names = [name for name in NAMES[:-1] if name != leave_out]
    listed = {n: {"sha256": files._sha256(folder / n), "size": (folder / n).stat().st_size} for n in names}
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    content = {"schema": manifest["schema"], "cellweave": manifest["cellweave"], "files": {**listed, **(extra or {})}}
    (folder / "MANIFEST.json").write_bytes(files._manifest_bytes({**content, **fields}))
