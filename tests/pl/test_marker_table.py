"""``pl.marker_table`` draws the entries of a table, what its check found, and what was measured."""

from __future__ import annotations

import json
import subprocess
import sys

import anndata
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData
from matplotlib.colors import to_hex

from cellweave.io import MarkerTable
from cellweave.pl import marker_table
from cellweave.pp import check_marker_table

NAN = np.nan
FRAME = pd.DataFrame(
    {
        "level": ["Mono", "T", "T", "Mono", "B"],
        "level 2": ["Myeloid", "Lymphoid", "Lymphoid", "Myeloid", "Lymphoid"],
        "CD3": [-1, 1, 1, -1, -1],
        "CD4": [0.5, 1, -1, NAN, NAN],
        "CD14": [1, -1, -1, 1, -1],
    },
    index=["cMono", "CD4 T", "CD8 T", "ncMono", "B"],
)
MARKERS = ["CD3", "CD4", "CD14"]
DRAWN = ["cMono", "ncMono", "CD4 T", "CD8 T", "B"]  # members of a group side by side


@pytest.fixture(autouse=True)
def _no_window():
    with mpl.rc_context({"backend": "Agg"}):
        yield
    plt.close("all")


@pytest.fixture
def adata() -> AnnData:
    """Ten cells of every population but B, at constant values, and five rejected ones; markers in another order."""
    names = np.array(["cMono", "CD4 T", "CD8 T", "ncMono"])
    x = np.array([[-1, 0.5, 1], [1, 1.5, 0.6], [1, -1, -1], [-0.8, 0.2, 1]])
    values = np.vstack([np.repeat(x, 10, axis=0), np.full((5, 3), 9.0)]).astype(np.float32)
    labels = pd.Categorical([*np.repeat(names, 10), *[None] * 5], categories=list(FRAME.index))
    obs = pd.DataFrame({"scyan_population": labels}, index=[f"c{i}" for i in range(45)])
    return AnnData(values[:, ::-1].copy(), obs=obs, var=pd.DataFrame(index=MARKERS[::-1]))


def panel(figure: plt.Figure, name: str) -> plt.Axes:
    [ax] = [ax for ax in figure.axes if ax.get_label() == name]
    return ax


def drawn(ax: plt.Axes) -> np.ndarray:
    return np.ma.filled(ax.images[0].get_array(), NAN)


def points(ax: plt.Axes, label: str) -> set[tuple[int, int]]:
    lines = [line for line in ax.lines if line.get_label() == label]
    return {(round(y), round(x)) for line in lines for x, y in line.get_xydata()}


def legend(figure: plt.Figure) -> list[str]:
    return [text.get_text() for each in figure.legends for text in each.get_texts()]


def test_entries_are_drawn_in_the_order_of_the_groups():
    """Protects the reading of a row: values, names and groups are permuted together."""
    figure = marker_table(MarkerTable.parse(FRAME))
    ax = panel(figure, "marker table")
    np.testing.assert_array_equal(drawn(ax), FRAME.loc[DRAWN, MARKERS].to_numpy(dtype=float))
    assert [text.get_text() for text in ax.get_yticklabels()] == DRAWN
    assert [text.get_text() for text in ax.get_xticklabels()] == MARKERS
    assert ax.get_ylim() == (4.5, -0.5)
    assert ax.images[0].get_clim() == (-1, 1)
    assert [text.get_text() for text in panel(figure, "level level").get_yticklabels()] == ["Mono", "T"]
    coarse = panel(figure, "level level 2")
    assert [text.get_text() for text in coarse.get_yticklabels()] == ["Myeloid", "Lymphoid"]
    assert coarse.get_yticks().tolist() == [0.5, 3.0]


