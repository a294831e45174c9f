"""Setup of models that read raw counts: an AnnData, or the RNA modality of a MuData."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

from mudata import MuData
from scvi.data import AnnDataManager
from scvi.data.fields import LayerField, MuDataLayerField

from cellweave import _compat
from cellweave._keys import REGISTRY_KEYS
from cellweave._types import AnnOrMuData
from cellweave.data import (
    CategoryObsField,
    CellStore,
    GroupObsField,
    MuDataCategoryObsField,
    MuDataGroupObsField,
    check_cells,
    check_counts,
    check_groups,
    check_known,
    check_names,
    warn_small_data,
)

__all__ = ["CountsSetupMixin"]

# What scvi-tools and :meth:`load` pass to setup methods when they register data for a model that exists.
_TRANSFER_OPTIONS = {"source_registry", "extend_categories"}
_COLUMNS = ("batch_key", "labels_key", "context_key")


class CountsSetupMixin:
    """``setup_anndata`` and ``setup_mudata`` for counts, a batch, labels and context groups."""

    @classmethod
    def setup_anndata(
        cls,
        adata: Any,
        layer: str | None = None,
        batch_key: str | None = None,
        labels_key: str | None = None,
        context_key: str | None = None,
        allow_noncounts: bool = False,
        **kwargs: Any,
    ) -> None:
        """Register the counts and groups of an AnnData. Everything is checked before anything is written.

        Parameters
        ----------
        adata
            AnnData with raw counts, in memory or backed, sparse or dense. Columns ``obs["_scvi_*"]`` and identifiers
            in ``uns`` are added to it.
        layer
            Layer with the counts; ``adata.X`` by default.
        batch_key
            ``obs`` column of the technical batch, read when the model has ``batch_condition``.
        labels_key
            ``obs`` column of cell labels; it never influences training.
        context_key
            ``obs`` column of the groups (donor, sample, ...) within which contexts are drawn. Contexts mix all cells
            by default.
        allow_noncounts
            Accept non-integer values, with a warning, here and in all data that the model meets later.
        **kwargs
            Used by :meth:`load` and when data are transferred.

        Raises
        ------
        KeyError
            If a layer or column does not exist.
        ValueError
            If counts are NaN, infinite, negative, not integers or all zero, gene names repeat, ``adata`` is a view or
            empty, or a column has missing values.
        """
        setup_method_args = cls._get_setup_method_args(**locals())
        _check_options(cls.setup_anndata, kwargs)
        check_names(adata)
        _check_columns(adata, setup_method_args[_compat.SETUP_ARGS_KEY], **kwargs)
        check_counts(adata, layer, _allows_noncounts(allow_noncounts, **kwargs))
        fields = [
            LayerField(REGISTRY_KEYS.X, layer, is_count_data=False),
            CategoryObsField(REGISTRY_KEYS.BATCH, batch_key),
            GroupObsField(REGISTRY_KEYS.LABELS, labels_key),
            GroupObsField(REGISTRY_KEYS.CONTEXT, context_key),
        ]
        manager = AnnDataManager(fields=fields, setup_method_args=setup_method_args)
        manager.register_fields(adata, **kwargs)
        if isinstance(adata, CellStore):
            adata.forget_lookups()
        cls.register_manager(manager)

    @classmethod
    def setup_mudata(
        cls,
        mdata: Any,
        rna_layer: str | None = None,
        batch_key: str | None = None,
        labels_key: str | None = None,
        context_key: str | None = None,
        modalities: dict[str, str] | None = None,
        allow_noncounts: bool = False,
        **kwargs: Any,
    ) -> None:
        """Register the RNA modality of a MuData.

        Parameters
        ----------
        mdata
            MuData with raw counts in one modality.
        rna_layer
            Layer of that modality with the counts; its ``X`` by default.
        batch_key, labels_key, context_key
            As in :meth:`setup_anndata`; columns of ``mdata.obs`` unless ``modalities`` says otherwise.
        modalities
            Modality of each argument, for example ``{"rna_layer": "rna", "batch_key": "rna"}``; ``rna_layer`` is in
            ``"rna"`` by default.
        allow_noncounts
            As in :meth:`setup_anndata`.
        **kwargs
            Used by :meth:`load` and when data are transferred.

        Raises
        ------
        ValueError
            If a modality does not exist or has other cells than the MuData, and as :meth:`setup_anndata`.
        """
        setup_method_args = cls._get_setup_method_args(**locals())
        _check_options(cls.setup_mudata, kwargs)
        where = cls._create_modalities_attr_dict({"rna_layer": "rna", **(modalities or {})}, setup_method_args)
        rna = _holder(mdata, "rna_layer", where)
        check_names(rna)
        _check_columns(mdata, setup_method_args[_compat.SETUP_ARGS_KEY], **kwargs)
        check_cells(mdata, sorted({name for name in where.values() if name is not None}))
        check_counts(rna, rna_layer, _allows_noncounts(allow_noncounts, **kwargs))
        fields = [
            MuDataLayerField(REGISTRY_KEYS.X, rna_layer, is_count_data=False, mod_key=where.rna_layer),
            MuDataCategoryObsField(REGISTRY_KEYS.BATCH, batch_key, mod_key=where.batch_key),
            MuDataGroupObsField(REGISTRY_KEYS.LABELS, labels_key, mod_key=where.labels_key),
            MuDataGroupObsField(REGISTRY_KEYS.CONTEXT, context_key, mod_key=where.context_key),
        ]
        manager = AnnDataManager(fields=fields, setup_method_args=setup_method_args)
        manager.register_fields(mdata, **kwargs)
        cls.register_manager(manager)

    def _check_new_data(self, adata: AnnOrMuData) -> None:
        arguments = self.registry_[_compat.SETUP_ARGS_KEY]
        _check_columns(adata, arguments, source_registry=self.registry_, **self._transfer_options())
        if isinstance(adata, MuData):
            modalities = arguments.get("modalities") or {}
            check_cells(adata, sorted({modalities.get("rna_layer", "rna"), *modalities.values()}))
        layer = arguments.get("layer", arguments.get("rna_layer"))
        check_counts(self._gene_data(adata), layer, _allows_noncounts(False, self.registry_))
        self._warn_small_data(adata)

    def _attach(self, adata: AnnOrMuData) -> None:
        super()._attach(adata)  # type: ignore[misc]
        self._warn_small_data(adata)

    def _warn_small_data(self, adata: AnnOrMuData) -> None:
        warn_small_data(adata.n_obs, getattr(self.module, "n_cells", 1))


def _allows_noncounts(wanted: bool, source_registry: Mapping[str, Any] | None = None, **_: Any) -> bool:
    """Whether non-integer values are accepted; models saved before there was a choice accepted them."""
    if source_registry is None:
        return wanted
    return wanted or source_registry[_compat.SETUP_ARGS_KEY].get("allow_noncounts", True)


def _check_options(setup: Callable[..., None], options: Mapping[str, Any]) -> None:
    """Refuse misspelt arguments of a setup method, which takes options of scvi-tools beyond its own arguments."""
    unknown = sorted(set(options) - _TRANSFER_OPTIONS)
    if unknown:
        known = [name for name in inspect.signature(setup).parameters if name != "kwargs"]
        close = get_close_matches(unknown[0], known, n=1)
        advice = f"use `{close[0]}`." if close else f"it has {known[1:]}."
        raise TypeError(f"`{setup.__name__}` has no argument `{unknown[0]}`; {advice}")


def _holder(data: Any, argument: str, modalities: Mapping[str, str | None]) -> Any:
    """The object that holds what ``argument`` names: ``data`` itself or a modality of it."""
    name = modalities.get(argument)
    if name is None:
        return data
    if name not in data.mod:
        raise ValueError(
            f"Modality {name!r} of `{argument}` not found, `mdata.mod` has {sorted(data.mod)}; name it with "
            f"`modalities={{{argument!r}: ...}}`."
        )
    return data.mod[name]


def _check_columns(
    data: Any,
    arguments: Mapping[str, Any],
    source_registry: dict[str, Any] | None = None,
    extend_categories: bool = False,
    **_: Any,
) -> None:
    """Check the columns that setup arguments name; with a ``source_registry``, as columns of new data."""
    for argument in _COLUMNS:
        key = arguments[argument]
        holder = _holder(data, argument, arguments.get("modalities") or {})
        is_read = argument == "batch_key" and not extend_categories
        # new data may lack a column that only groups cells, or whose values the model never reads
        if key is None or (source_registry is not None and not is_read and key not in holder.obs):
            continue
        check_groups(holder.obs, key, argument)
        if source_registry is not None and is_read:
            batch = source_registry[_compat.FIELD_REGISTRIES_KEY][REGISTRY_KEYS.BATCH]
            check_known(holder.obs, key, argument, batch[_compat.STATE_REGISTRY_KEY]["categorical_mapping"])
