"""``io.MarkerTable`` reads a knowledge table in any form users have, and refuses what would mislead a model."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cellweave.io import MarkerTable

NAN = np.nan
FLAT = "Populations,CD3,CD19,CD56\nT,1,-1,\nB,-1,1,NA\nNK,-1,, 0.5\n"
NESTED = """Population,level,Level 2,CD3,CD4,CD14
CD4 T,T cells,Lymphoid,1,1,-1
CD8 T,T cells,Lymphoid,1,-1,-1
B,B,Lymphoid,-1,,-1
cMono,Mono,Myeloid,-1,,1
ncMono,Mono,Myeloid,,0.5,1
"""


@pytest.fixture
def csv(tmp_path: Path):
    """Function that writes a file and returns its path."""

    def write(text: str) -> Path:
        path = tmp_path / "table.csv"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def nested(csv) -> MarkerTable:
    return MarkerTable.parse(csv(NESTED))


def test_a_file_is_read_with_blanks_as_unknown(csv):
    """Protects the meaning of an entry: numbers are kept, blanks and NA are unknown, nothing else is."""
    table = MarkerTable.parse(csv(FLAT))
    assert table.populations == ("T", "B", "NK")
    assert table.markers == ("CD3", "CD19", "CD56")
    np.testing.assert_array_equal(table.rho, [[1, -1, NAN], [-1, 1, NAN], [-1, NAN, 0.5]])
    assert table.levels == {}


def test_a_population_may_be_called_na(csv):
    """Protects names from the reader: pandas would take "NA" and "None" for missing names."""
    assert MarkerTable.parse(csv("p,CD3\nNA,1\nNone,-1\n")).populations == ("NA", "None")


def test_a_path_may_be_text(csv):
    """Protects the shortest call: the name of a file."""
    assert MarkerTable.parse(str(csv("p,CD3\nT,1\nB,-1\n"))) == MarkerTable.parse(
        pd.DataFrame({"CD3": [1, -1]}, index=["T", "B"])
    )


def test_level_columns_become_levels_in_file_order(nested):
    """Protects the hierarchy: a column named like a level, in any letter case, is no marker."""
    assert nested.markers == ("CD3", "CD4", "CD14")
    assert list(nested.levels) == ["level", "Level 2"]
    assert nested.levels["level"] == ("T cells", "T cells", "B", "Mono", "Mono")


def test_frames_with_levels_as_index_or_as_columns_are_the_same(nested):
    """Protects users who build the table in Python, with either habit."""
    by_index = nested.to_frame()
    by_columns = by_index.reset_index(level=["level", "Level 2"])
    assert isinstance(by_index.index, pd.MultiIndex)
    assert by_index.index.names == ["population", "level", "Level 2"]
    assert MarkerTable.parse(by_index) == nested
    assert MarkerTable.parse(by_columns) == nested


def test_a_table_survives_json(nested):
    """Protects saved models, which keep the table as JSON text: NaN is no JSON."""
    text = json.dumps(nested.to_dict(), allow_nan=False)
    again = MarkerTable.parse(json.loads(text))
    assert again == nested
    assert again != MarkerTable.parse({**nested.to_dict(), "markers": ["CD3", "CD4", "CD15"]})
    np.testing.assert_array_equal(again.rho, nested.rho)
    assert MarkerTable.parse(nested) is nested


def test_the_users_frame_and_the_table_stay_apart():
    """Protects both sides: changing the frame later must not change a model, and the table cannot be changed."""
    frame = pd.DataFrame({"CD3": [1.0, -1.0]}, index=["T", "B"])
    table = MarkerTable.parse(frame)
    frame.iloc[0, 0] = -1.0
    copy = table.to_frame()
    copy.iloc[0, 0] = -1.0
    assert table.rho[0, 0] == 1
    with pytest.raises(ValueError, match="read-only"):
        table.rho[0, 0] = -1


def test_nullable_and_object_columns_are_numbers():
    """Protects tables that came through spreadsheets or Arrow: text digits and pandas.NA are common."""
    frame = pd.DataFrame({"CD3": pd.array([1, None], dtype="Int64"), "CD4": ["-1", " 0.5 "]}, index=["a", "b"])
    np.testing.assert_array_equal(MarkerTable.parse(frame).rho, [[1, -1], [NAN, 0.5]])


def test_groups_say_who_belongs_where(nested):
    """Protects probabilities of groups, which are sums over these members."""
    names, members = nested.groups("level")
    assert names == ("T cells", "B", "Mono")
    np.testing.assert_array_equal(members, np.array([[1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 1]], dtype=bool))
    np.testing.assert_array_equal(nested.members_of("Lymphoid"), [True, True, True, False, False])
    np.testing.assert_array_equal(nested.members_of("B"), [False, False, True, False, False])


def test_the_hierarchy_can_be_walked(nested):
    """Protects a walk to the top from going round: a group named like its only population is that population."""
    assert nested.parent_of("CD4 T") == "T cells"
    assert nested.parent_of("T cells") == "Lymphoid"
    assert nested.parent_of("B") == "Lymphoid"
    assert nested.parent_of("Myeloid") is None
    assert nested.children_of("Lymphoid") == ("T cells", "B")
    assert nested.children_of("Mono") == ("cMono", "ncMono")
    assert nested.children_of("B") == nested.children_of("CD8 T") == ()


def test_separating_markers_are_known_in_both_and_differ(nested):
    """Protects the finding that matters most: which populations a table can tell apart."""
    separating = nested.separating_markers()
    np.testing.assert_array_equal(separating, separating.transpose(1, 0, 2))
    index = nested.populations.index
    assert [m for m, s in zip(nested.markers, separating[index("CD8 T"), index("B")], strict=True) if s] == ["CD3"]
    assert [m for m, s in zip(nested.markers, separating[index("CD4 T"), index("ncMono")], strict=True) if s] == [
        "CD4",
        "CD14",
    ]
    assert not separating[index("cMono"), index("ncMono")].any()


@pytest.mark.parametrize("name", ["aml", "bmmc", "debarcoding", "multicenter", "oncology_levels", "poised_levels"])
def test_published_tables_are_read(real_data, name):
    """Protects the tables that users have: those of the original all pass, and survive a round trip."""
    table = MarkerTable.parse(real_data(f"cytometry/table_{name}.csv"))
    raw = pd.read_csv(real_data(f"cytometry/table_{name}.csv"), index_col=0)
    markers = [column for column in raw.columns if column != "level"]
    assert list(table.markers) == markers
    np.testing.assert_array_equal(table.rho, raw[markers].to_numpy(dtype=float))
    assert MarkerTable.parse(table.to_frame()) == table


def test_one_population_is_said_once():
    """Protects from a table that labels everything: usable for gating, but rarely meant."""
    frame = pd.DataFrame({"CD3": [1.0]}, index=["T"])
    with pytest.warns(UserWarning, match=r"one population only \('T'\)"):
        table = MarkerTable.parse(frame)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MarkerTable.parse(table.to_dict())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("p\nT\nB\n", "no markers; separate the columns by commas"),
        ("p;CD3;CD19\nT;1;-1\n", "no markers; separate the columns by commas"),
        ("p,level\nT,a\nB,a\n", "has no markers"),
        ("p,CD3,CD19\n", "has no populations"),
        ("p,CD3\nT,1\nB,-1,3\n", r"is no CSV text file \(.*line 3"),
        ("p,CD3,CD19\nT,1,high\nB,-1,1\n", "has 'high' at population 'T', marker 'CD19'"),
        ("p,CD3,CD19\nT,1,-inf\nB,-1,1\n", "infinite value -inf at population 'T', marker 'CD19'"),
        ("p,CD3,CD19\nT,1,-1\nB,95,1\n", r"1 value\(s\) beyond \+-10, the first is 95 at population 'B', marker 'CD3'"),
        ("p,CD3,CD19\nT,1,-1\nB,-1,1\nT,1,1\n", "has the population 'T' 2 times"),
        ("p,CD3,CD19,CD3\nT,1,-1,\nB,-1,1,\n", "has the marker 'CD3' 2 times"),
        ("p,level,level,CD3\nT,a,a,1\nB,b,b,-1\n", "has the level 'level' 2 times"),
        ("p,CD3,CD19\nT,1,-1\n ,-1,1\n", "The population in row 2 of `table` has no name"),
        ("p,CD3,\nT,1,-1\nB,-1,1\n", "The marker in column 2 of `table` has no name"),
        ("p,CD3,CD19\nT,1,-1\nB,,\n", r"1 population\(s\) about which nothing is known \(first: 'B'\)"),
        ("p,CD3,CD19\nT,1,\nB,-1,\nT2,1,NA\n", "'T' and 'T2' of `table` have identical rows"),
        ("Level of T,CD3,CD19\nT,1,\nB,-1,\n", "first column of `table` is the level column 'Level of T'"),
        ("p,level,CD3\nT,,1\nB,b,-1\n", "Level 'level' of `table` is missing for population 'T'"),
        ("p,level 1,level 2,CD3\nT,a,x,1\nB,a,y,-1\n", "Group 'a' of `table` lies in two groups of level 'level 2'"),
        ("p,level,CD3\nT,B,1\nB,B,-1\n", "'B' of `table` stands for different populations"),
    ],
)
def test_wrong_tables_are_refused_with_the_place(csv, text: str, message: str):
    """Protects hours of training: the sentence names the cell, what was found and what to do."""
    with pytest.raises(ValueError, match=message) as caught:
        MarkerTable.parse(csv(text))
    assert ";" in str(caught.value) and str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (pd.DataFrame({"CD3": [True, False]}, index=["T", "B"]), "has True at population 'T'"),
        (pd.DataFrame({"CD3": [1, 1j]}, index=["T", "B"]), r"has \(1\+0j\) at population"),
        (pd.DataFrame({"p": ["T", "B"], "CD3": [1, -1]}), r"use `table.set_index\('p'\)`"),
        (pd.DataFrame({"CD3": [1.0, -1.0]}, index=["T", None]), "population in row 2 of `table` has no name"),
        (pd.DataFrame([[1.0], [-1.0]], index=["T", "B"], columns=[NAN]), "marker in column 1 of `table` has no name"),
        (pd.DataFrame(index=["T", "B"]), "has no markers"),
        (pd.DataFrame({"CD3": []}), "has no populations"),
        (pd.DataFrame({("a", "CD3"): [1, -1]}, index=["T", "B"]), "columns of `table` have several levels"),
        (pd.DataFrame({"CD3": [1]}, index=pd.MultiIndex.from_tuples([("T", "x")])), "level of the index of `table`"),
        (
            pd.DataFrame({"CD3": [1]}, index=pd.MultiIndex.from_tuples([("x", "T")], names=["level", "p"])),
            "first column of `table` is the level column 'level'",
        ),
    ],
)
def test_wrong_frames_are_refused_with_the_place(frame: pd.DataFrame, message: str):
    """Protects from frames that look right when printed."""
    with pytest.raises(ValueError, match=message):
        MarkerTable.parse(frame)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"markers": None}, r"lacks \['markers'\]"),
        ({"rho": [[1.0], [1.0]]}, "3 rows of 3 entries"),
        ({"levels": {"level": ["a"]}}, "has 1 entries for 3 populations"),
    ],
)
def test_wrong_dictionaries_are_refused(csv, change: dict, message: str):
    """Protects loading: a damaged file must not become a shifted table."""
    stored = {**MarkerTable.parse(csv(FLAT)).to_dict(), **change}
    stored = {key: value for key, value in stored.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        MarkerTable.parse(stored)


def test_other_kinds_and_missing_files_are_refused(tmp_path):
    """Protects from tracebacks of pandas where the path is wrong."""
    with pytest.raises(ValueError, match="there is no file"):
        MarkerTable.parse(tmp_path / "none.csv")
    (tmp_path / "bytes.csv").write_bytes(bytes(range(256)))
    with pytest.raises(ValueError, match="is no CSV text file"):
        MarkerTable.parse(tmp_path / "bytes.csv")
    with pytest.raises(TypeError, match="got int"):
        MarkerTable.parse(3)


def test_unknown_names_say_what_there_is(nested):
    """Protects from typing errors in names of groups."""
    with pytest.raises(ValueError, match=r"it has the levels \['level', 'Level 2'\]"):
        nested.groups("Level2")
    for navigate in (nested.parent_of, nested.children_of, nested.members_of):
        with pytest.raises(ValueError, match=r"no population or group 'Monos'.*'Mono'"):
            navigate("Monos")


def test_a_table_made_by_hand_is_checked_too():
    """Protects code that refines a table: no instance exists that did not pass the checks."""
    with pytest.raises(ValueError, match="shape"):
        MarkerTable(("T", "B"), ("CD3",), np.ones((2, 2)))
    with pytest.raises(ValueError, match="identical"):
        MarkerTable(("T", "B"), ("CD3",), np.array([[0.0], [-0.0]]))
