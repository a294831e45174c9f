"""What is expected of a perturbation before a model is trained."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp

from cellweave.stats import (
    AnchorRule,
    Evidence,
    choose_anchors,
    condition_kind,
    context_response,
    expected_shift,
    posterior_effects,
    shrink_effects,
    shrinkage_risk,
    similar_contexts,
    with_contexts,
)

N_GENES = 40


def _screen(effects, n_cells=60, contexts=("a",), noise=0.3, seed=0, scale=None):
    """Cells of every condition in every context: context mean + effect * scale of the context + noise."""
    rng = np.random.default_rng(seed)
    base = {c: rng.uniform(0.5, 2, N_GENES) * (1 + 0.1 * i) for i, c in enumerate(contexts)}
    x, conditions, where = [], [], []
    for c in contexts:
        for condition, effect in [((), np.zeros(N_GENES)), *effects.items()]:
            factor = 1.0 if scale is None else scale[c]
            x.append(base[c] + factor * effect + noise * rng.normal(size=(n_cells, N_GENES)))
            conditions += [condition] * n_cells
            where += [c] * n_cells
    return np.concatenate(x), conditions, where


def _evidence(*args, **options):
    x, conditions, where = _screen(*args, **options)
    return Evidence.from_cells(x, conditions, where, [f"g{i}" for i in range(N_GENES)])


def _effect(*genes, size=2.0):
    out = np.zeros(N_GENES)
    out[list(genes)] = size
    return out


def test_variances_are_those_of_means():
    """Protects everything that is weighed by chance error: the variance of a mean, of perturbed and of control cells."""
    x, conditions, where = _screen({("A",): _effect(1)}, n_cells=50)
    for values in (x, sp.csr_matrix(x)):
        evidence = Evidence.from_cells(values, conditions, where, [f"g{i}" for i in range(N_GENES)])
        np.testing.assert_allclose(evidence.variance[0, 0], x[50:].var(0, ddof=1) / 50, rtol=1e-8)
        np.testing.assert_allclose(evidence.control_variance[0], x[:50].var(0, ddof=1) / 50, rtol=1e-8)
        np.testing.assert_allclose(evidence.noise[0, 0], (x[:50].var(0, ddof=1) + x[50:].var(0, ddof=1)).sum() / 50)


def test_single_cells_have_a_variance():
    """Protects screens with contexts or conditions of one cell: no NaN may spread from a mean of a single cell."""
    x, conditions, where = _screen({("A",): _effect(1)}, n_cells=20, contexts=("a", "b"))
    kept = [i for i, (k, w) in enumerate(zip(conditions, where, strict=True)) if w == "a" or i % 20 == 0]
    genes = [f"g{i}" for i in range(N_GENES)]
    evidence = Evidence.from_cells(x[kept], [conditions[i] for i in kept], [where[i] for i in kept], genes)
    assert evidence.table.count.tolist() == [[20], [1]]
    assert evidence.table.control_count.tolist() == [20, 1]
    for values in (evidence.variance, evidence.control_variance):
        assert np.isfinite(values).all()
        np.testing.assert_allclose(values[1], 20 * values[0], rtol=1.5)
    assert np.isfinite(expected_shift(evidence, "b", ("A",), choose_anchors(evidence))).all()


def test_additive_doubles_are_found_by_the_sum_of_their_parts():
    """Protects the start of flows of combinations: of all simple predictions the sum is chosen, at its full size."""
    parts = {(name,): _effect(2 * i, 2 * i + 1, size=1.5 - i) for i, name in enumerate("ABCD")}
    doubles = {(p, q): parts[p,] + parts[q,] for p, q in ("AB", "AC", "BD", "CD")}
    evidence = _evidence({**parts, **doubles})
    rules = choose_anchors(evidence)
    best = [rule for rule in rules if rule.kind == "all"][0]
    assert best.name == "additive"
    assert 0.9 < best.scale <= 1  # chance errors of the sources pull it a little below one
    assert best.error < 0.1
    expected = expected_shift(evidence, "a", ("A", "B"), rules)
    np.testing.assert_allclose(expected, doubles["A", "B"], atol=0.25)
    # what was not measured itself is the sum as well
    np.testing.assert_allclose(expected_shift(evidence, "a", ("A", "D"), rules), parts["A",] + parts["D",], atol=0.25)


def test_nothing_is_expected_where_nothing_happens():
    """Protects null screens: an effect that no held-out group shows must not be claimed."""
    evidence = _evidence({(name,): np.zeros(N_GENES) for name in "ABCDEF"}, n_cells=200)
    shift = expected_shift(evidence, "a", ("A",), choose_anchors(evidence))
    assert np.abs(shift).max() < 0.1
    assert (expected_shift(evidence, "a", (), choose_anchors(evidence)) == 0).all()


def test_an_expectation_never_sees_what_it_predicts():
    """Protects the cross-fit: training groups get the anchor they would get if they had not been measured."""
    effects = {(name,): _effect(i) for i, name in enumerate("ABCDE")}
    one = _evidence(effects, contexts=("a", "b", "c"))
    other = _evidence({**effects, ("A",): _effect(30, size=9.0)}, contexts=("a", "b", "c"))
    table = one.table
    shift = table.shift.copy()
    shift[0, 0] = other.table.shift[0, 0]
    changed = replace(one, table=replace(table, shift=shift))
    rules = choose_anchors(one)
    np.testing.assert_allclose(expected_shift(one, "a", ("A",), rules), expected_shift(changed, "a", ("A",), rules))


def test_a_response_is_made_smaller_where_contexts_disagree():
    """Protects from carrying an effect over in full where other contexts say that half of it is right."""
    effect = {("A",): _effect(*range(10))}
    agree = _evidence(effect, contexts=tuple("abcd"))
    np.testing.assert_allclose(context_response(agree, "a", ("A",)), _effect(*range(10)), atol=0.35)
    rng = np.random.default_rng(1)
    x, conditions, where = _screen({("A",): np.zeros(N_GENES)}, contexts=tuple("abcd"))
    for c in "abcd":  # every context answers in its own way
        rows = np.array([k == ("A",) and w == c for k, w in zip(conditions, where, strict=True)])
        x[rows] += rng.normal(size=N_GENES) * 2
    disagree = Evidence.from_cells(x, conditions, where, [f"g{i}" for i in range(N_GENES)])
    carried = similar_contexts(disagree, "a", ("A",))
    assert np.linalg.norm(context_response(disagree, "a", ("A",))) < 0.5 * np.linalg.norm(carried)


def test_a_response_needs_two_other_contexts():
    """Protects from fitting two numbers to nothing."""
    evidence = _evidence({("A",): _effect(0)}, contexts=("a", "b"))
    assert context_response(evidence, "a", ("A",)) is None
    assert similar_contexts(evidence, "a", ("A",)) is not None
    assert similar_contexts(evidence, "a", ("unknown",)) is None


def test_similar_contexts_count_most():
    """Protects the choice of the source: the context with the same control cells decides."""
    x, conditions, where = _screen({("A",): np.zeros(N_GENES)}, contexts=("near", "far", "here"), noise=0.05)
    where = np.array(where)
    perturbed = np.array([k == ("A",) for k in conditions])
    x[where == "near"] += x[where == "here"][0] - x[where == "near"][0]
    x[(where == "near") & perturbed] += _effect(3)
    x[(where == "far") & perturbed] += _effect(7)
    evidence = Evidence.from_cells(x, conditions, where.tolist(), [f"g{i}" for i in range(N_GENES)])
    shift = similar_contexts(evidence, "here", ("A",))
    assert shift[3] > 5 * abs(shift[7])


def test_without_rules_nothing_is_expected():
    """Protects flows without an anchor: not even a combination of measured parts is shifted."""
    evidence = _evidence({("A",): _effect(0), ("B",): _effect(1)})
    assert (expected_shift(evidence, "a", ("A", "B"), []) == 0).all()


@pytest.mark.filterwarnings("error")
def test_flat_profiles_are_all_alike():
    """Protects detection rates of dense data, which are 1 for all genes: no division by zero, no NaN."""
    x, conditions, where = _screen({("A",): _effect(0)}, contexts=("a", "b", "c"), noise=0.0)
    x[np.array([not k for k in conditions])] = 1.0
    evidence = Evidence.from_cells(x, conditions, where, [f"g{i}" for i in range(N_GENES)])
    assert np.isfinite(similar_contexts(evidence, "a", ("A",))).all()
    assert np.isfinite(context_response(evidence, "a", ("A",))).all()


@pytest.mark.parametrize(
    ("condition", "kind"), [(("A",), "single"), (("A", "B"), "all"), (("A", "x"), "some"), (("x", "y"), "none")]
)
def test_kinds_of_conditions(condition, kind):
    """Protects that rules are not carried over from doubles of known parts to doubles of unknown ones."""
    evidence = _evidence({("A",): _effect(0), ("B",): _effect(1), ("A", "y"): _effect(2)})
    assert condition_kind(evidence.table, condition) == kind


def test_contexts_are_put_in_order():
    """Protects the places of contexts: new ones come with their own control means and nothing else."""
    evidence = _evidence({("A",): _effect(0)}, contexts=("b", "a"))
    grown = with_contexts(evidence, ("b", "new", "a"), np.ones((1, N_GENES)), np.array([7]))
    assert grown.table.contexts == ("b", "new", "a")
    np.testing.assert_array_equal(grown.table.control_mean[1], np.ones(N_GENES))
    assert grown.table.control_count.tolist() == [60, 7, 60]
    assert not grown.table.is_observed[1].any()
    np.testing.assert_array_equal(grown.table.shift[2], evidence.table.shift[evidence.table.row("a")])


def test_rules_survive_their_plain_form():
    """Protects saved models: what was chosen is what is read."""
    rule = AnchorRule("additive", "all", 0.5, 0.2, 7, "half")
    assert AnchorRule.from_dict(rule.to_dict()) == rule


def test_noise_is_shrunken_and_effects_are_not():
    """Protects the denoising: chance errors almost vanish, clear effects stay, and nothing changes its sign."""
    rng = np.random.default_rng(0)
    truth = np.concatenate([rng.normal(0, 3, 60), np.zeros(940)])
    variance = np.full(1000, 0.25)
    estimate = truth + 0.5 * rng.normal(size=1000)
    shrunk = posterior_effects(estimate, variance)
    assert (np.sign(shrunk) * np.sign(estimate) >= 0).all()
    assert (np.abs(shrunk) <= np.abs(estimate) + 1e-12).all()
    assert np.square(shrunk - truth).sum() < 0.35 * np.square(estimate - truth).sum()
    large = np.abs(truth) > 4
    np.testing.assert_allclose(shrunk[large], estimate[large], rtol=0.1)


@pytest.mark.parametrize("n_effects", [0, 60, 1000])
def test_the_risk_tells_the_true_error(n_effects):
    """Protects the choice of how much to shrink: the estimate, which does not know the truth, is near the real error."""
    rng = np.random.default_rng(2)
    truth = np.concatenate([rng.normal(0, 1.5, n_effects), np.zeros(1000 - n_effects)])
    variance = rng.uniform(0.1, 0.4, 1000)
    estimate = truth + np.sqrt(variance) * rng.normal(size=1000)
    for how in ("none", "half", "full"):
        real = np.square(shrink_effects(estimate, variance, how) - truth).sum()
        assert shrinkage_risk(estimate, variance, variance, how) == pytest.approx(real, abs=0.2 * variance.sum())
