"""Faulty and unusual input and queries, one row per fault, for every model family.

A row is either refused with one sentence that names the field (and then nothing is written), or accepted with finite
results, equal to those of the clean data where the content is the same. Labels begin with the number of the row in
the fault table; ``test_rows.py`` counts them.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import cellweave as cw

# ---------------------------------------------------------------- changes of clean data


def _set(*entries: tuple[int, int, float], sparse: bool = True) -> Callable:
    def change(adata):
        x = adata.X.toarray().astype(np.float64)
        for cell, gene, value in entries:
            x[cell, gene] = value
        adata.X = sp.csr_matrix(x) if sparse else x
        return adata

    return change


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


def _in_layer_only(adata):
    adata.layers["counts"] = adata.X
    adata.X = None
    return adata


def _zero(cells: Any = slice(None), genes: Any = slice(None)) -> Callable:
    def convert(x):
        x = x.toarray()
        x[cells, genes] = 0
        return sp.csr_matrix(x)

    return _x(convert)


def _with_missing(adata):
    return adata.obs["batch"].astype(object).where(np.arange(adata.n_obs) != 4)


def _log_normalised(adata):
    adata.layers["raw"] = adata.X.copy()
    adata.X = adata.X.log1p()
    return adata


def _arrow(convert: Callable) -> Callable:
    """A column backed by Arrow; ``convert`` maps pyarrow and the column to values with such a type."""

    def change(adata):
        pa = pytest.importorskip("pyarrow", reason="Arrow-backed columns need pyarrow")
        adata.obs["batch"] = convert(pa, adata.obs["batch"])
        return adata

    return change


@contextmanager
def _warns_once(pattern: str | None) -> Iterator[None]:
    """Exactly one warning of ``pattern``, however often the data are looked at; with None any warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    if pattern is not None:
        assert len([w for w in caught if re.search(pattern, str(w.message))]) == 1


def _only(kinds: str, rows: Any) -> list:
    """Rows for models that read one of ``kinds``."""
    return [pytest.param(row, marks=pytest.mark.reads(*kinds.split())) for row in rows]


# ---------------------------------------------------------------- refused at setup

