"""Faults of scaled intensities and of the table that says what they mean, for models that read them.

As in ``test_input_faults.py``, which has the faults of all models: one sentence, or finite and equal results.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

pytestmark = pytest.mark.reads("intensities")


def _set(*entries: tuple[int, int, float], sparse: bool = True) -> Callable:
    def convert(x):
        x = x.toarray().astype(np.float64)
        for cell, marker, value in entries:
            x[cell, marker] = value
        return sp.csr_matrix(x) if sparse else x

    return _x(convert)


def _x(convert: Callable) -> Callable:
    def change(adata):
        adata.X = convert(adata.X)
        return adata

    return change


def _var_names(names: Callable) -> Callable:
    def change(adata):
        adata.var_names = names(list(adata.var_names))
        return adata

    return change


def _column(name: str, values: Callable) -> Callable:
    def change(adata):
        adata.obs[name] = values(adata)
        return adata

    return change


# ---------------------------------------------------------------- refused


# values of the markers of a table, which are checked when the model is made
REFUSED_INTENSITIES = {
    "1 one NaN, dense": (_set((3, 4, np.nan), sparse=False), "1 value.* NaN .*'gene4' of cell 'cell3'.*`nan_layer`"),
    "2 one NaN, sparse": (_set((3, 4, np.nan)), "1 value.* NaN .*'gene4' of cell 'cell3'"),
    "3 one infinite value": (_set((3, 4, -np.inf)), "1 value.* infinite .*'gene4' of cell 'cell3'"),
    "7 raw intensities": (
        _x(lambda x: 900 + 200 * x.toarray()),
        r"`adata.X` has \d+ value\(s\) of 6 marker\(s\) in 96 cell\(s\) .*1000 .*raw intensities .*`cellweave.pp.arcsinh`",
    ),
    "22 value 2^40": (_set((3, 4, 2.0**40)), "1 value.* raw intensities .*'gene4' of cell 'cell3'"),
    "42 marker that the data lack": (
        _var_names(lambda n: ["Gene_0", *n[1:]]),
        r"1 of the 6 markers .* not in `adata.var_names` \(first: 'gene0'\), which has 'Gene_0'",
    ),
}


@pytest.mark.parametrize("row", REFUSED_INTENSITIES)
def test_intensities_are_refused(family, make, refuses, row):
    """Protects rows 1 to 3, 7, 22 and 42 for models with a table: one sentence when the model is made."""
    change, message = REFUSED_INTENSITIES[row]
    adata = change(make())
    family.model.setup_anndata(adata, batch_key="batch")
    with refuses(adata, ValueError, message):
        family.model(adata, **family.arguments)


REFUSED_TABLES = {
    "42 repeated population": (lambda t: pd.concat([t, t.iloc[:1]]), r"`table` has the population 'B' 2 times; "),
    "42 identical rows": (
        lambda t: t.assign(gene0=1.0, gene3=1.0, gene2=1, gene1=-1, gene4=-1, gene5=1),
        "identical rows",
    ),
    "42 text": (
        lambda t: t.astype(object).replace(-1.0, "neg"),
        "`table` has 'neg' at population 'B', marker 'gene1'; ",
    ),
    "42 nothing known": (lambda t: t * np.nan, "3 population.*nothing is known.*'B'"),
    "42 repeated marker": (
        lambda t: t.set_axis(["gene0", *t.columns[:5]], axis=1),
        "`table` has the marker 'gene0' 2 times",
    ),
    "42 no table": (lambda t: None, "`table` is missing; "),
}


@pytest.mark.parametrize("row", REFUSED_TABLES)
def test_tables_are_refused(family, make, refuses, row):
    """Protects row 42: a table that cannot be right is refused in one sentence that says where, and nothing is written."""
    change, message = REFUSED_TABLES[row]
    adata = make()
    family.model.setup_anndata(adata, batch_key="batch")
    with refuses(adata, ValueError, message):
        family.model(adata, **{**family.arguments, "table": change(family.arguments["table"])})


QUERY_REFUSED_INTENSITIES = {
    "1 NaN": (_set((3, 4, np.nan)), "1 value.* NaN .*'gene4' of cell 'cell3'"),
    "3 infinite": (_set((3, 4, -np.inf)), "1 value.* infinite .*'gene4' of cell 'cell3'"),
    "7 raw intensities": (_x(lambda x: 900 + 200 * x.toarray()), "raw intensities .*`cellweave.pp.arcsinh`"),
    "30 marker missing": (
        lambda a: a[:, [0, 1, 2, 4, 5, 6]].copy(),
        r"1 of the 6 markers .* not in `adata.var_names` \(first: 'gene3'\), which has .*'gene",
    ),
    "33 unseen batch": (
        _column("batch", lambda a: ["b0", "new1", "new2"] * 32),
        r"`adata.obs\['batch'\]` .*2 value\(s\) in 64 cell\(s\).*'new1', 'new2'.*it knows 'b0', 'b1', so",
    ),
}


@pytest.mark.parametrize("row", QUERY_REFUSED_INTENSITIES)
def test_query_is_refused(fitted, refuses, row):
    """Protects trained models from faulty queries: one sentence of every getter, nothing written."""
    change, message = QUERY_REFUSED_INTENSITIES[row]
    for name, options in fitted.family.values.items():
        query = change(fitted.make())
        with refuses(query, ValueError, message):
            getattr(fitted.model, name)(query, **options)


# ---------------------------------------------------------------- accepted


FINITE_INTENSITIES = {
    "11 all-zero cells": (_set(*((cell, marker, 0) for cell in (5, 6) for marker in range(20))), None),
    "12 all-zero matrix": (
        _x(lambda x: sp.csr_matrix(x.shape, dtype=np.float32)),
        "have a standard deviation of 0 on average, where scaled ones have 1; transform",
    ),
    "7 spread far from 1": (_x(lambda x: 40 * x.toarray()), r"standard deviation of \d+ on average"),
    "variables that are no markers": (_set((0, 9, np.nan), (1, 10, 1e30), (2, 11, np.inf)), None),
    "no variable but the markers": (lambda adata: adata[:, :6].copy(), None),
}


@pytest.mark.parametrize("row", FINITE_INTENSITIES)
def test_unusual_but_accepted(family, make, row):
    """Protects odd panels: training runs, every cell has finite results, and what is suspicious is said once."""
    change, warning = FINITE_INTENSITIES[row]
    adata = change(make())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = family.fit(adata)
    if warning is not None:
        assert len([w for w in caught if re.search(warning, str(w.message))]) == 1
    _assert_finite(family, model)


def _assert_finite(family, model) -> None:
    for name, values in family.results(model).items():
        assert np.isfinite(values).all(), name
    assert all(np.isfinite(curve.to_numpy(dtype=float)).all() for curve in model.history.values())


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_large_intensities_do_not_overflow_in_half_precision(family, make, precision):
    """Protects row 50: values of nearly a thousand, whose squares half precision cannot hold, give finite losses."""
    adata = make()
    adata.X = 700 * adata.X.toarray()
    with pytest.warns(UserWarning, match="standard deviation"):
        model = family.fit(adata, training={"precision": precision})
    assert all(np.isfinite(frame.to_numpy(dtype=float)).all() for frame in model.history.values())
    _assert_finite(family, model)


QUERY_EQUAL_INTENSITIES = {
    "31 markers only": lambda adata: adata[:, :6].copy(),
    "31 other variables": lambda adata: _var_names(lambda n: [*n[:6], *(f"x{i}" for i in n[6:])])(adata),
    "33 unseen label": _column("cell_type", lambda a: ["new"] * a.n_obs),
}


@pytest.mark.parametrize("row", QUERY_EQUAL_INTENSITIES)
def test_query_is_equal_to_the_clean_data(fitted, row):
    """Protects queries that hold the same markers in another form: the same embedding."""
    z = fitted.model.get_latent_representation(QUERY_EQUAL_INTENSITIES[row](fitted.make()))
    np.testing.assert_allclose(z, fitted.z, rtol=1e-6, atol=1e-6)
