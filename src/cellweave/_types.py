"""Aliases and the axis vocabulary.

Axis words used in shape comments and docstrings: ``cell`` (flat rows of a loader batch), ``context`` (sets of cells),
``gene``, ``token`` (gene tokens of a cell), ``head``, ``batch`` (always the technical batch, never a minibatch).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np
from anndata import AnnData
from mudata import MuData
from numpy.typing import NDArray

__all__ = ["AnnOrMuData", "ContextRule", "Indices"]

AnnOrMuData: TypeAlias = AnnData | MuData
Indices: TypeAlias = Sequence[int] | NDArray[np.integer] | NDArray[np.bool_]
ContextRule: TypeAlias = Literal["random", "sequential"]