def test_colours_tell_negative_positive_and_unknown_apart():
    """Protects the code of colours: blue negative, white zero, red positive, grey unknown."""
    image = panel(marker_table(FRAME), "marker table").images[0]
    negative, zero, positive = (image.cmap(image.norm(value)) for value in (-1, 0, 1))
    assert negative[2] > 0.6 > negative[0] and positive[0] > 0.6 > positive[2] and min(zero) > 0.95
    unknown = image.to_rgba(np.ma.masked_invalid([[NAN]]))[0, 0]
    assert to_hex(unknown) == "#d9d9d9"


def test_graded_entries_show_their_value():
    """Protects 0 from looking like unknown, and 0.5 from looking like 1."""
    ax = panel(marker_table(FRAME), "marker table")
    assert [(text.get_text(), text.get_position()) for text in ax.texts] == [("0.5", (1, 0))]


def test_medians_stand_beside_their_population(adata):
    """Protects the comparison: same rows, same columns whatever the order in the data, same scale, rejected cells out."""
    figure = marker_table(FRAME, adata)
    ax = panel(figure, "observed medians")
    expected = [[-1, 0.5, 1], [-0.8, 0.2, 1], [1, 1.5, 0.6], [1, -1, -1], [NAN] * 3]
    np.testing.assert_allclose(drawn(ax), expected, rtol=1e-6)
    assert [text.get_text() for text in ax.get_yticklabels()] == ["10", "10", "10", "10", "0"]
    assert ax.images[0].get_clim() == (-1, 1)
    assert points(ax, "contradictions") == {(2, 2)}  # CD14 of CD4 T: table -1, median 0.6
    assert "median contradicts the table" in legend(figure)
    assert "unknown, no cells" in legend(figure)


@pytest.mark.parametrize("storage", ["sparse", "layer", "backed"])
def test_medians_are_read_from_any_storage(adata, tmp_path, storage):
    """Protects data that are not a dense X in memory."""
    expected = drawn(panel(marker_table(FRAME, adata), "observed medians"))
    layer = None
    if storage == "sparse":
        adata.X = sp.csr_matrix(adata.X)
    if storage == "layer":
        adata.layers["scaled"], adata.X, layer = adata.X.copy(), adata.X * 0, "scaled"
    if storage == "backed":
        adata.write_h5ad(tmp_path / "a.h5ad")
        adata = anndata.read_h5ad(tmp_path / "a.h5ad", backed="r")
    found = drawn(panel(marker_table(FRAME, adata, layer=layer), "observed medians"))
    np.testing.assert_array_equal(found, expected)


def test_findings_of_the_check_are_marked(adata):
    """Protects the marks: joined dots at the two rows, points in the decisive entries, coloured names."""
    frame = FRAME.drop(columns=["level", "level 2"]).assign(CD16=[1, NAN, 1, 1, NAN])
    check = check_marker_table(frame)
    figure = marker_table(frame, check=check)
    pairs = panel(figure, "unseparable pairs")
    rows = [sorted(line.get_ydata()) for line in pairs.lines]
    names = list(frame.index)
    expected = check.loc[check["check"] == "unseparable", ["population", "other"]].to_numpy()
    assert rows == [sorted([names.index(a), names.index(b)]) for a, b in expected]
    assert len(rows) == 1  # cMono and ncMono: CD4 is known in one only
    ax = panel(figure, "marker table")
    near = check[check["check"] == "near_unseparable"]
    expected = {(names.index(p), frame.columns.get_loc(m)) for c in ("population", "other") for p, m in near[[c, "marker"]].to_numpy()}  # fmt: skip
    assert points(ax, "decisive") == expected
    assert len(expected) > 3
    colors = {text.get_text(): to_hex(text.get_color()) for text in ax.get_xticklabels()}
    assert colors["CD16"] == "#d95f02"
    assert len({colors[marker] for marker in MARKERS}) == 1
    assert {"no marker tells them apart", "alone tells two apart", "marker without contrast"} <= set(legend(figure))
    missing = check_marker_table(FRAME, adata[:, ["CD3", "CD4"]].copy())
    text = panel(marker_table(FRAME, check=missing), "marker table").get_xticklabels()[2]
    assert (text.get_text(), to_hex(text.get_color())) == ("CD14", "#b2182b")


