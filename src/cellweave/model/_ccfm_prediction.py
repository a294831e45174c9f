"""Prediction of perturbed cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from numpy.typing import NDArray
from scvi.utils import track
from torch import Tensor

from cellweave._types import Indices
from cellweave.data import match_genes
from cellweave.flow import Guidance, time_grid
from cellweave.module import UNKNOWN, FlowSample, FlowSolver

from ._ccfm_cells import CellsMixin, _Cells

__all__ = ["FlowPredictionMixin"]

# Tokens, genes of cells, that are computed at once; more would only need more memory.
_TOKENS = 2**16


class _Start(NamedTuple):
    """Where the flows of a condition start."""

    transport: NDArray[np.float32]  # (context, 4, gene)
    reference: NDArray[np.float32]  # (context, 2, gene)


class FlowPredictionMixin(CellsMixin):
    """Cells after a perturbation."""

    def predict_perturbation(
        self,
        perturbations: str | Sequence[str],
        adata_ctrl: AnnData | None = None,
        indices: Indices | None = None,
        n_cells: int | None = 128,
        covariates: Mapping[str, Any] | None = None,
        dosages: Mapping[str, float] | None = None,
        unseen: Literal["error", "average"] = "error",
        genes: Sequence[str] | None = None,
        solver: str = "midpoint",
        n_steps: int = 10,
        guidance_scale: float = 1.0,
        trust: float | None = None,
        seed: int = 0,
        batch_size: int | None = None,
        include_control: bool = False,
        return_latent: bool = False,
    ) -> AnnData:
        """Predict cells of conditions from control cells.

        Every predicted cell is made from one control cell and inherits its annotation. What is drawn for a cell depends on
        the seed and its number only, so results depend neither on ``batch_size`` nor on the other perturbations.

        Parameters
        ----------
        perturbations
            Conditions, for example ``["A+B", "C"]``; the order of the parts does not matter.
        adata_ctrl
            Data with control cells; the control cells of the model's own data by default. Without the column
            ``perturbation_key`` all cells count as control cells. Genes are matched by name.
        indices
            Rows of these data to choose control cells from; all by default.
        n_cells
            Cells per condition, drawn from the control cells (each once, as long as there are enough); None makes one cell
            of every control cell.
        covariates
            Only control cells with these values, for example ``{"cell_type": "B cells"}``; a list allows several.
        dosages
            Dose of what is perturbed, ``{"drug": 0.5}``; the usual dose by default, which is the median over its treatments in
            the training cells.
        unseen
            What to do with a perturbation of which nothing is known: an error, or ``"average"`` to predict the average one.
        genes
            Predict these genes only, which is faster; the network then sees only them.
        solver
            ``"euler"``, ``"midpoint"``, ``"heun"``, ``"rk4"``, or an adaptive one such as ``"dopri5"`` (extra ``flow``); see
            :func:`cellweave.flow.integrate`.
        n_steps
            Steps of the solver in each stage.
        guidance_scale
            Above 1, effects are made stronger than learned; needs ``condition_dropout``.
        trust
            Share of the way from the start of the flow to its end, in [0, 1]; by default what :attr:`trust` says of each
            condition in the context of each cell. 0 is the simple prediction.
        seed
            Seed of the choice of control cells and of all noise.
        batch_size
            Cells that are computed together; chosen by the number of genes by default.
        include_control
            Add the control cells themselves, labelled ``control_key``, which evaluation tools want.
        return_latent
            Add the generated features in ``obsm["X_ccfm_latent"]``, those of genes averaged over them; needs an encoder.

        Returns
        -------
        AnnData ``(condition * cell, gene)`` with log-normalised expression in ``X`` (float32), ``obs`` of the control cell each was
        made from, ``obs[perturbation_key]``, ``obs["source_cell"]``, and what produced it in ``uns["ccfm"]``.

        Raises
        ------
        KeyError
            If ``covariates`` names a column that the data do not have.
        UnseenPerturbationError
            If a perturbation is neither a gene of the model nor described nor in the training cells, and ``unseen`` is
            ``"error"``.
        ValueError
            If there are no control cells, a gene is unknown, or an argument is out of range.
        """
        labels = [perturbations] if isinstance(perturbations, str) else list(perturbations)
        if not labels:
            raise ValueError("`perturbations` is empty; name at least one condition, for example ['A+B'].")
        names = [self._names.canonical(label) for label in labels]
        how = self._solver(solver, n_steps, guidance_scale)
        if trust is not None and not 0 <= trust <= 1:
            raise ValueError(f"`trust` must be in [0, 1], got {trust}; 0 stays at the start of the flow.")
        conditions = [self._names.parts(name) for name in names]
        self._check_conditions(conditions, unseen)
        _check_doses(dosages, conditions)
        kept = self._kept_genes(genes)
        with self._registered(adata_ctrl) as data:
            cells = self._control_cells(data, indices, n_cells, covariates, seed)
            predicted, latent = self._predicted(
                data, cells, conditions, how, seed, batch_size, kept, dosages, return_latent, trust
            )
            out = self._as_anndata(data, cells, names, predicted, kept, include_control, dosages)
        if latent is not None:
            if include_control:
                latent = np.concatenate([latent, np.full((len(cells.rows), latent.shape[1]), np.nan, np.float32)])
            out.obsm["X_ccfm_latent"] = latent
        parameters = {
            "solver": solver,
            "n_steps": n_steps,
            "guidance_scale": guidance_scale,
            "trust": list(self.trust) if trust is None else trust,
            "seed": seed,
        }
        out.uns["ccfm"] = self._provenance(parameters)
        return out

    def generate(
        self,
        adata_ctrl: AnnData | None = None,
        perturbation: str | None = None,
        key_added: str | None = None,
        indices: Indices | None = None,
        dosages: Mapping[str, float] | None = None,
        solver: str = "midpoint",
        n_steps: int = 10,
        guidance_scale: float = 1.0,
        seed: int = 0,
        batch_size: int | None = None,
        overwrite: bool = False,
    ) -> NDArray[np.float32]:
        """Every cell of an AnnData as if it had been perturbed, in a layer.

        Cells follow the flow as far as :attr:`trust` says, as in :meth:`predict_perturbation`.

        Parameters
        ----------
        adata_ctrl
            Cells to perturb, taken as control cells whatever their label; the data of the model by default.
        perturbation
            The condition; must be given.
        key_added
            Layer to write; nothing is written by default. Cells that are not in ``indices`` are NaN there.
        indices
            Rows of the cells; all by default.
        dosages, solver, n_steps, guidance_scale, seed, batch_size
            As in :meth:`predict_perturbation`.
        overwrite
            Replace a layer that another tool wrote.

        Returns
        -------
        Log-normalised expression ``(cell, gene)`` of the genes of the model, in the order of ``indices``.

        Raises
        ------
        UnseenPerturbationError
            If the perturbation is neither a gene of the model nor was in the training cells.
        ValueError
            If ``key_added`` is taken, or an argument is missing or out of range.
        """
        if perturbation is None:
            raise ValueError("`perturbation` is missing; name the condition, for example 'A+B'.")
        condition = self._names.parts(perturbation)
        how = self._solver(solver, n_steps, guidance_scale)
        self._check_conditions([condition], "error")
        _check_doses(dosages, [condition])
        place = self._result_place(adata_ctrl, "layers", key_added, overwrite=overwrite)
        with self._registered(adata_ctrl) as data:
            rows, order = self._rows(data, indices)
            cells = self._cells(data, rows)._replace(numbers=rows)  # the same cell in any selection
            kept = np.arange(len(self.genes))
            values, _ = self._predicted(data, cells, [condition], how, seed, batch_size, kept, dosages, False)
        if place is not None:
            parameters = {
                "perturbation": self._names.name(condition),
                "solver": solver,
                "n_steps": n_steps,
                "seed": seed,
            }
            place.write({place.keys[0]: _as_layer(values, rows, self.genes, place.holder)}, parameters)
        return values[order]

    # ---------------------------------------------------------------- the flow

    def _predicted(
        self,
        data: AnnData,
        cells: _Cells,
        conditions: Sequence[tuple[str, ...]],
        how: FlowSolver,
        seed: int,
        batch_size: int | None,
        kept: NDArray[np.int64],
        dosages: Mapping[str, float] | None,
        return_latent: bool,
        trust: float | None = None,
    ) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """Expression ``(condition * cell, gene)`` and features, conditions one after the other."""
        n_cells = len(cells.rows)
        out = np.empty((len(conditions), n_cells, len(kept)), dtype=np.float32)
        latent: NDArray[np.float32] | None = None
        inputs = self._perturbation_inputs(conditions, dosages)
        expected = self._expected(data, cells, conditions)
        genes = torch.from_numpy(self._tokens.gene_tokens()[kept])
        size = _checked_size(batch_size, len(kept))
        parts = [slice(start, min(start + size, n_cells)) for start in range(0, n_cells, size)]
        for part in track(parts, description="Predicting cells", disable=len(parts) < 8, style="tqdm"):
            for i, told in enumerate(inputs):
                contexts = [cells.contexts[j] for j in cells.context[part].tolist()]
                share = self._shares(contexts, conditions[i]) if trust is None else torch.full((1, 1), trust)
                begin = None if expected is None else expected[i]
                sample = self._flow(cells, part, genes, kept, told, begin, how, seed, share, return_latent)
                out[i, part] = sample.expression.clamp(min=0).cpu().numpy()
                if sample.latent is not None and return_latent:
                    values = _per_cell(sample.latent).cpu().numpy()
                    if latent is None:
                        latent = np.empty((len(conditions), n_cells, values.shape[1]), dtype=np.float32)
                    latent[i, part] = values
        if return_latent and latent is None:
            raise ValueError("`return_latent=True` needs a model with an encoder; this one has `encoder='none'`.")
        flat = None if latent is None else latent.reshape(-1, latent.shape[2])
        return out.reshape(-1, len(kept)), flat

    def _flow(
        self,
        cells: _Cells,
        part: slice,
        genes: Tensor,
        kept: NDArray[np.int64],
        told: Mapping[str, Tensor],
        begin: _Start | None,
        how: FlowSolver,
        seed: int,
        share: Tensor,
        needs_latent: bool,
    ) -> FlowSample:
        """Cells of one condition, ``share`` ``(cell or 1, 1)`` of the way from the start of the flow to its end."""
        module, control = self.module, torch.from_numpy(cells.x[part])
        numbers, change, read = torch.from_numpy(cells.numbers[part]), None, None
        if begin is not None:
            transport, reference = (torch.from_numpy(a[cells.context[part]]) for a in begin)
            change, read = module.draw_change(control, transport, numbers, seed)[:, kept], reference[..., kept]
        control = control[:, kept]
        start = module.draw_start(control, numbers, seed, change)
        if not share.any() and not needs_latent:  # nothing of the flow would be used
            return FlowSample(start.expression, None)
        covariates = None if cells.covariates is None else torch.from_numpy(cells.covariates[part])
        end = module.sample(
            genes, control, start=start, how=how, anchor=change, reference=read, covariates=covariates, **told
        )
        begun = start.expression.to(end.expression)
        x = _along(begun, end.expression, share.to(end.expression), self._keeps_zeros)
        return end._replace(expression=x)

    @property
    def _keeps_zeros(self) -> bool:
        """Whether the start of the flow decides what a cell expresses; otherwise its end does."""
        return self.module.start == "control" and self.module.gate_layer is None

    def _shares(self, contexts: Sequence[str], condition: tuple[str, ...]) -> Tensor:
        """How far cells of these contexts follow the flow of a condition ``(cell, 1)``."""
        if self.module.start == "noise":
            return torch.ones(1, 1)
        trained = self._trained_contexts(condition)
        is_seen = torch.tensor([context in trained or not condition for context in contexts])
        return torch.where(is_seen, self.trust.seen, self.trust.unseen)[:, None]

    def _perturbation_inputs(
        self, conditions: Sequence[tuple[str, ...]], dosages: Mapping[str, float] | None
    ) -> list[dict[str, Tensor]]:
        """What the network is told of each condition, one row that all cells share."""
        tokens = torch.from_numpy(self._tokens.encode(conditions, self._pad_with_control, UNKNOWN))
        inputs = [{"perturbation": row[None]} for row in tokens]
        usual = self._facts["doses"]
        if self._setup["dosage_key"] is None:
            if dosages:
                raise ValueError("`dosages` were given, but the model knows none; set it up with `dosage_key`.")
            return inputs
        for entry, parts in zip(inputs, conditions, strict=True):
            given = [(dosages or {}).get(part, usual.get(part, 1.0)) / usual.get(part, 1.0) for part in parts]
            if not all(np.isfinite(dose) and dose > 0 for dose in given):
                raise ValueError(f"`dosages` must be positive numbers, got {dict(dosages or {})}; give doses above 0.")
            entry["dose"] = torch.ones(1, tokens.shape[1])
            entry["dose"][0, : len(parts)] = torch.tensor(given, dtype=torch.float32)
        return inputs

    def _expected(self, data: AnnData, cells: _Cells, conditions: Sequence[tuple[str, ...]]) -> list[_Start] | None:
        """Where the flows of every condition start, by context; None from noise."""
        if self.module.start == "noise":
            return None
        means = self._means_for(data, cells)
        used = np.unique(cells.context).tolist()
        out = []
        for condition in conditions:
            start = _Start(*(np.zeros((len(cells.contexts), n, cells.x.shape[1]), np.float32) for n in (4, 2)))
            start.transport[used], start.reference[used] = self._starts(
                means, [(cells.contexts[i], condition) for i in used]
            )
            out.append(start)
        return out

    def _solver(self, solver: str, n_steps: int, guidance_scale: float) -> FlowSolver:
        if n_steps < 1:
            raise ValueError(f"`n_steps` must be at least 1, got {n_steps}; more steps are more exact.")
        if guidance_scale != 1 and self.module.condition_dropout == 0:
            raise ValueError(
                f"`guidance_scale={guidance_scale}` needs a model that was trained with `condition_dropout` above 0; use 1."
            )
        grid, guidance = time_grid(n_steps + 1), Guidance(guidance_scale)
        return FlowSolver(solver, grid, grid, guidance, guidance)

    # ---------------------------------------------------------------- pieces

    def _check_conditions(self, conditions: Sequence[tuple[str, ...]], unseen: str) -> None:
        if unseen not in ("error", "average"):
            raise ValueError(f"`unseen` must be 'error' or 'average', got {unseen!r}; choose one of them.")
        self._tokens.encode(conditions, unknown=None if unseen == "error" else UNKNOWN)

    def _kept_genes(self, genes: Sequence[str] | None) -> NDArray[np.int64]:
        if isinstance(genes, str):
            raise TypeError(f"`genes` must be a list of gene names, got {genes!r}; pass `[{genes!r}]`.")
        kept = self._gene_positions(genes, "genes")
        if len(np.unique(kept)) < len(kept):
            twice = len(kept) - len(np.unique(kept))
            raise ValueError(f"`genes` names {twice} gene(s) twice; name each once.")
        if len(kept) == 0:
            raise ValueError("`genes` is empty; name at least one gene, or leave it out for all.")
        return kept


def _checked_size(batch_size: int | None, n_genes: int) -> int:
    """Cells that are computed together."""
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}; leave it out to have it chosen.")
    return batch_size or max(1, _TOKENS // n_genes)


def _check_doses(dosages: Mapping[str, float] | None, conditions: Sequence[tuple[str, ...]]) -> None:
    parts = {part for condition in conditions for part in condition}
    strange = [name for name in dosages or {} if name not in parts]
    if strange:
        raise ValueError(
            f"`dosages` names {len(strange)} thing(s) that are not perturbed (first: {strange[0]!r}); name parts of the "
            "conditions."
        )


def _along(start: Tensor, end: Tensor, share: Tensor, keeps_zeros: bool) -> Tensor:
    """Cells ``share`` of the way from the start of the flow to its end, none below zero.

    A flow moves all values a little, zeros as well, and cells without zeros look as if every gene had changed. So what a cell does
    not express where the flow starts, which is where zeros are as in measured cells, it does not express at its end.
    """
    x = torch.lerp(start, end.clamp(min=0), share)
    return torch.where((start if keeps_zeros else end) > 0, x, 0.0)


def _per_cell(latent: Tensor) -> Tensor:
    """Features ``(cell, latent)``; those of genes are averaged over them."""
    return latent.mean(1) if latent.ndim == 3 else latent


def _as_layer(
    values: NDArray[np.float32], rows: NDArray[np.int64], genes: NDArray[np.str_], holder: AnnData
) -> NDArray[np.float32]:
    """``values`` in the shape of ``holder``, NaN for other cells and genes."""
    position = match_genes(holder.var_names.astype(str), pd.Index(genes))
    out = np.full(holder.shape, np.nan, dtype=np.float32)
    known = position >= 0
    out[np.ix_(rows, position[known])] = values[:, known]
    return out
