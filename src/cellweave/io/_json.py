"""JSON for scvi-tools registries and training histories, which hold numpy arrays and pandas frames."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

__all__ = ["dumps", "loads"]

_ARRAY, _FRAME, _PAIRS = "__array__", "__frame__", "__pairs__"


def dumps(value: Any) -> bytes:
    """Encode plain values, numpy arrays and one-dimensional frames; the same value gives the same bytes."""
    return json.dumps(_encode(value), indent=1, ensure_ascii=False).encode()


def loads(data: bytes) -> Any:
    """Decode what :func:`dumps` wrote."""
    return _decode(json.loads(data.decode()))


def _encode(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return {_ARRAY: [_encode(v) for v in value.tolist()], "dtype": value.dtype.str}
    if isinstance(value, pd.DataFrame):
        return {
            _FRAME: {str(c): value[c].tolist() for c in value},
            "index": value.index.tolist(),
            "name": value.index.name,
        }
    if isinstance(value, Mapping):
        if all(isinstance(key, str) and key not in (_ARRAY, _FRAME, _PAIRS) for key in value):
            return {key: _encode(v) for key, v in value.items()}
        return {_PAIRS: [[_encode(key), _encode(v)] for key, v in value.items()]}
    if isinstance(value, list | tuple):
        return [_encode(v) for v in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise TypeError(f"cannot save a value of type {type(value).__name__} ({value!r}) in a model file")


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(v) for v in value]
    if not isinstance(value, dict):
        return value
    if _ARRAY in value:
        return np.array(value[_ARRAY], dtype=np.dtype(value["dtype"]))
    if _FRAME in value:
        return pd.DataFrame(value[_FRAME], index=pd.Index(value["index"], name=value["name"]))
    if _PAIRS in value:
        return {_decode(key): _decode(v) for key, v in value[_PAIRS]}
    return {key: _decode(v) for key, v in value.items()}
