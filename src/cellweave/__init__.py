"""cellweave: in-context tabular attention and other set-of-cells models for single-cell data, one scvi-tools habit."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scvi import settings

    from . import data, datasets, io, model, module, nn, objective, pl, pp, tl, train

__all__ = [
    "__version__",
    "data",
    "datasets",
    "io",
    "model",
    "module",
    "nn",
    "objective",
    "pl",
    "pp",
    "settings",
    "tl",
    "train",
]

__version__ = version("cellweave")


def __getattr__(name: str) -> Any:
    # rooms are imported when first used: `import cellweave` itself loads neither torch nor scvi-tools
    if name == "settings":
        return import_module("scvi").settings
    if name in __all__:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
