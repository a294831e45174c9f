"""``pl.context_attention`` groups cells by label and draws attention relative to uniform."""

from __future__ import annotations

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgba

from cellweave.pl import context_attention

N = 12
LABELS = ["b", "a", "c", "b", "a", "b", "c", "b", "a", "b", "b", "b"]  # 3 a, 7 b, 2 c
ORDER = [1, 4, 8, 0, 3, 5, 7, 9, 10, 11, 2, 6]


@pytest.fixture(autouse=True)
def _no_window():
    with mpl.rc_context({"backend": "Agg"}):
        yield
    plt.close("all")


@pytest.fixture
def attention() -> np.ndarray:
    """Weights (3 layers, 2 heads, 12 cells, 12 cells)."""
    return np.random.default_rng(0).dirichlet(np.full(N, 5.0), size=(3, 2, N)).astype(np.float32)


def names(ax: plt.Axes) -> list[plt.Text]:
    return [text for text in ax.texts if text.get_gid() == "label name"]


def drawn(ax: plt.Axes) -> np.ndarray:
    return np.asarray(ax.images[0].get_array())


def strip(ax: plt.Axes, which: str) -> np.ndarray:
    """Colours of a strip, one row per cell."""
    [image] = next(child for child in ax.child_axes if child.get_label() == f"label colours of {which}").images
    return image.to_rgba(np.asarray(image.get_array()).ravel())


def test_the_image_is_the_grouped_log2_ratio(attention):
    """Rows and columns are permuted alike, cells of a label stay in order, and 0 means uniform."""
    expected = np.log2(attention.astype(float).mean((0, 1)) * N)[np.ix_(ORDER, ORDER)]
    np.testing.assert_allclose(drawn(context_attention(attention, LABELS)), expected, atol=1e-6)


@pytest.mark.parametrize(("layer", "head"), [(1, None), (None, 1), (2, 0), (-1, -2)])
def test_layer_and_head_are_chosen(attention, layer, head):
    """A mean over the wrong axis looks just as plausible."""
    chosen = attention[slice(None) if layer is None else [layer]].astype(float)
    chosen = chosen[:, slice(None) if head is None else [head]].mean((0, 1))
    expected = np.log2(chosen * N)[np.ix_(ORDER, ORDER)]
    ax = context_attention(attention, LABELS, layer=layer, head=head)
    np.testing.assert_allclose(drawn(ax), expected, atol=1e-6)
    title = ax.get_title(loc="left")
    assert (f"layer {layer % 3}" in title) is True if layer is not None else "mean of layers" in title
    assert (f"head {head % 2}" in title) is True if head is not None else "mean of heads" in title


def test_boundaries_stand_between_groups(attention):
    """One line across and one along before each group but the first."""
    ax = context_attention(attention, LABELS)
    across = sorted(float(line.get_ydata()[0]) for line in ax.lines if list(line.get_xdata()) == [0, 1])
    along = sorted(float(line.get_xdata()[0]) for line in ax.lines if list(line.get_ydata()) == [0, 1])
    assert across == along == [2.5, 9.5]


def test_groups_are_named_with_their_size_from_top_to_bottom(attention):
    """A name at another group would tell another story."""
    labels = names(context_attention(attention, LABELS))
    assert [text.get_text() for text in labels] == ["a (3)", "b (7)", "c (2)"]
    heights = [text.xy[1] for text in labels]
    np.testing.assert_allclose(heights, [1 - 1.5 / 12, 1 - 6.5 / 12, 1 - 11 / 12])


def test_names_of_small_groups_do_not_overlap():
    """Fifteen labels, fourteen of them with one cell each at the bottom."""
    labels = ["a0"] * 50 + [f"b{i:02d}" for i in range(14)]
    ax = context_attention(np.full((64, 64), 1 / 64), labels)
    ax.figure.canvas.draw()
    boxes = [text.get_window_extent() for text in names(ax)]
    assert len(boxes) == 15
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    inside = ax.figure.bbox
    assert all(inside.x0 <= box.x0 and inside.y0 <= box.y0 and box.y1 <= inside.y1 for box in boxes)


def test_strips_show_the_label_of_every_row_and_column(attention):
    """The strips stand beside the cells that they colour."""
    palette = {"a": "red", "b": "green", "c": "blue"}
    ax = context_attention(attention, LABELS, palette=palette)
    expected = [to_rgba(palette[LABELS[i]]) for i in ORDER]
    np.testing.assert_allclose(strip(ax, "rows"), expected)
    np.testing.assert_allclose(strip(ax, "columns"), expected)


def test_categories_keep_order_and_colour(attention):
    """Scanpy's colours belong to all categories, also to those that this context lacks."""
    labels = pd.Series(pd.Categorical(LABELS, categories=["c", "missing", "b", "a"]))
    ax = context_attention(attention, labels, palette=["red", "yellow", "green", "blue"])
    assert [text.get_text() for text in names(ax)] == ["c (2)", "b (7)", "a (3)"]
    colors = strip(ax, "rows")
    np.testing.assert_allclose(colors[[0, 2, 9]], [to_rgba(c) for c in ("red", "green", "blue")])


def test_one_label_needs_no_boundary(attention):
    """The smallest case: all cells of one kind."""
    ax = context_attention(attention, ["x"] * N)
    assert [text.get_text() for text in names(ax)] == [f"x ({N})"]
    assert len(ax.lines) == 1  # from the strip to the name


def test_the_scale_is_centred_on_uniform():
    """Uniform attention must not be stretched into a pattern, and a sharp head must not fade all others."""
    uniform = context_attention(np.full((4, 4), 0.25), list("aabb")).images[0]
    assert uniform.get_clim() == (-0.1, 0.1)
    sharp = context_attention(np.eye(4), list("aabb"))
    assert sharp.images[0].get_clim() == (-4, 4)
    assert np.isfinite(drawn(sharp)).all()
    assert sharp.images[0].colorbar.extend == "min"


def test_a_plain_matrix_and_the_users_axes(attention):
    """A mean that the user made, in a panel of the user's figure."""
    ax = plt.subplots()[1]
    assert context_attention(attention[0, 0], LABELS, ax=ax) is ax
    np.testing.assert_allclose(drawn(ax), np.log2(attention[0, 0].astype(float) * N)[np.ix_(ORDER, ORDER)], atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention": np.ones((3, 4))}, r"got shape \(3, 4\)"),
        ({"attention": np.full((N, N), 1 / N), "head": 0}, "without `layer` and `head`"),
        ({"attention": np.ones((N, N))}, "do not sum to one"),
        ({"layer": 3}, "`layer=3` does not exist; `attention` has 3"),
        ({"head": -3}, "`head=-3` does not exist; `attention` has 2"),
        ({"labels": LABELS[:-1]}, "`labels` has 11 entries, but `attention` is between 12 cells"),
        ({"labels": [None, *LABELS[1:]]}, "missing for 1 cells"),
        ({"palette": {"a": "red"}}, r"no colour for \['b', 'c'\]"),
        ({"palette": ["red"]}, "has 1 colours for 3 labels"),
    ],
)
def test_wrong_input_is_explained(attention, change: dict, message: str):
    """The message names the argument and what was found."""
    with pytest.raises(ValueError, match=message):
        context_attention(**{"attention": attention, "labels": LABELS, **change})