def test_nothing_is_marked_where_all_is_well():
    """Protects a good table from a legend of faults."""
    frame = pd.DataFrame({"a": [1, -1, 1], "b": [1, 1, -1], "c": [1, -1, -1]}, index=["x", "y", "z"])
    assert check_marker_table(frame).empty
    figure = marker_table(frame, check=check_marker_table(frame))
    assert legend(figure) == []
    assert "unseparable pairs" not in [ax.get_label() for ax in figure.axes]


def test_the_stored_table_is_drawn_by_default(adata, tmp_path):
    """Protects "from what is stored": an annotated AnnData needs no second copy of the table."""
    table = MarkerTable.parse(FRAME)
    adata.uns["cellweave"] = {"scyan_population": {"parameters": {"table": json.dumps(table.to_dict())}}}
    stored = marker_table(adata=adata)
    (tmp_path / "table.csv").write_text(FRAME.to_csv())
    for other in (marker_table(table, adata), marker_table(tmp_path / "table.csv", adata)):
        for name in ("marker table", "observed medians"):
            np.testing.assert_array_equal(drawn(panel(stored, name)), drawn(panel(other, name)))
            rows = [[text.get_text() for text in panel(f, name).get_yticklabels()] for f in (stored, other)]
            assert rows[0] == rows[1]


@pytest.mark.parametrize("name", ["bmmc", "poised_levels", "oncology_levels"])
def test_published_tables_fit_into_the_figure(real_data, name):
    """Protects long names: all text lies inside the figure, and names of groups do not overlap."""
    table = MarkerTable.parse(real_data(f"cytometry/table_{name}.csv"))
    figure = marker_table(table, check=check_marker_table(table))
    figure.canvas.draw()
    for ax in (ax for ax in figure.axes if ax.axison):
        boxes = [text.get_window_extent() for text in ax.get_yticklabels() if text.get_text()]
        assert not any(a.overlaps(b) for a, b in zip(boxes, boxes[1:], strict=False))
        for box in [*boxes, *(text.get_window_extent() for text in ax.get_xticklabels())]:
            assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and figure.bbox.y0 <= box.y0


def test_drawing_loads_no_torch(tmp_path):
    """Protects light figures: a stored table is drawn without torch."""
    path = tmp_path / "table.csv"
    path.write_text(FRAME.to_csv())
    code = f"import sys, cellweave.pl; cellweave.pl.marker_table({str(path)!r}); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (ValueError, {"table": None}, "`table` is missing, and no model has recorded one"),
        (ValueError, {"table": 3}, "got int"),
        (ValueError, {"table": FRAME.assign(CD3="high")}, "entries that are no numbers"),
        (ValueError, {"table": FRAME.rename(columns={"CD3": "CD33"})}, r"lacks 1 of the 3 markers .*\(first: 'CD33'\)"),
        (ValueError, {"table": FRAME.rename(index=lambda name: name + "!")}, "has none of the populations of `table`"),
        (ValueError, {"check": pd.DataFrame({"check": []})}, "`check` must be what"),
        (KeyError, {"groupby": "mine"}, "`groupby='mine'` is not in `adata.obs`"),
        (KeyError, {"layer": "scaled"}, "`layer='scaled'` is not in `adata.layers`"),
    ],
)
def test_wrong_input_is_explained(adata, kind, change, message):
    """Protects from an empty or shifted figure, and from half a figure left open."""
    with pytest.raises(kind, match=message):
        marker_table(**{"table": FRAME, "adata": adata, **change})
    assert plt.get_fignums() == []


def test_a_check_of_another_table_is_refused():
    """Protects from marks at the wrong rows."""
    other = FRAME.rename(index={"B": "B cells"}).drop(columns=["CD3"])
    with pytest.raises(ValueError, match="`check` names populations or markers that `table` does not have"):
        marker_table(FRAME, check=check_marker_table(other))
