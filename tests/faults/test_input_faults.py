"""Faulty and unusual input, one row per fault, for every model family.

A row is either refused with one sentence that names the field (and then nothing is written), or accepted with finite
results, equal to those of the clean data where the content is the same. A new family joins by one line in FAMILIES.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import scvi
from anndata import AnnData

from cellweave.model import StackModel


class Family(NamedTuple):
    """How to build, train and ask a model."""

    model: type
    arguments: dict[str, Any]
    training: dict[str, Any]

    def fit(self, adata: AnnData, **setup: Any) -> Any:
        scvi.settings.seed = 0
        self.model.setup_anndata(adata, **{"batch_key": "batch", "labels_key": "cell_type", **setup})
        model = self.model(adata, **self.arguments)
        model.train(accelerator="cpu", enable_progress_bar=False, **self.training)
        return model


TINY = {"n_hidden": 4, "token_dim": 4, "n_layers": 1, "n_heads": 2, "n_cells": 16, "n_proj": 4}
FAMILIES = {
    "stack": Family(StackModel, TINY, {"max_epochs": 1, "batch_size": 32}),
}


@pytest.fixture(params=FAMILIES)
def family(request) -> Family:
    return FAMILIES[request.param]


class Fitted(NamedTuple):
    """A model of a family trained on clean data, and its embedding of them."""

    family: Family
    model: Any
    z: np.ndarray


@pytest.fixture(scope="module", params=FAMILIES)
def fitted(request, make_adata) -> Fitted:
    family = FAMILIES[request.param]
    model = family.fit(make_adata())
    return Fitted(family, model, model.get_latent_representation())


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


# ---------------------------------------------------------------- refused at setup

# row of the fault table -> (change, options of setup, error, pieces of its message)
REFUSED = {
    "1 one NaN, dense": (_set((3, 4, np.nan), sparse=False), {}, ValueError, "1 value.*NaN.*'cell3', gene 'gene4'"),
    "2 one NaN, sparse": (_set((3, 4, np.nan)), {}, ValueError, "1 value.*NaN.*'cell3', gene 'gene4'"),
    "3 one infinite value": (_set((3, 4, np.inf)), {}, ValueError, "1 value.*infinite.*'cell3', gene 'gene4'"),
    "4 one negative value": (_set((3, 4, -1)), {}, ValueError, "1 value.*negative.*'cell3', gene 'gene4'"),
    "5 all negative": (_x(lambda x: -1 - x.toarray()), {}, ValueError, "1920 value.*negative.*'cell0', gene 'gene0'"),
    "8 repeated genes": (_var_names(lambda n: ["g", "g", *n[2:]]), {}, ValueError, r"`adata.var_names` repeats 1.*'g'"),
    "12 all-zero matrix": (_zero(), {}, ValueError, "`adata.X` holds only zeros"),
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
    "22 value 2^40": (_set((3, 4, 2.0**40)), {}, ValueError, r"1 value.*larger than 2\^24.*'cell3', gene 'gene4'"),
    "22 value 1e20": (_set((3, 4, 1e20)), {}, ValueError, r"1 value.*larger than 2\^24.*'cell3', gene 'gene4'"),
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
        "`batch_key='lane'` not found; `adata.obs` has",
    ),
    "26 no cells": (lambda adata: adata[:0].copy(), {}, ValueError, r"no cells \(shape \(0, 20\)\)"),
    "28 no genes": (lambda adata: adata[:, :0].copy(), {}, ValueError, r"no genes \(shape \(150, 0\)\)"),
}


@pytest.mark.parametrize("row", REFUSED)
def test_refused_at_setup(family, make_adata, row):
    """Protects users from failures deep in training: one sentence at setup, and the AnnData stays as it was."""
    change, options, error, message = REFUSED[row]
    n_cells = 150 if row.split()[0] in ("16", "28") else 96
    adata = change(make_adata(n_cells=n_cells))
    before = (list(adata.obs), sorted(adata.uns), sorted(adata.obsm))
    with pytest.raises(error, match=message) as caught:
        family.model.setup_anndata(adata, **{"batch_key": "batch", **options})
    assert "\n" not in str(caught.value)
    assert str(caught.value).strip("'\"").endswith(".")
    assert (list(adata.obs), sorted(adata.uns), sorted(adata.obsm)) == before


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
    "21 dense int64": (_x(lambda x: x.toarray().astype(np.int64)), None),
    "21 sparse uint16": (_x(lambda x: x.astype(np.uint16)), None),
    "21 Fortran order": (_x(lambda x: np.asfortranarray(x.toarray())), None),
    "23 repeated entries": (_x(_repeated_entries), None),
    "23 unsorted indices": (_x(_unsorted), None),
    "23 explicit zeros": (_x(_explicit_zeros), None),
    "24 int64 indices": (_x(_wide_index), None),
    "39 odd category names": (_column("batch", lambda a: a.obs["batch"].map({"b0": "a/\n 日本", "b1": "ß"})), None),
    "40 string column": (_column("batch", lambda a: a.obs["batch"].astype("string")), None),
    "40 object column": (_column("batch", lambda a: a.obs["batch"].astype(object)), None),
    "40 int column": (_column("batch", lambda a: a.obs["batch"].cat.codes.astype(int)), None),
    "40 bool column": (_column("batch", lambda a: a.obs["batch"] == "b1"), None),
}


@pytest.mark.parametrize("row", EQUAL)
def test_equal_to_the_clean_data(fitted, make_adata, row):
    """Protects results from how data are stored and named: a training run gives the identical embedding."""
    change, warning = EQUAL[row]
    adata = change(make_adata())
    if warning is None:
        model = fitted.family.fit(adata)
    else:
        with pytest.warns(UserWarning, match=warning):
            model = fitted.family.fit(adata)
    np.testing.assert_array_equal(model.get_latent_representation(), fitted.z)


def test_unused_category_gets_no_weights(family, make_adata):
    """Protects row 14: unused categories are dropped from the model and kept in the user's column."""
    adata = EQUAL["14 unused category"][0](make_adata())
    model = family.fit(adata)
    assert model.summary_stats.n_batch == 2
    assert list(adata.obs["batch"].cat.categories) == ["b0", "b1", "a_unused", "z"]


