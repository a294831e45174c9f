"""Embedders, conditioned norms and decoders of the cascaded flow."""

from __future__ import annotations

import pytest
import torch

from cellweave.nn import (
    ContinuousValueEncoder,
    GeneAdaLN,
    GeneEncoder,
    LatentDecoder,
    LatentEmbedder,
    PairLinear,
    PairSequential,
    timestep_features,
)


def _random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _graph(n=11):
    """A ring: every token sees itself and its two neighbours."""
    forbidden = torch.ones(n, n, dtype=torch.bool)
    for i in range(n):
        forbidden[i, [i, (i + 1) % n, (i - 1) % n]] = False
    return forbidden


def _encoder(forbidden):
    torch.manual_seed(0)
    return GeneEncoder(len(forbidden), 8, forbidden, n_heads=2).eval()


def test_time_features_are_cosines_before_sines():
    """Protects the order and the frequencies: the first pair turns once in 2 pi, the last 10000 times slower."""
    features = timestep_features(torch.tensor([0.0, 0.5], dtype=torch.float64), 4)
    t = torch.tensor([0.5, 0.5 / 100], dtype=torch.float64)
    torch.testing.assert_close(features[0], torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(features[1], torch.cat([t.cos(), t.sin()]))


def test_large_values_count_as_the_limit():
    """Protects tokens of outliers, and the missing lower limit: negative noise has tokens of its own."""
    encoder = ContinuousValueEncoder(4, max_value=3.0).eval()
    out = encoder(torch.tensor([[3.0, 5.0, -1.0, -2.0]]))[0]
    torch.testing.assert_close(out[0], out[1])
    assert not torch.allclose(out[2], out[3])


def test_genes_see_what_the_graph_allows():
    """Protects the mask: a token's vector follows its neighbours, and nothing else."""
    encoder = _encoder(_graph())
    ids = torch.arange(11)
    before = encoder(ids)
    with torch.no_grad():
        encoder.embedding.weight[4, 0] += 3
    changed = (encoder(ids) - before).abs().amax(1) > 1e-6
    assert changed.nonzero().flatten().tolist() == [3, 4, 5]


def test_a_gene_has_one_vector():
    """Protects the table: a vector depends on the token only, not on the other genes, their order or repeats."""
    encoder = _encoder(_graph())
    table = encoder(torch.arange(11))
    ids = torch.tensor([[5, 0, 5], [2, 9, 0]])
    torch.testing.assert_close(encoder(ids), table[ids], rtol=1e-5, atol=1e-6)


def test_the_graph_is_stored_with_the_weights():
    """Protects loading without the cells that made the graph; eight entries to a byte."""
    encoder, other = _encoder(_graph()), _encoder(torch.zeros(11, 11, dtype=torch.bool))
    assert encoder.allowed_bits.shape == (11, 2)
    other.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(other(torch.arange(11)), encoder(torch.arange(11)), rtol=0, atol=0)


def test_bad_graphs_are_refused():
    """Protects from silent NaN: a token that sees nothing, or a graph of other genes."""
    forbidden = _graph()
    forbidden[7] = True
    with pytest.raises(ValueError, match=r"`forbidden` leaves 1 tokens nothing to see \(first: 7\); let every token"):
        GeneEncoder(11, 8, forbidden, 2)
    with pytest.raises(ValueError, match=r"`forbidden` must have the shape \(12, 12\), got \(11, 11\)"):
        GeneEncoder(12, 8, _graph(), 2)


def test_halves_of_a_layer_equal_the_layer():
    """Protects the constants of perturbation and control: the half computed once is exactly its share."""
    torch.manual_seed(0)
    layer = PairSequential(PairLinear(3, 2, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1)).double()
    x, y = _random(5, 3).double(), _random(5, 2, seed=1).double()
    expected = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1)).double()
    expected.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x, layer.constant(y)), expected(torch.cat([x, y], 1)))


def test_gene_norm_of_a_zero_gate_is_the_identity():
    """Protects the stream: without a gate, tokens pass unchanged."""
    layer = GeneAdaLN(4)
    layer.adaLN_modulation.set_zero()
    x = _random(2, 3, 4)
    torch.testing.assert_close(layer(x, layer.constant(_random(3, 4, seed=1))), x, rtol=0, atol=0)


@pytest.mark.parametrize("pool", [False, True])
def test_features_start_with_velocity_zero_and_learn(pool):
    """Protects the start and the shape: zero at first, per gene or per cell, yet with a gradient to leave zero."""
    torch.manual_seed(0)
    decoder, embed = LatentDecoder(8, 3, depth=1, n_heads=2, pool=pool), LatentEmbedder(3, 2, 8)
    out = decoder(embed(_random(4, 5, 3)), _random(4, 8, seed=1))
    assert out.shape == ((4, 3) if pool else (4, 5, 3))
    assert (out == 0).all()
    (out - 1).square().sum().backward()
    assert (decoder.final[-1].weight.grad != 0).any()


def test_pooled_features_do_not_depend_on_the_order_of_genes():
    """Protects features of cells: genes are a set."""
    torch.manual_seed(0)
    decoder = LatentDecoder(8, 3, depth=1, n_heads=2, pool=True)
    torch.nn.init.normal_(decoder.final[-1].weight)
    x, c = _random(2, 5, 8), _random(2, 8, seed=1)
    torch.testing.assert_close(decoder(x, c), decoder(x.flip(1), c), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(decoder(x, c), decoder(x + 1, c), atol=1e-3)
