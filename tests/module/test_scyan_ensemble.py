"""The ensemble of Scyan modules: members train as if alone, results are means."""

from __future__ import annotations

import pytest
import torch

from cellweave._keys import REGISTRY_KEYS
from cellweave.module import ScyanEnsemble, ScyanModule

RHO = torch.tensor([[1.0, -1, torch.nan, 1], [-1, 1, 1, torch.nan], [1, 1, -1, -1]])
SIZES = {"n_hidden": 5, "n_hidden_layers": 1, "n_layers": 4}


def _ensemble(n_members: int = 3, **options) -> ScyanEnsemble:
    torch.manual_seed(0)
    return ScyanEnsemble(n_members, RHO, **{**SIZES, **options})


def _x(n_cells: int = 9) -> torch.Tensor:
    return torch.randn(n_cells, 4, generator=torch.Generator().manual_seed(1))


def test_results_are_means_over_members():
    """Protects probabilities and latent markers of an ensemble."""
    ensemble, x = _ensemble(), _x()
    members = [m.annotate_cells(x) for m in ensemble]
    found = ensemble.annotate_cells(x)
    torch.testing.assert_close(found.probs, sum(a.probs for a in members) / 3)
    torch.testing.assert_close(found.log_density, sum(a.log_density for a in members) / 3)
    assert found.population.equal(found.probs.argmax(-1))
    torch.testing.assert_close(ensemble.latent(x), sum(m.latent(x) for m in ensemble) / 3)
    assert (members[0].probs - members[1].probs).abs().max() > 1e-3, "members differ"


@pytest.mark.parametrize("has_missing", [False, True])
@pytest.mark.parametrize("n_members", [1, 3])
def test_latent_markers_and_annotation_come_from_one_pass(n_members, has_missing, monkeypatch):
    """Protects diagnostics after training: both equal the separate results, and the flow is run once per network."""
    module = (
        _ensemble(has_missing=has_missing) if n_members > 1 else ScyanModule(RHO, **SIZES, has_missing=has_missing)
    ).eval()
    x, passes = _x(), []
    x[0, 1] = torch.nan if has_missing else x[0, 1]
    expected = module.latent(x), module.annotate_cells(x)
    infer = ScyanModule.inference
    monkeypatch.setattr(ScyanModule, "inference", lambda *args: (passes.append(1), infer(*args))[1])
    latent, annotation = module.read_cells(x)
    assert len(passes) == n_members
    torch.testing.assert_close((latent, *annotation), (expected[0], *expected[1]), rtol=0, atol=0)


@pytest.mark.parametrize("n_members", [1, 3])
def test_cells_are_moved_to_the_device_of_the_module(n_members):
    """Protects users with a GPU: cells on the CPU are read where the weights are."""
    module = (_ensemble() if n_members > 1 else ScyanModule(RHO, **SIZES)).eval().to("meta")
    assert module.device.type == "meta"
    assert module.inference(x=_x())["u"].device.type == "meta"


@pytest.mark.parametrize("tempered", [False, True])
def test_a_member_trains_as_it_would_alone(tempered):
    """Protects members from each other: three times the gradient of the mean is the gradient of a single module."""
    options = {"monotone_weight": 2.0, "weight_prior": 1.0, "temperature_period": 2}
    ensemble = _ensemble(**options).train()
    alone = ScyanModule(RHO, **SIZES, **options).train()
    alone.load_state_dict(ensemble.members[1].state_dict())
    for module in (ensemble, alone):
        module.start_epoch(int(tempered))
        module({REGISTRY_KEYS.X: _x()})[2].loss.backward()
    for (name, ours), theirs in zip(ensemble.members[1].named_parameters(), alone.parameters(), strict=True):
        if theirs.grad is None:
            assert tempered and name == "pi_logit" and ours.grad is None
        else:
            torch.testing.assert_close(3 * ours.grad, theirs.grad)


def test_terms_are_means():
    """Protects the history of an ensemble."""
    ensemble = _ensemble()
    output = ensemble({REGISTRY_KEYS.X: _x()})[2]
    alone = [m({REGISTRY_KEYS.X: _x()})[2] for m in ensemble]
    torch.testing.assert_close(output.loss, sum(o.loss for o in alone) / 3)
    for name, value in output.extra_metrics.items():
        torch.testing.assert_close(value, sum(o.extra_metrics[name] for o in alone) / 3)


def test_samples_come_from_all_members():
    """Protects drawn cells: the same seed gives the same cells, and every member contributes."""
    ensemble = _ensemble(identity_init=True)
    for i, member in enumerate(ensemble):
        member.prior.prior_std = 1e-3
        torch.nn.init.constant_(member.real_nvp.module_list[0].tfun[-1].bias, 10.0 * i)
    x, populations = ensemble.sample(400, generator=torch.Generator().manual_seed(0))
    again, _ = ensemble.sample(400, generator=torch.Generator().manual_seed(0))
    assert x.equal(again)
    assert len(populations) == 400
    shares = torch.stack([((x[:, 0] + 10 * i).abs() < 2).float().mean() for i in range(3)])
    assert (shares > 0.2).all()


def test_one_member_is_no_ensemble():
    """Protects against a wrapper around a single module."""
    with pytest.raises(ValueError, match="`n_members` must be at least 2, got 1"):
        _ensemble(1)
