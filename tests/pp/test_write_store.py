"""Writing stores: every cell once with its counts and annotation, in bounded steps that survive an interruption."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp
import zarr
from anndata import AnnData

import cellweave.pp._store as writing
from cellweave.data import CellStore, open_store
from cellweave.pp import write_store


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    """Several pieces and chunks for some hundred cells."""
    monkeypatch.setattr(writing, "_PIECE", 20)
    monkeypatch.setattr(writing, "_MIN_CHUNK", 2**6)


@pytest.fixture
def adata(make_adata) -> AnnData:
    adata = make_adata()
    adata.obs["n"] = np.arange(adata.n_obs)
    adata.var["marker"] = np.arange(adata.n_vars) % 2 == 0
    return adata


def _assert_same_cells(store: AnnData, adata: AnnData) -> None:
    """The same cells in any order, each with its counts and annotation."""
    assert sorted(store.obs_names) == sorted(adata.obs_names)
    assert list(store.var_names) == list(adata.var_names)
    expected = adata[store.obs_names]
    np.testing.assert_array_equal(_dense(store), _dense(expected))
    for name in adata.obs:
        assert store.obs[name].tolist() == expected.obs[name].tolist()


def _dense(adata: AnnData) -> np.ndarray:
    x = adata.X[:]
    return x.toarray() if sp.issparse(x) else x


def _left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("compression", ["none", "lz4", "zstd"])
@pytest.mark.parametrize("group_by", [None, "donor"])
@pytest.mark.parametrize("shuffle", [True, False])
def test_content_and_order(adata, tmp_path, compression, group_by, shuffle):
    """Protects the counts: every cell once, unchanged, in the promised order, whatever the compression."""
    store = write_store(adata, tmp_path / "a.zarr", group_by=group_by, shuffle=shuffle, compression=compression)
    assert isinstance(store, CellStore)
    _assert_same_cells(store, adata)
    donors, numbers = store.obs["donor"].to_numpy(), store.obs["n"].to_numpy()
    if group_by:
        assert np.count_nonzero(donors[1:] != donors[:-1]) == len(set(donors)) - 1
    groups = [numbers[donors == donor] for donor in set(donors)] if group_by else [numbers]
    assert all(bool((np.diff(group) > 0).all()) != shuffle for group in groups if len(group) > 9)
    assert store.X[:].dtype == np.float32
    assert _left(tmp_path) == ["a.zarr"]


def test_the_user_sees_no_warning(adata, tmp_path, recwarn):
    """Protects a quiet call: nothing that the user could not act on."""
    write_store(adata, tmp_path / "a.zarr")
    # what other packages warn each other of is not for the user
    assert [str(w.message) for w in recwarn if not issubclass(w.category, DeprecationWarning)] == []


def test_anndata_and_scanpy_read_it(adata, tmp_path):
    """Protects the format: an ordinary AnnData zarr, complete with metadata of how it was made."""
    write_store(adata, tmp_path / "a.zarr", group_by="donor", seed=4)
    loaded = ad.read_zarr(tmp_path / "a.zarr")
    _assert_same_cells(loaded, adata)
    pd.testing.assert_frame_equal(loaded.var, adata.var)
    assert loaded.uns["cellweave_store"]["group_by"] == "donor"
    assert int(loaded.uns["cellweave_store"]["seed"]) == 4
    assert loaded.X.has_canonical_format
    sc.pp.normalize_total(loaded)
    sc.pp.log1p(loaded)
    sc.pp.pca(loaded, n_comps=3)


def test_order_depends_on_the_seed_only(adata, tmp_path):
    """Protects repeatability: the same seed, the same store; the user's random state is not touched."""
    names = []
    for i, seed in enumerate([1, 1, 2]):
        np.random.seed(i)
        before = np.random.get_state()[1].copy()
        names.append(list(write_store(adata, tmp_path / f"{i}.zarr", seed=seed).obs_names))
        np.testing.assert_array_equal(np.random.get_state()[1], before)
    assert names[0] == names[1] != names[2]


