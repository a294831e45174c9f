"""Setup of models that read scaled marker intensities: an AnnData, or the protein modality of a MuData."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from mudata import MuData
from numpy.typing import NDArray
from scvi.data import AnnDataManager
from scvi.data.fields import (
    LayerField,
    MuDataLayerField,
    MuDataNumericalJointObsField,
    NumericalJointObsField,
)

from cellweave import _compat
from cellweave._keys import REGISTRY_KEYS
from cellweave._types import AnnOrMuData
from cellweave.data import (
    CategoriesObsField,
    CategoryObsField,
    CellStore,
    GroupObsField,
    MuDataCategoriesObsField,
    MuDataCategoryObsField,
    MuDataGroupObsField,
    align_genes,
    check_cells,
    check_groups,
    check_intensities,
    check_known,
    check_measured,
    check_names,
    find_markers,
    get_counts,
    match_genes,
    take_columns,
)
from cellweave.io import MarkerTable

from ._setup import _check_options, _holder

__all__ = ["MarkerSetupMixin"]


class MarkerSetupMixin:
    """``setup_anndata`` and ``setup_mudata`` for intensities of markers and covariates."""

    table: MarkerTable

    @property
    def markers(self) -> NDArray[np.str_]:
        """Names of the markers of the table, in its order ``(marker,)``."""
        return np.asarray(self.table.markers)

    @classmethod
    def setup_anndata(
        cls,
        adata: Any,
        layer: str | None = None,
        batch_key: str | None = None,
        labels_key: str | None = None,
        categorical_covariate_keys: Sequence[str] | None = None,
        continuous_covariate_keys: Sequence[str] | None = None,
        nan_layer: str | None = None,
        unlabeled_category: str = "unknown",
        **kwargs: Any,
    ) -> None:
        """Register marker intensities and covariates. Everything is checked before anything is written.

        Parameters
        ----------
        adata
            AnnData with transformed and scaled intensities, in which negative cells lie near -1 and positive ones near 1;
            sparse or dense, in memory, backed or on disk. Columns ``_scvi_*`` in ``obs`` and ``obsm``, and identifiers in
            ``uns``, are added to it. Values are checked when the model is made, which knows the markers.
        layer
            Layer with the intensities; ``adata.X`` by default.
        batch_key
            ``obs`` column of the batch (sample, run), whose effect the model takes out.
        labels_key
            ``obs`` column of known populations of some cells, or of groups of populations, to learn from. Leave it out to
            annotate by the table alone.
        categorical_covariate_keys, continuous_covariate_keys
            ``obs`` columns of further covariates; continuous ones are standardised by the model.
        nan_layer
            Layer that is 1 where a marker was measured and 0 where not (another panel in some batch); what ``layer`` holds
            there is ignored, NaN included.
        unlabeled_category
            Value of ``labels_key`` of cells without a label.
        **kwargs
            Used by :meth:`load` and when data are transferred.

        Raises
        ------
        KeyError
            If a layer or column does not exist.
        ValueError
            If ``adata`` is a view or empty, variable names repeat, columns have missing values, continuous covariates are
            not finite numbers, or ``nan_layer`` holds other values than 0 and 1.
        """
        setup_method_args = cls._get_setup_method_args(**locals())
        _check_options(cls.setup_anndata, kwargs)
        arguments = setup_method_args[_compat.SETUP_ARGS_KEY]
        check_names(adata)
        get_counts(adata, layer)
        check_measured(adata, nan_layer)
        _check_columns(adata, arguments, **kwargs)
        fields = _fields(arguments)
        manager = AnnDataManager(fields=fields, setup_method_args=setup_method_args)
        manager.register_fields(adata, **kwargs)
        if isinstance(adata, CellStore):
            adata.forget_lookups()
        cls.register_manager(manager)

    @classmethod
    def setup_mudata(
        cls,
        mdata: Any,
        protein_layer: str | None = None,
        batch_key: str | None = None,
        labels_key: str | None = None,
        categorical_covariate_keys: Sequence[str] | None = None,
        continuous_covariate_keys: Sequence[str] | None = None,
        nan_layer: str | None = None,
        unlabeled_category: str = "unknown",
        modalities: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Register the protein modality of a MuData.

        Parameters
        ----------
        mdata
            MuData with scaled intensities in one modality.
        protein_layer
            Layer of that modality with the intensities; its ``X`` by default.
        batch_key, labels_key, categorical_covariate_keys, continuous_covariate_keys
            As in :meth:`setup_anndata`; columns of ``mdata.obs`` unless ``modalities`` says otherwise.
        nan_layer, unlabeled_category
            As in :meth:`setup_anndata`; the layer is one of the protein modality.
        modalities
            Modality of each argument, for example ``{"protein_layer": "adt", "batch_key": "rna"}``; ``protein_layer`` is
            in ``"prot"`` by default.
        **kwargs
            Used by :meth:`load` and when data are transferred.

        Raises
        ------
        ValueError
            If a modality does not exist or has other cells than the MuData, and as :meth:`setup_anndata`.
        """
        modalities = {"protein_layer": "prot", **(modalities or {})}
        setup_method_args = cls._get_setup_method_args(**locals())
        _check_options(cls.setup_mudata, kwargs)
        arguments = setup_method_args[_compat.SETUP_ARGS_KEY]
        proteins = _holder(mdata, "protein_layer", modalities)
        check_names(proteins)
        get_counts(proteins, protein_layer)
        check_measured(proteins, nan_layer)
        _check_columns(mdata, arguments, **kwargs)
        check_cells(mdata, sorted(set(modalities.values())))
        manager = AnnDataManager(fields=_fields(arguments), setup_method_args=setup_method_args)
        manager.register_fields(mdata, **kwargs)
        cls.register_manager(manager)

    # ---------------------------------------------------------------- data that the model meets

    @property
    def _setup(self) -> dict[str, Any]:
        """Arguments of the setup, those of a MuData under the names of an AnnData."""
        arguments = dict(self.registry_[_compat.SETUP_ARGS_KEY])
        return {"layer": arguments.get("protein_layer"), **arguments}

    def _check_new_data(self, adata: AnnOrMuData) -> None:
        setup = self._setup
        if isinstance(adata, MuData):
            check_cells(adata, sorted(set(setup["modalities"].values())))
        holder = self._gene_data(adata)
        check_measured(holder, setup["nan_layer"])
        _check_columns(adata, setup, source_registry=self.registry_)
        check_intensities(holder, self.markers.tolist(), setup["layer"], setup["nan_layer"], warn=False)

    def _attach(self, adata: AnnOrMuData) -> None:
        data = self._aligned(adata)
        self._check_new_data(data)
        super()._attach(data)  # type: ignore[misc]

    def _aligned(self, adata: AnnOrMuData) -> AnnOrMuData:
        """``adata`` itself, or a copy with the variables of the registered data; all markers must be there."""
        holder = self._gene_data(adata)
        check_names(holder)
        if self._has_model_genes(adata):
            return adata
        find_markers(holder.var_names, self.markers.tolist())
        if isinstance(adata, MuData):
            raise ValueError(
                "The variables of `adata` (protein modality) differ from those of the model; align the modality with "
                "`cellweave.pp.align_genes(mdata[...], model.genes)` first."
            )
        setup = self._setup
        with warnings.catch_warnings():
            # only markers are read, and they are all there: which other variables are missing does not matter
            warnings.simplefilter("ignore", UserWarning)
            aligned = align_genes(adata, self.genes.tolist(), layer=setup["layer"], min_overlap=0)
        if setup["nan_layer"] is not None:
            check_measured(adata, setup["nan_layer"])
            position = match_genes(adata.var_names, pd.Index(self.genes))
            aligned.layers[setup["nan_layer"]] = take_columns(adata.layers[setup["nan_layer"]], position)
        return aligned

    def _loader_options(self, adata: AnnOrMuData) -> dict[str, Any]:
        return {"columns": find_markers(self._gene_data(adata).var_names, self.markers.tolist())}

    def _categories(self, key: str) -> list[str]:
        """Known values of the batch (``REGISTRY_KEYS.BATCH``) or label column."""
        state = self.registry_[_compat.FIELD_REGISTRIES_KEY][key][_compat.STATE_REGISTRY_KEY]
        return np.asarray(state["categorical_mapping"]).tolist()

    def _covariate_categories(self) -> dict[str, list[Any]]:
        """Known values of every categorical covariate column, the batch first."""
        setup, known = self._setup, {}
        if setup["batch_key"] is not None:
            known[setup["batch_key"]] = self._categories(REGISTRY_KEYS.BATCH)
        if setup["categorical_covariate_keys"]:
            fields = self.registry_[_compat.FIELD_REGISTRIES_KEY]
            mappings = fields[REGISTRY_KEYS.CATEGORIES][_compat.STATE_REGISTRY_KEY]["mappings"]
            known |= {key: np.asarray(mappings[key]).tolist() for key in setup["categorical_covariate_keys"]}
        return known


