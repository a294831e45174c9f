"""A saved model is a directory of safe files with a manifest of checksums, replaced as a whole."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from zipfile import BadZipFile

import numpy as np
import safetensors.torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor

from . import _json
from ._replace import backup_of, recover, replace_directory

__all__ = ["ModelFileError", "SavedModel", "read_model", "read_with_manifest", "write_model"]

_WEIGHTS, _CONFIG, _REGISTRY = "weights.safetensors", "config.json", "registry.json"
_HISTORY, _INDICES, _MANIFEST = "history.json", "indices.npz", "MANIFEST.json"

SCHEMA = 1
# the files of each schema that can be read
_FILES: dict[int, tuple[str, ...]] = {1: (_WEIGHTS, _CONFIG, _REGISTRY, _HISTORY, _INDICES)}
# schema -> function from the decoded files of that schema (by name) to those of the next one
_MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}

T = TypeVar("T")


class ModelFileError(ValueError):
    """A model directory is missing, damaged, of another kind, or newer than this version of cellweave."""


class SavedModel(NamedTuple):
    """Content of a model directory."""

    weights: dict[str, Tensor]
    config: dict[str, Any]  # model class, constructor arguments, whether trained
    registry: dict[str, Any]  # scvi-tools registry: setup arguments, genes, categories
    history: dict[str, Any] | None
    indices: dict[str, NDArray[np.int64]]  # training, validation and test rows


# ---------------------------------------------------------------- writing


def write_model(dir_path: str | os.PathLike[str], saved: SavedModel, overwrite: bool = False) -> None:
    """Write a model directory in one step: it appears complete or not at all.

    Parameters
    ----------
    dir_path
        Directory to create.
    saved
        What to write.
    overwrite
        Replace an existing model directory; the old one stays valid until the new one is complete. Other files in it
        are kept.

    Raises
    ------
    FileExistsError
        If ``dir_path`` exists and ``overwrite`` is false, or it is not a model directory.
    OSError
        If the directory cannot be written, for instance because the disk is full; what was there before stays.
    """
    target = Path(os.path.realpath(dir_path))
    with _explained(dir_path):
        recover(target)
    if target.exists() and not overwrite:
        raise FileExistsError(f"`{dir_path}` already exists; choose another directory or pass `overwrite=True`.")
    if target.exists() and not (target / _MANIFEST).is_file() and (target.is_file() or any(target.iterdir())):
        raise FileExistsError(f"`{dir_path}` is not a cellweave model directory and will not be overwritten.")
    with _explained(dir_path):
        replace_directory(target, lambda staging: _write_files(staging, saved, previous=target))


@contextmanager
def _explained(dir_path: str | os.PathLike[str]) -> Iterator[None]:
    """Say in one sentence which model could not be written; the error keeps its kind and number."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        message = f"The model could not be saved to `{dir_path}`: {reason}; what was there before is unchanged."
        explained = (type(error) if isinstance(error, OSError) else OSError)(message)
        explained.errno = getattr(error, "errno", None)
        raise explained from error


def _write_files(folder: Path, saved: SavedModel, previous: Path) -> None:
    weights = {key: value.detach().cpu().contiguous() for key, value in saved.weights.items()}
    safetensors.torch.save_file(weights, folder / _WEIGHTS)
    (folder / _CONFIG).write_bytes(_json.dumps(saved.config))
    (folder / _REGISTRY).write_bytes(_json.dumps(saved.registry))
    (folder / _HISTORY).write_bytes(_json.dumps(saved.history))
    with (folder / _INDICES).open("wb") as file:
        np.savez(file, **saved.indices)  # type: ignore[arg-type]
    names = _FILES[SCHEMA]
    files = {name: {"sha256": _sha256(folder / name), "size": (folder / name).stat().st_size} for name in names}
    manifest = {"schema": SCHEMA, "cellweave": version("cellweave"), "files": files}
    (folder / _MANIFEST).write_bytes(_manifest_bytes(manifest))
    _carry_over(previous, folder)


def _carry_over(previous: Path, folder: Path) -> None:
    """Keep files that the user, or a model hub, put beside those of the model that is replaced."""
    ours = {_MANIFEST, *(name for names in _FILES.values() for name in names)}
    for path in previous.iterdir() if previous.is_dir() else ():
        if path.name in ours:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, folder / path.name, symlinks=True, copy_function=_link_or_copy)
        else:
            _link_or_copy(path, folder / path.name)


def _link_or_copy(source: str | Path, target: str | Path, **_: Any) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except (OSError, NotImplementedError):  # a file system without hard links
        shutil.copy2(source, target, follow_symlinks=False)


# ---------------------------------------------------------------- reading


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
    return read_with_manifest(dir_path)[0]


def read_with_manifest(dir_path: str | os.PathLike[str]) -> tuple[SavedModel, dict[str, Any]]:
    """Content of a model directory, as :func:`read_model`, and its manifest."""
    while True:
        folder = _find(Path(os.path.realpath(dir_path)))
        before = _manifest_now(folder)
        failure = None
        try:
            manifest = _verify(folder)
            content = {name: _decoded(folder / name) for name in _FILES[manifest["schema"]]}
        except ModelFileError as error:
            failure = error
        if _manifest_now(folder) != before:
            continue  # another process saved the model meanwhile: never the files of two models
        if failure is not None:
            raise failure
        for schema in range(manifest["schema"], SCHEMA):
            content = _MIGRATIONS[schema](content)
        return _as_saved(folder, content), manifest


