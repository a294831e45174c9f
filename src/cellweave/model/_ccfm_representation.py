"""What a cascaded flow says of measured cells: embeddings, noise, and what else they could have been."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from numpy.typing import NDArray
from scvi.utils import track

from cellweave._types import Indices
from cellweave.module import evaluating

from ._ccfm_prediction import _as_layer
from ._contexts import all_cells

__all__ = ["FlowRepresentationMixin"]

Kind = Literal["backbone", "noise", "features"]
_KINDS = ("backbone", "noise", "features")


class _Part(NamedTuple):
    """Cells of one condition that are computed together."""

    where: NDArray[np.int64]  # positions in the result
    x: torch.Tensor  # (cell, gene)
    control: torch.Tensor  # (cell, gene)
    context: NDArray[np.int64]  # (cell,)
    parts: tuple[str, ...]  # what was perturbed


class FlowRepresentationMixin:
    """Embeddings and counterfactuals of measured cells."""

    def get_latent_representation(
        self,
        adata: AnnData | None = None,
        indices: Indices | None = None,
        batch_size: int | None = None,
        kind: Kind = "backbone",
        key_added: str | None = None,
        seed: int = 0,
        overwrite: bool = False,
    ) -> NDArray[np.float32]:
        """Embedding of measured cells.

        Parameters
        ----------
        adata
            Data to embed; the data of the model by default. Genes are matched by name.
        indices
            Rows to embed; all by default.
        batch_size
            Cells that are computed together; chosen by the number of genes by default.
        kind
            ``"backbone"``: mean over genes of the last tokens of the network, which sees the cell as a finished one beside a
            control cell of its context and not its label ``(cell, n_hidden)``. ``"noise"``: where the flow that
            ends at the cell starts, relative to where its condition starts ``(cell, gene)``: what is left of a cell without
            its condition. ``"features"``: the standardised features of the encoder ``(cell, latent)``.
        key_added
            Key of ``obsm`` to write; nothing is written by default. Cells that are not in ``indices`` are NaN there.
        seed
            Seed of the control cell beside each cell.
        overwrite
            Replace a key that another tool wrote.

        Returns
        -------
        float32 array ``(cell, dim)`` in the order of ``indices``.

        Raises
        ------
        ValueError
            If ``kind`` is unknown or needs an encoder that is not there, or ``key_added`` is taken.
        UnseenPerturbationError
            With ``kind="noise"``, if a condition of the cells is unknown.
        """
        if kind not in _KINDS:
            raise ValueError(f"`kind` must be one of {', '.join(_KINDS)}, got {kind!r}; choose one of them.")
        place = self._result_place(adata, "obsm", key_added, overwrite=overwrite)
        with self._registered(adata) as data:
            rows, order = self._rows(data, indices)
            if kind == "features":
                values = self._features(data, rows)
            else:
                compute = self._backbone if kind == "backbone" else self._noise
                values = self._by_condition(data, rows, compute, batch_size, seed)
            n_obs = data.n_obs
        if place is not None:
            place.write({place.keys[0]: all_cells(values, rows, n_obs)}, {"kind": kind, "seed": seed})
        return values[order]

    def get_perturbation_effect(
        self,
        perturbation: str,
        adata: AnnData | None = None,
        indices: Indices | None = None,
        batch_size: int | None = None,
        dosages: Mapping[str, float] | None = None,
        solver: str = "midpoint",
        n_steps: int = 10,
        key_added: str | None = None,
        seed: int = 0,
        overwrite: bool = False,
    ) -> NDArray[np.float32]:
        """What a perturbation would do to each single cell.

        The flow is followed backwards from the cell under its own condition, and forwards under the other. The same noise
        stands behind both ends, so the difference is the effect on this cell and not the difference of two cells.

        Parameters
        ----------
        perturbation
            The condition to move the cells to.
        adata
            Measured cells; the data of the model by default. Without the column ``perturbation_key`` they are control cells.
        indices
            Rows of the cells; all by default.
        batch_size
            Cells that are computed together.
        dosages, solver, n_steps
            As in :meth:`predict_perturbation`.
        key_added
            Layer to write the effect to; nothing is written by default.
        seed
            Seed of the control cell beside each perturbed cell.
        overwrite
            Replace a layer that another tool wrote.

        Returns
        -------
        Differences of log-normalised expression ``(cell, gene)``, in the order of ``indices``.

        Raises
        ------
        UnseenPerturbationError
            If a perturbation is neither a gene of the model nor was in the training cells.
        ValueError
            If ``key_added`` is taken, or an argument is out of range.
        """
        condition = self._names.parts(perturbation)
        how = self._solver(solver, n_steps, 1.0)
        self._check_conditions([condition])
        place = self._result_place(adata, "layers", key_added, overwrite=overwrite)

        def compute(part: _Part) -> torch.Tensor:
            own, other = (self._flow_inputs(part, parts, dosages) for parts in (part.parts, condition))
            module, sampler = self.module, self._sampler(part)
            start = module.invert(sampler, own.tensors, part.x, how, own.shift)
            again = module.follow(sampler, own.tensors, start, how, own.shift)
            moved = module.follow(sampler, other.tensors, start, how, other.shift)
            # the factual end is computed too, so that the error of the solver cancels
            return moved.clamp(min=0) - again.clamp(min=0)

        with self._registered(adata) as data:
            rows, order = self._rows(data, indices)
            values = self._by_condition(data, rows, compute, batch_size, seed)
        if place is not None:
            parameters = {
                "perturbation": self._names.name(condition),
                "solver": solver,
                "n_steps": n_steps,
                "seed": seed,
            }
            place.write({place.keys[0]: _as_layer(values, rows, self.genes, place.holder)}, parameters)
        return values[order]

    def get_perturbation_representation(self, perturbations: Sequence[str] | None = None) -> pd.DataFrame:
        """Vectors by which the network knows perturbations.

        Parameters
        ----------
        perturbations
            Conditions; everything that was perturbed in the training cells by default.

        Returns
        -------
        Frame ``(condition, n_hidden)``.

        Raises
        ------
        UnseenPerturbationError
            If a perturbation is neither a gene of the model nor was in the training cells.
        """
        labels = self.perturbations if perturbations is None else list(perturbations)
        names = [self._names.canonical(label) for label in labels]
        conditions = [self._names.parts(name) for name in names]
        tokens = torch.from_numpy(self._tokens.encode(conditions, self._pad_with_control)).to(self.module.device)
        genes = torch.zeros(1, dtype=torch.int64, device=tokens.device)
        with torch.inference_mode(), evaluating(self.module):
            vectors = self.module.read_tokens(genes, tokens)[1]
        return pd.DataFrame(vectors.cpu().numpy(), index=pd.Index(names, name="perturbation"))

    # ---------------------------------------------------------------- pieces

    def _features(self, data: AnnData, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Standardised features of the encoder ``(cell, latent)``; those of genes are averaged over them."""
        values = self._encoded(data, rows)
        return values.mean(1) if values.ndim == 3 else values

    def _backbone(self, part: _Part) -> torch.Tensor:
        module, sampler = self.module, self._sampler(part)
        latent = None
        if module.n_latent:
            latent = torch.from_numpy(self._encoded(part.data, part.rows)).to(part.x)
        return module.embed(sampler, part.x, latent)

    def _noise(self, part: _Part) -> torch.Tensor:
        own = self._flow_inputs(part, part.parts, None)
        start = self.module.invert(
            self._sampler(part), own.tensors, part.x, self._solver("midpoint", 10, 1.0), own.shift
        )
        return start - self.module.origin(part.control)

    def _by_condition(
        self,
        data: AnnData,
        rows: NDArray[np.int64],
        compute: Any,
        batch_size: int | None,
        seed: int,
    ) -> NDArray[np.float32]:
        """Values ``(cell, dim)`` of :class:`_Part` after :class:`_Part`, in the order of ``rows``."""
        out: NDArray[np.float32] | None = None
        parts = list(self._parts(data, rows, batch_size, seed))
        with torch.inference_mode(), evaluating(self.module):
            for part in track(parts, description="Reading cells", disable=len(parts) < 8, style="tqdm"):
                values = compute(part).float().cpu().numpy()
                if out is None:
                    out = np.empty((len(rows), values.shape[1]), dtype=np.float32)
                out[part.where] = values
        return np.zeros((0, 0), np.float32) if out is None else out