def _fields(arguments: Mapping[str, Any]) -> list[Any]:
    """Fields of the setup; without a key a model has no batch, labels or covariates at all."""
    modalities = arguments.get("modalities")
    if modalities is None:
        layer, category, group = LayerField, CategoryObsField, GroupObsField
        joint, numbers = CategoriesObsField, NumericalJointObsField
    else:
        layer, category, group = MuDataLayerField, MuDataCategoryObsField, MuDataGroupObsField
        joint, numbers = MuDataCategoriesObsField, MuDataNumericalJointObsField

    def where(argument: str) -> dict[str, Any]:
        return {} if modalities is None else {"mod_key": modalities.get(argument)}

    values = "layer" if modalities is None else "protein_layer"
    fields = [layer(REGISTRY_KEYS.X, arguments[values], is_count_data=False, **where(values))]
    optional = [
        (category, REGISTRY_KEYS.BATCH, "batch_key"),
        (group, REGISTRY_KEYS.LABELS, "labels_key"),
        (joint, REGISTRY_KEYS.CATEGORIES, "categorical_covariate_keys"),
        (numbers, REGISTRY_KEYS.CONTINUOUS, "continuous_covariate_keys"),
    ]
    for field, key, argument in optional:
        if arguments[argument]:
            columns = arguments[argument]
            fields.append(field(key, columns if isinstance(columns, str) else list(columns), **where(argument)))
    if arguments["nan_layer"] is not None:
        fields.append(layer(REGISTRY_KEYS.MEASURED, arguments["nan_layer"], is_count_data=False, **where(values)))
    return fields


