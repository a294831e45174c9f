"""Figures of populations draw the numbers that are in the AnnData, and explain what is missing."""

from __future__ import annotations

import json

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

from cellweave import pl
from cellweave.io import MarkerTable

LEAVES = ["B", "CD4 T", "CD8 T", "pDC"]
GROUPS = ["B", "T", "T", "pDC"]
MARKERS = ["CD19", "CD4", "CD8", "CD123"]
RHO = 2 * np.eye(4) - 1
SIZES = [300, 500, 150, 50]


@pytest.fixture(autouse=True)
def _no_window():
    with mpl.rc_context({"backend": "Agg"}):
        yield
    plt.close("all")


@pytest.fixture
def table() -> MarkerTable:
    return MarkerTable.parse(
        {"populations": LEAVES, "markers": MARKERS, "rho": RHO.tolist(), "levels": {"lineage": GROUPS}}
    )


@pytest.fixture
def adata(table: MarkerTable) -> AnnData:
    """Four populations in two batches whose measured markers are shifted, and ten cells without a label."""
    rng = np.random.default_rng(0)
    codes = np.repeat(np.arange(4), SIZES)
    latent = RHO[codes] + 0.2 * rng.standard_normal((1000, 4))
    batch = rng.integers(2, size=1000)
    measured = latent + np.array([0, 0.1, 3, 0.2])[None] * batch[:, None]
    obs = pd.DataFrame({"cell_type": np.array(LEAVES)[codes], "batch": np.array(["a", "b"])[batch]})
    obs.index = obs.index.map("cell{}".format)
    adata = AnnData(measured, obs=obs, var=pd.DataFrame(index=MARKERS))
    codes[:10] = -1
    adata.obs["scyan_population"] = pd.Categorical.from_codes(codes, LEAVES)
    adata.obsm["X_scyan"] = pd.DataFrame(latent, adata.obs_names, MARKERS)
    adata.layers["scyan_corrected"] = latent.copy()
    stored = {"parameters": {"table": json.dumps(table.to_dict())}}
    adata.uns["cellweave"] = {"scyan_population": stored}
    return adata


def test_densities_show_the_markers_of_the_population(adata):
    """Protects the choice of markers: what separates a population stands first, and both curves hold all cells."""
    for name, marker in zip(LEAVES, MARKERS, strict=True):
        panels = pl.latent_density(adata, name, n_markers=2).axes
        assert len(panels) == 2 and panels[0].get_xlabel() == marker
        inside, others = (line.get_xydata() for line in panels[0].lines[:2])
        assert abs(inside[inside[:, 1].argmax(), 0] - 1) < 0.3 and abs(others[others[:, 1].argmax(), 0] + 1) < 0.3
        for curve in (inside, others):
            assert curve[:, 1].sum() * (curve[1, 0] - curve[0, 0]) == pytest.approx(1, abs=0.03)
    assert len(pl.latent_density(adata, markers=["CD8"]).axes) == len(LEAVES)


def test_a_profile_places_markers_at_their_means(adata):
    """Protects the profile: names carry the mean latent value, in the order of these values."""
    ax = pl.population_profile(adata, "CD8 T")
    means = adata.obsm["X_scyan"].loc[adata.obs["scyan_population"] == "CD8 T"].mean().sort_values()
    assert [text.get_text() for text in ax.texts] == [f"{name}  {value:+.2f}" for name, value in means.items()]
    drawn = [line.get_ydata()[0] for line in ax.lines[::2]]
    np.testing.assert_allclose(drawn, means.clip(-1.4, 1.4))
    places = [text.get_position()[1] for text in ax.texts]
    assert (np.diff(places) > 0.05).all()  # no two names on each other


def test_batches_are_compared_before_and_after(adata):
    """Protects the comparison: the shifted marker comes first, its distance is gone after correction."""
    figure = pl.batch_correction(adata, "batch")
    before, after = figure.axes[0], figure.axes[4]
    assert after.get_xlabel() == "CD8"
    distances = [float(panel.texts[0].get_text().removeprefix("KS ")) for panel in (before, after)]
    assert distances[0] > 0.7 and distances[1] < 0.2
    adata.layers["scyan_corrected"][:, 2] = np.nan
    panels = pl.batch_correction(adata, "batch").axes
    assert "CD8" not in {panel.get_xlabel() for panel in panels}


