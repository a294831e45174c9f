"""The cascaded flow module: what is cached is exact, samples belong to cells, genes are a set, options do what they say."""

from __future__ import annotations

import pytest
import torch

from cellweave._keys import FLOW_KEYS, LOADER_KEYS, REGISTRY_KEYS, STEP_KEYS
from cellweave.flow import Guidance, time_grid
from cellweave.module import CascadedFlowModule, CascadeSampler, FlowSolver

N_TOKENS, N_GENES, N_CELLS = 24, 10, 6


def _random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _graph():
    forbidden = _random(N_TOKENS, N_TOKENS) > 0
    return forbidden.fill_diagonal_(False)


def _module(n_latent=3, spread=True, **options):
    """A small module with weights that are nowhere zero, unless ``spread`` is off."""
    torch.manual_seed(0)
    settings = {"n_hidden": 8, "n_layers": 2, "n_heads": 2, "bottleneck_dim": 4, "decoder_depth": 1}
    module = CascadedFlowModule(N_TOKENS, n_latent, **settings, **({"forbidden": _graph()} | options))
    for parameter in module.parameters() if spread else ():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    return module.eval()


def _batch(n_latent=3, level="gene", n_cells=N_CELLS):
    batch = {
        REGISTRY_KEYS.X: _random(n_cells, N_GENES, seed=1).abs(),
        FLOW_KEYS.CONTROL: _random(n_cells, N_GENES, seed=2).abs(),
        FLOW_KEYS.GENES: torch.arange(4, 4 + N_GENES),
        FLOW_KEYS.PERTURBATION: torch.tensor([[5, 9], [6, -1], [-1, -1]])[torch.arange(n_cells) % 3],
        STEP_KEYS.SEED: torch.tensor(7),
    }
    if n_latent:
        shape = (n_cells, N_GENES, n_latent) if level == "gene" else (n_cells, n_latent)
        batch[FLOW_KEYS.LATENT] = _random(*shape, seed=3)
    return batch


def _step(module, batch):
    inference = module.inference(**module._get_inference_input(batch))
    generative = module.generative(**module._get_generative_input(batch, inference))
    return module.loss(batch, inference, generative), inference, generative


def _sample(module, cells=range(N_CELLS), seed=0, perturbation=(5, 9), genes=None, **options):
    batch, cells = _batch(0), torch.tensor(list(cells))
    genes = torch.arange(N_GENES) if genes is None else genes
    control = batch[FLOW_KEYS.CONTROL][cells]
    start = module.draw_start(control, cells, seed)
    latent = start.latent if start.latent is None or module.latent_level == "cell" else start.latent[:, genes]
    start = start._replace(expression=start.expression[:, genes], latent=latent)
    ids = batch[FLOW_KEYS.GENES][genes]
    return module.sample(ids, control[:, genes], torch.tensor([perturbation]), start, **options)


# ---------------------------------------------------------------------------------------------------- the formula


@pytest.mark.parametrize(("n_latent", "layout"), [(3, "ccfm"), (0, "ccfm"), (0, "scdfm")])
def test_constants_equal_the_full_forward(n_latent, layout):
    """Protects the shortcuts of sampling: constants, stage constants and one row for all cells change nothing."""
    module, batch = _module(n_latent, layout=layout), _batch(n_latent)
    genes, control = batch[FLOW_KEYS.GENES], batch[FLOW_KEYS.CONTROL]
    perturbation, x = torch.tensor([[5, 9]]), _random(N_CELLS, N_GENES, seed=4)
    z = _random(N_CELLS, N_GENES, 3, seed=5) if n_latent else None
    sampler = CascadeSampler(module, genes, control)
    effect = module.read_perturbation(module.read_tokens(genes, perturbation)[1])
    inputs = {"control": control, "genes": genes, "perturbation": perturbation.expand(N_CELLS, 2), "x_t": x, "z_t": z}
    zeros, ones = torch.zeros(N_CELLS), torch.ones(N_CELLS)
    full = module.generative(t_expr=0.3 * ones, t_latent=ones, **inputs)["v_expr"]
    cached = sampler.expression_velocity(z, effect, Guidance())(0.3, x)
    torch.testing.assert_close(cached, full, rtol=1e-6, atol=1e-6)
    if n_latent:
        full = module.generative(t_expr=zeros, t_latent=0.3 * ones, **inputs)["v_latent"]
        cached = sampler.latent_velocity(x, effect, Guidance())(0.3, z)
        torch.testing.assert_close(cached, full, rtol=1e-6, atol=1e-6)