def _check_columns(
    data: Any, arguments: Mapping[str, Any], source_registry: Mapping[str, Any] | None = None, **_: Any
) -> None:
    """Check the ``obs`` columns of the setup; with a ``source_registry``, as columns of new data."""
    modalities = arguments.get("modalities") or {}
    registries = None if source_registry is None else source_registry[_compat.FIELD_REGISTRIES_KEY]
    for argument in ("batch_key", "labels_key"):
        key, obs = arguments[argument], _holder(data, argument, modalities).obs
        if key is None or (registries is not None and argument == "labels_key" and key not in obs):
            continue
        check_groups(obs, key, argument)
        if registries is not None and argument == "batch_key":
            state = registries[REGISTRY_KEYS.BATCH][_compat.STATE_REGISTRY_KEY]
            check_known(obs, key, argument, np.asarray(state["categorical_mapping"]))
    seen = {arguments["batch_key"]: "batch_key"}
    for argument in ("categorical_covariate_keys", "continuous_covariate_keys"):
        keys, obs = arguments[argument] or (), _holder(data, argument, modalities).obs
        if isinstance(keys, str):
            raise TypeError(f"`{argument}` must be a list of column names, got {keys!r}; pass `[{keys!r}]`.")
        for key in keys:
            if key in seen:
                raise ValueError(f"`{argument}` names {key!r}, which `{seen[key]}` has already; name it once.")
            seen[key] = argument
        for key in keys:
            check_groups(obs, key, argument) if argument.startswith("cat") else _check_numbers(obs, key, argument)
            if registries is not None and argument.startswith("cat"):
                state = registries[REGISTRY_KEYS.CATEGORIES][_compat.STATE_REGISTRY_KEY]
                check_known(obs, key, argument, np.asarray(state["mappings"][key]))


def _check_numbers(obs: pd.DataFrame, key: str, argument: str) -> None:
    if key not in obs:
        raise KeyError(f"`{argument}` names {key!r}, which is not in `adata.obs`; it has {obs.columns[:6].tolist()}.")
    column = obs[key]
    if not pd.api.types.is_numeric_dtype(column):
        raise ValueError(
            f"`adata.obs[{key!r}]` (`{argument}`) holds {column.dtype} values and no numbers; name it in "
            "`categorical_covariate_keys` instead."
        )
    wrong = ~np.isfinite(column.to_numpy(dtype=np.float64, na_value=np.nan))
    if wrong.any():
        raise ValueError(
            f"`adata.obs[{key!r}]` (`{argument}`) is NaN or infinite in {int(wrong.sum())} cell(s) (first: "
            f"{obs.index[int(np.argmax(wrong))]!r}); fill these values or remove the cells."
        )