def test_markers_that_do_not_follow_are_named():
    """Protects the guard: every marker below 0.7 carries its value and flag, no other one does."""
    frame = pd.DataFrame({"spearman": [0.95, 0.3, -0.5, np.nan], "flag": ["", "ignored", "flipped", ""]}, index=MARKERS)
    ax = pl.marker_monotonicity(frame)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["CD8", "CD4", "CD19"]
    assert [text.get_text() for text in ax.texts] == ["-0.50 flipped", "0.30 ignored"]
    with pytest.raises(ValueError, match="no values in a column 'spearman'"):
        pl.marker_monotonicity(frame[["flag"]])


def test_the_tree_holds_all_populations_and_their_cells(adata, table):
    """Protects the numbers of the tree: a group has the cells of its members, names alone without data."""
    texts = {text.get_text() for text in pl.population_hierarchy(adata).texts}
    assert texts == {
        "all\n990",
        "B  290 (29.3%)",
        "T  650 (65.7%)",
        "CD4 T  500 (50.5%)",
        "CD8 T  150 (15.2%)",
        "pDC  50 (5.1%)",
    }
    for source in (table, table.to_frame()):
        assert {text.get_text() for text in pl.population_hierarchy(source).texts} == {"all", "T", *LEAVES}


def test_groups_that_are_not_in_a_row_are_drawn_together(table):
    """Protects the tree: members of a group that the table lists apart hang on one node."""
    frame = table.to_frame().iloc[[1, 0, 2, 3]]
    texts = {text.get_text(): text for text in pl.population_hierarchy(frame).texts}
    rows = {name: texts[name].xy[1] for name in LEAVES}
    assert rows == {"CD4 T": 0, "CD8 T": 1, "B": 2, "pDC": 3} and texts["T"].xy[1] == 0.5


def test_the_palette_has_a_hue_per_group(adata, table):
    """Protects the palette: members of a group share a hue that no other group has, and all colours differ."""
    palette = pl.population_palette(table)
    assert palette == pl.population_palette(adata) and set(palette) == {*LEAVES, "T"}
    hue = {name: mpl.colors.rgb_to_hsv(color)[0] for name, color in palette.items()}
    assert abs(hue["CD4 T"] - hue["CD8 T"]) < 0.15
    assert min(abs(hue[a] - hue[b]) for a in ("CD4 T", "CD8 T") for b in ("B", "pDC")) > 0.15
    assert len({palette[name] for name in LEAVES}) == 4
    assert not any(key.endswith("_colors") for key in adata.uns)


def test_ratios_carry_intervals_of_wilson(adata):
    """Protects the intervals: the bounds are where the share itself is a score of 1.96 away from what was counted."""
    figure = pl.population_ratios(adata, "batch", populations=["pDC"])
    container = figure.axes[0].containers[0]
    segments = container[2][0].get_segments()
    for sample, ratio, segment in zip("ab", container[0].get_ydata(), segments, strict=True):
        labels = adata.obs.loc[adata.obs["batch"] == sample, "scyan_population"]
        n = int((labels == "pDC").sum())
        assert ratio == pytest.approx(n / len(labels))
        bounds = segment[:, 1]
        score = (ratio - bounds) / np.sqrt(bounds * (1 - bounds) / len(labels))
        np.testing.assert_allclose(score, [1.959964, -1.959964], rtol=1e-5)


