"""The guard that keeps latent markers rising with the measured ones."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from scipy.stats import spearmanr

from cellweave.module import ScyanModule
from cellweave.objective import MarkerMonotonicity, Objective, marker_discordance

sys.path.append(str(Path(__file__).parents[1] / "model"))
from scyan_data import flipped_marker_data


def _normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_value_is_the_formula_written_out():
    """Protects the definition: neighbours in the batch, the first after the last, summed with plain loops."""
    x, u = _normal(7, 3), _normal(7, 3, seed=1)
    for marker, found in enumerate(marker_discordance(x, u).tolist()):
        products = [float((x[i, marker] - x[i - 1, marker]) * (u[i, marker] - u[i - 1, marker])) for i in range(7)]
        expected = sum(-p for p in products if p < 0) / sum(abs(p) for p in products)
        assert found == pytest.approx(expected, rel=1e-12)


def test_zero_for_any_rising_curve_one_for_falling_and_half_for_noise():
    """Protects what is asked of the flow: order, not shape."""
    x = _normal(4000, 4)
    u = torch.stack([x[:, 0].exp(), x[:, 1] ** 3 - 5, -2 * x[:, 2], _normal(4000, seed=3)], 1)
    found = marker_discordance(x, u)
    assert found[:3].tolist() == [0, 0, 1]
    assert found[3].item() == pytest.approx(0.5, abs=0.05)


def test_scale_and_offset_of_either_side_do_not_matter():
    """Protects one weight for all panels: units of a marker change nothing."""
    x, u = _normal(50, 3), _normal(50, 3, seed=1)
    scale, offset = torch.tensor([1e-3, 4.0, 2e3]), torch.tensor([3.0, -1.0, 7.0])
    assert torch.allclose(marker_discordance(scale * x + offset, u / scale), marker_discordance(x, u), rtol=1e-9)


def test_gradient_turns_a_flipped_marker_back_and_leaves_rising_ones_alone():
    """Protects training: going down the gradient ends with a rising marker; a marker that rises feels nothing."""
    x, slope = _normal(200, 2), torch.tensor([-0.3, 0.5], dtype=torch.float64, requires_grad=True)
    noise = 0.1 * _normal(200, 2, seed=4) * torch.tensor([1.0, 0.0])
    for _ in range(60):
        (gradient,) = torch.autograd.grad(marker_discordance(x, slope * x + noise).sum(), slope)
        assert gradient[1] == 0
        slope = (slope - 0.1 * gradient).detach().requires_grad_()
    assert slope[0] > 0
    assert slope[1] == 0.5


def test_unmeasured_values_and_filled_up_rows_have_no_part():
    """Protects missing markers: value and gradient are those of the cells that were measured, and stay finite."""
    x, u = _normal(6, 2), _normal(6, 2, seed=1).requires_grad_()
    x[0, 1] = float("nan")  # leaves out the pairs (5, 0) and (0, 1) of the second marker
    valid = torch.tensor([1, 1, 1, 1, 1, 0]).bool()  # and row 5 the pairs (4, 5) and (5, 0) of both
    found = marker_discordance(x, u, valid)
    for marker, pairs in enumerate([[(1, 0), (2, 1), (3, 2), (4, 3)], [(2, 1), (3, 2), (4, 3)]]):
        products = torch.stack([(x[i, marker] - x[j, marker]) * (u[i, marker] - u[j, marker]) for i, j in pairs])
        assert torch.isclose(found[marker], products.neg().relu().sum() / products.abs().sum())
    found.sum().backward()
    assert u.grad.isfinite().all()
    assert (u.grad[5] == 0).all()
    assert u.grad[0, 1] == 0


@pytest.mark.parametrize("x", [torch.full((4, 1), float("nan")), torch.ones(4, 1), torch.ones(1, 1)])
def test_nothing_to_compare_costs_nothing(x):
    """Protects empty cases: a marker never measured, without variation, or a single cell gives 0, not NaN."""
    u = torch.randn(x.shape, requires_grad=True)
    value = marker_discordance(x, u).sum()
    value.backward()
    assert value == 0
    assert (u.grad == 0).all()


def test_cells_of_different_batches_are_not_compared():
    """Protects batch alignment: a flow may move whole batches against each other."""
    x, batch = _normal(60, 1), torch.arange(60) % 2
    shift = torch.where(batch == 0, 10.0, -10.0)[:, None]
    measured, latent = x + shift, x - shift
    assert marker_discordance(measured, latent).item() > 0.5
    assert marker_discordance(measured, latent, batch=batch) == 0
    falling = torch.where(batch[:, None] == 1, -latent, latent)  # in one batch
    assert marker_discordance(measured, falling, batch=batch).item() > 0.2


def test_objective_sums_over_markers_and_reads_batches_where_there_are_any():
    """Protects the wiring: name, required outputs, sum over markers, the optional batch."""
    objective = MarkerMonotonicity(30.0)
    outputs = {"x": _normal(40, 3), "u": _normal(40, 3, seed=1), "valid": torch.ones(40).bool()}
    assert isinstance(objective, Objective)
    assert objective.weight == 30
    assert set(outputs) == MarkerMonotonicity.requires
    assert objective(outputs) == marker_discordance(outputs["x"], outputs["u"]).sum()
    outputs["batch"] = torch.arange(40) % 3
    assert objective(outputs) == marker_discordance(outputs["x"], outputs["u"], batch=outputs["batch"]).sum()


def _train(weight: float) -> tuple[float, float]:
    """Published network, start and learning rate: share of the dominant population called its sibling, Spearman."""
    x, table, labels = flipped_marker_data(0, 3000)
    x = torch.tensor(x.to_numpy())
    torch.manual_seed(2)
    module = ScyanModule(torch.tensor(table.to_numpy(), dtype=torch.float32))
    adam = torch.optim.Adam(module.parameters(), 5e-4)
    for epoch in range(24):
        for cells in torch.randperm(len(x)).split(256):
            u, log_det = module.to_latent(x[cells])
            log_prob = module.prior.log_prob(u)
            mixture = log_prob.common + torch.logsumexp(log_prob.contrast + module.log_pi(epoch % 3 > 0), -1)
            loss = -(mixture + log_det).mean() + weight * marker_discordance(x[cells], u).sum()
            adam.zero_grad()
            loss.backward()
            adam.step()
    u = module.to_latent(x)[0].detach()
    dominant = torch.tensor(labels == "CD4 naive")
    wrong = module.annotate(u).population[dominant] == list(table.index).index("CD4 effector")
    return float(wrong.double().mean()), spearmanr(x[:, -1], u[:, -1]).statistic


def test_flipped_marker_is_reproduced_and_prevented():
    """Protects the guard: without it the flow lowers CCR7 of the largest population, which becomes its rare sibling."""
    wrong, correlation = _train(weight=0.0)
    assert wrong > 0.9
    assert correlation < 0.5
    wrong, correlation = _train(weight=100.0)
    assert wrong < 0.05
    assert correlation > 0.9
