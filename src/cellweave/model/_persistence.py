"""``save`` and ``load`` in the safe format of :mod:`cellweave.io`, in place of the pickles of scvi-tools."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from typing import Any, NoReturn, Self

import numpy as np
import torch
import torch.distributed as dist
from scvi.data import AnnDataManager
from torch import Tensor

from cellweave import _compat
from cellweave._types import AnnOrMuData
from cellweave.io import ModelFileError, SavedModel, inspect_model, read_model, write_model

__all__ = ["PersistenceMixin"]

_SPLITS = ("train_indices", "validation_indices", "test_indices")
_SETUPS = ("setup_anndata", "setup_mudata")


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
            Replace an existing model directory; other files in it are kept.
        save_anndata
            Not supported; write the AnnData with ``adata.write_h5ad``.

        Raises
        ------
        FileExistsError
            If ``dir_path`` exists and ``overwrite`` is false, or it is not a model directory.
        OSError
            If the directory cannot be written, for instance because the disk is full; a model that was there stays.
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
        cls._check_arguments(saved, dir_path)
        model = cls._from_saved(saved)
        _load_weights(model.module, saved.weights, dir_path)
        if adata is not None:
            model._attach(adata)
        if accelerator != "cpu" and torch.cuda.is_available():
            model.to_device(f"cuda:{device}" if isinstance(device, int) else "cuda:0")
        return model

    @staticmethod
    def load_registry(dir_path: str | os.PathLike[str]) -> dict[str, Any]:
        """Registry of a saved model: setup arguments, genes and categories.

        Parameters
        ----------
        dir_path
            Directory of the model.

        Raises
        ------
        cellweave.io.ModelFileError
            If files are missing or damaged.
        """
        return read_model(dir_path).registry

    @staticmethod
    def view_setup_args(dir_path: str | os.PathLike[str]) -> None:
        """Print the setup arguments of a saved model.

        Parameters
        ----------
        dir_path
            Directory of the model.

        Raises
        ------
        cellweave.io.ModelFileError
            If files are missing or damaged.
        """
        AnnDataManager.view_setup_method_args(read_model(dir_path).registry)

    @classmethod
    def convert_legacy_save(cls, *args: Any, **kwargs: Any) -> NoReturn:
        """Not supported: the files it would convert are pickles, which can run code when they are read.

        Parameters
        ----------
        *args, **kwargs
            As in scvi-tools.

        Raises
        ------
        NotImplementedError
            Always.
        """
        raise NotImplementedError(
            f"{cls.__name__} has no legacy files: they are pickles, which can run code and are not opened."
        )

    @classmethod
    def _check_arguments(cls, saved: SavedModel, dir_path: str | os.PathLike[str]) -> None:
        """A newer version may have saved an argument that this one does not know."""
        unknown = sorted(set(_arguments(saved)) - set(inspect.signature(cls).parameters))
        if unknown:
            raise ModelFileError(
                f"`{dir_path}` was saved with the argument `{unknown[0]}`, which this {cls.__name__} does not have; "
                f"upgrade cellweave to at least {inspect_model(dir_path).cellweave}."
            )

    @classmethod
    def _from_saved(cls, saved: SavedModel) -> Self:
        model = cls(registry=saved.registry, **_arguments(saved))  # type: ignore[call-arg]
        model.module.eval()
        model.is_trained_ = saved.config["is_trained"]
        model.history_ = saved.history
        for name in _SPLITS:
            if name in saved.indices:
                setattr(model, name, saved.indices[name])
        return model

    def _attach(self, adata: AnnOrMuData) -> None:
        """Register ``adata``, gene-aligned, with the saved setup and make it the data of this model."""
        data = self._aligned(adata)
        registry = self.registry_
        method = registry[_compat.SETUP_METHOD_NAME]
        if method not in _SETUPS:  # a file must not choose what is called
            raise ModelFileError(f"The registry names the setup method {method!r}; only {' and '.join(_SETUPS)} exist.")
        setup = getattr(type(self), method)
        setup(data, source_registry=registry, **self._transfer_options(), **_setup_arguments(registry))
        self._adata = data
        self._adata_manager = self._get_most_recent_anndata_manager(data, required=True)
        self._register_manager_for_instance(self._adata_manager)

    def _transfer_options(self) -> dict[str, Any]:
        """Hook: how new data may differ from the registered data."""
        return {}


def _setup_arguments(registry: dict[str, Any]) -> dict[str, Any]:
    return dict(registry[_compat.SETUP_ARGS_KEY])


def _arguments(saved: SavedModel) -> dict[str, Any]:
    groups = saved.config["init_params"]
    return {**groups["non_kwargs"], **{k: v for group in groups["kwargs"].values() for k, v in group.items()}}


def _load_weights(module: torch.nn.Module, weights: Mapping[str, Tensor], dir_path: str | os.PathLike[str]) -> None:
    expected = module.state_dict()
    for name in sorted(expected.keys() ^ weights.keys()):
        where = "has" if name in weights else "lacks"
        raise ModelFileError(
            f"`{dir_path}` {where} the weight `{name}`, unlike the model its arguments describe; it needs the version "
            f"of cellweave that wrote it, {inspect_model(dir_path).cellweave}."
        )
    for name, value in weights.items():
        if value.shape != expected[name].shape:
            raise ModelFileError(
                f"The weight `{name}` of `{dir_path}` has shape {tuple(value.shape)}, its arguments and genes need "
                f"{tuple(expected[name].shape)}; restore the model directory from a copy."
            )
    module.load_state_dict(dict(weights), strict=True)
