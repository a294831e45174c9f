"""Setup of models that read a perturbation screen: log-normalised expression, and what was done to which cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray
from scvi.data import AnnDataManager
from scvi.data.fields import LayerField

from cellweave import _compat
from cellweave._keys import REGISTRY_KEYS
from cellweave._types import AnnOrMuData
from cellweave.data import (
    CategoriesObsField,
    CellStore,
    ConditionNames,
    GroupObsField,
    Screen,
    check_expression,
    check_groups,
    check_known,
    check_names,
    context_names,
    get_counts,
)

from ._setup import _check_options

__all__ = ["PerturbationSetupMixin"]

# What `split_key` may say; every other value keeps a cell out of training.
_TRAIN, _VALIDATION = ("train", "training"), ("val", "valid", "validation")


class PerturbationSetupMixin:
    """``setup_anndata`` for perturbation screens."""

    @classmethod
    def setup_anndata(
        cls,
        adata: Any,
        perturbation_key: str,
        control_key: str = "control",
        layer: str | None = None,
        sep: str = "+",
        dosage_key: str | None = None,
        pairing_keys: Sequence[str] | None = None,
        categorical_covariate_keys: Sequence[str] | None = None,
        split_key: str | None = None,
        gene_symbols_key: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Register expression and conditions. Everything is checked before anything is written.

        Parameters
        ----------
        adata
            AnnData with log-normalised expression, sparse or dense, in memory or backed. Columns ``_scvi_*`` in ``obs`` and
            ``obsm``, and identifiers in ``uns``, are added to it.
        perturbation_key
            ``obs`` column of what was done to each cell. ``"A+B"`` is a combination and the same as ``"B+A"``; ``"A+ctrl"``
            is ``"A"``.
        control_key
            Value of that column for control cells.
        layer
            Layer with the expression; ``adata.X`` by default.
        sep
            What stands between the parts of a combination.
        dosage_key
            ``obs`` column of doses: numbers, or ``"0.5+1"`` in the order of the label. What it says of control cells does not
            matter.
        pairing_keys
            ``obs`` columns (cell type, batch, donor) whose combinations are contexts: a perturbed cell is compared with
            control cells of its own context only.
        categorical_covariate_keys
            ``obs`` columns that the model sees as conditions beside the perturbation.
        split_key
            ``obs`` column that says ``"train"`` or ``"valid"``; nothing is learned from cells with any other value. A random
            split by default.
        gene_symbols_key
            ``var`` column of gene names by which perturbed genes are found; ``adata.var_names`` by default.
        **kwargs
            Used by :meth:`load` and when data are transferred.

        Raises
        ------
        KeyError
            If a layer or column does not exist.
        TypeError
            If ``pairing_keys`` or ``categorical_covariate_keys`` is a text instead of a list.
        ValueError
            If the expression is not log-normalised or has NaN, there are no control cells at all or in a context, labels or
            doses cannot be read, ``adata`` is a view or empty, gene names repeat, or columns have missing values.
        """
        setup_method_args = cls._get_setup_method_args(**locals())
        _check_options(cls.setup_anndata, kwargs)
        arguments = setup_method_args[_compat.SETUP_ARGS_KEY]
        is_new = not kwargs.get("source_registry")
        check_names(adata)
        get_counts(adata, layer)
        genes = _gene_names(adata, gene_symbols_key)
        if is_new:
            _check_lists(arguments)
            Screen.from_obs(adata.obs, arguments, genes)
        else:  # a model that exists predicts from control cells alone
            _check_new_columns(adata.obs, arguments)
        if is_new and split_key is not None:
            read_split(adata.obs, split_key)
        _check_covariates(adata, arguments, kwargs.get("source_registry"))
        check_expression(adata, layer)
        fields = [
            LayerField(REGISTRY_KEYS.X, layer, is_count_data=False),
            GroupObsField(REGISTRY_KEYS.PERTURBATION, perturbation_key),
        ]
        if categorical_covariate_keys:
            fields.append(CategoriesObsField(REGISTRY_KEYS.CATEGORIES, list(categorical_covariate_keys)))
        manager = AnnDataManager(fields=fields, setup_method_args=setup_method_args)
        manager.register_fields(adata, **kwargs)
        if isinstance(adata, CellStore):
            adata.forget_lookups()
        cls.register_manager(manager)

    # ---------------------------------------------------------------- data that the model meets

    @property
    def _setup(self) -> dict[str, Any]:
        return dict(self.registry_[_compat.SETUP_ARGS_KEY])

    def _check_new_data(self, adata: AnnOrMuData) -> None:
        setup = self._setup
        _check_new_columns(adata.obs, setup)
        _check_covariates(adata, setup, self.registry_)
        check_expression(adata, setup["layer"])

    def _covariate_sizes(self) -> list[int]:
        """Number of values of every covariate."""
        keys = self._setup["categorical_covariate_keys"]
        if not keys:
            return []
        state = self.registry_[_compat.FIELD_REGISTRIES_KEY][REGISTRY_KEYS.CATEGORIES][_compat.STATE_REGISTRY_KEY]
        return [len(state["mappings"][key]) for key in keys]


