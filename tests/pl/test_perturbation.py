"""Figures of predicted perturbations: what is drawn is what was computed, and bad input is explained."""

from __future__ import annotations

from collections.abc import Callable

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.text import Text
from scipy.stats import false_discovery_control, mannwhitneyu, pearsonr

from cellweave.pl import (
    de_agreement,
    perturbation_embedding,
    perturbation_genes,
    perturbation_scores,
    perturbation_shift,
)

N_GENES, N_CONTROL, N_CELLS = 40, 120, 90
GENES = [f"gene{j}" for j in range(N_GENES)]
KINDS = [
    "called in both, same direction",
    "called in both, opposite",
    "measured only",
    "predicted only",
    "neither",
]
DRAWINGS: list[Callable] = [de_agreement, perturbation_embedding, perturbation_genes, perturbation_shift]


@pytest.fixture(autouse=True)
def _no_window():
    with mpl.rc_context({"backend": "Agg"}):
        yield
    plt.close("all")


def expression(rates: np.ndarray, n_cells: int, seed: int) -> np.ndarray:
    """Log-normalised cells with mostly zeros."""
    counts = np.random.default_rng(seed).poisson(rates, (n_cells, len(rates))).astype(np.float32)
    return np.log1p(3 * counts)


def cells(x: np.ndarray, labels: list[str], genes: list[str] = GENES) -> AnnData:
    obs = pd.DataFrame({"perturbation": labels}, index=[f"c{i}" for i in range(len(x))])
    return AnnData(sp.csr_matrix(x), obs=obs, var=pd.DataFrame(index=genes))


@pytest.fixture
def data() -> tuple[AnnData, AnnData]:
    """Prediction and measurement: genes 0-2 rise in both, 3 only as measured, 4 only as predicted, 5 falls instead."""
    base = np.full(N_GENES, 0.4)
    measured, predicted = base.copy(), base.copy()
    measured[[0, 1, 2, 3, 5]] = [4.0, 3.0, 2.0, 2.5, 2.2]
    predicted[[0, 1, 2, 4]] = [4.0, 2.5, 2.0, 2.5]
    predicted[5] = 0.02
    base[5] = 0.8
    x = np.concatenate([expression(base, N_CONTROL, 0), expression(measured, N_CELLS, 1)])
    true = cells(x, ["control"] * N_CONTROL + ["A+B"] * N_CELLS)
    return cells(expression(predicted, 60, 2), ["A+B"] * 60), true


def dense(adata: AnnData, label: str) -> np.ndarray:
    return adata[adata.obs["perturbation"] == label].X.toarray().astype(float)


def texts(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.texts]


# ---------------------------------------------------------------- shifts


def test_shifts_are_means_less_control_means(data):
    """Protects the numbers of the points and the correlation in the title."""
    pred, true = data
    ax = perturbation_shift(pred, true, "A+B", split_control=False)
    control = dense(true, "control").mean(0)
    x, y = dense(true, "A+B").mean(0) - control, dense(pred, "A+B").mean(0) - control
    np.testing.assert_allclose(ax.collections[0].get_offsets(), np.column_stack([x, y]), atol=1e-6)
    assert ax.get_title(loc="left") == f"A+B: r = {pearsonr(x, y).statistic:.2f} (shared control cells)"
    assert "90 cells" in ax.get_xlabel()
    assert "60 cells" in ax.get_ylabel()
    identity = ax.lines[0]
    np.testing.assert_array_equal(identity.get_xdata(), identity.get_ydata())
    assert ax.get_xlim() == ax.get_ylim()


