"""Tables of mean shifts and the simple predictions that follow from them."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import pearsonr
from sklearn.linear_model import Ridge

from cellweave.stats import SHIFT_PREDICTORS, ShiftTable, group_means
from cellweave.stats import _shifts as shifts

GENES = tuple("ABCDEFGH")


def table_of(shift: dict[tuple[str, tuple[str, ...]], list[float]], contexts: dict[str, list[float]]) -> ShiftTable:
    """A table from shifts by (context, condition) and control means by context."""
    names, conditions = tuple(contexts), tuple(sorted({condition for _, condition in shift}))
    values = np.full((len(names), len(conditions), len(GENES)), np.nan)
    count = np.zeros(values.shape[:2], dtype=np.int64)
    for (context, condition), value in shift.items():
        at = names.index(context), conditions.index(condition)
        values[at], count[at] = value, 20
    return ShiftTable(names, conditions, np.array([*contexts.values()]), np.full(len(names), 50), values, count, GENES)


def random_table(n_contexts: int = 4, n_singles: int = 6, seed: int = 0) -> ShiftTable:
    rng = np.random.default_rng(seed)
    contexts = {f"c{i}": rng.random(len(GENES)).tolist() for i in range(n_contexts)}
    conditions = [(gene,) for gene in GENES[:n_singles]] + [("A", "B")]
    return table_of({(c, p): rng.normal(size=len(GENES)).tolist() for c in contexts for p in conditions}, contexts)


@given(st.integers(0, 2**16), st.booleans(), st.integers(1, 40))
def test_group_means_equal_plain_means(seed, sparse, n_cells):
    """Protects the arithmetic behind everything: means of groups, also empty ones, also of cells in no group."""
    rng = np.random.default_rng(seed)
    x = rng.poisson(0.7, size=(n_cells, 5)).astype(np.float32)
    codes = rng.integers(-1, 4, size=n_cells)
    means, count = group_means(sp.csr_matrix(x) if sparse else x, codes, 4)
    for group in range(4):
        cells = x[codes == group]
        assert count[group] == len(cells)
        np.testing.assert_allclose(means[group], cells.mean(axis=0) if len(cells) else np.full(5, np.nan), atol=1e-6)


@pytest.mark.parametrize("sparse", [False, True])
def test_group_means_in_blocks(sparse, monkeypatch):
    """Protects data larger than a block: cutting between rows loses and repeats nothing."""
    x = np.random.default_rng(0).poisson(1.0, size=(50, 7)).astype(np.float64)
    codes = np.arange(50) % 3
    whole, _ = group_means(x, codes, 3)
    monkeypatch.setattr(shifts, "_BLOCK_VALUES", 20)
    parts, _ = group_means(sp.csc_matrix(x) if sparse else x, codes, 3)
    np.testing.assert_allclose(parts, whole)


def test_table_of_cells():
    """Protects the meaning of the table: shifts are within a context, and unobserved ones are NaN."""
    x = np.array([[1.0, 0], [3, 0], [5, 1], [9, 9], [2, 2]])
    conditions = [(), (), ("A",), ("B", "C"), ()]
    table = ShiftTable.from_cells(sp.csr_matrix(x), conditions, ["u", "u", "u", "v", "w"], ["g", "h"])
    assert table.contexts == ("u", "v", "w")
    assert table.conditions == (("A",), ("B", "C"))
    np.testing.assert_array_equal(table.control_count, [2, 0, 1])
    np.testing.assert_array_equal(table.count, [[1, 0], [0, 1], [0, 0]])
    np.testing.assert_allclose(table.shift[0, 0], [3, 1])
    # no control cells in "v": its perturbed cells have no shift
    assert np.isnan(table.shift[1]).all()
    assert table.is_observed.tolist() == [[True, False], [False, False], [False, False]]


def test_lengths_must_fit():
    """Protects against labels of other cells: a mismatch is an error with the numbers."""
    with pytest.raises(ValueError, match="`x` has 3 cells and 2 genes, but there are 2 `conditions`"):
        ShiftTable.from_cells(np.zeros((3, 2)), [(), ()], ["", "", ""], ["g", "h"])


def test_without_forgets_one_shift_only():
    """Protects cross-fitting: a left-out shift is seen by no predictor, and the table itself is not changed."""
    table = random_table()
    left = table.without("c1", ("A",))
    assert shifts.observed(left, "c1", ("A",)) is None
    assert shifts.observed(table, "c1", ("A",)) is not None
    others = np.delete(table.shift[:, table.column(("A",))], 1, axis=0)
    np.testing.assert_allclose(shifts.context_mean(left, "c0", ("A",)), others[1:].mean(axis=0))
    kept = np.delete(table.shift[1], table.column(("A",)), axis=0)
    np.testing.assert_allclose(shifts.perturbed_mean(left, "c1", ("A",)), kept.mean(axis=0))
    assert table.without("nowhere", ("A",)) is table


@pytest.mark.parametrize("name", [name for name in SHIFT_PREDICTORS if name not in ("no_change", "observed")])
def test_no_predictor_sees_what_was_left_out(name):
    """Protects honest scores: what was left out of the table changes no prediction of it."""
    table = random_table()
    condition = ("A", "B") if name == "additive" else ("A",)
    column = table.column(condition)
    moved = table.shift.copy()
    moved[2, column] += 100
    other = ShiftTable(
        table.contexts, table.conditions, table.control_mean, table.control_count, moved, table.count, GENES
    )
    predict = SHIFT_PREDICTORS[name]
    first, second = (predict(t.without("c2", condition), "c2", condition) for t in (table, other))
    np.testing.assert_array_equal(first, second)
    assert first is not None


def test_few_cells_are_forgotten():
    """Protects baselines from noise: shifts that rest on too few cells are not used."""
    table = ShiftTable.from_cells(np.eye(4), [(), ("A",), ("A",), ("B",)], [""] * 4, list("wxyz"))
    assert shifts.observed(table.at_least(2), "", ("A",)) is not None
    assert shifts.observed(table.at_least(2), "", ("B",)) is None


def test_other_control_cells_move_all_shifts():
    """Protects disjoint control halves: the perturbed means stay, the control means are replaced."""
    table = random_table()
    moved = table.with_control(table.control_mean + 1.5, table.control_count)
    np.testing.assert_allclose(moved.shift, table.shift - 1.5)
    np.testing.assert_allclose(moved.shift + moved.control_mean[:, None], table.shift + table.control_mean[:, None])


def test_additive_sums_what_is_known():
    """Protects the additive baseline: known parts are added, an unknown one is the average single perturbation."""
    one, two, both = [1.0] * 8, [3.0] * 8, [50.0] * 8
    table = table_of({("u", ("A",)): one, ("u", ("B",)): two, ("u", ("A", "B")): both}, {"u": [0.0] * 8})
    assert shifts.additive(table, "u", ("A", "B"))[0] == 4  # the measured double is not used
    assert shifts.additive(table, "u", ("A", "Z"))[0] == 1 + 2
    assert shifts.additive(table, "u", ("Y", "Z"))[0] == 2 + 2
    assert shifts.additive(table, "u", ("A",)) is None
    # a context without perturbations borrows those of the others
    assert shifts.additive(table, "unknown", ("A", "B"))[0] == 4


def test_perturbed_mean_prefers_its_own_context():
    """Protects the mean of perturbations: singles and doubles weigh the same, and other contexts are the last resort."""
    table = table_of(
        {("u", ("A",)): [1.0] * 8, ("u", ("A", "B")): [4.0] * 8, ("v", ("A",)): [9.0] * 8},
        {"u": [0.0] * 8, "v": [0.0] * 8, "w": [0.0] * 8},
    )
    assert shifts.perturbed_mean(table, "u", ("C",))[0] == 2.5
    assert shifts.perturbed_mean(table, "w", ("C",))[0] == (5 + 4) / 2


def test_nearest_context_is_the_most_correlated():
    """Protects the choice of the context: by correlation, not by distance."""
    rng = np.random.default_rng(1)
    means = {name: rng.random(8) for name in "abcd"}
    means["d"] = 5 * means["b"] + 10 + 0.01 * rng.random(8)
    shift = {(name, ("A",)): [float(i)] * 8 for i, name in enumerate("abc")}
    table = table_of(shift, {name: value.tolist() for name, value in means.items()})
    best = max("abc", key=lambda name: pearsonr(means[name], means["d"])[0])
    assert shifts.nearest_context(table, "d", ("A",))[0] == "abc".index(best) == 1
    assert shifts.nearest_context(table, "unknown", ("A",)) is None


def test_linear_context_is_a_ridge_regression():
    """Protects the linear map: the same as scikit-learn's ridge on the leading axes of the control means."""
    table = random_table(n_contexts=5)
    others = [0, 1, 2, 3]
    control, shift = table.control_mean[others], table.shift[others, table.column(("A",))]
    centred = control - control.mean(axis=0)
    axes = np.linalg.svd(centred, full_matrices=False)[2][:3].T
    z = centred @ axes
    ridge = Ridge(alpha=0.1 * np.trace(z.T @ z) / 3).fit(z, shift)
    expected = ridge.predict((table.control_mean[[4]] - control.mean(axis=0)) @ axes)[0]
    np.testing.assert_allclose(shifts.linear_context(table, "c4", ("A",)), expected)


