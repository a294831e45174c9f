"""Representations and doses of perturbations."""

from __future__ import annotations

import torch

from cellweave.nn import DoseResponse, TokenDescriptions


def _described():
    torch.manual_seed(0)
    layer = TokenDescriptions(5, 3, 2, 4)
    features = torch.tensor([[1.0, 10.0], [3.0, 30.0], [5.0, 90.0]])
    layer.describe(torch.tensor([1, 3, 4]), features, torch.tensor([True, True, False]))
    return layer


def test_features_are_standardised_over_trained_tokens():
    """Protects from scales: a feature in thousands must not drown the others, and unseen tokens must not set the scale."""
    layer = _described()
    torch.testing.assert_close(layer.features[:2].mean(0), torch.zeros(2))
    torch.testing.assert_close(layer.features[:2].std(0, correction=0), torch.ones(2))


def test_an_untrained_token_is_known_by_its_features_alone():
    """Protects predictions of unseen perturbations from the random vector that an untrained token starts with."""
    layer = _described().eval()
    ids = torch.tensor([0, 1, 4])
    one, other = (layer(ids, torch.randn(3, 4)) for _ in range(2))
    assert not torch.allclose(one[0], other[0])
    assert not torch.allclose(one[1], other[1])
    torch.testing.assert_close(one[2], other[2])
    vectors = torch.randn(3, 4)
    torch.testing.assert_close(layer(ids, vectors)[0], vectors[0])


def test_training_sometimes_hides_the_own_vector():
    """Protects that features learn to stand alone; without it only the own vectors would be used."""
    layer = _described().train()
    ids = torch.ones(4000, dtype=torch.int64)
    vectors = torch.full((4000, 4), 100.0)
    hidden = (layer(ids, vectors).mean(1) < 50).float().mean()
    assert 0.2 < hidden < 0.3
    assert (layer(torch.zeros(100, dtype=torch.int64), vectors[:100]) == 100).all()


def test_a_larger_dose_never_weakens_the_vector():
    """Protects the meaning of a dose: nothing at none, unchanged at the usual dose before training, and rising."""
    response = DoseResponse(3)
    torch.nn.init.normal_(response.log_half)
    torch.nn.init.normal_(response.log_slope)
    vectors = torch.randn(3).abs()
    doses = torch.logspace(-3, 3, 20)
    scaled = response(vectors.expand(20, 3), doses)
    assert (scaled.diff(dim=0) >= 0).all()
    assert (response(vectors[None], torch.zeros(1)).abs() < 0.1).all()
    torch.testing.assert_close(DoseResponse(3)(vectors[None], torch.ones(1))[0], vectors)
