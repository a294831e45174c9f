"""What every gradient-trained model shares: training, data checks, results with provenance, safe files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from mudata import MuData
from numpy.typing import NDArray
from scvi.data import AnnDataManager
from scvi.model.base import BaseModelClass

from cellweave import _compat
from cellweave._keys import REGISTRY_KEYS
from cellweave._types import AnnOrMuData
from cellweave.data import align_genes, check_names

from ._contexts import ContextInferenceMixin
from ._persistence import PersistenceMixin
from ._results import ResultsMixin
from ._training import TrainingMixin

__all__ = ["CellweaveModel"]


class CellweaveModel(PersistenceMixin, ContextInferenceMixin, ResultsMixin, TrainingMixin, BaseModelClass):
    """Base of the models: scvi-tools habits, with data aligned by gene name and files that execute nothing."""

    def __repr__(self) -> str:
        n_parameters = sum(p.numel() for p in self.module.parameters())
        arguments = ", ".join(f"{key}={value!r}" for key, value in self._constructor_arguments().items())
        data = "no data attached" if self.adata is None else f"{self.adata.n_obs} cells"
        state = "trained" if self.is_trained else "not trained"
        return (
            f"{type(self).__name__}({arguments})\n"
            f"  data: {data}, {len(self.genes)} genes; parameters: {n_parameters:,}; {state}"
        )

    @property
    def genes(self) -> NDArray[np.str_]:
        """Names of the genes of the model, in its order ``(gene,)``."""
        fields = self.registry_[_compat.FIELD_REGISTRIES_KEY]
        return np.asarray(fields[REGISTRY_KEYS.X][_compat.STATE_REGISTRY_KEY]["column_names"]).astype(str)

    # ---------------------------------------------------------------- data of any getter

    @contextmanager
    def _registered(self, adata: AnnOrMuData | None) -> Iterator[AnnOrMuData]:
        """The data of a getter: ``adata`` or the model's own, checked, gene-aligned and registered.

        Views and data with other genes are copied for the time of the call.
        """
        self._check_if_trained(warn=False)
        given = self.adata if adata is None else adata
        if given is None:
            raise ValueError("This model was loaded without data; pass `adata=`.")
        if self._manager_of(given) is not None:
            yield self._validate_anndata(given)
            return
        data = self._aligned(_in_memory(given) if given.is_view else given)
        is_new, before = data is given and self.adata_manager is not None, _scvi_keys(data)
        if self.adata_manager is None:
            self._attach(data)
        else:
            self._check_new_data(data)
            self._transfer(data)
        try:
            yield data
        except BaseException:
            if is_new:  # a call that failed leaves no trace
                self._per_instance_manager_store[self.id].pop(data.uns[_compat.SCVI_UUID_KEY], None)
                for part, keys in _scvi_keys(data).items():
                    for key in keys - before[part]:
                        del getattr(data, part)[key]
            raise
        finally:
            if data is not given and data is not self.adata:
                self._per_instance_manager_store[self.id].pop(data.uns[_compat.SCVI_UUID_KEY], None)

    def _manager_of(self, adata: AnnOrMuData) -> AnnDataManager | None:
        """The manager of exactly this object, or None; unlike the inherited lookup it never transfers a setup."""
        store = self._per_instance_manager_store.get(self.id, {})
        manager = store.get(adata.uns.get(_compat.SCVI_UUID_KEY))
        return manager if manager is not None and manager.adata is adata else None

    def _transfer(self, adata: AnnOrMuData) -> None:
        store = self._per_instance_manager_store[self.id]
        if adata.uns.get(_compat.SCVI_UUID_KEY) in store:
            # a copy of registered data carries its identifier, under which the original is known
            del adata.uns[_compat.SCVI_UUID_KEY]
        for uuid in [uuid for uuid, manager in store.items() if manager.adata is not self.adata]:
            del store[uuid]  # only the latest of other data stays registered: managers keep their data alive
        manager = self.adata_manager.transfer_fields(adata, **self._transfer_options())
        self._register_manager_for_instance(manager)

    def _aligned(self, adata: AnnOrMuData) -> AnnOrMuData:
        """``adata`` itself when its genes are those of the model in the same order, else an aligned copy."""
        genes = self._gene_data(adata)
        check_names(genes)
        if self._has_model_genes(adata):
            return adata
        if isinstance(adata, MuData):
            raise ValueError(
                "The genes of this MuData differ from those of the model; align the modality with "
                "`cellweave.pp.align_genes(mdata[...], model.genes)` first."
            )
        return align_genes(adata, self.genes.tolist(), layer=self.registry_[_compat.SETUP_ARGS_KEY].get("layer"))

    def _has_model_genes(self, adata: AnnOrMuData) -> bool:
        return np.array_equal(self._gene_data(adata).var_names.to_numpy().astype(str), self.genes)

    def _validate_anndata(self, adata: AnnOrMuData | None = None, copy_if_view: bool = True) -> AnnOrMuData:
        """As inherited, but never accepts genes in another order, of which scvi-tools compares only the number."""
        if adata is not None and adata is not self.adata and not self._has_model_genes(adata):
            raise ValueError(
                "The genes of `adata` are not those of the model in the same order; align them with "
                "`cellweave.pp.align_genes(adata, model.genes)`."
            )
        return super()._validate_anndata(adata, copy_if_view=copy_if_view)

    def _check_new_data(self, adata: AnnOrMuData) -> None:
        """Hook: check the contents of data that the model has not seen, before anything is written to them."""
        raise NotImplementedError

    def _gene_data(self, adata: AnnOrMuData) -> AnnData:
        """The AnnData that holds the genes: ``adata`` itself or a modality of it."""
        if not isinstance(adata, MuData):
            return adata
        fields = self.registry_[_compat.FIELD_REGISTRIES_KEY]
        modality = fields[REGISTRY_KEYS.X]["data_registry"].get("mod_key")
        if modality not in adata.mod:
            raise ValueError(
                f"The model reads modality {modality!r}, but `mdata.mod` has {sorted(adata.mod)}; give the modality with "
                "these genes that name."
            )
        return adata.mod[modality]

    def _gene_positions(self, gene_list: Sequence[str] | None, argument: str = "gene_list") -> NDArray[np.int64]:
        """Positions of named genes in the model; all by default."""
        if gene_list is None:
            return np.arange(len(self.genes))
        positions = pd.Index(self.genes).get_indexer(list(gene_list))
        unknown = [gene for gene, at in zip(gene_list, positions, strict=True) if at < 0]
        if unknown:
            raise ValueError(
                f"`{argument}` has {len(unknown)} gene(s) that the model does not know (first: {unknown[0]!r}); "
                "see `model.genes`."
            )
        return positions

    def _constructor_arguments(self) -> dict[str, Any]:
        saved = self.init_params_
        return {**saved["non_kwargs"], **{k: v for group in saved["kwargs"].values() for k, v in group.items()}}


def _scvi_keys(adata: AnnOrMuData) -> dict[str, set[str]]:
    """What registration writes to an AnnData, by part."""
    parts = ("obs", "obsm", "uns") if isinstance(adata, AnnData) else ()
    return {part: {key for key in getattr(adata, part) if str(key).startswith("_scvi")} for part in parts}


def _in_memory(view: AnnOrMuData) -> AnnOrMuData:
    return view.to_memory() if view.isbacked else view.copy()
