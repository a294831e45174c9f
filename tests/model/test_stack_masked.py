"""``get_masked_predictions``: the numbers behind the reconstruction metrics and the figure of hidden genes."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from anndata import AnnData

from cellweave.model import StackModel

N_CELLS, N_GENES = 40, 30


@pytest.fixture(scope="module")
def model() -> StackModel:
    """A small model, trained for one epoch."""
    rng = np.random.default_rng(0)
    counts = rng.poisson(rng.gamma(0.5, 4, N_GENES), (N_CELLS, N_GENES)).astype(np.float32)
    adata = AnnData(sp.csr_matrix(counts))
    adata.obs_names = [f"cell{i}" for i in range(N_CELLS)]
    adata.var_names = [f"gene{i}" for i in range(N_GENES)]
    StackModel.setup_anndata(adata)
    model = StackModel(adata, n_hidden=4, token_dim=2, n_layers=1, n_heads=2, n_cells=10)
    model.train(1, accelerator="cpu", batch_size=20, enable_progress_bar=False)
    return model


def test_observed_counts_are_those_of_the_named_cells_and_genes(model):
    """Names on the wrong rows or columns would make every figure and score of hidden genes wrong."""
    observed, predicted = model.get_masked_predictions(indices=[7, 3, 30])
    assert list(observed.index) == ["cell7", "cell3", "cell30"]
    assert observed.shape == (3, N_GENES // 2)
    expected = model.adata[observed.index, observed.columns].X.toarray()
    np.testing.assert_array_equal(observed, expected)
    assert predicted.index.equals(observed.index)
    assert predicted.columns.equals(observed.columns)


def test_predictions_do_not_see_the_hidden_genes(model):
    """Shuffling the hidden counts within a cell keeps its library, so nothing that the model sees has changed."""
    observed, predicted = model.get_masked_predictions(seed=1)
    changed = model.adata.copy()
    where = changed.var_names.get_indexer(observed.columns)
    counts = changed.X.toarray()
    counts[:, where] = np.roll(counts[:, where], 1, axis=1)
    changed.X = sp.csr_matrix(counts)
    again, same = model.get_masked_predictions(changed, seed=1)
    assert not np.array_equal(again, observed)
    np.testing.assert_allclose(same, predicted, rtol=1e-5)


def test_they_are_what_the_metrics_score(model):
    """A figure and a table of the same seed must tell the same story."""
    observed, predicted = model.get_masked_predictions(mask_rate=0.4, seed=3)
    metrics = model.get_reconstruction_metrics(mask_rate=0.4, n_masks=1, seed=3).loc["StackModel"]
    assert metrics["masked_mae"] == pytest.approx((observed - predicted).abs().to_numpy().mean(), rel=1e-5)
    by_cell = [np.corrcoef(x, y)[0, 1] for x, y in zip(observed.to_numpy(), predicted.to_numpy(), strict=True)]
    assert metrics["masked_corr"] == pytest.approx(np.mean(by_cell), abs=1e-5)


def test_the_seed_chooses_the_genes(model):
    """Same seed, same genes and numbers; another seed, other genes."""
    first, again, other = (model.get_masked_predictions(seed=seed)[1] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert set(first.columns) == set(again.columns) != set(other.columns)


@pytest.mark.parametrize(("rate", "n"), [(0.0, 0), (1.0, 30), (0.01, 0)])
def test_hiding_nothing_or_everything_is_refused(model, rate: float, n: int):
    """Both would return something empty or meaningless."""
    with pytest.raises(ValueError, match=f"hides {n} of 30 genes"):
        model.get_masked_predictions(mask_rate=rate)
