"""Whether a fit can be trusted: latent markers that follow the measured ones, populations that were found."""

from __future__ import annotations

import warnings
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from scvi import settings
from torch import Tensor

from cellweave._keys import REGISTRY_KEYS
from cellweave._types import AnnOrMuData, Indices
from cellweave.io import MarkerTable
from cellweave.objective import PopulationPrior

__all__ = ["DiagnosticsMixin"]

# Below this rank correlation with the measured marker a latent marker no longer is that marker.
_LEAST_SPEARMAN = 0.7
# Beyond this distance of its mean from a mode, the cells of a population of this share are on the other side of a marker.
_LARGEST_OFFSET, _LEAST_SHARE = 1.0, 0.01
# Cells that diagnostics after training look at.
_N_CHECKED = 20_000


class _Cells(NamedTuple):
    """Cells as diagnostics see them."""

    measured: NDArray[np.float32]  # (cell, marker), NaN where not measured
    latent: NDArray[np.float32]  # (cell, marker), NaN where not measured
    batch: NDArray[np.int64]  # (cell,)
    population: NDArray[np.int64]  # (cell,): most probable
    probability: NDArray[np.float32]  # (cell,): of that population


class DiagnosticsMixin:
    """Profiles of populations, and what is suspicious about a fit."""

    table: MarkerTable

    def get_marker_diagnostics(
        self, adata: AnnOrMuData | None = None, indices: Indices | None = None, batch_size: int | None = None
    ) -> pd.DataFrame:
        """How well each latent marker follows the measured marker it stands for.

        The model may only shift and stretch markers, so that positive cells stay above negative ones. Where a flow turned a
        marker around or made it up from others, labels that rest on that marker are wrong.

        Parameters
        ----------
        adata, indices, batch_size
            As in :meth:`get_latent_representation`.

        Returns
        -------
        Frame indexed by marker: ``spearman``, the rank correlation of measured and latent values over the cells (mean over
        batches, weighted by cells, where the model knows the batch); ``n_known``, populations of which the table knows the
        marker; ``flag``: ``"flipped"`` (negative), ``"ignored"`` (below 0.7) or ``""``.

        Raises
        ------
        RuntimeError, ValueError
            As :meth:`get_latent_representation`.
        """
        return self._marker_frame(self._read(adata, indices, batch_size))

    def _marker_frame(self, cells: _Cells) -> pd.DataFrame:
        measured, latent, groups, _, _ = cells
        spearman = np.zeros(len(self.markers))
        weight = np.zeros(len(self.markers))
        for group in np.unique(groups):
            values, n = _spearman(measured[groups == group], latent[groups == group])
            spearman += np.where(n > 0, values * n, 0)
            weight += n
        spearman = np.divide(spearman, weight, out=np.full(len(weight), np.nan), where=weight > 0)
        flag = np.select([spearman < 0, spearman < _LEAST_SPEARMAN], ["flipped", "ignored"], "")
        known = (~np.isnan(self.table.rho)).sum(0)
        index = pd.Index(list(self.table.markers), name="marker")
        return pd.DataFrame({"spearman": spearman, "n_known": known, "flag": flag}, index=index)

    def get_population_diagnostics(
        self, adata: AnnOrMuData | None = None, indices: Indices | None = None, batch_size: int | None = None
    ) -> pd.DataFrame:
        """How each population was found, beside what the table alone would say.

        Parameters
        ----------
        adata, indices, batch_size
            As in :meth:`get_latent_representation`.

        Returns
        -------
        Frame indexed by population: ``n_cells`` that are most probably of it and their ``share``; ``weight`` that the model
        learned; ``probability``, mean posterior of these cells; ``prior_only_share``, cells that the table alone gives it,
        without any flow; ``agreement``, share of its cells to which the table alone gives the same label; ``offset``,
        largest distance between the mean latent value of its cells and the known entry of the table, and the ``marker``
        where it is.

        Raises
        ------
        RuntimeError, ValueError
            As :meth:`get_latent_representation`.
        """
        return self._population_frame(self._read(adata, indices, batch_size))

    def _population_frame(self, cells: _Cells) -> pd.DataFrame:
        measured, latent, _, best, top = cells
        n, p = latent.shape[0], len(self.populations)
        with torch.inference_mode():
            alone = _table_alone(self.module.prior, measured)
        counts = np.bincount(best, minlength=p)
        means = _group_means(latent, best, p)
        offset = np.abs(means - self.module.prior.modes.cpu().numpy())
        offset[np.isnan(self.table.rho) | np.isnan(offset)] = -1
        worst = offset.argmax(1)
        largest = offset.max(1)
        return pd.DataFrame(
            {
                "n_cells": counts,
                "share": counts / n,
                "weight": self.population_weights.to_numpy(),
                "probability": _ratio(np.bincount(best, top, p), counts),
                "prior_only_share": np.bincount(alone, minlength=p) / n,
                "agreement": _ratio(np.bincount(best, best == alone, p), counts),
                "offset": np.where(largest < 0, np.nan, largest),
                "marker": np.where(largest < 0, "", self.markers[worst]),
            },
            index=pd.Index(list(self.populations), name="population"),
        )

    def get_population_profiles(
        self,
        adata: AnnOrMuData | None = None,
        indices: Indices | None = None,
        batch_size: int | None = None,
        values: Literal["latent", "measured"] = "latent",
    ) -> pd.DataFrame:
        """Mean markers of the cells of every population.

        Parameters
        ----------
        adata, indices, batch_size
            As in :meth:`get_latent_representation`.
        values
            ``"latent"`` markers, or those that were ``"measured"``.

        Returns
        -------
        Frame ``(population, marker)``, NaN for populations without cells.

        Raises
        ------
        RuntimeError
            If the model is not trained.
        ValueError
            If ``values`` is unknown, and as :meth:`get_latent_representation`.
        """
        if values not in ("latent", "measured"):
            raise ValueError(f"`values` must be 'latent' or 'measured', got {values!r}; choose one of them.")
        measured, latent, _, best, _ = self._read(adata, indices, batch_size)
        means = _group_means(latent if values == "latent" else measured, best, len(self.populations))
        return pd.DataFrame(means, pd.Index(list(self.populations), name="population"), list(self.table.markers))

    def refine_table(
        self,
        adata: AnnOrMuData | None = None,
        indices: Indices | None = None,
        batch_size: int | None = None,
        min_cells: int = 20,
    ) -> pd.DataFrame:
        """The table with its unknown entries learned from the data: mean latent marker of the cells of each population.

        The mean is one over batches of the means in each batch. Train a new model with the result to align batches in all
        markers: ``ScyanModel(adata, model.refine_table())``.

        Parameters
        ----------
        adata, indices, batch_size
            As in :meth:`get_latent_representation`.
        min_cells
            Entries of populations with fewer cells stay unknown.

        Returns
        -------
        Frame like the table; continuum markers are on the scale of the table, too.

        Raises
        ------
        RuntimeError, ValueError
            As :meth:`get_latent_representation`.
        """
        _, latent, groups, best, _ = self._read(adata, indices, batch_size)
        p = len(self.populations)
        means = np.stack([_group_means(latent[groups == g], best[groups == g], p) for g in np.unique(groups)])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of populations that no batch has
            learned = np.nanmean(means, axis=0)
        prior = self.module.prior
        scale = (prior.modes / prior.rho.where(prior.rho != 0, 1)).abs().max(0).values.cpu().numpy()
        learned = learned / np.where(prior.continuum.cpu().numpy() & (scale > 0), scale, 1)
        learned[np.bincount(best, minlength=p) < min_cells] = np.nan
        frame = self.table.to_frame()
        return frame.where(frame.notna(), learned)

    # ---------------------------------------------------------------- pieces

    def _read(self, adata: AnnOrMuData | None, indices: Indices | None, batch_size: int | None) -> _Cells:
        """What diagnostics look at, of the requested cells."""
        n_markers, has_batch = len(self.markers), self._setup["batch_key"] is not None

        def compute(batch: dict[str, Any]) -> Tensor:
            x = batch[REGISTRY_KEYS.X]
            x = x.to_dense() if x.layout != torch.strided else x
            latent, annotation = self.module.read_cells(x, self.module.read_covariates(batch))
            top = annotation.probs.max(-1)
            group = batch[REGISTRY_KEYS.BATCH] if has_batch else torch.zeros(len(x), 1)
            facts = torch.stack([group[:, 0].to(x), top.indices.to(x), top.values], 1)
            return torch.cat([x, torch.where(x.isnan(), x, latent), facts], 1)

        values, _, order, _ = self._per_cell(adata, indices, batch_size, compute, "Reading cells")
        values = values[order]
        batches, best = values[:, -3:-1].T.astype(np.int64)
        return _Cells(values[:, :n_markers], values[:, n_markers:-3], batches, best, values[:, -1])

    def _warn_about_table(self) -> None:
        """One sentence on populations that no model can tell apart."""
        separable = self.table.separating_markers().any(-1)
        pairs = np.argwhere(np.triu(~separable, 1))
        if len(pairs):
            first = ", ".join(f"{self.populations[a]!r} and {self.populations[b]!r}" for a, b in pairs[:3])
            _warn(
                f"No marker of `table` tells {len(pairs)} pair(s) of populations apart ({first}), so their labels are guesses; fill in "
                "an entry in which they differ, see `cellweave.pp.check_marker_table`."
            )

    def _warn_about_fit(self) -> None:
        """One sentence each on markers and populations of a fresh fit that deserve a look."""
        if self.adata is None:
            return
        rows = np.sort(np.random.default_rng(0).permutation(self.adata.n_obs)[:_N_CHECKED])
        cells = self._read(None, rows, None)
        markers = self._marker_frame(cells)
        flagged = markers.index[markers["flag"] != ""]
        if len(flagged):
            listed = ", ".join(f"{m!r} ({markers.at[m, 'spearman']:.2f})" for m in flagged[:5])
            _warn(
                f"{len(flagged)} latent marker(s) do not follow the measured marker (rank correlation: {listed}), so labels that "
                "rest on them may be wrong; see `get_marker_diagnostics`, and train a model with a larger `monotone_weight`."
            )
        populations = self._population_frame(cells)
        counts = populations["n_cells"]
        wrong = populations.index[(populations["offset"] > _LARGEST_OFFSET) & (populations["share"] > _LEAST_SHARE)]
        if len(wrong):
            listed = ", ".join(f"{name!r} in {populations.at[name, 'marker']!r}" for name in wrong[:5])
            _warn(
                f"The cells of {len(wrong)} population(s) are far from what the table says in the latent space ({listed}), so they may "
                "be other cells; see `get_population_diagnostics`, and check the table and the scaling of these markers."
            )
        empty = counts.index[counts == 0]
        if len(empty):
            of = "" if len(rows) == self.adata.n_obs else f" of {len(rows)} randomly chosen"
            _warn(
                f"{len(empty)} of {len(counts)} populations have no cell{of} ({', '.join(map(repr, empty[:5]))}); see "
                "`get_population_diagnostics` and `cellweave.pp.check_marker_table`."
            )


