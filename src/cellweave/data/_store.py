"""An AnnData whose counts stay on disk."""

from __future__ import annotations

import os
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal, NamedTuple

import h5py
import numpy as np
import pandas as pd
import zarr
from anndata import AnnData
from anndata.io import read_elem

from ._annbatch import AnnbatchRows
from ._rows import DiskRows, Rows, StackedRows

__all__ = ["CellStore", "Part", "join_parts", "open_store"]

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


class CellStore(AnnData):
    """An AnnData of which only ``obs``, ``var`` and results are in memory; ``X`` is read from disk when it is needed.

    Made by :func:`open_store`. It is used like any AnnData: set up, train, embed; results go to ``obsm`` and ``obs``.
    Slicing and :meth:`to_memory` load counts into an ordinary AnnData. Files are opened for reading only.

    Parameters
    ----------
    rows
        The counts ``(cell, gene)``.
    obs
        Columns of the cells.
    var
        Columns of the genes; the index holds their names.
    paths
        The files.
    """

    def __init__(self, rows: Rows, obs: pd.DataFrame, var: pd.DataFrame, paths: Sequence[Path]) -> None:
        super().__init__(obs=obs, var=var)
        self.forget_lookups()
        self.rows = rows
        self.paths = list(paths)

    @property
    def X(self) -> Rows:
        """Counts ``(cell, gene)`` on disk; slicing reads rows."""
        return self.rows

    @X.setter
    def X(self, value: Any) -> None:
        if value is not None:
            raise ValueError("The counts of a CellStore are on disk and cannot be replaced; use `to_memory()` first.")

    def forget_lookups(self) -> None:
        """Free the hash table of all cell names that pandas makes when it is asked for one of them, and then keeps."""
        self.obs.index = pd.Index(self.obs.index.array, name=self.obs.index.name)

    def __repr__(self) -> str:
        names = ", ".join(path.name for path in self.paths[:3]) + (", ..." if len(self.paths) > 3 else "")
        return f"CellStore: {super().__repr__()}\n    X on disk: {len(self.paths)} file(s): {names}"

    def to_memory(self, copy: bool = False) -> AnnData:
        """An ordinary AnnData with all counts in memory, and copies of everything else.

        Parameters
        ----------
        copy
            Has no effect: nothing is shared with the store in any case.
        """
        return _filled(AnnData(self.rows[:], obs=self.obs.copy(), var=self.var.copy()), self)

    def __getitem__(self, index: Any) -> Any:
        """A view, whose copy is an ordinary AnnData in memory."""
        view = super().__getitem__(index)
        if isinstance(view, AnnData):
            view.__class__ = _StoreView
        return view

    def copy(self, filename: str | os.PathLike[str] | None = None) -> CellStore:
        """Another object on the same files, with its own ``obs``, ``var``, ``obsm``, ``uns`` and so on.

        Parameters
        ----------
        filename
            Not supported.

        Raises
        ------
        ValueError
            If ``filename`` is given; use :func:`cellweave.pp.write_store` to write a store.
        """
        if filename is not None:
            raise ValueError("`filename` is not supported; write a store with `cellweave.pp.write_store`.")
        return _filled(CellStore(self.rows, self.obs.copy(), self.var.copy(), self.paths), self)

    def write_h5ad(self, *args: Any, **kwargs: Any) -> None:
        """Not supported: the counts are on disk already.

        Raises
        ------
        ValueError
            Always; it says what to write instead.
        """
        raise ValueError(
            "A CellStore is not written as a whole, for its counts are on disk already; write its results with "
            "`AnnData(obs=store.obs, obsm=dict(store.obsm)).write_h5ad(...)`, or everything with "
            "`store.to_memory().write_h5ad(...)`."
        )

    write = write_zarr = write_h5ad


