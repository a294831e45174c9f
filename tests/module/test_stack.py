"""The Stack module: symmetries, padding, masks, precision, compilation, batch conditions."""

from __future__ import annotations

import pytest
import torch
import torch._inductor.config

from cellweave._keys import LOADER_KEYS, REGISTRY_KEYS
from cellweave.module import StackModule
from cellweave.module._stack import sample_gene_mask

N_GENES, N_CELLS, N_CONTEXTS = 15, 6, 3


def _module(dtype=torch.float64, **options) -> StackModule:
    torch.manual_seed(0)
    arguments = {"n_hidden": 4, "token_dim": 4, "n_cells": N_CELLS, "n_layers": 2, "n_heads": 2, "dropout": 0.0}
    return StackModule(N_GENES, **{**arguments, "n_proj": 8, **options}).to(dtype).eval()


def _counts(dtype=torch.float64, n_contexts=N_CONTEXTS) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.poisson(torch.full((n_contexts * N_CELLS, N_GENES), 2.0), generator=generator).to(dtype)


def _tensors(**extra):
    mask = torch.tensor([1, 4, 5, 11])
    return {REGISTRY_KEYS.X: _counts(), LOADER_KEYS.N_CELLS: N_CELLS, LOADER_KEYS.MASK_GENES: mask, **extra}


def _loss(module, tensors, seed=0):
    torch.manual_seed(seed)
    return module(tensors)[2]


def _gradients(module, tensors):
    module.zero_grad()
    loss = _loss(module, tensors).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


# ---------------------------------------------------------------- symmetries


def test_embeddings_are_equivariant_to_the_order_of_cells():
    """Protects sets: permuting the cells of a context permutes their embeddings and changes nothing else."""
    module, x = _module(), _counts(n_contexts=1)
    order = torch.tensor([4, 1, 5, 0, 3, 2])
    z, _ = module.encode(x, N_CELLS)
    permuted, _ = module.encode(x[order], N_CELLS)
    torch.testing.assert_close(permuted, z[:, order])


def test_contexts_do_not_influence_each_other():
    """Protects batching: a context gives the same embeddings alone and among others."""
    module, x = _module(), _counts()
    together, _ = module.encode(x, N_CELLS)
    for i, part in enumerate(x.split(N_CELLS)):
        torch.testing.assert_close(module.encode(part, N_CELLS)[0][0], together[i])


def test_context_matters():
    """Protects in-context learning: a cell has another embedding among other cells."""
    module, x = _module(), _counts()
    first = module.encode(x[:N_CELLS], N_CELLS)[0][0, 0]
    other = module.encode(torch.cat([x[:1], x[-N_CELLS + 1 :]]), N_CELLS)[0][0, 0]
    assert not torch.allclose(first, other)


def test_sparse_counts_give_the_same_numbers():
    """Protects the GPU path: CSR tensors are densified inside the module, for loss and embedding."""
    module, tensors = _module(), _tensors()
    sparse = {**tensors, REGISTRY_KEYS.X: tensors[REGISTRY_KEYS.X].to_sparse_csr()}
    torch.testing.assert_close(_loss(module, sparse).loss, _loss(module, tensors).loss)
    torch.testing.assert_close(module.encode(sparse[REGISTRY_KEYS.X], N_CELLS), module.encode(_counts(), N_CELLS))


# ---------------------------------------------------------------- padding and masks


def test_filling_cells_change_the_reconstruction_through_attention_only():
    """Protects padded contexts: without layers, cells with `valid` false leave the term and the metrics unchanged."""
    module = _module(n_layers=0)
    valid = torch.ones(N_CONTEXTS * N_CELLS, dtype=torch.bool)
    valid[-2:] = False
    results = []
    for filler in (0.0, 9.0):
        x = _counts()
        x[-2:] = filler
        metrics = _loss(module, _tensors(**{REGISTRY_KEYS.X: x, LOADER_KEYS.VALID: valid})).extra_metrics
        results.append({k: metrics[k] for k in ("recon_loss", "masked_mae", "masked_corr")})
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=0)
    everything = _loss(module, _tensors(**{REGISTRY_KEYS.X: x})).extra_metrics
    assert everything["recon_loss"] != results[1]["recon_loss"]