def test_perturbations_share_the_control_cells():
    """Protects reuse: one sampler for many perturbations gives what a sampler each would."""
    module, batch = _module(), _batch()
    genes, control = batch[FLOW_KEYS.GENES], batch[FLOW_KEYS.CONTROL]
    start, how = module.draw_start(control, torch.arange(N_CELLS), 0), FlowSolver("euler", time_grid(3), time_grid(3))
    with torch.no_grad():
        sampler = CascadeSampler(module, genes, control)
        for ids in ([[5, 9]], [[7, -1]]):
            shared = sampler.generate(torch.tensor(ids), start, how)
            own = module.sample(genes, control, torch.tensor(ids), start, how)
            torch.testing.assert_close(shared.expression, own.expression, rtol=0, atol=0)


@pytest.mark.parametrize("level", ["gene", "cell"])
def test_genes_are_a_set(level):
    """Protects gene identity: another order of the genes gives the same cells in that order."""
    module, order = _module(latent_level=level), torch.randperm(N_GENES, generator=torch.Generator().manual_seed(1))
    straight, permuted = _sample(module), _sample(module, genes=order)
    torch.testing.assert_close(permuted.expression, straight.expression[:, order], rtol=1e-5, atol=1e-5)
    latent = straight.latent[:, order] if level == "gene" else straight.latent
    torch.testing.assert_close(permuted.latent, latent, rtol=1e-5, atol=1e-5)


def test_order_of_a_combination_does_not_matter():
    """Protects combinations: A+B is B+A, with or without empty slots."""
    module = _module()
    expected = _sample(module, perturbation=(5, 9)).expression
    for perturbation in ((9, 5), (-1, 9, 5), (5, -1, 9, -1)):
        torch.testing.assert_close(
            _sample(module, perturbation=perturbation).expression, expected, rtol=1e-5, atol=1e-5
        )
    assert not torch.allclose(_sample(module, perturbation=(5,)).expression, expected, atol=1e-3)


def test_adapters_are_added_or_replace_the_stream():
    """Protects both forms: silent adapters leave the stream as it is when added, and erase it when they replace it."""
    batch = _batch(0)
    x = (_random(N_CELLS, N_GENES, seed=4), _random(N_CELLS, N_GENES, seed=5))
    for residual in (True, False):
        module = _module(0, adapter_residual=residual)
        for adapter in module.adapter_layer:
            torch.nn.init.zeros_(adapter[3].weight)
            torch.nn.init.zeros_(adapter[3].bias)
        inputs = {"control": batch[FLOW_KEYS.CONTROL], "genes": batch[FLOW_KEYS.GENES], "t_expr": torch.ones(N_CELLS)}
        inputs["perturbation"] = batch[FLOW_KEYS.PERTURBATION]
        first, second = (module.generative(x_t=value, **inputs)["v_expr"] for value in x)
        assert torch.allclose(first, second) is not residual


def test_half_precision_stays_close():
    """Protects training in bfloat16: a step under autocast runs, also along a sparse gene graph, and is about the same."""
    n = 80
    forbidden = ~torch.eye(n, dtype=torch.bool)
    settings = {"n_hidden": 8, "n_layers": 1, "n_heads": 2, "dropout": 0.0, "zero_init": False}
    torch.manual_seed(0)
    module = CascadedFlowModule(n, 3, forbidden=forbidden, condition_dropout=0.0, **settings)
    batch = _batch()
    expected = _step(module, batch)[0].loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = _step(module, batch)[0].loss
    loss.backward()
    torch.testing.assert_close(loss.float(), expected, rtol=0.05, atol=0)


