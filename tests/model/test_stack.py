"""Getters of `StackModel` on the data of the model: shapes, order, determinism, context handling, results written."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

import cellweave
from cellweave.data import draw_contexts
from cellweave.model import StackModel

GETTERS = {
    "latent": lambda model, **options: model.get_latent_representation(**options),
    "normalized": lambda model, **options: model.get_normalized_expression(return_numpy=True, **options),
    "expected": lambda model, **options: model.get_masked_predictions(**options)[1].to_numpy(),
}


@pytest.fixture
def model(make_adata, tiny, trained) -> StackModel:
    """A fresh model with the weights of the trained one, for tests that write into its data."""
    adata = make_adata()
    StackModel.setup_anndata(adata, batch_key="batch", labels_key="cell_type", context_key="donor")
    fresh = StackModel(adata, **tiny)
    fresh.module.load_state_dict(trained.module.state_dict())
    fresh.is_trained_ = True
    return fresh


def _embed_by_hand(model, contexts: np.ndarray) -> dict[int, np.ndarray]:
    """Embedding of every cell of every context, by direct calls of the module: the last context of a cell counts."""
    found = {}
    model.module.eval()
    for rows in contexts:
        x = torch.tensor(model.adata.X[rows].toarray())
        with torch.no_grad():
            z = model.module.encode(x, len(rows))[0][0]
        found.update(zip(rows.tolist(), z.numpy(), strict=True))
    return found


# ---------------------------------------------------------------- what every getter promises


def test_latent_shape_and_type(trained, tiny):
    """Protects the contract: one float32 row per cell, n_hidden * token_dim wide, all finite."""
    z = trained.get_latent_representation()
    assert z.shape == (96, tiny["n_hidden"] * tiny["token_dim"])
    assert z.dtype == np.float32
    assert np.isfinite(z).all()


def test_latent_is_in_the_order_of_the_cells(trained):
    """Protects obs order (trap 6.3): each row is the embedding of its own cell in its own context."""
    rows, groups = np.arange(96), trained.adata.obs["donor"].cat.codes.to_numpy()
    contexts = draw_contexts(rows, groups, 16, np.random.default_rng([0, 0]))
    expected = np.full((96, 16), np.nan, dtype=np.float32)
    for context, valid in zip(contexts.rows, contexts.valid, strict=True):
        z = _embed_by_hand(trained, context[None])
        for row in context[valid]:
            expected[row] = z[row]
    np.testing.assert_allclose(trained.get_latent_representation(), expected, rtol=1e-4, atol=1e-5)


def test_sequential_contexts_follow_the_rows(trained):
    """Protects parity with the published inference: rows 0..15 are the first context, and so on."""
    z = _embed_by_hand(trained, np.arange(96).reshape(6, 16))
    expected = np.stack([z[row] for row in range(96)])
    actual = trained.get_latent_representation(contexts="sequential", by_context=False)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("getter", GETTERS)
def test_repeated_calls_agree(trained, getter):
    """Protects determinism: no random state, of numpy or torch, changes a result."""
    first = GETTERS[getter](trained)
    torch.manual_seed(123)
    np.random.seed(123)
    np.testing.assert_array_equal(GETTERS[getter](trained), first)


def test_getters_evaluate_without_dropout(make_adata, tiny):
    """Protects results after an interrupted training, which leaves the module in train mode: no dropout in them."""
    adata = make_adata()
    StackModel.setup_anndata(adata)
    model = StackModel(adata, **tiny, dropout=0.5)
    model.is_trained_ = True
    calls = [lambda g=g: g(model) for g in GETTERS.values()]
    for call in [*calls, lambda: model.get_attention([1, 2, 3]), lambda: model.get_reconstruction_metrics().to_numpy()]:
        results = []
        for mode in (False, True, True):
            model.module.train(mode)
            results.append(call())
        np.testing.assert_array_equal(results[1], results[0])
        np.testing.assert_array_equal(results[2], results[0])


@pytest.mark.parametrize("getter", GETTERS)
def test_getters_leave_the_random_state_alone(trained, getter):
    """Protects the user's own draws: inference takes nothing from the global generators."""
    before = np.random.get_state()[1].copy(), np.random.get_state()[2], torch.get_rng_state()
    GETTERS[getter](trained)
    np.testing.assert_array_equal(np.random.get_state()[1], before[0])
    assert np.random.get_state()[2] == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


