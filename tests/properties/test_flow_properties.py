"""Properties of perturbation predictions: they depend on a condition, its control cells and a seed, and on nothing else."""

from __future__ import annotations

import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cellweave.data import ConditionNames, PerturbationTokens, Screen

sys.path.append(str(Path(__file__).parents[1] / "model"))
from ccfm_data import GENES, SINGLES, dense, fit, simulate_screen

CLOSE = {"rtol": 1e-5, "atol": 1e-6}
CONDITIONS = st.lists(st.sampled_from([*SINGLES, "g20"]), min_size=1, max_size=3, unique=True)
NAMES = st.text("ABCabc0_- /γ", min_size=1, max_size=5).map(str.strip).filter(bool)
FEW = settings(max_examples=10)


@pytest.fixture(scope="module")
def flow():
    """A trained model. Never change it."""
    return fit(simulate_screen(6), training={"max_steps": 60, "lr": 0.01})


# ---------------------------------------------------------------- predictions


@FEW
@given(parts=CONDITIONS, data=st.data())
def test_predictions_do_not_depend_on_how_a_condition_is_written(flow, parts, data):
    """Protects one answer per condition: parts in any order, with spaces, repeated, or beside control."""
    written = data.draw(st.permutations([*parts, *data.draw(st.lists(st.sampled_from([*parts, "control", "ctrl"])))]))
    label = "+".join(" " * data.draw(st.integers(0, 1)) + part for part in [*written, parts[0]])
    first, second = (flow.predict_perturbation(name, n_cells=3, n_steps=3) for name in ("+".join(parts), label))
    np.testing.assert_array_equal(first.X, second.X)
    assert first.obs_names.tolist() == second.obs_names.tolist()


@FEW
@given(
    labels=st.lists(CONDITIONS.map("+".join), min_size=1, max_size=4),
    n_cells=st.integers(1, 20),
    more=st.integers(0, 20),
    batch_size=st.integers(1, 30),
    seed=st.integers(-(2**40), 2**63),
)
def test_predictions_do_not_depend_on_their_company(flow, labels, n_cells, more, batch_size, seed):
    """Protects samples from memory settings and other questions: cell i of a condition is the same cell, always."""
    options = {"n_steps": 2, "seed": seed}
    whole = flow.predict_perturbation(labels, n_cells=n_cells + more, batch_size=batch_size, **options)
    alone = flow.predict_perturbation(labels[-1], n_cells=n_cells, **options)
    last = whole[-(n_cells + more) :][:n_cells]
    np.testing.assert_allclose(last.X, alone.X, **CLOSE)
    assert last.obs["source_cell"].tolist() == alone.obs["source_cell"].tolist()


@FEW
@given(genes=st.lists(st.sampled_from(GENES), min_size=1, unique=True), data=st.data())
def test_selected_genes_follow_their_names(flow, genes, data):
    """Protects `genes`: any selection in any order gives the cells of that selection, column by column."""
    order = data.draw(st.permutations(genes))
    first, second = (flow.predict_perturbation("drug", n_cells=3, n_steps=2, genes=g) for g in (genes, order))
    np.testing.assert_allclose(second[:, first.var_names].X, first.X, rtol=1e-4, atol=1e-5)
    assert (first.X >= 0).all()


@FEW
@given(order=st.permutations(range(len(GENES))), n_extra=st.integers(0, 3))
def test_queries_are_aligned_by_gene_name(flow, order, n_extra):
    """Protects gene identity: control cells with genes in any order, and with further genes, give the same cells."""
    control = simulate_screen(3, seed=2, labels=())
    names = [f"extra{i}" for i in range(n_extra)]
    wide = np.concatenate([dense(control), np.ones((control.n_obs, n_extra), np.float32)], axis=1)
    query = ad.AnnData(wide, obs=control.obs, var=pd.DataFrame(index=[*GENES, *names]))[
        :, [*names, *np.array(GENES)[order]]
    ]
    first, second = (flow.predict_perturbation("drug", a, n_cells=4, n_steps=2) for a in (control, query.copy()))
    np.testing.assert_allclose(second.X, first.X, **CLOSE)


