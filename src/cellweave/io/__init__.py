"""Files: safe model directories that execute nothing on load, stores of cells that stay on disk, tables of cytometry."""

from cellweave.data import CellStore, open_store

from ._cytometry_csv import read_cytometry_csv, write_cytometry_csv
from ._fcs import read_fcs, write_fcs
from ._hub import write_hub_card
from ._inspect import ModelInfo, inspect_model
from ._layer_writer import LayerWriter
from ._marker_table import MarkerTable
from ._model_files import ModelFileError, SavedModel, read_model, write_model
from ._scdfm import ScDFMCheckpoint, read_scdfm
from ._scyan import ScyanWeights, read_scyan_weights

__all__ = [
    "CellStore",
    "LayerWriter",
    "MarkerTable",
    "ModelFileError",
    "ModelInfo",
    "SavedModel",
    "ScDFMCheckpoint",
    "ScyanWeights",
    "inspect_model",
    "open_store",
    "read_cytometry_csv",
    "read_fcs",
    "read_model",
    "read_scdfm",
    "read_scyan_weights",
    "write_cytometry_csv",
    "write_fcs",
    "write_hub_card",
    "write_model",
]