@pytest.mark.parametrize("storage", ["csr", "csc", "dense"])
def test_backed_file_is_equal_to_the_clean_data(fitted, make_adata, tmp_path, storage):
    """Protects row 34: training on a file on disk gives the identical embedding, also with compression."""
    adata = make_adata()
    adata.X = {"csr": adata.X, "csc": sp.csc_matrix(adata.X), "dense": adata.X.toarray()}[storage]
    adata.write_h5ad(tmp_path / "a.h5ad", compression="gzip")
    model = fitted.family.fit(ad.read_h5ad(tmp_path / "a.h5ad", backed="r"))
    np.testing.assert_array_equal(model.get_latent_representation(), fitted.z)


# ---------------------------------------------------------------- accepted, finite

FINITE = {
    "6 log-normalised values": (_x(lambda x: x.log1p()), "non-integer values"),
    "10 all-zero gene": (_zero(genes=[2, 7]), None),
    "11 all-zero cells": (_zero(cells=[5, 6]), r"2 cell\(s\) have no counts in `adata.X` \(first: 'cell5'\)"),
    "15 category with one cell": (_column("batch", lambda a: ["x"] + ["y"] * (a.n_obs - 1)), None),
    "21 bool": (_x(lambda x: x.toarray() > 2), None),
    "27 one cell": (lambda adata: adata[:1].copy(), None),
    "27 last batch of one cell": (lambda adata: adata[:33].copy(), None),
    "29 fewer cells than a context": (lambda adata: adata[:7].copy(), None),
    "one gene": (lambda adata: adata[:, :1].copy(), None),
    "two genes": (lambda adata: adata[:, :2].copy(), None),
    "two cells": (lambda adata: adata[:2].copy(), None),
    "largest count": (_set((0, 0, 2.0**24)), None),
}


