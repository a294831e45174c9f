"""The command line: quick to answer, and a demo that writes what it says and reports what came out."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any

import anndata
import matplotlib.image
import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from cellweave.cli import EMBEDDINGS, LABELS, app
from cellweave.tl import label_scores

FILES = {"pbmc68k_stack.h5ad", "scores.csv", "training_curves.png", "umap.png"}


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, arguments)


def test_the_version_is_that_of_the_installed_package():
    """What people copy into a bug report."""
    result = run("--version")
    assert result.exit_code == 0
    assert result.output.strip() == f"cellweave {version('cellweave')}"


def test_the_command_is_installed():
    """pyproject.toml and this file must name the same object."""
    [command] = entry_points(group="console_scripts", name="cellweave")
    assert command.load() is app


def test_help_needs_no_heavy_package():
    """``cellweave --help`` answers at once, because torch, scvi, scanpy and matplotlib are imported by commands."""
    code = (
        "import sys, cellweave.cli\n"
        "loaded = [m for m in ('torch', 'scvi', 'scanpy', 'matplotlib', 'pandas') if m in sys.modules]\n"
        "sys.stdout.write(repr(loaded))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]"
    assert "demo" in run("--help").output


def test_an_impossible_number_of_epochs_is_refused(tmp_path: Path):
    """The error comes before minutes of work, and nothing is written."""
    result = run("demo", "--out", str(tmp_path / "demo"), "--max-epochs", "0")
    assert result.exit_code == 2
    assert "max-epochs" in result.output
    assert not (tmp_path / "demo").exists()


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder and output of a demo of a single epoch."""
    folder = tmp_path_factory.mktemp("cli") / "new" / "demo"
    result = run("demo", "--out", str(folder), "--max-epochs", "1")
    assert result.exit_code == 0, result.output
    return folder, result.output


@pytest.mark.slow
def test_the_demo_writes_its_files_and_nothing_else(demo):
    """Missing folders are made; the message at the end names the files."""
    folder, output = demo
    assert {path.name for path in folder.iterdir()} == FILES
    assert all(name in output for name in FILES)


@pytest.mark.slow
def test_the_data_can_be_opened_in_scanpy(demo):
    """The file holds every result at the place that scanpy and the README use, with its origin."""
    adata = anndata.read_h5ad(demo[0] / "pbmc68k_stack.h5ad")
    assert adata.shape == (700, 765)
    assert adata.obsm["X_stack"].shape[0] == 700
    assert adata.obsm["X_umap"].shape == adata.obsm["X_umap_pca"].shape == (700, 2)
    np.testing.assert_allclose(adata.layers["stack_normalized"].sum(axis=1), 1e4, rtol=1e-3)
    assert {"X_stack", "stack_normalized"} <= set(adata.uns["cellweave"])
    counts = adata.X.toarray()
    np.testing.assert_array_equal(counts, np.rint(counts))  # normalisation did not touch the raw counts


@pytest.mark.slow
def test_the_scores_are_those_of_the_written_embeddings(demo):
    """The table is honest only if everybody can compute it again from the file."""
    adata = anndata.read_h5ad(demo[0] / "pbmc68k_stack.h5ad")
    written = pd.read_csv(demo[0] / "scores.csv", index_col="method")
    again = label_scores(adata, list(EMBEDDINGS), LABELS).rename(index=EMBEDDINGS)
    assert list(written.index) == ["StackModel", "PCA (30)", "count shares", "gene mean share"]
    # written with three digits; KMeans may move a cell after the round trip through the file
    np.testing.assert_allclose(written.loc[again.index, again.columns], again, atol=0.01)


@pytest.mark.slow
def test_a_bad_model_gets_bad_scores(demo):
    """After one epoch PCA is better and the mean share predicts hidden genes better; the demo says so."""
    folder, output = demo
    written = pd.read_csv(folder / "scores.csv", index_col="method")
    assert written.loc["StackModel", "knn_accuracy"] < written.loc["PCA (30)", "knn_accuracy"]
    assert written.loc["StackModel", "masked_corr"] < written.loc["gene mean share", "masked_corr"]
    for value in written.loc["StackModel"]:
        assert f"{value:.3f}" in output


@pytest.mark.slow
@pytest.mark.parametrize("name", ["umap.png", "training_curves.png"])
def test_the_figures_are_not_blank(demo, name: str):
    """A figure that was closed or saved before drawing is a white page."""
    image = matplotlib.image.imread(demo[0] / name)[..., :3]
    assert 0.005 < (image.min(axis=-1) < 0.9).mean() < 0.5
    colours = {tuple(c) for c in np.rint(image.reshape(-1, 3) * 255).astype(int)[::7]}
    assert len(colours) > 10
