"""The Scyan module: loss terms, population weights and temperature, annotation, sampling, covariates."""

from __future__ import annotations

import math

import pytest
import torch

from cellweave._keys import LOADER_KEYS, REGISTRY_KEYS, STEP_KEYS
from cellweave.module import ScyanModule
from cellweave.objective import mixture_log_likelihood

NA = math.nan
TABLE = [[1.0, -1.0, NA, 1.0], [-1.0, 1.0, -1.0, NA], [-1.0, -1.0, 1.0, 1.0]]
N_CELLS, N_COVARIATES = 8, 2


def _module(dtype=torch.float64, **options) -> ScyanModule:
    torch.manual_seed(0)
    arguments = {"n_covariates": N_COVARIATES, "n_hidden": 5, "n_hidden_layers": 1, "n_layers": 3, **options}
    module = ScyanModule(torch.tensor(TABLE), covariate_scale=arguments.pop("covariate_scale", 1.0), **arguments)
    with torch.no_grad():
        module.pi_logit.copy_(torch.tensor([0.01, 0.0, -0.01]))
    return module.to(dtype).eval()


def _tensors(dtype=torch.float64, n_cells=N_CELLS, **extra):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n_cells, 4, dtype=dtype, generator=generator)
    covariates = torch.randn(n_cells, N_COVARIATES, dtype=dtype, generator=generator)
    return {REGISTRY_KEYS.X: x, REGISTRY_KEYS.COVARIATES: covariates, **extra}


# ---------------------------------------------------------------- the loss


def test_loss_is_the_negative_log_likelihood_and_its_terms_are_reported():
    """Protects the loss: likelihood of the mixture plus log-determinant, each term under its own name."""
    module, tensors = _module(), _tensors()
    inference, generative, output = module(tensors)
    mixture = mixture_log_likelihood(module.prior.log_prob(inference["u"]), module.log_pi())
    torch.testing.assert_close(output.loss, -(mixture + inference["log_det"]).mean())
    assert set(output.extra_metrics) == {"prior_loss", "log_det_loss", "pi_entropy"}
    torch.testing.assert_close(output.extra_metrics["prior_loss"], -mixture.mean())
    torch.testing.assert_close(output.extra_metrics["log_det_loss"], -inference["log_det"].mean())
    weights = module.population_weights
    torch.testing.assert_close(output.extra_metrics["pi_entropy"], -(weights * weights.log()).sum())
    assert output.n_obs_minibatch == N_CELLS
    assert set(generative) == {"log_prob_common", "log_prob_contrast"}


def test_gradients_are_those_of_finite_differences():
    """Protects training: derivative of the loss after every parameter, population weights included."""
    module, tensors = _module(), _tensors(n_cells=3)
    names, values = zip(*module.named_parameters(), strict=True)

    def loss(*values):
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (tensors,))[2].loss

    assert torch.autograd.gradcheck(loss, values)


def test_filling_cells_count_for_nothing():
    """Protects padded batches: loss and gradients are those of the valid cells alone."""
    results = []
    valid = torch.arange(N_CELLS) < 5
    filled = _tensors(**{LOADER_KEYS.VALID: valid, LOADER_KEYS.N_VALID: 5})
    alone = {k: v[:5] for k, v in _tensors().items()}
    for tensors in (filled, alone):
        module = _module()
        output = module(tensors)[2]
        output.loss.backward()
        results.append((output, [p.grad for p in module.parameters()]))
    torch.testing.assert_close(results[0][0].loss, results[1][0].loss)
    torch.testing.assert_close(results[0][1], results[1][1])
    assert results[0][0].n_obs_minibatch == results[1][0].n_obs_minibatch == 5


def test_shares_of_processes_average_to_the_loss_of_one():
    """Protects several devices: processes with unequal numbers of cells give the loss of the whole step."""
    module, tensors = _module(), _tensors()
    shares = []
    for part in (slice(0, 6), slice(6, 8)):
        share = {k: v[part] for k, v in tensors.items()}
        shares.append(module({**share, STEP_KEYS.CELLS_PER_PROCESS: torch.tensor(4.0)})[2].loss)
    torch.testing.assert_close(torch.stack(shares).mean(), module(tensors)[2].loss)


