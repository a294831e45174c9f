"""Conditions, contexts and doses of a perturbation screen."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellweave.data import (
    ConditionNames,
    PerturbationTokens,
    Screen,
    UnseenPerturbationError,
    context_names,
    parse_doses,
)

SETUP = {
    "perturbation_key": "perturbation",
    "control_key": "control",
    "sep": "+",
    "dosage_key": None,
    "pairing_keys": None,
}
PARTS = st.lists(st.sampled_from(["STAT1", "IRF1", "KLF1", "drug"]), min_size=1, max_size=3)


def _obs(labels, **columns):
    return pd.DataFrame({"perturbation": labels, **columns}, index=[f"cell{i}" for i in range(len(labels))])


@given(PARTS, st.randoms())
def test_the_order_of_a_combination_does_not_matter(parts, random):
    """Protects one name per condition: a model must not learn A+B and B+A as two."""
    shuffled = list(parts)
    random.shuffle(shuffled)
    names = ConditionNames()
    assert names.parts("+".join(parts)) == names.parts("+".join(shuffled)) == tuple(sorted(set(parts)))
    assert names.canonical(names.canonical("+".join(shuffled))) == names.canonical("+".join(parts))


@pytest.mark.parametrize("label", ["A+ctrl", "ctrl+A", "A", "A+control", " A + control "])
def test_control_inside_a_combination_is_nothing(label):
    """Protects the spelling of published screens, where a single perturbation is written with its control."""
    assert ConditionNames("non-targeting").parts(label) == ("A",)


@pytest.mark.parametrize("label", ["", "  ", "A+", "+A", "A++B"])
def test_an_empty_part_is_refused(label):
    """Protects from conditions that are made of a stray separator."""
    with pytest.raises(ValueError, match=r"perturbation|empty part"):
        ConditionNames().parts(label)


def test_a_separator_inside_a_gene_name_is_refused():
    """Protects from reading one gene as a combination of two."""
    with pytest.raises(ValueError, match=r"name of a gene that holds the separator '-'.*'HLA-A'"):
        Screen.from_obs(_obs(["control", "HLA-A"]), {**SETUP, "sep": "-"}, ["HLA-A", "B"])


def test_a_screen_reads_treatments_and_contexts():
    """Protects that every cell gets the code of its condition and context, control cells the first."""
    obs = _obs(["B+A", "control", "A", "A+B", "ctrl"], line=["x", "x", "y", "y", "y"], day=[1, 1, 2, 2, 2])
    with pytest.warns(UserWarning, match="fewer than 5 cells"):
        screen = Screen.from_obs(obs[:4], {**SETUP, "pairing_keys": None}, [])
    assert screen.conditions == [(), ("A",), ("A", "B")]
    assert screen.treatment.tolist() == [2, 0, 1, 2]
    assert screen.contexts == ("",)
    with pytest.warns(UserWarning, match="fewer than 5 cells"):
        paired = Screen.from_obs(obs.replace("ctrl", "control"), {**SETUP, "pairing_keys": ["line", "day"]}, [])
    assert paired.contexts == ("x | 1", "y | 2")
    assert paired.context.tolist() == [0, 0, 1, 1, 1]


def test_without_control_cells_the_likely_label_is_named():
    """Protects users whose control cells have another name: the error must say which."""
    with pytest.raises(ValueError, match=r"no control cells, labelled 'control'; set `control_key='DMSO'`"):
        Screen.from_obs(_obs(["DMSO", "drug"]), SETUP, [])


def test_a_context_without_control_cells_is_named():
    """Protects from comparing a perturbed cell with control cells of another cell type."""
    obs = _obs(["control", "A", "A"], line=["x", "x", "y"])
    with pytest.raises(ValueError, match=r"1 group\(s\) of cells without a control cell \('y'\)"):
        Screen.from_obs(obs, {**SETUP, "pairing_keys": ["line"]}, [])


def test_a_screen_of_control_cells_is_refused():
    """Protects from training a model on nothing."""
    with pytest.raises(ValueError, match="holds control cells only"):
        Screen.from_obs(_obs(["control", "ctrl+control"]), SETUP, [])


def test_doses_follow_their_parts():
    """Protects that the dose of a part stays with it when the parts are sorted, and that doses make treatments."""
    obs = _obs(["B+A", "A", "A", "control"], dose=["0.5+2", 1.0, "3", "what it says does not matter"])
    with pytest.warns(UserWarning, match="fewer than 5 cells"):
        screen = Screen.from_obs(obs, {**SETUP, "dosage_key": "dose"}, [])
    assert screen.treatments == (((), ()), (("A",), (1.0,)), (("A",), (3.0,)), (("A", "B"), (2.0, 0.5)))
    assert screen.treatment.tolist() == [3, 1, 2, 0]


@pytest.mark.parametrize("value", ["", "a", -1, 0, np.nan, "1+2+3", None])
def test_a_dose_that_is_no_positive_number_is_refused(value):
    """Protects from silently reading a missing or negative dose as a number."""
    with pytest.raises(ValueError, match="dose"):
        parse_doses(value, 2, ConditionNames())


def test_known_contexts_keep_their_place():
    """Protects that contexts of new data are matched with those of the training data by name."""
    names, codes = context_names(_obs(["a", "b", "c"], line=["z", "x", "new"]), ["line"], known=("x", "y", "z"))
    assert names == ("x", "y", "z", "new")
    assert codes.tolist() == [2, 0, 3]


def test_one_column_name_is_not_a_list():
    """Protects from reading the letters of a column name as columns."""
    with pytest.raises(TypeError, match=r"pass `\['line'\]`"):
        context_names(_obs(["a"]), "line")


def test_tokens_are_genes_in_alphabetical_order_then_other_perturbations():
    """Protects the order of the published vocabulary, by which weights are read."""
    tokens = PerturbationTokens.of(["Z", "A", "M"], ["drug", "M"])
    assert tokens.names == ["<pad>", "<cls>", "<mask>", "control", "A", "M", "Z", "drug"]
    assert tokens.gene_tokens().tolist() == [6, 4, 5]
    assert tokens.encode([("M",), ("A", "drug"), ()]).tolist() == [[5, -1], [4, 7], [-1, -1]]
    assert tokens.encode([("M",)], pad_with_control=True).tolist() == [[5, 3]]


def test_an_unknown_perturbation_is_named():
    """Protects from a bare KeyError where a user asks for what the model cannot know."""
    with pytest.raises(UnseenPerturbationError, match=r"1 perturbation\(s\) .* \('aspirin'\)"):
        PerturbationTokens.of(["A"], ["drug"]).encode([("aspirin",)])


def test_repeated_gene_symbols_are_refused():
    """Protects from giving two columns one token."""
    with pytest.raises(ValueError, match="gene_symbols_key"):
        PerturbationTokens.of(["A", "A"], [])


def test_perturbations_that_are_no_genes_see_only_themselves():
    """Protects the mask of the gene graph: a drug has no place in it."""
    mask = PerturbationTokens.of(["A", "B"], ["drug"]).pad(np.zeros((6, 6), dtype=bool))
    assert mask.shape == (7, 7)
    assert mask[6].tolist() == [True] * 6 + [False]
    assert mask[:, 6].tolist() == [True] * 6 + [False]


@pytest.mark.parametrize("label", [None, 3, np.nan, ""])
def test_a_label_that_is_no_text_is_refused(label):
    """Protects `predict_perturbation` from numbers and missing values in place of a name."""
    with pytest.raises(ValueError, match="`perturbation` must be a text that is not empty"):
        ConditionNames().parts(label)


def test_doses_of_equal_conditions_are_equal_treatments():
    """Protects doses written in two ways: `A+B` at `1+2` is `B+A` at `2+1`, and one number holds for all parts."""
    obs = _obs(["A+B", "B+A", "A+B", "control"], dose=["1+2", "2+1", "3", ""])
    with pytest.warns(UserWarning, match="fewer than 5 cells"):
        screen = Screen.from_obs(obs, {**SETUP, "dosage_key": "dose"}, [])
    assert screen.treatments == (((), ()), (("A", "B"), (1.0, 2.0)), (("A", "B"), (3.0, 3.0)))
    assert screen.treatment.tolist() == [1, 1, 2, 0]