# row of the fault table -> (change, options of setup, error, pieces of its message)
REFUSED = {
    "8 repeated genes": (_var_names(lambda n: ["g", "g", *n[2:]]), {}, ValueError, r"`adata.var_names` repeats 1.*'g'"),
    "13 category with NaN": (
        _column("batch", _with_missing),
        {},
        ValueError,
        r"`adata.obs\['batch'\]`.* 1 cell.*'cell4'",
    ),
    "16 continuous column": (
        _column("batch", lambda a: np.linspace(0, 1, a.n_obs)),
        {},
        ValueError,
        r"`adata.obs\['batch'\]`.* 150 distinct numbers in 150 cells and looks continuous",
    ),
    "17 view": (lambda adata: adata[:50], {}, ValueError, r"`adata` is a view.*`adata = adata.copy\(\)`"),
    "25 X is None": (_in_layer_only, {}, KeyError, "`adata.X` is empty.*`adata.layers` has 'counts'"),
    "25 layer missing": (
        lambda a: a,
        {"layer": "raw"},
        KeyError,
        "`layer='raw'` not found; `adata.layers` has nothing",
    ),
    "25 column missing": (
        lambda a: a,
        {"batch_key": "lane"},
        KeyError,
        "`(batch_key|pairing_keys)='lane'` not found; `adata.obs` has",
    ),
    "26 no cells": (lambda adata: adata[:0].copy(), {}, ValueError, r"no cells \(shape \(0, 20\)\)"),
    "28 no genes": (lambda adata: adata[:, :0].copy(), {}, ValueError, r"no genes \(shape \(150, 0\)\)"),
}
REFUSED_VALUES = {
    "1 one NaN, dense": (_set((3, 4, np.nan), sparse=False), {}, ValueError, "1 value.*NaN.*'cell3', gene 'gene4'"),
    "2 one NaN, sparse": (_set((3, 4, np.nan)), {}, ValueError, "1 value.*NaN.*'cell3', gene 'gene4'"),
    "3 one infinite value": (_set((3, 4, np.inf)), {}, ValueError, "1 value.*infinite.*'cell3', gene 'gene4'"),
    "4 one negative value": (_set((3, 4, -1)), {}, ValueError, "1 value.*negative.*'cell3', gene 'gene4'"),
    "5 all negative": (_x(lambda x: -1 - x.toarray()), {}, ValueError, "1920 value.*negative.*'cell0', gene 'gene0'"),
    "12 all-zero matrix": (_zero(), {}, ValueError, "`adata.X` holds only zeros"),
}
REFUSED_COUNTS = {
    "6 log-normalised values": (
        _log_normalised,
        {},
        ValueError,
        r"`adata.X` has \d+ non-integer value\(s\) \(first: cell 'cell0', gene 'gene\d+'\).*these look like counts: "
        "`layer='raw'`.*`allow_noncounts=True`",
    ),
    "6 one fraction": (_set((3, 4, 0.5)), {}, ValueError, r"1 non-integer.*'cell3', gene 'gene4'.*with `layer=`"),
    "22 value 2^40": (_set((3, 4, 2.0**40)), {}, ValueError, r"1 value.*larger than 2\^24.*'cell3', gene 'gene4'"),
    "22 value 1e20": (_set((3, 4, 1e20)), {}, ValueError, r"1 value.*larger than 2\^24.*'cell3', gene 'gene4'"),
}
REFUSED_EXPRESSION = {
    "7 raw counts": (
        _x(lambda x: np.ceil(x.toarray())),
        {},
        ValueError,
        "`adata.X` holds integers up to .* look like counts",
    ),
    "7 normalised, not logarithmised": (
        _x(lambda x: 100 * x),
        {},
        ValueError,
        "too large for log-normalised expression",
    ),
    "22 value of 2^40": (
        _set((3, 4, 2.0**40)),
        {},
        ValueError,
        r"values up to 1\.1e\+12, too large for log-normalised",
    ),
}


@pytest.mark.parametrize(
    "row",
    [
        *REFUSED,
        *_only("counts expression", REFUSED_VALUES),
        *_only("counts", REFUSED_COUNTS),
        *_only("expression", REFUSED_EXPRESSION),
    ],
)
def test_refused_at_setup(family, make, refuses, row):
    """Protects users from failures deep in training: one sentence at setup, and the AnnData stays as it was."""
    change, options, error, message = {**REFUSED, **REFUSED_VALUES, **REFUSED_COUNTS, **REFUSED_EXPRESSION}[row]
    n_cells = 150 if row.split()[0] in ("16", "28") else 96
    adata = change(make(n_cells=n_cells))
    with refuses(adata, error, message):
        family.register(adata, **{"batch_key": "batch", **options})


# ---------------------------------------------------------------- accepted, equal to the clean data


def _repeated_entries(x):
    coo = sp.coo_matrix(x)
    data = np.concatenate([coo.data - 1, np.ones_like(coo.data)])
    row, column = np.concatenate([coo.row, coo.row]), np.concatenate([coo.col, coo.col])
    order = np.argsort(row, kind="stable")
    return sp.csr_matrix((data[order], column[order], 2 * x.indptr), shape=x.shape)


def _explicit_zeros(x):
    n_cells, n_genes = x.shape
    indptr = np.arange(0, n_cells * n_genes + 1, n_genes)
    return sp.csr_matrix((x.toarray().ravel(), np.tile(np.arange(n_genes), n_cells), indptr), shape=x.shape)


def _wide_index(x):
    x.indptr, x.indices = x.indptr.astype(np.int64), x.indices.astype(np.int64)
    return x