# ---------------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("noise", ["gaussian", "poisson"])
def test_samples_do_not_depend_on_batch_or_order(noise):
    """Protects users who change the batch size: a cell is the same alone and in any company."""
    module = _module(noise=noise)
    together = _sample(module)
    for cells in ([3], [5, 0, 3], [2, 1]):
        part = _sample(module, cells)
        torch.testing.assert_close(part.expression, together.expression[cells], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(part.latent, together.latent[cells], rtol=1e-5, atol=1e-5)


def test_seed_repeats_and_decides():
    """Protects repeatability: the same seed gives the same cells, another seed others."""
    module = _module()
    assert torch.equal(_sample(module).expression, _sample(module).expression)
    assert not torch.allclose(_sample(module).expression, _sample(module, seed=1).expression, atol=1e-3)


def test_midpoint_converges_to_rk4():
    """Protects the default solver: with more steps it approaches the fine solution."""
    module = _module(0)
    exact = _sample(module, how=FlowSolver("rk4", time_grid(41))).expression
    errors = [
        (_sample(module, how=FlowSolver("midpoint", time_grid(n + 1))).expression - exact).abs().max()
        for n in (2, 4, 16)
    ]
    assert errors[0] > 2 * errors[1] > 8 * errors[2]


def test_sampling_has_no_dropout_and_leaves_the_mode():
    """Protects from active dropout while sampling (as in scDFM): a module in training mode samples the same cells."""
    module = _module(dropout=0.5)
    expected = _sample(module).expression
    module.train()
    assert torch.equal(_sample(module).expression, expected)
    assert module.training
    assert not _sample(module).expression.requires_grad


def test_guidance_moves_away_from_no_perturbation():
    """Protects guidance: scale 1 costs and changes nothing, scale 0 forgets the perturbation."""
    module = _module(0)
    plain = _sample(module).expression
    guided = {s: _sample(module, how=FlowSolver(expression_guidance=Guidance(s))).expression for s in (0.0, 1.0, 2.0)}
    assert torch.equal(guided[1.0], plain)
    other = _sample(module, perturbation=(7,), how=FlowSolver(expression_guidance=Guidance(0.0))).expression
    torch.testing.assert_close(guided[0.0], other, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(guided[2.0], plain, atol=1e-3)


def test_first_stage_input():
    """Protects the option: features made beside noise or beside the control cell differ; the module's own is default."""
    noise, control = _module(), _module(stage1_expression_input="control")
    assert torch.equal(_sample(control).latent, _sample(noise, stage1_expression_input="control").latent)
    assert not torch.allclose(_sample(noise).latent, _sample(control).latent, atol=1e-3)


# ---------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("options", [{}, {"level": "cell"}, {"n_latent": 0}, {"n_latent": 0, "layout": "scdfm"}])
def test_every_parameter_learns(options):
    """Protects training on several processes: after a step every used parameter has a gradient, and the loss is finite."""
    n_latent, level = options.get("n_latent", 3), options.get("level", "gene")
    module = _module(n_latent, latent_level=level, layout=options.get("layout", "ccfm")).train()
    output, _, _ = _step(module, _batch(n_latent, level))
    output.loss.backward()
    assert torch.isfinite(output.loss)
    assert [name for name, parameter in module.named_parameters() if parameter.grad is None] == []


def test_training_lowers_the_loss():
    """Protects the start from zero velocities: they get away from it."""
    module, batch = _module(spread=False, dropout=0.0, condition_dropout=0.0), _batch()
    optimizer = torch.optim.Adam(module.train().parameters(), 1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = _step(module, batch)[0].loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_features_of_cells_without_weight_are_not_computed():
    """Protects the shortcut of training: the loss equals that of all cells."""
    module, batch = _module(), _batch()
    output, inference, generative = _step(module, batch)
    rows = generative["latent_rows"]
    assert rows.tolist() == (inference["w_latent"] > 0).nonzero().flatten().tolist()
    inputs = {k: v for k, v in module._get_generative_input(batch, inference).items() if k != "w_latent"}
    full = module.loss(batch, inference, module.generative(**inputs))
    torch.testing.assert_close(output.loss, full.loss)


def test_gene_subset_of_a_step():
    """Protects training on some genes: values, features, tokens and feature masks of the same genes."""
    module, batch = _module(n_genes_per_step=4).train(), _batch()
    batch[FLOW_KEYS.HAS_LATENT] = torch.arange(N_GENES) % 2 == 0
    inference = module.inference(**module._get_inference_input(batch))
    places = inference["genes"] - 4
    assert len(set(places.tolist())) == 4
    assert torch.equal(inference["target"], batch[REGISTRY_KEYS.X][:, places])
    assert torch.equal(inference["control"], batch[FLOW_KEYS.CONTROL][:, places])
    torch.testing.assert_close(inference["has_latent"], places % 2 == 0)
    ends = inference["z_t"] + (1 - inference["t_latent"])[:, None, None] * inference["u_latent"]
    torch.testing.assert_close(ends, batch[FLOW_KEYS.LATENT][:, places], rtol=1e-4, atol=1e-5)
    # validation of thousands of genes would cost more than training
    assert module.eval().inference(**module._get_inference_input(batch))["genes"].shape == (4,)


def test_first_stage_sees_in_training_what_it_sees_in_sampling():
    """Protects from the mismatch of the seed: feature cells see noise, or their control cell, in both."""
    batch = _batch()
    for kind in ("noise", "control"):
        module = _module(stage1_expression_input=kind)
        draws = module.draw(batch)
        out = module.inference(**module._get_inference_input(batch))
        stage1 = out["w_latent"] > 0
        assert 0 < stage1.sum() < N_CELLS
        expected = draws.expression if kind == "noise" else batch[FLOW_KEYS.CONTROL]
        torch.testing.assert_close(out["x_t"][stage1], expected[stage1])


def test_hidden_perturbations():
    """Protects guidance training: hidden cells see the same whatever was done to them; while evaluating none is hidden."""
    module, batch = _module(condition_dropout=0.5).train(), _batch(n_cells=200)
    hidden = module.draw(batch).hidden
    assert hidden.float().mean() == pytest.approx(0.5, abs=0.12)
    assert not module.eval().draw(batch).hidden.any()
    inputs = module._get_generative_input(batch, module.inference(**module._get_inference_input(batch)))
    inputs["hidden"] = hidden
    first = module.generative(**inputs)["v_expr"]
    changed = module.generative(**(inputs | {"perturbation": torch.full((200, 2), 11)}))["v_expr"]
    same = (first - changed).abs().amax(1) < 1e-6
    assert torch.equal(same, hidden)


def test_the_seed_of_a_step_decides_all_draws():
    """Protects repeatable training; processes that share a step draw other cells but the same genes."""
    module, batch = _module(n_genes_per_step=4).train(), _batch()
    first, again = module.draw(batch), module.draw(batch)
    assert torch.equal(first.expression, again.expression)
    assert torch.equal(first.times.t_expr, again.times.t_expr)
    elsewhere = module.draw({**batch, STEP_KEYS.POSITION: torch.tensor([1])})
    assert torch.equal(first.genes, elsewhere.genes)
    assert not torch.equal(first.expression, elsewhere.expression)


def test_cells_that_fill_up_do_not_count():
    """Protects the loss from padding: invalid cells change nothing."""
    module, batch = _module(mmd_weight=0.5), _batch()
    batch[LOADER_KEYS.VALID] = torch.arange(N_CELLS) < 4
    before = _step(module, batch)[0].loss
    batch[REGISTRY_KEYS.X] = batch[REGISTRY_KEYS.X].clone()
    batch[REGISTRY_KEYS.X][4:] += 5
    torch.testing.assert_close(_step(module, batch)[0].loss, before)


def test_poisson_start_of_training():
    """Protects the noise kind: whole counts that are not all zero."""
    counts = _module(noise="poisson").draw(_batch()).expression.expm1()
    torch.testing.assert_close(counts, counts.round(), rtol=1e-4, atol=1e-3)
    assert counts.sum(1).mean() == pytest.approx(1e4, rel=0.05)


def test_weights_alone_repeat_the_samples():
    """Protects saving: the gene graph travels with the weights."""
    module, other = _module(), _module(forbidden=torch.zeros(N_TOKENS, N_TOKENS, dtype=torch.bool))
    other.load_state_dict(module.state_dict())
    assert torch.equal(_sample(module).expression, _sample(other).expression)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": "flat"}, "`noise` must be 'gaussian' or 'poisson', got 'flat'"),
        ({"stage1_expression_input": "x"}, "`stage1_expression_input` must be 'noise' or 'control', got 'x'"),
        ({"layout": "scdfm"}, "`layout`='scdfm' has no latent stream, got `n_latent`=3; use `layout`='ccfm'."),
        ({"layout": "other"}, "`layout` must be 'ccfm' or 'scdfm', got 'other'"),
        ({"latent_level": "row"}, "`latent_level` must be 'gene' or 'cell', got 'row'"),
        ({"condition_dropout": 1.0}, r"`condition_dropout` must be in \[0, 1\), got 1.0"),
        ({"n_latent": -1}, "`n_latent` must not be negative, got -1"),
    ],
)
def test_bad_options_are_refused(options, message):
    """Protects from a failure deep in torch, or from an option that does nothing."""
    with pytest.raises(ValueError, match=message):
        _module(**options)


# ---------------------------------------------------------------------------------------------------- from control cells


def _anchored(n_latent=0, **options):
    return _module(n_latent, start="control", **options)


def _anchor(n_cells=N_CELLS):
    return _random(n_cells, N_GENES, seed=6)


def _reference(n_cells=N_CELLS):
    return _random(1, 2, N_GENES, seed=8).expand(n_cells, -1, -1)


@pytest.mark.parametrize("n_latent", [0, 3])
@pytest.mark.parametrize("with_anchor", [False, True])
def test_an_untrained_flow_is_the_simple_prediction(n_latent, with_anchor):
    """Protects the anchor: before training, cells are exactly their control cells plus the expected change."""
    module, batch = _anchored(n_latent, spread=False), _batch(n_latent)
    control, anchor = batch[FLOW_KEYS.CONTROL], _anchor() if with_anchor else None
    start = module.draw_start(control, torch.arange(N_CELLS), 0, anchor)
    sample = module.sample(batch[FLOW_KEYS.GENES], control, batch[FLOW_KEYS.PERTURBATION], start, anchor=anchor)
    torch.testing.assert_close(sample.expression, control if anchor is None else control + anchor, rtol=0, atol=0)


def test_start_noise_has_its_size():
    """Protects the option: the start spreads around the shifted control cell as far as it says, the same in any batch."""
    module, control = _anchored(start_noise=0.3), torch.zeros(200, N_GENES)
    noise = module.draw_start(control, torch.arange(200), 0).expression
    assert noise.std() == pytest.approx(0.3, abs=0.02)
    torch.testing.assert_close(module.draw_start(control[:1], torch.tensor([7]), 0).expression[0], noise[7])


def test_training_and_sampling_start_alike():
    """Protects from a mismatch: at the time 0 a training path is where sampling starts."""
    module, batch = _anchored().eval(), _batch(0) | {FLOW_KEYS.ANCHOR: _anchor()}
    inputs = module._get_inference_input(batch)
    times = inputs["draws"].times._replace(t_expr=torch.zeros(N_CELLS))
    out = module.inference(**(inputs | {"draws": inputs["draws"]._replace(times=times)}))
    start = module.draw_start(batch[FLOW_KEYS.CONTROL], torch.arange(N_CELLS), 0, batch[FLOW_KEYS.ANCHOR])
    torch.testing.assert_close(out["x_t"], start.expression)
    torch.testing.assert_close(out["u_expr"], batch[REGISTRY_KEYS.X] - start.expression)


def test_the_reference_hides_the_cell():
    """Protects from the trivial velocity: beside a reference the network sees the cell in its own path only."""
    module, batch = _anchored(), _batch(0) | {FLOW_KEYS.ANCHOR: _anchor(), FLOW_KEYS.REFERENCE: _reference()}
    x = _random(N_CELLS, N_GENES, seed=4)

    def velocity(control):
        changed = batch | {FLOW_KEYS.CONTROL: control}
        inputs = module._get_generative_input(changed, module.inference(**module._get_inference_input(changed)))
        return module.generative(**(inputs | {"x_t": x}))["v_expr"]

    first, second = velocity(batch[FLOW_KEYS.CONTROL]), velocity(batch[FLOW_KEYS.CONTROL] + 1)
    assert torch.equal(first, second)
    genes = batch[FLOW_KEYS.GENES]
    effect = module.read_perturbation(module.read_tokens(genes, batch[FLOW_KEYS.PERTURBATION])[1])
    sampler = CascadeSampler(module, genes, batch[FLOW_KEYS.CONTROL], batch[FLOW_KEYS.ANCHOR], _reference()[:1])
    inputs = module._get_inference_input(batch)
    times = inputs["draws"].times._replace(t_expr=torch.full((N_CELLS,), 0.3), t_latent=torch.ones(N_CELLS))
    flow = module.inference(**(inputs | {"draws": inputs["draws"]._replace(times=times)}))
    trained = module.generative(**(module._get_generative_input(batch, flow) | {"x_t": x}))["v_expr"]
    with torch.no_grad():
        torch.testing.assert_close(sampler.expression_velocity(None, effect, Guidance())(0.3, x), trained)


def test_the_network_reads_the_anchor():
    """Protects the use of the anchor: another expected change gives another velocity, and none is a change of zero."""
    module, batch = _anchored(), _batch(0)
    inputs = {"control": batch[FLOW_KEYS.CONTROL], "genes": batch[FLOW_KEYS.GENES], "t_expr": torch.ones(N_CELLS)}
    inputs |= {"perturbation": batch[FLOW_KEYS.PERTURBATION], "x_t": _random(N_CELLS, N_GENES, seed=4)}
    none, zero, some = (
        module.generative(**inputs, anchor=a)["v_expr"] for a in (None, torch.zeros(N_CELLS, N_GENES), _anchor())
    )
    assert torch.equal(none, zero)
    assert not torch.allclose(none, some, atol=1e-3)


@pytest.mark.parametrize("n_latent", [0, 3])
def test_every_parameter_learns_from_control_cells(n_latent):
    """Protects training from control cells: the encoder of the anchor and the zero gate have gradients too."""
    module = _anchored(n_latent, zero_gate=True).train()
    output, _, _ = _step(module, _batch(n_latent) | {FLOW_KEYS.ANCHOR: _anchor()})
    output.loss.backward()
    assert torch.isfinite(output.loss)
    assert [name for name, parameter in module.named_parameters() if parameter.grad is None] == []


def test_gene_subset_keeps_anchor_and_reference_in_step():
    """Protects training on some genes: anchor and reference are those of the same genes."""
    module = _anchored(n_genes_per_step=4).train()
    batch = _batch(0) | {FLOW_KEYS.ANCHOR: _anchor(), FLOW_KEYS.REFERENCE: _reference()}
    out = module.inference(**module._get_inference_input(batch))
    places = out["genes"] - 4
    assert torch.equal(out["control"], _reference()[:, 0, places])
    assert torch.equal(out["anchor"], _reference()[:, 1, places])
    start = batch[FLOW_KEYS.CONTROL] + batch[FLOW_KEYS.ANCHOR]
    torch.testing.assert_close(out["u_expr"], (batch[REGISTRY_KEYS.X] - start)[:, places])


def test_zero_gate_makes_the_zeros_it_learned():
    """Protects the gate: genes that are always or never zero become so, in any company, and the loss knows the data."""
    module, batch = _module(0, zero_gate=True), _batch(0)
    gate = module.gate_layer.fc
    torch.nn.init.zeros_(gate[-1].weight)
    for logit, share in ((30.0, 1.0), (-30.0, 0.0), (0.0, 0.5)):
        torch.nn.init.constant_(gate[-1].bias, logit)
        zeros = (_sample(module).expression == 0).float().mean()
        assert zeros == pytest.approx(share, abs=0.25 * (share == 0.5))
    together = _sample(module).expression
    torch.testing.assert_close(_sample(module, [3, 1]).expression, together[[3, 1]], rtol=1e-5, atol=1e-5)
    batch[REGISTRY_KEYS.X] = torch.zeros(N_CELLS, N_GENES)
    output, _, _ = _step(module, batch)
    assert float(output.extra_metrics["zero_loss"]) == pytest.approx(0.6931, abs=1e-3)
    torch.nn.init.constant_(gate[-1].bias, 5.0)
    assert float(_step(module, batch)[0].extra_metrics["zero_loss"]) < 0.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": "cell"}, "`start` must be 'noise' or 'control', got 'cell'"),
        ({"start_noise": 0.5}, "`start_noise`=0.5 needs `start`='control'"),
        ({"start": "control", "start_noise": -1.0}, "`start_noise` must not be negative, got -1.0"),
        ({"start": "control", "noise": "poisson"}, "`noise`='poisson' does not go with `start`='control'"),
    ],
)
def test_bad_starts_are_refused(options, message):
    """Protects from starts that contradict each other."""
    with pytest.raises(ValueError, match=message):
        _module(**options)