def test_batch_weight_is_the_number_of_valid_cells():
    """Protects epoch averages: a batch counts with its valid cells, not with its filling."""
    assert _loss(_module(), _tensors(**{LOADER_KEYS.N_VALID: 16})).n_obs_minibatch == 16
    assert _loss(_module(), _tensors()).n_obs_minibatch == N_CONTEXTS * N_CELLS


def test_masked_genes_are_hidden_from_the_encoder():
    """Protects the task: counts of masked genes reach the embedding through the library size alone, so not at all."""
    module, x, mask = _module(), _counts(), torch.tensor([0, 7])
    changed = x.clone()
    changed[:, mask] = changed[:, mask].flip(0) + 3
    torch.testing.assert_close(
        module.encode(x, N_CELLS, mask_genes=mask)[0], module.encode(changed, N_CELLS, mask_genes=mask)[0]
    )
    assert torch.equal(x, _counts()), "the caller's counts must not be masked in place"


@pytest.mark.parametrize("rate", [0.0, 1.0])
@pytest.mark.parametrize("training", [False, True])
def test_extreme_masks_are_finite(rate, training):
    """Protects steps with no or only masked genes: finite loss, finite gradients; nothing masked, no reconstruction."""
    module = _module(mask_rate_min=rate, mask_rate_max=rate).train(training)
    tensors = _tensors()
    del tensors[LOADER_KEYS.MASK_GENES]
    loss, gradients = _gradients(module, tensors)
    assert torch.isfinite(loss)
    assert all(torch.isfinite(g).all() for g in gradients.values())
    if rate == 0:
        assert _loss(module, tensors).extra_metrics["recon_loss"] == 0


def test_gene_mask_is_uniform_between_its_rates():
    """Protects the published masking: distinct genes, floor(n * rate) of them, all genes alike."""
    generator = torch.Generator().manual_seed(0)
    masks = [sample_gene_mask(50, 0.2, 0.6, generator) for _ in range(400)]
    sizes = torch.tensor([len(mask) for mask in masks])
    assert all(len(mask.unique()) == len(mask) for mask in masks)
    assert sizes.min() >= 10
    assert sizes.max() <= 30
    assert sizes.double().mean().item() == pytest.approx(19.5, abs=1)
    share = torch.bincount(torch.cat(masks), minlength=50) / len(masks)
    assert share.min() > 0.3
    assert share.max() < 0.5


def test_training_draws_a_new_mask_every_time():
    """Protects training: the mask comes from the torch generator, new at every step, the same for the same seed."""
    module, tensors = _module().train(), _tensors()
    del tensors[LOADER_KEYS.MASK_GENES]
    assert _loss(module, tensors, seed=1).loss == _loss(module, tensors, seed=1).loss
    assert _loss(module, tensors, seed=1).loss != _loss(module, tensors, seed=2).loss


# ---------------------------------------------------------------- loss and decoder


def test_loss_is_the_weighted_sum_of_its_terms():
    """Protects the objectives: each raw term is reported, the loss is their weighted sum."""
    metrics = {}
    for weight in (0.0, 0.5):
        output = _loss(_module(sw_weight=weight), _tensors())
        metrics[weight] = output.extra_metrics
        expected = output.extra_metrics["recon_loss"] + weight * output.extra_metrics["sw_loss"]
        torch.testing.assert_close(output.loss, expected)
    assert metrics[0.0]["sw_loss"] == metrics[0.5]["sw_loss"] > 0


def test_metrics_are_reported_in_evaluation_only():
    """Protects training speed: masked error and correlation are computed for validation batches."""
    assert set(_loss(_module(), _tensors()).extra_metrics) == {"recon_loss", "sw_loss", "masked_mae", "masked_corr"}
    assert set(_loss(_module().train(), _tensors()).extra_metrics) == {"recon_loss", "sw_loss"}


