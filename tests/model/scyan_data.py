"""Small simulated cytometry panels with known populations."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

_MARKERS = ("CD3", "CD4", "CD8", "CD19", "CD14", "CD56", "CD45RA", "CD127", "CCR7")
# Share of the cells, markers the population has, CCR7.
_POPULATIONS: dict[str, tuple[float, tuple[str, ...], float]] = {
    "CD4 naive": (0.45, ("CD3", "CD4", "CD45RA"), 0.5),
    "CD4 effector": (0.01, ("CD3", "CD4", "CD45RA"), -1.0),
    "CD8 naive": (0.20, ("CD3", "CD8", "CD45RA"), 0.2),
    "B": (0.20, ("CD19", "CD45RA"), 0.2),
    "Monocyte": (0.09, ("CD14",), -1.0),
    "NK": (0.05, ("CD56", "CD45RA"), -1.0),
}
_NOISE = 0.3


def flipped_marker_data(seed: int, n_cells: int = 6000) -> tuple[pd.DataFrame, pd.DataFrame, NDArray[np.str_]]:
    """A panel that tempts a flow to turn a marker round: measured markers, table, true populations.

    "CD4 naive" is the largest population, and CCR7 alone separates it from its rare sibling "CD4 effector". It has more
    CCR7 than all others, but the table also expects CD127, which the panel failed to stain. The row of the sibling, which
    leaves CD127 open, therefore costs less, and a flow gets there by lowering CCR7 of CD4 naive below that of the CD8
    naive and B cells, which have less of it. Markers are already scaled, -1 negative and 1 positive.
    """
    rng = np.random.default_rng(seed)
    names = np.array(list(_POPULATIONS))
    labels = rng.choice(names, n_cells, p=[share for share, _, _ in _POPULATIONS.values()])
    positive = [[marker in present for marker in _MARKERS] for _, present, _ in _POPULATIONS.values()]
    table = pd.DataFrame(np.where(positive, 1.0, -1.0), names, list(_MARKERS))
    expected = table.copy()
    expected["CCR7"], expected["CD127"] = [ccr7 for _, _, ccr7 in _POPULATIONS.values()], -1.5
    table["CCR7"] = np.where(expected["CCR7"] > 0, 1.0, -1.0)
    table["CD127"] = np.where(names == "CD4 naive", 1.0, np.nan)
    x = expected.loc[labels].to_numpy() + rng.normal(0, _NOISE, (n_cells, len(_MARKERS)))
    return pd.DataFrame(x.astype(np.float32), columns=list(_MARKERS)), table, labels
