"""The sliced-Wasserstein term: a distance between centred embeddings and a standard normal."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cellweave.objective import Objective, SlicedWasserstein, draw_slices, sliced_wasserstein
from cellweave.objective._sliced_wasserstein import Slices


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=_generator(seed))


def _distance(z, n_proj=200):
    return sliced_wasserstein(z, draw_slices(z, n_proj, generator=_generator(5))).item()


def test_value_is_the_formula_written_out():
    """Protects the definition: loops over contexts and directions with numpy's sort."""
    z = _normal(2, 9, 3)
    slices = draw_slices(z, 4, n_cells=6, generator=_generator(1))
    directions = slices.directions.numpy() / np.linalg.norm(slices.directions.numpy(), axis=1, keepdims=True)
    terms = []
    for context, prior in zip(z.numpy(), slices.prior.numpy(), strict=True):
        drawn = context[slices.cells.numpy()]
        for omega in directions:
            difference = np.sort((drawn - drawn.mean(0)) @ omega) - np.sort(prior @ omega)
            terms.append(np.mean(difference**2))
    assert sliced_wasserstein(z, slices).item() == pytest.approx(np.mean(terms), rel=1e-12)


def test_small_for_a_standard_normal_and_larger_for_other_scales():
    """Protects what the term is for: near zero at the prior (sampling error of 128 cells), growing with the scale."""
    z = _normal(8, 128, 6)
    at_prior = _distance(z)
    assert at_prior < 0.08
    # the distance of N(0, s^2) from N(0, 1) is (s - 1)^2 in every direction
    for scale in (3.0, 5.0):
        assert _distance(scale * z) == pytest.approx((scale - 1) ** 2, rel=0.15)
    assert _distance(0 * z) == pytest.approx(1, rel=0.1)


def test_centring_makes_it_shift_invariant():
    """Protects centring: moving all cells of a context by any vector changes nothing."""
    z = _normal(2, 40, 5)
    shift = 100 * _normal(2, 1, 5, seed=3)
    assert _distance(z + shift) == pytest.approx(_distance(z), rel=1e-9)


def test_cell_order_does_not_matter():
    """Protects sets: with all cells drawn, their order has no effect."""
    z = _normal(1, 20, 4)
    slices = draw_slices(z, 8, n_cells=20, generator=_generator())
    permuted = z[:, torch.randperm(20, generator=_generator(7))]
    torch.testing.assert_close(sliced_wasserstein(permuted, slices), sliced_wasserstein(z, slices))


def test_gradients():
    """Protects training: analytic and numerical gradients agree in float64."""
    z = _normal(2, 7, 3).requires_grad_()
    slices = draw_slices(z.detach(), 5, n_cells=6, generator=_generator(2))
    assert torch.autograd.gradcheck(lambda value: sliced_wasserstein(value, slices), (z,))


@pytest.mark.parametrize(("available", "lower", "upper"), [(300, 32, 128), (50, 32, 50), (10, 10, 10), (1, 1, 1)])
def test_number_of_drawn_cells(available, lower, upper):
    """Protects the published sub-sampling: 32 to 128 distinct cells, limited by the context."""
    z = torch.zeros(2, available, 3)
    numbers = set()
    for seed in range(40):
        slices = draw_slices(z, 2, generator=_generator(seed))
        numbers.add(len(slices.cells))
        assert len(slices.cells.unique()) == len(slices.cells)
        assert slices.prior.shape == (2, len(slices.cells), 3)
    assert lower <= min(numbers) <= max(numbers) <= upper
    assert len(numbers) > 1 or lower == upper


def test_draws_follow_the_generator():
    """Protects determinism: same generator, same draws; the dtype of the embeddings does not change them."""
    z = torch.zeros(2, 64, 3)
    first, second = (draw_slices(z, 4, generator=_generator(1)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    other = draw_slices(z, 4, generator=_generator(2))
    assert not torch.equal(first.directions, other.directions)
    torch.testing.assert_close(draw_slices(z.double(), 4, generator=_generator(1)).prior, first.prior.double())


def test_directions_of_any_length():
    """Protects the normalisation: scaled directions give the same value."""
    z = _normal(1, 12, 3)
    slices = draw_slices(z, 4, generator=_generator())
    longer = Slices(slices.cells, slices.prior, 7.5 * slices.directions)
    torch.testing.assert_close(sliced_wasserstein(z, longer), sliced_wasserstein(z, slices))


def test_objective_computes_bfloat16_embeddings_in_float32():
    """Protects mixed precision: sorting and squares run in float32."""
    value = SlicedWasserstein(n_proj=4)({"z": _normal(1, 40, 3).bfloat16()}, _generator())
    assert value.dtype == torch.float32
    assert torch.isfinite(value)


def test_objectives_say_what_they_need():
    """Protects composition: every objective names itself and its inputs, and shows its weight."""
    for objective in Objective.__subclasses__():
        assert objective.name.endswith("_loss")
        assert objective.requires
        assert repr(objective(weight=0.25)) == f"{objective.__name__}(weight=0.25)"
