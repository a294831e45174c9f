"""Numerical parity of the layers of the cascaded flow model with the published scDFM layers."""

from __future__ import annotations

import pytest
import torch
from ccfm_numbers import assert_close, load, numbers, tensors

from cellweave.nn import (
    ContinuousValueEncoder,
    DifferentialAttention,
    DiffPerceiverBlock,
    ExpressionDecoder,
    GeneAdaLN,
    GeneEncoder,
    LabelEncoder,
    TimestepEmbedder,
    timestep_features,
)

pytestmark = pytest.mark.parity

N_TOKENS, DIM, N_HEADS = 44, 32, 4
every_depth = pytest.mark.parametrize("depth", [0, 3])


def _group(name):
    return numbers("ccfm_layers", f"{name}/")


def test_timestep_embedder():
    """Protects the time condition: cosines before sines, unscaled times, the published network."""
    a = _group("timestep")
    [t] = tensors(a, "t")
    assert_close(timestep_features(t), a["sinusoid"], rtol=1e-5, atol=1e-6)
    assert_close(load(TimestepEmbedder(DIM), a)(t), a["out"], rtol=1e-5, atol=1e-6)


def test_value_encoder():
    """Protects the expression tokens, including the clamp of large and the passing of negative values."""
    a = _group("value")
    assert_close(load(ContinuousValueEncoder(DIM), a)(*tensors(a, "x")), a["out"], rtol=1e-5, atol=5e-6)


def test_gene_encoder_without_graph():
    """Protects the gene vectors of models without a gene graph."""
    a = _group("gene_plain")
    assert_close(load(GeneEncoder(N_TOKENS, DIM), a)(*tensors(a, "ids")), a["out"], rtol=1e-5, atol=1e-6)


def test_gene_encoder_with_graph():
    """Protects the interaction along the graph: table lookups equal the layer applied to every cell."""
    a = _group("gene_masked")
    mask, ids, pert_ids = tensors(a, "mask", "ids", "pert_ids")
    encoder = load(GeneEncoder(N_TOKENS, DIM, mask, N_HEADS), a, own=("allowed_bits",))
    assert_close(encoder(ids[0]), a["out"][0], rtol=1e-5, atol=5e-6)
    assert_close(encoder(pert_ids[0]), a["pert_out"][0], rtol=1e-5, atol=5e-6)
    assert_close(encoder(pert_ids[0]).mean(0), a["pert_mean"][0], rtol=1e-5, atol=5e-6)
    same = (a["ids"] == a["ids"][:1]).all(1)
    assert_close(encoder(ids)[torch.tensor(same)], a["out"][same], rtol=1e-5, atol=5e-6)


def test_label_encoder():
    """Protects perturbations that are labels instead of genes."""
    a = _group("label")
    assert_close(load(LabelEncoder(N_TOKENS, DIM), a)(*tensors(a, "ids")).mean(1), a["out_mean"], atol=1e-6)


def test_gene_adaln():
    """Protects the order shift, gate, scale, and the scale that is not 1 + scale."""
    a = _group("gene_adaln")
    gene, value = tensors(a, "gene", "value")
    layer = load(GeneAdaLN(DIM), a)
    assert_close(layer(value, layer.constant(gene)), a["out"], rtol=1e-5, atol=5e-6)


def test_expression_decoder():
    """Protects the head: halves of the first layer, computed apart, equal the layer on concatenated inputs."""
    a = _group("expr_decoder")
    decoder = load(ExpressionDecoder(DIM), a)
    x, p = tensors(a, "x")[0].split(DIM, -1)
    assert_close(decoder(x, decoder.constant(p)), a["out"], rtol=1e-5, atol=5e-6)


@every_depth
@pytest.mark.parametrize("cross", [True, False])
def test_differential_attention(cross, depth):
    """Protects the two fused calls: outputs and gradients are those of the explicit difference of maps."""
    a = _group(f"diff_attn_{'cross' if cross else 'plain'}_{depth}")
    layer = load(DifferentialAttention(DIM, N_HEADS, depth, cross), a)
    y, x, w = tensors(a, "y", "x", "w")
    out = layer(y.requires_grad_(), x.requires_grad_())
    assert_close(out, a["out"], rtol=1e-5, atol=5e-6)
    (out * w).sum().backward()
    assert_close(y.grad, a["grad_y"])
    assert_close(x.grad, a["grad_x"])
    assert_close(layer.lambda_q1.grad, a["grad_lambda_q1"])


@every_depth
def test_diff_perceiver_block(depth):
    """Protects the block: which input is normalised, which gives queries, keys and values, and all gradients."""
    a = _group(f"diff_perceiver_{depth}")
    block = load(DiffPerceiverBlock(DIM, N_HEADS, depth), a)
    y, x, c, w = (t.requires_grad_() for t in tensors(a, "y", "x", "c", "w"))
    assert_close(block.diff_self_attn(y, c, x=y), a["after_self"], atol=1e-5)
    out = block(y, c, block.constant(x))
    assert_close(out, a["out"])
    (out * w).sum().backward()
    for name, tensor in (("y", y), ("x", x), ("c", c)):
        assert_close(tensor.grad, a[f"grad_{name}"])