def test_steps_of_training_lower_the_loss():
    """Protects the chain as a whole: thirty steps of Adam make the cells more likely."""
    module, tensors = _module(torch.float32), _tensors(torch.float32)
    before = module(tensors)[2].loss.item()
    optimiser = torch.optim.Adam(module.parameters(), lr=1e-2)
    for _ in range(30):
        optimiser.zero_grad()
        module(tensors)[2].loss.backward()
        optimiser.step()
    assert module(tensors)[2].loss.item() < before - 1


# ---------------------------------------------------------------- population weights


def test_temperature_turns_the_weights_around():
    """Protects the temperature: weights to the power -1/T, plain weights otherwise."""
    module = _module(temperature=0.5)
    weights = module.population_weights
    torch.testing.assert_close(weights, torch.softmax(torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64), 0))
    torch.testing.assert_close(module.log_pi(tempered=True).exp(), weights**-2 / (weights**-2).sum())
    assert not weights.requires_grad


def test_temperature_acts_in_training_steps_only_and_rests_the_weights():
    """Protects the schedule: evaluation never sees it, and the weights get no gradient, not even zero."""
    module, tensors = _module(), _tensors()
    plain = module(tensors)[2].loss
    module.tempered = True
    torch.testing.assert_close(module(tensors)[2].loss, plain)
    loss = module.train()(tensors)[2].loss
    assert abs(loss.item() - plain.item()) > 1e-3
    loss.backward()
    assert module.pi_logit.grad is None
    assert all(p.grad is not None for name, p in module.named_parameters() if name != "pi_logit")


# ---------------------------------------------------------------- reading cells


def test_expression_and_latent_markers_are_inverse_to_each_other():
    """Protects the round trip, with covariates: the same give the cell back, others change it."""
    module, tensors = _module(), _tensors()
    x, covariates = tensors[REGISTRY_KEYS.X], tensors[REGISTRY_KEYS.COVARIATES]
    u, _ = module.to_latent(x, covariates)
    torch.testing.assert_close(module.to_expression(u, covariates), x, rtol=1e-10, atol=1e-10)
    assert (module.to_expression(u, covariates + 1) - x).abs().max() > 1e-2


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_sparse_cells_are_dense_cells():
    """Protects loaders that hand over sparse rows."""
    module, tensors = _module(), _tensors()
    x, covariates = tensors[REGISTRY_KEYS.X].clamp(min=0), tensors[REGISTRY_KEYS.COVARIATES]
    torch.testing.assert_close(module.inference(x.to_sparse_csr(), covariates), module.inference(x, covariates))


def test_annotation_is_the_posterior_of_the_mixture():
    """Protects labels: probabilities from the plain weights, joint and density of the winner, first of equals."""
    module = _module()
    module.tempered = True  # must not matter here
    u = _tensors()[REGISTRY_KEYS.X]
    found = module.train().annotate(u)
    joint = (module.prior.log_prob(u).total() + module.log_pi()).detach()
    torch.testing.assert_close(found.probs, joint.softmax(-1))
    assert torch.equal(found.population, joint.argmax(-1))
    torch.testing.assert_close(found.log_joint, joint.max(-1).values)
    density = module.prior.log_prob(u).total().gather(-1, found.population[:, None])[:, 0]
    torch.testing.assert_close(found.log_density, density)
    twins = ScyanModule(torch.tensor([TABLE[0], TABLE[0]]))
    assert not twins.annotate(u.float()).population.any()


@pytest.mark.parametrize("size", [1e6, 1e15])
def test_extreme_cells_stay_finite(size):
    """Protects float32 against unscaled data: loss, gradients and annotation are numbers."""
    module, tensors = _module(torch.float32), _tensors(torch.float32)
    tensors[REGISTRY_KEYS.X] *= size
    inference, _, output = module(tensors)
    output.loss.backward()
    assert torch.isfinite(output.loss) and all(torch.isfinite(p.grad).all() for p in module.parameters())
    assert all(torch.isfinite(part).all() for part in module.annotate(inference["u"].detach()))