def test_sources_may_be_mixed(adata, tmp_path):
    """Protects several inputs at once: memory, backed, h5ad and zarr files, dense and sparse, genes in any order."""
    parts = [adata[20 * i : 20 * i + 20].copy() for i in range(4)] + [adata[80:].copy()]
    order = np.random.default_rng(0).permutation(20)
    parts[1].X = parts[1].X.toarray()
    parts[1].write_h5ad(tmp_path / "1.h5ad")
    parts[2] = parts[2][:, order].copy()
    parts[2].write_zarr(tmp_path / "2.zarr")
    parts[3].write_h5ad(tmp_path / "3.h5ad")
    parts[4].X = parts[4].X.toarray().astype(np.float16)
    backed = ad.read_h5ad(tmp_path / "3.h5ad", backed="r")
    sources = [parts[0], tmp_path / "1.h5ad", str(tmp_path / "2.zarr"), backed, parts[4]]
    _assert_same_cells(write_store(sources, tmp_path / "a.zarr", group_by="donor"), adata)
    again = write_store(open_store(tmp_path / "a.zarr"), tmp_path / "b.zarr")
    _assert_same_cells(again, adata)


@pytest.mark.parametrize("make", [sp.csc_matrix, sp.csr_array, lambda x: x.toarray(), lambda x: x.astype(np.int32)])
def test_types_of_counts(adata, tmp_path, make):
    """Protects every matrix in memory: its values and, as far as a sparse matrix can have it, its type."""
    adata.X = make(adata.X)
    store = write_store(adata, tmp_path / "a.zarr")
    _assert_same_cells(store, adata)
    assert store.X.dtype == adata.X.dtype


def test_genes_join_layer_and_columns(adata, tmp_path):
    """Protects the choices: which genes, which layer, which columns."""
    adata.layers["counts"] = adata.X * 3
    first, second = adata[:50, :15].copy(), adata[50:, 5:].copy()
    store = write_store([first, second], tmp_path / "a.zarr", layer="counts", obs_columns=["n"], shuffle=False)
    np.testing.assert_array_equal(_dense(store), 3 * adata.X[:, 5:15].toarray())
    assert list(store.obs) == ["n"]
    outer = write_store([first, second], tmp_path / "b.zarr", join="outer", shuffle=False)
    expected = adata.X.toarray()
    expected[:50, 15:] = expected[50:, :5] = 0
    np.testing.assert_array_equal(_dense(outer), expected)
    assert outer.var["marker"].tolist() == adata.var["marker"].tolist()
    chosen = write_store([first, second], tmp_path / "c.zarr", genes=["gene9", "new", "gene2"], shuffle=False)
    assert list(chosen.var_names) == ["gene9", "new", "gene2"]
    np.testing.assert_array_equal(_dense(chosen)[:, [0, 2]], expected[:, [9, 2]])
    assert not _dense(chosen)[:, 1].any()


def test_columns_that_differ_between_sources(adata, tmp_path):
    """Protects real collections: text, truth values and numbers that only some files have are stored, missing elsewhere."""
    first, second = adata[:50].copy(), adata[50:].copy()
    first.obs["text"], first.obs["flag"], first.obs["age"] = [f"t{i}" for i in range(50)], True, 3
    store = write_store([first, second], tmp_path / "a.zarr", shuffle=False)
    assert store.obs["text"].tolist()[:50] == first.obs["text"].tolist()
    assert store.obs["text"].isna().sum() == store.obs["flag"].isna().sum() == store.obs["age"].isna().sum() == 46


@pytest.mark.parametrize("kind", ["one_gene", "zeros"])
def test_chunks_of_zeros_are_not_missing(tmp_path, kind):
    """Protects odd but valid data: stored zeros, also where a whole chunk holds nothing else."""
    x = sp.csr_matrix(
        np.ones((300, 1), dtype=np.float32) if kind == "one_gene" else np.zeros((300, 2), dtype=np.float32)
    )
    store = write_store(AnnData(x), tmp_path / "a.zarr")
    np.testing.assert_array_equal(_dense(store), x.toarray())


def test_a_store_can_be_rewritten_in_place(adata, tmp_path):
    """Protects `overwrite` with the store itself as the source: nothing is lost."""
    write_store(adata, tmp_path / "a.zarr")
    store = write_store(tmp_path / "a.zarr", tmp_path / "a.zarr", group_by="donor", overwrite=True)
    _assert_same_cells(store, adata)
    assert _left(tmp_path) == ["a.zarr"]


