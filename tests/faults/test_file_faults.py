"""Damaged, killed, forged and foreign model files, one row per fault of the table, for every model family.

Each row ends in one sentence that names the file, and never in another model, a wrong number or code that runs.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import signal
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData

from cellweave.io import ModelFileError, SavedModel, inspect_model, read_model
from cellweave.io import _model_files as files

# ---------------------------------------------------------------- saved models


class Saved(NamedTuple):
    """A saved model of a family."""

    fitted: Any  # the family, its trained model and its embedding; see conftest.py
    path: Any

    def load(self, adata: AnnData | None = None) -> Any:
        return self.fitted.family.model.load(self.path, adata, accelerator="cpu")


@pytest.fixture
def saved(fitted, tmp_path) -> Saved:
    fitted.model.save(tmp_path / "m")
    return Saved(fitted, tmp_path / "m")


@pytest.fixture(scope="module")
def other(fitted) -> Any:
    """A second model of the family with other weights, and otherwise the same."""
    model = fitted.family.fit(fitted.make())
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.add_(0.5)
    return model


def _first_weight(model: Any) -> torch.Tensor:
    return next(iter(model.module.parameters())).detach()


def _refused(saved: Saved, message: str) -> None:
    with pytest.raises(ModelFileError, match=message) as caught:
        saved.load()
    assert "\n" not in str(caught.value)


def _names(saved: Saved) -> list[str]:
    return sorted(os.listdir(saved.path))


# ---------------------------------------------------------------- row 49: damage


def test_hundred_flipped_bits_are_noticed(saved):
    """Protects row 49 and against silent corruption: 100 of 100 single flipped bits are refused, naming the file."""
    names, rng, refused = _names(saved), np.random.default_rng(0), 0
    for i in range(100):
        path = saved.path / names[i % len(names)]
        intact = path.read_bytes()
        damaged = bytearray(intact)
        damaged[rng.integers(len(intact))] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        _refused(saved, f"{path.name}` (does not match its checksum|is damaged)")
        refused += 1
        path.write_bytes(intact)
    assert refused == 100
    np.testing.assert_array_equal(saved.load(saved.fitted.make()).get_latent_representation(), saved.fitted.z)


def test_truncated_files_are_noticed(saved):
    """Protects row 49: files cut at random lengths, down to nothing, are refused, naming the file."""
    rng = np.random.default_rng(1)
    for name in _names(saved):
        path = saved.path / name
        intact = path.read_bytes()
        for length in (0, 1, len(intact) - 1, *rng.integers(len(intact), size=5)):
            path.write_bytes(intact[:length])
            _refused(saved, f"{name}` (does not match its checksum|is damaged)")
        path.write_bytes(intact)
    saved.load()


def test_missing_files_are_noticed(saved, tmp_path):
    """Protects row 49: each file that is missing is named."""
    for name in _names(saved):
        shutil.move(saved.path / name, tmp_path / name)
        _refused(saved, f"{name}` is missing|it has no {name}")
        shutil.move(tmp_path / name, saved.path / name)
    saved.load()


def test_files_of_another_model_are_noticed(saved, other, tmp_path):
    """Protects row 49: a file from another save of the same family, or two files that changed names, are refused."""
    other.save(tmp_path / "other")
    weights = saved.path / "weights.safetensors"
    intact = weights.read_bytes()
    shutil.copy(tmp_path / "other" / weights.name, weights)
    _refused(saved, "weights.safetensors` does not match its checksum")
    weights.write_bytes(intact)
    config, registry = (saved.path / name for name in ("config.json", "registry.json"))
    config.rename(saved.path / "x"), registry.rename(config), (saved.path / "x").rename(registry)
    _refused(saved, "(config|registry).json` does not match its checksum")


def test_unlisted_files_do_not_matter(saved):
    """Protects users and model hubs that put a README beside a model: it changes nothing."""
    (saved.path / "README.md").write_text("# My model")
    np.testing.assert_array_equal(saved.load(saved.fitted.make()).get_latent_representation(), saved.fitted.z)


def test_wrong_class_is_named(saved):
    """Protects row 49: a model of another class is refused with both names."""
    other = type("OtherModel", (saved.fitted.family.model,), {})
    with pytest.raises(ModelFileError, match=f"holds a {saved.fitted.family.model.__name__}, not a OtherModel"):
        other.load(saved.path)


def test_newer_schema_is_named(saved):
    """Protects row 49: files of a future version are refused with the version that reads them."""
    _forge(saved, schema=files.SCHEMA + 1, cellweave="9.9")
    _refused(saved, rf"has file schema {files.SCHEMA + 1}, .* upgrade cellweave to at least 9\.9")


def test_argument_of_a_newer_version_is_named(saved):
    """Protects files of a future version of the same schema: an unknown argument is named, not dropped."""
    config = json.loads((saved.path / "config.json").read_text())
    config["init_params"]["non_kwargs"]["telepathy"] = True
    (saved.path / "config.json").write_text(json.dumps(config))
    _forge(saved, cellweave="9.9")
    _refused(saved, r"saved with the argument `telepathy`, which this .* upgrade cellweave to at least 9\.9")


@pytest.mark.parametrize("change", ["lacks", "has", "shape"])
def test_weights_that_do_not_fit_are_named(saved, change):
    """Protects against the many lines of torch: the first weight that does not fit its model is named."""
    content = read_model(saved.path)
    name = sorted(content.weights)[0]
    weights = dict(content.weights)
    if change == "lacks":
        del weights[name]
    elif change == "has":
        weights["extra.weight"] = torch.zeros(1)
    else:
        weights[name] = torch.zeros(1, 2, 3, 4)
    files.write_model(saved.path, content._replace(weights=weights), overwrite=True)
    expected = {"lacks": f"lacks the weight `{name}`", "has": "has the weight `extra.weight`", "shape": "has shape"}
    _refused(saved, expected[change])


def test_no_model_is_named(fitted, saved, tmp_path):
    """Protects row 49: a path that does not exist, an empty directory and a file in place of one are named."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for name, message in {"nothing": "it does not exist", "empty": "has no MANIFEST", "file": "is a file"}.items():
        _refused(Saved(fitted, tmp_path / name), message)