def read_split(obs: pd.DataFrame, key: str) -> NDArray[np.int64]:
    """Part of each cell: 0 training, 1 validation, 2 neither ``(cell,)``.

    Raises
    ------
    KeyError
        If there is no such column.
    ValueError
        If values are missing, or no cell is for training.
    """
    check_groups(obs, key, "split_key")
    values = obs[key].astype(str).str.lower()
    part = np.where(values.isin(_TRAIN), 0, np.where(values.isin(_VALIDATION), 1, 2)).astype(np.int64)
    if not (part == 0).any():
        raise ValueError(
            f"`adata.obs[{key!r}]` (`split_key`) has no cell with the value 'train'; it has "
            f"{sorted(obs[key].astype(str).unique())[:6]}, so rename one of them."
        )
    return part


def _gene_names(adata: AnnData, key: str | None) -> list[str]:
    if key is None:
        return adata.var_names.astype(str).tolist()
    if key not in adata.var:
        raise KeyError(f"`gene_symbols_key={key!r}` not found; `adata.var` has {adata.var.columns[:6].tolist()}.")
    return adata.var[key].astype(str).tolist()


def _check_lists(arguments: Mapping[str, Any]) -> None:
    for argument in ("pairing_keys", "categorical_covariate_keys"):
        if isinstance(arguments[argument], str):
            value = arguments[argument]
            raise TypeError(f"`{argument}` must be a list of column names, got {value!r}; pass `[{value!r}]`.")
    if not isinstance(arguments["sep"], str) or not arguments["sep"]:
        raise ValueError(f"`sep` must be a text that is not empty, got {arguments['sep']!r}; '+' is usual.")


def _check_new_columns(obs: pd.DataFrame, arguments: Mapping[str, Any]) -> None:
    """Check the labels of new data, which may have none, and what contexts are made of."""
    key = arguments["perturbation_key"]
    if key in obs:
        check_groups(obs, key, "perturbation_key")
        names = ConditionNames(arguments["control_key"], arguments["sep"])
        for label in obs[key].astype(str).unique():
            names.parts(label)
    context_names(obs, arguments["pairing_keys"])


def _check_covariates(
    adata: Any, arguments: Mapping[str, Any], source_registry: Mapping[str, Any] | None = None
) -> None:
    """Check the covariates; with a ``source_registry``, as those of new data."""
    for key in arguments["categorical_covariate_keys"] or ():
        check_groups(adata.obs, key, "categorical_covariate_keys")
        if source_registry is not None:
            state = source_registry[_compat.FIELD_REGISTRIES_KEY][REGISTRY_KEYS.CATEGORIES][_compat.STATE_REGISTRY_KEY]
            check_known(adata.obs, key, "categorical_covariate_keys", np.asarray(state["mappings"][key]))