def test_more_pieces_than_open_files(adata, tmp_path):
    """Protects large stores: files are not all kept open, of which a process may have about a thousand."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    n_open = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 64
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "_PIECE", 1)
        resource.setrlimit(resource.RLIMIT_NOFILE, (n_open + 60, limits[1]))
        try:
            store = write_store(adata, tmp_path / "a.zarr")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    _assert_same_cells(store, adata)


# ---------------------------------------------------------------- refusals


def test_existing_targets(adata, tmp_path):
    """Protects what is there: a store is replaced on request only, anything else never."""
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("keep")
    write_store(adata[:50].copy(), tmp_path / "a.zarr")
    with pytest.raises(
        FileExistsError, match="`.*a.zarr` already exists; choose another path or pass `overwrite=True`"
    ):
        write_store(adata, tmp_path / "a.zarr")
    with pytest.raises(FileExistsError, match="`.*notes` is not a zarr store and will not be overwritten"):
        write_store(adata, tmp_path / "notes", overwrite=True)
    assert open_store(tmp_path / "a.zarr").n_obs == 50
    assert write_store(adata, tmp_path / "a.zarr", overwrite=True).n_obs == 96
    zarr.open_group(tmp_path / "old.zarr", mode="w", zarr_format=2)
    assert write_store(adata, tmp_path / "old.zarr", overwrite=True).n_obs == 96
    assert _left(tmp_path) == ["a.zarr", "notes", "old.zarr"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"group_by": "person"}, KeyError, "`group_by='person'` not found; `adata.obs` has"),
        ({"group_by": "holes"}, ValueError, r"`adata.obs\['holes'\]` \(`group_by`\) is missing in 1 cell"),
        ({"group_by": "donor", "obs_columns": ["n"]}, KeyError, "`group_by='donor'` not found"),
        ({"obs_columns": ["age"]}, KeyError, "`obs_columns` names 'age', which `obs` of data set 0 lacks"),
        ({"layer": "raw"}, KeyError, "`layer='raw'` not found"),
        ({"compression": "gzip"}, ValueError, r"`compression` must be one of \['lz4', 'none', 'zstd'\], got 'gzip'"),
        ({"join": "left"}, ValueError, "`join` must be 'inner' or 'outer', got 'left'"),
        ({"genes": ["x", "y"]}, ValueError, "data set 0 has none of the 2 genes"),
        ({"genes": ["gene1", "gene1"]}, ValueError, "`genes` repeat 'gene1'"),
    ],
)
def test_refusals(adata, tmp_path, options, error, message):
    """Protects the user's time: a wrong argument is named before anything is written."""
    adata.obs["holes"] = adata.obs["donor"].astype(object).where(np.arange(96) != 4)
    with pytest.raises(error, match=message):
        write_store(adata, tmp_path / "a.zarr", **options)
    assert _left(tmp_path) == []


def test_empty_and_repeated_inputs(adata, tmp_path):
    """Protects against stores of nothing and genes that cannot be told apart."""
    with pytest.raises(ValueError, match="`adatas` is empty"):
        write_store([], tmp_path / "a.zarr")
    with pytest.raises(ValueError, match="`adatas` have no cells"):
        write_store(adata[:0].copy(), tmp_path / "a.zarr")
    twice = AnnData(adata.X, var=pd.DataFrame(index=["g"] * 20))
    with pytest.raises(ValueError, match="`var_names` of data set 0 repeat 'g'"):
        write_store(twice, tmp_path / "a.zarr", genes=["g"])
    assert _left(tmp_path) == []


# ---------------------------------------------------------------- interruptions


class _Stop(Exception):
    pass


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _interrupted(adata, path, place: str, count: int) -> None:
    """A call that fails at the ``count``-th time that it comes to a place of one of its passes."""
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        owner, name = {"save": (np, "save"), "cells": (writing._Piece, "between"), "finish": (writing, "_finish")}[
            place
        ]
        original = getattr(owner, name)

        def fail(*args, **kwargs):
            calls.append(1)
            if len(calls) == count:
                raise _Stop
            return original(*args, **kwargs)

        patch.setattr(owner, name, fail)
        with pytest.raises(_Stop):
            write_store(adata, path, group_by="donor")


