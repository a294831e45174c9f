"""``pl.masked_reconstruction`` counts every entry once and in the right place."""

from __future__ import annotations

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from cellweave.pl import masked_reconstruction


@pytest.fixture(autouse=True)
def _no_window():
    with mpl.rc_context({"backend": "Agg"}):
        yield
    plt.close("all")


@pytest.fixture
def pair() -> tuple[np.ndarray, np.ndarray]:
    """Poisson counts with their true means, from zero to some hundred."""
    rng = np.random.default_rng(0)
    mean = np.exp(rng.uniform(-3, 5.5, (200, 50)))
    return rng.poisson(mean).astype(float), mean


def mesh(ax: plt.Axes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Drawn numbers ``(row, column)`` and the edges of columns and rows."""
    drawn = ax.collections[0]
    corners = drawn.get_coordinates()
    return np.ma.filled(drawn.get_array(), 0), corners[0, :, 0], corners[:, 0, 1]


def test_the_colours_are_the_histogram(pair):
    """No entry is lost at an edge: neither zeros, nor the largest count, nor the largest prediction."""
    observed, predicted = pair
    numbers, x_edges, y_edges = mesh(masked_reconstruction(observed, predicted))
    assert numbers.sum() == observed.size
    expected, _, _ = np.histogram2d(observed.ravel(), predicted.ravel(), bins=(y_edges, x_edges))
    np.testing.assert_array_equal(numbers, expected)


def test_small_counts_have_a_row_each(pair):
    """Two counts in one row, or a count on an edge, would draw stripes that are not in the data."""
    _, _, edges = mesh(masked_reconstruction(*pair))
    np.testing.assert_array_equal(np.searchsorted(edges, np.arange(21)), np.arange(1, 22))
    assert (np.diff(edges) > 0.5).all()


@pytest.mark.parametrize("largest", [0, 1, 20, 21, 27, 1000])
def test_the_largest_count_is_drawn(largest: int):
    """Whatever the largest count is, it has a row, and the axes reach it."""
    ax = masked_reconstruction([[0, largest]], [[0.5, 0.25]])
    assert mesh(ax)[0].sum() == 2
    assert ax.get_ylim()[0] < 0
    assert ax.get_ylim()[1] > largest


def test_the_identity_line_and_the_mean_line(pair):
    """True means are calibrated, so the mean observed count follows the identity; a doubled prediction does not."""
    observed, mean = pair
    identity, calibration = masked_reconstruction(observed, mean).lines
    np.testing.assert_array_equal(identity.get_xdata(), identity.get_ydata())
    large = calibration.get_xdata() > 3
    assert large.sum() > 10
    np.testing.assert_allclose(calibration.get_ydata()[large], calibration.get_xdata()[large], rtol=0.2)
    doubled = masked_reconstruction(observed, 2 * mean).lines[1]
    large = doubled.get_xdata() > 3
    np.testing.assert_allclose(doubled.get_ydata()[large], doubled.get_xdata()[large] / 2, rtol=0.2)


def test_the_corner_shows_the_correlation_on_the_drawn_scale(pair):
    """The number in the corner is that of the cloud that is seen: log(1 + count)."""
    observed, predicted = pair
    expected = np.corrcoef(np.log1p(observed.ravel()), np.log1p(predicted.ravel()))[0, 1]
    [text] = masked_reconstruction(observed, predicted).texts
    assert text.get_text() == f"Pearson r = {expected:.2f}"
    [text] = masked_reconstruction(np.ones((2, 2)), predicted[:2, :2]).texts
    assert text.get_text() == "Pearson r undefined"


def test_axes_are_in_counts_on_a_log1p_scale(pair):
    """Ticks name counts, and equal steps of log(1 + count) are equally long."""
    ax = masked_reconstruction(*pair)
    ax.figure.canvas.draw()
    labels = [label.get_text() for label in ax.get_xticklabels()]
    assert labels[:5] == ["0", "1", "3", "10", "30"]
    at = ax.transData.transform([[0, 0], [1, 1], [3, 3], [7, 7]])
    np.testing.assert_allclose(np.diff(at, axis=0) - np.diff(at, axis=0)[0], 0, atol=1e-6)


def test_the_users_axes_are_used(pair):
    """Figures are composed of several panels by their author."""
    ax = plt.subplots()[1]
    assert masked_reconstruction(*pair, ax=ax) is ax


def test_frames_must_name_the_same_genes_and_cells(pair):
    """Two frames of one shape but another gene order would give a plausible, wrong figure."""
    observed, predicted = (pd.DataFrame(a, columns=[f"g{i}" for i in range(50)]) for a in pair)
    assert masked_reconstruction(observed, predicted).lines
    with pytest.raises(ValueError, match="The columns of `observed` and `predicted` differ"):
        masked_reconstruction(observed, predicted[predicted.columns[::-1]])
    with pytest.raises(ValueError, match="The index of"):
        masked_reconstruction(observed, predicted.iloc[::-1])


@pytest.mark.parametrize(
    ("observed", "predicted", "message"),
    [
        (np.ones((2, 3)), np.ones((3, 2)), r"got \(2, 3\) and \(3, 2\)"),
        (np.ones((0, 3)), np.ones((0, 3)), "non-empty"),
        ([-1.0, 1.0], [1.0, 1.0], "`observed` has missing, infinite or negative"),
        ([1.0, 1.0], [np.nan, 1.0], "`predicted` has missing, infinite or negative"),
    ],
)
def test_wrong_values_are_explained(observed, predicted, message: str):
    """Log values are negative or not: what is clearly no count is refused."""
    with pytest.raises(ValueError, match=message):
        masked_reconstruction(observed, predicted)
