"""Numerical parity of the Scyan module with the published original (fixture ``scyan_core``).

Reference numbers are float64; names that end in ``__orig32`` are what the original returned in float32. The third case,
with the settings of the article, is three quarters of the fixture and is read where the shared numbers are present.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from cellweave._keys import REGISTRY_KEYS
from cellweave.module import ScyanModule
from cellweave.objective import PopulationPrior, mixture_log_likelihood

FOLDER = Path(__file__).parent / "fixtures"
CASES = json.loads((FOLDER / "scyan_core.json").read_text())["cases"]
DTYPES = {"f32": torch.float32, "f64": torch.float64}

pytestmark = pytest.mark.parity
every_case = pytest.mark.parametrize("case", CASES)
every_precision = pytest.mark.parametrize("precision", DTYPES)


class Case(NamedTuple):
    """One case of the fixture in one precision."""

    module: ScyanModule
    arrays: dict[str, np.ndarray]
    tensors: dict[str, torch.Tensor]

    def input(self, name: str) -> torch.Tensor:
        return torch.tensor(self.arrays[name], dtype=self.module.pi_logit.dtype)


def _arrays(case: str) -> dict[str, np.ndarray]:
    file = FOLDER / "scyan_core.npz"
    if case == "paper_bmmc_like":
        file = Path(os.environ.get("CELLWEAVE_DATA", "shared/data")).parent / "parity" / "scyan_core.npz"
        if not file.exists():
            pytest.skip(f"{file} not found; set CELLWEAVE_DATA to the data folder of the shared numbers")
    with np.load(file) as arrays:
        return {name.removeprefix(f"{case}/"): arrays[name] for name in arrays.files if name.startswith(f"{case}/")}


def _case(case: str, precision: str) -> Case:
    """The module with the weights of the case, loaded by their published names."""
    arrays, settings = _arrays(case), CASES[case]
    module = ScyanModule(
        torch.tensor(arrays["rho"]),
        n_covariates=settings["C"],
        continuum=torch.tensor(arrays["continuum"]),
        n_hidden=settings["hidden_size"],
        n_hidden_layers=settings["n_hidden_layers"],
        n_layers=settings["n_layers"],
        prior_std=settings["prior_std"],
        temperature=settings["temperature"],
    )
    weights = {k.removeprefix("param/"): torch.tensor(v) for k, v in arrays.items() if k.startswith("param/")}
    weights["pi_logit"] = torch.tensor(arrays["pi_logit"])
    assert {k: v.shape for k, v in module.named_parameters()} == {k: v.shape for k, v in weights.items()}
    module.load_state_dict({**module.state_dict(), **weights}, strict=True)
    module.to(DTYPES[precision]).eval()
    x, covariates = (torch.tensor(arrays[k], dtype=DTYPES[precision]) for k in ("x", "covariates"))
    return Case(module, arrays, {REGISTRY_KEYS.X: x, REGISTRY_KEYS.COVARIATES: covariates})


def _assert_close(actual: torch.Tensor, expected: np.ndarray, precision: str) -> None:
    """1e-5 in float32 and 1e-10 in float64, relative; the absolute part is the same share of the largest value."""
    tolerance = 1e-5 if precision == "f32" else 1e-10
    expected = torch.tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual.detach(), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


def _multiply_weights_as_the_reference(case: Case) -> None:
    """Round 100 times the logits of the population weights to float32: so did the reference, except with temperature."""
    product = torch.tensor(np.float32(100) * case.arrays["pi_logit"])
    case.module.pi_logit.data = product.to(case.module.pi_logit.dtype) / 100


def _latent(case: Case) -> torch.Tensor:
    return case.module.inference(*(case.tensors[k] for k in (REGISTRY_KEYS.X, REGISTRY_KEYS.COVARIATES)))["u"]


@every_case
@every_precision
def test_latent_cells_and_log_determinants(case, precision):
    """Protects the flow: masks, networks, factor on covariates, order of the layers."""
    module, arrays, tensors = _case(case, precision)
    outputs = module.inference(tensors[REGISTRY_KEYS.X], tensors[REGISTRY_KEYS.COVARIATES])
    _assert_close(outputs["u"], arrays["u"], precision)
    _assert_close(outputs["log_det"], arrays["logdet"], precision)


@every_case
def test_inverse(case):
    """Protects the inverse in float64; the weights of the fixture are too strong for a float32 round trip."""
    module, arrays, tensors = _case(case, "f64")
    u, covariates = torch.tensor(arrays["u"]), tensors[REGISTRY_KEYS.COVARIATES]
    _assert_close(module.to_expression(u, covariates), arrays["x_roundtrip"], "f64")
    _assert_close(module.to_expression(u, covariates), arrays["x"], "f64")


@every_case
def test_inverse_in_float32(case):
    """Protects the inverse in float32: no worse than the original, whose own round trip is off by about a hundredth."""
    module, arrays, tensors = _case(case, "f32")
    x, covariates = tensors[REGISTRY_KEYS.X], tensors[REGISTRY_KEYS.COVARIATES]
    original = np.abs(arrays["x_roundtrip__orig32"] - arrays["x"]).max().item()
    with torch.no_grad():
        back = module.to_expression(module.to_latent(x, covariates)[0], covariates)
    assert (back - x).abs().max().item() < 2 * original


@every_case
@every_precision
def test_prior(case, precision):
    """Protects the prior: whole cells and single markers, continuum markers, unknown entries and their constant."""
    case_ = _case(case, precision)
    prior, arrays, u = case_.module.prior, case_.arrays, case_.input("u")
    _assert_close(prior.log_prob(u).total(), arrays["prior_log_prob"], precision)
    _assert_close(prior.log_prob_per_marker(u[:8]), arrays["prior_log_prob_per_marker"], precision)
    _assert_close(prior.modes, arrays["modes"], precision)
    _assert_close(prior.log_gamma * prior.rho_mask.sum(-1).to(u), arrays["na_constant_term"], precision)
    assert prior.radius == pytest.approx(arrays["radius"].item(), rel=1e-12)
    assert np.exp(prior.log_gamma) == pytest.approx(arrays["gamma"].item(), rel=1e-12)


@pytest.mark.parametrize("std", [0.2, 0.3, 0.35])
@every_precision
def test_prior_on_the_edges_of_the_flat_part(std, precision):
    """Protects the corners of the density of an unknown entry, at hand-made points."""
    arrays = _arrays("prior_grid")
    table, u = (torch.tensor(arrays[k], dtype=DTYPES[precision]) for k in ("rho", "u"))
    _assert_close(PopulationPrior(table, std).log_prob(u).total(), arrays[f"std{std}/log_prob"], precision)
    _assert_close(PopulationPrior(table, std).log_prob_per_marker(u).sum(-1), arrays[f"std{std}/log_prob"], precision)


@every_case
@every_precision
def test_population_weights_and_mixture(case, precision):
    """Protects the population weights, plain and with temperature, and the likelihoods made of them."""
    case_ = _case(case, precision)
    module, arrays, log_prob = case_.module, case_.arrays, case_.module.prior.log_prob(case_.input("u"))
    for tempered, suffix in ((True, "_temperature"), (False, "")):
        if not tempered:
            _multiply_weights_as_the_reference(case_)
        log_pi = module.log_pi(tempered)
        _assert_close(log_pi, arrays[f"log_pi{suffix}"], precision)
        _assert_close(log_prob.total() + log_pi, arrays[f"log_probs{suffix}"], precision)
        mixture = mixture_log_likelihood(log_prob, log_pi) + case_.input("logdet")
        _assert_close(-mixture.mean(), arrays[f"kl{suffix}"], precision)


@every_case
@every_precision
def test_losses_from_measured_cells(case, precision):
    """Protects the whole chain: the loss of evaluation, and the loss of training steps with temperature."""
    module, arrays, tensors = _case(case, precision)
    _assert_close(module(tensors)[2].loss, arrays["kl"], precision)
    module.tempered = True
    _assert_close(module(tensors)[2].loss, arrays["kl"], precision)
    _assert_close(module.train()(tensors)[2].loss, arrays["kl_temperature"], precision)


@every_case
@every_precision
def test_annotation(case, precision):
    """Protects labels, posteriors and the density that says none of these."""
    case_ = _case(case, precision)
    _multiply_weights_as_the_reference(case_)
    arrays, found = case_.arrays, case_.module.annotate(case_.input("u"))
    _assert_close(found.probs, arrays["probs"], precision)
    assert found.population.tolist() == arrays["argmax"].tolist()
    _assert_close(found.log_joint, arrays["max_log_prob"], precision)
    _assert_close(found.log_density, arrays["max_log_prob_u"], precision)
    from_cells = case_.module.annotate(_latent(case_)).population
    assert from_cells.tolist() == arrays["argmax"].tolist()


@every_precision
def test_cells_under_other_covariates(precision):
    """Protects batch correction: cells as they would look with the covariates of the first one."""
    case_ = _case("cov_continuum", precision)
    covariates = case_.tensors[REGISTRY_KEYS.COVARIATES]
    corrected = case_.module.to_expression(case_.input("u"), covariates[:1].expand_as(covariates))
    # strong weights: in float32 the flow there and back keeps about four digits, the original as well
    rtol = 1e-10 if precision == "f64" else 2e-3
    expected = case_.input("corrected_to_row0")
    torch.testing.assert_close(corrected, expected, rtol=rtol, atol=rtol * expected.abs().max().item())


@every_case
@every_precision
def test_sampling_with_the_draws_of_the_fixture(case, precision):
    """Protects sampling: latent cells from given draws, and the measured cells that follow from them.

    The original draws continuum markers around the table's value and reads them at a fifth of it; here both are a fifth,
    and the difference is added by hand.
    """
    case_ = _case(case, precision)
    prior, z = case_.module.prior, torch.tensor(case_.arrays["sample_z"])
    # the fixture holds the normal draws after multiplication with the standard deviation
    u = prior.latent_cells(z, case_.input("sample_uniform"), case_.input("sample_normal") / prior.prior_std)
    _assert_close(u + (prior.rho - prior.modes)[z], case_.arrays["sample_u"], precision)
    x = case_.module.to_expression(case_.input("sample_u"), case_.input("sample_covariates"))
    _assert_close(x, case_.arrays["sample_x"], precision)


@every_case
def test_gradients_and_three_training_steps(case):
    """Protects training: first gradients, then Adam plain, with temperature (the weights pi must rest) and plain.

    Gradients of the first layer pass through all layers in float32; the original's own are off by 2e-5 of the largest.
    """
    module, arrays, tensors = _case(case, "f32")
    optimiser = torch.optim.Adam(module.parameters(), lr=5e-4)
    losses, gradients = [], []
    module.train()
    for tempered in (False, True, False):
        module.tempered = tempered
        optimiser.zero_grad()
        loss = module(tensors)[2].loss
        loss.backward()
        gradients.append((module.pi_logit.grad, module.real_nvp.module_list[0].sfun[0].weight.grad))
        optimiser.step()
        losses.append(loss)
    pi, first_layer = gradients[0]
    _assert_close(pi, arrays["grad_pi_logit__orig32"], "f32")
    expected = torch.tensor(arrays["grad_s0_first__orig32"])
    torch.testing.assert_close(first_layer, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert gradients[1][0] is None
    _assert_close(torch.stack(losses), arrays["train3_losses__orig32"], "f32")
    _assert_close(module.pi_logit, arrays["train3_pi_logit__orig32"], "f32")
    _assert_close(module.real_nvp.module_list[-1].tfun[-1].bias, arrays["train3_t_last_bias__orig32"], "f32")
    _assert_close(module.eval()(tensors)[2].loss, arrays["train3_final_kl__orig32"], "f32")
