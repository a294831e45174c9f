"""Setup of models that read raw counts: an AnnData, or the RNA modality of a MuData."""

from __future__ import annotations

from typing import Any

from scvi.data import AnnDataManager
from scvi.data.fields import CategoricalObsField, LayerField, MuDataCategoricalObsField, MuDataLayerField

from cellweave import _compat
from cellweave._keys import REGISTRY_KEYS
from cellweave._types import AnnOrMuData
from cellweave.data import (
    GroupObsField,
    MuDataGroupObsField,
    check_counts,
    check_groups,
    check_names,
)

__all__ = ["CountsSetupMixin"]


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
        **kwargs
            Used by :meth:`load` and when data are transferred.

        Raises
        ------
        KeyError
            If a layer or column does not exist.
        ValueError
            If counts are NaN, infinite, negative or all zero, gene names repeat, ``adata`` is a view or empty, or a
            column has missing values.
        """
        setup_method_args = cls._get_setup_method_args(**locals())
        keys = {"batch_key": batch_key, "labels_key": labels_key, "context_key": context_key}
        _check(adata, adata, layer, keys, is_transfer="source_registry" in kwargs)
        fields = [
            LayerField(REGISTRY_KEYS.X, layer, is_count_data=False),
            CategoricalObsField(REGISTRY_KEYS.BATCH, batch_key),
            GroupObsField(REGISTRY_KEYS.LABELS, labels_key),
            GroupObsField(REGISTRY_KEYS.CONTEXT, context_key),
        ]
        manager = AnnDataManager(fields=fields, setup_method_args=setup_method_args)
        manager.register_fields(adata, **kwargs)
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
        **kwargs
            Used by :meth:`load` and when data are transferred.

        Raises
        ------
        ValueError
            If a modality does not exist, and as :meth:`setup_anndata`.
        """
        setup_method_args = cls._get_setup_method_args(**locals())
        where = cls._create_modalities_attr_dict({"rna_layer": "rna", **(modalities or {})}, setup_method_args)
        if where.rna_layer not in mdata.mod:
            raise ValueError(
                f"Modality {where.rna_layer!r} not found, `mdata.mod` has {sorted(mdata.mod)}; name the RNA modality "
                "with `modalities={'rna_layer': ...}`."
            )
        keys = {"batch_key": batch_key, "labels_key": labels_key, "context_key": context_key}
        for argument, key in keys.items():
            holder = mdata if where[argument] is None else mdata.mod[where[argument]]
            _check_key(holder, key, argument, is_transfer="source_registry" in kwargs)
        _check(mdata.mod[where.rna_layer], mdata, rna_layer, {}, is_transfer=False)
        fields = [
            MuDataLayerField(REGISTRY_KEYS.X, rna_layer, is_count_data=False, mod_key=where.rna_layer),
            MuDataCategoricalObsField(REGISTRY_KEYS.BATCH, batch_key, mod_key=where.batch_key),
            MuDataGroupObsField(REGISTRY_KEYS.LABELS, labels_key, mod_key=where.labels_key),
            MuDataGroupObsField(REGISTRY_KEYS.CONTEXT, context_key, mod_key=where.context_key),
        ]
        manager = AnnDataManager(fields=fields, setup_method_args=setup_method_args)
        manager.register_fields(mdata, **kwargs)
        cls.register_manager(manager)

    def _check_new_data(self, adata: AnnOrMuData) -> None:
        arguments = self.registry_[_compat.SETUP_ARGS_KEY]
        layer = arguments.get("layer", arguments.get("rna_layer"))
        check_counts(self._gene_data(adata), layer)


def _check(genes: Any, groups: Any, layer: str | None, keys: dict[str, str | None], is_transfer: bool) -> None:
    """Check names, groups and counts of data to register."""
    check_names(genes)
    for argument, key in keys.items():
        _check_key(groups, key, argument, is_transfer)
    check_counts(genes, layer)


def _check_key(groups: Any, key: str | None, argument: str, is_transfer: bool) -> None:
    # new data may lack a column that only groups cells, see GroupObsField
    if not (is_transfer and argument != "batch_key" and key not in groups.obs):
        check_groups(groups.obs, key, argument)
