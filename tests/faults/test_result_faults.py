"""Results: what is already under a key (row 38), random state, and indices that need 64 bits (row 24)."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp

import cellweave
from cellweave.data import CellSetDataset, align_genes, check_counts
from cellweave.data._validate import _position

# getters with `key_added` -> (part of the AnnData, call)
WRITERS = {
    "get_latent_representation": "obsm",
    "get_normalized_expression": "layers",
}
GETTERS = {
    "get_latent_representation": {},
    "get_normalized_expression": {},
    "get_masked_predictions": {},
    "get_reconstruction_metrics": {},
    "get_attention": {"indices": [1, 2, 3]},
}


def _writers(family) -> list[tuple[str, str]]:
    return [(name, part) for name, part in WRITERS.items() if hasattr(family.model, name)]


def _foreign(part: str, adata) -> np.ndarray:
    return np.full(adata.shape if part == "layers" else (adata.n_obs, 2), 7.0)


def test_every_writer_is_listed(families):
    """Protects this file: a getter with `key_added` of any family must be in the table, and take `overwrite`."""
    for family in families.values():
        for name, method in vars_of(family.model).items():
            if "key_added" in getattr(getattr(method, "__code__", None), "co_varnames", ()) and name[0] != "_":
                assert name in WRITERS, f"add {name} of {family.model.__name__} to WRITERS"
                assert "overwrite" in method.__code__.co_varnames


def vars_of(model: type) -> dict[str, object]:
    return {name: getattr(model, name) for name in dir(model)}


def test_results_of_others_are_not_replaced(family, make_adata, refuses, monkeypatch):
    """Protects row 38: a key of the user is refused before anything is computed; `overwrite=True` replaces it."""
    model = family.fit(make_adata())
    for name, part in _writers(family):
        getattr(model.adata, part)["mine"] = _foreign(part, model.adata)
        with monkeypatch.context() as patch:
            patch.setattr(model.module, "forward", _must_not_run)
            patch.setattr(type(model), "_over_contexts", _must_not_run, raising=False)
            message = rf"`adata.{part}\['mine'\]` already exists.*{type(model).__name__}.*`overwrite=True`"
            with refuses(model.adata, ValueError, message):
                getattr(model, name)(key_added="mine")
        np.testing.assert_array_equal(getattr(model.adata, part)["mine"], _foreign(part, model.adata))
        result = getattr(model, name)(key_added="mine", overwrite=True)
        np.testing.assert_array_equal(getattr(model.adata, part)["mine"], result)
        assert model.adata.uns["cellweave"]["mine"]["part"] == part


def _must_not_run(*args, **kwargs):
    raise AssertionError("computed before the key was checked")


def test_results_of_the_same_class_are_replaced_with_their_provenance(family, make_adata):
    """Protects row 38: a second result under the same key replaces values and provenance together."""
    model = family.fit(make_adata())
    for name, part in _writers(family):
        getattr(model, name)(key_added=name, seed=1)
        second = getattr(model, name)(key_added=name, seed=2)
        np.testing.assert_array_equal(getattr(model.adata, part)[name], second)
        assert model.adata.uns["cellweave"][name]["parameters"]["seed"] == 2


def test_results_of_another_class_or_part_are_not_replaced(family, make_adata):
    """Protects row 38: the record must name this class and this part of the AnnData; old records name no part."""
    model = family.fit(make_adata())
    name, part = _writers(family)[0]
    getattr(model, name)(key_added="z")
    record = model.adata.uns["cellweave"]["z"]
    for change in ({"model": "OtherModel"}, {"part": "varm"}):
        model.adata.uns["cellweave"]["z"] = {**record, **change}
        with pytest.raises(ValueError, match="already exists"):
            getattr(model, name)(key_added="z")
    model.adata.uns["cellweave"]["z"] = {key: value for key, value in record.items() if key != "part"}
    getattr(model, name)(key_added="z")
    del model.adata.uns["cellweave"]
    with pytest.raises(ValueError, match=rf"`adata.{part}\['z'\]` already exists"):
        getattr(model, name)(key_added="z")


def test_key_must_be_a_name(family, make_adata, refuses):
    """Protects the AnnData from keys that no file can hold."""
    model = family.fit(make_adata())
    for name, _ in _writers(family):
        for key in ("", 3):
            with refuses(model.adata, ValueError, "`key_added` must be a name"):
                getattr(model, name)(key_added=key)


def test_no_getter_touches_the_random_state(family, make_adata, keeps_random_state):
    """Protects the user's own draws through setup, every getter, own data and queries, and writing."""
    adata = make_adata()
    with keeps_random_state():
        family.model.setup_anndata(adata, batch_key="batch", labels_key="cell_type", context_key="donor")
    model = family.fit(make_adata())
    found = [name for name in vars_of(family.model) if name.startswith("get_") and name in GETTERS]
    assert "get_latent_representation" in found
    for name in found:
        for options in ({}, {"adata": make_adata(seed=1)}):
            with keeps_random_state():
                getattr(model, name)(**GETTERS[name], **options)
    for name, _ in _writers(family):
        with keeps_random_state():
            getattr(model, name)(key_added="z")
            getattr(model, name)(make_adata()[:, ::-1].copy(), n_context_repeats=2)


