"""The loader: one result for every storage of the same counts, in the requested row order."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
import torch

from cellweave._keys import LOADER_KEYS, REGISTRY_KEYS
from cellweave.data import CellSetDataset, CellSetLoader, gene_shares
from cellweave.model import StackModel

IN_MEMORY = {
    "csc_matrix": lambda x: sp.csc_matrix(x),
    "csr_array": lambda x: sp.csr_array(x),
    "csc_array": lambda x: sp.csc_array(x),
    "dense": lambda x: x.toarray(),
    "fortran": lambda x: np.asfortranarray(x.toarray()),
    "float64": lambda x: x.astype(np.float64),
    "float16": lambda x: x.toarray().astype(np.float16),
    "int64": lambda x: x.astype(np.int64),
    "int8_dense": lambda x: x.toarray().astype(np.int8),
    "uint16": lambda x: x.astype(np.uint16),
    "int64_indices": lambda x: _with_wide_indices(x),
    "repeated_entries": lambda x: _with_repeated_entries(x),
    "unsorted_indices": lambda x: _with_reversed_rows(x),
    "explicit_zeros": lambda x: _with_explicit_zeros(x),
}


def _with_wide_indices(x):
    x = x.copy()
    x.indices, x.indptr = x.indices.astype(np.int64), x.indptr.astype(np.int64)
    return x


def _with_repeated_entries(x):
    """Every stored value v as two entries, 1 and v - 1, of the same cell and gene."""
    coo = x.tocoo()
    data = np.concatenate([np.ones_like(coo.data), coo.data - 1])
    indices = np.concatenate([coo.col, coo.col])
    order = np.argsort(np.concatenate([coo.row, coo.row]), kind="stable")
    return sp.csr_matrix((data[order], indices[order], 2 * x.indptr), shape=x.shape)


def _with_reversed_rows(x):
    x = x.copy()
    for start, stop in zip(x.indptr[:-1], x.indptr[1:], strict=True):
        x.indices[start:stop] = x.indices[start:stop][::-1].copy()
        x.data[start:stop] = x.data[start:stop][::-1].copy()
    x.has_sorted_indices = False
    return x


def _with_explicit_zeros(x):
    dense = x.toarray()
    n_cells, n_genes = dense.shape
    indptr = np.arange(0, n_cells * n_genes + 1, n_genes)
    return sp.csr_matrix((dense.ravel(), np.tile(np.arange(n_genes), n_cells), indptr), shape=dense.shape)


def _manager(adata):
    StackModel.setup_anndata(adata, batch_key="batch", labels_key="cell_type", context_key="donor")
    return StackModel._get_most_recent_anndata_manager(adata, required=True)


def _batches(manager, **options):
    arguments = {"n_cells": 8, "batch_size": 24, "shuffle": True, "seed": 3, **options}
    return list(CellSetLoader(manager, **arguments))


def _assert_same(first, second) -> None:
    assert len(first) == len(second)
    for one, two in zip(first, second, strict=True):
        assert one.keys() == two.keys()
        for key, value in one.items():
            if isinstance(value, torch.Tensor):
                assert value.dtype == two[key].dtype
                torch.testing.assert_close(value, two[key], rtol=0, atol=0)
            else:
                assert value == two[key]


@pytest.mark.parametrize("storage", IN_MEMORY)
def test_storage_in_memory_does_not_matter(make_adata, storage):
    """Protects equal results for every matrix type: the batches of CSR float32 counts, bit for bit."""
    reference, other = make_adata(), make_adata()
    other.X = IN_MEMORY[storage](other.X)
    _assert_same(_batches(_manager(reference)), _batches(_manager(other)))


def test_codes_are_copies(make_adata):
    """Protects the columns of the user, and from torch's warning about the read-only arrays that pandas 3 gives."""
    manager = _manager(make_adata())
    codes = CellSetDataset(manager).codes
    assert codes.keys() == set(manager.data_registry) - {REGISTRY_KEYS.X}
    for key, tensor in codes.items():
        assert not np.shares_memory(tensor.numpy(), manager.get_from_registry(key))


@pytest.mark.parametrize("storage", ["csr", "csc", "dense"])
def test_backed_files_give_the_rows_that_were_asked_for(make_adata, tmp_path, storage):
    """Protects against the sorted rows that backed reading returns (trap R13): row order as in memory."""
    reference, stored = make_adata(), make_adata()
    stored.X = {"csr": stored.X, "csc": sp.csc_matrix(stored.X), "dense": stored.X.toarray()}[storage]
    stored.write_h5ad(tmp_path / "a.h5ad")
    backed = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    assert backed.isbacked
    _assert_same(_batches(_manager(reference)), _batches(_manager(backed)))


