"""The failure that users of the published package reported: the largest population takes the name of its rare sibling."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import scvi
from anndata import AnnData

from cellweave.model import ScyanModel

sys.path.append(str(Path(__file__).parent))
from scyan_data import flipped_marker_data

LARGEST, MARKER = "CD4 naive", "CCR7"


def _fit(**arguments) -> tuple[ScyanModel, float, list[str]]:
    """A model, the share of the largest population that it labels otherwise, and what it warned about markers."""
    x, table, labels = flipped_marker_data(0, 4000)
    adata = AnnData(x.set_axis([f"cell{i}" for i in range(len(x))]))
    scvi.settings.seed = 0
    ScyanModel.setup_anndata(adata)
    model = ScyanModel(adata, table, **arguments)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.train(accelerator="cpu", enable_progress_bar=False)
    found = model.predict(log_density_threshold=-np.inf).astype(str).to_numpy()
    about = [str(w.message) for w in caught if "do not follow the measured marker" in str(w.message)]
    return model, float((found != LARGEST)[labels == LARGEST].mean()), about


@pytest.mark.slow
def test_a_flipped_marker_is_diagnosed_and_prevented():
    """Protects the labels of whole populations: without the penalty they are wrong and a warning says why, with it right."""
    model, wrong, about = _fit(monotone_weight=0.0)
    assert wrong > 0.9
    assert len(about) == 1
    assert f"'{MARKER}'" in about[0] and "`monotone_weight`" in about[0]
    diagnosed = model.get_marker_diagnostics().loc[MARKER]
    assert diagnosed["spearman"] < 0.7 and diagnosed["flag"] in ("ignored", "flipped")
    model, wrong, about = _fit()
    assert wrong < 0.05
    assert not about
    assert model.get_marker_diagnostics().loc[MARKER, "spearman"] > 0.9
