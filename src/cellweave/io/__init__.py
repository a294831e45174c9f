"""Safe model files: safetensors, JSON and a checksum manifest; nothing is executed on load."""

from ._hub import write_hub_card
from ._inspect import ModelInfo, inspect_model
from ._model_files import ModelFileError, SavedModel, read_model, write_model

__all__ = [
    "ModelFileError",
    "ModelInfo",
    "SavedModel",
    "inspect_model",
    "read_model",
    "write_hub_card",
    "write_model",
]