def test_backed_rows_may_repeat(make_adata, tmp_path):
    """Protects filled contexts of backed data: HDF5 accepts no repeated rows, the dataset does."""
    adata = make_adata()
    adata.write_h5ad(tmp_path / "a.h5ad")
    dataset = CellSetDataset(_manager(ad.read_h5ad(tmp_path / "a.h5ad", backed="r")))
    rows = np.array([7, 2, 7, 90, 2])
    x = dataset[rows, np.ones(5, dtype=bool)][REGISTRY_KEYS.X]
    np.testing.assert_array_equal(x.numpy(), adata.X[rows].toarray())


def test_batch_contract(make_adata):
    """Protects what modules rely on: float32 counts, int64 codes and rows, boolean validity, plain integers."""
    adata = make_adata()
    (batch,) = _batches(_manager(adata), batch_size=1000, shuffle=False)
    rows = batch[LOADER_KEYS.ROW].numpy()
    assert batch[REGISTRY_KEYS.X].dtype == torch.float32
    np.testing.assert_array_equal(batch[REGISTRY_KEYS.X].numpy(), adata.X[rows].toarray())
    for key, column in [(REGISTRY_KEYS.BATCH, "batch"), (REGISTRY_KEYS.LABELS, "cell_type")]:
        assert batch[key].dtype == torch.int64
        np.testing.assert_array_equal(batch[key].numpy()[:, 0], adata.obs[column].cat.codes.to_numpy()[rows])
    assert batch[LOADER_KEYS.VALID].dtype == torch.bool
    assert batch[LOADER_KEYS.N_VALID] == int(batch[LOADER_KEYS.VALID].sum()) == adata.n_obs
    assert batch[LOADER_KEYS.N_CELLS] == 8
    assert len(rows) % 8 == 0


def test_contexts_follow_the_groups_unless_switched_off(make_adata):
    """Protects `by_context`: groups apart by default, mixed on request."""
    manager = _manager(make_adata())
    mixed = []
    for by_context in (True, False):
        groups = torch.cat([b[REGISTRY_KEYS.CONTEXT] for b in _batches(manager, by_context=by_context)]).view(-1, 8)
        mixed.append(bool((groups != groups[:, :1]).any()))
    assert mixed == [False, True]


@pytest.mark.parametrize("storage", ["csr_array", "repeated_entries", "unsorted_indices", "explicit_zeros"])
def test_sparse_tensors_equal_dense_tensors(make_adata, storage):
    """Protects the GPU path: CSR tensors hold the same counts, each entry once and in order as kernels expect."""
    adata = make_adata()
    adata.X = IN_MEMORY[storage](adata.X)
    manager = _manager(adata)
    dense, sparse = _batches(manager), _batches(manager, load_sparse_tensor=True)
    assert all(batch[REGISTRY_KEYS.X].layout == torch.sparse_csr for batch in sparse)
    for batch in sparse:
        x = batch[REGISTRY_KEYS.X]
        torch.sparse_csr_tensor(x.crow_indices(), x.col_indices(), x.values(), x.shape, check_invariants=True)
        batch[REGISTRY_KEYS.X] = x.to_dense()
    _assert_same(dense, sparse)


@pytest.mark.parametrize("backed", [False, True])
def test_worker_processes_do_not_matter(make_adata, tmp_path, backed):
    """Protects `num_workers`: the same batches in the same order from two worker processes."""
    adata = make_adata(n_cells=40)
    if backed:
        adata.write_h5ad(tmp_path / "a.h5ad")
        adata = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    manager = _manager(adata)
    _assert_same(_batches(manager), _batches(manager, num_workers=2))


def test_counts_of_the_user_are_not_changed_by_reading(make_adata):
    """Protects the user's matrix: repeated entries are summed in a copy only."""
    adata = make_adata()
    adata.X = _with_repeated_entries(adata.X)
    before = (adata.X.data.copy(), adata.X.indices.copy(), adata.X.indptr.copy())
    _batches(_manager(adata))
    for array, copy in zip((adata.X.data, adata.X.indices, adata.X.indptr), before, strict=True):
        np.testing.assert_array_equal(array, copy)


@pytest.mark.parametrize("storage", ["csr", "dense", "csc", "backed"])
def test_gene_shares(make_adata, tmp_path, monkeypatch, storage):
    """Protects the baseline of the reconstruction metrics: shares of the chosen rows, in several blocks too."""
    monkeypatch.setattr("cellweave.data._loader.BUFFER_SIZE", 10)
    adata = make_adata()
    dense = adata.X.toarray().astype(np.float64)
    if storage == "backed":
        adata.write_h5ad(tmp_path / "a.h5ad")
        adata = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    else:
        adata.X = {"csr": adata.X, "dense": dense, "csc": sp.csc_matrix(dense)}[storage]
    rows = np.array([1, 4, 5, 6, 20, 21, 22, 23, 24, 25, 40, 41, 90])
    expected = dense[rows].sum(0) / dense[rows].sum()
    np.testing.assert_allclose(gene_shares(_manager(adata), rows), expected, rtol=1e-12)
