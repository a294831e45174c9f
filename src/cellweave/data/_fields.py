"""AnnData fields of scvi-tools, with the behaviour that sets of cells need."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from anndata import AnnData
from scvi.data.fields import CategoricalJointObsField, CategoricalObsField

from cellweave._compat import MuDataWrapper

__all__ = [
    "CategoriesObsField",
    "CategoryObsField",
    "GroupObsField",
    "MuDataCategoriesObsField",
    "MuDataCategoryObsField",
    "MuDataGroupObsField",
]


class CategoryObsField(CategoricalObsField):
    """A categorical column, without the categories that no cell has."""

    def register_field(self, adata: AnnData) -> dict[str, Any]:
        """Register the column; unused categories stay in ``obs`` but get no code."""
        state = super().register_field(adata)
        used, codes = np.unique(adata.obs[self.attr_key], return_inverse=True)
        adata.obs[self.attr_key] = codes.astype(np.min_scalar_type(len(used)))
        return {**state, self.CATEGORICAL_MAPPING_KEY: state[self.CATEGORICAL_MAPPING_KEY][used]}

    def transfer_field(
        self, state_registry: dict[str, Any], adata_target: AnnData, extend_categories: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """Register the column of new data; where it may bring new categories, it may also be missing."""
        if extend_categories and not self.is_default and self._original_attr_key not in adata_target.obs:
            adata_target.obs[self.attr_key] = np.zeros(adata_target.n_obs, dtype=np.int64)
            return dict(state_registry)
        return super().transfer_field(state_registry, adata_target, extend_categories=extend_categories, **kwargs)


class CategoriesObsField(CategoricalJointObsField):
    """Several categorical columns, without the categories that no cell has."""

    def register_field(self, adata: AnnData) -> dict[str, Any]:
        """Register the columns; unused categories stay in ``obs`` but get no code."""
        state = super().register_field(adata)
        codes, mappings = getattr(adata, self.attr_name)[self.attr_key], {}
        for key, names in state[self.MAPPINGS_KEY].items():
            used, within = np.unique(codes[key], return_inverse=True)
            codes[key] = within.astype(np.min_scalar_type(len(used)))
            mappings[key] = names[used]
        sizes = [len(names) for names in mappings.values()]
        return {**state, self.MAPPINGS_KEY: mappings, self.N_CATS_PER_KEY: sizes}


class GroupObsField(CategoryObsField):
    """A categorical column that only groups cells (context, label), so that new data may bring new groups.

    Where new data lack the column, all their cells form one group.
    """

    def register_field(self, adata: AnnData) -> dict[str, Any]:
        """Register the column; groups of one or two cells are normal here and cause no warning."""
        with _quiet_small_groups():
            return super().register_field(adata)

    def transfer_field(
        self, state_registry: dict[str, Any], adata_target: AnnData, extend_categories: bool = True, **kwargs: Any
    ) -> dict[str, Any]:
        """Register the column of new data, extending the known groups."""
        with _quiet_small_groups():
            return super().transfer_field(state_registry, adata_target, extend_categories=True, **kwargs)


class _quiet_small_groups(warnings.catch_warnings):
    def __enter__(self) -> None:
        super().__enter__()
        warnings.filterwarnings("ignore", message=".*fewer than 3 cells.*")


MuDataCategoriesObsField = MuDataWrapper(CategoriesObsField)
MuDataCategoryObsField = MuDataWrapper(CategoryObsField)
MuDataGroupObsField = MuDataWrapper(GroupObsField)
