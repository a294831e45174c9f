"""Numbers computed by the originals of the cascaded flow model, where the shared fixtures are present."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

HERE = Path(__file__).parent / "fixtures"


def shared_file(name: str) -> Path:
    """Path of a file of the shared numbers; skips the test where it is absent."""
    file = Path(os.environ.get("CELLWEAVE_DATA", "shared/data")).parent / "parity" / name
    if not file.exists():
        pytest.skip(f"{file} not found; set CELLWEAVE_DATA to the data folder of the shared numbers")
    return file


def numbers(name: str, group: str = "") -> dict[str, np.ndarray]:
    """Arrays of one group of a fixture, without the group in their names; a part of them is in the repository."""
    own = HERE / f"{name}.npz"
    found = _read(own, group) if own.exists() else {}
    return found or _read(shared_file(f"{name}.npz"), group)


def _read(file: Path, group: str) -> dict[str, np.ndarray]:
    with np.load(file) as arrays:
        return {key.removeprefix(group): arrays[key] for key in arrays.files if key.startswith(group)}


def meta() -> dict:
    """Settings of the originals."""
    return json.loads((HERE / "ccfm_meta.json").read_text())


def tensors(arrays: dict[str, np.ndarray], *names: str) -> list[Tensor]:
    """Some arrays as tensors."""
    return [torch.tensor(arrays[name]) for name in names]


def load(module: nn.Module, arrays: dict[str, np.ndarray], prefix: str = "sd/", own: tuple[str, ...] = ()) -> nn.Module:
    """Load the weights of a fixture by their published names; apart from ``own`` ones all must be there, and fit."""
    weights = {k.removeprefix(prefix): torch.tensor(v) for k, v in arrays.items() if k.startswith(prefix)}
    missing, unexpected = module.load_state_dict(weights, strict=False)
    assert set(missing) == set(own)
    assert not unexpected
    return module.eval()


def assert_close(actual: Tensor, expected: np.ndarray, rtol: float = 1e-4, atol: float = 2e-5) -> None:
    """Equal within the tolerance that the fixtures suggest."""
    torch.testing.assert_close(actual.detach(), torch.tensor(expected).to(actual), rtol=rtol, atol=atol)
