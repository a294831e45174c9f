"""The fault table as a whole: every row has a test, or a reason why not yet; every family takes part."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import cellweave.model
from cellweave.model._base import CellweaveModel

TESTS = Path(__file__).parents[1]
N_ROWS = 50

# Rows without a test, and why. A row that gets one must leave this list.
LATER = {
    19: "anndata itself refuses COO matrices",
}
# Rows whose tests stand beside the code that they check, not in this folder: row -> file::test.
ELSEWHERE = {
    37: "io/test_interrupted_saves.py::test_failed_save_keeps_the_old_model_and_cleans_up",
    47: "io/test_interrupted_saves.py::test_killed_save_leaves_a_loadable_model",
    48: "io/test_model_files.py::test_crafted_pickle_named_model_pt_is_not_executed",
    49: "io/test_model_files.py::test_every_flipped_bit_is_noticed",
}


def labelled_rows(source: str) -> set[int]:
    """Rows that a file of fault tests covers: keys such as "12 all-zero matrix" and "Protects row 24" in docstrings."""
    rows = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Dict):
            keys = [key.value for key in node.keys if isinstance(key, ast.Constant) and isinstance(key.value, str)]
            rows |= {int(match[1]) for key in keys if (match := re.match(r"(\d+) \w", key))}
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            rows |= {int(row) for row in re.findall(r"\b[Rr]ow (\d+)", ast.get_docstring(node) or "")}
    return rows


def test_every_row_is_covered_or_explained():
    """Protects the fault table: no row is forgotten, and none is called missing although it has a test."""
    labelled = set().union(*(labelled_rows(path.read_text()) for path in Path(__file__).parent.glob("test_*.py")))
    missing = set(range(1, N_ROWS + 1)) - labelled - set(ELSEWHERE)
    assert missing == set(LATER)


@pytest.mark.parametrize("row", ELSEWHERE)
def test_tests_that_stand_elsewhere_exist(row):
    """Protects the list above from tests that were renamed or removed."""
    path, name = ELSEWHERE[row].split("::")
    tree = ast.parse((TESTS / path).read_text())
    assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_labels_are_read_from_tables_and_docstrings():
    """Protects the counting itself: it sees table keys and docstrings, and nothing else."""
    source = """
X = {"3 one value": 1, "25 X is None": 2, "two cells": 3}
Y = "7 no key"
def test_a():
    "Protects row 31 and row 5."
def helper():
    "Row 9."
"""
    assert labelled_rows(source) == {3, 25, 31, 5}


def absent_families(room: object, families: dict) -> set[str]:
    """Public model classes of a room that no family stands for."""
    public = {name for name in room.__all__ if issubclass(getattr(room, name), CellweaveModel)}
    return public - {family.model.__name__ for family in families.values()}


def test_every_model_takes_part(families):
    """Protects users of a new model: every public model class is in FAMILIES, so that all rows run for it."""
    assert absent_families(cellweave.model, families) == set()
    assert absent_families(cellweave.model, {}) >= {"StackModel", "ScyanModel"}
