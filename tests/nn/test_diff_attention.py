"""Differential attention: two fused calls are the difference of two maps."""

from __future__ import annotations

import math

import pytest
import torch

from cellweave.nn import DifferentialAttention, DiffPerceiverBlock, PackedAttention

either = pytest.mark.parametrize("cross", [True, False])


def _tokens(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _attention(cross, dim=6, heads=2, depth=1):
    torch.manual_seed(0)
    return DifferentialAttention(dim, heads, depth, cross).double()


def _explicit(layer, y, x):
    """The formula with both maps written out, head by head."""
    width = y.shape[-1] // layer.n_heads
    other = (x, y, x) if layer.cross else (y, x, x)
    q1, v = layer.q_proj_1(y), layer.v_proj(y)
    k1, q2, k2 = (p(t) for p, t in zip((layer.k_proj_1, layer.q_proj_2, layer.k_proj_2), other, strict=True))
    lam = (layer.lambda_q1 @ layer.lambda_k1).exp() - (layer.lambda_q2 @ layer.lambda_k2).exp() + layer.lambda_init
    heads = []
    for h in range(layer.n_heads):
        part = slice(h * width, (h + 1) * width)
        first, second = (
            (q[..., part] @ k[..., part].transpose(1, 2) / width**0.5).softmax(-1) for q, k in ((q1, k1), (q2, k2))
        )
        out = (first - lam * second) @ v[..., part]
        out = out / (out.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.subln.weight
        heads.append(out * (1 - layer.lambda_init))
    return torch.cat(heads, -1) @ layer.out_proj.weight.T


@either
def test_two_fused_calls_equal_the_explicit_maps(cross):
    """Protects the formula: which input gives which queries and keys, lambda, the norm of heads and its factor."""
    layer, y, x = _attention(cross), _tokens(2, 5, 6), _tokens(2, 5, 6, seed=1)
    torch.testing.assert_close(layer(y, x), _explicit(layer, y, x))


@either
def test_gradients_are_those_of_finite_differences(cross):
    """Protects training: gradients with respect to both inputs and to lambda agree with finite differences."""
    layer, y, x = _attention(cross), _tokens(1, 3, 6).requires_grad_(), _tokens(1, 3, 6, seed=1).requires_grad_()

    def function(y, x, lambda_q1):
        return torch.func.functional_call(layer, {"lambda_q1": lambda_q1}, (y, x))

    assert torch.autograd.gradcheck(function, (y, x, layer.lambda_q1.detach().clone().requires_grad_()))


def test_reference_replaces_the_control_tokens():
    """Protects the constants of sampling: queries and keys computed once give what the tokens give."""
    layer, y, x = _attention(False), _tokens(2, 5, 6), _tokens(2, 5, 6, seed=1)
    torch.testing.assert_close(layer(y, reference=layer.reference(x)), layer(y, x), rtol=0, atol=0)


def test_one_control_cell_may_serve_many():
    """Protects sharing: a reference of one cell is that of all cells."""
    layer, y, x = _attention(False), _tokens(3, 5, 6), _tokens(1, 5, 6, seed=1)
    torch.testing.assert_close(layer(y, reference=layer.reference(x)), layer(y, x.expand(3, -1, -1)))


def test_lambda_starts_at_the_published_values():
    """Protects the schedule over depth: 0.2 in the first block, towards 0.8 in deep ones."""
    layers = [DifferentialAttention(4, 2, depth, True) for depth in (0, 3, 50)]
    expected = [0.2, 0.8 - 0.6 * math.exp(-0.9), 0.8]
    assert [layer.lambda_init for layer in layers] == pytest.approx(expected)


def test_control_gives_no_values():
    """Protects the block: a control cell changes which genes are looked at, not what is read, so a stream of equal
    tokens stays one of equal tokens whatever the control is."""
    torch.manual_seed(0)
    block = DiffPerceiverBlock(6, 2, 0).double()
    y, c = _tokens(1, 1, 6).expand(2, 5, 6), _tokens(2, 6, seed=2)
    out = block(y, c, block.constant(_tokens(2, 5, 6, seed=1)))
    torch.testing.assert_close(out, out[:, :1].expand_as(out))
    varied = block(_tokens(2, 5, 6), c, block.constant(_tokens(2, 5, 6, seed=1)))
    other = block(_tokens(2, 5, 6), c, block.constant(_tokens(2, 5, 6, seed=3)))
    assert not torch.allclose(varied, other)


def test_heads_must_divide_the_width():
    """Protects from a shape error deep in torch."""
    with pytest.raises(ValueError, match="`n_heads`=4 does not divide the width 6; choose a divisor of 6."):
        DifferentialAttention(6, 4, 0, True)
    with pytest.raises(ValueError, match="`n_heads`=4 does not divide the width 6"):
        PackedAttention(6, 4)


@pytest.mark.parametrize("masked", [False, True])
def test_packed_attention_equals_that_of_torch(masked):
    """Protects published weights: same parameter names, same numbers as ``nn.MultiheadAttention``."""
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(6, 2, batch_first=True).double().eval()
    ours = PackedAttention(6, 2).double()
    ours.load_state_dict(theirs.state_dict())
    query, memory = _tokens(2, 4, 6), _tokens(2, 5, 6, seed=1)
    allowed = torch.rand(4, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    allowed[:, 0] = True
    mask = {"attn_mask": ~allowed} if masked else {}
    expected, _ = theirs(query, memory, memory, **mask)
    torch.testing.assert_close(ours(query, memory, allowed if masked else None), expected)
    torch.testing.assert_close(ours(query), theirs(query, query, query)[0])


def test_sparse_graphs_give_the_same_attention():
    """Protects the shortcut for sparse graphs: going from pair to pair equals the dense map, with its gradients."""
    torch.manual_seed(0)
    layer = PackedAttention(6, 2).double()
    query, memory = _tokens(2, 40, 6).requires_grad_(), _tokens(2, 90, 6, seed=1).requires_grad_()
    allowed = torch.rand(40, 90, generator=torch.Generator().manual_seed(0)) < 0.02
    allowed[:, 3] = True  # a hub
    assert allowed.float().mean() < 0.05
    sparse = layer(query, memory, allowed)
    dense, _ = torch.nn.functional.multi_head_attention_forward(
        *(t.transpose(0, 1) for t in (query, memory, memory)), 6, 2, layer.in_proj_weight, layer.in_proj_bias,
        None, None, False, 0.0, layer.out_proj.weight, layer.out_proj.bias, attn_mask=~allowed,
    )  # fmt: skip
    torch.testing.assert_close(sparse, dense.transpose(0, 1))
    inputs, weight = (query, memory, layer.in_proj_weight), _tokens(2, 40, 6, seed=2)
    ours, theirs = (torch.autograd.grad((out * weight).sum(), inputs) for out in (sparse, dense.transpose(0, 1)))
    torch.testing.assert_close(ours, theirs)


def test_sparse_graphs_have_dropout_too():
    """Protects training: the shortcut drops pairs while training, keeps the mean, and none while evaluating."""
    torch.manual_seed(0)
    layer = PackedAttention(6, 2, dropout=0.5).double()
    query, memory = _tokens(1, 40, 6), _tokens(1, 90, 6, seed=1)
    allowed = torch.eye(90, dtype=torch.bool)[:40] | torch.eye(90, dtype=torch.bool)[50:]
    mean = torch.stack([layer(query, memory, allowed) for _ in range(400)]).mean(0)
    layer.eval()
    expected = layer(query, memory, allowed)
    torch.testing.assert_close(mean, expected, rtol=0, atol=0.2)
    assert not torch.equal(layer.train()(query, memory, allowed), expected)
