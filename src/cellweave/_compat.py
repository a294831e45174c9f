"""The only file that touches private or version-dependent names of scvi-tools."""

from __future__ import annotations

# scvi-tools 1.4.2 prints registries through `rich.pretty` without importing it
import rich.pretty  # noqa: F401
from scvi.data._constants import (
    _FIELD_REGISTRIES_KEY as FIELD_REGISTRIES_KEY,
)
from scvi.data._constants import (
    _SCVI_UUID_KEY as SCVI_UUID_KEY,
)
from scvi.data._constants import (
    _SETUP_ARGS_KEY as SETUP_ARGS_KEY,
)
from scvi.data._constants import (
    _SETUP_METHOD_NAME as SETUP_METHOD_NAME,
)
from scvi.data._constants import (
    _STATE_REGISTRY_KEY as STATE_REGISTRY_KEY,
)
from scvi.data.fields._mudata import MuDataWrapper
from scvi.model._utils import use_distributed_sampler
from scvi.train._logger import SimpleLogger

__all__ = [
    "FIELD_REGISTRIES_KEY",
    "SCVI_UUID_KEY",
    "SETUP_ARGS_KEY",
    "SETUP_METHOD_NAME",
    "STATE_REGISTRY_KEY",
    "MuDataWrapper",
    "SimpleLogger",
    "use_distributed_sampler",
]