def test_decoder_is_a_distribution_over_all_genes():
    """Protects the meaning of the output: shares sum to one, rates to the library; chosen genes are a slice."""
    module, x = _module(), _counts()
    z, library = module.encode(x, N_CELLS)
    everything = module.decode(z.flatten(0, 1), library)
    torch.testing.assert_close(everything["px_scale"].sum(-1, keepdim=True), torch.ones_like(library))
    torch.testing.assert_close(everything["px_rate"].sum(-1, keepdim=True), x.sum(-1, keepdim=True))
    assert (everything["px_r"] > 0).all()
    genes = torch.tensor([9, 2, 2])
    for key, value in module.decode(z.flatten(0, 1), library, genes=genes).items():
        torch.testing.assert_close(value, everything[key][:, genes])


def test_normalised_input_ignores_depth():
    """Protects `normalize_input`: cells of equal composition have equal embeddings whatever their depth."""
    x = _counts()
    for normalize, same in [(True, True), (False, False)]:
        module = _module(normalize_input=normalize)
        assert torch.allclose(module.encode(x, N_CELLS)[0], module.encode(3 * x, N_CELLS)[0]) == same


def test_cell_without_counts_is_finite():
    """Protects empty cells: finite embeddings, zero rate, finite gradients."""
    x = _counts()
    x[2] = 0
    for normalize in (False, True):
        module = _module(normalize_input=normalize)
        z, library = module.encode(x, N_CELLS)
        assert torch.isfinite(z).all()
        assert (module.decode(z.flatten(0, 1), library)["px_rate"][2] == 0).all()
        _, gradients = _gradients(module, _tensors(**{REGISTRY_KEYS.X: x}))
        assert all(torch.isfinite(g).all() for g in gradients.values())


def test_attention_maps_equal_the_forward():
    """Protects `get_attention`: one map per layer and head whose rows sum to one, in (context, layer, head) order."""
    module = _module()
    maps = module.across_cell_maps(_counts(), N_CELLS)
    assert maps.shape == (N_CONTEXTS, 2, 2, N_CELLS, N_CELLS)
    torch.testing.assert_close(maps.sum(-1), torch.ones_like(maps[..., 0]))
    alone = module.across_cell_maps(_counts()[N_CELLS : 2 * N_CELLS], N_CELLS)
    torch.testing.assert_close(alone[0], maps[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_condition": "encoder"}, "`batch_condition` must be 'none', 'decoder' or 'both', got 'encoder'"),
        ({"mask_rate_min": 0.9, "mask_rate_max": 0.2}, "0 <= mask_rate_min <= mask_rate_max <= 1"),
        ({"mask_rate_max": 1.5}, "0 <= mask_rate_min <= mask_rate_max <= 1"),
        ({"n_heads": 3}, "`n_heads`=3 does not divide the attention width 16"),
        ({"n_cells": 0}, "`n_cells` must be at least 1, got 0"),
        ({"n_hidden": -1}, "`n_hidden` must be at least 1, got -1"),
    ],
)
def test_impossible_arguments_are_refused(options, message):
    """Protects the user from failures in the first step: one sentence at construction."""
    with pytest.raises(ValueError, match=message):
        _module(**options)


# ---------------------------------------------------------------- precision and compilation