def test_disjoint_halves_show_that_nothing_was_predicted():
    """Protects from a correlation that only the noise of shared control cells makes."""
    rates, shared, split = np.full(N_GENES, 0.4), [], []
    for seed in range(8):
        x = np.concatenate([expression(rates, 20, 3 * seed), expression(rates, 200, 3 * seed + 1)])
        true = cells(x, ["control"] * 20 + ["A"] * 200)
        pred = cells(expression(rates, 200, 3 * seed + 2), ["A"] * 200)
        for values, flag in ((shared, False), (split, True)):
            points = perturbation_shift(pred, true, "A", split_control=flag).collections[0].get_offsets()
            values.append(pearsonr(*np.asarray(points).T).statistic)
            plt.close("all")
    assert np.mean(shared) > 0.6
    assert abs(np.mean(split)) < 0.2


def test_halves_are_disjoint_and_cover_all_control_cells(data):
    """Protects the split: the mean of the two control means is that of all control cells, and the halves differ."""
    pred, true = data
    points = np.asarray(perturbation_shift(pred, true, "A+B").collections[0].get_offsets())
    halves = [dense(adata, "A+B").mean(0) - shift for adata, shift in ((true, points[:, 0]), (pred, points[:, 1]))]
    np.testing.assert_allclose(np.mean(halves, axis=0), dense(true, "control").mean(0), atol=1e-6)
    assert np.abs(halves[0] - halves[1]).max() > 0.01
    again = np.asarray(perturbation_shift(pred, true, "A+B", seed=1).collections[0].get_offsets())
    assert np.abs(again - points).max() > 0.01


def test_the_largest_shifts_are_named_without_overlap(data):
    """Protects the labels: the genes that change most, each readable and inside the axes."""
    pred, true = data
    ax = perturbation_shift(pred, true, "A+B", n_labels=12, split_control=False)
    points = np.asarray(ax.collections[0].get_offsets())
    top = np.argsort(-np.abs(points[:, 0]), kind="stable")[:12]
    np.testing.assert_allclose(ax.collections[1].get_offsets(), points[top])
    assert {"gene0", "gene1", "gene2", "gene3"} <= set(texts(ax)) <= {GENES[i] for i in top}
    ax.figure.canvas.draw()
    boxes = [Text.get_window_extent(text) for text in ax.texts]  # without the lines to the points
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])
    inside = ax.get_window_extent()
    assert all(inside.x0 <= box.x0 and box.x1 <= inside.x1 for box in boxes)


def test_genes_are_matched_by_name(data):
    """Protects from points that compare two different genes."""
    pred, true = data
    order = np.random.default_rng(0).permutation(N_GENES)
    points = np.asarray(perturbation_shift(pred, true, "A+B").collections[0].get_offsets())
    shuffled = perturbation_shift(pred, true[:, order].copy(), "A+B").collections[0].get_offsets()
    np.testing.assert_allclose(shuffled, points, atol=1e-6)


# ---------------------------------------------------------------- differential expression


def test_calls_are_those_of_the_rank_sum_test(data):
    """Protects the colours and the counts of the legend."""
    pred, true = data
    ax = de_agreement(pred, true, "A+B", split_control=False, alpha=0.01)
    control, calls, folds = dense(true, "control"), [], []
    for group in (dense(true, "A+B"), dense(pred, "A+B")):
        p = np.array([mannwhitneyu(group[:, j], control[:, j], method="asymptotic").pvalue for j in range(N_GENES)])
        calls.append(false_discovery_control(p) < 0.01)
        folds.append(np.log2((np.expm1(group).mean(0) + 0.1) / (np.expm1(control).mean(0) + 0.1)))
    both, same = calls[0] & calls[1], np.sign(folds[0]) == np.sign(folds[1])
    masks = dict(zip(KINDS, [both & same, both & ~same, calls[0] & ~calls[1], calls[1] & ~calls[0],
                             ~calls[0] & ~calls[1]], strict=True))  # fmt: skip
    assert [mask.sum() > 0 for mask in masks.values()] == [True] * 5  # the data hold every kind
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [f"{k} ({m.sum()})" for k, m in masks.items()]
    drawn = {c.get_label().rsplit(" (", 1)[0]: np.asarray(c.get_offsets()) for c in ax.collections}
    for kind, mask in masks.items():
        np.testing.assert_allclose(drawn[kind], np.column_stack(folds)[mask], atol=1e-5)