@pytest.mark.parametrize("getter", GETTERS)
def test_batch_size_does_not_matter(trained, getter):
    """Protects against a hidden dependence: from one context to all contexts per pass, equal to 1e-5."""
    results = [GETTERS[getter](trained, batch_size=size) for size in (1, 16, 48, 4096)]
    for other in results[1:]:
        np.testing.assert_allclose(other, results[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 33, 95])
@pytest.mark.parametrize("getter", GETTERS)
def test_any_number_of_cells(trained, getter, n):
    """Protects small selections: from a single cell on, fewer than a context too, every cell gets its own row."""
    values = GETTERS[getter](trained, indices=np.arange(n))
    assert len(values) == n
    assert np.isfinite(values).all()
    assert len(np.unique(values, axis=0)) == n


@pytest.mark.parametrize("getter", GETTERS)
def test_kinds_of_indices(trained, getter):
    """Protects indices: lists, masks, any order, repeated and negative rows give the rows that were asked for."""
    mask = np.zeros(96, dtype=bool)
    mask[[3, 40, 95]] = True
    reference = GETTERS[getter](trained, indices=[3, 40, 95])
    np.testing.assert_array_equal(GETTERS[getter](trained, indices=mask), reference)
    np.testing.assert_array_equal(GETTERS[getter](trained, indices=list(mask)), reference)
    np.testing.assert_array_equal(GETTERS[getter](trained, indices=[-1, 3, 40, 40, 3]), reference[[2, 0, 1, 1, 0]])
    np.testing.assert_array_equal(
        GETTERS[getter](trained, indices=np.array([40, 3, 95], np.uint8)), reference[[1, 0, 2]]
    )


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([], "non-empty sequence of row numbers"),
        ([0.5], "non-empty sequence of row numbers"),
        (["cell1"], "non-empty sequence of row numbers"),
        ([[1, 2]], "non-empty sequence of row numbers"),
        ([96], "`indices` has row 96, but there are 96 cells"),
        ([-97], "`indices` has row -97, but there are 96 cells"),
        (np.ones(95, dtype=bool), "mask of length 95, but there are 96 cells"),
    ],
)
@pytest.mark.parametrize("getter", GETTERS)
def test_impossible_indices_are_refused(trained, getter, indices, message):
    """Protects against silent nonsense: what is no row number, or no row, is an error that says so."""
    with pytest.raises(ValueError, match=message):
        GETTERS[getter](trained, indices=indices)


def test_untrained_model_refuses_every_getter(make_adata, tiny):
    """Protects against embeddings of random weights, which look like results."""
    adata = make_adata()
    StackModel.setup_anndata(adata)
    untrained = StackModel(adata, **tiny)
    calls = [lambda g=g: g(untrained) for g in GETTERS.values()]
    calls += [untrained.get_reconstruction_metrics, lambda: untrained.get_attention([0, 1])]
    for call in calls:
        with pytest.raises(RuntimeError, match="(?i)train"):
            call()


def test_repr_is_a_string(trained, make_adata, tiny):
    """Protects logs: arguments, size of the data and whether trained; scvi-tools returns an empty string."""
    text = repr(trained)
    assert text.startswith("StackModel(n_hidden=4, token_dim=4, n_cells=16")
    assert "96 cells, 20 genes" in text
    assert text.endswith("; trained")
    adata = make_adata()
    StackModel.setup_anndata(adata)
    assert repr(StackModel(adata, **tiny)).endswith("; not trained")


# ---------------------------------------------------------------- contexts


def test_repeats_average_over_context_assignments(trained):
    """Protects `n_context_repeats`: the mean over consecutive seeds, and their standard deviation as spread."""
    single = np.stack([trained.get_latent_representation(seed=seed) for seed in (4, 5, 6)])
    mean, spread = trained.get_latent_representation(seed=4, n_context_repeats=3, return_spread=True)
    np.testing.assert_allclose(mean, single.mean(0), atol=1e-6)
    np.testing.assert_allclose(spread, single.std(0, ddof=1), atol=1e-5)
    assert spread.max() > 0
    np.testing.assert_array_equal(trained.get_latent_representation(seed=4, n_context_repeats=3), mean)


def test_spread_needs_repeats(trained):
    """Protects against a spread of zero that means nothing."""
    with pytest.raises(ValueError, match="`return_spread=True` needs `n_context_repeats` of at least 2"):
        trained.get_latent_representation(return_spread=True)