class _StoreView(AnnData):
    """Some cells or genes of a store. AnnData would copy it without its counts, which it does not find where it looks."""

    def copy(self, filename: str | os.PathLike[str] | None = None) -> AnnData:
        if filename is not None:
            raise ValueError("`filename` is not supported; use `copy().write_h5ad(...)`.")
        return _filled(AnnData(self.X.copy(), obs=self.obs.copy(), var=self.var.copy()), self)

    def to_memory(self, copy: bool = False) -> AnnData:
        return self.copy()

    def __getitem__(self, index: Any) -> Any:
        view = super().__getitem__(index)
        if isinstance(view, AnnData):
            view.__class__ = _StoreView
        return view


def _filled(target: Any, source: AnnData) -> Any:
    """``target`` with copies of all of ``source`` that stands beside the counts."""
    for name in ("layers", "obsm", "varm", "obsp", "varp"):
        for key, value in getattr(source, name).items():
            if key is not None:  # where AnnData 0.13 keeps the counts
                getattr(target, name)[key] = value.copy()
    target.uns = deepcopy(dict(source.uns))
    return target


def open_store(
    paths: Paths,
    layer: str | None = None,
    obs_columns: Sequence[str] | None = None,
    join: Literal["inner", "outer"] = "inner",
    backend: Literal["blocks", "annbatch"] = "blocks",
) -> CellStore:
    """Open one or many ``.h5ad`` or ``.zarr`` files as one AnnData whose counts stay on disk.

    Cells of several files come in the order of the files; genes are matched by name.

    Parameters
    ----------
    paths
        A file, or several; a collection of annbatch counts as the files in it.
    layer
        Layer with the counts; ``X`` by default. It becomes the ``X`` of the result.
    obs_columns
        Columns of ``obs`` to load; all by default. Fewer take less memory.
    join
        ``"inner"`` keeps the genes that all files have, in the order of the first; ``"outer"`` keeps all genes, zero in
        the cells of files that lack them.
    backend
        ``"blocks"`` reads with h5py and zarr. ``"annbatch"`` reads batches of an annbatch collection with the loader of that
        package, which pays off for compressed and remote stores and many cores; order and results are the same.

    Returns
    -------
    CellStore ``(cell, gene)``.

    Raises
    ------
    FileNotFoundError
        If a file does not exist.
    ImportError
        If ``backend="annbatch"`` and annbatch is not installed.
    KeyError
        If a layer or column does not exist.
    OSError
        If a file cannot be read.
    ValueError
        If no file is given, gene names of a file repeat, the files share no gene, or ``backend="annbatch"`` is asked to read
        something else than one collection.

    Examples
    --------
    >>> import cellweave as cw
    >>> store = cw.io.open_store("atlas.zarr", obs_columns=["donor"])
    >>> cw.model.StackModel.setup_anndata(store, context_key="donor")
    >>> model = cw.model.StackModel(store)
    >>> model.train()
    >>> store.obsm["X_stack"] = model.get_latent_representation()
    """
    files = [Path(paths)] if isinstance(paths, str | os.PathLike) else [Path(path) for path in paths]
    if not files:
        raise ValueError("`paths` is empty; name at least one .h5ad or .zarr file.")
    if backend not in ("blocks", "annbatch"):
        raise ValueError(f"`backend` must be 'blocks' or 'annbatch', got {backend!r}.")
    members = [member for path in files for member in collection_members(path)]
    parts = [_read_part(path, layer, obs_columns) for path in members]
    whole = join_parts(parts, join)
    rows = whole.rows
    if backend == "annbatch":
        if len(files) != 1 or members == files or layer is not None:
            raise ValueError("`backend='annbatch'` reads the `X` of one annbatch collection; use `backend='blocks'`.")
        rows = AnnbatchRows([part.rows for part in parts], files[0])
    return CellStore(rows, whole.obs, whole.var, files)


def collection_members(path: Path) -> list[Path]:
    """The stores of an annbatch collection, in its order; any other path alone."""
    members = [folder for folder in path.glob("dataset_*") if folder.name.removeprefix("dataset_").isdecimal()]
    if not members or (path / "obs").exists():
        return [path]
    return sorted(members, key=lambda folder: int(folder.name.removeprefix("dataset_")))