def test_genes_that_nothing_expresses_are_not_called(data):
    """Protects from NaN p-values of constant genes, which would make all of them NaN."""
    pred, true = (adata.copy() for adata in data)
    for adata in (pred, true):
        values = adata.X.toarray()
        values[:, 30:] = 0
        adata.X = sp.csr_matrix(values)
    ax = de_agreement(pred, true, "A+B")
    drawn = {c.get_label().rsplit(" (", 1)[0]: c.get_offsets() for c in ax.collections}
    assert len(drawn["neither"]) >= 10
    assert len(drawn[KINDS[0]]) >= 3
    assert all(np.isfinite(points).all() for points in drawn.values())


@pytest.mark.parametrize(("name", "value"), [("alpha", 0.0), ("alpha", 1.0), ("pseudocount", 0.0)])
def test_wrong_thresholds_are_explained(data, name: str, value: float):
    """Protects from an empty figure or infinite fold changes."""
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        de_agreement(*data, "A+B", **{name: value})


# ---------------------------------------------------------------- single genes


def test_zeros_are_drawn_as_their_share(data):
    """Protects the reading of zeros: the number, the width of the bar, the width of the shape, and the mean."""
    pred, true = data
    figure = perturbation_genes(pred, true, "A+B", genes=["gene3", "gene7"])
    assert [ax.get_title() for ax in figure.axes] == ["gene3", "gene7"]
    for ax, gene in zip(figure.axes, (3, 7), strict=True):
        groups = [dense(true, "control"), dense(true, "A+B"), dense(pred, "A+B")]
        assert [label.get_text() for label in ax.get_xticklabels()] == ["control", "measured", "predicted"]
        for place, group in enumerate(groups):
            share = (group[:, gene] <= 0).mean()
            assert texts(ax)[place] == f"{share:.0%}"
            assert ax.patches[place].get_width() / 0.84 == pytest.approx(share)
            outline = ax.collections[2 * place].get_paths()[0].vertices
            assert np.ptp(outline[:, 0]) / 0.84 == pytest.approx(1 - share, abs=1e-6)
            positive = group[:, gene][group[:, gene] > 0]
            assert positive.min() <= outline[:, 1].min() <= outline[:, 1].max() <= positive.max() + 1e-6
            mean = np.asarray(ax.collections[2 * place + 1].get_offsets())[0]
            np.testing.assert_allclose(mean, [place, group[:, gene].mean()], rtol=1e-6)


def test_the_default_genes_change_most(data):
    """Protects the choice of genes: by the measured shift, not by the predicted one."""
    pred, true = data
    shift = np.abs(dense(true, "A+B").mean(0) - dense(true, "control").mean(0))
    figure = perturbation_genes(pred, true, "A+B", n_genes=4)
    assert [ax.get_title() for ax in figure.axes] == [GENES[i] for i in np.argsort(-shift)[:4]]
    assert len(perturbation_genes(pred, true, "A+B", n_genes=7).axes) == 7
    assert [ax.get_title() for ax in perturbation_genes(pred, true, "A+B", genes="gene9").axes] == ["gene9"]


def test_few_cells_with_a_gene_are_drawn_one_by_one(data):
    """Protects from a density that is made from three cells; and from negative values that count as expression."""
    pred, true = data[0].copy(), data[1]
    values = pred.X.toarray()
    values[:, 8] = -0.1
    values[:3, 8] = [0.5, 1.5, 2.5]
    pred.X = values
    ax = perturbation_genes(pred, true, "A+B", genes=["gene8"]).axes[0]
    np.testing.assert_allclose(ax.collections[4].get_offsets(), [[2, 0.5], [2, 1.5], [2, 2.5]])
    assert texts(ax)[2] == "95%"


# ---------------------------------------------------------------- embedding