def _forge(saved: Saved, **fields: Any) -> None:
    """Write a manifest with right checksums of whatever lies there."""
    manifest = json.loads((saved.path / "MANIFEST.json").read_text())
    for name, entry in manifest["files"].items():
        entry.update(sha256=files._sha256(saved.path / name), size=(saved.path / name).stat().st_size)
    body = {key: value for key, value in {**manifest, **fields}.items() if key != "digest"}
    (saved.path / "MANIFEST.json").write_bytes(files._manifest_bytes(body))


# ---------------------------------------------------------------- row 48: pickles


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Any) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (self.path.touch, ())


def _as_pickle(path: Any, payload: Payload) -> None:
    path.write_bytes(pickle.dumps(payload))


def _as_torch_file(path: Any, payload: Payload) -> None:
    torch.save({"model_state_dict": payload, "attr_dict": payload, "var_names": payload}, path)


def _as_object_array(path: Any, payload: Payload) -> None:
    with path.open("wb") as file:
        np.savez(file, train_indices=np.array([payload], dtype=object))


def _as_pickled_array(path: Any, payload: Payload) -> None:
    with path.open("wb") as file:
        np.save(file, np.array([payload], dtype=object), allow_pickle=True)


FORMS: dict[str, Callable] = {
    "pickle": _as_pickle,
    "torch": _as_torch_file,
    "npz": _as_object_array,
    "npy": _as_pickled_array,
}


def test_the_payload_is_one(tmp_path):
    """Protects the tests below: whoever unpickles one of these files runs its code."""
    for name, write in FORMS.items():
        write(tmp_path / name, Payload(tmp_path / f"executed_{name}"))
    pickle.loads((tmp_path / "pickle").read_bytes())
    torch.load(tmp_path / "torch", weights_only=False)
    np.load(tmp_path / "npz", allow_pickle=True)["train_indices"]
    np.load(tmp_path / "npy", allow_pickle=True)
    assert len(list(tmp_path.glob("executed_*"))) == len(FORMS)