@pytest.mark.parametrize("n_markers", [1, 2])
def test_very_few_markers(n_markers):
    """Protects the smallest tables: one population, one or two markers, no covariates."""
    module = ScyanModule(torch.ones(1, n_markers))
    x, _ = module.sample(5)
    inference, _, output = module({REGISTRY_KEYS.X: x})
    torch.testing.assert_close(module.to_expression(inference["u"]), x)
    assert torch.isfinite(output.loss) and torch.equal(module.population_weights, torch.ones(1))


def test_weights_carry_the_whole_state():
    """Protects saved models: weights and table come back, so that another module gives the same numbers."""
    module, other = _module(), ScyanModule(torch.zeros(3, 4), N_COVARIATES, None, 5, 1, 3, covariate_scale=1.0).double()
    other.load_state_dict(module.state_dict())
    torch.testing.assert_close(other(_tensors())[2].loss, module(_tensors())[2].loss, rtol=0, atol=0)


# ---------------------------------------------------------------- sampling


def test_sampled_populations_follow_the_weights_and_markers_the_table():
    """Protects sampling: shares of the populations, and the mean of every known latent marker."""
    module, n = _module(), 3000
    covariates = torch.ones(n, N_COVARIATES, dtype=torch.float64)
    x, populations = module.sample(n, covariates, generator=torch.Generator().manual_seed(0))
    weights = module.population_weights
    shares = populations.bincount(minlength=3) / n
    assert ((shares - weights).abs() < 4 * (weights * (1 - weights) / n).sqrt()).all()
    u, _ = module.to_latent(x, covariates)
    for z in range(3):
        cells, known = u[populations == z].detach(), ~module.prior.rho_mask[z]
        error = (cells.mean(0) - module.prior.rho[z])[known].abs()
        assert (error < 5 * 0.3 / len(cells) ** 0.5).all()
        torch.testing.assert_close(cells.std(0)[known], torch.full_like(error, 0.3), rtol=0.15, atol=0)


def test_samples_come_from_the_generator():
    """Protects the random state of the user: one generator per call fixes everything, the global one is not touched."""
    module, covariates = _module(), torch.zeros(6, N_COVARIATES)
    state = torch.get_rng_state()
    draws = [module.sample(6, covariates, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0][0], draws[1][0]) and torch.equal(draws[0][1], draws[1][1])
    assert not torch.equal(draws[0][0], draws[2][0])
    assert torch.equal(torch.get_rng_state(), state)


def test_chosen_populations_are_sampled():
    """Protects sampling of one population: the cells are of the populations asked for, in this order."""
    chosen = torch.tensor([2, 0, 0, 1])
    module = _module(n_covariates=0, prior_std=0.05, identity_init=True)
    x, populations = module.sample(4, populations=chosen)
    assert torch.equal(populations, chosen)
    assert torch.equal(module.annotate(x).population, chosen)


@pytest.mark.parametrize(
    ("populations", "message"),
    [
        (torch.tensor([0, 1]), r"one population for each of the 3 samples, got shape \(2,\)"),
        (torch.tensor([0, 3, -1]), "2 numbers outside 0 to 2, the first is 3 at position 1"),
    ],
)
def test_populations_that_do_not_exist_are_refused(populations, message):
    """Protects the user: a negative number would silently mean the last population."""
    with pytest.raises(ValueError, match=message):
        _module(n_covariates=0).sample(3, populations=populations)


def test_samples_need_the_covariates_of_the_module():
    """Protects the user: the missing covariates are named."""
    with pytest.raises(ValueError, match=r"`covariates` must have the shape .*\(3, 2\), got \(3, 0\)"):
        _module().sample(3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_layers": 0}, "`n_layers` must be at least 1, got 0"),
        ({"n_hidden": 0}, "`n_hidden` must be at least 1, got 0"),
        ({"n_hidden_layers": -1}, "`n_hidden_layers` must be at least 0, got -1"),
        ({"n_covariates": -1}, "`n_covariates` must be at least 0, got -1"),
        ({"temperature": 0.0}, "`temperature` must be above 0, got 0.0"),
        ({"prior_std": 0.0}, "`prior_std` must be above 0"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    """Protects the user: the setting is named with its value."""
    with pytest.raises(ValueError, match=message):
        _module(**options)