def test_components_are_those_of_measured_cells(data):
    """Protects the picture from being bent by the prediction, and the places of cells in it."""
    pred, true = data
    ax = perturbation_embedding(pred, true, "A+B")
    control, measured, predicted = dense(true, "control"), dense(true, "A+B"), dense(pred, "A+B")
    fitted = np.concatenate([control, measured])
    _, values, axes = np.linalg.svd(fitted - fitted.mean(0), full_matrices=False)
    share = values**2 / (values**2).sum()
    assert f"PC1 ({share[0]:.1%}" in ax.get_xlabel()
    assert f"PC2 ({share[1]:.1%}" in ax.get_ylabel()
    for collection, group in zip(ax.collections[:3], (control, measured, predicted), strict=True):
        expected = (group - fitted.mean(0)) @ axes[:2].T
        drawn = np.asarray(collection.get_offsets())
        np.testing.assert_allclose(np.sort(np.abs(drawn), 0), np.sort(np.abs(expected), 0), atol=1e-6)
    for collection, group in zip(ax.collections[3:6], (control, measured, predicted), strict=True):
        expected = (group.mean(0) - fitted.mean(0)) @ axes[:2].T
        np.testing.assert_allclose(np.abs(collection.get_offsets()[0]), np.abs(expected), atol=1e-6)


def test_few_and_many_cells_give_the_same_components(data):
    """Protects the two ways to compute components: with fewer cells than genes, and with more."""
    pred, true = data
    wide = [AnnData(sp.hstack([a.X, sp.csr_matrix((a.n_obs, 400))]).tocsr(), obs=a.obs) for a in (pred, true)]
    places = [np.asarray(perturbation_embedding(*pair, "A+B").collections[2].get_offsets()) for pair in (data, wide)]
    np.testing.assert_allclose(np.abs(places[0]), np.abs(places[1]), atol=1e-6)


def test_a_component_that_is_not_there_is_explained(data):
    """Protects from an axis that shows rounding errors."""
    with pytest.raises(ValueError, match=r"`components`=\(1, 41\) asks for more than the 40"):
        perturbation_embedding(*data, "A+B", components=(1, 41))


# ---------------------------------------------------------------- what all of them refuse


@pytest.mark.parametrize("draw", DRAWINGS)
def test_objects_stay_as_they_were(data, draw):
    """Protects the user's data: nothing is written, converted or reordered."""
    before = [adata.copy() for adata in data]
    state = np.random.get_state()[1].copy()
    draw(*data, "A+B")
    for adata, old in zip(data, before, strict=True):
        assert sp.issparse(adata.X)
        assert (adata.X != old.X).nnz == 0
        pd.testing.assert_frame_equal(adata.obs, old.obs)
        assert adata.uns == old.uns
        assert not len(adata.obsm)
    np.testing.assert_array_equal(np.random.get_state()[1], state)


@pytest.mark.parametrize("draw", DRAWINGS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"perturbation_key": "guide"}, KeyError, "`perturbation_key`='guide' is not a column of `pred.obs`"),
        ({"layer": "log"}, KeyError, "`true.layers` has no 'log'"),
        ({"perturbation": "C"}, ValueError, "`perturbation`='C' has 0 cells in `true.obs"),
        ({"perturbation": "control"}, ValueError, "is the label of control cells"),
        ({"control_key": "ctrl"}, ValueError, "`control_key`='ctrl' has 0 cells"),
    ],
)
def test_wrong_names_are_explained(data, draw, change: dict, error: type[Exception], message: str):
    """Protects the user from a stack trace: one sentence names the field and what was found."""
    pred, true = data
    with pytest.raises(error) as caught:
        draw(pred, true, **({"perturbation": "A+B"} | change))
    assert message in str(caught.value.args[0])
    assert str(caught.value.args[0]).endswith(".")


