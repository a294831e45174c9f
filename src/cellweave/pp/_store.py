"""Rewrite many files as one store whose cells are shuffled or grouped, in bounded memory."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import pandas as pd
import scipy.sparse as sp
import zarr
from anndata import AnnData
from anndata.io import write_elem
from numpy.typing import NDArray
from scvi.utils import track
from zarr.codecs import BloscCodec, ZstdCodec

from cellweave.data import CellStore, Part, Rows, as_csr, check_groups, get_counts, join_parts, open_store, row_source

__all__ = ["write_store"]

logger = logging.getLogger(__name__)

Source: TypeAlias = AnnData | str | os.PathLike[str]
_CODECS: dict[str, Any] = {"lz4": BloscCodec(cname="lz4"), "zstd": ZstdCodec(level=1, checksum=True), "none": None}
# Cells that are in memory at a time, and cells per chunk of the store: about what one block of a loader reads.
_PIECE, _CHUNK_CELLS = 32_768, 512
_MIN_CHUNK, _MAX_CHUNK = 2**14, 2**20


def write_store(
    adatas: Source | Sequence[Source],
    path: str | os.PathLike[str],
    group_by: str | None = None,
    layer: str | None = None,
    genes: Sequence[str] | None = None,
    join: Literal["inner", "outer"] = "inner",
    obs_columns: Sequence[str] | None = None,
    shuffle: bool = True,
    compression: Literal["none", "lz4", "zstd"] = "none",
    seed: int = 0,
    overwrite: bool = False,
) -> CellStore:
    """Write the counts of one or many data sets to one zarr store that models read fast from disk.

    Cells are shuffled over the whole store, or within the groups of ``group_by``, whose cells then lie next to each other:
    a context of cells of one donor is one contiguous read. Memory holds some tens of thousands of cells at a time. An
    interrupted call continues where it was when it is repeated with the same arguments; the store appears when it is
    complete. It is an ordinary AnnData zarr, which :func:`anndata.read_zarr` reads too.

    Parameters
    ----------
    adatas
        AnnData (in memory or backed), and paths of ``.h5ad`` or ``.zarr`` files.
    path
        The zarr directory to write.
    group_by
        Column of ``obs`` whose groups stay together, usually the ``context_key`` of the model.
    layer
        Layer with the counts; ``X`` by default. The store has them in ``X``.
    genes
        Genes to keep, in the wanted order (zero where a data set lacks them); by default as ``join`` says.
    join
        ``"inner"`` keeps the genes that all have, ``"outer"`` all genes.
    obs_columns
        Columns of ``obs`` to keep; all by default.
    shuffle
        Shuffle cells; off, they keep their order (within the groups).
    compression
        ``"none"`` reads fastest, ``"lz4"`` and ``"zstd"`` take about a third of the space.
    seed
        Seed of the shuffling.
    overwrite
        Replace an existing store.

    Returns
    -------
    The opened store; see :func:`cellweave.io.open_store`.

    Raises
    ------
    FileExistsError
        If ``path`` exists and ``overwrite`` is false, or it is not a store.
    FileNotFoundError, KeyError
        If a file, layer or column does not exist.
    ValueError
        If there are no cells, genes do not match, or ``group_by`` has missing values.

    Examples
    --------
    >>> import cellweave as cw
    >>> store = cw.pp.write_store(["run1.h5ad", "run2.h5ad"], "atlas.zarr", group_by="donor")
    """
    target = Path(path)
    _check_target(target, overwrite)
    if compression not in _CODECS:
        raise ValueError(f"`compression` must be one of {sorted(_CODECS)}, got {compression!r}.")
    sources = [adatas] if isinstance(adatas, AnnData | str | os.PathLike) else list(adatas)
    if not sources:
        raise ValueError("`adatas` is empty; give at least one AnnData or path.")
    whole = join_parts([_as_part(source, layer, obs_columns, i) for i, source in enumerate(sources)], join, genes)
    if whole.rows.shape[0] == 0:
        raise ValueError("`adatas` have no cells.")
    check_groups(whole.obs, group_by, "group_by")
    order = _order(whole.obs, group_by, shuffle, seed)
    work = target.with_name(f".{target.name}.partial")
    about = {"version": 1, "group_by": group_by, "shuffle": shuffle, "seed": seed, "compression": compression}
    _start(work, {**about, "layer": layer, "data": _fingerprint(sources, layer, whole), "genes": list(whole.var.index)})
    pieces = _write_pieces(work, whole.rows, order)
    _assemble(work, whole, order, pieces, about)
    _finish(work, target)
    return open_store(target)


def _as_part(source: Source, layer: str | None, obs_columns: Sequence[str] | None, number: int) -> Part:
    if not isinstance(source, AnnData):
        store = open_store(source, layer=layer, obs_columns=obs_columns)
        return Part(store.rows, store.obs, store.var, f"`{source}`")
    for name in obs_columns or ():
        if name not in source.obs:
            raise KeyError(f"`obs_columns` names {name!r}, which `obs` of data set {number} lacks.")
    obs = source.obs if obs_columns is None else source.obs[list(obs_columns)]
    obs = obs[[name for name in obs if not str(name).startswith("_scvi")]]
    return Part(row_source(get_counts(source, layer)), obs, source.var, f"data set {number}")


def _order(obs: pd.DataFrame, group_by: str | None, shuffle: bool, seed: int) -> NDArray[np.int64]:
    """Source row of every row of the store."""
    order = np.random.default_rng(seed).permutation(len(obs)) if shuffle else np.arange(len(obs))
    if group_by is not None:
        codes = pd.Categorical(obs[group_by]).codes
        order = order[np.argsort(codes[order], kind="stable")]
    return order


# ---------------------------------------------------------------- working folder


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not overwrite:
        raise FileExistsError(f"`{target}` already exists; choose another path or pass `overwrite=True`.")
    if not ((target / "zarr.json").is_file() or (target / ".zgroup").is_file()):
        raise FileExistsError(f"`{target}` is not a zarr store and will not be overwritten.")


def _fingerprint(sources: Sequence[Source], layer: str | None, whole: Part) -> str:
    """Digest that changes when the inputs change: files by size and time, data in memory by their content."""
    digest = hashlib.sha256(str(whole.rows.shape).encode())
    for frame in (whole.obs, whole.var):
        digest.update(str(list(frame.columns)).encode())
        digest.update(pd.util.hash_pandas_object(frame.astype(str), index=True).to_numpy().tobytes())
    for source in sources:
        paths = _files_of(source, layer)
        if paths:
            files = [file for path in paths for file in (path, *sorted(path.rglob("*")))]
            digest.update(str([(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]).encode())
            continue
        for _, block in row_source(get_counts(source, layer)).chunks():
            x = as_csr(block)
            for array in (x.data, x.indices, x.indptr):
                digest.update(array.tobytes())
    return digest.hexdigest()


def _files_of(source: Source, layer: str | None) -> list[Path]:
    """The files that hold the counts of a source; none if they are in memory."""
    if not isinstance(source, AnnData):
        return [Path(source)]
    if isinstance(source, CellStore):
        return source.paths
    return [Path(source.filename)] if source.isbacked and layer is None else []


def _start(work: Path, plan: dict[str, Any]) -> None:
    """Keep the working folder of the same, interrupted call; start with an empty one otherwise."""
    text = json.dumps(plan, sort_keys=True)
    recorded = work / "plan.json"
    if recorded.is_file() and recorded.read_text() == text:
        logger.info("Continuing the interrupted writing in %s.", work)
        return
    shutil.rmtree(work, ignore_errors=True)
    (work / "pieces").mkdir(parents=True)
    recorded.write_text(text)


def _finish(work: Path, target: Path) -> None:
    if target.exists():
        target.rename(work / "replaced")
    (work / "store").rename(target)
    shutil.rmtree(work)


# ---------------------------------------------------------------- first pass: pieces in the order of the store


class _Piece(NamedTuple):
    """Some source cells, sorted by their place in the store."""

    position: NDArray[np.int64]  # (cell,): row in the store, ascending
    indptr: NDArray[np.int64]  # (cell + 1,)
    folder: Path  # with the bytes of `indices` and `data`
    dtype: np.dtype  # of `data`

    def between(self, start: int, stop: int, n_genes: int) -> tuple[NDArray[np.int64], sp.csr_matrix]:
        """The cells of this piece that belong to rows ``start`` to ``stop``."""
        first, last = np.searchsorted(self.position, [start, stop])
        indptr = self.indptr[first : last + 1]
        x = (
            self._read("data", self.dtype, indptr),
            self._read("indices", np.dtype(np.int32), indptr),
            indptr - indptr[0],
        )
        return self.position[first:last], sp.csr_matrix(x, shape=(last - first, n_genes))

    def _read(self, name: str, dtype: np.dtype, indptr: NDArray[np.int64]) -> NDArray:
        # opened for each read: a large store has more pieces than a process may keep files open
        count, offset = int(indptr[-1] - indptr[0]), int(indptr[0]) * dtype.itemsize
        return np.fromfile(self.folder / name, dtype, count, offset=offset)


def _write_pieces(work: Path, rows: Rows, order: NDArray[np.int64]) -> list[_Piece]:
    """Read all cells once in the order of the sources and write them in pieces; those that are there are kept."""
    position = np.empty_like(order)
    position[order] = np.arange(len(order))
    dtype = np.dtype(np.float32) if rows.dtype == np.float16 else rows.dtype
    folders = []
    for start, stop in _ranges(len(order), "Reading cells"):
        folder = work / "pieces" / f"{start:012d}"
        folders.append(folder)
        if folder.exists():
            continue
        within = np.argsort(position[start:stop])
        block = as_csr(rows.read(start, stop))[within]
        block.sort_indices()
        unfinished = folder.with_suffix(".tmp")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        np.save(unfinished / "position.npy", position[start:stop][within])
        np.save(unfinished / "indptr.npy", block.indptr.astype(np.int64))
        block.indices.astype(np.int32, copy=False).tofile(unfinished / "indices")
        block.data.astype(dtype, copy=False).tofile(unfinished / "data")
        unfinished.rename(folder)
    return [_Piece(np.load(f / "position.npy"), np.load(f / "indptr.npy"), f, dtype) for f in folders]


# ---------------------------------------------------------------- second pass: the store


def _assemble(
    work: Path, whole: Part, order: NDArray[np.int64], pieces: Sequence[_Piece], about: dict[str, Any]
) -> None:
    """Write the store from the pieces; what an interrupted call wrote of it is written again."""
    n_cells, n_genes = whole.rows.shape
    per_cell = np.empty(n_cells, dtype=np.int64)
    for piece in pieces:
        per_cell[piece.position] = np.diff(piece.indptr)
    indptr = np.concatenate([[0], np.cumsum(per_cell)])
    group = zarr.open_group(work / "store", mode="w", zarr_format=3)
    frame = AnnData(obs=whole.obs.iloc[order], var=whole.var, uns={"cellweave_store": about})
    frame.strings_to_categoricals()  # as AnnData does before it writes: text with missing values cannot be stored
    with _quiet():
        write_elem(group, "/", frame)
    x = group.create_group("X", overwrite=True)
    x.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": [n_cells, n_genes]})
    data = _array(x, "data", indptr[-1], pieces[0].dtype, n_cells, about["compression"])
    index = np.dtype(np.int32 if indptr[-1] < 2**31 else np.int64)  # one type for both, as scipy requires
    indices = _array(x, "indices", indptr[-1], index, n_cells, about["compression"])
    _array(x, "indptr", n_cells + 1, index, n_cells, about["compression"])[:] = indptr
    for start, stop in _ranges(n_cells, "Writing cells"):
        found = [piece.between(start, stop, n_genes) for piece in pieces]
        rows = np.concatenate([position for position, _ in found])
        block = sp.vstack([cells for _, cells in found], format="csr")[np.argsort(rows)]
        data[indptr[start] : indptr[stop]] = block.data
        indices[indptr[start] : indptr[stop]] = block.indices


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the announcements of AnnData and zarr about coming versions, on which the user has no influence here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="zarr v3 autosharding|Consolidated metadata")
        yield


def _ranges(n_cells: int, description: str) -> Iterator[tuple[int, int]]:
    """Rows to handle at a time, with progress."""
    starts = range(0, n_cells, _PIECE)
    for start in track(starts, description=description, style="tqdm", disable=len(starts) < 2):
        yield start, min(start + _PIECE, n_cells)


def _array(group: zarr.Group, name: str, length: int, dtype: np.dtype, n_cells: int, compression: str) -> zarr.Array:
    per_block = max(1.0, length / n_cells * _CHUNK_CELLS)
    chunk = int(np.clip(2 ** round(np.log2(per_block)), _MIN_CHUNK, _MAX_CHUNK))
    chunk = max(1, min(chunk, int(length)))
    return group.create_array(
        name,
        shape=(int(length),),
        dtype=dtype,
        chunks=(chunk,),
        compressors=_CODECS[compression],
        config={"write_empty_chunks": True},  # a missing chunk is an error, also where all of its values would be zero
        overwrite=True,
    )
