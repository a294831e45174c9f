"""Saves of model directories that fail, are killed or meet each other: the old or the new model, never a half."""

from __future__ import annotations

import errno
import os
import signal
import time

import numpy as np
import pytest
import safetensors.torch

from cellweave.io import SavedModel, read_model, write_model
from cellweave.io import _model_files as files
from cellweave.io import _replace as replacing

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


def _number_of_operations(tmp_path, overwrite: bool, content: SavedModel) -> int:
    target = tmp_path / "count" / "m"
    if overwrite:
        write_model(target, content)
    with pytest.MonkeyPatch.context() as patch:
        calls = _count_and_stop(patch, -1, "before", lambda: None)
        write_model(target, content, overwrite=True)
        return len(calls)


def _full_disk():
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("overwrite", [False, True])
def test_failed_save_keeps_the_old_model_and_cleans_up(tmp_path, overwrite, make_content, value_of):
    """Protects against a full disk at any moment: one sentence, the old model stays, nothing half-written stays."""
    outcomes = set()
    for stop_at in range(1, _number_of_operations(tmp_path, overwrite, make_content()) + 1):
        folder = tmp_path / str(stop_at)
        if overwrite:
            write_model(folder / "m", make_content(1.0))
        with pytest.MonkeyPatch.context() as patch:
            _count_and_stop(patch, stop_at, "before", _full_disk)
            try:
                write_model(folder / "m", make_content(2.0), overwrite=overwrite)
                outcomes.add(outcome := "saved")
            except OSError as error:
                outcome = "failed"
                assert str(error).startswith(
                    f"The model could not be saved to `{folder / 'm'}`: No space left on device"
                )
                assert error.errno == errno.ENOSPC
                outcomes.add("failed")
        left = os.listdir(folder) if folder.exists() else []
        # what could not be removed after the new model was in place waits for the next save
        assert left in ([], ["m"]) or outcome == "saved"
        if outcome == "saved" or overwrite:
            assert value_of(folder / "m") == (2 if outcome == "saved" else 1)
        write_model(folder / "m", make_content(3.0), overwrite=True)
        assert os.listdir(folder) == ["m"]
    assert "failed" in outcomes


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork to kill a process while it saves")
killed = pytest.mark.filterwarnings("ignore:.*was being replaced when the process:UserWarning")


@needs_fork
@killed
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_save_leaves_a_loadable_model(tmp_path, overwrite, when, make_content, value_of):
    """Protects against a kill at any moment of a save: the old or the new model loads, and saving cleans up."""
    seen = set()
    for stop_at in range(1, _number_of_operations(tmp_path, overwrite, make_content()) + 1):
        target = tmp_path / f"{stop_at}" / "m"
        target.parent.mkdir()
        if overwrite:
            write_model(target, make_content(1.0))
        _save_and_die(target, make_content(2.0), stop_at, when)
        if overwrite or target.exists():
            seen.add(value_of(target))
        write_model(target, make_content(3.0), overwrite=True)
        assert value_of(target) == 3
        assert os.listdir(target.parent) == ["m"]
    assert seen == ({1.0, 2.0} if overwrite else {2.0})


def _save_and_die(target, content: SavedModel, stop_at: int, when: str) -> None:
    """Save in a child process that is killed at the given operation."""
    child = os.fork()
    if child == 0:
        try:
            _count_and_stop(pytest.MonkeyPatch(), stop_at, when, lambda: os.kill(os.getpid(), signal.SIGKILL))
            write_model(target, content, overwrite=True)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, "the child must die at the operation"


@killed
def test_model_left_under_the_backup_name_is_still_a_model(saved, make_content, value_of):
    """Protects the old model of a killed save: it is read with a warning, needs `overwrite`, and is put back."""
    saved.rename(replacing.backup_of(saved))
    with pytest.warns(UserWarning, match="was being replaced when the process that did it ended"):
        assert value_of(saved) == 1
    with pytest.raises(FileExistsError, match="overwrite=True"):
        write_model(saved, make_content(2.0))
    assert os.listdir(saved.parent) == ["m"]
    assert value_of(saved) == 1


@needs_fork
def test_save_of_a_living_process_is_left_alone(tmp_path, make_content, value_of):
    """Protects two processes that save the same name: each finishes, neither removes the files of the other."""
    target = tmp_path / "m"
    (may_go, go), (is_there, there) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        try:
            write = files.np.savez

            def slow(*args, **kwargs):
                os.write(there, b"x")
                os.read(may_go, 1)
                return write(*args, **kwargs)

            files.np.savez = slow
            write_model(target, make_content(2.0), overwrite=True)
            os._exit(0)
        finally:
            os._exit(1)
    os.close(there)  # so that a child that dies early ends the wait
    try:
        assert os.read(is_there, 1) == b"x"
        staging = [name for name in os.listdir(tmp_path) if name.startswith(".m.saving-")]
        write_model(target, make_content(1.0), overwrite=True)
        write_model(target, make_content(1.5), overwrite=True)
        assert set(os.listdir(tmp_path)) == {"m", *staging}
        assert len(staging) == 1
    except BaseException:
        os.kill(child, signal.SIGKILL)
        raise
    finally:
        os.write(go, b"x")
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        for descriptor in (may_go, go, is_there):
            os.close(descriptor)
    assert code == 0
    assert value_of(target) == 2
    assert os.listdir(tmp_path) == ["m"]


@pytest.mark.parametrize("has_locks", [True, False])
def test_remains_of_other_computers_are_removed_when_they_are_old(saved, has_locks, monkeypatch, make_content):
    """Protects shared file systems, where locks may not be seen: only remains of a day ago are surely dead."""
    new, old = (saved.with_name(f".m.saving-{host}-0") for host in ("aaaaaaaa", "bbbbbbbb"))
    for folder in (new, old):
        folder.mkdir()
    os.utime(old, (time.time() - 2 * 24 * 60 * 60,) * 2)
    if not has_locks:
        monkeypatch.setattr(replacing, "fcntl", None)
    write_model(saved, make_content(2.0), overwrite=True)
    assert sorted(os.listdir(saved.parent)) == [new.name, "m"]


def test_model_replaced_while_it_is_read_is_read_again(saved, monkeypatch, make_content, assert_same):
    """Protects readers beside a training run: never the weights of one save and the config of another."""
    decode = files._decoded
    values = iter([2.0, 3.0])

    def decode_and_replace(path):
        content = decode(path)
        if path.name == "config.json" and (value := next(values, None)):
            write_model(saved, make_content(value), overwrite=True)
        return content

    monkeypatch.setattr(files, "_decoded", decode_and_replace)
    assert_same(read_model(saved), make_content(3.0))


@needs_fork
def test_real_limit_of_the_file_system(saved, make_content, assert_same):
    """Protects against real write errors, also those of safetensors: the sentence, the old model, no remains."""
    resource = pytest.importorskip("resource", reason="no limits of file sizes")
    sizes = [path.stat().st_size for path in saved.iterdir()]
    for limit in sorted({0, 1, *(size - 1 for size in sizes)}):
        child = os.fork()
        if child == 0:
            try:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
                write_model(saved, make_content(2.0), overwrite=True)
            except OSError as error:
                os._exit(0 if str(error).startswith("The model could not be saved to `") else 2)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, f"limit of {limit} bytes"
        assert os.listdir(saved.parent) == ["m"]
        assert_same(read_model(saved), make_content())
