"""Safe model files: safetensors, JSON and a checksum manifest; nothing is executed on load."""

from ._model_files import ModelFileError, SavedModel, read_model, write_model

__all__ = ["ModelFileError", "SavedModel", "read_model", "write_model"]
