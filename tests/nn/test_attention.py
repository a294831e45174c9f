"""Attention layers: the fused kernel computes the formula, prompts see only prompts."""

from __future__ import annotations

import pytest
import torch

from cellweave.nn import MultiHeadAttention, TabularAttentionLayer, within_cell_heads


def _attention(dim=12, n_heads=3, **options):
    torch.manual_seed(0)
    return MultiHeadAttention(dim, n_heads, **options).double()


def _tokens(batch=2, length=7, dim=12):
    return torch.randn(batch, length, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def _explicit(attention, x, allowed):
    """Softmax attention written out head by head; ``allowed`` is (query, key)."""
    batch, length, dim = x.shape
    width = dim // attention.n_heads
    q, k, v = (x @ w.T for w in attention.qkv.weight.split(dim))
    heads = []
    for h in range(attention.n_heads):
        part = slice(h * width, (h + 1) * width)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / width**0.5
        weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
        heads.append(weights @ v[..., part])
    return torch.cat(heads, -1) @ attention.proj.weight.T + attention.proj.bias


def _prompt_pattern(length: int, n_prompt: int) -> torch.Tensor:
    position = torch.arange(length)
    return (position[None, :] < n_prompt) | (position[:, None] >= n_prompt)


def test_fused_attention_equals_the_explicit_softmax():
    """Protects the formula: the fused kernel and the softmax written out agree to rounding."""
    attention, x = _attention(), _tokens()
    torch.testing.assert_close(attention(x), _explicit(attention, x, torch.ones(7, 7, dtype=torch.bool)))


@pytest.mark.parametrize("n_prompt", [0, 1, 3, 6, 7])
def test_prompt_equals_a_masked_softmax(n_prompt):
    """Protects in-context use: the two dense calls equal one masked attention, for any prompt length."""
    attention, x = _attention(), _tokens()
    expected = _explicit(attention, x, _prompt_pattern(7, n_prompt))
    torch.testing.assert_close(attention(x, n_prompt=n_prompt), expected)


def test_prompt_does_not_see_the_rest():
    """Protects prompts from queries: changing later positions leaves the prompt outputs unchanged, not vice versa."""
    attention, x = _attention(), _tokens()
    changed = x.clone()
    changed[:, 3:] += 1
    torch.testing.assert_close(attention(x, 3)[:, :3], attention(changed, 3)[:, :3], rtol=0, atol=0)
    changed = x.clone()
    changed[:, :3] += 1
    assert not torch.allclose(attention(x, 3)[:, 3:], attention(changed, 3)[:, 3:])


@pytest.mark.parametrize("n_prompt", [None, 0, 3, 7])
def test_attention_map_holds_the_weights_of_the_forward(n_prompt):
    """Protects `get_attention`: the map applied to the values gives the output; rows sum to one."""
    attention, x = _attention(), _tokens()
    weights = attention.attention_map(x, n_prompt)
    v = attention._project(x)[2]
    output = attention.proj((weights @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(output, attention(x, n_prompt))
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    if n_prompt:
        assert (weights[:, :, :n_prompt, n_prompt:] == 0).all()


def test_attention_is_equivariant_to_the_order():
    """Protects sets: permuting the positions permutes the outputs, nothing else."""
    attention, x = _attention(), _tokens()
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    torch.testing.assert_close(attention(x[:, order]), attention(x)[:, order])


def test_dropout_acts_in_training_only():
    """Protects getters: attention dropout is random in train mode and absent in eval mode."""
    attention, x = _attention(dropout=0.5), _tokens()
    assert not torch.equal(attention.train()(x), attention(x))
    assert torch.equal(attention.eval()(x), attention(x))


@pytest.mark.parametrize("width", [4, 16])
def test_bfloat16_tokens(width):
    """Protects mixed precision for narrow and wide heads: within bfloat16 rounding (3 %) of float32."""
    torch.manual_seed(0)
    attention = MultiHeadAttention(2 * width, 2)
    x = torch.randn(2, 9, 2 * width)
    with torch.autocast("cpu", torch.bfloat16):
        low = attention(x)
    high = attention(x)
    assert (low.float() - high).norm() / high.norm() < 0.03


@pytest.mark.parametrize(("n_heads", "expected"), [(8, torch.float32), (1, torch.bfloat16)])
def test_autocast_computes_narrow_heads_in_float32(n_heads, expected, monkeypatch):
    """Protects speed on the CPU: autocast must not turn narrow heads, slow in bfloat16, back into bfloat16."""
    seen = {}
    fused = torch.nn.functional.scaled_dot_product_attention

    def recorded(q, k, v, **options):
        out = fused(q, k, v, **options)
        seen["dtype"] = out.dtype  # what the kernel computed in, after autocast had its say
        return out

    monkeypatch.setattr("cellweave.nn._attention.F.scaled_dot_product_attention", recorded)
    with torch.autocast("cpu", torch.bfloat16):
        MultiHeadAttention(16, n_heads)(torch.randn(2, 5, 16))
    assert seen["dtype"] == expected


def test_heads_must_divide_the_width():
    """Protects against a shape error deep in the network: the message names both numbers."""
    with pytest.raises(ValueError, match="`n_heads`=5 does not divide the attention width 12"):
        MultiHeadAttention(12, 5)


@pytest.mark.parametrize(
    ("token_dim", "n_heads", "expected"), [(8, 2, 8), (16, 3, 8), (6, 4, 3), (4, 2, 2), (7, 4, 1), (9, 8, 3), (1, 8, 1)]
)
def test_within_cell_heads(token_dim, n_heads, expected):
    """Protects loading of published weights: eight heads if possible, else the largest fitting divisor."""
    assert within_cell_heads(token_dim, n_heads) == expected
    assert token_dim % within_cell_heads(token_dim, n_heads) == 0


def _layer():
    torch.manual_seed(0)
    return TabularAttentionLayer(n_tokens=3, token_dim=4, n_heads=2).double().eval()


def _grid():
    return torch.randn(2, 5, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def test_layer_mixes_cells_of_one_context_only():
    """Protects contexts from each other: changing a cell of one leaves all cells of the other unchanged."""
    layer, grid, position = _layer(), _grid(), torch.randn(3, 4, dtype=torch.float64)
    changed = grid.clone()
    changed[0, 1] += torch.randn(3, 4, dtype=torch.float64)  # a constant would vanish in the norm of the layer
    before, after = layer(grid, position), layer(changed, position)
    torch.testing.assert_close(before[1], after[1], rtol=0, atol=0)
    assert ((before[0] - after[0]).abs().amax((1, 2)) > 0).all()


def test_position_matters_to_the_layer():
    """Protects gene tokens from being interchangeable: with positions, permuted tokens are another cell."""
    layer, grid, position = _layer(), _grid(), torch.randn(3, 4, dtype=torch.float64)
    order = torch.tensor([2, 0, 1])
    u = layer._within_cells(grid, position).view_as(grid)
    torch.testing.assert_close(layer._within_cells(grid[:, :, order], position[order]).view_as(grid), u[:, :, order])
    assert not torch.allclose(layer._within_cells(grid[:, :, order], position).view_as(grid), u[:, :, order])


def test_across_cell_map_of_the_layer():
    """Protects the map per layer: shape (context, head, cell, cell), rows summing to one."""
    weights = _layer().across_cell_map(_grid(), torch.zeros(3, 4, dtype=torch.float64))
    assert weights.shape == (2, 2, 5, 5)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 5, dtype=torch.float64))