@pytest.mark.parametrize("place", ["save", "cells", "finish"])
def test_an_interrupted_call_continues(adata, tmp_path, place):
    """Protects hours of work: at whatever point it stopped, the repeated call gives the same store and leaves nothing."""
    write_store(adata, tmp_path / "expected.zarr", group_by="donor")
    for count in {"save": (1, 2, 5, 10), "cells": (1, 4, 20), "finish": (1,)}[place]:
        _interrupted(adata, tmp_path / "a.zarr", place, count)
        assert not (tmp_path / "a.zarr").exists()
        store = write_store(adata, tmp_path / "a.zarr", group_by="donor", overwrite=True)
        _assert_same_cells(store, adata)
        assert _bytes(tmp_path / "a.zarr") == _bytes(tmp_path / "expected.zarr")
        assert _left(tmp_path) == ["a.zarr", "expected.zarr"]
        writing.shutil.rmtree(tmp_path / "a.zarr")


def test_pieces_are_not_read_twice(adata, tmp_path, monkeypatch):
    """Protects the use of continuing: what was read before the interruption is not read again."""
    _interrupted(adata, tmp_path / "a.zarr", "cells", 3)
    saved = []
    monkeypatch.setattr(np, "save", lambda path, array: saved.append(path))
    write_store(adata, tmp_path / "a.zarr", group_by="donor")
    assert saved == []


@pytest.mark.parametrize("change", ["counts", "obs", "var", "genes", "seed", "file"])
def test_changed_inputs_start_afresh(adata, tmp_path, change):
    """Protects against a store of two versions: pieces of other inputs or arguments are thrown away."""
    source, options, x = adata, {"group_by": "donor"}, adata.X.toarray()
    x[50:52] = 0
    x[50, :5], x[51, 6:] = 1, 2
    adata.X = sp.csr_matrix(x)
    if change == "file":
        adata.write_h5ad(tmp_path / "in.h5ad")
        source = tmp_path / "in.h5ad"
    _interrupted(source, tmp_path / "a.zarr", "cells", 3)
    if change == "counts":  # the same numbers and genes in the same order, one of them in the next cell
        x[50, 4], x[51, 4] = 0, 1
        adata.X = sp.csr_matrix(x)
    elif change == "obs":
        adata.obs["n"] += 1
    elif change == "var":
        adata.var["marker"] = ~adata.var["marker"]
    elif change == "genes":
        options["genes"] = list(adata.var_names[::-1])
        adata = adata[:, ::-1].copy()
    elif change == "seed":
        options["seed"] = 5
    else:
        adata.X = adata.X * 2
        adata.write_h5ad(source)
    _assert_same_cells(write_store(source if change != "obs" else adata, tmp_path / "a.zarr", **options), adata)
    assert [name for name in _left(tmp_path) if name != "in.h5ad"] == ["a.zarr"]


KILLED = """
import os, signal, sys
import anndata, numpy
import cellweave.pp._store as writing
writing._PIECE, writing._MIN_CHUNK = 20, 2**6
owner, name = {"save": (numpy, "save"), "cells": (writing._Piece, "between")}[sys.argv[3]]
original, calls = getattr(owner, name), []
def die(*args, **kwargs):
    calls.append(1)
    if len(calls) == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)
setattr(owner, name, die)
writing.write_store(sys.argv[1], sys.argv[2], group_by="donor")
"""


@pytest.mark.slow
@pytest.mark.parametrize("place", ["save", "cells"])
def test_a_killed_process_leaves_nothing_wrong(adata, tmp_path, place):
    """Protects against power cuts and queue limits: after SIGKILL the repeated call gives the same store."""
    adata.write_h5ad(tmp_path / "in.h5ad")
    expected = write_store(tmp_path / "in.h5ad", tmp_path / "expected.zarr", group_by="donor")
    arguments = [sys.executable, "-c", KILLED, str(tmp_path / "in.h5ad"), str(tmp_path / "a.zarr"), place]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "a.zarr").exists()
    store = write_store(tmp_path / "in.h5ad", tmp_path / "a.zarr", group_by="donor")
    assert list(store.obs_names) == list(expected.obs_names)
    assert _bytes(tmp_path / "a.zarr") == _bytes(tmp_path / "expected.zarr")
    assert _left(tmp_path) == ["a.zarr", "expected.zarr", "in.h5ad"]
