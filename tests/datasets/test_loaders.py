"""Assembled data sets: where they are looked for, how they are checked, what a reader learns from the loaders."""

from __future__ import annotations

import inspect
import os
import re
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import cellweave as cw
from cellweave.datasets import _load
from cellweave.datasets._registry import STUDIES, Study

NAMES = sorted(set(cw.datasets.__all__) - {"pbmc68k"})
SHARED = Path(os.environ.get("CELLWEAVE_DATA", Path(__file__).parents[3] / "shared" / "data"))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Study:
    """A registered study of four cells and three genes; the folder variable is unset."""
    study = Study("tiny.h5ad", (4, 3), "0" * 64, ("batch", "donor"), "Doe et al. 2020", "doe/tiny", "MIT")
    monkeypatch.setitem(STUDIES, "tiny", study)
    monkeypatch.delenv("CELLWEAVE_DATA", raising=False)
    return study


def write(path: Path, shape: tuple[int, int] = (4, 3), columns: tuple[str, ...] = ("batch", "donor")) -> Path:
    obs = pd.DataFrame({column: ["a"] * shape[0] for column in columns}, index=[f"c{i}" for i in range(shape[0])])
    counts = np.arange(shape[0] * shape[1], dtype=np.int32).reshape(shape)
    anndata.AnnData(sp.csc_matrix(counts), obs=obs).write_h5ad(path)
    return path


@pytest.mark.filterwarnings("ignore:.*another sha256")
@pytest.mark.parametrize("how", ["file", "folder", "variable"])
def test_places(how: str, tiny: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Protects the three ways to name a file; whatever is stored, X is float32 CSR with the same numbers."""
    file = write(tmp_path / tiny.file)
    if how == "variable":
        monkeypatch.setenv("CELLWEAVE_DATA", str(tmp_path))
    adata = _load.load_study("tiny", {"file": file, "folder": str(tmp_path), "variable": None}[how])
    assert sp.isspmatrix_csr(adata.X)
    assert adata.X.dtype == np.float32
    np.testing.assert_array_equal(adata.X.toarray(), np.arange(12).reshape(4, 3))
    assert adata.uns["cellweave"]["dataset"]["citation"] == "Doe et al. 2020"


@pytest.mark.filterwarnings("ignore:.*another sha256")
def test_path_wins_over_the_variable(tiny: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Protects an explicit wish: with a path, the variable is not looked at, not even as a fallback."""
    write(tmp_path / tiny.file)
    monkeypatch.setenv("CELLWEAVE_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        _load.load_study("tiny", tmp_path / "elsewhere")


@pytest.mark.parametrize("name", NAMES)
def test_missing_file_says_where_the_study_is(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Protects a new user: one sentence with the study, the file name, the variable and the public carrier."""
    monkeypatch.delenv("CELLWEAVE_DATA", raising=False)
    study = STUDIES[name]
    with pytest.raises(FileNotFoundError) as unset:
        getattr(cw.datasets, name)()
    for part in (study.citation, study.file, study.carrier, "CELLWEAVE_DATA", f"'{name}'"):
        assert part in str(unset.value)
    assert str(unset.value).endswith(".")
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / study.file))):
        getattr(cw.datasets, name)(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": (5, 3)}, r"expected \(4, 3\) cells x genes, found \(5, 3\)"),
        ({"columns": ("batch",)}, r"adata\.obs lacks the columns \['donor'\]"),
    ],
)
def test_another_file_is_refused(change: dict, message: str, tiny: Study, tmp_path: Path):
    """Protects results from a file that only has the right name."""
    with pytest.raises(ValueError, match=message):
        _load.load_study("tiny", write(tmp_path / tiny.file, **change))


def test_changed_contents_are_announced(tiny: Study, tmp_path: Path):
    """Protects comparisons: the same shape with other contents loads, with a warning that names both checksums."""
    with pytest.warns(UserWarning, match=r"another sha256 \([0-9a-f]{12}… instead of 000000000000…\)"):
        adata = _load.load_study("tiny", write(tmp_path / tiny.file))
    assert re.fullmatch("[0-9a-f]{64}", adata.uns["cellweave"]["dataset"]["sha256"])


def test_every_registered_study_has_its_loader():
    """Protects the table: a study without a function could not be loaded, a function without a study would fail."""
    assert set(NAMES) == set(STUDIES)
    assert len({study.sha256 for study in STUDIES.values()}) == len(STUDIES)


@pytest.mark.parametrize("name", NAMES)
def test_loader_is_a_real_documented_function(name: str):
    """Protects readers: a signature that tools see, and a docstring with its own first line, study and sections."""
    loader = getattr(cw.datasets, name)
    text = inspect.getdoc(loader)
    assert list(inspect.signature(loader).parameters) == ["path"]
    assert loader.__name__ == name
    assert all(part in text for part in (STUDIES[name].citation, "Parameters\n---", "Returns\n---", "Raises\n---"))
    firsts = [inspect.getdoc(getattr(cw.datasets, other)).splitlines()[0] for other in NAMES]
    assert firsts.count(text.splitlines()[0]) == 1


@pytest.mark.filterwarnings("error:.*another sha256")
@pytest.mark.parametrize("name", NAMES)
def test_real_file(name: str):
    """Protects the registry against typing errors: the real files have the registered checksum, shape and columns."""
    file = SHARED / STUDIES[name].file
    if not file.exists():
        pytest.skip(f"real data set {file.name} not found in {SHARED}; set CELLWEAVE_DATA to the folder that holds it")
    adata = getattr(cw.datasets, name)(file)
    assert adata.X.dtype == np.float32
    if STUDIES[name].markers:  # raw intensities: not transformed yet, some below zero
        assert isinstance(adata.X, np.ndarray)
        assert np.isfinite(adata.X).all()
        assert 50 < adata.X.max()
        return
    np.testing.assert_array_equal(adata.X.data, np.rint(adata.X.data))
    assert adata.X.data.min() >= 0
