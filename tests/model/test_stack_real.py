"""`StackModel` learns something real: hidden counts and cell types of 2,000 blood cells of eight donors."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
import scvi
from anndata import AnnData
from sklearn.neighbors import KNeighborsClassifier

from cellweave.model import StackModel

# Share of cells whose cell type is that of their neighbours in the embedding. When written: untrained 0.67, trained
# 0.92, principal components of log-normalised counts 0.93.
UNTRAINED_BELOW, TRAINED_ABOVE = 0.75, 0.82


@pytest.fixture(scope="module")
def cells(real_data) -> AnnData:
    """2,000 of the 12,261 cells, drawn at random, in the order of the file."""
    adata = ad.read_h5ad(real_data("kang_ctrl_8donors_1287g.h5ad"))
    chosen = np.random.default_rng(0).choice(adata.n_obs, 2000, replace=False)
    return adata[np.sort(chosen)].copy()


@pytest.fixture(scope="module")
def models(cells) -> dict[str, StackModel]:
    """The same model before and after 60 epochs of training on 80 % of the cells (15 CPU-seconds)."""
    created = {}
    for state in ("untrained", "trained"):
        scvi.settings.seed = 0
        StackModel.setup_anndata(cells)
        created[state] = StackModel(cells, n_hidden=16, token_dim=4, n_layers=1, n_heads=4, n_cells=64)
    created["untrained"].is_trained_ = True  # its getters are what the test is about
    options = {"batch_size": 256, "lr": 3e-3, "accelerator": "cpu", "enable_progress_bar": False}
    created["trained"].train(60, validation_size=0.2, **options)
    return created


def _neighbour_accuracy(model, cells) -> float:
    z, labels = model.get_latent_representation(), cells.obs["cell_type"].astype(str).to_numpy()
    order = np.random.default_rng(0).permutation(len(z))
    known, asked = order[:1500], order[1500:]
    return KNeighborsClassifier(15).fit(z[known], labels[known]).score(z[asked], labels[asked])


@pytest.mark.slow
def test_hidden_counts_of_unseen_cells_are_predicted(models):
    """Protects learning: on held-out cells the model beats the mean share of each gene; an untrained one does not."""
    held_out = models["trained"].validation_indices
    trained = models["trained"].get_reconstruction_metrics(indices=held_out)
    untrained = models["untrained"].get_reconstruction_metrics(indices=held_out)
    model, baseline = trained.loc["StackModel"], trained.loc["gene mean share"]
    assert model["masked_corr"] > baseline["masked_corr"] + 0.08  # 0.91 against 0.74 when written
    assert model["masked_mae"] < 0.9 * baseline["masked_mae"]  # 0.63 against 0.84 when written
    assert model["masked_nll"] < untrained.loc["StackModel", "masked_nll"] - 0.2
    assert untrained.loc["StackModel", "masked_corr"] < 0.2


@pytest.mark.slow
def test_embedding_separates_cell_types(models, cells):
    """Protects the embedding: cell types are found among neighbours, far better than without training."""
    assert _neighbour_accuracy(models["untrained"], cells) < UNTRAINED_BELOW
    assert _neighbour_accuracy(models["trained"], cells) > TRAINED_ABOVE