def test_every_getter_is_listed(families):
    """Protects this file: every public `get_...` that cellweave defines, of any family, is in the table."""
    for family in families.values():
        ours = [
            name
            for name, method in vars_of(family.model).items()
            if name.startswith("get_") and getattr(method, "__module__", "").startswith("cellweave")
        ]
        assert set(ours) <= set(GETTERS)


# ---------------------------------------------------------------- row 24: more than 2^31 stored values


def _wide(adata):
    adata.X.indptr, adata.X.indices = adata.X.indptr.astype(np.int64), adata.X.indices.astype(np.int64)
    return adata


def test_position_beyond_two_to_the_31():
    """Protects row 24: the cell and gene of stored value number 2^31 + 6 are found, with no wrap to negative numbers."""
    n = 2**31
    block = sp.csr_matrix((2, 10), dtype=np.float32)
    block.indptr = np.array([0, n + 5, n + 9])
    block.indices = np.broadcast_to(np.int64(7), n + 9)  # takes no memory
    assert _position(block, n + 6) == (1, 7)
    assert _position(block, n + 4) == (0, 7)


def test_no_32_bit_index_is_written_in_our_code():
    """Protects row 24: no file of the package casts anything to 32-bit integers without checking the number of entries."""
    checked = {"pp/_store.py"}  # numbers of genes, and an index type chosen by the number of entries
    folder = Path(cellweave.__file__).parent
    casts = {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*.py")
        if re.search(r"\bint32\b|\bintc\b|\.int\(\)", path.read_text())
    }
    assert casts == checked


def test_wide_indices_stay_wide_and_right(fitted, make_adata):
    """Protects row 24: checks, alignment and sparse batches of int64 indices equal those of int32."""
    plain, wide = make_adata(), _wide(make_adata())
    check_counts(wide)
    assert wide.X.indptr.dtype == wide.X.indices.dtype == np.int64
    genes = list(plain.var_names[::-1])
    np.testing.assert_array_equal(align_genes(wide, genes).X.toarray(), align_genes(plain, genes).X.toarray())
    fitted.family.model.setup_anndata(wide)
    model = fitted.family.model(wide, **fitted.family.arguments)
    batch = CellSetDataset(model.adata_manager, load_sparse_tensor=True)[np.array([5, 2]), np.ones(2, dtype=bool)]
    assert batch["X"].crow_indices().dtype == batch["X"].col_indices().dtype
    np.testing.assert_array_equal(batch["X"].to_dense().numpy(), plain.X[[5, 2]].toarray())
