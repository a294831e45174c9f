"""Models that were written by earlier versions still load and still give what they gave.

Each schema of the model files has one small trained model in ``fixtures/schema_N`` that is never written again, with the
data it was trained on and its embedding of them in ``schema_N_expected.npz``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData

from cellweave.io import _model_files as files
from cellweave.io import inspect_model
from cellweave.model import StackModel

FIXTURES = Path(__file__).parent / "fixtures"


def _frozen(schema: int) -> tuple[AnnData, np.ndarray]:
    with np.load(FIXTURES / f"schema_{schema}_expected.npz") as arrays:
        obs = pd.DataFrame({key: pd.Categorical(arrays[key]) for key in ("batch", "donor", "cell_type")})
        obs.index = [f"cell{i}" for i in range(len(obs))]
        counts = arrays["counts"].astype(np.float32)
        var = pd.DataFrame(index=[f"gene{j}" for j in range(counts.shape[1])])
        return AnnData(sp.csr_matrix(counts), obs=obs, var=var), arrays["latent"]


def test_every_schema_has_a_frozen_model():
    """Protects a future change of the format: a new schema needs a frozen model of its own."""
    assert sorted(path.name for path in FIXTURES.glob("schema_*[0-9]")) == [f"schema_{n}" for n in sorted(files._FILES)]


@pytest.mark.parametrize("schema", sorted(files._FILES))
def test_frozen_model_gives_the_recorded_embedding(schema):
    """Protects users' files: a model saved by the version that introduced the schema embeds as it did then."""
    adata, latent = _frozen(schema)
    model = StackModel.load(FIXTURES / f"schema_{schema}", adata, accelerator="cpu")
    z = model.get_latent_representation(contexts="sequential")
    np.testing.assert_allclose(z, latent, rtol=0, atol=1e-6)
    assert model.is_trained
    assert list(model.history["train_loss"].index) == [0, 1, 2]
    assert len(model.train_indices) + len(model.validation_indices) == adata.n_obs


def test_frozen_model_is_described():
    """Protects `inspect_model` on files of schema 1."""
    info = inspect_model(FIXTURES / "schema_1")
    assert info[:6] == ("StackModel", "0.1.0", 1, True, 12, 48)
    assert info.setup == {"layer": None, "batch_key": "batch", "labels_key": "cell_type", "context_key": "donor"}
    assert info.arguments["batch_condition"] == "decoder"
