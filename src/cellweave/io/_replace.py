"""Directories that are replaced as a whole, whatever happens to the process that writes them.

A save writes into a hidden sibling (*staging*) and renames it into place. A directory that is to be replaced waits under
a second hidden name (*backup*) during the two renames, so that one of the two always exists. Processes tell each other
that they are at work by a lock on the folder, which the system frees when they end, however they end: what is not locked
was left by a process that died, and the next save of the same name removes it.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows: no locks, so remains of dead processes are told by their age
    fcntl = None

__all__ = ["backup_of", "recover", "replace_directory"]

# Locks of another computer are not seen on every shared file system, so its folders are judged by their age.
_HOST = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
_OLD_SECONDS = 24 * 60 * 60


def backup_of(target: Path) -> Path:
    """Where the previous directory waits while ``target`` is being replaced."""
    return target.with_name(f".{target.name}.previous")


def recover(target: Path) -> None:
    """Put back what a killed process left under the backup name, and remove what dead processes left behind.

    Parameters
    ----------
    target
        Directory that is about to be written.
    """
    if not target.parent.is_dir():
        return
    with _lock(target.parent, wait=True):
        backup = backup_of(target)
        if backup.exists() and target.exists():
            _discard(backup, target)
        elif backup.exists():
            backup.rename(target)
    _remove_dead_stagings(target)


def replace_directory(target: Path, write: Callable[[Path], None]) -> None:
    """Create or replace a directory in one step.

    Parameters
    ----------
    target
        Directory to create or replace; its parents are created.
    write
        Function that writes the content into the empty directory it is given.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with _staging(target) as staging:
        write(staging)
        for path in (*staging.iterdir(), staging):
            _sync(path)
        with _lock(target.parent, wait=True):
            _swap(staging, target)


def _swap(staging: Path, target: Path) -> None:
    backup = backup_of(target)
    if target.exists():
        _discard(backup, target)
        target.rename(backup)
    try:
        staging.rename(target)
        _sync(target.parent)
    except BaseException:
        _discard(target, target)
        if backup.exists():
            backup.rename(target)
        raise
    with suppress(OSError):  # the new one is in place; what cannot be removed now, the next save removes
        _discard(backup, target)


def _discard(folder: Path, target: Path) -> None:
    """Remove a folder; under the name of remains first, so that its own name never stands for half of it."""
    if folder.exists():
        remains = _staging_name(target)
        folder.rename(remains)
        shutil.rmtree(remains, ignore_errors=True)


# ---------------------------------------------------------------- staging


def _staging_name(target: Path) -> Path:
    return target.with_name(f"{_prefix(target)}{_HOST}-{uuid4().hex[:16]}")


def _prefix(target: Path) -> str:
    return f".{target.name}.saving-"


@contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """A new hidden sibling of ``target``, locked while it is in use and gone afterwards."""
    folder, descriptor = _locked_folder(target)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def _locked_folder(target: Path) -> tuple[Path, int | None]:
    while True:
        folder = _staging_name(target)
        folder.mkdir()
        if fcntl is None:
            return folder, None
        try:
            descriptor = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            continue  # another process took it for remains before it was locked
        except OSError:
            folder.rmdir()
            raise
        if _acquire(descriptor, wait=False) is not False and folder.exists():
            return folder, descriptor
        os.close(descriptor)


def _remove_dead_stagings(target: Path) -> None:
    for folder in target.parent.iterdir():
        if folder.name.startswith(_prefix(target)):
            with suppress(OSError):  # removed by another process meanwhile, or not ours to remove
                _remove_if_dead(folder, is_local=folder.name.startswith(_prefix(target) + _HOST))


def _remove_if_dead(folder: Path, is_local: bool) -> None:
    is_old = time.time() - folder.stat().st_mtime > _OLD_SECONDS
    with _lock(folder, wait=False) as is_free:
        if (is_free and is_local) or (is_free is not False and is_old):
            shutil.rmtree(folder, ignore_errors=True)


# ---------------------------------------------------------------- the file system


@contextmanager
def _lock(folder: Path, *, wait: bool) -> Iterator[bool | None]:
    """Lock a folder against other processes; yields whether that worked, None where there are no locks."""
    if fcntl is None:
        yield None
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield _acquire(descriptor, wait)
    finally:
        os.close(descriptor)  # frees the lock


def _acquire(descriptor: int, wait: bool) -> bool | None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return None
    return True


def _sync(path: Path) -> None:
    """Have the disk hold what was written (not folders on Windows, which cannot be opened for that)."""
    if path.is_symlink() or not (path.is_file() or (path.is_dir() and os.name != "nt")):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
