"""AnnData fields of scvi-tools, with the behaviour that sets of cells need."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from anndata import AnnData
from scvi.data.fields import CategoricalObsField

from cellweave._compat import MuDataWrapper

__all__ = ["GroupObsField", "MuDataGroupObsField"]


class GroupObsField(CategoricalObsField):
    """A categorical column that only groups cells (context, label), so that new data may bring new groups.

    Where new data lack the column, all their cells form one group.
    """

    def register_field(self, adata: AnnData) -> dict[str, Any]:
        """Register the column; groups of one or two cells are normal here and cause no warning."""
        with _quiet_small_groups():
            return super().register_field(adata)

    def transfer_field(self, state_registry: dict[str, Any], adata_target: AnnData, **kwargs: Any) -> dict[str, Any]:
        """Register the column of new data, extending the known groups."""
        if not self.is_default and self._original_attr_key not in adata_target.obs:
            adata_target.obs[self.attr_key] = np.zeros(adata_target.n_obs, dtype=np.int64)
            return dict(state_registry)
        kwargs["extend_categories"] = True
        with _quiet_small_groups():
            return super().transfer_field(state_registry, adata_target, **kwargs)


class _quiet_small_groups(warnings.catch_warnings):
    def __enter__(self) -> None:
        super().__enter__()
        warnings.filterwarnings("ignore", message=".*fewer than 3 cells.*")


MuDataGroupObsField = MuDataWrapper(GroupObsField)