class Part(NamedTuple):
    """Counts and annotation of some cells."""

    rows: Rows  # (cell, gene)
    obs: pd.DataFrame
    var: pd.DataFrame
    name: str


def join_parts(parts: Sequence[Part], join: str, genes: Sequence[str] | None = None) -> Part:
    """Parts below each other, in one gene order.

    Parameters
    ----------
    parts
        At least one.
    join
        ``"inner"`` or ``"outer"``, see :func:`open_store`.
    genes
        The genes, in the wanted order, in place of those that ``join`` gives.

    Raises
    ------
    ValueError
        If ``join`` is unknown, gene names of a part or of ``genes`` repeat, or a part has none of the genes.
    """
    if join not in ("inner", "outer"):
        raise ValueError(f"`join` must be 'inner' or 'outer', got {join!r}.")
    for name, index in [(f"`var_names` of {part.name}", part.var.index) for part in parts] + [("`genes`", genes)]:
        repeated = pd.Index([] if index is None else index)
        repeated = repeated[repeated.duplicated()]
        if len(repeated):
            raise ValueError(f"{name} repeat {repeated[0]!r}; make them unique first.")
    wanted = _common_genes(parts, join) if genes is None else pd.Index(genes)
    for part in parts:
        if len(part.var) and not part.var.index.isin(wanted).any():
            raise ValueError(
                f"{part.name} has none of the {len(wanted)} genes (first: {wanted[:1].tolist()}, first of the file: "
                f"{part.var.index[:1].tolist()}); use the same kind of gene names."
            )
    columns = [None if part.var.index.equals(wanted) else part.var.index.get_indexer(wanted) for part in parts]
    is_plain = len(parts) == 1 and columns[0] is None
    rows = parts[0].rows if is_plain else StackedRows([part.rows for part in parts], columns)
    return Part(rows, _joined_obs([part.obs for part in parts]), _joined_var(parts, wanted), parts[0].name)


def _read_part(path: Path, layer: str | None, obs_columns: Sequence[str] | None) -> Part:
    if not path.exists():
        raise FileNotFoundError(f"`{path}` does not exist; check the path.")
    root = _open(path)
    where = "X" if layer is None else f"layers/{layer}"
    if where not in root:
        layers = sorted(name.removeprefix("layers/") for name in root.get("layers", {}))
        raise KeyError(f"`{path}` has no `{where}`; its layers are {layers}.")
    _check_layout(root, where, path)
    if dict(root[where].attrs).get("encoding-type") == "csc_matrix":
        raise ValueError(
            f"`{where}` of `{path}` is stored by genes (CSC), so that no cell can be read alone; load it with AnnData and "
            "rewrite it once with `cellweave.pp.write_store(adata, ...)`."
        )
    try:
        obs, var = _read_frame(root["obs"], obs_columns), read_elem(root["var"])
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise OSError(f"`obs` or `var` of `{path}` cannot be read ({error}); restore it from a copy.") from error
    missing = [name for name in obs_columns or () if name not in obs]
    if missing:
        raise KeyError(f"`obs_columns` names {missing[0]!r}, which `obs` of `{path}` lacks.")
    obs.index, var.index = _as_text(obs.index), _as_text(var.index)
    rows = DiskRows(root[where], f"`{where}` of `{path}`")
    if rows.shape != (len(obs), len(var)):
        raise OSError(
            f"`{where}` of `{path}` has shape {rows.shape}, but `obs` and `var` have {len(obs)} and {len(var)} rows; "
            "restore it from a copy."
        )
    return Part(rows, obs, var, f"`{path}`")


def _as_text(index: pd.Index) -> pd.Index:
    """The index as texts, itself where it holds nothing else."""
    return index if pd.api.types.infer_dtype(index, skipna=False) == "string" else index.astype(str)


def _open(path: Path) -> Any:
    try:
        if path.is_dir():
            return zarr.open_group(path, mode="r")
        # shared by all readers of this process, closed with the last of them
        return h5py.File(path, "r")
    except (OSError, ValueError, KeyError, zarr.errors.GroupNotFoundError) as error:
        raise OSError(
            f"`{path}` cannot be opened as an .h5ad or .zarr file ({error}); it may be incomplete: restore it from a copy."
        ) from error


