"""What a cascaded flow says of measured cells: embeddings, noise, and what else they could have been."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from numpy.typing import NDArray
from scvi.utils import track
from torch import Tensor

from cellweave._types import Indices
from cellweave.data import context_names
from cellweave.module import CascadeSampler, FlowSolver, FlowStart, embed_cells, evaluating, invert_flow

from ._ccfm_cells import _Cells
from ._ccfm_prediction import _along, _as_layer, _check_doses, _checked_size
from ._contexts import all_cells

__all__ = ["FlowRepresentationMixin"]

Kind = Literal["backbone", "noise", "features"]
_KINDS = ("backbone", "noise", "features")


class _Part(NamedTuple):
    """Cells of one condition that are computed together."""

    rows: NDArray[np.int64]  # positions in the data
    parts: tuple[str, ...]  # what was perturbed
    contexts: list[str]  # name of the context of each cell
    x: Tensor  # (cell, gene)
    control: Tensor  # (cell, gene): a control cell of the context beside each cell; a control cell has itself
    # of each condition, without a start from noise: expected move of control cells (cell, 4, gene), and what the flow reads
    starts: dict[tuple[str, ...], tuple[Tensor, Tensor]]
    latent: Tensor | None  # standardised features
    covariates: Tensor | None  # codes (cell, column)


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
        """Embedding of measured cells. In a model with an encoder this needs the encoder, so not a loaded model.

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
            control cell of its context and not its label ``(cell, n_hidden)``. ``"noise"``: where the flow that ends at the cell
            starts, minus the mean start of its context and condition ``(cell, gene)``: what is left of a cell without them. ``"features"``: the standardised features of the encoder ``(cell, latent)``.
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
                values = self._features_of(data, rows)
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
        stands behind both ends, so the difference is the effect on this cell and not the difference of two cells. Both ends
        follow the flow as far as :attr:`trust` says. In a model with an encoder this needs the encoder, so not a loaded model.

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
        self._check_conditions([condition], "error")
        _check_doses(dosages, [condition])
        place = self._result_place(adata, "layers", key_added, overwrite=overwrite)

        def compute(part: _Part) -> Tensor:
            if condition == part.parts and not dosages:
                return torch.zeros_like(part.x)
            start = self._start_of(part, how)
            other = self._moved(part, condition, start, seed)
            # the factual end is computed like the other, so that the errors of both cancel
            moved = self._follow(part, condition, other, how, dosages)
            return moved - self._follow(part, part.parts, start, how, None)

        with self._registered(adata) as data:
            rows, order = self._rows(data, indices)
            values = self._by_condition(data, rows, compute, batch_size, seed, condition)
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
        self._check_if_trained(warn=False)
        labels = self.perturbations if perturbations is None else list(perturbations)
        names = [self._names.canonical(label) for label in labels]
        conditions = [self._names.parts(name) for name in names]
        tokens = torch.from_numpy(self._tokens.encode(conditions, self._pad_with_control)).to(self.module.device)
        genes = torch.zeros(1, dtype=torch.int64, device=tokens.device)
        with torch.inference_mode(), evaluating(self.module):
            vectors = self.module.read_tokens(genes, tokens)[1]
        return pd.DataFrame(vectors.cpu().numpy(), index=pd.Index(names, name="perturbation"))

    # ---------------------------------------------------------------- pieces

    def _start_of(self, part: _Part, how: FlowSolver) -> FlowStart:
        """Where the flows start that end at measured cells."""
        told = self._perturbation_inputs([part.parts], None)[0]
        told = {name: value.to(part.x.device) for name, value in told.items()}
        sampler = CascadeSampler(self.module, self._gene_tokens(), part.control, reference=self._read(part, part.parts))
        start = invert_flow(sampler, sampler.read(**told, covariates=part.covariates), part.x, part.latent, how)
        if self.module.start == "noise":
            return start
        # flows from control cells leave zeros alone, see `_along`
        return start._replace(expression=torch.where(part.x > 0, start.expression, 0.0))

    def _moved(self, part: _Part, parts: tuple[str, ...], start: FlowStart, seed: int) -> FlowStart:
        """The start under another condition: without the expected change of the own one, and with that of the other."""
        own = self._read(part, part.parts)
        if own is None:  # noise is the same under all conditions
            return start
        control = torch.where(start.expression > 0, (start.expression - own[:, 1]).clamp(min=0), 0.0)
        change = self.module.draw_change(control, part.starts[parts][0], torch.from_numpy(part.rows), seed)
        return start._replace(expression=control + change)

    def _follow(
        self,
        part: _Part,
        parts: tuple[str, ...],
        start: FlowStart,
        how: FlowSolver,
        dosages: Mapping[str, float] | None,
    ) -> Tensor:
        """Cells of a condition ``(cell, gene)``, as far along the flow as it is trusted."""
        told = self._perturbation_inputs([parts], dosages)[0]
        read = self._read(part, parts)
        end = self.module.sample(
            self._gene_tokens(), part.control, start=start, how=how, reference=read, covariates=part.covariates, **told
        ).expression
        share = self._shares(part.contexts, parts).to(end)
        return _along(start.expression, end, share, self._keeps_zeros)

    @staticmethod
    def _read(part: _Part, parts: tuple[str, ...]) -> Tensor | None:
        """What the flow reads of the context instead of the control cell ``(cell, 2, gene)``."""
        return part.starts[parts][1] if parts in part.starts else None

    def _gene_tokens(self) -> Tensor:
        return torch.from_numpy(self._tokens.gene_tokens()).to(self.module.device)

    def _features_of(self, data: AnnData, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Standardised features of the encoder ``(cell, latent)``; those of genes are averaged over them."""
        values = self._encoded(data, rows)
        return values.mean(1) if values.ndim == 3 else values

    def _backbone(self, part: _Part) -> Tensor:
        # beside the control cells of its context, as if nothing had happened: an embedding must not know the label
        sampler = CascadeSampler(self.module, self._gene_tokens(), part.control, reference=self._read(part, ()))
        return embed_cells(sampler, part.x, part.latent)

    def _noise(self, part: _Part) -> Tensor:
        start = self._start_of(part, self._solver("midpoint", 10, 1.0)).expression
        read = self._read(part, part.parts)
        return start if read is None else start - read.sum(1)

    def _by_condition(
        self,
        data: AnnData,
        rows: NDArray[np.int64],
        compute: Callable[[_Part], Tensor],
        batch_size: int | None,
        seed: int,
        *others: tuple[str, ...],
    ) -> NDArray[np.float32]:
        """Values ``(cell, dim)`` of :class:`_Part` after :class:`_Part`, in the order of ``rows``."""
        out: NDArray[np.float32] | None = None
        size = _checked_size(batch_size, len(self.genes))
        groups = self._groups(data, rows)
        pieces = [(parts, place[i : i + size]) for parts, place in groups.items() for i in range(0, len(place), size)]
        with torch.inference_mode(), evaluating(self.module):
            for parts, place in track(pieces, description="Reading cells", disable=len(pieces) < 8, style="tqdm"):
                values = compute(self._part(data, rows, place, parts, seed, others)).float().cpu().numpy()
                if out is None:
                    out = np.empty((len(rows), values.shape[1]), dtype=np.float32)
                out[place] = values
        return np.zeros((0, 0), np.float32) if out is None else out

    def _groups(self, data: AnnData, rows: NDArray[np.int64]) -> dict[tuple[str, ...], NDArray[np.int64]]:
        """Positions in ``rows`` of the cells of every condition; without labels all are control cells."""
        key = self._setup["perturbation_key"]
        if key not in data.obs:
            return {(): np.arange(len(rows))}
        labels = data.obs[key].astype(str).to_numpy()[rows]
        found: dict[tuple[str, ...], list[NDArray[np.int64]]] = {}
        for label in np.unique(labels):
            found.setdefault(self._names.parts(str(label)), []).append(np.flatnonzero(labels == label))
        return {parts: np.sort(np.concatenate(places)) for parts, places in found.items()}

    def _part(
        self,
        data: AnnData,
        rows: NDArray[np.int64],
        place: NDArray[np.int64],
        parts: tuple[str, ...],
        seed: int,
        others: Sequence[tuple[str, ...]],
    ) -> _Part:
        device = self.module.device
        cells = self._cells(data, rows[place])
        x = torch.from_numpy(cells.x).to(device)
        control = x if not parts else torch.from_numpy(self._beside(data, cells, seed)).to(device)
        conditions = [*dict.fromkeys([parts, (), *others])]
        expected = self._expected(data, cells, conditions) or []
        starts = {
            condition: (
                torch.from_numpy(start.transport[cells.context]).to(device),
                torch.from_numpy(start.reference[cells.context]).to(device),
            )
            for condition, start in zip(conditions, expected, strict=False)
        }
        latent = None
        if self.module.n_latent:
            latent = torch.from_numpy(self._encoded(data, rows[place])).to(device)
        covariates = None if cells.covariates is None else torch.from_numpy(cells.covariates).to(device)
        contexts = [cells.contexts[i] for i in cells.context.tolist()]
        return _Part(rows[place], parts, contexts, x, control, starts, latent, covariates)

    def _beside(self, data: AnnData, cells: _Cells, seed: int) -> NDArray[np.float32]:
        """A control cell of the context beside each cell, which does not depend on the others."""
        is_control = self._is_control(data)
        names, codes = context_names(data.obs, self._setup["pairing_keys"])
        every = np.asarray(names, dtype=object)[codes]
        out = np.empty_like(cells.rows)
        for i in np.unique(cells.context):
            here = np.flatnonzero(is_control & (every == cells.contexts[i]))
            if len(here) == 0:
                raise ValueError(
                    f"`adata` has no control cell of the context {cells.contexts[i]!r}, beside which its perturbed cells are "
                    "read; add some."
                )
            mine = cells.context == i
            draws = [
                np.random.default_rng([seed % 2**63, row]).integers(len(here)) for row in cells.rows[mine].tolist()
            ]
            out[mine] = here[draws]
        return self._cells(data, out).x