def _unsorted(x):
    x = x.tocsc().tocsr()
    for i in range(x.shape[0]):
        part = slice(x.indptr[i], x.indptr[i + 1])
        x.indices[part], x.data[part] = x.indices[part][::-1].copy(), x.data[part][::-1].copy()
    x.has_sorted_indices = False
    return x


EQUAL = {
    "9 repeated cell names": (lambda a: setattr(a, "obs_names", ["c"] * a.n_obs) or a, "not unique"),
    "14 unused category": (_column("batch", lambda a: a.obs["batch"].cat.add_categories(["a_unused", "z"])), None),
    "18 CSC": (_x(sp.csc_matrix), None),
    "20 csr_array": (_x(sp.csr_array), None),
    "20 csc_array": (_x(sp.csc_array), None),
    "21 dense float32": (_x(lambda x: x.toarray()), None),
    "21 dense float64": (_x(lambda x: x.toarray().astype(np.float64)), None),
    "21 dense float16": (_x(lambda x: x.toarray().astype(np.float16)), None),
    "21 Fortran order": (_x(lambda x: np.asfortranarray(x.toarray())), None),
    "23 repeated entries": (_x(_repeated_entries), None),
    "23 unsorted indices": (_x(_unsorted), None),
    "23 explicit zeros": (_x(_explicit_zeros), None),
    "24 int64 indices": (_x(_wide_index), None),
    "39 odd category names": (_column("batch", lambda a: a.obs["batch"].map({"b0": "a/\n 日本", "b1": "ß"})), None),
    "40 string column": (_column("batch", lambda a: a.obs["batch"].astype("string")), None),
    "40 object column": (_column("batch", lambda a: a.obs["batch"].astype(object)), None),
    "40 str column": (_column("batch", lambda a: a.obs["batch"].astype("str")), None),
    "40 nullable int column": (_column("batch", lambda a: a.obs["batch"].cat.codes.astype("Int64")), None),
    "40 nullable bool column": (_column("batch", lambda a: (a.obs["batch"] == "b1").astype("boolean")), None),
    "40 arrow strings": (_arrow(lambda pa, c: c.astype(str).astype(pd.ArrowDtype(pa.string()))), None),
    "40 string[pyarrow]": (_arrow(lambda pa, c: c.astype(str).astype("string[pyarrow]")), None),
    "40 arrow integers": (_arrow(lambda pa, c: c.cat.codes.astype(int).astype(pd.ArrowDtype(pa.int64()))), None),
    "40 arrow booleans": (_arrow(lambda pa, c: (c == "b1").astype(pd.ArrowDtype(pa.bool_()))), None),
    "40 categories of arrow strings": (
        _arrow(lambda pa, c: c.cat.rename_categories(c.cat.categories.astype(pd.ArrowDtype(pa.string())))),
        None,
    ),
    "40 int column": (_column("batch", lambda a: a.obs["batch"].cat.codes.astype(int)), None),
    "40 bool column": (_column("batch", lambda a: a.obs["batch"] == "b1"), None),
}
EQUAL_COUNTS = {
    "21 dense int64": (_x(lambda x: x.toarray().astype(np.int64)), None),
    "21 sparse uint16": (_x(lambda x: x.astype(np.uint16)), None),
}


@pytest.mark.parametrize("row", [*EQUAL, *_only("counts", EQUAL_COUNTS)])
def test_equal_to_the_clean_data(fitted, row):
    """Protects results from how data are stored and named: a training run gives the identical embedding."""
    change, warning = {**EQUAL, **EQUAL_COUNTS}[row]
    adata = change(fitted.make())
    with _warns_once(warning):
        model = fitted.family.fit(adata)
        np.testing.assert_array_equal(model.get_latent_representation(), fitted.z)


