"""Shared fixtures. Number fixtures of the originals are read from ``tests/parity/fixtures``."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import scvi

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test starts from the same random state."""
    scvi.settings.seed = 0


@pytest.fixture(scope="session")
def stack_tiny() -> tuple[dict, dict[str, np.ndarray]]:
    """Numbers computed by the published Stack implementation: (metadata, arrays)."""
    folder = HERE / "parity" / "fixtures"
    with np.load(folder / "stack_tiny.npz") as arrays:
        return json.loads((folder / "stack_tiny.json").read_text()), dict(arrays)


def shared_data(name: str) -> Path:
    """Path of a real data set that is not part of the repository; skips the test where it is absent."""
    folder = Path(os.environ.get("CELLWEAVE_DATA", HERE.parents[1] / "shared" / "data"))
    path = folder / name
    if not path.exists():
        pytest.skip(f"real data set {name} not found in {folder}; set CELLWEAVE_DATA to the folder that holds it")
    return path
