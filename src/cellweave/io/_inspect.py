"""What a saved model is, without building it."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

from cellweave import _compat

from ._model_files import read_with_manifest

__all__ = ["ModelInfo", "inspect_model"]


class ModelInfo(NamedTuple):
    """Description of a model directory; see :func:`inspect_model`."""

    model: str  # class
    cellweave: str  # version that wrote it
    schema: int
    is_trained: bool
    n_genes: int
    n_cells: int  # that it was set up with
    arguments: dict[str, Any]  # of the constructor
    setup: dict[str, Any]  # arguments of setup_anndata
    sizes: dict[str, int]  # bytes of each file
    weights_sha256: str

    def __repr__(self) -> str:
        arguments = ", ".join(f"{key}={value!r}" for key, value in self.arguments.items())
        state = "trained" if self.is_trained else "not trained"
        return (
            f"{self.model}({arguments})\n"
            f"  {self.n_genes:,} genes, set up with {self.n_cells:,} cells; {state}\n"
            f"  {sum(self.sizes.values()):,} bytes, file schema {self.schema}, written by cellweave {self.cellweave}"
        )


def inspect_model(dir_path: str | os.PathLike[str]) -> ModelInfo:
    """Describe a saved model without building it; all files are checked first and none is executed.

    Parameters
    ----------
    dir_path
        Directory that ``save`` of a model wrote.

    Returns
    -------
    Class, version, sizes, numbers of genes and cells, arguments, and whether the model is trained.

    Raises
    ------
    ModelFileError
        As :func:`read_model`.

    Examples
    --------
    >>> import cellweave as cw
    >>> cw.io.inspect_model("my_model")  # doctest: +SKIP
    """
    saved, manifest = read_with_manifest(dir_path)
    groups = saved.config["init_params"]
    fields = saved.registry[_compat.FIELD_REGISTRIES_KEY]
    counts = {key: value for field in fields.values() for key, value in field["summary_stats"].items()}
    return ModelInfo(
        model=saved.config["model"],
        cellweave=manifest["cellweave"],
        schema=manifest["schema"],
        is_trained=saved.config["is_trained"],
        n_genes=counts["n_vars"],
        n_cells=counts["n_cells"],
        arguments={**groups["non_kwargs"], **{k: v for group in groups["kwargs"].values() for k, v in group.items()}},
        setup=dict(saved.registry[_compat.SETUP_ARGS_KEY]),
        sizes={name: file["size"] for name, file in manifest["files"].items()},
        weights_sha256=manifest["files"]["weights.safetensors"]["sha256"],
    )
