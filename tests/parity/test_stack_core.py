"""Numerical parity of the core Stack module with the published original (fixture ``stack_tiny``)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cellweave._keys import LOADER_KEYS, REGISTRY_KEYS
from cellweave.module import StackModule
from cellweave.objective import negative_binomial_nll, sliced_wasserstein
from cellweave.objective._sliced_wasserstein import Slices

DTYPES = {"f32": torch.float32, "f64": torch.float64}
# Stated by the issue: 1e-5 relative in float32, 1e-10 in float64. The absolute parts cover entries near zero.
TOLERANCE = {"f32": {"rtol": 1e-5, "atol": 4e-6}, "f64": {"rtol": 1e-10, "atol": 1e-12}}


def _module(stack_tiny, dtype: torch.dtype, group: str = "core") -> StackModule:
    """The module of the fixture with its weights, in evaluation mode."""
    meta, arrays = stack_tiny
    module = StackModule(**meta["core"]["config"])
    weights = {k.removeprefix(f"{group}/w/"): torch.tensor(v) for k, v in arrays.items() if k.startswith(f"{group}/w/")}
    module.load_state_dict(weights, strict=True)
    return module.to(dtype).eval()


def _counts(stack_tiny, dtype: torch.dtype) -> torch.Tensor:
    """Counts of both contexts as flat, set-major rows (16 cells, 12 genes)."""
    return torch.tensor(stack_tiny[1]["core/counts"], dtype=dtype).flatten(0, 1)


def _mask(stack_tiny) -> torch.Tensor:
    return torch.tensor(stack_tiny[0]["core"]["mask_genes"])


def _fix_slices(monkeypatch, stack_tiny) -> None:
    """Replace the random draws of the sliced-Wasserstein term by those of the fixture."""
    meta, arrays = stack_tiny

    def fixture_slices(z, n_proj, n_cells=None, generator=None):
        assert n_proj == meta["core"]["config"]["n_proj"]
        cells = torch.tensor(meta["core"]["sw_cell_perm"])[:n_cells]
        prior = torch.tensor(arrays["core/sw_prior"]).to(z)[:, : len(cells)]
        return Slices(cells, prior, torch.tensor(arrays["core/sw_proj_raw"]).to(z))

    monkeypatch.setattr("cellweave.objective._sliced_wasserstein.draw_slices", fixture_slices)


def _forward(module, counts, mask):
    tensors = {REGISTRY_KEYS.X: counts, LOADER_KEYS.N_CELLS: 8, LOADER_KEYS.MASK_GENES: mask}
    return module(tensors)


def _assert_close(actual: torch.Tensor, expected: np.ndarray, precision: str) -> None:
    expected = torch.tensor(expected, dtype=actual.dtype).reshape(actual.shape)
    torch.testing.assert_close(actual.detach(), expected, **TOLERANCE[precision])


@pytest.mark.parametrize("precision", DTYPES)
def test_state_dict_has_the_published_keys_and_shapes(stack_tiny, precision):
    """Protects the checkpoint format: exactly the published names and shapes, 7 928 parameters."""
    module = _module(stack_tiny, DTYPES[precision])
    meta = stack_tiny[0]["core"]
    assert {k: list(v.shape) for k, v in module.state_dict().items()} == meta["state_dict"]
    assert sum(p.numel() for p in module.parameters()) == meta["n_params"]


@pytest.mark.parametrize("precision", DTYPES)
def test_latent_without_mask(stack_tiny, precision):
    """Protects the encoder: embeddings without gene mask, and their published sums."""
    module = _module(stack_tiny, DTYPES[precision])
    z, _ = module.encode(_counts(stack_tiny, DTYPES[precision]), n_cells=8)
    _assert_close(z, stack_tiny[1][f"core/latent_{precision}"], precision)
    sums = stack_tiny[0]["core"][f"sums_{precision}"]
    assert z.abs().sum().item() == pytest.approx(sums["latent_abs_sum"], rel=1e-6)


@pytest.mark.parametrize("precision", DTYPES)
def test_latent_with_prompt_attention(stack_tiny, precision):
    """Protects the in-context attention pattern: prompt cells see only prompt cells (two dense calls, no mask)."""
    module = _module(stack_tiny, DTYPES[precision])
    n_prompt = stack_tiny[0]["core"]["attn_mask_n_kept"]
    z, _ = module.encode(_counts(stack_tiny, DTYPES[precision]), n_cells=8, n_prompt=n_prompt)
    _assert_close(z, stack_tiny[1][f"core/latent_attnmask_{precision}"], precision)


@pytest.mark.parametrize("precision", DTYPES)
def test_attention_maps(stack_tiny, precision):
    """Protects the explicit attention maps, computed apart from the fused kernel, per layer and head."""
    module = _module(stack_tiny, DTYPES[precision])
    n_prompt = stack_tiny[0]["core"]["attn_mask_n_kept"]
    counts = _counts(stack_tiny, DTYPES[precision])
    grid = module._tokens(counts, counts.sum(-1, keepdim=True), 8, None, None)
    maps = []
    for layer in module.layers:
        maps.append(layer.across_cell_map(grid, module.gene_pos_embedding, n_prompt))
        grid = layer(grid, module.gene_pos_embedding, n_prompt)
    expected = stack_tiny[1][f"core/attn_maps_{precision}"]
    actual = torch.stack(maps)
    if expected.ndim == actual.ndim - 1:
        actual = actual.mean(2)
    _assert_close(actual, expected, precision)


@pytest.mark.parametrize("precision", DTYPES)
def test_masked_forward(stack_tiny, precision, monkeypatch):
    """Protects masking, decoder, losses and evaluation metrics of the training forward."""
    _fix_slices(monkeypatch, stack_tiny)
    meta, arrays = stack_tiny
    module = _module(stack_tiny, DTYPES[precision])
    counts, mask = _counts(stack_tiny, DTYPES[precision]), _mask(stack_tiny)
    inference, generative, loss = _forward(module, counts, mask)

    library = counts.sum(-1, keepdim=True)
    _assert_close(module.features(counts, library, mask), arrays[f"core/fwd_masked_features_{precision}"], precision)
    tokens = module._tokens(counts, library, 8, None, mask)
    _assert_close(tokens, arrays[f"core/fwd_tokens_{precision}"], precision)
    _assert_close(inference["z"], arrays[f"core/fwd_cell_embeddings_{precision}"], precision)
    expected = meta["core"][f"fwd_eval_{precision}"]
    rel = 1e-6 if precision == "f32" else 1e-10
    assert loss.loss.item() == pytest.approx(expected["loss"], rel=rel)
    for ours, theirs in [("recon_loss",) * 2, ("sw_loss",) * 2, ("masked_mae",) * 2, ("masked_corr",) * 2]:
        assert loss.extra_metrics[ours].item() == pytest.approx(expected[theirs], rel=10 * rel), ours
    assert len(mask) / module.n_genes == pytest.approx(expected["mask_rate"])

    everything = module.decode(inference["z"].flatten(0, 1), library)
    for key, name in [("px_rate", "nb_mean"), ("px_r", "nb_dispersion"), ("px_scale", "px_scale")]:
        reference = arrays[f"core/fwd_{name}_{precision}"]
        _assert_close(everything[key], reference, precision)
        # the training path computes masked genes only and must give the same numbers
        _assert_close(generative[key], reference[..., mask.numpy()], precision)


@pytest.mark.parametrize("precision", DTYPES)
def test_likelihood_per_cell(stack_tiny, precision):
    """Protects the negative-binomial likelihood, whose gamma functions run on non-zero counts only."""
    arrays = stack_tiny[1]
    mu, theta = (
        torch.tensor(arrays[f"core/fwd_{name}_{precision}"]).flatten(0, 1) for name in ("nb_mean", "nb_dispersion")
    )
    nll = negative_binomial_nll(_counts(stack_tiny, DTYPES[precision]), mu, theta)
    expected = arrays[f"core/fwd_nll_all_{precision}"]
    _assert_close(nll, expected.sum(-1), precision)
    total = stack_tiny[0]["core"][f"sums_{precision}"]["nll_all_sum"]
    assert nll.sum().item() == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize("block", ["cell_attn", "cell_norm", "gene_attn", "gene_norm", "mlp", "mlp_norm"])
@pytest.mark.parametrize("layer", [0, 1])
def test_every_submodule(stack_tiny, layer, block):
    """Protects each block separately, so that a parity break names its place."""
    module = _module(stack_tiny, torch.float64)
    seen = {}
    module.layers[layer].get_submodule(block).register_forward_hook(lambda _m, _i, out: seen.update(out=out))
    module.encode(_counts(stack_tiny, torch.float64), n_cells=8, mask_genes=_mask(stack_tiny))
    _assert_close(seen["out"], stack_tiny[1][f"core/inter/layer{layer}.{block}_f64"], "f64")


@pytest.mark.parametrize("precision", DTYPES)
def test_gradients(stack_tiny, precision, monkeypatch):
    """Protects training: the gradient of every parameter, elementwise where the fixture stores it."""
    _fix_slices(monkeypatch, stack_tiny)
    meta, arrays = stack_tiny
    module = _module(stack_tiny, DTYPES[precision])
    _forward(module, _counts(stack_tiny, DTYPES[precision]), _mask(stack_tiny))[2].loss.backward()
    expected = meta["core"][f"grads_{precision}"]
    assert set(expected) == {name for name, _ in module.named_parameters()}
    for name, parameter in module.named_parameters():
        rel = 1e-5 if precision == "f32" else 1e-10
        assert parameter.grad.norm().item() == pytest.approx(expected[name]["l2"], rel=rel), name
        key = f"core/grad/{name}_{precision}"
        if key in arrays:
            scale = np.abs(arrays[key]).max()
            np.testing.assert_allclose(parameter.grad.numpy(), arrays[key], rtol=rel, atol=rel * scale, err_msg=name)


@pytest.mark.parametrize("precision", DTYPES)
def test_sliced_wasserstein_subsample(stack_tiny, precision):
    """Protects the sub-sampled sliced-Wasserstein distance (six of eight cells)."""
    meta, arrays = stack_tiny
    z = torch.tensor(arrays[f"core/fwd_cell_embeddings_{precision}"])
    k = meta["core"]["sw_subsample_k"]
    slices = Slices(
        torch.tensor(meta["core"]["sw_cell_perm"])[:k],
        torch.tensor(arrays["core/sw_prior"]).to(z)[:, :k],
        torch.tensor(arrays["core/sw_proj_raw"]).to(z),
    )
    expected = meta["core"][f"sw_subsample_{precision}"]
    assert sliced_wasserstein(z, slices).item() == pytest.approx(expected, rel=1e-6 if precision == "f32" else 1e-10)


@pytest.mark.parametrize("precision", DTYPES)
def test_cell_and_gene_without_counts(stack_tiny, precision, monkeypatch):
    """Protects against NaN: a cell with no counts (library zero) and a gene never seen give the published loss."""
    _fix_slices(monkeypatch, stack_tiny)
    counts = _counts(stack_tiny, DTYPES[precision]).view(2, 8, 12)
    counts[0, 3] = 0
    counts[:, :, 1] = 0
    loss = _forward(_module(stack_tiny, DTYPES[precision]), counts.flatten(0, 1), _mask(stack_tiny))[2]
    expected = stack_tiny[0]["core"][f"zero_cell_{precision}"]
    rel = 1e-6 if precision == "f32" else 1e-10
    assert loss.loss.item() == pytest.approx(expected["loss"], rel=rel)
    assert loss.extra_metrics["masked_corr"].item() == pytest.approx(expected["masked_corr"], rel=10 * rel)


@pytest.mark.parametrize("variant", ["variant_td6", "variant_td8", "variant_td16"])
def test_token_widths(stack_tiny, variant):
    """Protects the rule for the number of within-cell heads at other token widths."""
    meta, arrays = stack_tiny
    spec = meta["core"][variant]
    module = StackModule(**spec["config"]).double().eval()
    module.load_state_dict(hash_weights(module.state_dict(), seed=spec["weight_seed"]))
    assert module.layers[0].cell_attn.n_heads == spec["cell_attn_heads"]
    z, library = module.encode(_counts(stack_tiny, torch.float64), n_cells=8)
    _assert_close(z, arrays[f"core/{variant}_latent_f64"], "f64")
    decoded = module.decode(z.flatten(0, 1), library)
    assert decoded["px_r"].sum().item() == pytest.approx(spec["nb_dispersion_sum"], rel=1e-10)
    assert decoded["px_rate"].square().sum().item() == pytest.approx(spec["nb_mean_sq_sum"], rel=1e-10)


def hash_weights(state_dict: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """Deterministic weights of the fixtures: an integer hash of (seed, rank of the key, position)."""
    weights = {}
    for rank, key in enumerate(sorted(state_dict)):
        shape = state_dict[key].shape
        z = 2 * hash_uniform(1000 * seed + rank, int(np.prod(shape))).reshape(shape) - 1
        if key.endswith("pos_embedding"):
            z = 0.5 * z
        elif "_norm." in key and key.endswith("weight"):
            z = 1 + 0.2 * z
        elif len(shape) == 1:
            z = 0.2 * z
        else:
            z = z * np.sqrt(3 / shape[1])
        weights[key] = torch.tensor(z.astype(np.float32)).to(state_dict[key])
    return weights


def hash_uniform(stream: int, n: int) -> np.ndarray:
    """Uniform numbers in [0, 1) from the integer hash of the fixtures."""
    j = np.arange(n, dtype=np.uint64)
    x = (stream * 0x9E3779B1 + j * np.uint64(0x85EBCA77) + np.uint64(0x165667B1)) & np.uint64(0xFFFFFFFF)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ (x >> np.uint64(shift))) * np.uint64(factor)) & np.uint64(0xFFFFFFFF)
    x = x ^ (x >> np.uint64(16))
    return x.astype(np.float64) / 2**32