@pytest.mark.parametrize("form", FORMS)
def test_pickles_with_right_checksums_are_not_executed(saved, tmp_path, form):
    """Protects row 48: a pickle in the place of any file, with a manifest forged to match, is refused unread."""
    for name in set(_names(saved)) - {"MANIFEST.json"}:
        intact = (saved.path / name).read_bytes()
        FORMS[form](saved.path / name, Payload(tmp_path / "executed"))
        _forge(saved)
        _refused(saved, f"{name}` is not what a model directory holds")
        (saved.path / name).write_bytes(intact)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("change", ["other attributes", "no rows"])
def test_forged_rows_cannot_change_the_model(saved, change):
    """Protects the methods of a model: names and values in `indices.npz` are those of the data split, or refused."""
    rows = {"module": np.arange(3), "load": np.arange(3)} if change == "other attributes" else {"train_indices": "x"}
    with (saved.path / "indices.npz").open("wb") as file:
        np.savez(file, **rows)
    _forge(saved)
    if change == "no rows":
        _refused(saved, "indices.npz` is not what a model directory holds: 'train_indices' is no array of rows")
    else:
        assert isinstance(saved.load().module, torch.nn.Module)


def test_forged_registry_cannot_choose_what_is_called(saved):
    """Protects against a registry that names another method than the two setups of a model class."""
    registry = json.loads((saved.path / "registry.json").read_text())
    registry["setup_method_name"] = "convert_legacy_save"
    (saved.path / "registry.json").write_text(json.dumps(registry))
    _forge(saved)
    with pytest.raises(ModelFileError, match="names the setup method 'convert_legacy_save'"):
        saved.load(saved.fitted.make())


def test_pickle_as_manifest_is_not_executed(saved, tmp_path):
    """Protects row 48: a manifest that is in truth a pickle is damaged, and not executed."""
    _as_pickle(saved.path / "MANIFEST.json", Payload(tmp_path / "executed"))
    _refused(saved, "MANIFEST.json` is damaged")
    assert not (tmp_path / "executed").exists()


# every way in which a model class of scvi-tools reads a directory
READERS: dict[str, Callable] = {
    "load": lambda model, path, adata: model.load(path, adata),
    "load_registry": lambda model, path, adata: model.load_registry(path),
    "view_setup_args": lambda model, path, adata: model.view_setup_args(path),
    "convert_legacy_save": lambda model, path, adata: model.convert_legacy_save(path, f"{path}_new"),
    "inspect_model": lambda model, path, adata: inspect_model(path),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("legacy", [False, True])
def test_directory_of_scvi_tools_is_not_executed(fitted, tmp_path, reader, legacy):
    """Protects row 48: a crafted directory in the format of scvi-tools is explained by every reader, unread."""
    folder, payload = tmp_path / "scvi", Payload(tmp_path / "executed")
    folder.mkdir()
    for name in ("model_params.pt", "attr.pkl", "model.pt") if legacy else ("model.pt",):
        _as_torch_file(folder / name, payload)
    (folder / "var_names.csv").write_text("gene0\n")
    with pytest.raises((ModelFileError, NotImplementedError), match="pickles?,? .*can run code"):
        READERS[reader](fitted.family.model, folder, fitted.make())
    assert not (tmp_path / "executed").exists()
    assert sorted(os.listdir(tmp_path)) == ["scvi"]


def test_registry_is_read_without_pickles(saved, capsys):
    """Protects `load_registry` and `view_setup_args`, which read pickles in scvi-tools: they work on safe files."""
    model = saved.fitted.family.model
    assert model.load_registry(saved.path)["setup_args"] == saved.fitted.model.registry["setup_args"]
    model.view_setup_args(saved.path)
    assert "layer" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["../outside.json", "model.pt"])