def test_unused_category_gets_no_weights(family, make):
    """Protects row 14: unused categories are dropped from the model and kept in the user's column."""
    adata = EQUAL["14 unused category"][0](make())
    model = family.fit(adata)
    if family.names is None:
        assert model.summary_stats.n_batch == 2
    else:
        assert model._facts["contexts"] == ["b0", "b1"]
    assert list(adata.obs["batch"].cat.categories) == ["b0", "b1", "a_unused", "z"]


@pytest.mark.parametrize("storage", ["csr", "csc", "dense"])
def test_backed_file_is_equal_to_the_clean_data(fitted, tmp_path, storage):
    """Protects row 34: training on a file on disk gives the identical embedding, also with compression."""
    adata = fitted.make()
    adata.X = {"csr": adata.X, "csc": sp.csc_matrix(adata.X), "dense": adata.X.toarray()}[storage]
    adata.write_h5ad(tmp_path / "a.h5ad", compression="gzip")
    model = fitted.family.fit(ad.read_h5ad(tmp_path / "a.h5ad", backed="r"))
    np.testing.assert_array_equal(model.get_latent_representation(), fitted.z)


# ---------------------------------------------------------------- accepted, finite

FINITE = {
    "10 all-zero gene": (_zero(genes=[2, 7]), None),
    "15 category with one cell": (_column("batch", lambda a: ["x"] + ["y"] * (a.n_obs - 1)), "fewer than 3 cells"),
    "27 last batch of one cell": (lambda adata: adata[:33].copy(), None),
    "29 fewer cells than a context": (lambda adata: adata[:7].copy(), None),
    "two cells": (lambda adata: adata[:2].copy(), None),
}
# true and false are no expression, and one cell is no screen
FINITE_OTHERS = {
    "21 bool": (_x(lambda x: x.toarray() > 2), None),
    "27 one cell": (lambda adata: adata[:1].copy(), None),
}
FINITE_COUNTS = {
    "11 all-zero cells": (_zero(cells=[5, 6]), r"2 cell\(s\) have no counts in `adata.X` \(first: 'cell5'\)"),
    "one gene": (lambda adata: adata[:, :1].copy(), None),
    "two genes": (lambda adata: adata[:, :2].copy(), None),
    "largest count": (_set((0, 0, 2.0**24)), None),
}


@pytest.mark.parametrize("row", [*FINITE, *_only("counts intensities", FINITE_OTHERS), *_only("counts", FINITE_COUNTS)])
def test_unusual_but_accepted(family, make, row):
    """Protects small, empty and odd data: training runs and every cell has finite results."""
    change, warning = {**FINITE, **FINITE_OTHERS, **FINITE_COUNTS}[row]
    adata = change(make())
    if family.reads == "expression":  # a batch has no weights there, so a small one is normal
        warning = None
    with _warns_once(warning):
        model = family.fit(adata)
        _assert_finite(family, model)


def _assert_finite(family, model) -> None:
    for name, values in family.results(model).items():
        assert values.shape[0] == model.adata.n_obs, name
        assert np.isfinite(values).all(), name
    assert np.isfinite(pd.DataFrame(model.history["train_loss"]).to_numpy(dtype=float)).all()


@pytest.mark.reads("counts")
def test_noncounts_are_accepted_when_asked_for(family, make):
    """Protects row 6, the escape: `allow_noncounts=True` trains on log values, with one warning that names the counts."""
    with _warns_once("non-integer value.*`allow_noncounts=True` allows; these look like counts: `layer='raw'`"):
        _assert_finite(family, family.fit(_log_normalised(make()), allow_noncounts=True))


@pytest.mark.reads("counts")
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_large_counts_do_not_overflow_in_half_precision(family, make_adata, precision):
    """Protects row 50: with libraries of a million and one count of 2^24 every loss is finite under autocast."""
    adata = make_adata()
    x = adata.X.toarray() * 10_000
    x[0, 0] = 2.0**24
    adata.X = x
    assert np.median(x.sum(axis=1)) > 4e5
    model = family.fit(adata, training={"precision": precision})
    assert all(np.isfinite(frame.to_numpy(dtype=float)).all() for frame in model.history.values())
    _assert_finite(family, model)