def _manifest_now(folder: Path) -> bytes | None:
    try:
        return (folder / _MANIFEST).read_bytes()
    except OSError:
        return None  # `_verify` says so


def _find(target: Path) -> Path:
    if not target.exists() and backup_of(target).exists():
        warnings.warn(
            f"`{target}` was being replaced when the process that did it ended; the model before it is read.",
            UserWarning,
            stacklevel=5,  # the caller of `load`
        )
        return backup_of(target)
    if target.is_file():
        raise ModelFileError(f"`{target}` is a file; give the model directory, which is what `save` was given.")
    if (target / "model.pt").is_file() and not (target / _MANIFEST).exists():
        raise ModelFileError(
            f"`{target}` was written by the save method of scvi-tools itself: `model.pt` is a pickle that can run code "
            "when read, so it is not opened; save the model again with `save` of a cellweave model."
        )
    if not (target / _MANIFEST).is_file():
        lacks = f"it has no {_MANIFEST}" if target.exists() else "it does not exist"
        raise ModelFileError(f"`{target}` is not a cellweave model directory: {lacks}.")
    return target


def _verify(folder: Path) -> dict[str, Any]:
    """The manifest, after checking it and all files it must list."""
    manifest = _intact_manifest(folder / _MANIFEST)
    schema, files = manifest["schema"], manifest["files"]
    if schema > SCHEMA:
        raise ModelFileError(
            f"`{folder}` has file schema {schema}, this version of cellweave reads up to {SCHEMA}; "
            f"upgrade cellweave to at least {manifest['cellweave']}."
        )
    if schema not in _FILES:
        raise ModelFileError(
            f"`{folder}` has file schema {schema}, this version of cellweave reads {min(_FILES)} to {SCHEMA}; load and "
            f"save the model with an older version first (it was written by {manifest['cellweave']})."
        )
    wrong = sorted(set(files) ^ set(_FILES[schema]))
    if wrong:
        verb = "lists" if wrong[0] in files else "does not list"
        raise ModelFileError(f"`{folder / _MANIFEST}` {verb} {wrong[0]!r}; restore the model directory from a copy.")
    for name, expected in files.items():
        _check_file(folder / name, expected)
    return manifest


def _intact_manifest(path: Path) -> dict[str, Any]:
    try:
        raw = path.read_bytes()
        manifest = json.loads(raw)
        body = {key: value for key, value in manifest.items() if key != "digest"}
        known = isinstance(body["schema"], int) and isinstance(body["files"], dict) and "cellweave" in body
        if known and _manifest_bytes(body) == raw:
            return manifest
    except OSError as error:
        raise _unreadable(path, error) from error
    except (ValueError, AttributeError, TypeError, KeyError, RecursionError):
        pass  # damaged, which the next line says
    raise ModelFileError(f"`{path}` is damaged; restore the model directory from a copy.")


def _check_file(path: Path, expected: Any) -> None:
    if not path.is_file():
        raise ModelFileError(f"`{path}` is missing; restore the model directory from a copy.")
    try:
        found = {"sha256": _sha256(path), "size": path.stat().st_size}
    except OSError as error:
        raise _unreadable(path, error) from error
    if found != expected:
        raise ModelFileError(f"`{path}` does not match its checksum; restore the model directory from a copy.")


def _unreadable(path: Path, error: OSError) -> ModelFileError:
    return ModelFileError(f"`{path}` cannot be read: {error.strerror or error}.")


def _decoded(path: Path) -> Any:
    try:
        return _READERS[path.suffix](path)
    except OSError as error:
        raise _unreadable(path, error) from error
    except (ValueError, TypeError, KeyError, EOFError, RecursionError, BadZipFile, SafetensorError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelFileError(f"`{path}` is not what a model directory holds: {reason}") from error


def _read_json(path: Path) -> Any:
    return _json.loads(path.read_bytes())


def _read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    for name, rows in arrays.items():  # what is no array comes out of the archive as bytes
        if not (isinstance(rows, np.ndarray) and rows.ndim == 1 and rows.dtype == np.int64):
            raise ValueError(f"{name!r} is no array of rows")
    return arrays


_READERS: dict[str, Callable[[Path], Any]] = {
    ".safetensors": safetensors.torch.load_file,
    ".json": _read_json,
    ".npz": _read_arrays,
}


def _as_saved(folder: Path, content: Mapping[str, Any]) -> SavedModel:
    config, registry, history = content[_CONFIG], content[_REGISTRY], content[_HISTORY]
    fits = isinstance(config, dict) and {"model", "init_params", "is_trained"} <= set(config)
    fits = fits and isinstance(config["init_params"], dict) and set(config["init_params"]) == {"kwargs", "non_kwargs"}
    fits = fits and all(isinstance(group, dict) for group in config["init_params"].values())
    if not fits or not isinstance(registry, dict) or not (history is None or isinstance(history, dict)):
        raise ModelFileError(f"`{folder}` does not describe a model; restore the model directory from a copy.")
    return SavedModel(content[_WEIGHTS], config, registry, history, content[_INDICES])


def _manifest_bytes(content: Mapping[str, Any]) -> bytes:
    """Canonical bytes, with a digest over the rest: a changed bit anywhere in the manifest is noticed."""
    body = json.dumps(content, indent=1, sort_keys=True)
    digest = hashlib.sha256(body.encode()).hexdigest()
    return json.dumps({**content, "digest": digest}, indent=1, sort_keys=True).encode()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
