"""Markers that were not measured in some cells: they are integrated out."""

from __future__ import annotations

import pytest
import torch

from cellweave._keys import REGISTRY_KEYS
from cellweave.module import ScyanModule
from cellweave.objective import PopulationPrior

RHO = torch.tensor([[1.0, -1, torch.nan, 1], [-1, 1, 1, torch.nan], [1, 1, -1, -1]], dtype=torch.float64)


def _module(**options) -> ScyanModule:
    torch.manual_seed(0)
    sizes = {"n_hidden": 5, "n_hidden_layers": 1, "n_layers": 5, "has_missing": True}
    return ScyanModule(RHO, **{**sizes, **options}).double()


def _cells(n_cells: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Cells ``(cell, marker)`` of which some lack markers, and what they would be in full."""
    full = torch.randn(n_cells, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    missing = torch.rand(n_cells, 4, generator=torch.Generator().manual_seed(2)) < 0.4
    missing[0], missing[1] = False, torch.tensor([False, False, True, False])
    return torch.where(missing, torch.nan, full), full


@pytest.mark.parametrize("dropped", range(4))
def test_the_density_is_that_of_a_table_without_the_marker(dropped):
    """Protects the integral over a missing marker: known, unknown and graded entries alike."""
    kept = [m for m in range(4) if m != dropped]
    u = torch.randn(7, 4, dtype=torch.float64) * 2
    measured = torch.ones(7, 4, dtype=torch.bool)
    measured[:, dropped], u[:, dropped] = False, 0
    continuum = torch.tensor([False, True, False, False])
    found = PopulationPrior(RHO, 0.3, continuum).double().log_prob(u, measured).total()
    expected = PopulationPrior(RHO[:, kept], 0.3, continuum[kept]).double().log_prob(u[:, kept]).total()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_complete_cells_are_as_in_a_model_without_missing_markers():
    """Protects data in which only some cells lack markers: the others must not notice."""
    x, _ = _cells()
    with_mask, without = _module(), _module(has_missing=False)
    complete = ~x.isnan().any(1)
    assert complete.any() and not complete.all()
    found, expected = with_mask.annotate_cells(x), without.annotate_cells(x[complete])
    torch.testing.assert_close(found.probs[complete], expected.probs)
    torch.testing.assert_close(found.log_density[complete], expected.log_density)
    torch.testing.assert_close(with_mask.latent(x)[complete], without.latent(x[complete]))


def test_missing_markers_are_expected_from_the_populations():
    """Protects the embedding, which must hold no NaN: the mean of the modes, weighted by the posterior."""
    x, _ = _cells()
    module = _module()
    u, probs = module.latent(x), module.annotate_cells(x).probs
    expected = probs @ RHO.nan_to_num(0)
    torch.testing.assert_close(u[x.isnan()], expected[x.isnan()])
    assert u.isfinite().all()


def test_the_loss_is_finite_and_its_gradient_checked():
    """Protects training: NaN in a cell must not reach a gradient, with every term of the loss on."""
    x, _ = _cells()
    module = _module(monotone_weight=2.0, weight_prior=1.0).train()
    parameters = [p for p in module.parameters() if p.requires_grad]

    def loss(*_) -> torch.Tensor:
        return module({REGISTRY_KEYS.X: x})[2].loss

    assert torch.isfinite(loss())
    assert torch.autograd.gradcheck(loss, (parameters[0], parameters[-1], module.pi_logit), atol=1e-6)


def test_missing_markers_stay_missing_when_covariates_change():
    """Protects batch correction: measured markers come back through the inverse, missing ones stay at 0."""
    x, _ = _cells()
    module = _module(n_covariates=1)
    covariates = torch.zeros(len(x), 1, dtype=torch.float64)
    back = module.change_covariates(x, covariates, covariates)
    torch.testing.assert_close(back, x.nan_to_num(0.0), rtol=1e-10, atol=1e-10)
    moved = module.change_covariates(x, covariates, covariates + 0.01)
    assert (moved[x.isnan()] == 0).all()
    assert (moved - back)[~x.isnan()].abs().max() > 1e-3