@pytest.mark.parametrize("dtype", [object, "category", "string", "str"])
def test_order_of_categories(family, make, dtype):
    """Protects row 40: text columns of every type give categories in one order, the same with pandas 2 and 3."""
    adata = make()
    names = np.array(["b", "B", "é", "10", "9", "a b"], dtype=object)
    adata.obs["batch"] = pd.Series(names[np.arange(adata.n_obs) // 3 % 6], index=adata.obs_names).astype(dtype)
    model = family.fit(adata)
    if family.names is None:
        mapping = model.registry["field_registries"]["batch"]["state_registry"]["categorical_mapping"]
    else:
        mapping = model._facts["contexts"]
    assert list(mapping) == ["10", "9", "B", "a b", "b", "é"]


@pytest.mark.reads("counts")
def test_fewer_cells_than_a_context_are_announced_once(family, make_adata, tmp_path):
    """Protects row 29: contexts that must repeat cells are announced once per data set; small groups are normal."""
    n_cells = family.arguments.get("n_cells")
    if n_cells is None:
        pytest.skip("a family without contexts")
    pattern = rf"have 7 cell\(s\), fewer than one context \(`n_cells={n_cells}`\)"
    with _warns_once(pattern):
        model = family.fit(make_adata()[:7].copy())
        for seed in range(3):
            model.get_latent_representation(seed=seed)
    model = family.fit(make_adata())
    with _warns_once(pattern):
        model.get_latent_representation(make_adata()[:7].copy())
    model.save(tmp_path / "model")
    with _warns_once(pattern):
        family.model.load(tmp_path / "model", make_adata()[:7].copy(), accelerator="cpu").get_latent_representation()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*fewer than one context")
        model.get_latent_representation(indices=[1, 2])
        groups = make_adata()
        groups.obs["donor"] = [f"d{i // 5}" for i in range(groups.n_obs)]
        family.fit(groups, context_key="donor").get_latent_representation()


# ---------------------------------------------------------------- queries

QUERY_REFUSED = {
    "8 repeated genes": (_var_names(lambda n: ["gene0", "gene0", *n[2:]]), "repeats 1 gene name.*'gene0'"),
    "26 no cells": (lambda a: a[:0].copy(), r"no cells \(shape \(0, 20\)\)"),
    "28 no genes": (lambda a: a[:, :0].copy(), r"no genes \(shape \(96, 0\)\)"),
}
QUERY_REFUSED_OTHERS = {
    "13 label with NaN": (_column("cell_type", _with_missing), r"`adata.obs\['cell_type'\]`.*missing in 1 cell"),
}
QUERY_REFUSED_VALUES = {
    "1 NaN": (_set((3, 4, np.nan)), "1 value.*NaN.*'cell3', gene 'gene4'"),
    "3 infinite": (_set((3, 4, -np.inf)), "1 value.*infinite.*'cell3', gene 'gene4'"),
    "4 negative": (_set((3, 4, -2)), "1 value.*negative.*'cell3', gene 'gene4'"),
    "30 no overlap": (_var_names(lambda n: [f"x{i}" for i in n]), "Only 0 of the 20 genes.*`min_overlap=0.5`"),
    "30 small overlap": (
        lambda a: a[:, :9].copy(),
        r"Only 9 of the 20 genes.*`min_overlap=0.5`.*`cellweave.pp.align_genes\(adata, model.genes, min_overlap=",
    ),
    "32 other case": (
        _var_names(lambda n: [i.upper() for i in n]),
        "Only 0 of the 20 genes.*20 more would match in another letter case .*'gene0' and 'GENE0'",
    ),
    "32 names in a column": (
        lambda a: _var_names(lambda n: [f"ENSG{i:011d}" for i in range(20)])(_with_symbols(a)),
        r"Only 0 of the 20 genes.*`adata.var\['symbol'\]` would match 20 of them: set `adata.var_names = ",
    ),
}
QUERY_REFUSED_COUNTS = {
    "6 log-normalised values": (
        _log_normalised,
        r"\d+ non-integer.*'cell0'.*these look like counts: `layer='raw'`.*`allow_noncounts=True`",
    ),
    "22 value 2^40": (_set((3, 4, 2.0**40)), r"1 value.*larger than 2\^24.*'cell3', gene 'gene4'"),
}


QUERY_REFUSED_EXPRESSION = {
    "7 counts": (_x(lambda x: np.ceil(x.toarray())), "`adata.X` holds integers up to .* look like counts"),
    "13 batch with NaN": (_column("batch", _with_missing), r"`adata.obs\['batch'\]`.*missing in 1 cell"),
    "13 perturbation with NaN": (
        _column("perturbation", lambda a: a.obs["perturbation"].astype(object).where(np.arange(a.n_obs) != 4)),
        r"`adata.obs\['perturbation'\]`.*missing in 1 cell",
    ),
}


def _with_symbols(adata):
    adata.var["symbol"], adata.var["number"] = list(adata.var_names), np.arange(adata.n_vars)
    return adata


QUERIES_REFUSED = {
    "counts intensities expression": QUERY_REFUSED,
    "counts intensities": QUERY_REFUSED_OTHERS,
    "counts expression": QUERY_REFUSED_VALUES,
    "counts": QUERY_REFUSED_COUNTS,
    "expression": QUERY_REFUSED_EXPRESSION,
}


@pytest.mark.parametrize("row", [param for kinds, rows in QUERIES_REFUSED.items() for param in _only(kinds, rows)])
def test_query_is_refused(fitted, refuses, row):
    """Protects trained models from faulty queries: one sentence, nothing computed, nothing written."""
    change, message = next(rows[row] for rows in QUERIES_REFUSED.values() if row in rows)
    for name, options in fitted.family.values.items():
        query = change(fitted.make())
        with refuses(query, ValueError, message):
            getattr(fitted.model, name)(query, **options)


@pytest.mark.reads("counts")
def test_unseen_batch_is_refused_where_it_is_read(family, make_adata, refuses):
    """Protects row 33: a model that reads the batch lists unknown ones, and refuses them; there is nothing to map them to."""
    adata = make_adata()
    family.model.setup_anndata(adata, batch_key="batch")
    model = family.model(adata, **family.arguments, batch_condition="decoder")
    model.train(accelerator="cpu", enable_progress_bar=False, **family.training)
    query = make_adata()
    query.obs["batch"] = ["b0", "new1", "new2"] * 32
    message = r"`adata.obs\['batch'\]` .*2 value\(s\) in 64 cell\(s\).*'new1', 'new2'.*it knows 'b0', 'b1', so"
    with refuses(query, ValueError, message):
        model.get_latent_representation(query)


@pytest.mark.reads("counts")
@pytest.mark.parametrize(("n_found", "level"), [(20, "info"), (18, "info"), (17, "warning"), (10, "warning")])
def test_overlap_is_always_reported(fitted, make_adata, caplog, n_found, level):
    """Protects row 30: how many genes were found is logged, and a warning below 90 %."""
    query = make_adata()[:, ::-1][:, :n_found].copy()
    report = "All 20 genes of the model" if n_found == 20 else f"{n_found} of the 20 genes of the model are in"
    with caplog.at_level(logging.INFO, logger="cellweave"), _warns_once(report if level == "warning" else None):
        fitted.model.get_latent_representation(query)
    assert (report in caplog.text) == (level == "info")


@pytest.mark.reads("counts")
def test_lower_overlap_can_be_accepted(fitted, make_adata):
    """Protects row 30, the escape: what the error proposes works, and equals zeros for the missing genes."""
    adata = make_adata()
    zeroed = _zero(genes=slice(4, None))(adata.copy())
    with _warns_once("4 of the 20 genes of the model"):
        panel = cw.pp.align_genes(adata[:, :4].copy(), fitted.model.genes, min_overlap=0.2)
    z = fitted.model.get_latent_representation(panel)
    np.testing.assert_array_equal(z, fitted.model.get_latent_representation(zeroed))


@pytest.mark.reads("counts")
@pytest.mark.parametrize("side", ["data", "model", "both"])
def test_version_suffixes_are_ignored_with_a_notice(family, make_adata, side):
    """Protects row 32: `ENSG....12` matches `ENSG...` and `ENSG....7`, one warning says so, and layers are written."""
    plain = [f"ENSG{i:011d}" for i in range(20)]
    trained_on, asked = make_adata(), make_adata()[:, ::-1].copy()
    trained_on.var_names = [f"{name}.7" for name in plain] if side != "data" else plain
    asked.var_names = [f"{name}.12" for name in plain[::-1]] if side != "model" else plain[::-1]
    model = family.fit(trained_on)
    with _warns_once(r"20 of the 20 genes match only without the version suffix .*'ENSG0+(\.7)?' and 'ENSG0+(\.12)?'"):
        z = model.get_latent_representation(asked)
    np.testing.assert_allclose(z, model.get_latent_representation(), rtol=1e-6, atol=1e-6)
    expected = model.get_normalized_expression(return_numpy=True)
    model.get_normalized_expression(asked, key_added="layer")
    np.testing.assert_allclose(asked.layers["layer"], expected[:, ::-1], rtol=1e-5)


QUERY_EQUAL = {
    "17 view": lambda adata: adata[:],
    "31 permuted genes": lambda adata: adata[:, ::-1].copy(),
    "31 permuted genes of a view": lambda adata: adata[:, ::-1],
}
QUERY_EQUAL_COUNTS = {"33 unseen category that is not read": _column("batch", lambda a: ["new"] * a.n_obs)}


@pytest.mark.parametrize("row", [*QUERY_EQUAL, *_only("counts", QUERY_EQUAL_COUNTS)])
def test_query_is_equal_to_the_clean_data(fitted, row):
    """Protects queries that hold the same values in another form: the same embedding."""
    change = {**QUERY_EQUAL, **QUERY_EQUAL_COUNTS}[row]
    z = fitted.model.get_latent_representation(change(fitted.make()))
    np.testing.assert_allclose(z, fitted.z, rtol=1e-6, atol=1e-6)


def test_dask_works_or_is_refused_in_one_sentence(fitted):
    """Protects row 35: lazy arrays either give the identical embedding or a sentence that says what to do."""
    dask = pytest.importorskip("dask.array", reason="dask is an optional dependency")
    adata = fitted.make()
    adata.X = dask.from_array(adata.X.toarray(), chunks=(20, 20))
    try:
        model = fitted.family.fit(adata)
    except (TypeError, ValueError) as error:
        assert "dask" in str(error)
        assert "\n" not in str(error)
    else:
        np.testing.assert_array_equal(model.get_latent_representation(), fitted.z)


@pytest.mark.reads("counts", "intensities")  # the perturbation cannot be left out; see tests/model/test_ccfm_inputs.py
@pytest.mark.parametrize("setup", ["setup_anndata", "setup_mudata"])
@pytest.mark.parametrize(("option", "advice"), [("batch_keys", "use `batch_key`"), ("colour", "it has .*'batch_key'")])
def test_misspelt_setup_arguments_are_refused(family, make, refuses, setup, option, advice):
    """Protects against a typo that would leave the batch out without a word: setup methods also take hidden options."""
    adata = make()
    with refuses(adata, TypeError, f"`{setup}` has no argument `{option}`; {advice}"):
        getattr(family.model, setup)(adata, **{option: "batch"})
