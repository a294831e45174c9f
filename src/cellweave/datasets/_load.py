"""Find, read and check an assembled data set."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import anndata
import numpy as np
import scipy.sparse as sp

from cellweave._keys import OUTPUT_KEYS

from ._registry import STUDIES, Study

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["DATA_VARIABLE", "documented", "load_study"]

DATA_VARIABLE = "CELLWEAVE_DATA"
F = TypeVar("F", bound=Callable[..., "AnnData"])

_SHARED_DOC = """

    {n_cells} cells x {n_columns} {columns}, {values} in ``X`` ({form}, float32).

    * Study: {citation}
    * Carried by: {carrier}
    * Licence of the carrier: {licence}

    Parameters
    ----------
    path
        The file ``{file}``, or a folder that holds it. Default: the folder in the environment variable
        ``CELLWEAVE_DATA``.

    Returns
    -------
    AnnData
        The data set, with its origin in ``uns["cellweave"]["dataset"]``.

    Raises
    ------
    FileNotFoundError
        The file is in neither place; nothing is downloaded.
    ValueError
        The file has another shape or lacks a column of ``obs``.
    """


def documented(name: str) -> Callable[[F], F]:
    """Append the sections that all loaders share to the docstring of a loader."""
    study = STUDIES[name]
    n_cells, n_columns = study.shape
    kind = ("markers", "raw intensities", "dense") if study.markers else ("genes", "raw counts", "CSR")
    columns, values, form = kind
    fields = {key: getattr(study, key) for key in ("citation", "carrier", "licence", "file")}

    def decorate(loader: F) -> F:
        loader.__doc__ = (loader.__doc__ or "").rstrip() + _SHARED_DOC.format(
            n_cells=n_cells, n_columns=n_columns, columns=columns, values=values, form=form, **fields
        )
        return loader

    return decorate


def load_study(name: str, path: str | os.PathLike[str] | None = None) -> AnnData:
    """Read one data set of the registry.

    Parameters
    ----------
    name
        Key of the registry.
    path
        File or folder; default: the folder in the environment variable ``CELLWEAVE_DATA``.

    Returns
    -------
    AnnData
        Checked data set with ``X`` as float32, counts as CSR and intensities dense.
    """
    study = STUDIES[name]
    found = _locate(name, study, path)
    adata = anndata.read_h5ad(found)
    _check(name, study, adata, found)
    adata.X = np.asarray(adata.X, dtype=np.float32) if study.markers else sp.csr_matrix(adata.X, dtype=np.float32)
    adata.uns.setdefault(OUTPUT_KEYS.PROVENANCE, {})["dataset"] = {
        "name": name,
        "sha256": _checksum(name, study, found),
        "citation": study.citation,
        "carrier": study.carrier,
        "licence": study.licence,
    }
    return adata


def _locate(name: str, study: Study, path: str | os.PathLike[str] | None) -> Path:
    """The existing file, or an error that says where the study can be had."""
    folder = os.environ.get(DATA_VARIABLE)
    given = path if path is not None else folder
    where = f"neither `path` nor the environment variable {DATA_VARIABLE} is set"
    if given:
        candidate = Path(given).expanduser()
        candidate = candidate / study.file if candidate.is_dir() else candidate
        if candidate.is_file():
            return candidate
        where = f"'{candidate}' does not exist"
    raise FileNotFoundError(
        f"Data set '{name}' ({study.citation}) was not found because {where}: put the file '{study.file}' into the folder "
        f"named by {DATA_VARIABLE} or pass its path; it was assembled from matrices in the public GitHub repositories "
        f"{study.carrier}."
    )


def _check(name: str, study: Study, adata: AnnData, path: Path) -> None:
    if adata.shape != study.shape:
        raise ValueError(
            f"'{path}' is not data set '{name}': expected {study.shape} cells x genes, found {adata.shape}."
        )
    missing = [column for column in study.obs if column not in adata.obs]
    if missing:
        raise ValueError(f"'{path}' is not data set '{name}': adata.obs lacks the columns {missing}.")


def _checksum(name: str, study: Study, path: Path) -> str:
    """The checksum of the file; a warning if it is another version than the one the published numbers refer to."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != study.sha256:
        warnings.warn(
            f"'{path}' has the shape of data set '{name}' but another sha256 ({found[:12]}… instead of "
            f"{study.sha256[:12]}…), so its numbers may differ from published ones.",
            UserWarning,
            stacklevel=4,
        )
    return found