def test_manifest_cannot_lead_elsewhere(saved, tmp_path, name):
    """Protects row 48: a manifest that lists a file outside the directory, or a pickle in it, is refused."""
    _as_pickle(saved.path / name, Payload(tmp_path / "executed"))
    listed = json.loads((saved.path / "MANIFEST.json").read_text())["files"]
    _forge(saved, files={**listed, name: {"sha256": files._sha256(saved.path / name), "size": 1}})
    _refused(saved, f"lists '{name}'")
    assert not (tmp_path / "executed").exists()


# ---------------------------------------------------------------- rows 37 and 47: interrupted saves

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork to kill a process while it saves")
killed = pytest.mark.filterwarnings("ignore:.*was being replaced when the process:UserWarning")
# every change of the file system, and every opened file; Python announces them before they happen
EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "os.scandir", "os.listdir"}


def _in_child(work: Callable[[], None], at_event: Callable[[int, str], None]) -> int:
    """Exit code of a process that does ``work`` and calls ``at_event`` with the number of each event."""
    child = os.fork()
    if child == 0:
        count = 0

        def hook(event: str, _: tuple) -> None:
            nonlocal count
            if event in EVENTS:
                count += 1
                at_event(count, event)

        try:
            sys.addaudithook(hook)  # cannot be removed, which a process that ends need not care about
            work()
            at_event(-1, f"{count}")
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _events_of_a_save(work: Callable[[], None], tmp_path: Any) -> list[str]:
    """The events of a save, in order."""
    read, write = os.pipe()
    assert _in_child(work, lambda count, event: os.write(write, f"{event}\n".encode())) == 0
    os.close(write)
    with os.fdopen(read) as pipe:
        return pipe.read().split()[:-1]


def _kill_points(events: list[str], n: int = 20) -> list[int]:
    """All renames, with what follows them, and other events evenly over the save: ``n`` or more."""
    renames = {i + k for i, event in enumerate(events, start=1) if event == "os.rename" for k in (0, 1)}
    evenly = np.linspace(1, len(events), n).round().astype(int).tolist()
    return sorted({*evenly, *(i for i in renames if i <= len(events))})


def _kill_at(point: int) -> Callable[[int, str], None]:
    def at_event(n: int, _: str) -> None:
        if n == point:
            os.kill(os.getpid(), signal.SIGKILL)

    return at_event


def _start_again(saved: Saved, model: Any | None) -> None:
    """An empty folder, in which ``model`` is saved if there is one."""
    shutil.rmtree(saved.path.parent, ignore_errors=True)
    saved.path.parent.mkdir()
    if model is not None:
        model.save(saved.path)


@needs_fork
@killed
@pytest.mark.parametrize("first", [False, True])
def test_killed_saves_leave_the_old_or_the_new_model(fitted, other, tmp_path, first):
    """Protects row 47: killed at 20 points, a save leaves the old or the new model, complete; the next cleans up.

    Of a first save nothing or the whole model is left.
    """
    old, new = _first_weight(fitted.model), _first_weight(other)
    saved, outcomes = Saved(fitted, tmp_path / "x" / "m"), []

    _start_again(saved, None if first else fitted.model)
    points = _kill_points(_events_of_a_save(lambda: other.save(saved.path, overwrite=True), tmp_path))
    assert len(points) >= 20
    for point in points:
        _start_again(saved, None if first else fitted.model)
        code = _in_child(lambda: other.save(saved.path, overwrite=True), _kill_at(point))
        assert code == -signal.SIGKILL, "the process must die at the point"
        if first and not saved.path.exists():
            _refused(saved, "it does not exist")
            outcomes.append("none")
        else:
            loaded = saved.load()
            is_new = torch.equal(_first_weight(loaded), new)
            assert is_new or not first
            expected = (other if is_new else fitted.model).module.state_dict()
            torch.testing.assert_close(loaded.module.state_dict(), expected, rtol=0, atol=0)
            outcomes.append("new" if is_new else "old")
        fitted.model.save(saved.path, overwrite=True)
        assert os.listdir(saved.path.parent) == ["m"], "nothing of the dead save may stay"
        torch.testing.assert_close(_first_weight(saved.load()), old, rtol=0, atol=0)
    assert set(outcomes) == {"none" if first else "old", "new"}


