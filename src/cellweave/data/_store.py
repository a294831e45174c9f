"""An AnnData whose counts stay on disk."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import h5py
import pandas as pd
import zarr
from anndata import AnnData
from anndata.io import read_elem

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

    def __repr__(self) -> str:
        names = ", ".join(path.name for path in self.paths[:3]) + (", ..." if len(self.paths) > 3 else "")
        return f"CellStore: {super().__repr__()}\n    X on disk: {len(self.paths)} file(s): {names}"

    def to_memory(self, copy: bool = False) -> AnnData:
        """An ordinary AnnData with all counts in memory."""
        loaded = AnnData(self.rows[:], obs=self.obs.copy(), var=self.var.copy(), uns=dict(self.uns))
        for key, value in self.obsm.items():
            loaded.obsm[key] = value
        return loaded

    def copy(self, filename: str | os.PathLike[str] | None = None) -> CellStore:
        """Another object on the same files, with its own ``obs``, ``var``, ``obsm`` and ``uns``.

        Raises
        ------
        ValueError
            If ``filename`` is given; use :func:`cellweave.pp.write_store` to write a store.
        """
        if filename is not None:
            raise ValueError("`filename` is not supported; write a store with `cellweave.pp.write_store`.")
        twin = CellStore(self.rows, self.obs.copy(), self.var.copy(), self.paths)
        twin.uns = dict(self.uns)
        for key, value in self.obsm.items():
            twin.obsm[key] = value.copy()
        return twin


def open_store(
    paths: Paths,
    layer: str | None = None,
    obs_columns: Sequence[str] | None = None,
    join: Literal["inner", "outer"] = "inner",
) -> CellStore:
    """Open one or many ``.h5ad`` or ``.zarr`` files as one AnnData whose counts stay on disk.

    Cells of several files come in the order of the files; genes are matched by name.

    Parameters
    ----------
    paths
        A file, or several.
    layer
        Layer with the counts; ``X`` by default. It becomes the ``X`` of the result.
    obs_columns
        Columns of ``obs`` to load; all by default. Fewer take less memory.
    join
        ``"inner"`` keeps the genes that all files have, in the order of the first; ``"outer"`` keeps all genes, zero in
        the cells of files that lack them.

    Returns
    -------
    CellStore ``(cell, gene)``.

    Raises
    ------
    FileNotFoundError
        If a file does not exist.
    KeyError
        If a layer or column does not exist.
    OSError
        If a file cannot be read.
    ValueError
        If no file is given, gene names of a file repeat, or the files share no gene.

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
    whole = join_parts([_read_part(path, layer, obs_columns) for path in files], join)
    return CellStore(whole.rows, whole.obs, whole.var, files)


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
        If gene names of a part repeat, or no gene is left.
    """
    wanted = _common_genes(parts, join) if genes is None else pd.Index(genes)
    for part in parts:
        if not part.var.index.isin(wanted).any():
            raise ValueError(
                f"{part.name} has none of the {len(wanted)} genes (first: {wanted[:1].tolist()}, first of the file: "
                f"{part.var.index[:1].tolist()}); use the same kind of gene names."
            )
    columns = [None if part.var.index.equals(wanted) else part.var.index.get_indexer(wanted) for part in parts]
    is_plain = len(parts) == 1 and columns[0] is None
    rows = parts[0].rows if is_plain else StackedRows([part.rows for part in parts], columns)
    return Part(rows, _joined_obs([part.obs for part in parts]), parts[0].var.reindex(wanted), parts[0].name)


def _read_part(path: Path, layer: str | None, obs_columns: Sequence[str] | None) -> Part:
    if not path.exists():
        raise FileNotFoundError(f"`{path}` does not exist; check the path.")
    root = _open(path)
    where = "X" if layer is None else f"layers/{layer}"
    if where not in root:
        layers = sorted(name.removeprefix("layers/") for name in root.get("layers", {}))
        raise KeyError(f"`{path}` has no `{where}`; its layers are {layers}.")
    if dict(root[where].attrs).get("encoding-type") == "csc_matrix":
        raise ValueError(
            f"`{where}` of `{path}` is stored by genes (CSC), so that no cell can be read alone; rewrite it once with "
            "`cellweave.pp.write_store`."
        )
    try:
        obs, var = _read_frame(root["obs"], obs_columns, path), read_elem(root["var"])
    except (OSError, RuntimeError) as error:
        raise OSError(f"`obs` or `var` of `{path}` cannot be read ({error}); restore it from a copy.") from error
    var.index = var.index.astype(str)
    return Part(DiskRows(root[where], f"`{where}` of `{path}`"), obs, var, f"`{path}`")


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


def _read_frame(group: Any, columns: Sequence[str] | None, path: Path) -> pd.DataFrame:
    """The frame of a group, or some columns of it."""
    if columns is None:
        return read_elem(group)
    known = list(group.attrs["column-order"])
    missing = [name for name in columns if name not in known]
    if missing:
        raise KeyError(f"`obs_columns` names {missing[0]!r}, but `obs` of `{path}` has {known}.")
    index = read_elem(group[group.attrs["_index"]])
    return pd.DataFrame({name: read_elem(group[name]) for name in columns}, index=pd.Index(index).astype(str))


def _common_genes(parts: Sequence[Part], join: str) -> pd.Index:
    if join not in ("inner", "outer"):
        raise ValueError(f"`join` must be 'inner' or 'outer', got {join!r}.")
    for part in parts:
        repeated = part.var.index[part.var.index.duplicated()]
        if len(repeated):
            raise ValueError(f"`var_names` of {part.name} repeat {repeated[0]!r}; make them unique first.")
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
    """Frames below each other; a categorical column stays one, with the categories of all files."""
    if len(frames) == 1:
        return frames[0]
    joined = pd.concat(frames)
    for name in joined.columns:
        parts = [frame[name] for frame in frames if name in frame]
        if len(parts) == len(frames) and all(isinstance(part.dtype, pd.CategoricalDtype) for part in parts):
            joined[name] = pd.api.types.union_categoricals(parts, ignore_order=True)
    return joined
