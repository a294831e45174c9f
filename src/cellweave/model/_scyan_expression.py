"""Latent and measured markers: embedding, batch correction, drawn cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scvi import settings
from torch import Tensor

from cellweave._keys import REGISTRY_KEYS
from cellweave._types import AnnOrMuData, Indices
from cellweave.io import MarkerTable

from ._contexts import all_cells, all_cells_and_genes

__all__ = ["MarkerExpressionMixin"]

_AVERAGE = "average"


class MarkerExpressionMixin:
    """``get_latent_representation``, ``correct_batch`` and ``sample`` of a model with a marker table."""

    table: MarkerTable

    def get_latent_representation(
        self,
        adata: AnnOrMuData | None = None,
        indices: Indices | None = None,
        batch_size: int | None = None,
        key_added: str | None = None,
        overwrite: bool = False,
    ) -> pd.DataFrame:
        """Latent markers of every cell: -1 negative, 1 positive, free of batch and covariates.

        Parameters
        ----------
        adata
            Data to embed, new samples included; the data of the model by default. Variables are matched by name.
        indices
            Rows or mask of the cells; all by default.
        batch_size
            Cells per forward pass.
        key_added
            Write the frame to ``adata.obsm[key_added]``, usually ``"X_scyan"``, rows not in ``indices`` as NaN, and what
            produced it to ``adata.uns["cellweave"][key_added]``.
        overwrite
            Replace what is under ``key_added`` even if no ScyanModel wrote it.

        Returns
        -------
        Frame ``(cell, marker)`` float32, in the order of the cells and of the table.

        Raises
        ------
        RuntimeError
            If the model is not trained.
        ValueError
            If markers are missing, values are NaN or not scaled, a batch or category of a covariate is unknown, or
            ``key_added`` is taken.
        """
        place = self._result_place(adata, "obsm", key_added, overwrite=overwrite)
        values, rows, order, cells = self._per_cell(adata, indices, batch_size, self._latent, "Embedding cells")
        if place is not None:
            everywhere = all_cells(values, rows, place.adata.n_obs)
            place.write({place.keys[0]: pd.DataFrame(everywhere, place.adata.obs_names, list(self.table.markers))}, {})
        return pd.DataFrame(values[order], cells[rows[order]], list(self.table.markers))

    def correct_batch(
        self,
        adata: AnnOrMuData | None = None,
        indices: Indices | None = None,
        reference: str | None = None,
        batch_size: int | None = None,
        key_added: str | None = None,
        overwrite: bool = False,
    ) -> pd.DataFrame:
        """Intensities as another batch would show them: the latent markers of a cell, mapped back with that batch.

        All other covariates of a cell stay its own.

        Parameters
        ----------
        adata, indices, batch_size
            As in :meth:`get_latent_representation`.
        reference
            Batch to map to; the most frequent batch of the data by default. ``"average"`` is the mean over all batches.
        key_added
            Write the result to ``adata.layers[key_added]``, usually ``"scyan_corrected"``; variables that are not markers
            of the table, and cells not in ``indices``, are NaN.
        overwrite
            Replace what is under ``key_added`` even if no ScyanModel wrote it.

        Returns
        -------
        Frame ``(cell, marker)`` float32 on the scale of the input.

        Raises
        ------
        RuntimeError
            If the model is not trained.
        ValueError
            If the model has no ``batch_key``, ``reference`` is not one of its batches, and as
            :meth:`get_latent_representation`.
        """
        key = self._setup["batch_key"]
        if key is None:
            raise ValueError(
                "`correct_batch` needs a model that knows the batch of a cell; name its column with `batch_key=` in the setup."
            )
        known = self._categories(REGISTRY_KEYS.BATCH)
        place = self._result_place(adata, "layers", key_added, overwrite=overwrite)
        if reference is None:
            reference = self._most_frequent_batch(self.adata if adata is None else adata, known)
        if reference not in known and reference != _AVERAGE:
            raise ValueError(
                f"`reference={reference!r}` is not a batch of the model; choose one of {known}, or 'average' for all of them."
            )
        codes = range(len(known)) if reference == _AVERAGE and reference not in known else [known.index(reference)]

        def compute(batch: dict[str, Any]) -> Tensor:
            measured, own = batch[REGISTRY_KEYS.X], self.module.read_covariates(batch)
            measured = measured.to_dense() if measured.layout != torch.strided else measured
            total = torch.zeros_like(measured)
            for code in codes:
                moved = {**batch, REGISTRY_KEYS.BATCH: torch.full_like(batch[REGISTRY_KEYS.BATCH], code)}
                total += self.module.change_covariates(measured, own, self.module.read_covariates(moved))
            return torch.where(measured.isnan(), measured, total / len(codes))  # what was not measured stays so

        values, rows, order, cells = self._per_cell(adata, indices, batch_size, compute, "Correcting cells")
        if place is not None:
            layer = all_cells_and_genes(values, rows, self.markers, place.holder)
            place.write({place.keys[0]: layer}, {"reference": reference})
        return pd.DataFrame(values[order], cells[rows[order]], list(self.table.markers))

    def _most_frequent_batch(self, adata: AnnOrMuData | None, known: list[Any]) -> Any:
        """Any batch where data are missing or have unknown batches, which are refused later with sentences of their own."""
        key, modality = self._setup["batch_key"], (self._setup.get("modalities") or {}).get("batch_key")
        holder = adata if adata is None or modality is None else adata.mod.get(modality)
        if holder is None or key not in holder.obs:
            return known[0]
        counts = holder.obs[key].value_counts()
        return next((batch for batch in counts.index if batch in known), known[0])

    def sample(
        self,
        n_samples: int,
        population: str | Sequence[str] | None = None,
        covariates: Mapping[str, Any] | pd.DataFrame | None = None,
        seed: int | None = None,
    ) -> AnnData:
        """Draw cells from the model.

        Parameters
        ----------
        n_samples
            Number of cells.
        population
            Population or group of all cells, or a population for each of them; drawn from :attr:`population_weights` by
            default, within a group from the weights of its members.
        covariates
            Value of every covariate column of the setup, batch included: one for all cells or one for each of them. Columns
            that are not given are taken, together, from randomly drawn cells of the data.
        seed
            Seed of the draws; ``scvi.settings.seed`` by default, else a random one.

        Returns
        -------
        AnnData ``(n_samples, marker)`` on the scale of the input, with the covariates and ``"population"`` in ``obs``
        (``"scyan_population"`` if a covariate has that name), latent markers in ``obsm["X_scyan"]``.

        Raises
        ------
        RuntimeError
            If the model is not trained.
        ValueError
            If a population or category is unknown, a continuous covariate is no number, or lengths do not fit.
        """
        self._check_if_trained(warn=False)
        if not isinstance(n_samples, int | np.integer) or n_samples < 1:
            raise ValueError(f"`n_samples` must be a positive integer, got {n_samples!r}; give the number of cells.")
        seed = settings.seed if seed is None else seed
        generator = torch.Generator()
        generator.manual_seed(seed) if seed is not None else generator.seed()
        obs = self._drawn_covariates(n_samples, covariates, generator)
        populations = self._drawn_populations(n_samples, population, generator)
        matrix = self._covariate_matrix(obs)
        with torch.inference_mode():
            x, _ = self.module.sample(n_samples, matrix, populations, generator)
            u = self.module.latent(x, matrix)
        # a covariate may have that name
        name = "scyan_population" if "population" in obs else "population"
        obs.insert(0, name, pd.Categorical.from_codes(populations.cpu().numpy(), list(self.populations)))
        obs.index = [f"sample{i}" for i in range(n_samples)]
        drawn = AnnData(x.cpu().numpy(), obs=obs, var=pd.DataFrame(index=list(self.table.markers)))
        drawn.obsm["X_scyan"] = pd.DataFrame(u.cpu().numpy(), obs.index, list(self.table.markers))
        return drawn

    def _drawn_populations(
        self, n_samples: int, population: str | Sequence[str] | None, generator: torch.Generator
    ) -> Tensor:
        weights = self.module.population_weights.cpu()
        if population is None or isinstance(population, str):
            if population is not None:
                members = torch.as_tensor(self.table.members_of(population))
                # members of a group without any learned weight are drawn alike
                weights = torch.where(members, weights.clamp(min=torch.finfo(weights.dtype).tiny), 0)
            return torch.multinomial(weights, n_samples, replacement=True, generator=generator)
        names = list(population)
        unknown = [name for name in names if name not in self.populations]
        if unknown or len(names) != n_samples:
            found = f"{unknown[0]!r}, which the table does not have" if unknown else f"{len(names)} names"
            raise ValueError(
                f"`population` has {found}; give one population of the table for each of {n_samples} cells."
            )
        return torch.tensor([self.populations.index(name) for name in names])

    def _drawn_covariates(
        self, n_samples: int, given: Mapping[str, Any] | pd.DataFrame | None, generator: torch.Generator
    ) -> pd.DataFrame:
        """Covariate columns of drawn cells, ``(cell, column)``."""
        known, numbers = self._covariate_categories(), list(self._setup["continuous_covariate_keys"] or ())
        columns = [*known, *numbers]
        given = {} if given is None else dict(given)
        if strange := [key for key in given if key not in columns]:
            raise ValueError(f"`covariates` has {strange[0]!r}, which is no covariate of the model; it has {columns}.")
        missing = [key for key in columns if key not in given]
        obs = pd.DataFrame(index=range(n_samples))
        if missing:
            if self.adata is None:
                raise ValueError(
                    f"`covariates` lacks {missing}, and the model has no data to draw them from; give them."
                )
            rows = torch.randint(self.adata.n_obs, (n_samples,), generator=generator).numpy()
            for key in missing:
                obs[key] = self._column(key).iloc[rows].to_numpy()
        for key, value in given.items():
            values = [value] * n_samples if isinstance(value, str) or np.ndim(value) == 0 else list(value)
            if len(values) != n_samples:
                raise ValueError(f"`covariates[{key!r}]` has {len(values)} values; give one, or {n_samples}.")
            if key in known and (strange := [v for v in values if v not in known[key]]):
                raise ValueError(
                    f"`covariates[{key!r}]` has {strange[0]!r}, which the model does not know; use {known[key]}."
                )
            if key in numbers and (strange := [v for v in values if not _is_finite(v)]):
                raise ValueError(f"`covariates[{key!r}]` has {strange[0]!r}, which is no finite number; give numbers.")
            obs[key] = values
        return obs[columns]

    def _column(self, key: str) -> pd.Series:
        """A covariate column of the data of the model."""
        setup, modalities = self._setup, self._setup.get("modalities") or {}
        argument = next(
            name
            for name in ("batch_key", "categorical_covariate_keys", "continuous_covariate_keys")
            if key == setup[name] or (isinstance(setup[name], list | tuple) and key in setup[name])
        )
        modality = modalities.get(argument)
        return (self.adata if modality is None else self.adata.mod[modality]).obs[key]

    def _covariate_matrix(self, obs: pd.DataFrame) -> Tensor | None:
        """Covariates ``(cell, covariate)`` of columns with known values; None for a model without any."""
        encoder = self.module.covariates
        if encoder is None:
            return None
        known = self._covariate_categories()
        codes = [pd.Index(values).get_indexer(obs[key]) for key, values in known.items()]
        numbers = [key for key in obs if key not in known]
        return encoder(
            torch.as_tensor(np.stack(codes, 1), device=self.device) if codes else None,
            torch.as_tensor(obs[numbers].to_numpy(np.float32), device=self.device) if numbers else None,
        )


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and bool(np.isfinite(value))
