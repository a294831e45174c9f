"""Annotation from a marker table alone, without a flow: what a trained model has to beat."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from anndata import AnnData
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

from cellweave.data import get_counts, row_source
from cellweave.io import MarkerTable
from cellweave.objective import PopulationPrior

__all__ = ["gaussian_mixture", "marker_expression", "prior_only"]

# Cells whose densities are in memory at a time.
_CHUNK = 65_536
_MAX_ITERATIONS = 100


def marker_expression(adata: AnnData, table: MarkerTable, layer: str | None) -> NDArray[np.float32]:
    """Expression of the markers of a table ``(cell, marker)``, from any storage.

    Raises
    ------
    ValueError
        If the data lack a marker or have values that are not finite.
    KeyError
        If there is no such layer.
    """
    x, where = get_counts(adata, layer), "adata.X" if layer is None else f"adata.layers[{layer!r}]"
    position = adata.var_names.get_indexer(list(table.markers))
    if (position < 0).any():
        first = table.markers[int(np.argmax(position < 0))]
        raise ValueError(
            f"`adata.var_names` lacks {int((position < 0).sum())} of the {len(table.markers)} markers of `table` (first: "
            f"{first!r}); `cellweave.pp.check_marker_table(table, adata)` proposes close names."
        )
    out = np.empty((adata.n_obs, len(position)), dtype=np.float32)
    for start, block in row_source(x).chunks(_CHUNK):
        columns = block[:, position]
        out[start : start + block.shape[0]] = columns.toarray() if hasattr(columns, "toarray") else columns
    bad = ~np.isfinite(out)
    if bad.any():
        cell, marker = np.argwhere(bad)[0]
        raise ValueError(
            f"`{where}` has {int(bad.sum())} NaN or infinite value(s) among the markers of `table` (first: cell "
            f"{adata.obs_names[cell]!r}, marker {table.markers[marker]!r}); remove these cells or fill the values in."
        )
    return out


def prior_only(x: NDArray[np.float32], table: MarkerTable, prior_std: float) -> NDArray[np.intp]:
    """Most probable population of every cell ``(cell,)`` if the measured markers were the latent ones."""
    prior = PopulationPrior(torch.from_numpy(np.array(table.rho, dtype=np.float32)), prior_std)
    with torch.inference_mode():
        parts = [prior.log_prob(part).contrast.argmax(-1) for part in torch.from_numpy(x).split(_CHUNK)]
    return torch.cat(parts).numpy()


def gaussian_mixture(x: NDArray[np.float32], table: MarkerTable, prior_std: float, seed: int) -> NDArray[np.intp]:
    """Population of every cell ``(cell,)`` in a mixture of diagonal Gaussians whose EM starts at the table.

    Unknown entries start at the mean and variance of the marker over all cells. A component keeps the population from
    which it started.
    """
    known = ~np.isnan(table.rho)
    variance = np.maximum(x.var(axis=0, dtype=np.float64), 1e-3)
    mixture = GaussianMixture(
        len(table.populations),
        covariance_type="diag",
        weights_init=np.full(len(table.populations), 1 / len(table.populations)),
        means_init=np.where(known, table.rho, x.mean(axis=0, dtype=np.float64)),
        precisions_init=1 / np.where(known, prior_std**2, variance),
        reg_covar=prior_std**2,  # added to every variance: without it components collapse onto cells with no signal
        max_iter=_MAX_ITERATIONS,
        random_state=seed,
    )
    with warnings.catch_warnings():
        # the classes of a mixture that still moves a little are the baseline, too
        warnings.simplefilter("ignore", ConvergenceWarning)
        return mixture.fit_predict(x.astype(np.float64))
