"""StackModel: in-context tabular attention over sets of cells."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray

from cellweave import _compat
from cellweave._keys import LOADER_KEYS, REGISTRY_KEYS
from cellweave._types import AnnOrMuData, ContextRule, Indices
from cellweave.data import CellSetDataset, CellStore, match_genes
from cellweave.module import StackModule

from ._base import CellweaveModel
from ._contexts import all_cells, all_cells_and_genes
from ._setup import CountsSetupMixin
from ._stack_masked import MaskedPredictionMixin

__all__ = ["StackModel"]

# Optimiser steps that the default number of epochs aims at, and its bounds.
_TARGET_STEPS, _MIN_EPOCHS, _MAX_EPOCHS = 3000, 10, 400


class StackModel(MaskedPredictionMixin, CountsSetupMixin, CellweaveModel):
    """Embed and denoise cells in the context of other cells by tabular attention.

    Every cell is read together with ``n_cells - 1`` others, its *context*: attention runs over gene tokens inside each
    cell and across the cells of the context. The model is trained to predict the counts of randomly masked genes with
    a negative binomial. It is an independent implementation of the published Stack architecture.

    Default sizes suit thousands to tens of thousands of cells on a CPU; the published model, for 150 million cells, has
    ``n_hidden=100``, ``token_dim=16``, ``n_cells=256`` and ``n_layers=9``.

    Parameters
    ----------
    adata
        AnnData or MuData registered with :meth:`setup_anndata` or :meth:`setup_mudata`.
    registry
        Registry of a saved model, used by :meth:`load` in place of data.
    n_hidden
        Gene tokens per cell.
    token_dim
        Width of a token; embeddings have ``n_hidden * token_dim`` dimensions.
    n_cells
        Cells per context.
    n_layers
        Tabular attention layers.
    n_heads
        Heads of the across-cell attention; must divide ``n_hidden * token_dim``.
    mlp_ratio
        Expansion of the token-wise MLP.
    dropout
        Dropout rate.
    mask_rate_min, mask_rate_max
        Range of the share of genes masked in a training step.
    sw_weight
        Weight of the sliced-Wasserstein term, which pulls embeddings towards a standard normal.
    n_proj
        Directions of the sliced-Wasserstein term.
    batch_condition
        Whether the network knows the batch of a cell: ``"none"`` (as published), ``"decoder"`` (the embedding need not
        hold the batch to reconstruct counts, as in scVI) or ``"both"`` (encoder and decoder).
    normalize_input
        Scale cells to ten thousand counts before the logarithm of the input; off in the published model.

    Examples
    --------
    >>> import cellweave as cw
    >>> adata = cw.datasets.pbmc68k()
    >>> cw.model.StackModel.setup_anndata(adata, labels_key="bulk_labels")
    >>> model = cw.model.StackModel(adata)
    >>> model.train()
    >>> adata.obsm["X_stack"] = model.get_latent_representation()

    References
    ----------
    Dong et al., *Stack*, bioRxiv 10.64898/2026.01.09.698608 (2026).

    See Also
    --------
    cellweave.module.StackModule
    """

    def __init__(
        self,
        adata: AnnOrMuData | None = None,
        registry: dict[str, Any] | None = None,
        n_hidden: int = 16,
        token_dim: int = 8,
        n_cells: int = 64,
        n_layers: int = 2,
        n_heads: int = 8,
        mlp_ratio: int = 4,
        dropout: float = 0.0,
        mask_rate_min: float = 0.1,
        mask_rate_max: float = 0.8,
        sw_weight: float = 0.01,
        n_proj: int = 64,
        batch_condition: Literal["none", "decoder", "both"] = "none",
        normalize_input: bool = False,
    ) -> None:
        super().__init__(adata, registry)
        self.module = StackModule(
            n_genes=self.summary_stats.n_vars,
            n_batch=self.summary_stats.n_batch,
            n_hidden=n_hidden,
            token_dim=token_dim,
            n_cells=n_cells,
            n_layers=n_layers,
            n_heads=n_heads,
            mlp_ratio=mlp_ratio,
            dropout=dropout,
            mask_rate_min=mask_rate_min,
            mask_rate_max=mask_rate_max,
            sw_weight=sw_weight,
            n_proj=n_proj,
            batch_condition=batch_condition,
            normalize_input=normalize_input,
        )
        self._model_summary_string = "StackModel"
        self.init_params_ = self._get_init_params(locals())
        if adata is not None:
            self._warn_small_data(adata)

    # ---------------------------------------------------------------- training

    def train(
        self,
        max_epochs: int | None = None,
        accelerator: str = "auto",
        devices: int | list[int] | str = "auto",
        train_size: float | None = None,
        validation_size: float | None = None,
        shuffle_set_split: bool = True,
        split_by: Literal["cell", "context"] = "cell",
        batch_size: int = 128,
        early_stopping: bool = False,
        lr: float = 1e-3,
        weight_decay: float = 3e-3,
        warmup_steps: int | None = None,
        gradient_clip_val: float = 1.0,
        precision: str = "32-true",
        compile: bool = False,
        checkpoint_dir: str | Path | None = None,
        checkpoint_minutes: float = 15.0,
        resume: Literal["auto"] | str | Path | None = None,
        plan_kwargs: dict[str, Any] | None = None,
        datasplitter_kwargs: dict[str, Any] | None = None,
        datamodule: LightningDataModule | None = None,
        **trainer_kwargs: Any,
    ) -> None:
        """Train the model. Loss terms of every epoch are in :attr:`history`.

        Parameters
        ----------
        max_epochs
            Passes over the training cells; by default as many as give about 3,000 steps, from 10 to 400.
        accelerator, devices
            As in scvi-tools and Lightning; ``"auto"`` uses one GPU where there is one.
        train_size, validation_size
            Shares of training and validation cells, 0.9 and 0.1 by default; the rest is the test set.
        shuffle_set_split
            Split at random; in row order otherwise.
        split_by
            Split ``"cell"`` by cell, or keep the groups of ``context_key`` whole with ``"context"``.
        batch_size
            Cells per step, rounded down to whole contexts.
        early_stopping
            Stop when ``validation_loss`` no longer falls; ``early_stopping_patience`` and other options of
            :class:`scvi.train.Trainer` may be given.
        lr
            Peak learning rate of AdamW; a linear warm-up and a cosine follow the steps.
        weight_decay
            Weight decay of matrices.
        warmup_steps
            Steps of warm-up; a twentieth of all, at most 500, by default.
        gradient_clip_val
            Norm to which gradients are clipped.
        precision
            ``"bf16-mixed"`` computes in bfloat16 where that is safe; likelihoods stay in float32.
        compile
            Compile the module with :func:`torch.compile`; pays off in long runs only.
        checkpoint_dir
            Directory for checkpoints; needs ``scvi.settings.seed``. A checkpoint is written every
            ``checkpoint_minutes``, when SIGTERM or Ctrl-C ends the run (after the running step), and at the end; the
            last two are kept.
        checkpoint_minutes
            Time between checkpoints.
        resume
            ``"auto"`` continues the newest usable checkpoint of ``checkpoint_dir`` and starts fresh when there is none;
            a path continues that checkpoint, ours or one of a :class:`lightning.pytorch.callbacks.ModelCheckpoint`.
            With the same data and arguments the weights and :attr:`history` end bit-equal (on CPU) to those of a run
            that was never interrupted; a checkpoint of another run is refused.
        plan_kwargs
            Further arguments of :class:`~cellweave.train.CellweaveTrainingPlan`.
        datasplitter_kwargs
            Further arguments of :class:`~cellweave.data.CellSetSplitter`: ``by_context=False`` mixes the groups of
            ``context_key`` in training contexts, ``n_cells`` changes the context size.
        datamodule
            Source of batches in place of the data of the model, which then needs none: ``StackModel(registry=...)``. Its
            loaders give what those of :class:`~cellweave.data.CellSetLoader` give, with genes and batches as registered;
            arguments that concern the split have no effect.
        **trainer_kwargs
            Passed to :class:`scvi.train.Trainer`.

        Raises
        ------
        ValueError
            If the split leaves no training cells, options contradict each other, or a checkpoint cannot be used.
        RuntimeError
            If the loss stops being finite; the weights are those before the step.
        KeyboardInterrupt, SystemExit
            After Ctrl-C, and (with status 143) after SIGTERM. Weights, history and split are kept;
            :attr:`is_trained` tells whether any run has come to its end.
        """
        splitter = {"n_cells": self.module.n_cells, "split_by": split_by, **(datasplitter_kwargs or {})}
        plan = {"lr": lr, "weight_decay": weight_decay, "warmup_steps": warmup_steps, "compile": compile}
        trainer = {"gradient_clip_val": gradient_clip_val, "precision": precision, **trainer_kwargs}
        if "ckpt_path" in trainer:
            raise TypeError("`ckpt_path` is now `resume`, which takes the same path.")
        trainer |= {"checkpoint_dir": checkpoint_dir, "checkpoint_minutes": checkpoint_minutes, "resume": resume}
        self._fit(
            self._default_epochs(batch_size) if max_epochs is None else max_epochs,
            splitter=splitter,
            plan={**plan, **(plan_kwargs or {})},
            trainer=trainer,
            accelerator=accelerator,
            devices=devices,
            train_size=train_size,
            validation_size=validation_size,
            shuffle_set_split=shuffle_set_split,
            batch_size=batch_size,
            early_stopping=early_stopping,
            datamodule=datamodule,
            load_sparse_tensor=accelerator != "cpu" and torch.cuda.is_available(),
        )

    def _default_epochs(self, batch_size: int) -> int:
        steps_per_epoch = max(1.0, self.summary_stats.n_cells / batch_size)
        return int(np.clip(round(_TARGET_STEPS / steps_per_epoch), _MIN_EPOCHS, _MAX_EPOCHS))

    # ---------------------------------------------------------------- results

    def get_latent_representation(
        self,
        adata: AnnOrMuData | None = None,
        indices: Indices | None = None,
        batch_size: int | None = None,
        n_context_repeats: int = 1,
        return_spread: bool = False,
        n_cells: int | None = None,
        by_context: bool = True,
        contexts: ContextRule = "random",
        seed: int = 0,
        key_added: str | None = None,
        overwrite: bool = False,
    ) -> NDArray[np.float32] | tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Embedding of every cell in the context of others.

        Each cell is embedded once per assignment of cells to contexts. The result is in the order of the cells, does
        not depend on ``batch_size`` and is the same at every call with the same ``seed``; it does depend on which cells
        are given, because they are each other's context.

        Parameters
        ----------
        adata
            Data to embed; the data of the model by default. Genes are matched by name.
        indices
            Rows or mask of the cells; all by default.
        batch_size
            Cells per forward pass.
        n_context_repeats
            Number of context assignments (of seeds ``seed``, ``seed + 1``, ...) to average.
        return_spread
            Also return the standard deviation over the assignments.
        n_cells
            Cells per context; that of the model by default.
        by_context
            Draw contexts within the groups of ``context_key``; mix all cells otherwise.
        contexts
            ``"random"`` contexts, or ``"sequential"``: consecutive rows, as the published inference.
        seed
            Seed of the assignment.
        key_added
            Write the embedding to ``adata.obsm[key_added]``, usually ``"X_stack"`` (and its spread to
            ``key_added + "_sd"``), rows not in ``indices`` as NaN, and what produced it to
            ``adata.uns["cellweave"][key_added]``.
        overwrite
            Replace what is under ``key_added`` even if no StackModel wrote it.

        Returns
        -------
        float32 array ``(cell, n_hidden * token_dim)``; with ``return_spread`` a pair of them.

        Raises
        ------
        RuntimeError
            If the model is not trained.
        ValueError
            If there is no data, genes do not match, ``key_added`` is taken, or ``return_spread`` is asked of a single
            assignment.
        """
        if return_spread and n_context_repeats < 2:
            raise ValueError("`return_spread=True` needs `n_context_repeats` of at least 2.")
        spread_key = (f"{key_added}_sd",) if return_spread else ()
        place = self._result_place(adata, "obsm", key_added, *spread_key, overwrite=overwrite)
        n_cells = self.module.n_cells if n_cells is None else n_cells
        with self._registered(adata) as data:
            rows, order = self._rows(data, indices)
            mean, spread = self._over_contexts(
                data,
                rows,
                self._embed,
                n_cells=n_cells,
                batch_size=batch_size,
                seed=seed,
                rule=contexts,
                by_context=by_context,
                n_repeats=n_context_repeats,
                description="Embedding cells",
            )
        if place is not None:
            parameters = {"n_cells": n_cells, "contexts": contexts, "by_context": by_context, "seed": seed}
            results = zip(place.keys, (mean, spread), strict=False)
            values = {key: all_cells(result, rows, place.adata.n_obs) for key, result in results}
            place.write(values, {**parameters, "n_context_repeats": n_context_repeats})
        return (mean[order], spread[order]) if return_spread else mean[order]

    def get_normalized_expression(
        self,
        adata: AnnOrMuData | None = None,
        indices: Indices | None = None,
        gene_list: list[str] | None = None,
        library_size: float | Literal["observed"] = 1,
        transform_batch: str | None = None,
        batch_size: int | None = None,
        n_context_repeats: int = 1,
        seed: int = 0,
        return_numpy: bool = False,
        key_added: str | None = None,
        overwrite: bool = False,
    ) -> pd.DataFrame | NDArray[np.float32] | CellStore:
        """Denoised expression: the expected share of each gene in a cell, times a library size.

        Parameters
        ----------
        adata
            Data to denoise; the data of the model by default. Genes are matched by name.
        indices
            Rows or mask of the cells; all by default.
        gene_list
            Genes to return; all genes of the model by default.
        library_size
            Counts to which every cell is scaled, or ``"observed"`` for the library size of each cell.
        transform_batch
            Decode all cells as if they were of this batch; needs ``batch_condition``.
        batch_size
            Cells per forward pass.
        n_context_repeats
            Number of context assignments to average.
        seed
            Seed of the assignment.
        return_numpy
            Return an array in place of a frame.
        key_added
            Write the result to ``adata.layers[key_added]`` (usually ``"stack_normalized"``); genes the model does not
            know or that were not asked for, and cells not in ``indices``, are NaN. Of a
            :class:`~cellweave.io.CellStore` the layer is written to its zarr file while it is computed.
        overwrite
            Replace what is under ``key_added`` even if no StackModel wrote it.

        Returns
        -------
        Frame ``(cell, gene)`` with cell and gene names, or the float32 array. With ``key_added`` and a CellStore: the
        store, opened with the new layer in place of the counts.

        Raises
        ------
        ValueError
            If a gene or batch is unknown, ``library_size`` is not positive, or ``key_added`` is taken.
        """
        genes = self._gene_positions(gene_list)
        if library_size != "observed" and not (isinstance(library_size, int | float) and library_size > 0):
            raise ValueError(f"`library_size` must be positive or 'observed', got {library_size!r}.")
        batch_code = self._batch_code(transform_batch)
        place = self._result_place(adata, "layers", key_added, overwrite=overwrite)

        def compute(batch: dict[str, Any]) -> torch.Tensor:
            z, library = self._encode(batch)  # the encoder sees the batch that was observed
            batch_index = batch[REGISTRY_KEYS.BATCH]
            if batch_code is not None:
                batch_index = torch.full_like(batch_index, batch_code)
            where = torch.as_tensor(genes, device=z.device)
            out = self.module.decode(z.flatten(0, 1), library, batch_index, where)
            return out["px_rate"] if library_size == "observed" else out["px_scale"] * library_size

        parameters = {"library_size": library_size, "transform_batch": transform_batch, "seed": seed}
        parameters["n_context_repeats"] = n_context_repeats
        contexts: dict[str, Any] = {"n_cells": self.module.n_cells, "batch_size": batch_size, "seed": seed}
        with self._registered(adata) as data:
            rows, order = self._rows(data, indices)
            if place is not None and isinstance(place.holder, CellStore):
                if n_context_repeats > 1:
                    raise ValueError(
                        "`n_context_repeats` must be 1 for a layer on disk; leave `key_added` out to average."
                    )
                batches = self._computed(data, rows, compute, "Denoising cells", **contexts)
                names = self._names_in(place.holder)[genes]
                return self._to_layer(place.holder, place.keys[0], names, batches, parameters, overwrite)
            values, _ = self._over_contexts(
                data, rows, compute, n_repeats=n_context_repeats, description="Denoising cells", **contexts
            )
        target = self.adata if adata is None else adata
        if place is not None:
            layer = all_cells_and_genes(values, rows, self._names_in(place.holder)[genes], place.holder)
            place.write({place.keys[0]: layer}, parameters)
        values = values[order]
        return values if return_numpy else pd.DataFrame(values, target.obs_names[rows[order]], self.genes[genes])

    def get_attention(self, indices: Indices, adata: AnnOrMuData | None = None) -> NDArray[np.float32]:
        """Attention between cells that form one context.

        Parameters
        ----------
        indices
            Rows (each at most once) or mask of the cells of the context, in the wanted order.
        adata
            Data that holds them; the data of the model by default.

        Returns
        -------
        float32 array ``(layer, head, cell, cell)``; entry ``[..., i, j]`` is the weight that cell ``i`` gives to cell
        ``j``, and each row sums to one.

        Raises
        ------
        ValueError
            If a row is repeated or out of range.
        """
        with self._registered(adata) as data:
            rows, order = self._rows(data, indices)
            if len(order) != len(rows):
                raise ValueError("`indices` repeats a row; a context for attention holds each cell once.")
            manager = self.get_anndata_manager(data, required=True)
            batch = CellSetDataset(manager)[rows[order], np.ones(len(order), dtype=bool)]
            with torch.inference_mode():
                self.module.eval()
                x, batch_index = (batch[key].to(self.device) for key in (REGISTRY_KEYS.X, REGISTRY_KEYS.BATCH))
                maps = self.module.across_cell_maps(x, len(order), batch_index)
        return maps[0].float().cpu().numpy()

    # ---------------------------------------------------------------- pieces

    def _encode(
        self, batch: dict[str, Any], mask_genes: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.module.encode(
            batch[REGISTRY_KEYS.X], batch[LOADER_KEYS.N_CELLS], batch[REGISTRY_KEYS.BATCH], mask_genes
        )

    def _embed(self, batch: dict[str, Any]) -> torch.Tensor:
        return self._encode(batch)[0].flatten(0, 1)  # (cell, dim)

    def _names_in(self, holder: AnnData) -> NDArray[np.str_]:
        """Names of the genes of the model in ``holder``, where a version suffix may differ ``(gene,)``."""
        position = match_genes(holder.var_names.astype(str), pd.Index(self.genes))
        return np.where(position >= 0, holder.var_names.to_numpy().astype(str)[position], self.genes)

    def _batch_code(self, batch: str | None) -> int | None:
        if batch is None:
            return None
        if self.module.decoder_batch is None:
            raise ValueError("`transform_batch` needs a model with `batch_condition='decoder'` or 'both'.")
        fields = self.registry_[_compat.FIELD_REGISTRIES_KEY]
        known = fields[REGISTRY_KEYS.BATCH][_compat.STATE_REGISTRY_KEY]["categorical_mapping"].tolist()
        if batch not in known:
            raise ValueError(f"`transform_batch={batch!r}` is not a batch of the model; it knows {known}.")
        return known.index(batch)

    def _transfer_options(self) -> dict[str, Any]:
        # a model without batch condition never reads the batch, so data of new batches are welcome
        return {"extend_categories": self.module.decoder_batch is None}
