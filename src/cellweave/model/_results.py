"""Results in the user's AnnData, each with a record of what produced it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any, Literal

import torch

from cellweave._keys import OUTPUT_KEYS
from cellweave._types import AnnOrMuData

__all__ = ["ResultPlace", "ResultsMixin"]

# Parts of an AnnData or MuData that results go to.
Part = Literal["obs", "obsm", "varm", "layers", "uns"]


class ResultPlace:
    """Where a getter will write. Made before anything is computed, so that a taken key costs no minutes of work.

    A key that is already there is replaced if the same model class wrote it, which its record says, or with
    ``overwrite``; anything else belongs to the user.

    Parameters
    ----------
    model
        The model that computes the result.
    adata
        Object that was passed to the getter; it holds the record in ``uns["cellweave"]``.
    part
        Part of the object: ``"obs"``, ``"obsm"``, ``"varm"``, ``"layers"`` or ``"uns"``.
    keys
        Keys that will be written there.
    overwrite
        Replace whatever is there.
    holder
        Object whose part is written where it is not ``adata`` itself, for example a modality of a MuData.

    Raises
    ------
    ValueError
        If a key is no text, or holds something that this model class did not write.
    """

    def __init__(
        self,
        model: ResultsMixin,
        adata: AnnOrMuData,
        part: Part,
        *keys: str,
        overwrite: bool = False,
        holder: AnnOrMuData | None = None,
    ) -> None:
        self.model, self.adata, self.part, self.keys = model, adata, part, keys
        self.holder = adata if holder is None else holder
        for key in keys:
            if not isinstance(key, str) or not key:
                raise ValueError(f"`key_added` must be a name, got {key!r}; pass a text that is not empty.")
            if not overwrite and key in getattr(self.holder, part) and not self._is_ours(key):
                raise ValueError(
                    f"`adata.{part}[{key!r}]` already exists and was not written by {type(model).__name__}; choose another "
                    "`key_added` or pass `overwrite=True`."
                )

    def write(self, values: Mapping[str, Any], parameters: Mapping[str, Any]) -> None:
        """Write values and the record of what produced them, together.

        Parameters
        ----------
        values
            One result for every key.
        parameters
            Arguments that changed the result; those that are None are left out.

        Raises
        ------
        ValueError
            If a key was not announced.
        """
        unknown = set(values) - set(self.keys)
        if unknown:
            raise ValueError(f"Results {sorted(unknown)} were not announced, only {list(self.keys)}.")
        record = self.model._provenance(parameters)
        records = dict(self.adata.uns.get(OUTPUT_KEYS.PROVENANCE, {}))
        for key, value in values.items():
            getattr(self.holder, self.part)[key] = value
            records[key] = {**record, "part": self.part}
        self.adata.uns[OUTPUT_KEYS.PROVENANCE] = records

    def _is_ours(self, key: str) -> bool:
        record = self.adata.uns.get(OUTPUT_KEYS.PROVENANCE, {}).get(key, {})
        # records of the first versions do not say which part they describe
        return record.get("model") == type(self.model).__name__ and record.get("part", self.part) == self.part


class ResultsMixin:
    """Write results and their provenance."""

    def _result_place(
        self,
        adata: AnnOrMuData | None,
        part: Part,
        key_added: str | None,
        *more_keys: str,
        overwrite: bool = False,
    ) -> ResultPlace | None:
        """Where a getter will write, checked; None where it was not asked to write.

        ``layers`` and ``varm`` are those of the object that holds the genes.
        """
        target = self.adata if adata is None else adata
        if key_added is None or target is None:  # a getter without data is refused with a sentence of its own
            return None
        holder = self._gene_data(target) if part in ("layers", "varm") else target
        return ResultPlace(self, target, part, key_added, *more_keys, overwrite=overwrite, holder=holder)

    def _provenance(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """What produced a result, in a form that h5ad and zarr can hold."""
        return {
            "model": type(self).__name__,
            "version": version("cellweave"),
            "weights_sha256": self._weights_hash(),
            "parameters": {name: value for name, value in parameters.items() if value is not None},
        }

    def _weights_hash(self) -> str:
        digest = hashlib.sha256()
        for name, tensor in sorted(self.module.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()
