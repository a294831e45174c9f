"""`ScyanModel` on labelled cytometry data that are not part of the repository."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import scvi
from anndata import AnnData
from sklearn.metrics import f1_score

from cellweave.model import ScyanModel


def _scaled(adata: AnnData) -> AnnData:
    """Transformed and scaled as for the published results."""
    x = np.arcsinh((np.asarray(adata.X, dtype=np.float64) - 1) / 5)
    adata.X = np.clip(x / x.std(axis=0) - 1, -10, 10).astype(np.float32)
    return adata


def _fit(adata, table, **setup) -> ScyanModel:
    scvi.settings.seed = 0
    ScyanModel.setup_anndata(adata, **setup)
    model = ScyanModel(adata, table)
    model.train(accelerator="cpu", enable_progress_bar=False)
    return model


def test_bone_marrow(real_data):
    """Protects accuracy: macro F1 on a fifth of the BMMC cells is above .68, which the table alone (.54) is not."""
    adata, table = ad.read_h5ad(real_data("cytometry/bmmc_basal1.h5ad")), real_data("cytometry/table_bmmc.csv")
    populations = pd.read_csv(table, index_col=0).index
    adata = _scaled(adata[adata.obs["cell_type"].isin(populations)].copy())
    rows = np.sort(np.random.default_rng(0).permutation(adata.n_obs)[:20_000])
    adata = adata[rows].copy()
    model = _fit(adata, table)
    truth = adata.obs["cell_type"].astype(str)
    found = model.predict(log_density_threshold=-np.inf).astype(str)
    assert f1_score(truth, found, average="macro") > 0.68
    assert (model.get_marker_diagnostics()["spearman"] > 0.5).all()


def test_sample_of_another_batch_of_the_study(real_data):
    """Protects new data: trained on five samples of the multi-centre study, the sixth is labelled (accuracy above .95)."""
    adata, table = (
        ad.read_h5ad(real_data("cytometry/multicenter_6samples.h5ad")),
        real_data("cytometry/table_multicenter.csv"),
    )
    adata = _scaled(adata[adata.obs["cell_type"] != "Unknown"].copy())
    samples = adata.obs["sample"].astype(str)
    left_out = sorted(samples.unique())[-1]
    train, query = adata[samples != left_out].copy(), adata[samples == left_out].copy()
    model = _fit(train, table)
    labels = model.predict(query, log_density_threshold=-np.inf).astype(str)
    assert (labels.to_numpy() == query.obs["cell_type"].astype(str).to_numpy()).mean() > 0.95
