"""Properties of results: they depend on the counts of a context, and on nothing else."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cellweave.model import StackModel
from cellweave.module import StackModule

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer than one context:UserWarning")

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
ROWS = st.lists(st.integers(0, 95), min_size=1, max_size=40)
N_GENES = 7


# ---------------------------------------------------------------- getters of a trained model


@given(rows=ROWS, batch_size=st.integers(1, 200), seed=st.integers(0, 2**32 - 1))
def test_embedding_does_not_depend_on_the_batch_size(trained, rows, batch_size, seed):
    """Protects results from memory settings, for any selection of cells."""
    expected = trained.get_latent_representation(indices=rows, seed=seed)
    actual = trained.get_latent_representation(indices=rows, seed=seed, batch_size=batch_size)
    np.testing.assert_allclose(actual, expected, **CLOSE)


@given(rows=ROWS, data=st.data())
def test_results_come_in_the_order_that_was_asked_for(trained, rows, data):
    """Protects rows of results: selections in any order, with repetitions and negative numbers, name their cells."""
    order = data.draw(st.permutations(range(len(rows))))
    asked = [rows[i] - data.draw(st.sampled_from([0, 96])) for i in order]
    everything = trained.get_latent_representation(indices=rows)
    np.testing.assert_array_equal(trained.get_latent_representation(indices=asked), everything[list(order)])
    mask = np.isin(np.arange(96), rows)
    by_mask = trained.get_latent_representation(indices=mask)
    np.testing.assert_array_equal(by_mask[np.searchsorted(np.unique(rows), rows)], everything)


@given(
    order=st.permutations(range(20)), storage=st.sampled_from([sp.csr_matrix, sp.csc_matrix, sp.csr_array, np.asarray])
)
def test_embedding_does_not_depend_on_the_order_of_genes(trained, make_adata, order, storage):
    """Protects gene identity: a query with any order of genes, in any storage, has the same embedding."""
    query = make_adata(seed=3)
    expected = trained.get_latent_representation(query)
    permuted = query[:, list(order)].copy()
    permuted.X = storage(permuted.X.toarray())
    np.testing.assert_allclose(trained.get_latent_representation(permuted), expected, **CLOSE)


@given(dtype=st.sampled_from([np.uint8, np.int16, np.int32, np.int64, np.float64]), dense=st.booleans())
def test_embedding_does_not_depend_on_the_number_type(trained, make_adata, dtype, dense):
    """Protects mixed dtypes: the same counts in any number type give the identical embedding."""
    query = make_adata(seed=3)
    expected = trained.get_latent_representation(query)
    query.X = (query.X.toarray() if dense else query.X).astype(dtype)
    np.testing.assert_array_equal(trained.get_latent_representation(query), expected)


@given(names=st.permutations(["w", "x", "y", "z"]), kind=st.sampled_from(["category", object, "string"]))
def test_embedding_does_not_depend_on_the_names_of_groups(trained, make_adata, names, kind):
    """Protects category names: renamed donors form the same contexts, so every cell keeps its embedding."""
    query = make_adata(seed=3)
    expected = trained.get_latent_representation(query)
    renamed = query.obs["donor"].astype(object).map(dict(zip("wxyz", names, strict=True)))
    query.obs["donor"] = pd.Series(renamed, dtype=object).astype(kind)
    np.testing.assert_allclose(trained.get_latent_representation(query), expected, **CLOSE)


@given(rows=ROWS, library_size=st.floats(0.01, 1e6), genes=st.lists(st.integers(0, 19), min_size=1, max_size=20))
def test_expression_sums_to_the_library_size(trained, rows, library_size, genes):
    """Protects the unit: all genes of a cell sum to the library size, and a choice of genes is a choice of columns."""
    frame = trained.get_normalized_expression(indices=rows, library_size=library_size)
    np.testing.assert_allclose(frame.sum(axis=1), library_size, rtol=1e-5)
    assert (frame.to_numpy() >= 0).all()
    names = [f"gene{i}" for i in genes]
    chosen = trained.get_normalized_expression(indices=rows, library_size=library_size, gene_list=names)
    np.testing.assert_allclose(chosen, frame[names], rtol=1e-5)
    assert list(chosen.index) == [f"cell{i}" for i in rows]


@given(rows=st.lists(st.integers(0, 95), min_size=1, max_size=20, unique=True), data=st.data())
def test_attention_rows_sum_to_one_and_follow_the_cells(trained, rows, data):
    """Protects attention maps: weights of a cell sum to one, and permuting the cells permutes both axes."""
    weights = trained.get_attention(rows)
    assert (weights >= 0).all()
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    order = list(data.draw(st.permutations(range(len(rows)))))
    permuted = trained.get_attention([rows[i] for i in order])
    np.testing.assert_allclose(permuted, weights[:, :, order][..., order], **CLOSE)


@given(rows=ROWS, mask_rate=st.floats(0.06, 0.94), seed=st.integers(0, 2**31))
def test_hidden_genes_are_the_observed_ones(trained, rows, mask_rate, seed):
    """Protects reconstruction scores: the share that was asked for is hidden, and observed counts are those of the data."""
    observed, expected = trained.get_masked_predictions(indices=rows, mask_rate=mask_rate, seed=seed)
    assert observed.shape == expected.shape == (len(rows), int(20 * mask_rate))
    assert observed.columns.is_unique
    x = pd.DataFrame(trained.adata.X.toarray(), columns=trained.adata.var_names)
    np.testing.assert_array_equal(observed, x.loc[rows, observed.columns])
    assert (expected.to_numpy() >= 0).all()


@given(rows=ROWS, n_cells=st.integers(1, 30), rule=st.sampled_from(["random", "sequential"]), by_context=st.booleans())
def test_one_result_per_cell_for_any_context(trained, rows, n_cells, rule, by_context):
    """Protects every choice of contexts: each cell has one finite embedding; alone in its context it is its own."""
    options = {"n_cells": n_cells, "contexts": rule, "by_context": by_context}
    z = trained.get_latent_representation(indices=rows, **options)
    assert np.isfinite(z).all()
    alone = trained.get_latent_representation(indices=rows, n_cells=1, contexts=rule, by_context=by_context)
    one_by_one = [trained.get_latent_representation(indices=[row], n_cells=1)[0] for row in rows[:3]]
    np.testing.assert_allclose(alone[:3], one_by_one, **CLOSE)


# ---------------------------------------------------------------- the module


@pytest.fixture(scope="module")
def module() -> StackModule:
    """A module with random weights in evaluation mode. Shared: never change it."""
    torch.manual_seed(0)
    options = {"n_hidden": 4, "token_dim": 4, "n_layers": 2, "n_heads": 2, "n_cells": 4}
    return StackModule(n_genes=N_GENES, n_batch=2, batch_condition="both", **options).eval()


@st.composite
def contexts(draw, min_contexts: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts ``(context, cell, gene)`` and batch codes ``(context, cell, 1)``."""
    shape = (draw(st.integers(min_contexts, 3)), draw(st.integers(1, 6)), N_GENES)
    counts = draw(arrays(np.float32, shape, elements=st.integers(0, 10_000).map(float)))
    return torch.from_numpy(counts), torch.from_numpy(
        draw(arrays(np.int64, (*shape[:2], 1), elements=st.integers(0, 1)))
    )


