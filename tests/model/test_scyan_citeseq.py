"""Real CITE-seq data: labels from surface proteins agree with cell types from the whole data set."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest
import scvi
from anndata import AnnData
from mudata import MuData
from sklearn.metrics import adjusted_rand_score, f1_score

import cellweave as cw

TABLE = pd.DataFrame(
    {
        "B": {"CD3": -1, "CD4": -1, "CD14": -1, "CD19": 1, "CD56": -1},
        "CD4 T": {"CD3": 1, "CD4": 1, "CD8a": -1, "CD14": -1, "CD19": -1, "CD56": -1},
        "CD8 T": {"CD3": 1, "CD4": -1, "CD8a": 1, "CD14": -1, "CD19": -1},
        "NK": {"CD3": -1, "CD14": -1, "CD16": 1, "CD19": -1, "CD56": 1},
        "CD14 Mono": {"CD3": -1, "CD14": 1, "CD16": -1, "CD19": -1, "CD56": -1},
        "FCGR3A Mono": {"CD3": -1, "CD14": -1, "CD16": 1, "CD19": -1, "CD56": -1},
        "DC": {"CD3": -1, "CD4": 1, "CD14": -1, "CD16": -1, "CD19": -1, "CD56": -1},
    }
).T


@pytest.mark.slow
def test_protein_labels_agree_with_the_cell_types(real_data):
    """Protects the use beside RNA: no label is given, yet populations agree, and they are written to the MuData."""
    rna = cw.datasets.pbmc10k_citeseq(real_data("pbmc10k_citeseq_698g.h5ad"))
    names = pd.Index(rna.uns["protein_names"])
    proteins = AnnData(
        np.asarray(rna.obsm["protein_counts"], dtype=np.float32),
        obs=pd.DataFrame(index=rna.obs_names),
        var=pd.DataFrame(index=names),
    )
    cw.pp.arcsinh(proteins, cofactor=10)
    cw.pp.scale_markers(proteins)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of mudata, about what it will do in the next version
        mdata = MuData({"rna": rna, "prot": proteins})
    scvi.settings.seed = 0
    cw.model.ScyanModel.setup_mudata(mdata)
    model = cw.model.ScyanModel(mdata, TABLE)
    model.train(accelerator="cpu", enable_progress_bar=False)
    found = model.predict(log_density_threshold=-np.inf, key_added="scyan_population")
    labels = rna.obs["cell_type"].astype(str)
    assert list(found.index) == list(mdata.obs_names)
    assert (mdata.obs["scyan_population"].astype(str) == found.astype(str).to_numpy()).all()
    assert adjusted_rand_score(labels, found.astype(str)) > 0.93
    # two of the seven types have 36 and 39 of 6,661 cells
    assert f1_score(labels, found.astype(str), average="macro") > 0.9
    by_type = f1_score(labels, found.astype(str), average=None, labels=["B", "CD4 T", "CD8 T", "NK", "CD14 Mono"])
    assert by_type.min() > 0.95
