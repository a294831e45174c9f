"""Labels, probabilities and densities of cells."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from cellweave._keys import REGISTRY_KEYS
from cellweave._types import AnnOrMuData, Indices
from cellweave.io import MarkerTable
from cellweave.module import ScyanAnnotation

from ._contexts import all_cells

__all__ = ["AnnotationMixin"]

# Cells per forward pass: wide enough for the networks, small enough for the cache.
_BATCH_SIZE = 8192
# Cells drawn from the model to see which log densities are normal, and the share of them that may be rejected.
_N_DRAWN, _REJECTED = 20_000, 1e-3


class AnnotationMixin:
    """``predict``, ``predict_proba`` and ``get_log_density`` of a model with a marker table."""

    table: MarkerTable

    def predict(
        self,
        adata: AnnOrMuData | None = None,
        indices: Indices | None = None,
        batch_size: int | None = None,
        level: str | None = None,
        log_density_threshold: float | Literal["auto"] = "auto",
        min_probability: float = 0.0,
        key_added: str | None = None,
        overwrite: bool = False,
    ) -> pd.Series:
        """Population of every cell, or its group at a level of the hierarchy.

        The probability of a group is the sum over its populations, so that the group of a cell can be known where its
        population is not; the most probable group need not be the parent of the most probable population.

        Parameters
        ----------
        adata
            Data to annotate, new samples included; the data of the model by default. Variables are matched by name.
        indices
            Rows or mask of the cells; all by default.
        batch_size
            Cells per forward pass.
        level
            Level of the hierarchy; leaf populations by default.
        log_density_threshold
            Cells whose :meth:`get_log_density` is lower are like none of the populations and get no label. ``"auto"`` is
            the value that one in a thousand cells drawn from the model does not reach; ``-inf`` labels every cell.
        min_probability
            Cells whose most probable population (or group) is less probable get no label there.
        key_added
            Write labels to ``adata.obs[key_added]``, usually ``"scyan_population"``, groups of every level to
            ``obs[f"{key_added}_{level}"]``, log densities to ``obs[f"{key_added}_log_density"]`` and the entropy of the
            probabilities (nats) to ``obs[f"{key_added}_entropy"]``; rows not in ``indices`` as NaN. What produced them, the
            table included, is in ``adata.uns["cellweave"][key_added]``.
        overwrite
            Replace what is under these keys even if no ScyanModel wrote it.

        Returns
        -------
        Categorical Series ``(cell,)`` indexed by cell name; categories in the order of the table, NaN for no label.

        Raises
        ------
        RuntimeError
            If the model is not trained.
        ValueError
            If markers are missing, values are NaN or not scaled, a batch or category of a covariate is unknown, the level
            does not exist, or a key is taken.
        """
        names = {"": self.table.populations} | {name: self.table.groups(name)[0] for name in self.table.levels}
        wanted = "" if level is None else level
        if wanted not in names:
            self.table.groups(wanted)  # refuses, and names the levels
        if not 0 <= min_probability <= 1:
            raise ValueError(f"`min_probability` must be from 0 to 1, got {min_probability}; it is a probability.")
        keys = (
            [_join(key_added, part) for part in (*names, "log_density", "entropy")] if key_added is not None else [None]
        )
        place = self._result_place(adata, "obs", *keys, overwrite=overwrite)
        threshold = self._density_threshold(log_density_threshold)
        sums = [torch.as_tensor(self.table.groups(name)[1], dtype=torch.float32) for name in self.table.levels]

        def compute(batch: dict[str, Any]) -> Tensor:
            annotation = self._annotate(batch)
            best = [annotation.probs.max(-1)]
            best += [(annotation.probs @ group.to(annotation.probs).T).max(-1) for group in sums]
            codes = [torch.where(top.values < min_probability, -1, top.indices).float() for top in best]
            entropy = torch.special.entr(annotation.probs).sum(-1)
            return torch.stack([*codes, annotation.log_density, entropy], 1)

        values, rows, order, cells = self._per_cell(adata, indices, batch_size, compute, "Annotating cells")
        codes = np.where(values[:, -2:-1] < threshold, -1, values[:, :-2]).astype(np.int64)
        labels = dict(zip(names, codes.T, strict=True))
        if place is not None:
            n_obs = place.adata.n_obs
            columns = {_join(key_added, k): _categorical(v, rows, n_obs, names[k]) for k, v in labels.items()}
            numbers = all_cells(values[:, -2:], rows, n_obs)
            columns |= {_join(key_added, "log_density"): numbers[:, 0], _join(key_added, "entropy"): numbers[:, 1]}
            parameters = {"log_density_threshold": threshold, "min_probability": min_probability}
            place.write(columns, {**parameters, "table": json.dumps(self.table.to_dict())})
        found = pd.Categorical.from_codes(labels[wanted][order], categories=list(names[wanted]))
        return pd.Series(found, index=cells[rows[order]], name=key_added or level or "population")

    def predict_proba(
        self,
        adata: AnnOrMuData | None = None,
        indices: Indices | None = None,
        batch_size: int | None = None,
        level: str | None = None,
        key_added: str | None = None,
        overwrite: bool = False,
    ) -> pd.DataFrame:
        """Probability of every population, or of every group at a level of the hierarchy.

        Parameters
        ----------
        adata, indices, batch_size, level
            As in :meth:`predict`.
        key_added
            Write the frame to ``adata.obsm[key_added]``, usually ``"scyan_proba"``, rows not in ``indices`` as NaN.
        overwrite
            Replace what is under ``key_added`` even if no ScyanModel wrote it.

        Returns
        -------
        Frame ``(cell, population)`` float32, rows summing to one.

        Raises
        ------
        RuntimeError, ValueError
            As :meth:`predict`.
        """
        names: Sequence[str] = self.table.populations
        group: Tensor | None = None
        if level is not None:
            names, members = self.table.groups(level)
            group = torch.as_tensor(members, dtype=torch.float32)
        place = self._result_place(adata, "obsm", key_added, overwrite=overwrite)

        def compute(batch: dict[str, Any]) -> Tensor:
            probs = self._annotate(batch).probs
            return probs if group is None else probs @ group.to(probs).T

        values, rows, order, cells = self._per_cell(adata, indices, batch_size, compute, "Annotating cells")
        if place is not None:
            frame = pd.DataFrame(all_cells(values, rows, place.adata.n_obs), place.adata.obs_names, list(names))
            place.write({place.keys[0]: frame}, {"level": level})
        return pd.DataFrame(values[order], cells[rows[order]], list(names))

    def get_log_density(
        self,
        adata: AnnOrMuData | None = None,
        indices: Indices | None = None,
        batch_size: int | None = None,
        key_added: str | None = None,
        overwrite: bool = False,
    ) -> pd.Series:
        """Log density of the latent markers of every cell under its most probable population; low for cells like none.

        Parameters
        ----------
        adata, indices, batch_size
            As in :meth:`predict`.
        key_added
            Write the densities to ``adata.obs[key_added]``, rows not in ``indices`` as NaN.
        overwrite
            Replace what is under ``key_added`` even if no ScyanModel wrote it.

        Returns
        -------
        Series ``(cell,)`` float32 in nats, indexed by cell name.

        Raises
        ------
        RuntimeError, ValueError
            As :meth:`predict`.
        """
        place = self._result_place(adata, "obs", key_added, overwrite=overwrite)

        def compute(batch: dict[str, Any]) -> Tensor:
            return self._annotate(batch).log_density[:, None]

        values, rows, order, cells = self._per_cell(adata, indices, batch_size, compute, "Annotating cells")
        if place is not None:
            place.write({place.keys[0]: all_cells(values, rows, place.adata.n_obs)[:, 0]}, {})
        return pd.Series(values[order, 0], index=cells[rows[order]], name=key_added or "log_density")

    # ---------------------------------------------------------------- pieces

    def _latent(self, batch: dict[str, Any]) -> Tensor:
        return self.module.latent(batch[REGISTRY_KEYS.X], self.module.read_covariates(batch))

    def _annotate(self, batch: dict[str, Any]) -> ScyanAnnotation:
        return self.module.annotate_cells(batch[REGISTRY_KEYS.X], self.module.read_covariates(batch))

    def _per_cell(
        self,
        adata: AnnOrMuData | None,
        indices: Indices | None,
        batch_size: int | None,
        compute: Callable[[dict[str, Any]], Tensor],
        description: str,
    ) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64], pd.Index]:
        """Values of sorted rows, these rows, where each requested cell is among them, and the names of all cells."""
        with self._registered(adata) as data:
            rows, order = self._rows(data, indices)
            values = self._collected(
                data,
                rows,
                compute,
                description,
                n_cells=1,
                batch_size=_BATCH_SIZE if batch_size is None else batch_size,
                rule="sequential",
                by_context=False,
            )
            return values, rows, order, data.obs_names

    def _density_threshold(self, threshold: float | Literal["auto"]) -> float:
        if threshold != "auto":
            if not isinstance(threshold, int | float) or np.isnan(threshold):
                raise ValueError(
                    f"`log_density_threshold` must be a number or 'auto', got {threshold!r}; -inf labels all."
                )
            return float(threshold)
        prior, generator = self.module.prior, torch.Generator().manual_seed(0)
        weights = self.module.population_weights.cpu()
        drawn = torch.multinomial(weights, _N_DRAWN, replacement=True, generator=generator)
        with torch.inference_mode():
            density = self.module.annotate(
                prior.latent_cells(drawn, *prior.draw_noise(_N_DRAWN, generator))
            ).log_density
        return float(torch.quantile(density.float().cpu(), _REJECTED))


def _join(key: str | None, part: str) -> str | None:
    return f"{key}_{part}" if part else key


def _categorical(codes: NDArray[np.int64], rows: NDArray[np.int64], n_obs: int, names: Sequence[str]) -> pd.Categorical:
    everywhere = np.full(n_obs, -1)
    everywhere[rows] = codes
    return pd.Categorical.from_codes(everywhere, categories=list(names))