def _encode(module, x, batch, **options) -> torch.Tensor:
    with torch.inference_mode():
        return module.encode(x.flatten(0, 1), x.shape[1], batch.flatten(0, 1), **options)[0]


@given(given_contexts=contexts(), data=st.data())
def test_embeddings_follow_the_order_of_cells(module, given_contexts, data):
    """Protects sets: permuting the cells of a context permutes their embeddings; their mean stays as it is."""
    x, batch = given_contexts
    order = list(data.draw(st.permutations(range(x.shape[1]))))
    z, permuted = _encode(module, x, batch), _encode(module, x[:, order], batch[:, order])
    torch.testing.assert_close(permuted, z[:, order], **CLOSE)
    torch.testing.assert_close(permuted.mean(1), z.mean(1), **CLOSE)


@given(given_contexts=contexts(min_contexts=2))
def test_contexts_of_a_batch_do_not_see_each_other(module, given_contexts):
    """Protects batches: embeddings and attention of a context are the same alone as beside other contexts."""
    x, batch = given_contexts
    z = _encode(module, x, batch)
    with torch.inference_mode():
        maps = module.across_cell_maps(x.flatten(0, 1), x.shape[1], batch.flatten(0, 1))
        first = module.across_cell_maps(x[0], x.shape[1], batch[0])
    torch.testing.assert_close(_encode(module, x[:1], batch[:1]), z[:1], **CLOSE)
    torch.testing.assert_close(first, maps[:1], **CLOSE)
    torch.testing.assert_close(maps.sum(-1), torch.ones(maps.shape[:-1]))


