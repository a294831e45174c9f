"""A saved model is a directory of safe files with a manifest of checksums, replaced as a whole."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4
from zipfile import BadZipFile

import numpy as np
import safetensors.torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor

from . import _json

__all__ = ["ModelFileError", "SavedModel", "read_model", "write_model"]

SCHEMA = 1
_WEIGHTS, _CONFIG, _REGISTRY = "weights.safetensors", "config.json", "registry.json"
_HISTORY, _INDICES, _MANIFEST = "history.json", "indices.npz", "MANIFEST.json"
_FILES = (_WEIGHTS, _CONFIG, _REGISTRY, _HISTORY, _INDICES)


class ModelFileError(ValueError):
    """A model directory is missing, damaged, of another kind, or newer than this version of cellweave."""


class SavedModel(NamedTuple):
    """Content of a model directory."""

    weights: dict[str, Tensor]
    config: dict[str, Any]  # model class, constructor arguments, whether trained
    registry: dict[str, Any]  # scvi-tools registry: setup arguments, genes, categories
    history: dict[str, Any] | None
    indices: dict[str, NDArray[np.int64]]  # training, validation and test rows


def write_model(dir_path: str | os.PathLike[str], saved: SavedModel, overwrite: bool = False) -> None:
    """Write a model directory in one step: it appears complete or not at all.

    Parameters
    ----------
    dir_path
        Directory to create.
    saved
        What to write.
    overwrite
        Replace an existing model directory; the old one stays valid until the new one is complete.

    Raises
    ------
    FileExistsError
        If ``dir_path`` exists and ``overwrite`` is false, or it is not a model directory.
    """
    target = Path(dir_path)
    if target.exists() and not overwrite:
        raise FileExistsError(f"`{target}` already exists; choose another directory or pass `overwrite=True`.")
    if target.exists() and not (target / _MANIFEST).is_file() and (target.is_file() or any(target.iterdir())):
        raise FileExistsError(f"`{target}` is not a cellweave model directory and will not be overwritten.")
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.with_name(f".{target.name}.{uuid4().hex}")
    try:
        staging.mkdir()
        _write_files(staging, saved)
        _swap(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def read_model(dir_path: str | os.PathLike[str]) -> SavedModel:
    """Read a model directory after checking every file against its checksum.

    Parameters
    ----------
    dir_path
        Directory that :func:`write_model` wrote.

    Returns
    -------
    The content of the directory; nothing in it is executed.

    Raises
    ------
    ModelFileError
        If the directory is missing, incomplete, changed since it was written, was written by scvi-tools itself, or
        needs a newer version of cellweave.
    """
    target = _find(Path(dir_path))
    _verify(target)
    return SavedModel(
        weights=_decoded(target / _WEIGHTS, safetensors.torch.load_file),
        config=_decoded(target / _CONFIG, _read_json),
        registry=_decoded(target / _REGISTRY, _read_json),
        history=_decoded(target / _HISTORY, _read_json),
        indices=_decoded(target / _INDICES, _read_arrays),
    )


def _decoded(path: Path, read: Callable[[Path], Any]) -> Any:
    try:
        return read(path)
    except (ValueError, TypeError, KeyError, EOFError, BadZipFile, SafetensorError) as error:
        raise ModelFileError(f"`{path}` is not what a model directory holds: {error}") from error


def _read_json(path: Path) -> Any:
    return _json.loads(path.read_bytes())


def _read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def _write_files(folder: Path, saved: SavedModel) -> None:
    weights = {key: value.detach().cpu().contiguous() for key, value in saved.weights.items()}
    safetensors.torch.save_file(weights, folder / _WEIGHTS)
    (folder / _CONFIG).write_bytes(_json.dumps(saved.config))
    (folder / _REGISTRY).write_bytes(_json.dumps(saved.registry))
    (folder / _HISTORY).write_bytes(_json.dumps(saved.history))
    with (folder / _INDICES).open("wb") as file:
        np.savez(file, **saved.indices)  # type: ignore[arg-type]
    files = {name: {"sha256": _sha256(folder / name), "size": (folder / name).stat().st_size} for name in _FILES}
    (folder / _MANIFEST).write_bytes(
        _manifest_bytes({"schema": SCHEMA, "cellweave": version("cellweave"), "files": files})
    )
    for path in folder.iterdir():
        _sync(path)
    _sync(folder)


def _swap(staging: Path, target: Path) -> None:
    """Put ``staging`` in the place of ``target``; a kill in between leaves the old one where :func:`_find` looks."""
    backup = _backup(target)
    shutil.rmtree(backup, ignore_errors=True) if target.exists() else None
    if target.exists():
        target.rename(backup)
    try:
        staging.rename(target)
    except BaseException:
        if backup.exists():
            backup.rename(target)
        raise
    _sync(target.parent)
    shutil.rmtree(backup, ignore_errors=True)


def _backup(target: Path) -> Path:
    return target.with_name(f".{target.name}.previous")


def _find(target: Path) -> Path:
    if not target.exists() and _backup(target).exists():
        return _backup(target)  # the process was killed while replacing the directory
    if (target / "model.pt").is_file() and not (target / _MANIFEST).exists():
        raise ModelFileError(
            f"`{target}` was written by the save method of scvi-tools itself: `model.pt` is a pickle that can run code "
            "when read, so it is not opened; save the model again with `save` of a cellweave model."
        )
    if not (target / _MANIFEST).is_file():
        raise ModelFileError(f"`{target}` is not a cellweave model directory: it has no {_MANIFEST}.")
    return target


def _verify(folder: Path) -> None:
    raw = (folder / _MANIFEST).read_bytes()
    try:
        manifest = json.loads(raw)
        intact = _manifest_bytes({k: v for k, v in manifest.items() if k != "digest"}) == raw
    except (ValueError, AttributeError, TypeError):
        intact = False
    if not intact:
        raise ModelFileError(f"`{folder / _MANIFEST}` is damaged; restore the model directory from a copy.")
    if manifest["schema"] > SCHEMA:
        raise ModelFileError(
            f"`{folder}` has file schema {manifest['schema']}, this version of cellweave reads up to {SCHEMA}; "
            f"upgrade cellweave to at least {manifest['cellweave']}."
        )
    for name in _FILES:
        path = folder / name
        expected = manifest["files"].get(name)
        if expected is None:
            raise ModelFileError(f"`{folder / _MANIFEST}` does not list {name}; restore the directory from a copy.")
        if not path.is_file():
            raise ModelFileError(f"`{path}` is missing; restore the model directory from a copy.")
        if path.stat().st_size != expected["size"] or _sha256(path) != expected["sha256"]:
            raise ModelFileError(f"`{path}` does not match its checksum; restore the model directory from a copy.")


def _manifest_bytes(content: Mapping[str, Any]) -> bytes:
    """Canonical bytes, with a digest over the rest: a changed bit anywhere in the manifest is noticed."""
    body = json.dumps(content, indent=1, sort_keys=True)
    digest = hashlib.sha256(body.encode()).hexdigest()
    return json.dumps({**content, "digest": digest}, indent=1, sort_keys=True).encode()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
