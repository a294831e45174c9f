"""Faulty and unusual screens and questions: one clear sentence each, and the AnnData stays as it was."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from cellweave.data import PCAFeatures, UnseenPerturbationError
from cellweave.model import CascadedFlowModel

sys.path.append(str(Path(__file__).parent))
from ccfm_data import GENES, HELD_OUT, QUICK, SETUP, SMALL, create, dense, fit, simulate_screen


@contextmanager
def _refused(adata: Any, error: type[Exception], pattern: str, is_drawn: bool = False) -> Iterator[None]:
    """One sentence that names the field and says what to do; data and random state are as before.

    With ``is_drawn`` the random state may have moved: weights are drawn from it.
    """
    before, state = _state(adata), (np.random.get_state()[1].copy(), torch.get_rng_state())
    with pytest.raises(error) as caught:
        yield
    message = str(caught.value.args[0])
    assert re.search(pattern, message), message
    assert "\n" not in message
    assert message.endswith("."), message
    assert "`" in message, message
    assert ";" in message, message
    assert _state(adata) == before
    np.testing.assert_array_equal(np.random.get_state()[1], state[0])
    assert is_drawn or torch.equal(torch.get_rng_state(), state[1])


def _state(adata: Any) -> Any:
    if adata is None:
        return None
    x = adata.X[:] if adata.isbacked else adata.X
    x = None if x is None else (x.toarray() if sp.issparse(x) else np.asarray(x)).tobytes()
    keys = [sorted(map(str, part)) for part in (adata.uns, adata.obsm, adata.layers)]
    return x, list(adata.obs), list(adata.var), keys, list(adata.obs_names), list(adata.var_names), adata.is_view


def _obs(column: str, change: Callable) -> Callable:
    def apply(adata):
        adata.obs[column] = change(adata)
        return adata

    return apply


def _values(change: Callable) -> Callable:
    def apply(adata):
        adata.X = sp.csr_matrix(change(dense(adata).astype(np.float64)).astype(np.float32))
        return adata

    return apply


def _put(value: float, cell: int = 3, gene: int = 4) -> Callable:
    def change(x):
        x[cell, gene] = value
        return x

    return _values(change)


def _as_counts(adata):
    adata.X = sp.csr_matrix(np.rint(np.expm1(dense(adata))))
    return adata


def _without_controls(line: str | None = None) -> Callable:
    def apply(adata):
        gone = adata.obs["perturbation"] == "control"
        return adata[~(gone if line is None else gone & (adata.obs["line"] == line))].copy()

    return apply


def _rename_gene(old: str, new: str) -> Callable:
    def apply(adata):
        adata.var_names = [new if name == old else name for name in adata.var_names]
        adata.obs["perturbation"] = adata.obs["perturbation"].str.replace(old, new)
        return adata

    return apply


def _same(adata):
    return adata


PERTURBATION = "perturbation"
# what is wrong -> (change of the screen, options of setup, error, piece of the message)
SCREENS: dict[str, tuple[Callable, dict[str, Any], type[Exception], str]] = {
    "no control cells": (_without_controls(), {}, ValueError, "no control cells, labelled 'control'; it has 'drug'"),
    "control cells of another name": (
        _obs(PERTURBATION, lambda a: a.obs[PERTURBATION].replace("control", "DMSO")),
        {},
        ValueError,
        "no control cells.*set `control_key='DMSO'`",
    ),
    "no control cells in a line": (
        _without_controls("RPE1"),
        {},
        ValueError,
        r"`pairing_keys=\['line'\]` give 1 group\(s\) of cells without a control cell \('RPE1'\)",
    ),
    "control cells only": (lambda a: a[a.obs[PERTURBATION] == "control"].copy(), {}, ValueError, "control cells only"),
    "counts": (_as_counts, {}, ValueError, r"integers up to \d+, which look like counts.*`sc.pp.log1p\(adata\)`"),
    "counts in a layer": (
        lambda a: a.layers.__setitem__("counts", _as_counts(a.copy()).X) or a,
        {"layer": "counts"},
        ValueError,
        r"`adata.layers\['counts'\]` holds integers",
    ),
    "normalised but not logarithmised": (_values(np.expm1), {}, ValueError, "too large for log-normalised"),
    "scaled": (_values(lambda x: (x - x.mean(0)) / (x.std(0) + 1e-3)), {}, ValueError, "negative.*not scaled"),
    "NaN": (_put(np.nan), {}, ValueError, "1 value.*NaN or infinite.*gene 'g04'"),
    "infinite": (_put(np.inf), {}, ValueError, "1 value.*NaN or infinite"),
    "only zeros": (_values(lambda x: 0 * x), {}, ValueError, "only zeros"),
    "a label that is missing": (
        _obs(PERTURBATION, lambda a: a.obs[PERTURBATION].astype(object).where(np.arange(a.n_obs) != 4)),
        {},
        ValueError,
        r"\(`perturbation_key`\) is missing in 1 cell",
    ),
    "a line that is missing": (
        _obs("line", lambda a: a.obs["line"].astype(object).where(np.arange(a.n_obs) != 4)),
        {},
        ValueError,
        r"\(`pairing_keys`\) is missing in 1 cell",
    ),
    "an empty part": (
        _obs(PERTURBATION, lambda a: a.obs[PERTURBATION].replace("drug", "drug+")),
        {},
        ValueError,
        r"'drug\+' has an empty part",
    ),
    "the separator in a gene name": (
        _rename_gene("g03", "HLA+A"),
        {},
        ValueError,
        r"name of a gene that holds the separator '\+' \(first: 'HLA\+A'\)",
    ),
    "no separator": (_same, {"sep": ""}, ValueError, "`sep` must be a text that is not empty"),
    "an empty name of control cells": (
        _same,
        {"control_key": ""},
        ValueError,
        "labelled ''; set `control_key='control'`",
    ),
    "a view": (lambda a: a[:100], {}, ValueError, "is a view"),
    "repeated genes": (_rename_gene("g28", "g29"), {}, ValueError, "repeats 1 gene name"),
    "no cells": (lambda a: a[:0].copy(), {}, ValueError, "no cells"),
    "no genes": (lambda a: a[:, :0].copy(), {}, ValueError, "no genes"),
    "an unknown column": (_same, {"perturbation_key": "guide"}, KeyError, "`perturbation_key='guide'` not found"),
    "an unknown layer": (_same, {"layer": "log"}, KeyError, "`layer='log'` not found"),
    "an unknown pairing column": (_same, {"pairing_keys": ["donor"]}, KeyError, "`pairing_keys='donor'` not found"),
    "a text of pairing columns": (_same, {"pairing_keys": "line"}, TypeError, r"pass `\['line'\]`"),
    "a text of covariates": (_same, {"categorical_covariate_keys": "day"}, TypeError, r"pass `\['day'\]`"),
    "an unknown covariate": (
        _same,
        {"categorical_covariate_keys": ["age"]},
        KeyError,
        "`categorical_covariate_keys='age'` not found",
    ),
    "a continuous covariate": (
        _obs("age", lambda a: np.linspace(0, 1, a.n_obs)),
        {"categorical_covariate_keys": ["age"]},
        ValueError,
        "looks continuous",
    ),
    "an unknown dosage column": (_same, {"dosage_key": "dose"}, KeyError, "`dosage_key='dose'` not found"),
    "a negative dose": (
        _obs("dose", lambda a: np.where(a.obs[PERTURBATION] == "drug", -1.0, 1.0)),
        {"dosage_key": "dose"},
        ValueError,
        "The dose -1.0.*label 'drug'",
    ),
    "too many doses": (
        _obs("dose", lambda a: np.where(a.obs[PERTURBATION] == "drug", "1+2", "1")),
        {"dosage_key": "dose"},
        ValueError,
        r"The dose '1\+2' of a condition with 1 part",
    ),
    "an unknown split column": (_same, {"split_key": "split"}, KeyError, "`split_key='split'` not found"),
    "a split without training cells": (
        _obs("split", lambda a: ["test"] * a.n_obs),
        {"split_key": "split"},
        ValueError,
        "has no cell with the value 'train'",
    ),
    "unknown gene symbols": (_same, {"gene_symbols_key": "symbol"}, KeyError, "`gene_symbols_key='symbol'` not found"),
    "an unknown argument": (_same, {"batch_keys": "line"}, TypeError, "no argument `batch_keys`"),
}


@pytest.mark.parametrize("fault", SCREENS)
def test_faulty_screen_is_refused(fault):
    """Protects users from failures deep in training: one sentence at setup, and the AnnData stays as it was."""
    change, options, error, message = SCREENS[fault]
    adata = change(simulate_screen(10))
    with _refused(adata, error, message):
        CascadedFlowModel.setup_anndata(adata, **{**SETUP, **options})


def test_a_faulty_file_on_disk_is_refused(tmp_path):
    """Protects backed data: every value is checked, and the file stays as it was."""
    adata = _put(np.nan, 150, 7)(simulate_screen(10))
    adata.write_h5ad(tmp_path / "a.h5ad")
    content = (tmp_path / "a.h5ad").read_bytes()
    with pytest.raises(ValueError, match="1 value.*NaN.*'g07'"):
        CascadedFlowModel.setup_anndata(ad.read_h5ad(tmp_path / "a.h5ad", backed="r"), **SETUP)
    assert (tmp_path / "a.h5ad").read_bytes() == content


def test_backed_data_give_the_same_model(tmp_path):
    """Protects screens that do not fit in memory: a file on disk trains to the same weights and predictions."""
    plain = simulate_screen(10)
    plain.write_h5ad(tmp_path / "a.h5ad")
    models = [fit(a) for a in (plain, ad.read_h5ad(tmp_path / "a.h5ad", backed="r"))]
    x = [model.predict_perturbation(["drug", HELD_OUT], n_cells=5).X for model in models]
    np.testing.assert_array_equal(x[0], x[1])
    np.testing.assert_array_equal(*(model.get_latent_representation() for model in models))


def test_small_conditions_are_announced():
    """Protects from silent trust in conditions of one cell: a warning names them, training and prediction go on."""
    adata = simulate_screen(10)
    rare = np.flatnonzero((adata.obs[PERTURBATION] == "g03").to_numpy())[1:]
    adata = adata[np.setdiff1d(np.arange(adata.n_obs), rare)].copy()
    with pytest.warns(UserWarning, match=r"1 condition\(s\) .* fewer than 5 cells \('g03'\)"):
        model = fit(adata, training={"calibrate": True})
    assert np.isfinite(model.predict_perturbation("g03", n_cells=4).X).all()
    assert np.isfinite(model.get_perturbation_effect("g03", indices=[0, 1])).all()


def test_one_perturbed_and_one_control_cell():
    """Protects the smallest screen: it trains, and predictions are finite."""
    adata = simulate_screen(10)
    rows = [np.flatnonzero((adata.obs[PERTURBATION] == name).to_numpy())[0] for name in ("control", "drug")]
    small = adata[rows].copy()
    with pytest.warns(UserWarning, match="fewer than 5 cells"):
        model = fit(small, {"pairing_keys": None}, training={"max_steps": 3, "calibrate": True})
    assert np.isfinite(model.predict_perturbation("drug", n_cells=2).X).all()


def test_odd_names():
    """Protects names with spaces, slashes and other letters, in labels, lines and files."""
    adata = simulate_screen(10)
    adata.obs[PERTURBATION] = adata.obs[PERTURBATION].replace({"drug": "IFN-γ / 5 µg\n(x)"})
    adata.obs["line"] = adata.obs["line"].replace({"RPE1": "RPE | 1"})
    model = fit(adata, training={"max_steps": 3})
    pred = model.predict_perturbation(["IFN-γ / 5 µg\n(x)+g00"], n_cells=2)
    assert set(pred.obs[PERTURBATION]) == {"IFN-γ / 5 µg\n(x)+g00"}


# ---------------------------------------------------------------- arguments of the model and of training

ARGUMENTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "encoder": ({"encoder": "umap"}, ValueError, "encoder"),
    "obsm key": ({"encoder": "obsm:X_umap"}, ValueError, "X_umap"),
    "anchor": ({"anchor": "magic"}, ValueError, "`anchor` must be 'auto', None or one of"),
    "start": ({"start": "zero"}, ValueError, "`start` must be"),
    "noise": ({"noise": "uniform"}, ValueError, "`noise` must be"),
    "graph": ({"gene_graph": "random"}, ValueError, "`gene_graph` must be 'coexpression', None or a matrix"),
    "graph of other genes": (
        {"gene_graph": np.eye(4)},
        ValueError,
        r"the 30 genes of the data, got the shape \(4, 4\)",
    ),
    "representations": ({"perturbation_reps": {"drug": [1]}}, TypeError, "must be a DataFrame"),
    "combinations represented": (
        {"perturbation_reps": pd.DataFrame(np.ones((1, 2)), index=["g00+g01"])},
        ValueError,
        "no single perturbation",
    ),
    "repeated representations": (
        {"perturbation_reps": pd.DataFrame(np.ones((2, 2)), index=["drug", "drug"])},
        ValueError,
        r"are repeated \(first: 'drug'\)",
    ),
    "NaN in representations": (
        {"perturbation_reps": pd.DataFrame([[1.0, np.nan]], index=["drug"])},
        ValueError,
        r"no finite numbers \(first in row: 'drug'\)",
    ),
    "too many components": ({"encoder": PCAFeatures(30)}, ValueError, "more training cells and genes"),
    "dropout of conditions": ({"condition_dropout": 1.0}, ValueError, "`condition_dropout` must be in"),
    "heads": ({"n_heads": 3}, ValueError, "n_heads"),
}


@pytest.mark.parametrize("fault", ARGUMENTS)
def test_wrong_arguments_of_the_model_are_refused(fault):
    """Protects users from arguments that mean nothing: one sentence when the model is made."""
    arguments, error, message = ARGUMENTS[fault]
    adata = simulate_screen(10)
    CascadedFlowModel.setup_anndata(adata, **SETUP)
    with _refused(adata, error, message, is_drawn=True):
        CascadedFlowModel(adata, **{**SMALL, **arguments})


TRAINING: dict[str, tuple[dict[str, Any], str]] = {
    "pairing": ({"pairing": "nearest"}, "`pairing` must be 'random' or 'ot'"),
    "more conditions than cells": ({"n_conditions_per_step": 40}, "below `n_conditions_per_step=40`"),
    "no cells in a step": ({"batch_size": 0}, "`batch_size`"),
    "no genes in a step": ({"n_genes_per_step": 0}, "`n_genes_per_step` must be at least 1"),
    "share of control cells": ({"control_fraction": 1.5}, "`control_fraction` must be"),
    "no training cells": ({"train_size": 0.0}, "train_size"),
    "shares above one": ({"train_size": 0.8, "validation_size": 0.5}, "validation_size"),
}


@pytest.mark.parametrize("fault", TRAINING)
def test_wrong_arguments_of_training_are_refused(fault):
    """Protects users from runs that cannot learn: one sentence before the first step."""
    options, message = TRAINING[fault]
    adata = simulate_screen(10)
    model = create(adata)
    with _refused(adata, ValueError, message):
        model.train(**{**QUICK, **options})
    assert not model.is_trained


def test_an_untrained_model_says_so():
    """Protects from predictions of random weights."""
    adata = simulate_screen(10)
    model = create(adata)
    for call in (
        lambda: model.predict_perturbation("drug"),
        lambda: model.get_latent_representation(),
        lambda: model.get_perturbation_effect("drug"),
        lambda: model.generate(perturbation="drug"),
        lambda: model.get_perturbation_representation(),
    ):
        with pytest.raises(RuntimeError, match="train"):
            call()


# ---------------------------------------------------------------- questions


@pytest.fixture(scope="module")
def model():
    """A trained model with doses and a covariate. Never change it."""
    adata = simulate_screen(20)
    adata.obs["dose"] = 1.0
    return fit(adata, {"dosage_key": "dose", "categorical_covariate_keys": ["day"]})


@pytest.fixture(scope="module")
def plain():
    """A trained model without either. Never change it."""
    return fit(simulate_screen(20))


QUESTIONS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "nothing": ({"perturbations": []}, ValueError, "`perturbations` is empty"),
    "an empty text": ({"perturbations": ""}, ValueError, "not empty"),
    "no text": ({"perturbations": [3]}, ValueError, "must be a text"),
    "an unknown perturbation": (
        {"perturbations": ["g00+aspirin"]},
        UnseenPerturbationError,
        r"1 perturbation\(s\) are neither genes.*\('aspirin'\).*`perturbation_reps`",
    ),
    "another word for unseen": ({"unseen": "mean"}, ValueError, "`unseen` must be 'error' or 'average'"),
    "no cells": ({"n_cells": 0}, ValueError, "`n_cells` must be at least 1"),
    "no steps": ({"n_steps": 0}, ValueError, "`n_steps` must be at least 1"),
    "no batch": ({"batch_size": 0}, ValueError, "`batch_size` must be at least 1"),
    "a negative batch": ({"batch_size": -2}, ValueError, "`batch_size` must be at least 1"),
    "another solver": ({"solver": "magic"}, ValueError, "`solver`"),
    "an unknown gene": ({"genes": ["g00", "XIST"]}, ValueError, r"`genes` has 1 gene\(s\).*'XIST'"),
    "no genes": ({"genes": []}, ValueError, "`genes` is empty"),
    "a repeated gene": ({"genes": ["g00", "g00"]}, ValueError, "`genes` names 1 gene.* twice"),
    "a text of genes": ({"genes": "g00"}, TypeError, r"`genes` must be a list.*pass `\['g00'\]`"),
    "an unknown column": ({"covariates": {"donor": "d1"}}, KeyError, "`covariates` names 'donor'"),
    "an unknown value": ({"covariates": {"line": "HeLa"}}, ValueError, "no control cells .* with {'line': 'HeLa'}"),
    "perturbed cells only": ({"indices": "perturbed"}, ValueError, "There are no control cells"),
    "no rows": ({"indices": []}, ValueError, "`indices`"),
    "a row that is not there": ({"indices": [10**6]}, ValueError, "`indices` has row 1000000"),
    "a negative dose": ({"dosages": {"drug": -1.0}}, ValueError, "`dosages` must be positive numbers"),
    "a dose of something else": ({"dosages": {"drg": 1.0}}, ValueError, "`dosages` names 1 .*'drg'"),
}


@pytest.mark.parametrize("fault", QUESTIONS)
def test_wrong_questions_are_refused(model, fault):
    """Protects users from bare errors of libraries: one sentence that names the argument, nothing is written."""
    options, error, message = QUESTIONS[fault]
    if isinstance(options.get("indices"), str):
        options = {"indices": np.flatnonzero((model.adata.obs[PERTURBATION] == "drug").to_numpy())}
    with _refused(model.adata, error, message):
        model.predict_perturbation(**{"perturbations": ["drug"], "n_cells": 3, **options})


def test_doses_of_a_model_without_doses_are_refused(plain):
    """Protects from doses that would be ignored."""
    with _refused(plain.adata, ValueError, "`dosages` were given, but the model knows none"):
        plain.predict_perturbation("drug", n_cells=2, dosages={"drug": 2.0})


def _without_column(adata, column):
    del adata.obs[column]
    return adata


QUERIES: dict[str, tuple[Callable, type[Exception], str]] = {
    "counts": (_as_counts, ValueError, "which look like counts"),
    "NaN": (_put(np.nan), ValueError, "NaN or infinite"),
    "negative": (_put(-1.0), ValueError, "negative"),
    "no control cells": (_without_controls(), ValueError, "There are no control cells"),
    "an unknown covariate value": (
        _obs("day", lambda a: np.where(np.arange(a.n_obs) == 3, "d9", a.obs["day"])),
        ValueError,
        r"1 value\(s\) in 1 cell\(s\) that the model does not know \('d9'\)",
    ),
    "no covariate": (lambda a: _without_column(a, "day"), KeyError, "`categorical_covariate_keys='day'` not found"),
    "no pairing column": (lambda a: _without_column(a, "line"), KeyError, "`pairing_keys='line'` not found"),
    "missing labels": (
        _obs(PERTURBATION, lambda a: a.obs[PERTURBATION].astype(object).where(np.arange(a.n_obs) != 4)),
        ValueError,
        r"\(`perturbation_key`\) is missing in 1 cell",
    ),
    "other genes": (lambda a: a[:, :9].copy(), ValueError, "Only 9 of the 30 genes"),
    "no cells": (lambda a: a[:0].copy(), ValueError, "no cells"),
    "repeated genes": (_rename_gene("g28", "g29"), ValueError, "repeats 1 gene name"),
}


@pytest.mark.parametrize("fault", QUERIES)
def test_faulty_queries_are_refused(model, fault):
    """Protects trained models from faulty queries: one sentence, nothing computed, nothing written."""
    change, error, message = QUERIES[fault]
    query = change(simulate_screen(10, seed=3))
    with _refused(query, error, message):
        model.predict_perturbation("drug", query, n_cells=3)


def test_unreadable_labels_of_a_query_are_named(plain):
    """Protects queries whose labels cannot be read: the label is named."""
    query = simulate_screen(10, seed=3)
    query.obs[PERTURBATION] = query.obs[PERTURBATION].replace("drug", "drug+")
    with _refused(query, ValueError, r"'drug\+' has an empty part"):
        plain.get_latent_representation(query)


def test_a_question_without_a_condition(plain):
    """Protects `generate`: the condition must be named, and must be known."""
    with _refused(plain.adata, ValueError, "`perturbation` is missing"):
        plain.generate()
    for call in (plain.generate, lambda **o: plain.get_perturbation_effect(**o)):
        with _refused(plain.adata, UnseenPerturbationError, "aspirin"):
            call(perturbation="aspirin")


def test_perturbed_cells_without_control_cells_are_named(plain):
    """Protects embeddings of data that lack the control cells beside which perturbed cells are read."""
    query = _without_controls("RPE1")(simulate_screen(10, seed=3))
    with _refused(query, ValueError, "no control cell of the context 'RPE1'"):
        plain.get_latent_representation(query)


def test_taken_keys_are_not_overwritten(plain):
    """Protects layers of the user: refused before anything is computed."""
    data = simulate_screen(5)
    data.layers["mine"] = dense(data) + 1
    for call in (plain.generate, plain.get_perturbation_effect):
        with _refused(data, ValueError, r"`adata.layers\['mine'\]` already exists"):
            call(perturbation="g00", key_added="mine", **{"adata_ctrl" if call == plain.generate else "adata": data})
    plain.generate(data, "g00", key_added="mine", overwrite=True)
    assert not np.array_equal(data.layers["mine"], dense(data) + 1)


def test_gene_symbols_find_perturbed_genes():
    """Protects data with Ensembl identifiers: perturbed genes are found in the column that names them."""
    adata = simulate_screen(10)
    adata.var["symbol"] = GENES
    adata.var_names = [f"ENSG{i:011d}" for i in range(len(GENES))]
    model = fit(adata, {"gene_symbols_key": "symbol"}, training={"max_steps": 3})
    named = fit(simulate_screen(10), training={"max_steps": 3})
    assert model._facts["others"] == named._facts["others"] == ["drug"]
    np.testing.assert_array_equal(
        model.predict_perturbation("g00", n_cells=3).X, named.predict_perturbation("g00", n_cells=3).X
    )
    repeated = simulate_screen(10)
    repeated.var["symbol"] = ["g00", *GENES[1:-1], "g00"]
    CascadedFlowModel.setup_anndata(repeated, **SETUP, gene_symbols_key="symbol")
    with _refused(repeated, ValueError, "have the same name"):
        CascadedFlowModel(repeated, **SMALL)