@given(given_contexts=contexts(), data=st.data())
def test_a_prompt_does_not_see_the_cells_after_it(module, given_contexts, data):
    """Protects prompts: the first cells are embedded as if the later ones were not there."""
    x, batch = given_contexts
    assume(x.shape[1] > 1)
    n_prompt = data.draw(st.integers(1, x.shape[1] - 1))
    z = _encode(module, x, batch, n_prompt=n_prompt)
    torch.testing.assert_close(z[:, :n_prompt], _encode(module, x[:, :n_prompt], batch[:, :n_prompt]), **CLOSE)
    other = torch.cat([x[:, :n_prompt], x[:, n_prompt:] + 1], dim=1)
    torch.testing.assert_close(_encode(module, other, batch, n_prompt=n_prompt)[:, :n_prompt], z[:, :n_prompt], **CLOSE)


@given(given_contexts=contexts(), data=st.data())
def test_hidden_genes_have_no_influence_but_their_depth(module, given_contexts, data):
    """Protects masking: moving counts among hidden genes, which keeps the library, changes no embedding."""
    x, batch = given_contexts
    genes = data.draw(st.lists(st.integers(0, N_GENES - 1), min_size=2, max_size=N_GENES, unique=True))
    moved = x.clone()
    moved[..., genes] = moved[..., [*genes[1:], genes[0]]]
    hidden = torch.tensor(genes)
    first, second = (_encode(module, values, batch, mask_genes=hidden) for values in (x, moved))
    torch.testing.assert_close(first, second, **CLOSE)


@given(given_contexts=contexts(), genes=st.lists(st.integers(0, N_GENES - 1), max_size=N_GENES))
def test_decoded_shares_are_shares(module, given_contexts, genes):
    """Protects the decoder: shares of all genes sum to one, means to the library, and a choice of genes is a choice."""
    x, batch = (values.flatten(0, 1) for values in given_contexts)
    library = x.sum(-1, keepdim=True)
    with torch.inference_mode():
        z, _ = module.encode(x, given_contexts[0].shape[1], batch)
        full = module.decode(z.flatten(0, 1), library, batch)
        part = module.decode(z.flatten(0, 1), library, batch, torch.tensor(genes, dtype=torch.int64))
    torch.testing.assert_close(full["px_scale"].sum(-1), torch.ones(len(x)))
    torch.testing.assert_close(full["px_rate"].sum(-1, keepdim=True), library, rtol=1e-5, atol=1e-5)
    assert (full["px_r"] > 0).all()
    for name, values in part.items():
        torch.testing.assert_close(values, full[name][:, genes], **CLOSE)


@given(given_contexts=contexts(), factor=st.integers(1, 50))
def test_normalised_input_has_no_depth(given_contexts, factor):
    """Protects `normalize_input`: counts of a cell times any factor read the same."""
    module = StackModule(n_genes=N_GENES, n_batch=1, n_hidden=2, token_dim=2, n_heads=1, normalize_input=True)
    x = given_contexts[0].flatten(0, 1)
    first, second = (module.features(values, values.sum(-1, keepdim=True)) for values in (x, factor * x))
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


@given(n_repeats=st.integers(2, 4), seed=st.integers(0, 1000))
def test_repeats_are_the_mean_over_seeds(trained, n_repeats, seed):
    """Protects `n_context_repeats`: mean and standard deviation over consecutive seeds."""
    single = np.stack([trained.get_latent_representation(seed=seed + i) for i in range(n_repeats)])
    mean, spread = trained.get_latent_representation(seed=seed, n_context_repeats=n_repeats, return_spread=True)
    np.testing.assert_allclose(mean, single.mean(0), **CLOSE)
    np.testing.assert_allclose(spread, single.std(0, ddof=1), rtol=1e-3, atol=1e-5)


@given(counts=arrays(np.float32, (6, 20), elements=st.integers(0, 2**24).map(float)))
def test_results_are_finite_for_any_counts(trained, make_adata, counts):
    """Protects unusual depth: whatever counts a query holds, embedding and expression are finite."""
    assume(counts.any())
    query = make_adata()[:6].copy()
    query.X = counts
    with pytest.MonkeyPatch.context():
        assert np.isfinite(trained.get_latent_representation(query)).all()
        assert np.isfinite(trained.get_normalized_expression(query, library_size="observed")).all().all()


def test_the_model_under_test_is_trained(trained):
    """Protects this file: properties of getters are tried on a trained model, not on refusals."""
    assert isinstance(trained, StackModel)
    assert trained.is_trained