def test_gene_linear_is_for_single_measured_genes():
    """Protects the bilinear map from conditions it says nothing about, and from a table with too few of them."""
    table = random_table(n_contexts=1)
    assert shifts.gene_linear(table, "c0", ("H",)).shape == (8,)
    assert shifts.gene_linear(table, "c0", ("A", "B")) is None
    assert shifts.gene_linear(table, "c0", ("not measured",)) is None
    assert shifts.gene_linear(table_of({("u", ("A",)): [1.0] * 8}, {"u": [0.0] * 8}), "u", ("B",)) is None


def test_gene_linear_minimises_its_ridge_problem():
    """Protects the fit: the gradient of the penalised squared error is zero at the solution."""
    table = random_table(n_contexts=1, n_singles=7)
    y = table.shift[0]
    k = round(0.4 * len(y))
    g = np.linalg.svd(y, full_matrices=False)[2][:k].T
    single = [i for i, condition in enumerate(table.conditions) if len(condition) == 1]
    p = g[[GENES.index(table.conditions[i][0]) for i in single]]
    b = y[single].mean(axis=0)
    predicted = np.stack([shifts.gene_linear(table, "c0", table.conditions[i]) for i in single])
    # G is orthonormal, so W is read off from the predictions of the training genes
    w = np.linalg.lstsq(p, (predicted - b) @ g, rcond=None)[0].T
    gradient = g.T @ (predicted - y[single]).T @ p + 0.1 * w
    np.testing.assert_allclose(gradient, 0, atol=1e-10)


@pytest.mark.parametrize("name", SHIFT_PREDICTORS)
def test_predictors_accept_the_unknown(name):
    """Protects callers: an unknown condition or context gives None or a shift, never an error or NaN."""
    table = random_table()
    for context, condition in (("c0", ("X", "Y")), ("nowhere", ("A",)), ("c0", ("A",)), ("nowhere", ("A", "B"))):
        found = SHIFT_PREDICTORS[name](table, context, condition)
        assert found is None or np.isfinite(found).all()