@pytest.mark.parametrize("draw", DRAWINGS)
def test_wrong_values_are_explained(data, draw):
    """Protects from figures of counts, of missing values, and of genes that only one object has."""
    pred, true = data
    counts, missing = true.copy(), pred.copy()
    counts.X = np.round(np.expm1(true.X.toarray()) / 3)
    with pytest.raises(ValueError, match=r"`true\.X` holds whole numbers up to \d+, which are counts; log-normalise"):
        draw(pred, counts, "A+B")
    values = pred.X.toarray()
    values[3, 3] = np.nan
    missing.X = values
    with pytest.raises(ValueError, match=r"`pred\.X` has 1 missing or infinite values"):
        draw(missing, true, "A+B", **({"genes": "gene3"} if draw is perturbation_genes else {}))
    with pytest.raises(ValueError, match=r"1 of \d+ genes are not in `true\.var_names` \(first: 'gene0'\)"):
        draw(pred, true[:, 1:].copy(), "A+B")


def test_a_layer_is_read(data):
    """Protects ``layer``: counts in ``X`` and log-normalised values in a layer are the usual layout."""
    pred, true = data
    other = true.copy()
    other.layers["log"] = true.X.copy()
    other.X = np.zeros(true.shape, dtype=np.float32)
    points = [perturbation_shift(pred, a, "A+B", layer=name).collections[0].get_offsets()
              for a, name in ((true, None), (other, "log"))]  # fmt: skip
    np.testing.assert_array_equal(*points)


def test_the_users_axes_are_used(data):
    """Protects the composition of several panels by their author."""
    for draw in (de_agreement, perturbation_embedding, perturbation_shift):
        ax = plt.subplots()[1]
        assert draw(*data, "A+B", ax=ax) is ax


# ---------------------------------------------------------------- scores


def score_table(n: int = 3, contexts: tuple[str, ...] = ("",)) -> pd.DataFrame:
    """Scores as ``evaluate_perturbation`` returns them; the additive baseline exists for combinations only."""
    rng = np.random.default_rng(0)
    rows = [
        (f"P{i}", context, method, metric, rng.random(), 50)
        for i in range(n)
        for context in contexts
        for method in ("no_change", "perturbed_mean", "additive", "prediction", "replicate")
        for metric in ("pearson_delta", "mse", "variance_ratio")
        if method != "additive" or i
    ]
    return pd.DataFrame(rows, columns=["perturbation", "context", "method", "metric", "value", "n_true"])


def drawn_scores(ax: Axes) -> dict[str, np.ndarray]:
    return {
        c.get_label(): np.ma.filled(c.get_offsets(), np.nan)
        for c in ax.collections
        if not c.get_label().startswith("_")
    }


def test_every_score_is_drawn_in_its_row():
    """Protects the numbers, the order of rows, and the medians."""
    table = score_table(5)
    figure = perturbation_scores(table, ["pearson_delta", "mse"])
    wide = table[table["metric"] == "pearson_delta"].pivot(index="perturbation", columns="method", values="value")
    order = list(wide["prediction"].sort_values(ascending=False).index)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [*order, "median"]
    for ax, metric in zip(figure.axes, ("pearson_delta", "mse"), strict=True):
        wide = table[table["metric"] == metric].pivot(index="perturbation", columns="method", values="value")
        drawn = drawn_scores(ax)
        assert set(drawn) == set(wide.columns)
        for method, points in drawn.items():
            np.testing.assert_allclose(points[:-1, 0], wide.loc[order, method])
            assert points[-1, 0] == pytest.approx(wide[method].median())
    assert "higher is better" in figure.axes[0].get_xlabel()
    assert "lower is better" in figure.axes[1].get_xlabel()


@pytest.mark.parametrize("metric", ["mse", "variance_ratio"])
def test_the_best_prediction_stands_on_top(metric: str):
    """Protects the order for errors, where the best is the lowest, and for ratios, where it is one."""
    table = score_table(6)
    values = table[(table["metric"] == metric) & (table["method"] == "prediction")].set_index("perturbation")["value"]
    best = (values if metric == "mse" else (values - 1).abs()).idxmin()
    assert perturbation_scores(table, metric).axes[0].get_yticklabels()[0].get_text() == best


