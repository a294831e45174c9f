"""Numerical parity of the cascaded flow module: the published scDFM, and the two-stream model of its layers."""

from __future__ import annotations

import pytest
import torch
from ccfm_numbers import assert_close, load, meta, numbers, tensors

from cellweave._keys import FLOW_KEYS, REGISTRY_KEYS
from cellweave.flow import CascadedTimes, Guidance, integrate, time_grid
from cellweave.module import CascadedFlowModule, CascadeSampler, FlowDraws, FlowSolver, FlowStart

pytestmark = pytest.mark.parity

RK4 = FlowSolver("rk4", time_grid(20), time_grid(20))


def _scdfm(a, prefix="sd/", **options):
    options = {"forbidden": torch.tensor(a["mask"]), "encoder_heads": 8, "own": ("encoder.allowed_bits",)} | options
    own = options.pop("own")
    settings = {"n_hidden": 32, "n_heads": 4, "layout": "scdfm", "adapter_residual": False}
    options = {"n_layers": 2} | options
    module = CascadedFlowModule(44, perturbation_head=True, condition_dropout=0, **settings, **options)
    # the published checkpoint has a table of labels also where genes are perturbed
    kept = {k: v for k, v in a.items() if "n_labels" in options or not k.startswith(f"{prefix}perturbation_embedder")}
    return load(module, kept, prefix, own)


def _cascade(a):
    settings = {"n_hidden": 32, "n_layers": 2, "n_heads": 4, "bottleneck_dim": 16, "adapter_residual": False}
    module = CascadedFlowModule(44, 12, forbidden=torch.tensor(a["mask"]), latent_noise=0, **settings)
    return load(module, a, own=("encoder.allowed_bits", "p_mask_embed"))


def _losses(module, batch, draws):
    """Loss output of a batch with recorded draws."""
    inputs = module._get_inference_input(batch) | {"draws": draws}
    inference = module.inference(**inputs)
    generative = module.generative(**module._get_generative_input(batch, inference))
    return module.loss(batch, inference, generative), inference, generative


def _batch(a):
    keys = {REGISTRY_KEYS.X: "target", FLOW_KEYS.CONTROL: "source", FLOW_KEYS.GENES: "gene_ids"}
    keys |= {FLOW_KEYS.PERTURBATION: "pert_ids"}
    batch = {key: torch.tensor(a[name]) for key, name in keys.items()}
    if "z_target" in a:
        batch[FLOW_KEYS.LATENT] = torch.tensor(a["z_target"])
    return batch


def _assert_gradients(module, a, prefix):
    names = [name for name in a if name.startswith(prefix)]
    assert names
    for name in names:
        assert_close(module.get_parameter(name.removeprefix(prefix)).grad, a[name])


def test_scdfm_velocity():
    """Protects the published composition: velocities for times per cell and for one time, and the perturbation head."""
    a = numbers("ccfm_scdfm")
    module = _scdfm(a)
    genes, source, perturbation, t, x_t = tensors(a, "gene_ids", "source", "pert_ids", "vel/t", "vel/x_t")
    velocity = module.generative(source, genes, perturbation, x_t, t)["v_expr"]
    assert_close(velocity, a["vel/out"])
    gene, vector = module.read_tokens(genes, perturbation)
    control, effect = module.read_control(gene, source), module.read_perturbation(vector)
    x = module.backbone(module.expression_tokens(x_t, control), module.condition(t, None, effect), control, effect)
    assert_close(module.perturbation_from_tokens(x), a["vel/predict_p"])
    sampler = CascadeSampler(module, genes, source)
    assert_close(sampler.expression_velocity(None, effect, Guidance())(0.25, x_t), a["vel/out_t0dim"])


def test_scdfm_labels():
    """Protects perturbations that are labels (drugs) instead of genes."""
    a = numbers("ccfm_scdfm")
    module = _scdfm(a, "drug/sd/", n_labels=44, n_layers=1, forbidden=None, own=())
    genes, source, perturbation, t, x_t = tensors(a, "gene_ids", "source", "pert_ids", "vel/t", "vel/x_t")
    assert_close(module.generative(source, genes, perturbation, x_t, t)["v_expr"], a["drug/out"])


