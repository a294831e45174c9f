"""Results: what is already under a key (row 38), random state, and indices that need 64 bits (row 24)."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import cellweave
from cellweave.data import CellSetDataset, align_genes, check_counts
from cellweave.data._validate import _position

# getters with `key_added` -> part of the AnnData
WRITERS = {
    "get_latent_representation": "obsm",
    "get_normalized_expression": "layers",
    "predict": "obs",
    "predict_proba": "obsm",
    "get_log_density": "obs",
    "correct_batch": "layers",
    "generate": "layers",
    "get_perturbation_effect": "layers",
}
# what must be asked of a getter, and the name of its data where it is not `adata`
ASKED = {
    "generate": {"perturbation": "gene0", "n_steps": 2},
    "get_perturbation_effect": {"perturbation": "gene0", "n_steps": 2},
    "predict_perturbation": {"perturbations": ["gene0"], "n_cells": 3, "n_steps": 2},
}
DATA = {"generate": "adata_ctrl", "predict_perturbation": "adata_ctrl"}
# an option of a getter that its record shows, and two values
OPTIONS = {
    "predict": ("min_probability", 0.1, 0.2),
    "predict_proba": ("level", "lineage", "lineage"),
    "get_log_density": (),
    "correct_batch": ("reference", "b0", "b1"),
    "generate": ("seed", 1, 2),
    "get_perturbation_effect": ("seed", 1, 2),
}
# every method that computes something from data or draws
GETTERS = {
    "get_latent_representation": {},
    "get_normalized_expression": {},
    "get_masked_predictions": {},
    "get_reconstruction_metrics": {},
    "get_attention": {"indices": [1, 2, 3]},
    "predict": {},
    "predict_proba": {},
    "get_log_density": {},
    "correct_batch": {},
    "get_marker_diagnostics": {},
    "get_population_diagnostics": {},
    "get_population_profiles": {},
    "refine_table": {},
    "generate": {},
    "get_perturbation_effect": {},
    "predict_perturbation": {},
}


def _writers(family) -> list[tuple[str, str]]:
    return [(name, part) for name, part in WRITERS.items() if _defines(family, name)]


def _defines(family, name: str) -> bool:
    """Whether a model has a method of ours; scvi-tools defines some that only say that there is none."""
    return getattr(getattr(family.model, name, None), "__module__", "").startswith("cellweave")


def _option(family, name: str) -> tuple:
    return OPTIONS.get(name, () if family.reads == "intensities" else ("seed", 1, 2))


def _ask(model, name: str, adata=None, **options):
    """Call a getter with what it must be asked."""
    data = {} if adata is None else {DATA.get(name, "adata"): adata}
    return getattr(model, name)(**ASKED.get(name, {}), **data, **options)


def _foreign(part: str, adata) -> np.ndarray:
    shape = {"layers": adata.shape, "obs": adata.n_obs, "obsm": (adata.n_obs, 2)}
    return np.full(shape[part], 7.0)


def _assert_written(written, result) -> None:
    """What was written is what was returned; layers have the columns that the model does not know as NaN."""
    written, result = pd.DataFrame(written), pd.DataFrame(result)
    np.testing.assert_array_equal(written.iloc[:, : result.shape[1]], result)
    assert written.iloc[:, result.shape[1] :].isna().all(axis=None)


def test_every_writer_is_listed(families):
    """Protects this file: a getter with `key_added` of any family must be in the table, and take `overwrite`."""
    for family in families.values():
        for name, method in vars_of(family.model).items():
            if "key_added" in getattr(getattr(method, "__code__", None), "co_varnames", ()) and name[0] != "_":
                assert name in WRITERS, f"add {name} of {family.model.__name__} to WRITERS"
                assert "overwrite" in method.__code__.co_varnames


def vars_of(model: type) -> dict[str, object]:
    return {name: getattr(model, name) for name in dir(model)}


def test_results_of_others_are_not_replaced(family, make, refuses, monkeypatch):
    """Protects row 38: a key of the user is refused before anything is computed; `overwrite=True` replaces it."""
    model = family.fit(make())
    for name, part in _writers(family):
        getattr(model.adata, part)["mine"] = _foreign(part, model.adata)
        with monkeypatch.context() as patch:
            patch.setattr(model.module, "forward", _must_not_run)
            for method in {"_computed", "_by_condition", "_predicted"}.intersection(dir(model)):
                patch.setattr(type(model), method, _must_not_run)
            message = rf"`adata.{part}\['mine'\]` already exists.*{type(model).__name__}.*`overwrite=True`"
            with refuses(model.adata, ValueError, message):
                _ask(model, name, key_added="mine")
        np.testing.assert_array_equal(getattr(model.adata, part)["mine"], _foreign(part, model.adata))
        result = _ask(model, name, key_added="mine", overwrite=True)
        _assert_written(getattr(model.adata, part)["mine"], result)
        assert model.adata.uns["cellweave"]["mine"]["part"] == part
        del getattr(model.adata, part)["mine"], model.adata.uns["cellweave"]["mine"]


def _must_not_run(*args, **kwargs):
    raise AssertionError("computed before the key was checked")


def test_results_of_the_same_class_are_replaced_with_their_provenance(family, make):
    """Protects row 38: a second result under the same key replaces values and provenance together."""
    model = family.fit(make())
    for name, part in _writers(family):
        option, *values = _option(family, name) or ("", None, None)
        for value in values:
            result = _ask(model, name, key_added=name, **({option: value} if option else {}))
            if name != "predict_proba" or option:
                _assert_written(getattr(model.adata, part)[name], result)
            assert model.adata.uns["cellweave"][name]["parameters"].get(option) == value


def test_results_of_another_class_or_part_are_not_replaced(family, make):
    """Protects row 38: the record must name this class and this part of the AnnData; old records name no part."""
    model = family.fit(make())
    name, part = _writers(family)[0]
    _ask(model, name, key_added="z")
    record = model.adata.uns["cellweave"]["z"]
    for change in ({"model": "OtherModel"}, {"part": "varm"}):
        model.adata.uns["cellweave"]["z"] = {**record, **change}
        with pytest.raises(ValueError, match="already exists"):
            _ask(model, name, key_added="z")
    model.adata.uns["cellweave"]["z"] = {key: value for key, value in record.items() if key != "part"}
    _ask(model, name, key_added="z")
    del model.adata.uns["cellweave"]
    with pytest.raises(ValueError, match=rf"`adata.{part}\['z'\]` already exists"):
        _ask(model, name, key_added="z")


def test_key_must_be_a_name(family, make, refuses):
    """Protects the AnnData from keys that no file can hold."""
    model = family.fit(make())
    for name, _ in _writers(family):
        for key in ("", 3):
            with refuses(model.adata, ValueError, "`key_added` must be a name"):
                _ask(model, name, key_added=key)


def test_no_getter_touches_the_random_state(family, make, keeps_random_state):
    """Protects the user's own draws through setup, every getter, own data and queries, and writing."""
    adata = make()
    with keeps_random_state():
        family.register(adata, **{**family.setup, "batch_key": "batch", "labels_key": "cell_type"})
    model = family.fit(make())
    found = [name for name in GETTERS if _defines(family, name)]
    assert "get_latent_representation" in found
    for name in found:
        for data in (None, make(seed=1)):
            with keeps_random_state():
                _ask(model, name, data, **GETTERS[name])
    for name, part in _writers(family):
        with keeps_random_state():
            _ask(model, name, key_added=f"z_{part}_{name}")
            more = {"n_context_repeats": 2} if family.reads == "counts" else {}
            _ask(model, name, make()[:, ::-1].copy(), **more)
    if hasattr(model, "sample"):
        with keeps_random_state():
            model.sample(5)
            model.sample(5, seed=3)