def _check_layout(root: Any, where: str, path: Path) -> None:
    """What AnnData 0.7 and later write: frames as groups, and a matrix that names its encoding."""
    kind = dict(root[where].attrs).get("encoding-type", "array")
    is_sparse = not hasattr(root[where], "shape")
    known = kind in ("csr_matrix", "csc_matrix") if is_sparse else len(root[where].shape) == 2
    frames = all(dict(root[name].attrs).get("encoding-type") == "dataframe" for name in ("obs", "var") if name in root)
    if "obs" not in root or "var" not in root or not known or not frames:
        raise OSError(
            f"`{path}` is not laid out as AnnData 0.7 or later writes it; read it with AnnData and write it again."
        )


def _read_frame(group: Any, columns: Sequence[str] | None) -> pd.DataFrame:
    """The frame of a group, or those of the columns that it has."""
    if columns is None or group.attrs.get("encoding-version") == "0.1.0":  # whose categories stand outside of columns
        frame = read_elem(group)
        return frame if columns is None else frame[[name for name in columns if name in frame]]
    known = set(group.attrs["column-order"])
    index = read_elem(group[group.attrs["_index"]])
    return pd.DataFrame({name: read_elem(group[name]) for name in columns if name in known}, index=pd.Index(index))


def _common_genes(parts: Sequence[Part], join: str) -> pd.Index:
    genes = parts[0].var.index
    for part in parts[1:]:
        others = part.var.index
        genes = genes[genes.isin(others)] if join == "inner" else genes.append(others[~others.isin(genes)])
    if len(genes) == 0 and len(parts) > 1:
        raise ValueError(
            f"The files share no gene (first of {parts[0].name}: {parts[0].var.index[:1].tolist()}, first of "
            f"{parts[-1].name}: {parts[-1].var.index[:1].tolist()}); use files with the same kind of gene names."
        )
    return genes


def _joined_obs(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Frames below each other, with all columns; missing where a file lacks one."""
    if len(frames) == 1:
        return frames[0]
    joined = pd.concat(frames)
    for name in joined.columns:
        joined[name] = _joined_column(
            [f[name] if name in f else pd.Series(np.nan, f.index) for f in frames], joined[name]
        )
    return joined


def _joined_column(parts: Sequence[pd.Series], joined: pd.Series) -> Any:
    """A column of joined frames, with a type that can be stored: pandas makes objects of categories and of booleans."""
    known = [part for part in parts if not part.isna().all()]
    if known and all(isinstance(part.dtype, pd.CategoricalDtype) for part in known):
        names = [part.cat.categories for part in known]
        if len({index.inferred_type for index in names}) > 1:  # 1 and "1" are one category
            joined = joined.where(joined.isna(), joined.astype(str))
            names = [index.astype(str) for index in names]
        union = names[0]
        for index in names[1:]:
            union = union.append(index[~index.isin(union)])
        return pd.Categorical(joined, categories=union)
    if known and joined.dtype == object:
        if all(pd.api.types.is_bool_dtype(part.dtype) for part in known):
            return joined.astype("boolean")
        if len({pd.api.types.infer_dtype(part, skipna=True) for part in known}) > 1:
            return joined.where(joined.isna(), joined.astype(str))
    return joined


def _joined_var(parts: Sequence[Part], genes: pd.Index) -> pd.DataFrame:
    """Annotation of ``genes``: of each the one of the first part that has it, in the columns that all parts have."""
    if len(parts) == 1 and parts[0].var.index.equals(genes):
        return parts[0].var
    shared = [name for name in parts[0].var if all(name in part.var for part in parts)]
    var = pd.concat([part.var[shared] for part in parts])
    var = var[~var.index.duplicated()].reindex(genes)
    for name in shared:
        columns = [part.var[name] for part in parts]
        var[name] = _joined_column(columns, var[name])
    return var
