"""Coupling layers: the formula, exact inverse, log-determinant, cost, few features, covariates."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from cellweave.nn import CouplingFlow, CouplingLayer

N_CELLS = 5


def _flow(n_features=5, n_covariates=0, dtype=torch.float64, **options) -> CouplingFlow:
    torch.manual_seed(0)
    arguments = {"n_hidden": 6, "n_hidden_layers": 1, "n_layers": 4, **options}
    flow = CouplingFlow(n_features, n_covariates, **arguments).to(dtype)
    with torch.no_grad():  # weights as torch draws them hardly move anything
        for parameter in flow.parameters():
            parameter.mul_(2)
    return flow


def _cells(n_features=5, n_covariates=0, dtype=torch.float64, n_cells=N_CELLS):
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(n_cells, n_features, dtype=dtype, generator=generator),
        torch.randn(n_cells, n_covariates, dtype=dtype, generator=generator),
    )


def _formula(flow: CouplingFlow, x, covariates):
    """The published definition, with full networks and masks that multiply."""
    log_det = torch.zeros(len(x), dtype=x.dtype)
    for i, layer in enumerate(flow.module_list):
        mask = torch.tensor([float((j - i) % 3 > 0) for j in range(x.shape[1])], dtype=x.dtype)
        given_ = torch.cat([x * mask, flow.covariate_scale * covariates], 1)
        s, t = torch.tanh(layer.sfun(given_)), layer.tfun(given_)
        x = x * mask + (1 - mask) * (x * s.exp() + t)
        log_det = log_det + (s * (1 - mask)).sum(1)
    return x, log_det


@given(st.integers(1, 8), st.integers(0, 3), st.integers(1, 5), st.integers(0, 2))
def test_layers_follow_the_formula_and_the_inverse_undoes_them(n_features, n_covariates, n_layers, n_hidden_layers):
    """Protects masks, networks of any depth, covariates and both directions, from one feature on."""
    options = {"n_layers": n_layers, "n_hidden_layers": n_hidden_layers}
    flow = _flow(n_features, n_covariates, covariate_scale=3.0, **options)
    x, covariates = _cells(n_features, n_covariates)
    u, log_det = flow(x, covariates)
    expected_u, expected_log_det = _formula(flow, x, covariates)
    torch.testing.assert_close(u, expected_u, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(log_det, expected_log_det, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(flow.inverse(u, covariates), x, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(flow(flow.inverse(x, covariates), covariates)[0], x, rtol=1e-10, atol=1e-10)


def test_log_determinant_is_that_of_the_jacobian():
    """Protects the density: the log-determinant of the matrix of derivatives that autograd finds."""
    flow, (x, covariates) = _flow(5, 2), _cells(5, 2)
    _, log_det = flow(x, covariates)
    for i in range(N_CELLS):
        cell = lambda row, i=i: flow(row[None], covariates[i : i + 1])[0][0]
        jacobian = torch.autograd.functional.jacobian(cell, x[i])
        torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], log_det[i], rtol=1e-10, atol=1e-10)


def test_gradients_are_those_of_finite_differences():
    """Protects training: derivatives after features, covariates and every weight, in both directions."""
    flow, (x, covariates) = _flow(4, 1, n_hidden=3, n_layers=3), _cells(4, 1, n_cells=2)
    inputs = (x.requires_grad_(), covariates.requires_grad_())
    assert torch.autograd.gradcheck(flow, inputs)
    assert torch.autograd.gradcheck(flow.inverse, inputs)
    names, weights = zip(*flow.named_parameters(), strict=True)

    def of_weights(*values):
        return torch.func.functional_call(flow, dict(zip(names, values, strict=True)), (x, covariates))

    assert torch.autograd.gradcheck(of_weights, weights)


@pytest.mark.parametrize(("n_cells", "n_hidden_layers"), [(3, 1), (3, 0), (4096, 1), (4097, 2), (9000, 1)])
def test_lean_derivatives_are_those_of_autograd(n_cells, n_hidden_layers):
    """Protects training: activations computed again, some cells at a time, give the derivatives of the stored ones."""
    flow, (x, covariates) = _flow(5, 2, n_hidden_layers=n_hidden_layers), _cells(5, 2, n_cells=n_cells)
    inputs = (x.requires_grad_(), covariates.requires_grad_(), *flow.parameters())
    weight = torch.randn(n_cells, 1, dtype=x.dtype, generator=torch.Generator().manual_seed(2))
    found = []
    for result in (flow(x, covariates), _formula(flow, x, covariates)):
        found.append(torch.autograd.grad((weight * result[0]).sum() + result[1].square().sum(), inputs))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)


def test_derivatives_can_be_differentiated():
    """Protects penalties on the slope of the flow: second derivatives after features, covariates and weights."""
    flow, (x, covariates) = _flow(4, 1, n_hidden=3, n_layers=2), _cells(4, 1, n_cells=2)
    inputs = (x.requires_grad_(), covariates.requires_grad_())
    assert torch.autograd.gradgradcheck(flow, inputs)
    slopes = torch.autograd.grad(flow(x, covariates)[0].square().sum(), x, create_graph=True)[0]
    expected = torch.autograd.grad(_formula(flow, x, covariates)[0].square().sum(), x, create_graph=True)[0]
    parameters = [p for p in flow.parameters() if p.ndim > 1]
    found, wanted = (torch.autograd.grad(s.square().sum(), parameters) for s in (slopes, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_training_keeps_no_activations():
    """Protects memory: what a step keeps per cell grows with features and layers, not with the width of the networks."""
    kept = []
    for n_hidden in (4, 64):
        flow, (x, covariates) = _flow(6, 0, n_hidden=n_hidden), _cells(6, n_cells=500)
        saved: dict[int, int] = {}
        parameters = {p.untyped_storage().data_ptr() for p in flow.parameters()}

        def pack(tensor, saved=saved, parameters=parameters):
            if tensor.untyped_storage().data_ptr() not in parameters and 500 in tensor.shape:
                saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = flow(x, covariates)
        kept.append(sum(saved.values()))
        del output
    assert 0 < kept[1] <= 1.01 * kept[0]


def test_only_transformed_features_are_computed():
    """Protects the cost: multiplications of a layer count the features it reads and those it writes, not all."""
    n_hidden, n_hidden_layers, n_covariates = 6, 2, 3
    mask = torch.arange(12) % 3 > 0  # reads 8 features, writes 4
    layer = CouplingLayer(mask, n_covariates, n_hidden, n_hidden_layers).double()
    x, covariates = _cells(12, n_covariates)
    with FlopCounterMode(display=False) as counter:
        layer(x.t(), covariates.t())
    with_one = n_hidden + 1  # biases are the weights of a constant, which every hidden layer hands on
    per_network = with_one * (8 + n_covariates + 1) + n_hidden_layers * with_one**2 + with_one * 4
    assert counter.get_total_flops() == 2 * 2 * N_CELLS * per_network


def test_weights_behind_the_mask_play_no_part():
    """Protects published weights: what the mask hides may hold anything, and is not trained."""
    layer = _flow(6, 0, n_layers=1).module_list[0]
    x = _cells(6)[0].t()
    y, log_det = layer(x)
    (y.sum() + log_det.sum()).backward()
    read, written = layer.passed.tolist(), layer.transformed.tolist()
    assert (read, written) == ([1, 2, 4, 5], [0, 3])
    for network in (layer.sfun, layer.tfun):
        assert not network[0].weight.grad[:, written].any() and network[0].weight.grad[:, read].any()
        assert not network[-1].weight.grad[read].any() and network[-1].weight.grad[written].any()
        with torch.no_grad():
            network[0].weight[:, written] = torch.nan
            network[-1].weight[read], network[-1].bias[read] = torch.nan, torch.nan
    torch.testing.assert_close(layer(x)[0], y, rtol=0, atol=0)
    torch.testing.assert_close(y[read], x[read], rtol=0, atol=0)


def test_every_feature_is_transformed_within_three_layers():
    """Protects the masks: a third per layer, each feature once in three layers."""
    flow = _flow(7, n_layers=3)
    transformed = torch.cat([layer.transformed for layer in flow.module_list])
    assert sorted(transformed.tolist()) == list(range(7))


def test_identity_start():
    """Protects the option: nothing changes at first, and the first step can already change it."""
    torch.manual_seed(0)
    flow = CouplingFlow(5, 1, n_layers=3, identity_init=True)
    x, covariates = _cells(5, 1, torch.float32)
    u, log_det = flow(x, covariates)
    assert torch.equal(u, x) and not log_det.any()
    u.square().sum().backward()
    assert all(layer.tfun[-1].weight.grad.any() for layer in flow.module_list)


def test_covariates_are_scaled():
    """Protects the factor on covariates: a hundred times the scale is a hundred times the covariates."""
    x, covariates = _cells(5, 2)
    by_scale, by_hand = _flow(5, 2, covariate_scale=100.0), _flow(5, 2)
    torch.testing.assert_close(by_scale(x, covariates), by_hand(x, 100 * covariates))
    assert not torch.allclose(by_scale(x, covariates)[0], by_hand(x, covariates)[0])


@pytest.mark.parametrize(
    ("n_covariates", "given_"), [(2, None), (2, torch.zeros(N_CELLS, 1)), (0, torch.zeros(N_CELLS, 1))]
)
def test_covariates_that_do_not_fit_are_refused(n_covariates, given_):
    """Protects the user: one sentence with both shapes, in both directions."""
    flow, x = _flow(5, n_covariates), _cells()[0]
    for direction in (flow, flow.inverse):
        with pytest.raises(ValueError, match=rf"must have the shape .*\(5, {n_covariates}\), got"):
            direction(x, given_)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e6, 1e15])
def test_extreme_features_stay_finite(size):
    """Protects float32: the scale is bounded, so that huge and tiny features stay numbers, with their gradients."""
    flow = _flow(5, 1, torch.float32)
    x, covariates = _cells(5, 1, torch.float32)
    x = (x.sign() * size).requires_grad_()
    u, log_det = flow(x, covariates)
    (u.sum() + log_det.sum()).backward()
    assert all(torch.isfinite(t).all() for t in (u, log_det, x.grad, flow.inverse(u, covariates)))


def test_no_cells():
    """Protects empty batches: shapes are kept."""
    u, log_det = _flow()(torch.zeros(0, 5, dtype=torch.float64))
    assert u.shape == (0, 5) and log_det.shape == (0,)


def test_a_flow_is_one_compiled_graph():
    """Protects ``torch.compile``: no layer falls back to Python."""
    report = torch._dynamo.explain(_flow(5, 2))(*_cells(5, 2))
    assert (report.graph_count, report.graph_break_count) == (1, 0)
