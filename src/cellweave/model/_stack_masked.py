"""Predictions of genes that are hidden from the model, beside their counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from cellweave._keys import REGISTRY_KEYS
from cellweave._types import AnnOrMuData, Indices
from cellweave.data import gene_shares
from cellweave.objective import masked_correlation, masked_mae, negative_binomial_nll

__all__ = ["MaskedPredictionMixin"]


class MaskedPredictionMixin:
    """Hide genes from a Stack model and read what it expects in their place."""

    def get_masked_predictions(
        self,
        adata: AnnOrMuData | None = None,
        indices: Indices | None = None,
        mask_rate: float = 0.5,
        batch_size: int | None = None,
        seed: int = 0,
    ) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Counts of hidden genes, and what the model expects from the other genes of all cells of the context.

        The same random genes are hidden from all cells. :meth:`get_reconstruction_metrics` with the same ``seed`` and
        ``n_masks=1`` scores exactly these numbers, and :func:`cellweave.pl.masked_reconstruction` draws them.

        Parameters
        ----------
        adata
            Data to predict; the data of the model by default. Genes are matched by name.
        indices
            Rows or mask of the cells, for instance ``model.validation_indices``; all by default.
        mask_rate
            Share of hidden genes.
        batch_size
            Cells per forward pass.
        seed
            Seed of the hidden genes and contexts.

        Returns
        -------
        Two float32 frames ``(cell, hidden gene)`` with the same cell and gene names: the observed counts, and the
        expected counts at the library size of the cell.

        Raises
        ------
        ValueError
            If ``mask_rate`` hides no gene or all of them.
        """
        genes = self._hidden_genes(mask_rate, seed)
        hidden = torch.as_tensor(genes, device=self.device)
        with self._registered(adata) as data:
            rows, order = self._rows(data, indices)
            values, _ = self._over_contexts(
                data,
                rows,
                lambda batch: self._observed_and_expected(batch, hidden),
                n_cells=self.module.n_cells,
                batch_size=batch_size,
                seed=seed,
                description="Predicting hidden genes",
            )
        target = self.adata if adata is None else adata
        names = {"index": target.obs_names[rows[order]], "columns": self.genes[genes]}
        observed, expected = np.split(values[order], 2, axis=1)
        return pd.DataFrame(observed, **names), pd.DataFrame(expected, **names)

    def get_reconstruction_metrics(
        self,
        adata: AnnOrMuData | None = None,
        indices: Indices | None = None,
        mask_rate: float = 0.5,
        n_masks: int = 3,
        batch_size: int | None = None,
        seed: int = 0,
    ) -> pd.DataFrame:
        """How well counts of hidden genes are predicted, beside predicting each gene's mean share of the library.

        The same random genes are hidden from all cells, ``n_masks`` times; scores are averages. The mean shares come
        from the training cells of the model where its data are attached, else from the given cells.

        Parameters
        ----------
        adata
            Data to score; the data of the model by default. Genes are matched by name.
        indices
            Rows or mask of the cells, for instance ``model.validation_indices``; all by default.
        mask_rate
            Share of hidden genes.
        n_masks
            Number of random gene sets.
        batch_size
            Cells per forward pass.
        seed
            Seed of the gene sets and contexts.

        Returns
        -------
        Frame with rows ``"StackModel"`` and ``"gene mean share"`` and columns ``masked_corr`` (mean Pearson correlation
        per cell), ``masked_mae`` (counts) and, for the model, ``masked_nll`` (nats per entry).

        Raises
        ------
        ValueError
            If ``mask_rate`` hides no gene or all of them.
        """
        with self._registered(adata) as data:
            rows, _ = self._rows(data, indices)
            share = torch.as_tensor(self._mean_share(data, rows), dtype=torch.float32, device=self.device)
            scores = np.zeros(5)
            for repeat in range(n_masks):
                hidden = torch.as_tensor(self._hidden_genes(mask_rate, seed + repeat), device=self.device)
                per_cell, _ = self._over_contexts(
                    data,
                    rows,
                    lambda batch, hidden=hidden: self._masked_scores(batch, hidden, share),
                    n_cells=self.module.n_cells,
                    batch_size=batch_size,
                    seed=seed + repeat,
                    description="Predicting hidden genes",
                )
                scores += per_cell.mean(axis=0, dtype=np.float64) / n_masks
        columns = ["masked_corr", "masked_mae", "masked_nll"]
        return pd.DataFrame(
            [scores[:3], [*scores[3:], np.nan]], index=[type(self).__name__, "gene mean share"], columns=columns
        )

    def _hidden_genes(self, mask_rate: float, seed: int) -> NDArray[np.int64]:
        """Positions of the genes that ``seed`` hides, in the order of the model."""
        n_genes = self.module.n_genes
        n_masked = int(n_genes * mask_rate)
        if not 0 < n_masked < n_genes:
            raise ValueError(f"`mask_rate={mask_rate}` hides {n_masked} of {n_genes} genes; choose another.")
        drawn = torch.randperm(n_genes, generator=torch.Generator().manual_seed(seed))[:n_masked]
        return np.sort(drawn.numpy())

    def _observed_and_expected(self, batch: dict[str, Any], hidden: torch.Tensor) -> torch.Tensor:
        """Counts and expected counts of the hidden genes side by side: ``(cell, 2 * hidden gene)``."""
        x, predicted, _ = self._predict_hidden(batch, hidden)
        return torch.cat([x, predicted["px_rate"]], dim=1)

    def _predict_hidden(
        self, batch: dict[str, Any], hidden: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
        """Counts of the hidden genes, their negative-binomial parameters, and the library sizes."""
        x = batch[REGISTRY_KEYS.X]
        x = (x.to_dense() if x.is_sparse_csr else x)[:, hidden]
        z, library = self._encode(batch, hidden)
        return x, self.module.decode(z.flatten(0, 1), library, batch[REGISTRY_KEYS.BATCH], hidden), library

    def _masked_scores(self, batch: dict[str, Any], hidden: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        """Correlation, error and likelihood of the model, then correlation and error of the mean share: ``(cell, 5)``."""
        x, predicted, library = self._predict_hidden(batch, hidden)
        by_share = share[hidden] * library
        nll = negative_binomial_nll(x, predicted["px_rate"], predicted["px_r"]) / len(hidden)
        rates = (predicted["px_rate"], by_share)
        scores = [metric(x, rate) for rate in rates for metric in (masked_correlation, masked_mae)]
        return torch.stack([*scores[:2], nll, *scores[2:]], dim=1)

    def _mean_share(self, adata: AnnOrMuData, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Share of each gene in all counts ``(gene,)``, of the training cells if they are at hand."""
        # a loaded model knows the rows of its training cells, but may have been given other data
        holds_training_data = self.adata is not None and self.adata.n_obs == self.summary_stats.n_cells
        if holds_training_data and self.train_indices is not None:
            return gene_shares(self.adata_manager, np.sort(self.train_indices))
        return gene_shares(self.get_anndata_manager(adata, required=True), rows)