@pytest.mark.parametrize("mmd", [0, 1])
def test_scdfm_loss(mmd):
    """Protects the training loss with recorded draws, with and without the discrepancy, and its gradients."""
    a = numbers("ccfm_scdfm")
    module = _scdfm(a, mmd_weight=0.5 * mmd)
    perm, t, noise = tensors(a, *(f"loss_mmd{mmd}/{name}" for name in ("perm", "t", "noise")))
    times = CascadedTimes("uniform", 0.0).from_draws(torch.stack([t, t, t]))
    draws = FlowDraws(perm[: noise.shape[1]], times, noise, None, torch.zeros(5, dtype=torch.bool))
    output, _, _ = _losses(module, _batch(a), draws)
    assert_close(output.loss, a[f"loss_mmd{mmd}/loss"])
    output.loss.backward()
    _assert_gradients(module, a, f"loss_mmd{mmd}/grad/")


@pytest.mark.parametrize("solver", ["rk4", "midpoint", "euler"])
def test_scdfm_trajectory(solver):
    """Protects the solvers along a real flow: the second, eleventh and last of twenty times, and the clamped cells."""
    a = numbers("ccfm_scdfm")
    module = _scdfm(a)
    genes, source, perturbation, noise = tensors(a, "gene_ids", "source", "pert_ids", "ode_noise")
    with torch.no_grad():
        sampler = CascadeSampler(module, genes, source)
        effect = module.read_perturbation(module.read_tokens(genes, perturbation)[1])
        velocity, grid = sampler.expression_velocity(None, effect, Guidance()), time_grid(20)
        for n_times, name in ((2, "traj_1"), (11, "traj_10")):
            assert_close(integrate(velocity, noise, grid[:n_times], solver), a[f"ode_{solver}/{name}"])
    end = module.sample(genes, source, perturbation, FlowStart(noise), RK4._replace(solver=solver)).expression
    assert_close(end, a[f"ode_{solver}/traj_last"])
    assert_close(end.clamp(min=0), a[f"ode_{solver}/clamped"])


def test_cascade_velocities_losses_and_gradients():
    """Protects the two-stream model with recorded draws: times, both velocities, each term of the loss, gradients."""
    a = numbers("ccfm_cascade")
    module, settings = _cascade(a), meta()["cascade"]
    draws = torch.stack(tensors(a, "u_latent", "u_expr", "u_choose"))
    times = CascadedTimes("uniform", settings["choose_latent_p"]).from_draws(draws)
    assert_close(times.t_expr, a["t_expr"])
    assert_close(times.t_latent, a["t_latent"])
    noise_x, noise_z = tensors(a, "noise_x", "noise_z")
    draws = FlowDraws(None, times, noise_x, noise_z, torch.zeros(5, dtype=torch.bool))
    output, inference, generative = _losses(module, _batch(a), draws)
    assert_close(generative["v_expr"], a["v_expr"])
    assert_close(generative["v_latent"], a["v_latent"][generative["latent_rows"].numpy()])
    all_cells = {k: v for k, v in module._get_generative_input(_batch(a), inference).items() if k != "w_latent"}
    assert_close(module.generative(**all_cells)["v_latent"], a["v_latent"])
    terms = {"expression_loss": "loss_expr", "latent_loss": "loss_latent", "mmd_loss": "mmd2"}
    for ours, theirs in terms.items():
        assert_close(output.extra_metrics[ours], a[theirs])
    assert_close(output.loss, a["loss"])
    output.loss.backward()
    _assert_gradients(module, a, "grad/")


@pytest.mark.parametrize("stage1", ["control", "noise"])
def test_cascade_two_stages(stage1):
    """Protects sampling: both stages over 152 evaluations, with either input of the first stage."""
    a = numbers("ccfm_cascade")
    module = _cascade(a)
    genes, source, perturbation, x0, z0 = tensors(a, "gene_ids", "source", "pert_ids", "ode_x0", "ode_z0")
    cells = module.sample(genes, source, perturbation, FlowStart(x0, z0), RK4, stage1)
    assert_close(cells.latent, a[f"ode_stage1_{stage1}/z1"])
    assert_close(cells.expression, a[f"ode_stage1_{stage1}/x1"])
    assert_close(cells.expression.clamp(min=0), a[f"ode_stage1_{stage1}/x1_clamped"])
