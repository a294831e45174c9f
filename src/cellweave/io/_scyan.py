"""Weights that the published Scyan package saved."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ._model_files import ModelFileError

__all__ = ["ScyanWeights", "read_scyan_weights"]

_LAYER = re.compile(r"module\.(real_nvp\.module_list\.(\d+)\.[st]fun\.(\d+)\.(?:weight|bias))$")
_PRIOR = ("rho", "rho_mask", "modes", "cov")
# Modes of continuum markers stand at this share of the table.
_CONTINUUM_SHARE = 0.2


class ScyanWeights(NamedTuple):
    """What a file of the published package says; names of populations, markers and covariates are not in it."""

    weights: dict[str, Tensor]  # of the flow and the population weights, by their name in ScyanModule
    rho: NDArray[np.float64]  # (population, marker): table, NaN for unknown
    continuum: NDArray[np.bool_]  # (marker,)
    prior_std: float
    n_covariates: int
    n_hidden: int
    n_hidden_layers: int
    n_layers: int


def read_scyan_weights(path: str | os.PathLike[str]) -> ScyanWeights:
    """Read a file that ``Scyan.save`` of the published package wrote; nothing in it is executed.

    The file also holds the whole training data, which are not kept.

    Parameters
    ----------
    path
        The file.

    Raises
    ------
    cellweave.io.ModelFileError
        If the file is missing, damaged, or not one of the published package.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelFileError(f"`{path}` is not a file; give the one that `Scyan.save` wrote.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise ModelFileError(
            f"`{path}` cannot be read as weights ({_first_line(error)}); save the model again."
        ) from error
    if not isinstance(content, dict):
        raise ModelFileError(
            f"`{path}` holds a {type(content).__name__} and no weights; give the file of `Scyan.save`."
        )
    layers = {name: match for name in content if (match := _LAYER.match(str(name)))}
    missing = [f"module.prior.{name}" for name in _PRIOR if f"module.prior.{name}" not in content]
    missing += [name for name in ("module.pi_logit",) if name not in content]
    if missing or not layers:
        lacks = missing[0] if missing else "module.real_nvp.module_list"
        raise ModelFileError(f"`{path}` lacks `{lacks}`, so it is no model of Scyan; give the file of `Scyan.save`.")
    return _parsed(path, content, {match[1]: content[name] for name, match in layers.items()}, list(layers.values()))


def _parsed(
    path: Path, content: dict[str, Tensor], weights: dict[str, Tensor], names: list[re.Match[str]]
) -> ScyanWeights:
    rho, unknown, modes, cov = (content[f"module.prior.{name}"] for name in _PRIOR)
    n_layers, n_linear = 1 + max(int(m[2]) for m in names), 1 + max(int(m[3]) for m in names) // 2
    first = weights.get("real_nvp.module_list.0.sfun.0.weight")
    if first is None or rho.ndim != 2 or len(weights) != 4 * n_layers * n_linear or n_linear < 2:
        raise ModelFileError(
            f"`{path}` has {len(weights)} weights of coupling layers, which is no number that Scyan has; save the model again."
        )
    known = ~unknown & (rho != 0)
    ratio = torch.where(known, modes[0] / torch.where(known, rho, 1), 1)  # (population, marker)
    return ScyanWeights(
        weights={**weights, "pi_logit": content["module.pi_logit"]},
        rho=torch.where(unknown, torch.nan, rho).double().numpy(),
        continuum=((ratio - _CONTINUUM_SHARE).abs() < 1e-4).any(0).numpy(),
        prior_std=round(float(cov[0, 0].double().sqrt()), 6),
        n_covariates=first.shape[1] - rho.shape[1],
        n_hidden=first.shape[0],
        n_hidden_layers=n_linear - 2,
        n_layers=n_layers,
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
