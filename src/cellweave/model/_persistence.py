"""``save`` and ``load`` in the safe format of :mod:`cellweave.io`, in place of the pickles of scvi-tools."""

from __future__ import annotations

import os
from typing import Any, Self

import numpy as np
import torch
import torch.distributed as dist

from cellweave import _compat
from cellweave._types import AnnOrMuData
from cellweave.io import ModelFileError, SavedModel, read_model, write_model

__all__ = ["PersistenceMixin"]

_SPLITS = ("train_indices", "validation_indices", "test_indices")


class PersistenceMixin:
    """Save and load a model as safetensors, JSON and a checksum manifest."""

    def save(self, dir_path: str | os.PathLike[str], overwrite: bool = False, save_anndata: bool = False) -> None:
        """Save the model to a directory; it appears complete or not at all.

        Weights (safetensors), constructor arguments, the registry with the gene names, history and the rows of the
        data split are written with a checksum of every file. Optimiser state is not; use ``train(checkpoint_dir=...)``
        to be able to resume training. Of processes that trained together only the first one writes.

        Parameters
        ----------
        dir_path
            Directory to create.
        overwrite
            Replace an existing model directory.
        save_anndata
            Not supported; write the AnnData with ``adata.write_h5ad``.

        Raises
        ------
        FileExistsError
            If ``dir_path`` exists and ``overwrite`` is false, or it is not a model directory.
        ValueError
            If ``save_anndata`` is true.
        """
        if save_anndata:
            raise ValueError("`save_anndata=True` is not supported; write the data with `adata.write_h5ad(path)`.")
        if dist.is_available() and dist.is_initialized() and dist.get_rank() > 0:
            return
        config = {
            "model": type(self).__name__,
            "init_params": self.init_params_,
            "is_trained": self.is_trained_,
        }
        splits = {name: getattr(self, name) for name in _SPLITS}
        saved = SavedModel(
            weights=self.module.state_dict(),
            config=config,
            registry=dict(self.registry_),
            history=self.history_,
            indices={name: np.asarray(rows, dtype=np.int64) for name, rows in splits.items() if rows is not None},
        )
        write_model(dir_path, saved, overwrite=overwrite)

    @classmethod
    def load(
        cls,
        dir_path: str | os.PathLike[str],
        adata: AnnOrMuData | None = None,
        accelerator: str = "auto",
        device: int | str = "auto",
    ) -> Self:
        """Load a model that :meth:`save` wrote; every file is checked first and none is executed.

        Parameters
        ----------
        dir_path
            Directory of the model.
        adata
            Data to attach. Genes are matched by name: where they differ from those of the model, an aligned copy is
            attached as ``model.adata`` (missing genes zero, others left out). Without it, pass ``adata=`` to getters.
        accelerator, device
            As in scvi-tools; ``"auto"`` uses a GPU where there is one.

        Raises
        ------
        cellweave.io.ModelFileError
            If files are missing or damaged, or the directory holds another model class.
        ValueError
            If too few genes of the model are in ``adata``.
        """
        saved = read_model(dir_path)
        if saved.config["model"] != cls.__name__:
            raise ModelFileError(
                f"`{dir_path}` holds a {saved.config['model']}, not a {cls.__name__}; load it with that class."
            )
        model = cls._from_saved(saved)
        if adata is not None:
            model._attach(adata)
        if accelerator != "cpu" and torch.cuda.is_available():
            model.to_device(f"cuda:{device}" if isinstance(device, int) else "cuda:0")
        return model

    @classmethod
    def _from_saved(cls, saved: SavedModel) -> Self:
        arguments = saved.config["init_params"]
        extra = {k: v for group in arguments["kwargs"].values() for k, v in group.items()}
        model = cls(registry=saved.registry, **arguments["non_kwargs"], **extra)  # type: ignore[call-arg]
        model.module.load_state_dict(saved.weights, strict=True)
        model.module.eval()
        model.is_trained_ = saved.config["is_trained"]
        model.history_ = saved.history
        for name, rows in saved.indices.items():
            setattr(model, name, rows)
        return model

    def _attach(self, adata: AnnOrMuData) -> None:
        """Register ``adata``, gene-aligned, with the saved setup and make it the data of this model."""
        data = self._aligned(adata)
        registry = self.registry_
        setup = getattr(type(self), registry[_compat.SETUP_METHOD_NAME])
        setup(data, source_registry=registry, **self._transfer_options(), **_setup_arguments(registry))
        self._adata = data
        self._adata_manager = self._get_most_recent_anndata_manager(data, required=True)
        self._register_manager_for_instance(self._adata_manager)

    def _transfer_options(self) -> dict[str, Any]:
        """Hook: how new data may differ from the registered data."""
        return {}


def _setup_arguments(registry: dict[str, Any]) -> dict[str, Any]:
    return dict(registry[_compat.SETUP_ARGS_KEY])