def test_contexts_respect_the_groups(trained):
    """Protects `context_key` at inference: counts of other donors do not reach a cell, unless contexts are mixed."""
    donors = trained.adata.obs["donor"].to_numpy()
    changed = trained.adata.copy()
    changed.X = changed.X.multiply(np.where(donors == "w", 1, 3)[:, None]).tocsr()
    of_w = donors == "w"
    for by_context, same in [(True, True), (False, False)]:
        before = trained.get_latent_representation(by_context=by_context)[of_w]
        after = trained.get_latent_representation(changed, by_context=by_context)[of_w]
        assert np.allclose(before, after, atol=1e-6) == same


def test_other_context_sizes(trained):
    """Protects `n_cells`: a context of one cell ignores all others, a large one does not."""
    alone = trained.get_latent_representation(n_cells=1)
    np.testing.assert_allclose(alone[[7]], trained.get_latent_representation(indices=[7], n_cells=1), atol=1e-5)
    assert not np.allclose(alone, trained.get_latent_representation(n_cells=64), atol=1e-4)


@pytest.mark.parametrize("n_cells", [-1, 0])
def test_impossible_context_size_is_refused(trained, n_cells):
    """Protects against a division by zero: a context holds at least one cell."""
    with pytest.raises(ValueError, match=f"`n_cells` must be at least 1, got {n_cells}"):
        trained.get_latent_representation(n_cells=n_cells)


def test_unknown_rule_is_refused(trained):
    """Protects against a misspelt `contexts`."""
    with pytest.raises(ValueError, match="'random' or 'sequential', got 'shuffled'"):
        trained.get_latent_representation(contexts="shuffled")


# ---------------------------------------------------------------- normalized expression


@pytest.mark.parametrize("library_size", [1, 1e4])
def test_expression_sums_to_the_library_size(trained, library_size):
    """Protects the unit: over all genes each cell has exactly the requested number of counts."""
    frame = trained.get_normalized_expression(library_size=library_size)
    np.testing.assert_allclose(frame.sum(axis=1), library_size, rtol=1e-5)
    assert (frame.to_numpy() >= 0).all()
    assert list(frame.index) == list(trained.adata.obs_names)
    assert list(frame.columns) == list(trained.adata.var_names)


def test_observed_library_size(trained):
    """Protects `library_size="observed"`: expected counts at the library size of each cell."""
    frame = trained.get_normalized_expression(library_size="observed")
    np.testing.assert_allclose(frame.sum(axis=1), trained.adata.X.sum(axis=1).A1, rtol=1e-5)


def test_gene_list_keeps_its_order(trained):
    """Protects `gene_list`: the columns that were asked for, as asked, equal to those of the full result."""
    genes = ["gene7", "gene0", "gene19"]
    everything = trained.get_normalized_expression()
    for chosen in (genes, pd.Index(genes), [*genes, "gene0"]):
        frame = trained.get_normalized_expression(gene_list=chosen)
        assert list(frame.columns) == list(chosen)
        np.testing.assert_allclose(frame, everything[chosen], rtol=1e-5)


def test_indices_and_genes_together(trained):
    """Protects labels: rows and columns of the frame are the cells and genes of its values."""
    frame = trained.get_normalized_expression(indices=[50, 2], gene_list=["gene3"])
    assert frame.shape == (2, 1)
    assert list(frame.index) == ["cell50", "cell2"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gene_list": ["gene1", "GAPDH", "ACTB"]}, r"2 gene\(s\) that the model does not know \(first: 'GAPDH'\)"),
        ({"library_size": 0}, "`library_size` must be positive or 'observed', got 0"),
        ({"library_size": -1.0}, "`library_size` must be positive"),
        ({"library_size": float("nan")}, "`library_size` must be positive"),
        ({"library_size": "latent"}, "`library_size` must be positive or 'observed', got 'latent'"),
        ({"transform_batch": "b1"}, "`transform_batch` needs a model with `batch_condition='decoder'` or 'both'"),
    ],
)
def test_impossible_expression_arguments_are_refused(trained, options, message):
    """Protects the user: each wrong argument is named with its value."""
    with pytest.raises(ValueError, match=message):
        trained.get_normalized_expression(**options)


