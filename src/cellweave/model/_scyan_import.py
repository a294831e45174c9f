"""Models of the published Scyan package as ScyanModel."""

from __future__ import annotations

from os import PathLike
from typing import Any, Self

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from cellweave._types import AnnOrMuData
from cellweave.io import MarkerTable, ModelFileError, ScyanWeights, read_scyan_weights

__all__ = ["ScyanImportMixin"]


class ScyanImportMixin:
    """``from_scyan``."""

    table: MarkerTable

    @classmethod
    def from_scyan(
        cls,
        path: str | PathLike[str],
        adata: AnnOrMuData,
        table: pd.DataFrame | str | PathLike | dict[str, Any] | MarkerTable,
        **model_kwargs: Any,
    ) -> Self:
        """Load a model that the published package saved with ``Scyan.save``; it predicts the same.

        Parameters
        ----------
        path
            File with the weights; nothing in it is executed, and the training data that it holds are left out.
        adata
            Data set up with the covariates of that model: ``batch_key`` and ``categorical_covariate_keys`` in the order they
            had there, with the same categories, and ``continuous_covariate_keys``, which are not standardised.
        table
            The table of that model; the file holds no names. Entries that were filled by ``refine_fit`` are taken from the
            file.
        **model_kwargs
            Training options that the file does not hold: ``temperature``, ``temperature_period``, ``label_weight``.

        Raises
        ------
        cellweave.io.ModelFileError
            If the file is missing, damaged, or of another model than the table and the setup describe.
        """
        found = read_scyan_weights(path)
        given = MarkerTable.parse(table)
        rho = _agreed_table(found, given, path)
        sizes = {name: getattr(found, name) for name in ("n_hidden", "n_hidden_layers", "n_layers", "prior_std")}
        arguments: dict[str, Any] = {
            "table": MarkerTable(given.populations, given.markers, rho, given.levels),
            "continuum_markers": [m for m, is_so in zip(given.markers, found.continuum, strict=True) if is_so],
            **sizes,
            "identity_init": False,
            "covariate_scale": 100.0,
            **model_kwargs,
        }
        model: Any = cls(adata, **arguments)  # type: ignore[call-arg]
        encoder = model.module.covariates
        n_covariates = 0 if encoder is None else encoder.n_covariates
        if n_covariates != found.n_covariates:
            raise ModelFileError(
                f"`{path}` was trained with {found.n_covariates} covariate columns, `adata` is set up with {n_covariates}; name "
                "the same `batch_key` and covariates, with the same categories, in the setup."
            )
        if encoder is not None:
            encoder.loc.zero_()
            encoder.scale.fill_(1.0)
        model.module.load_state_dict(model._in_our_order(found, len(given.markers)), strict=False)
        model.module.eval()
        model.is_trained_ = True
        return model

    def _in_our_order(self, found: ScyanWeights, n_markers: int) -> dict[str, Tensor]:
        """Weights with the batch before the other categories, where the published model has it behind them."""
        known = self._covariate_categories()
        sizes = [len(values) for values in known.values()]
        if self._setup["batch_key"] is None or len(sizes) < 2:
            return found.weights
        n_batch, n_others = sizes[0], sum(sizes[1:])
        theirs = np.r_[n_others : n_others + n_batch, :n_others, n_others + n_batch : found.n_covariates]
        columns = torch.as_tensor(np.r_[:n_markers, n_markers + theirs])
        return {
            name: value[:, columns] if name.endswith("fun.0.weight") else value for name, value in found.weights.items()
        }


def _agreed_table(found: ScyanWeights, given: MarkerTable, path: str | PathLike[str]) -> np.ndarray:
    """The table of the file, once it is clear that it is the one that the user names."""
    if found.rho.shape != given.rho.shape:
        raise ModelFileError(
            f"`{path}` has a table of {found.rho.shape[0]} populations and {found.rho.shape[1]} markers, `table` has "
            f"{given.rho.shape[0]} and {given.rho.shape[1]}; give the table that the model was trained with."
        )
    differs = ~np.isnan(given.rho) & ~np.isclose(given.rho, found.rho, atol=1e-5)
    if differs.any():
        row, column = np.argwhere(differs)[0]
        raise ModelFileError(
            f"`table` has {given.rho[row, column]:g} for population {given.populations[row]!r} and marker "
            f"{given.markers[column]!r}, `{path}` has {found.rho[row, column]:g}; give the table that the model was trained "
            "with, rows and columns in the same order."
        )
    return found.rho