@FEW
@given(rows=st.lists(st.integers(0, 119), min_size=1, max_size=6), batch_size=st.integers(2, 20))
def test_single_cells_are_moved_alike_in_any_selection(flow, rows, batch_size):
    """Protects `generate` and effects: a cell is moved the same alone, repeated, or among others."""
    whole = _everything(flow)
    moved = flow.generate(perturbation="g00+g01", n_steps=2, indices=rows, batch_size=batch_size)
    effect = flow.get_perturbation_effect("g00+g01", n_steps=2, indices=rows, batch_size=batch_size)
    np.testing.assert_allclose(moved, whole[0][rows], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(effect, whole[1][rows], rtol=1e-4, atol=1e-5)


_CACHE: dict[int, tuple[np.ndarray, np.ndarray]] = {}


def _everything(flow) -> tuple[np.ndarray, np.ndarray]:
    """All cells of the model, moved."""
    if id(flow) not in _CACHE:
        _CACHE[id(flow)] = (
            flow.generate(perturbation="g00+g01", n_steps=2),
            flow.get_perturbation_effect("g00+g01", n_steps=2),
        )
    return _CACHE[id(flow)]


# ---------------------------------------------------------------- labels


@given(parts=st.lists(NAMES, min_size=1, max_size=4), sep=st.sampled_from(["+", "&", "__x__"]))
def test_labels_are_read_as_they_were_written(parts, sep):
    """Protects names: what is joined to a label is found in it again, sorted, each once, whatever the separator."""
    names = ConditionNames("untreated", sep)
    found = names.parts(sep.join(parts))
    expected = set(parts) - {"untreated"} - ({"ctrl", "control"} if len(parts) > 1 else set())
    assert found == tuple(sorted(expected))
    assert names.parts(names.name(found)) == found


@given(
    labels=st.lists(CONDITIONS.map("+".join), min_size=1, max_size=30),
    lines=st.lists(st.sampled_from("xyz"), min_size=30, max_size=30),
    seed=st.integers(0, 2**31),
)
@pytest.mark.filterwarnings("ignore:.*fewer than 5 cells:UserWarning")
def test_screens_do_not_depend_on_the_order_of_cells(labels, lines, seed):
    """Protects codes of conditions and contexts: shuffled cells keep theirs."""
    obs = pd.DataFrame({"p": [*labels, *["control"] * 3], "line": [*lines[: len(labels)], *"xyz"]})
    setup = {
        "perturbation_key": "p",
        "control_key": "control",
        "sep": "+",
        "dosage_key": None,
        "pairing_keys": ["line"],
    }
    order = np.random.default_rng(seed).permutation(len(obs))
    plain, shuffled = Screen.from_obs(obs, setup, []), Screen.from_obs(obs.iloc[order], setup, [])
    assert plain.treatments == shuffled.treatments
    assert plain.contexts == shuffled.contexts
    np.testing.assert_array_equal(plain.treatment[order], shuffled.treatment)
    np.testing.assert_array_equal(plain.context[order], shuffled.context)


@given(genes=st.lists(NAMES, min_size=1, max_size=8, unique=True), others=st.lists(NAMES, max_size=5), data=st.data())
def test_tokens_name_one_thing_each(genes, others, data):
    """Protects tokens: every gene and perturbation has one of its own, whatever the order of the genes."""
    tokens = PerturbationTokens.of(genes, others)
    shuffled = PerturbationTokens.of(data.draw(st.permutations(genes)), others)
    assert tokens.names == shuffled.names
    assert len(set(tokens.gene_tokens().tolist())) == len(genes)
    known = sorted({*genes, *others})
    codes = tokens.encode([(name,) for name in known])[:, 0]
    assert [tokens.names[code] for code in codes] == known