@pytest.mark.parametrize("condition", ["decoder", "both"])
def test_transform_batch(make_adata, tiny, quick, condition):
    """Protects counterfactual decoding: cells keep their embedding and are decoded as if of the other batch."""
    adata = make_adata()
    StackModel.setup_anndata(adata, batch_key="batch")
    model = StackModel(adata, **tiny, batch_condition=condition)
    model.train(**quick, lr=0.01)
    with torch.no_grad():  # a clear effect of the batch on the decoder
        model.module.decoder_batch.weight.normal_(std=2.0)
    observed = model.get_normalized_expression()
    as_b1 = model.get_normalized_expression(transform_batch="b1")
    of_b1 = (adata.obs["batch"] == "b1").to_numpy()
    np.testing.assert_allclose(as_b1[of_b1], observed[of_b1], rtol=1e-5)
    assert not np.allclose(as_b1[~of_b1], observed[~of_b1], rtol=1e-2)
    with pytest.raises(
        ValueError, match=r"`transform_batch='b9'` is not a batch of the model; it knows \['b0', 'b1'\]"
    ):
        model.get_normalized_expression(transform_batch="b9")


# ---------------------------------------------------------------- masked predictions and attention


def test_masked_predictions_hide_the_genes_they_predict(trained):
    """Protects honest scores: the expected counts of hidden genes do not depend on the counts of hidden genes."""
    observed, expected = trained.get_masked_predictions(mask_rate=0.4, seed=3)
    assert observed.shape == expected.shape == (96, 8)
    np.testing.assert_array_equal(observed, trained.adata[:, observed.columns].X.toarray())
    shuffled = trained.adata.copy()
    x = shuffled.X.toarray()
    hidden = trained.adata.var_names.get_indexer(observed.columns)
    x[:, hidden] = x[:, hidden][:, ::-1]  # the library sizes stay as they are
    shuffled.X = x
    np.testing.assert_allclose(trained.get_masked_predictions(shuffled, mask_rate=0.4, seed=3)[1], expected, rtol=1e-5)


def test_metrics_score_the_masked_predictions(trained):
    """Protects the metrics: recomputed with numpy from the masked predictions and from the mean shares."""
    metrics = trained.get_reconstruction_metrics(mask_rate=0.5, n_masks=1, seed=7)
    observed, expected = trained.get_masked_predictions(mask_rate=0.5, seed=7)
    train = trained.adata[trained.train_indices].to_df()
    library = trained.adata.X.sum(axis=1).A1
    baseline = np.outer(library, (train.sum() / train.to_numpy().sum())[observed.columns])
    for row, prediction in [("StackModel", expected.to_numpy()), ("gene mean share", baseline)]:
        pairs = zip(observed.to_numpy(), prediction, strict=True)
        correlation = np.mean([np.corrcoef(x, p)[0, 1] for x, p in pairs])
        assert metrics.loc[row, "masked_corr"] == pytest.approx(correlation, abs=1e-4)
        error = np.abs(observed.to_numpy() - prediction).mean()
        assert metrics.loc[row, "masked_mae"] == pytest.approx(error, rel=1e-4)
    assert np.isfinite(metrics.loc["StackModel", "masked_nll"])


def test_metrics_tell_a_trained_model_from_a_scrambled_one(make_adata, tiny, quick):
    """Protects the point of the metrics: training beats the mean share by far, scrambled weights lose it again.

    Correlations for five seeds when written: trained 0.84 to 0.91, mean share 0.07 to 0.09, scrambled -0.11 to 0.10.
    """
    adata = make_adata(n_cells=192)
    StackModel.setup_anndata(adata)
    model = StackModel(adata, **tiny)
    model.train(**{**quick, "max_epochs": 40}, lr=2e-2)
    good = model.get_reconstruction_metrics(n_masks=2)
    assert good.loc["StackModel", "masked_corr"] > good.loc["gene mean share", "masked_corr"] + 0.4
    with torch.no_grad():
        last = model.module.output_mlp[3].weight
        last.copy_(last[torch.randperm(len(last))])
    bad = model.get_reconstruction_metrics(n_masks=2)
    assert bad.loc["StackModel", "masked_corr"] < good.loc["StackModel", "masked_corr"] - 0.4


@pytest.mark.parametrize("mask_rate", [0.0, 0.01, 1.0])
def test_masks_of_nothing_or_everything_are_refused(trained, mask_rate):
    """Protects the scores: with no hidden gene, or no visible one, there is nothing to score."""
    for call in (trained.get_reconstruction_metrics, trained.get_masked_predictions):
        with pytest.raises(ValueError, match=f"`mask_rate={mask_rate}` hides"):
            call(mask_rate=mask_rate)