def test_every_getter_is_listed(families):
    """Protects this file: every public method of any family that takes cells (`indices`) is in the table."""
    for family in families.values():
        ours = [
            name
            for name, method in vars_of(family.model).items()
            if name[0] != "_"
            and getattr(method, "__module__", "").startswith("cellweave")
            and "indices" in getattr(getattr(method, "__code__", None), "co_varnames", ())
        ]
        assert "get_latent_representation" in ours
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


def test_wide_indices_stay_wide_and_right(fitted):
    """Protects row 24: checks, alignment and sparse batches of int64 indices equal those of int32."""
    plain, wide = fitted.make(), _wide(fitted.make())
    if fitted.family.reads == "counts":
        check_counts(wide)
    assert wide.X.indptr.dtype == wide.X.indices.dtype == np.int64
    genes = list(plain.var_names[::-1])
    np.testing.assert_array_equal(align_genes(wide, genes).X.toarray(), align_genes(plain, genes).X.toarray())
    fitted.family.register(wide)
    model = fitted.family.model(wide, **fitted.family.arguments)
    batch = CellSetDataset(model.adata_manager, load_sparse_tensor=True)[np.array([5, 2]), np.ones(2, dtype=bool)]
    assert batch["X"].crow_indices().dtype == batch["X"].col_indices().dtype
    np.testing.assert_array_equal(batch["X"].to_dense().numpy(), plain.X[[5, 2]].toarray())
