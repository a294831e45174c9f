"""Every tutorial runs from top to bottom, as a reader would run it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from cellweave.datasets._registry import STUDIES

TUTORIALS = sorted((Path(__file__).resolve().parents[2] / "tutorials").glob("*.ipynb"))
# Seconds for one cell; a guard against a cell that hangs.
CELL_TIMEOUT = 1200

by_name = pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)


def read(path: Path):
    nbformat = pytest.importorskip("nbformat", reason="reading tutorials needs nbformat (extra `test`)")
    return nbformat.read(path, as_version=4)


def code_of(notebook) -> str:
    return "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")


def assembled_files(code: str) -> list[str]:
    """Files of the assembled data sets that the code reads; `cw.datasets.pbmc68k` comes with scanpy and needs none."""
    called = re.findall(r"cw\.datasets\.(\w+)\(", code)
    return [STUDIES[name].file for name in dict.fromkeys(called) if name in STUDIES]


def test_there_are_tutorials():
    """The other tests would pass on an empty folder."""
    assert TUTORIALS


@by_name
def test_stored_outputs_are_complete_and_clean(path: Path):
    """The documentation shows notebooks as they are stored: run once in order, with figures, without errors or warnings."""
    cells = [cell for cell in read(path).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert path.stat().st_size < 1_000_000


def test_assembled_data_sets_are_found_in_code():
    """Protects the rule that skips a run: every assembled set that is read is seen, whatever brings its data along is not."""
    code = (
        "cw.datasets.pbmc68k()\na = cw.datasets.levine32()\nb = cw.datasets.levine32 ()\ncw.datasets.bmmc_cytof(path)"
    )
    assert assembled_files(code) == ["cytometry/levine32_stratified.h5ad", "cytometry/bmmc_basal1.h5ad"]
    used = {path.stem: assembled_files(code_of(read(path))) for path in TUTORIALS}
    assert used["stack_quickstart"] == []
    assert used["scyan_annotation"] == ["cytometry/multicenter_6samples.h5ad"]
    assert used["scyan_citeseq"] == ["pbmc10k_citeseq_698g.h5ad"]
    assert used["ccfm_perturbation"] == ["kang_ifnb.h5ad", "papalexi_thp1_299g.h5ad"]


@by_name
def test_tutorials_use_public_names_only(path: Path):
    """What a reader copies must not break with the next version."""
    code = code_of(read(path))
    assert "cw._" not in code
    assert "/work/" not in code


@pytest.mark.slow
@by_name
def test_tutorials_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, real_data: Callable[[str], Path]):
    """A change of the API that breaks a tutorial is found here and not by a reader; skipped where its data are absent."""
    nbclient = pytest.importorskip("nbclient", reason="running tutorials needs nbclient (extra `test`)")
    pytest.importorskip("ipykernel", reason="running tutorials needs ipykernel (extra `test`)")
    # threads that fight for busy cores make small models ten times slower; numba hands its number on to torch
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    notebook = read(path)
    for file in assembled_files(code_of(notebook)):
        folder = str(real_data(file)).removesuffix(file)
        monkeypatch.setenv("CELLWEAVE_DATA", folder)  # also where the tests found the folder by themselves
    client = nbclient.NotebookClient(
        notebook, timeout=CELL_TIMEOUT, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()  # raises CellExecutionError with the traceback of the cell
    assert not list(tmp_path.iterdir()), "a tutorial leaves files in the folder of its reader"