def test_contexts_are_named_where_there_are_several():
    """Protects from two cell types in one row."""
    ax = perturbation_scores(score_table(2, ("B cell", "T cell"))).axes[0]
    names = {label.get_text() for label in ax.get_yticklabels()}
    assert names == {"P0 · B cell", "P0 · T cell", "P1 · B cell", "P1 · T cell", "median"}


def test_predictions_are_told_from_baselines():
    """Protects the legend: baselines first, then predictions by their names, then the replicate."""
    table = score_table()
    second = table[table["method"] == "prediction"].assign(method="with Stack")
    figure = perturbation_scores(pd.concat([table, second]))
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["no change", "mean of perturbations", "additive", "prediction", "with Stack", "replicate"]
    colors = {c.get_label(): tuple(c.get_facecolor()[0]) for c in figure.axes[0].collections if c.get_label()[0] != "_"}
    assert colors["prediction"] != colors["with Stack"]
    only = perturbation_scores(table, methods=["prediction", "replicate"])
    assert set(drawn_scores(only.axes[0])) == {"prediction", "replicate"}


def test_many_perturbations_become_columns():
    """Protects the readability of large screens: a column per method, all values in it, its median printed."""
    table = score_table(80)
    ax = perturbation_scores(table, "pearson_delta").axes[0]
    wide = table[table["metric"] == "pearson_delta"].pivot(index="perturbation", columns="method", values="value")
    for method, points in drawn_scores(ax).items():
        np.testing.assert_allclose(points[:, 1], np.sort(wide[method].dropna()))
        assert np.ptp(points[:, 0]) < 0.8
    assert texts(ax) == [
        f"{wide[m].median():.2g}" for m in ("no_change", "perturbed_mean", "additive", "prediction", "replicate")
    ]
    assert "additive (79)" in [label.get_text() for label in ax.get_xticklabels()]


def test_score_tables_stay_as_they_were():
    """Protects the user's table."""
    table = score_table()
    before = table.copy()
    perturbation_scores(table)
    pd.testing.assert_frame_equal(table, before)


def test_wrong_tables_are_explained():
    """Protects from averages over seeds that nobody asked for, and from empty panels."""
    table = score_table()
    with pytest.raises(ValueError, match="`scores` has no column 'method'"):
        perturbation_scores(table.drop(columns="method"))
    with pytest.raises(ValueError, match=r"`metric` names \['mmd'\], which `scores` does not have"):
        perturbation_scores(table, "mmd")
    with pytest.raises(ValueError, match=r"`methods` names \['linear'\]"):
        perturbation_scores(table, methods=["linear"])
    with pytest.raises(ValueError, match="values more than once"):
        perturbation_scores(pd.concat([table, table]))
    with pytest.raises(ValueError, match="`ax` holds one panel"):
        perturbation_scores(table, ["mse", "pearson_delta"], ax=plt.subplots()[1])
    with pytest.raises(ValueError, match="`metric`='mse' has no value"):
        perturbation_scores(table.assign(value=table["value"].where(table["metric"] != "mse")), "mse")


def test_scores_of_one_perturbation_are_drawn_once():
    """Protects a figure of one perturbation: its median is itself, and drawn again would look like a second result."""
    rows = [("KO", "no_change", "mse", 2.0), ("KO", "prediction", "mse", 1.0)]
    figure = perturbation_scores(pd.DataFrame(rows, columns=["perturbation", "method", "metric", "value"]), "mse")
    ax = figure.axes[0]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["KO"]
    drawn = {
        dots.get_label(): dots.get_offsets().tolist()
        for dots in ax.collections
        if dots.get_label() in {"no_change", "prediction"}
    }
    assert drawn == {"no_change": [[2.0, 0.0]], "prediction": [[1.0, 0.0]]}
