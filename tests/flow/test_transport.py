"""Control cells moved to an expected mean and detection rate."""

from __future__ import annotations

import torch

from cellweave.flow import expected_transport, move_cells


def _cells(n_cells=4000, n_genes=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    depth = 1 + 0.2 * torch.randn(n_cells, 1, generator=generator)
    rate = torch.linspace(0.05, 0.95, n_genes)
    level = torch.linspace(0.8, 2.5, n_genes)
    on = torch.rand(n_cells, n_genes, generator=generator) < rate
    x = torch.where(on, level * depth.clamp(min=0.3), 0.0)
    draws = torch.rand(x.shape, generator=generator), torch.randn(x.shape, generator=generator)
    return x, draws


def _moved(x, shift, detection, draws):
    transport = expected_transport(x.mean(0), (x > 0).float().mean(0), shift, detection, torch.tensor(len(x)))
    return move_cells(x, transport, *draws)


def test_moved_cells_have_the_expected_mean_and_zeros():
    """Protects the point where flows start: right in the mean and in the share of zeros, where both are possible."""
    x, draws = _cells()
    mean, rate = x.mean(0), (x > 0).float().mean(0)
    detection = 0.2 * torch.linspace(1, -1, 12)
    wanted = (rate + detection).clamp(0.02, 0.98) * (mean / rate) * 1.1
    moved = _moved(x, wanted - mean, detection, draws)
    torch.testing.assert_close(moved.mean(0), wanted, rtol=0.06, atol=0.02)
    torch.testing.assert_close((moved > 0).float().mean(0), (rate + detection).clamp(0, 1), rtol=0.05, atol=0.03)


def test_without_an_expected_change_nothing_moves():
    """Protects null perturbations: cells that nothing happens to stay what they are, bit for bit."""
    x, draws = _cells(50)
    zero = torch.zeros(x.shape[1])
    torch.testing.assert_close(_moved(x, zero, zero, draws), x, rtol=0, atol=0)


def test_impossible_expectations_give_possible_cells():
    """Protects from negative expression and rates beyond one, which sums of effects predict."""
    x, draws = _cells()
    moved = _moved(x, -10 * torch.ones(12), torch.ones(12), draws)
    assert (moved == 0).all()
    moved = _moved(x, 1.5 * torch.ones(12), torch.ones(12), draws)
    assert torch.isfinite(moved).all()
    torch.testing.assert_close(moved.mean(0), x.mean(0) + 1.5, rtol=0.1, atol=0.1)


def test_a_gene_that_control_cells_never_express_can_begin():
    """Protects responses from nothing, such as interferon genes."""
    x, draws = _cells()
    x[:, 3] = 0
    shift, detection = torch.zeros(12), torch.zeros(12)
    shift[3], detection[3] = 0.9, 0.5
    moved = _moved(x, shift, detection, draws)
    torch.testing.assert_close(moved[:, 3].mean(), torch.tensor(0.9), rtol=0.1, atol=0.0)
    assert 0.45 < (moved[:, 3] > 0).float().mean() < 0.55
    torch.testing.assert_close(moved[:, 4:], x[:, 4:], rtol=0, atol=0)


def test_a_cell_moves_alike_in_any_company():
    """Protects samples from depending on the batch: nothing is averaged over the cells that are moved together."""
    x, (uniform, normal) = _cells(40)
    shift, detection = 0.3 * torch.ones(12), 0.1 * torch.ones(12)
    transport = expected_transport(x.mean(0), (x > 0).float().mean(0), shift, detection, torch.tensor(40))
    together = move_cells(x, transport, uniform, normal)
    torch.testing.assert_close(move_cells(x[7:9], transport, uniform[7:9], normal[7:9]), together[7:9], rtol=0, atol=0)