def _spearman(x: NDArray, u: NDArray) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Rank correlation of every column of two matrices, and the number of rows where both are there."""
    values, n = np.zeros(x.shape[1]), np.zeros(x.shape[1], dtype=np.int64)
    for j in range(x.shape[1]):
        known = ~np.isnan(x[:, j])
        a, b = rankdata(x[known, j]), rankdata(u[known, j])
        if len(a) > 1 and a.std() > 0 and b.std() > 0:
            values[j], n[j] = np.corrcoef(a, b)[0, 1], len(a)
    return values, n


def _table_alone(prior: PopulationPrior, measured: NDArray[np.float32]) -> NDArray[np.int64]:
    """Most probable population ``(cell,)`` of measured markers taken as latent ones, all populations alike."""
    x = torch.from_numpy(measured).to(prior.rho)
    return prior.log_prob(x.nan_to_num(0.0), ~x.isnan()).contrast.argmax(-1).cpu().numpy()


def _group_means(values: NDArray, group: NDArray[np.int64], n_groups: int) -> NDArray[np.float64]:
    """Mean of rows by group, ignoring NaN ``(group, column)``; NaN without any value."""
    frame = pd.DataFrame(values.astype(np.float64)).groupby(group).mean()
    return frame.reindex(range(n_groups)).to_numpy()


def _ratio(a: NDArray, b: NDArray) -> NDArray[np.float64]:
    return np.divide(a, b, out=np.full(len(b), np.nan), where=b > 0)


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=settings.warnings_stacklevel)