def test_attention_of_a_context(trained):
    """Protects `get_attention`: (layer, head, cell, cell), rows that sum to one, cells in the given order."""
    rows = [5, 60, 2, 33]
    weights = trained.get_attention(rows)
    assert weights.shape == (1, 2, 4, 4)
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    order = [3, 0, 2, 1]
    permuted = trained.get_attention([rows[i] for i in order])
    np.testing.assert_allclose(permuted, weights[:, :, order][..., order], atol=1e-6)
    np.testing.assert_array_equal(trained.get_attention([7]), np.ones((1, 2, 1, 1), dtype=np.float32))


def test_attention_refuses_repeated_cells(trained):
    """Protects the axes of the map: each cell of a context appears once."""
    with pytest.raises(ValueError, match="`indices` repeats a row"):
        trained.get_attention([1, 2, 1])


# ---------------------------------------------------------------- results in the AnnData


def test_latent_is_written_with_provenance(model, tmp_path):
    """Protects provenance: class, version, weights and parameters of a result, in a form that h5ad can hold."""
    z = model.get_latent_representation(key_added="X_stack", n_context_repeats=2, seed=3)
    adata = model.adata
    np.testing.assert_array_equal(adata.obsm["X_stack"], z)
    record = adata.uns["cellweave"]["X_stack"]
    assert record["model"] == "StackModel"
    assert record["version"] == cellweave.__version__
    assert len(record["weights_sha256"]) == 64
    assert record["parameters"]["n_context_repeats"] == 2
    assert record["parameters"]["seed"] == 3
    model.get_normalized_expression(key_added="stack_normalized")
    adata.write_h5ad(tmp_path / "a.h5ad")
    back = ad.read_h5ad(tmp_path / "a.h5ad")
    assert set(back.uns["cellweave"]) == {"X_stack", "stack_normalized"}
    assert back.uns["cellweave"]["X_stack"]["weights_sha256"] == record["weights_sha256"]


def test_provenance_follows_the_weights(model):
    """Protects provenance: other weights, another hash; the same weights, the same hash."""
    hashes = []
    for change in (0.0, 0.0, 1.0):
        with torch.no_grad():
            model.module.gene_pos_embedding += change
        model.get_latent_representation(key_added="z")
        hashes.append(model.adata.uns["cellweave"]["z"]["weights_sha256"])
    assert hashes[0] == hashes[1] != hashes[2]


def test_provenance_of_all_parameters_that_change_the_result(model):
    """Protects repeatability: whatever changes the embedding is in its record."""
    options = {"n_context_repeats": 2, "n_cells": 8, "by_context": False, "contexts": "sequential", "seed": 9}
    model.get_latent_representation(key_added="z", **options)
    assert model.adata.uns["cellweave"]["z"]["parameters"] == options


def test_partial_results_leave_the_rest_missing(model):
    """Protects cells that were not asked for: NaN, never zero or stale numbers; the spread beside the mean."""
    rows = [4, 2, 90]
    mean, _ = model.get_latent_representation(
        indices=rows, key_added="z", n_context_repeats=2, return_spread=True, seed=1
    )
    written = model.adata.obsm["z"]
    np.testing.assert_array_equal(written[rows], mean)
    assert np.isnan(np.delete(written, rows, axis=0)).all()
    assert model.adata.obsm["z_sd"].shape == written.shape


def test_expression_is_written_as_a_layer(model):
    """Protects the layer: the shape of the data, NaN for cells and genes that were not asked for."""
    genes = ["gene5", "gene2", "gene5"]
    frame = model.get_normalized_expression(indices=[3, 1], gene_list=genes, key_added="stack_normalized").iloc[:, :2]
    layer = pd.DataFrame(model.adata.layers["stack_normalized"], model.adata.obs_names, model.adata.var_names)
    assert layer.shape == (96, 20)
    pd.testing.assert_frame_equal(layer.loc[frame.index, frame.columns], frame)
    assert int(layer.notna().to_numpy().sum()) == 4


def test_nothing_is_written_without_a_key(model):
    """Protects the user's object: getters return; they write only when `key_added` names a place."""
    before = [sorted(part) for part in (model.adata.obs, model.adata.uns, model.adata.obsm, model.adata.layers)]
    for getter in GETTERS.values():
        getter(model)
    model.get_reconstruction_metrics()
    model.get_attention([0, 1])
    assert [sorted(p) for p in (model.adata.obs, model.adata.uns, model.adata.obsm, model.adata.layers)] == before
