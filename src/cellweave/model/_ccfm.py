"""CascadedFlowModel: cells after a perturbation, by cascaded flow matching."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from anndata import AnnData
from numpy.typing import NDArray

from cellweave.data import FeatureEncoder, Pairing, PairSplitter, make_encoder
from cellweave.flow import TimeMode
from cellweave.module import CascadedFlowModule, FlowLayout, FlowOrigin, NoiseKind, Stage1Input
from cellweave.train import CellweaveTrainRunner, ExponentialMovingAverage

from ._base import CellweaveModel
from ._ccfm_anchors import anchor_table
from ._ccfm_calibration import CalibrationMixin, held_out_groups
from ._ccfm_import import FlowImportMixin
from ._ccfm_prediction import FlowPredictionMixin
from ._ccfm_representation import FlowRepresentationMixin
from ._ccfm_screen import ScreenMixin, check_representations
from ._setup_perturbation import PerturbationSetupMixin, read_split

__all__ = ["CascadedFlowModel"]

# Steps of an epoch: between two points of a curve, two validations, two looks at the clock of checkpoints.
_STEPS_PER_EPOCH = 50
# Few: what is left after a good start is soon learned, and then memorised.
_DEFAULT_STEPS = 300
# Heads of the interaction along the gene graph in the published network, whatever its other heads.
_SCDFM_HEADS = 8


class CascadedFlowModel(
    FlowPredictionMixin,
    FlowRepresentationMixin,
    CalibrationMixin,
    FlowImportMixin,
    ScreenMixin,
    PerturbationSetupMixin,
    CellweaveModel,
):
    """Predict the cells of a perturbation from control cells.

    Cells flow from where a simple prediction puts them (control cells, shifted as other contexts or other perturbations
    suggest) or from noise to where perturbed cells were measured, along the velocities of a network that is told the
    perturbation and the control cells: their mean in the context, or, from noise, one of them. Predictions follow the flow as
    far as groups that were left out of training support, see :attr:`trust`. With an encoder, features of the perturbed cell
    flow first, and the expression given them.

    Parameters
    ----------
    adata
        AnnData registered with :meth:`setup_anndata`.
    encoder
        Features of perturbed cells that are made first: ``"none"``, ``"pca"``, ``"obsm:KEY"``, a trained model with
        ``get_latent_representation``, a function of the expression, or a :class:`~cellweave.data.FeatureEncoder`. It is not
        saved: a loaded model predicts without it, but cannot train or embed cells.
    registry
        Registry of a saved model, used by :meth:`load` in place of data.
    n_hidden
        Width of a token.
    n_layers
        Blocks of the backbone.
    n_heads
        Heads of the attention; must divide ``n_hidden``.
    latent_dim
        Compress the features to this number of principal components; all are kept by default.
    bottleneck_dim
        Width of the bottleneck through which features enter.
    decoder_depth
        Blocks of the head of the features.
    gene_graph
        Which genes see each other when their vectors are made: ``"coexpression"`` of the training cells, a matrix ``(gene,
        gene)`` whose entries other than zero are links, or None.
    graph_top_k
        Genes that every gene is linked to by co-expression, at least.
    perturbation_reps
        Representations of single perturbations, one row each (fingerprints of drugs, embeddings of proteins), their names as
        index: what makes perturbations predictable that were not in the training cells.
    anchor
        Simple prediction from which the flow starts: a name in ``cellweave.stats.ANCHORS``, ``"auto"`` for the ones
        that did best on training groups that were left out in turn (and as much of their effect as did best), or None for
        control cells as they are. Not used with ``start="noise"``.
    start
        ``"control"`` flows from control cells, moved to the expected mean and share of zeros; ``"noise"`` from noise, as
        published.
    start_noise
        Standard deviation of the noise on the control cell, with ``start="control"``.
    choose_latent_p
        Probability that a cell teaches the features.
    latent_weight, mmd_weight
        Weights of the loss of the features and of the maximum mean discrepancy.
    latent_noise
        Expression is taught beside features at a time in ``[1 - latent_noise, 1]``: up to this far from finished.
    time_mode
        How times are drawn, see :class:`~cellweave.flow.CascadedTimes`.
    stage1_expression_input
        Expression beside which features are made: ``"noise"`` (the start of the flow) or ``"control"``.
    noise
        ``"gaussian"``, or with ``start="noise"`` also ``"poisson"``: counts at the rates of the control cell.
    adapter_residual
        Add the adapters of the perturbation to the stream; the published model replaces the stream by them.
    condition_dropout
        Share of cells whose perturbation is hidden in training, which ``guidance_scale`` needs.
    dropout
        Dropout rate while training.
    zero_gate
        Learn which genes of a cell are zero, and draw the zeros of predicted cells from that. With ``start="control"`` zeros
        come from the control cells; from noise, without a gate, a value is zero only where the flow ends below zero.
    layout
        ``"scdfm"`` is the published single-stream network with its own order of sums, adapters that replace the stream, single
        perturbations as the mean of their token and the token ``control``, and 8 heads along the gene graph, whatever the other
        arguments say; its checkpoints need it. It has no features, and is meant for ``anchor=None, start="noise"``.

    Examples
    --------
    >>> import cellweave as cw
    >>> cw.model.CascadedFlowModel.setup_anndata(adata, "perturbation", pairing_keys=["cell_type"])
    >>> model = cw.model.CascadedFlowModel(adata)
    >>> model.train()
    >>> pred = model.predict_perturbation(["STAT1", "STAT1+IRF1"])
    >>> cw.tl.evaluate_perturbation(pred, held_out, perturbation_key="perturbation", train=adata)

    References
    ----------
    scDFM, arXiv 2602.07103 (2026); Baade et al., *Latent forcing*, arXiv 2602.11401 (2026).

    See Also
    --------
    cellweave.module.CascadedFlowModule
    """

    _data_splitter_cls = PairSplitter  # type: ignore[assignment]

    def __init__(
        self,
        adata: AnnData | None = None,
        encoder: str | dict[str, Any] | FeatureEncoder | Any | None = "none",
        registry: dict[str, Any] | None = None,
        n_hidden: int = 32,
        n_layers: int = 1,
        n_heads: int = 2,
        latent_dim: int | None = None,
        bottleneck_dim: int = 128,
        decoder_depth: int = 2,
        gene_graph: str | NDArray | sp.spmatrix | None = "coexpression",
        graph_top_k: int = 30,
        perturbation_reps: pd.DataFrame | None = None,
        anchor: str | None = "auto",
        start: FlowOrigin = "control",
        start_noise: float = 0.0,
        choose_latent_p: float = 0.4,
        latent_weight: float = 1.0,
        mmd_weight: float = 0.5,
        latent_noise: float = 0.25,
        time_mode: TimeMode = "uniform",
        stage1_expression_input: Stage1Input = "noise",
        noise: NoiseKind = "gaussian",
        adapter_residual: bool = True,
        condition_dropout: float = 0.1,
        dropout: float = 0.0,
        zero_gate: bool = False,
        layout: FlowLayout = "ccfm",
    ) -> None:
        super().__init__(adata, registry)
        is_scdfm = layout == "scdfm"
        self._pad_with_control = is_scdfm
        study = None
        if adata is not None:
            reps = None if perturbation_reps is None else check_representations(perturbation_reps, self._names)
            represented = () if reps is None else reps.index.tolist()
            study = self._study(adata, make_encoder(encoder), latent_dim, gene_graph, graph_top_k, anchor, represented)
            study.facts["reps"] = [0, 0] if reps is None else list(reps.shape)
            self.registry_ = {**self.registry_, "screen": study.facts}
        facts, features = self._facts, self._facts["features"]
        n_tokens = self._tokens.n_tokens
        forbidden = np.zeros((n_tokens, n_tokens), dtype=bool) if study is None else study.forbidden
        self.module = CascadedFlowModule(
            n_tokens=n_tokens,
            n_latent=0 if features is None else features["dim"],
            latent_level="gene" if features is None else features["level"],
            forbidden=torch.from_numpy(forbidden) if facts["has_graph"] and forbidden is not None else None,
            n_hidden=n_hidden,
            n_layers=n_layers,
            n_heads=n_heads,
            bottleneck_dim=bottleneck_dim,
            decoder_depth=decoder_depth,
            dropout=dropout,
            adapter_residual=adapter_residual and not is_scdfm,
            layout=layout,
            encoder_heads=_SCDFM_HEADS if is_scdfm else None,
            perturbation_head=is_scdfm,
            start=start,
            start_noise=start_noise,
            zero_gate=zero_gate,
            time_mode=time_mode,
            choose_latent_p=choose_latent_p,
            latent_noise=0.0 if is_scdfm else latent_noise,
            latent_weight=latent_weight,
            mmd_weight=mmd_weight,
            noise=noise,
            stage1_expression_input=stage1_expression_input,
            condition_dropout=0.0 if is_scdfm else condition_dropout,
        )
        self.module.tell_more(
            described=tuple(facts["reps"]) if facts["reps"][0] else None,
            dosed=self._setup["dosage_key"] is not None,
            n_categories=self._covariate_sizes(),
        )
        self.module.anchors = anchor_table(facts)
        if study is not None:
            self._remember(study.evidence)
            if reps is not None:
                self._describe(reps)
        perturbation_reps = None  # kept with the weights
        encoder, gene_graph = facts["encoder"], "coexpression" if facts["has_graph"] else None
        self._model_summary_string = "CascadedFlowModel"
        self.init_params_ = self._get_init_params(locals())

    # ---------------------------------------------------------------- training

    def train(
        self,
        max_steps: int | None = None,
        max_epochs: int | None = None,
        accelerator: str = "auto",
        devices: int | list[int] | str = "auto",
        train_size: float | None = None,
        validation_size: float | None = None,
        shuffle_set_split: bool = True,
        batch_size: int = 64,
        n_conditions_per_step: int = 1,
        n_genes_per_step: int | None = 128,
        control_fraction: float = 0.2,
        pairing: Pairing = "ot",
        calibrate: bool = True,
        early_stopping: bool = False,
        lr: float = 1e-3,
        ema_decay: float | None = 0.99,
        precision: str = "32-true",
        compile: bool = False,
        checkpoint_dir: str | Path | None = None,
        checkpoint_minutes: float = 15.0,
        resume: Literal["auto"] | str | Path | None = None,
        plan_kwargs: dict[str, Any] | None = None,
        datasplitter_kwargs: dict[str, Any] | None = None,
        **trainer_kwargs: Any,
    ) -> None:
        """Train the model. Loss terms of every epoch are in :attr:`history`; an epoch is 50 steps.

        Parameters
        ----------
        max_steps
            Optimiser steps; 300 by default.
        max_epochs
            Epochs of 50 steps, instead of ``max_steps``.
        accelerator, devices
            As in scvi-tools and Lightning; ``"auto"`` uses one GPU where there is one.
        train_size, validation_size
            Shares of training and validation cells of every condition, 0.9 and 0.1 by default; the rest is the test set. All
            of them are in the means that flows start from: cells to test on must not be in the data, or be kept out by
            ``split_key``, which is used instead where it was given.
        shuffle_set_split
            Split at random; in row order otherwise.
        batch_size
            Perturbed cells per step.
        n_conditions_per_step
            Conditions per step, among which the cells are shared.
        n_genes_per_step
            Genes drawn for a step; all with None.
        control_fraction
            Share of the sets that are control cells beside control cells, which teaches what "no perturbation" means.
        pairing
            ``"ot"`` pairs control and perturbed cells of a set by optimal transport, so that paths do not cross; ``"random"``
            at random, as published.
        calibrate
            Leave some groups (a condition in a context) out of training, to measure with them how far predictions of others
            should follow the flow; see :attr:`trust`. Without, and with ``start="noise"``, they follow it all the way.
        early_stopping
            Stop when ``validation_loss`` no longer falls.
        lr
            Peak learning rate.
        ema_decay
            Decay of the moving average of the weights, which is what the trained model keeps; None keeps the last weights.
        precision
            ``"bf16-mixed"`` computes layers in bfloat16.
        compile
            Compile the module with :func:`torch.compile`.
        checkpoint_dir, checkpoint_minutes, resume
            As in :meth:`cellweave.model.StackModel.train`.
        plan_kwargs
            Further arguments of :class:`~cellweave.train.CellweaveTrainingPlan`.
        datasplitter_kwargs
            Further arguments of :class:`~cellweave.data.PairSplitter`.
        **trainer_kwargs
            Passed to :class:`scvi.train.Trainer`.

        Raises
        ------
        ValueError
            If the split leaves no training cells, options contradict each other, or a checkpoint cannot be used.
        RuntimeError
            If the loss stops being finite; the weights are those before the step.
        KeyboardInterrupt, SystemExit
            After Ctrl-C, and (with status 143) after SIGTERM. Weights, history and split are kept.
        """
        n_epochs, n_batches = _epochs(max_steps, max_epochs)
        _check_steps(batch_size, n_genes_per_step, control_fraction)
        self.module.n_genes_per_step = n_genes_per_step
        split_key = self._setup["split_key"]
        splitter: dict[str, Any] = {
            "n_sets": n_conditions_per_step,
            "n_batches": n_batches,
            "control_fraction": control_fraction,
            "pairing": pairing,
        }
        held_out = np.zeros(0, dtype=np.int64)
        if self.adata is not None:
            if calibrate and self.module.start == "control":
                held_out = held_out_groups(self._screen(), self._training_rows(self.adata))
            splitter |= {
                "tables": self._pair_tables(),
                "split": None if split_key is None else read_split(self.adata.obs, split_key),
                "held_out": held_out,
            }
        plan = {"lr": lr, "weight_decay": 0.0, "compile": compile}
        trainer = {"precision": precision, "gradient_clip_val": 1.0, **trainer_kwargs}
        trainer |= {"checkpoint_dir": checkpoint_dir, "checkpoint_minutes": checkpoint_minutes, "resume": resume}
        if ema_decay is not None:
            trainer["callbacks"] = [*(trainer.get("callbacks") or []), ExponentialMovingAverage(ema_decay)]
        self._fit(
            n_epochs,
            splitter={**splitter, **(datasplitter_kwargs or {})},
            plan={**plan, **(plan_kwargs or {})},
            trainer=trainer,
            accelerator=accelerator,
            devices=devices,
            train_size=train_size,
            validation_size=validation_size,
            shuffle_set_split=shuffle_set_split,
            batch_size=batch_size,
            early_stopping=early_stopping,
        )
        if calibrate:
            self._calibrate(held_out)

    def _run_fingerprint(self, runner: CellweaveTrainRunner) -> dict[str, str]:
        sampling = getattr(runner.data_splitter, "data_loader_kwargs", {})
        names = ("n_sets", "n_batches", "control_fraction")
        facts = {f"`{name}` of the pairs": str(sampling.get(name)) for name in names}
        facts |= {"`n_genes_per_step`": str(self.module.n_genes_per_step)}
        averages = [c.decay for c in runner.trainer.callbacks if isinstance(c, ExponentialMovingAverage)]
        facts |= {"`ema_decay`": str(averages or None)}
        facts |= {"`pairing`": str(getattr(runner.data_splitter, "pairing", None))}
        return {**super()._run_fingerprint(runner), **facts}


def _check_steps(batch_size: int, n_genes_per_step: int | None, control_fraction: float) -> None:
    for name, value in (("batch_size", batch_size), ("n_genes_per_step", n_genes_per_step)):
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}; choose a positive number.")
    if not 0 <= control_fraction < 1:
        raise ValueError(f"`control_fraction` must be in [0, 1), got {control_fraction}; choose a share.")


def _epochs(max_steps: int | None, max_epochs: int | None) -> tuple[int, int]:
    """Number of epochs, and steps of each."""
    if max_steps is not None and max_epochs is not None:
        raise ValueError("Both `max_steps` and `max_epochs` are given; an epoch is 50 steps, so give one of them.")
    for name, value in (("max_steps", max_steps), ("max_epochs", max_epochs)):
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}; choose a positive number.")
    if max_epochs is not None:
        return max_epochs, _STEPS_PER_EPOCH
    n_steps = _DEFAULT_STEPS if max_steps is None else max_steps
    n_epochs = -(-n_steps // _STEPS_PER_EPOCH)
    return n_epochs, -(-n_steps // n_epochs)
