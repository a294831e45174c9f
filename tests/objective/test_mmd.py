"""Losses of the cascaded flow: maximum mean discrepancy and errors of velocities."""

from __future__ import annotations

import pytest
import torch

from cellweave.objective import (
    ConditionalMMD,
    ExpressionVelocity,
    LatentVelocity,
    median_bandwidths,
    squared_distances,
    squared_mmd,
)


def _random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def test_gradient_is_that_of_finite_differences():
    """Protects training: the gradient agrees with finite differences, also where two cells coincide."""
    x, y = _random(4, 3), _random(5, 3, seed=1)
    x[1] = x[0]
    x[2] = y[0]
    sigmas = median_bandwidths(y)
    assert torch.autograd.gradcheck(lambda a: squared_mmd(a, y, sigmas), (x.requires_grad_(),))


def test_estimate_is_unbiased():
    """Protects the estimate: over many samples of one distribution the mean is zero within its error, with both signs."""
    values = torch.stack(
        [squared_mmd(_random(8, 2, seed=i), _random(6, 2, seed=1000 + i), torch.ones(1)) for i in range(300)]
    )
    assert values.mean().abs() < 3 * values.std() / 300**0.5
    assert (values < 0).any()
    assert squared_mmd(_random(50, 2), _random(50, 2, seed=1) + 2, torch.ones(1)) > 0.3


def test_distances_of_close_points_far_from_zero_keep_their_digits():
    """Protects kernels of similar cells: float32 products would lose a difference of 1e-3 beside values of 100."""
    x = 100 + _random(40, 30, dtype=torch.float32)
    y = x + 1e-3 * _random(40, 30, seed=1, dtype=torch.float32)
    exact = (x.double() - y.double()).square().sum(1)
    torch.testing.assert_close(squared_distances(x, y).diagonal(), exact, rtol=1e-6, atol=0)
    naive = torch.cdist(x, y, compute_mode="use_mm_for_euclid_dist").diagonal().square().double()
    assert ((naive - exact).abs() > 0.01 * exact).any()


def test_autocast_does_not_touch_the_kernels():
    """Protects training in bfloat16: the discrepancy of float32 cells is the same inside autocast."""
    x, y = _random(30, 20, dtype=torch.float32), _random(30, 20, seed=1, dtype=torch.float32)
    expected = squared_mmd(x, y, median_bandwidths(y))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(squared_mmd(x, y, median_bandwidths(y)), expected, rtol=0, atol=0)


def test_width_is_the_lower_median_and_never_zero():
    """Protects the scale of the kernel: of an even number of distances the lower one; equal cells still have one."""
    y = torch.tensor([[0.0], [1.0], [3.0], [7.0]])  # squared distances 1, 4, 9, 16, 36, 49
    torch.testing.assert_close(median_bandwidths(y, [1.0]), torch.tensor([3.0], dtype=torch.float64))
    assert torch.isfinite(squared_mmd(y, torch.zeros(4, 1), median_bandwidths(torch.zeros(4, 1))))


def _outputs(n=12):
    return {"end": _random(n, 3).requires_grad_(), "target": _random(n, 3, seed=1) + 1, "w_expr": torch.ones(n)}


def test_conditions_are_compared_apart():
    """Protects several conditions in a step: each with its own cells and width, weighted by its cells."""
    outputs, objective = _outputs(), ConditionalMMD()
    condition = torch.tensor([7] * 8 + [3] * 4)
    parts = [objective({k: v[rows] for k, v in outputs.items()}) for rows in (slice(0, 8), slice(8, 12))]
    expected = (8 * parts[0] + 4 * parts[1]) / 12
    torch.testing.assert_close(objective({**outputs, "condition": condition}), expected)
    assert not torch.allclose(objective(outputs), expected)


@pytest.mark.parametrize("n_used", [0, 1])
def test_too_few_cells_give_zero_not_nan(n_used):
    """Protects steps in which almost all cells teach the features: the term is 0 and has a gradient of 0."""
    outputs = _outputs()
    outputs["w_expr"] = (torch.arange(12) < n_used).double()
    value = ConditionalMMD()(outputs)
    value.backward()
    assert value == 0
    assert (outputs["end"].grad == 0).all()


def test_cells_without_weight_take_no_part():
    """Protects the discrepancy from cells whose end points mean nothing."""
    outputs = _outputs()
    outputs["w_expr"][5:] = 0
    expected = ConditionalMMD()({k: v[:5] for k, v in outputs.items()})
    torch.testing.assert_close(ConditionalMMD()(outputs), expected)


def _flow(n=6):
    w = (torch.arange(n) % 3 > 0).double()
    out = {"v_expr": _random(n, 4), "u_expr": _random(n, 4, seed=1), "w_expr": w, "n_cells": torch.tensor(float(n))}
    out |= {"v_latent": _random(n, 4, 2), "u_latent": _random(n, 4, 2, seed=1), "w_latent": 1 - w}
    return out


def test_losses_divide_by_all_cells_or_by_their_own():
    """Protects the published scale, where cells of weight zero count, and the option where they do not."""
    outputs = _flow()
    error = ((outputs["v_expr"] - outputs["u_expr"]).square().mean(1) * outputs["w_expr"]).sum()
    torch.testing.assert_close(ExpressionVelocity()(outputs), error / 6)
    torch.testing.assert_close(ExpressionVelocity(own_count=True)(outputs), error / 4)
    nobody = {**outputs, "w_expr": torch.zeros(6)}
    assert ExpressionVelocity(own_count=True)(nobody) == 0


def test_cells_that_do_not_teach_features_may_be_absent():
    """Protects the shortcut of the module: only the rows with weight are computed, the loss is the same."""
    outputs = _flow()
    rows = outputs["w_latent"] > 0
    few = {**outputs, **{k: outputs[k][rows] for k in ("v_latent", "u_latent", "w_latent")}}
    torch.testing.assert_close(LatentVelocity()(few), LatentVelocity()(outputs))


def test_genes_without_features_do_not_count():
    """Protects features that exist for some genes only: others neither add error nor dilute it."""
    outputs = _flow()
    keep = torch.tensor([True, False, True, True])
    few = {**outputs, **{k: outputs[k][:, keep] for k in ("v_latent", "u_latent")}}
    outputs["v_latent"][:, 1] = torch.nan
    torch.testing.assert_close(LatentVelocity()({**outputs, "has_latent": keep}), LatentVelocity()(few))
