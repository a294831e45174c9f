"""Small synthetic perturbation screens with a known truth."""

from __future__ import annotations

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData

KEY = "perturbation"


def log_normalised(rng: np.random.Generator, mean: np.ndarray) -> np.ndarray:
    """Log-normalised counts of cells with these relative means ``(cell, gene)``."""
    depth = rng.uniform(0.7, 1.4, size=(len(mean), 1)) * 3
    counts = rng.poisson(depth * mean * rng.gamma(4, 1 / 4, size=mean.shape))
    size = np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return np.log1p(1e4 / 20 * counts / size).astype(np.float32)


def cells(x: np.ndarray, labels: list[str] | np.ndarray, prefix: str, **columns: object) -> AnnData:
    """An AnnData of cells with labels, sparse, with named cells and genes."""
    obs = pd.DataFrame({KEY: pd.Categorical(labels), **columns}, index=[f"{prefix}{i:05d}" for i in range(len(x))])
    return AnnData(sp.csr_matrix(x), obs=obs, var=pd.DataFrame(index=[f"g{j}" for j in range(x.shape[1])]))


class Panel:
    """Perturbations with effects on some genes; training and test cells of each, and what predictors could return.

    ``effect=0`` makes a screen in which nothing happens.
    """

    def __init__(
        self,
        n_perturbations: int = 12,
        n_cells: int = 60,
        n_genes: int = 150,
        effect: float = 1.2,
        seed: int = 0,
        n_control: int = 120,
    ):
        self.rng = rng = np.random.default_rng(seed)
        self.n_cells, self.n_genes = n_cells, n_genes
        self.names = [f"p{i:02d}" for i in range(n_perturbations)]
        self.base = rng.gamma(1.0, 1.0, size=n_genes)
        chosen = rng.random((n_perturbations, n_genes)) < 0.15
        self.effect = {
            name: effect * rng.normal(size=n_genes) * on for name, on in zip(self.names, chosen, strict=True)
        }
        x = self.draw(np.zeros(n_genes), n_control)
        self.control = cells(x, ["control"] * len(x), "control")
        self.train = self.measure("train")
        self.true = self.measure("true")

    def draw(self, effect: np.ndarray, n_cells: int | None = None) -> np.ndarray:
        return log_normalised(self.rng, np.tile(self.base * np.exp(effect), (n_cells or self.n_cells, 1)))

    def measure(self, prefix: str) -> AnnData:
        """Perturbed cells."""
        return self.of(prefix, self.effect)

    def of(self, prefix: str, effects: dict[str, np.ndarray]) -> AnnData:
        """Cells of every perturbation with these effects."""
        blocks = [self.draw(effects[name]) for name in self.names]
        return cells(np.concatenate(blocks), np.repeat(self.names, self.n_cells), prefix)

    def seen(self) -> AnnData:
        """Training cells with their control cells."""
        x = sp.vstack([self.control.X, self.train.X]).toarray()
        labels = [*self.control.obs[KEY].astype(str), *self.train.obs[KEY].astype(str)]
        return cells(x, labels, "seen")

    def resampled(self, shift: dict[str, np.ndarray] | None = None) -> AnnData:
        """Control cells, drawn again for every perturbation and shifted, that name their source."""
        seen = self.seen()
        control = seen[(seen.obs[KEY] == "control").to_numpy()]
        rows = self.rng.integers(control.n_obs, size=len(self.names) * self.n_cells)
        x, labels = control.X[rows].toarray(), np.repeat(self.names, self.n_cells)
        if shift is not None:
            x = np.maximum(x + np.stack([shift[label] for label in labels]), 0)
        return cells(x, labels, "made", source_cell=control.obs_names[rows].to_numpy())
