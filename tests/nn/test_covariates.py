"""Covariates of cells as one matrix."""

from __future__ import annotations

import pytest
import torch

from cellweave.nn import CovariateEncoder


def test_columns_are_one_hot_then_numbers():
    """Protects the order of columns: categories one after the other, then standardised numbers."""
    encoder = CovariateEncoder([2, 3], 1)
    assert encoder.n_covariates == 6
    encoder.standardize(torch.tensor([[1.0], [3.0]]))
    found = encoder(torch.tensor([[1, 0], [0, 2]]), torch.tensor([[3.0], [2.0]]))
    assert found.tolist() == [[0, 1, 1, 0, 0, 1], [1, 0, 0, 0, 1, 0]]


def test_numbers_have_mean_zero_and_spread_one():
    """Protects the scale of continuous covariates, of all sizes, with that of the training data for new ones."""
    values = torch.randn(500, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-4, 1.0, 1e5]) + 7.0
    encoder = CovariateEncoder([], 3)
    encoder.standardize(values)
    found = encoder(None, values)
    torch.testing.assert_close(found.mean(0), torch.zeros(3), atol=1e-2, rtol=0)
    torch.testing.assert_close(found.std(0, correction=0), torch.ones(3), atol=1e-2, rtol=0)
    torch.testing.assert_close(
        encoder(None, values[:1] + torch.tensor([0.0, 2.0, 0.0]))[0, 1] - found[0, 1], 2 / encoder.scale[1]
    )


@pytest.mark.parametrize("value", [0.0, 0.1, 1e6 + 0.1])
def test_constant_column_is_not_blown_up(value):
    """Protects new data: what did not vary has scale 1, although its mean in float32 is not exact."""
    encoder = CovariateEncoder([], 1)
    encoder.standardize(torch.full((1001, 1), value))
    assert encoder.scale.item() == 1
    torch.testing.assert_close(encoder(None, torch.tensor([[value + 3.0]])), torch.tensor([[3.0]]), atol=0.1, rtol=0)


def test_location_and_scale_are_saved():
    """Protects saved models: the standardisation is part of the weights."""
    encoder, other = CovariateEncoder([2], 1), CovariateEncoder([2], 1)
    encoder.standardize(torch.tensor([[10.0], [14.0]]))
    other.load_state_dict(encoder.state_dict())
    arguments = torch.tensor([[1]]), torch.tensor([[16.0]])
    assert other(*arguments).tolist() == encoder(*arguments).tolist() == [[0, 1, 2]]


def test_columns_must_fit():
    """Protects against covariates of another setup: too few columns, or an unknown category, are an error."""
    encoder = CovariateEncoder([2, 3])
    with pytest.raises(ValueError, match="zip"):
        encoder(torch.tensor([[0]]))
    with pytest.raises(RuntimeError):
        encoder(torch.tensor([[2, 0]]))