@pytest.mark.filterwarnings("ignore:Category 0 in adata.obs:UserWarning")
@pytest.mark.filterwarnings("ignore:.*have no counts:UserWarning")
@pytest.mark.parametrize("row", FINITE)
def test_unusual_but_accepted(family, make_adata, row):
    """Protects small, empty and odd data: training runs and every cell has a finite embedding and expression."""
    change, warning = FINITE[row]
    adata = change(make_adata())
    if warning is None:
        model = family.fit(adata)
    else:
        with pytest.warns(UserWarning, match=warning):
            model = family.fit(adata)
    z = model.get_latent_representation()
    assert z.shape[0] == adata.n_obs
    assert np.isfinite(z).all()
    assert np.isfinite(model.get_normalized_expression(return_numpy=True)).all()
    assert np.isfinite(pd.DataFrame(model.history["train_loss"]).to_numpy(dtype=float)).all()


# ---------------------------------------------------------------- queries

QUERY_REFUSED = {
    "1 NaN": (_set((3, 4, np.nan)), "NaN.*'cell3', gene 'gene4'"),
    "4 negative": (_set((3, 4, -2)), "negative.*'cell3', gene 'gene4'"),
    "8 repeated genes": (_var_names(lambda n: ["gene0", "gene0", *n[2:]]), "repeats 1 gene name"),
    "13 label with NaN": (_column("cell_type", _with_missing), r"`adata.obs\['cell_type'\]`.*missing in 1 cell"),
    "30 no overlap": (_var_names(lambda n: [f"x{i}" for i in n]), "Only 0 of the 20 genes.*`min_overlap=0.5`"),
    "30 small overlap": (lambda a: a[:, :9].copy(), "Only 9 of the 20 genes.*`min_overlap=0.5`"),
    "32 other case": (_var_names(lambda n: [i.upper() for i in n]), "Only 0 of the 20 genes.*'gene0'.*'GENE0'"),
}


@pytest.mark.parametrize("row", QUERY_REFUSED)
def test_query_is_refused(fitted, make_adata, row):
    """Protects trained models from faulty queries: one sentence, nothing computed, nothing written."""
    change, message = QUERY_REFUSED[row]
    query = change(make_adata())
    before = (list(query.obs), sorted(query.uns))
    with pytest.raises(ValueError, match=message):
        fitted.model.get_latent_representation(query)
    assert (list(query.obs), sorted(query.uns)) == before


QUERY_EQUAL = {
    "17 view": lambda adata: adata[:],
    "31 permuted genes": lambda adata: adata[:, ::-1].copy(),
    "31 permuted genes of a view": lambda adata: adata[:, ::-1],
    "33 unseen category that is not read": _column("batch", lambda a: ["new"] * a.n_obs),
}


@pytest.mark.parametrize("row", QUERY_EQUAL)
def test_query_is_equal_to_the_clean_data(fitted, make_adata, row):
    """Protects queries that hold the same counts in another form: the same embedding."""
    z = fitted.model.get_latent_representation(QUERY_EQUAL[row](make_adata()))
    np.testing.assert_allclose(z, fitted.z, rtol=1e-6, atol=1e-6)


def test_dask_works_or_is_refused_in_one_sentence(fitted, make_adata):
    """Protects row 35: lazy arrays either give the identical embedding or a sentence that says what to do."""
    dask = pytest.importorskip("dask.array", reason="dask is an optional dependency")
    adata = make_adata()
    adata.X = dask.from_array(adata.X.toarray(), chunks=(20, 20))
    try:
        model = fitted.family.fit(adata)
    except (TypeError, ValueError) as error:
        assert "dask" in str(error)
        assert "\n" not in str(error)
    else:
        np.testing.assert_array_equal(model.get_latent_representation(), fitted.z)


def test_results_under_an_existing_key_are_replaced_with_their_provenance(family, make_adata):
    """Protects row 38: a second result under the same key replaces values and provenance together."""
    model = family.fit(make_adata())
    model.get_latent_representation(key_added="z", seed=1)
    second = model.get_latent_representation(key_added="z", seed=2)
    np.testing.assert_array_equal(model.adata.obsm["z"], second)
    assert model.adata.uns["cellweave"]["z"]["parameters"]["seed"] == 2