@pytest.mark.parametrize("bounds", [("ci_low", "ci_high"), ("low", "high")])
def test_ratios_of_a_frame(bounds):
    """Protects frames: what was computed is drawn, in the order of the samples; a lost column is named."""
    frame = pd.DataFrame({"sample": ["s2", "s1"], "population": "B", "count": 1, "ratio": [0.5, 0.2]})
    with pytest.raises(KeyError, match="no column 'ci_low'"):
        pl.population_ratios(frame)
    frame[list(bounds)] = [[0.4, 0.6], [0.1, 0.4]]
    panel = pl.population_ratios(frame).axes[0]
    np.testing.assert_allclose(panel.containers[0][0].get_ydata(), [0.5, 0.2])
    assert [label.get_text() for label in panel.get_xticklabels()] == ["s2", "s1"]


def test_confusion_is_by_row(adata):
    """Protects the confusion matrix: rows sum to one, in table order, with a column for cells without a label."""
    adata.obs.loc[adata.obs["cell_type"] == "pDC", "scyan_population"] = "B"
    adata.obs["cell_type"] = adata.obs["cell_type"].replace({"CD8 T": "other"})
    ax = pl.annotation_confusion(adata, "cell_type")
    columns, rows = ([label.get_text() for label in labels] for labels in (ax.get_xticklabels(), ax.get_yticklabels()))
    assert columns == [*LEAVES, "no label"]
    assert rows == ["B (300)", "CD4 T (500)", "pDC (50)", "other (150)"]
    expected = np.zeros((4, 5))
    expected[0, [0, 4]] = [290 / 300, 10 / 300]
    expected[1, 1] = expected[2, 0] = expected[3, 2] = 1
    np.testing.assert_allclose(ax.images[0].get_array(), expected)


def test_the_users_axes_and_data_are_kept(adata, table):
    """Protects composed figures and the data: given axes are used, nothing is written."""
    before = adata.copy()
    for draw in (
        lambda ax: pl.population_profile(adata, "B", ax=ax),
        lambda ax: pl.population_hierarchy(table, ax=ax),
        lambda ax: pl.annotation_confusion(adata, "cell_type", ax=ax),
        lambda ax: pl.marker_monotonicity(pd.DataFrame({"spearman": [0.9]}, index=["CD4"]), ax=ax),
    ):
        ax = plt.subplots()[1]
        assert draw(ax) is ax
    pl.latent_density(adata), pl.batch_correction(adata, "batch"), pl.population_ratios(adata, "batch")
    pd.testing.assert_frame_equal(adata.obs, before.obs)
    assert set(adata.uns) == set(before.uns) and set(adata.obsm) == set(before.obsm)


@pytest.mark.parametrize(
    ("draw", "error", "message"),
    [
        (lambda a: pl.latent_density(a, "NK"), ValueError, "`population` names 1 that .*first: 'NK'"),
        (lambda a: pl.latent_density(a, markers=["CD5"]), ValueError, "`markers` names 1 .*'CD5'"),
        (lambda a: pl.latent_density(a, obsm="X_no"), KeyError, "`obsm='X_no'` is not in"),
        (lambda a: pl.latent_density(a, groupby="no"), KeyError, "`groupby='no'` is not a column"),
        (lambda a: pl.population_profile(a, "NK"), ValueError, "`population` names 1"),
        (lambda a: pl.batch_correction(a, "no"), KeyError, "`batch_key='no'` is not a column"),
        (lambda a: pl.batch_correction(a[a.obs["batch"] == "a"].copy(), "batch"), ValueError, "two are needed"),
        (lambda a: pl.batch_correction(a, "batch", layer="no"), KeyError, "has no 'no'"),
        (lambda a: pl.population_hierarchy(a, "cell_type"), KeyError, "has no table for"),
        (lambda a: pl.population_hierarchy("table.csv"), ValueError, "got str"),
        (lambda a: pl.population_ratios(a), KeyError, "`sample_key=None` is not a column"),
        (lambda a: pl.population_ratios(a, "batch", ["NK"]), ValueError, "`populations` names 1"),
        (lambda a: pl.annotation_confusion(a, "no"), KeyError, "`labels_key='no'` is not a column"),
    ],
)
def test_what_is_missing_is_named(adata, draw, error, message):
    """Protects the user: one sentence with the name that is wrong and what to choose."""
    with pytest.raises(error, match=message):
        draw(adata)