def test_bfloat16_autocast_is_close_to_float32():
    """Protects `precision="bf16-mixed"`: loss within 1 %, embeddings within 3 %, gradients along the same direction."""
    module = _module(torch.float32)
    tensors = _tensors(**{REGISTRY_KEYS.X: _counts(torch.float32)})
    loss, gradients = _gradients(module, tensors)
    z, _ = module.encode(tensors[REGISTRY_KEYS.X], N_CELLS)
    with torch.autocast("cpu", torch.bfloat16):
        low_loss, low_gradients = _gradients(module, tensors)
        low_z, _ = module.encode(tensors[REGISTRY_KEYS.X], N_CELLS)
    assert low_loss.dtype == torch.float32
    assert low_loss.item() == pytest.approx(loss.item(), rel=0.01)
    assert (low_z.float() - z).norm() / z.norm() < 0.03
    whole, low_whole = (torch.cat([g.flatten() for g in part.values()]) for part in (gradients, low_gradients))
    assert torch.cosine_similarity(whole, low_whole, dim=0) > 0.99


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_module_gives_the_same_loss_and_gradients(backend):
    """Protects `compile=True`: the compiled forward and backward agree with eager mode to float32 rounding."""
    torch.compiler.reset()
    module = _module(torch.float32, n_layers=1).train()
    tensors = _tensors(**{REGISTRY_KEYS.X: _counts(torch.float32)})
    loss, gradients = _gradients(module, tensors)
    module.zero_grad()
    # inductor has random streams of its own; eager ones make the draws of the sliced-Wasserstein term comparable
    with torch._inductor.config.patch(fallback_random=True):
        torch.manual_seed(0)
        compiled_loss = torch.compile(module, backend=backend)(tensors)[2].loss
        compiled_loss.backward()
    torch.testing.assert_close(compiled_loss.detach(), loss, rtol=1e-5, atol=1e-6)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: n + m)


def test_compiled_module_accepts_draws_of_random_size():
    """Protects `compile=True` at default sizes: numbers of masked genes and of drawn cells change from step to step."""
    torch.compiler.reset()
    module = StackModule(N_GENES, n_hidden=4, token_dim=4, n_cells=60, n_layers=1, n_heads=2, dropout=0.0).train()
    tensors = {REGISTRY_KEYS.X: torch.poisson(torch.full((120, N_GENES), 2.0)), LOADER_KEYS.N_CELLS: 60}
    compiled = torch.compile(module, backend="aot_eager")
    for seed in range(3):
        torch.testing.assert_close(_loss(compiled, tensors, seed).loss, _loss(module, tensors, seed).loss)


# ---------------------------------------------------------------- batch condition

BATCHES = torch.tensor([[0], [1], [2]]).repeat(N_CONTEXTS * N_CELLS // 3, 1)


def _outputs(module, batch):
    z, library = module.encode(_counts(), N_CELLS, batch)
    return z, module.decode(z.flatten(0, 1), library, batch)["px_scale"]


def _with_weights_of_none(condition):
    module = _module(batch_condition=condition, n_batch=3)
    missing = module.load_state_dict(_module().state_dict(), strict=False)
    assert not missing.unexpected_keys
    return module


@pytest.mark.parametrize("condition", ["decoder", "both"])
def test_batch_condition_starts_as_the_published_model(condition):
    """Protects a fair start: before training, every batch condition computes what "none" computes."""
    expected = _outputs(_module(), BATCHES)
    torch.testing.assert_close(_outputs(_with_weights_of_none(condition), BATCHES), expected)


@pytest.mark.parametrize(
    ("condition", "z_changes", "output_changes"), [("none", 0, 0), ("decoder", 0, 1), ("both", 1, 1)]
)
def test_what_the_batch_reaches_after_an_update(condition, z_changes, output_changes):
    """Protects the meaning of `batch_condition`: "decoder" keeps the batch out of the embedding, "both" does not."""
    module = _with_weights_of_none(condition).train()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    loss = _loss(module, _tensors(**{REGISTRY_KEYS.BATCH: BATCHES})).loss
    loss.backward()
    optimizer.step()
    module.eval()
    z, scale = _outputs(module, BATCHES)
    other_z, other_scale = _outputs(module, BATCHES.flip(0))
    assert torch.equal(z, other_z) != bool(z_changes)
    assert torch.equal(scale, other_scale) != bool(output_changes)


def test_none_has_only_the_published_weights(stack_tiny):
    """Protects published checkpoints: "none" adds no key; the conditions add embeddings of their own, nothing else."""
    config = stack_tiny[0]["core"]["config"]
    published = set(stack_tiny[0]["core"]["state_dict"])
    keys = {
        c: set(StackModule(**config, batch_condition=c, n_batch=3).state_dict()) for c in ("none", "decoder", "both")
    }
    assert keys["none"] == published
    assert keys["decoder"] - published == {"decoder_batch.weight"}
    assert keys["both"] - published == {"decoder_batch.weight", "encoder_batch.weight"}
