"""Results in the user's AnnData, each with a record of what produced it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch

from cellweave._keys import OUTPUT_KEYS
from cellweave._types import AnnOrMuData

__all__ = ["ResultsMixin"]


class ResultsMixin:
    """Write results and their provenance."""

    def _record(self, adata: AnnOrMuData, key: str, parameters: Mapping[str, Any]) -> None:
        """Write what produced ``key`` to ``adata.uns["cellweave"][key]``."""
        records = dict(adata.uns.get(OUTPUT_KEYS.PROVENANCE, {}))
        records[key] = {
            "model": type(self).__name__,
            "version": version("cellweave"),
            "weights_sha256": self._weights_hash(),
            "parameters": {name: value for name, value in parameters.items() if value is not None},
        }
        adata.uns[OUTPUT_KEYS.PROVENANCE] = records

    def _weights_hash(self) -> str:
        digest = hashlib.sha256()
        for name, tensor in sorted(self.module.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()
