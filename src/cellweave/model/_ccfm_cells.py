"""Control cells that a cascaded flow starts from, and the AnnData of what it makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from anndata import AnnData
from anndata.utils import make_index_unique
from numpy.typing import NDArray

from cellweave._keys import REGISTRY_KEYS
from cellweave._types import Indices
from cellweave.data import as_dense, context_names, row_source

from ._ccfm_anchors import Means

__all__ = ["CellsMixin"]

# Control cells that tell the means of a context that is new.
_CONTEXT_CELLS = 2048


class _Cells(NamedTuple):
    """Control cells that predictions start from."""

    x: NDArray[np.float32]  # (cell, gene)
    rows: NDArray[np.int64]  # (cell,): positions in the AnnData
    context: NDArray[np.int64]  # (cell,)
    contexts: tuple[str, ...]
    covariates: NDArray[np.int64] | None  # (cell, column): codes
    numbers: NDArray[np.int64]  # (cell,): by which all is drawn for a cell


class CellsMixin:
    """Control cells of any data."""

    def _control_cells(
        self,
        data: AnnData,
        indices: Indices | None,
        n_cells: int | None,
        covariates: Mapping[str, Any] | None,
        seed: int,
    ) -> _Cells:
        """The control cells that predictions are made from, one for each predicted cell."""
        setup = self._setup
        rows = self._rows(data, indices)[0]
        rows = rows[self._is_control(data)[rows]]
        for key, wanted in (covariates or {}).items():
            if key not in data.obs:
                raise KeyError(f"`covariates` names {key!r}, which is not in `adata.obs`; it has {list(data.obs)[:6]}.")
            values = [wanted] if isinstance(wanted, str) or not isinstance(wanted, Sequence) else list(wanted)
            rows = rows[data.obs[key].isin(values).to_numpy()[rows]]
        if len(rows) == 0:
            chosen = "" if not covariates else f" with {dict(covariates)}"
            raise ValueError(
                f"There are no control cells ({setup['perturbation_key']}={setup['control_key']!r}){chosen} to predict from; give "
                "some with `adata_ctrl`, or loosen `covariates` and `indices`."
            )
        if n_cells is not None:
            if n_cells < 1:
                raise ValueError(
                    f"`n_cells` must be at least 1, got {n_cells}; use None for one of every control cell."
                )
            rng = np.random.default_rng([seed % 2**63, 0])
            whole = np.concatenate([rng.permutation(rows) for _ in range(-(-n_cells // len(rows)))])
            rows = whole[:n_cells]
        return self._cells(data, rows)

    def _is_control(self, data: AnnData) -> NDArray[np.bool_]:
        """Whether each cell is a control cell; without labels all are ``(cell,)``."""
        key = self._setup["perturbation_key"]
        if key not in data.obs:
            return np.ones(data.n_obs, dtype=bool)
        labels = data.obs[key].astype(str)
        return labels.map({label: not self._names.parts(label) for label in labels.unique()}).to_numpy(dtype=bool)

    def _cells(self, data: AnnData, rows: NDArray[np.int64]) -> _Cells:
        unique, place = np.unique(rows, return_inverse=True)
        x = as_dense(row_source(self._expression_of(data)).take(unique))
        known = self._facts["contexts"]
        keys = self._setup["pairing_keys"]
        contexts, context = context_names(data.obs.iloc[rows], keys, known)
        covariates = None
        if self._setup["categorical_covariate_keys"]:
            manager = self.get_anndata_manager(data, required=True)
            covariates = np.asarray(manager.get_from_registry(REGISTRY_KEYS.CATEGORIES), dtype=np.int64)[rows]
        return _Cells(x[place], rows, context, contexts, covariates, np.arange(len(rows)))

    def _means_for(self, data: AnnData, cells: _Cells) -> Means:
        """Means of the training cells, and of the control cells of ``data`` in contexts that these do not have.

        They do not depend on which cells are asked for, so that predictions do not either.
        """
        new = cells.contexts[len(self._facts["contexts"]) :]
        if not new:
            return self._means()
        names, codes = context_names(data.obs, self._setup["pairing_keys"])
        every, is_control = np.asarray(names, dtype=object)[codes], self._is_control(data)
        rows = []
        for name in new:
            here = np.flatnonzero(every == name)
            here = here[is_control[here]] if is_control[here].any() else here
            rows.append(here[:: -(-len(here) // _CONTEXT_CELLS)])
        around = self._cells(data, np.concatenate(rows))
        return self._means_with(around.contexts, around.context, around.x)

    def _as_anndata(
        self,
        data: AnnData,
        cells: _Cells,
        names: Sequence[str],
        predicted: NDArray[np.float32],
        kept: NDArray[np.int64],
        include_control: bool,
        dosages: Mapping[str, float] | None,
    ) -> AnnData:
        """Predicted cells with the annotation of the control cells that they were made from."""
        key, control_key = self._setup["perturbation_key"], self._setup["control_key"]
        source = data.obs.iloc[cells.rows]
        source = source[[column for column in source if not column.startswith("_scvi_")]]
        labels = [*names, control_key] if include_control else list(names)
        obs = pd.concat([source] * len(labels))
        obs["source_cell"] = obs.index.astype(str)
        n_cells = len(cells.rows)
        obs[key] = pd.Categorical(np.repeat(np.asarray(labels, dtype=object), n_cells), sorted(set(labels)))
        obs.index = make_index_unique(pd.Index([f"{label}_{i}" for label in labels for i in range(n_cells)]))
        if self._setup["dosage_key"] is not None:
            obs[self._setup["dosage_key"]] = np.repeat([self._dose_text(label, dosages) for label in labels], n_cells)
        x = np.concatenate([predicted, cells.x[:, kept]]) if include_control else predicted
        return AnnData(x, obs=obs, var=data.var.iloc[kept].copy())

    def _dose_text(self, label: str, dosages: Mapping[str, float] | None) -> str:
        parts = self._names.parts(label)
        usual = self._facts["doses"]
        return self._names.sep.join(f"{(dosages or {}).get(part, usual.get(part, 1.0)):g}" for part in parts) or "0"
