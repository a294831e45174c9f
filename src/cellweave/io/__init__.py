"""Files: safe model directories that execute nothing on load, and stores of cells that stay on disk."""

from cellweave.data import CellStore, open_store

from ._hub import write_hub_card
from ._inspect import ModelInfo, inspect_model
from ._layer_writer import LayerWriter
from ._marker_table import MarkerTable
from ._model_files import ModelFileError, SavedModel, read_model, write_model

__all__ = [
    "CellStore",
    "LayerWriter",
    "MarkerTable",
    "ModelFileError",
    "ModelInfo",
    "SavedModel",
    "inspect_model",
    "open_store",
    "read_model",
    "write_hub_card",
    "write_model",
]