@needs_fork
@pytest.mark.parametrize("first", [False, True])
def test_full_disk_at_any_moment(fitted, other, tmp_path, first):
    """Protects row 37: a full disk ends in one sentence, the model before it still loads, nothing half-written stays."""
    saved = Saved(fitted, tmp_path / "x" / "m")
    events = _events_of_a_save(lambda: other.save(tmp_path / "y", overwrite=True), tmp_path)

    def save() -> None:
        try:
            other.save(saved.path, overwrite=True)
        except OSError as error:
            sentence = str(error)
            if sentence.startswith(f"The model could not be saved to `{saved.path}`: No space left on device;"):
                os._exit(3)

    def full(point: int) -> Callable[[int, str], None]:
        def at_event(n: int, _: str) -> None:
            if n == point:
                raise OSError(errno.ENOSPC, "No space left on device")

        return at_event

    failed = 0
    for point in (i for i, event in enumerate(events, start=1) if event in ("open", "os.mkdir")):
        _start_again(saved, None if first else fitted.model)
        if _in_child(save, full(point)) == 3:
            failed += 1
            assert os.listdir(saved.path.parent) == ([] if first else ["m"])
        else:  # the new model was in place already
            torch.testing.assert_close(_first_weight(saved.load()), _first_weight(other), rtol=0, atol=0)
            continue
        if not first:
            torch.testing.assert_close(_first_weight(saved.load()), _first_weight(fitted.model), rtol=0, atol=0)
    assert failed >= 5


def test_deleted_while_saving(fitted, other, tmp_path, monkeypatch):
    """Protects row 37: a model that is deleted while its successor is written does not hinder the successor."""
    fitted.model.save(tmp_path / "m")
    write = files._write_files

    def write_and_delete(folder: Any, content: SavedModel, previous: Any) -> None:
        write(folder, content, previous)
        shutil.rmtree(tmp_path / "m")

    monkeypatch.setattr(files, "_write_files", write_and_delete)
    other.save(tmp_path / "m", overwrite=True)
    assert os.listdir(tmp_path) == ["m"]
    loaded = Saved(fitted, tmp_path / "m").load()
    torch.testing.assert_close(_first_weight(loaded), _first_weight(other), rtol=0, atol=0)


# ---------------------------------------------------------------- row 41: MuData


def test_saved_model_names_a_modality_that_is_missing(fitted, make_adata, tmp_path):
    """Protects row 41: a model of one modality of a MuData names it when new data lack it."""
    mudata = pytest.importorskip("mudata")
    family = fitted.family
    if not hasattr(family.model, "setup_mudata"):
        pytest.skip("this family reads no MuData")
    main, adt = fitted.make(), make_adata(n_genes=5)
    mdata = mudata.MuData({"main": main, "adt": adt})
    modalities = {family.part: "main", "batch_key": "main"}
    family.model.setup_mudata(mdata, batch_key="batch", modalities=modalities)
    model = family.train(family.model(mdata, **family.arguments))
    model.save(tmp_path / "m")
    loaded = Saved(fitted, tmp_path / "m")
    with pytest.raises(ValueError, match="modality 'main', but `mdata.mod` has \\['adt'\\]"):
        loaded.load(mudata.MuData({"adt": adt}))
    z = loaded.load(mudata.MuData({"main": fitted.make(), "adt": adt})).get_latent_representation()
    np.testing.assert_array_equal(z, model.get_latent_representation())


def test_history_of_a_saved_model_is_a_frame(saved):
    """Protects the curves, which scvi-tools keeps in a pickle: they come back from JSON as they were."""
    for name, frame in saved.fitted.model.history.items():
        pd.testing.assert_frame_equal(saved.load().history[name], frame, check_index_type=False)
