"""Colours of populations that are alone in their group."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from cellweave import pl

GROUPS = [("B cells", "B cells"), ("CD4 T", "T cells"), ("CD8 T", "T cells"), ("Monocytes", "myeloid cells")]


@pytest.fixture
def table() -> pd.DataFrame:
    index = pd.MultiIndex.from_tuples(GROUPS, names=["population", "lineage"])
    return pd.DataFrame([[1.0, -1], [-1, 1], [-1, -1], [1, 1]], index=index, columns=["CD3", "CD8"])


def test_only_member_of_a_group_has_its_colour(table):
    """Protects populations that are alone in a group of another name: they have a colour, that of the group."""
    colors = pl.population_palette(table)
    assert set(colors) == {name for pair in GROUPS for name in pair}
    assert colors["Monocytes"] == colors["myeloid cells"]
    assert colors["CD4 T"] != colors["CD8 T"]


def test_only_member_of_a_group_is_drawn(table):
    """Protects the tree: it ended in a KeyError where a population is alone in a group of another name."""
    ax = pl.population_hierarchy(table)
    assert {"Monocytes", "myeloid cells"} <= {text.get_text().strip() for text in ax.texts}
    plt.close("all")
