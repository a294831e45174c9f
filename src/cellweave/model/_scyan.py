"""ScyanModel: annotation of cells from a table of populations and markers."""

from __future__ import annotations

from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from cellweave._keys import REGISTRY_KEYS
from cellweave._types import AnnOrMuData
from cellweave.data import check_groups, check_intensities, check_known
from cellweave.io import MarkerTable
from cellweave.module import ScyanEnsemble, ScyanModule
from cellweave.nn import CovariateEncoder

from ._base import CellweaveModel
from ._scyan_annotation import AnnotationMixin
from ._scyan_diagnostics import DiagnosticsMixin
from ._scyan_expression import MarkerExpressionMixin
from ._scyan_import import ScyanImportMixin
from ._setup_markers import MarkerSetupMixin

__all__ = ["ScyanModel"]

# Cells per step are chosen so that an epoch has this many steps, within these bounds.
_STEPS_PER_EPOCH, _LEAST_BATCH, _LARGEST_BATCH = 40, 128, 8192
# Optimiser steps that the default number of epochs aims at.
_TARGET_STEPS = 520


class ScyanModel(
    AnnotationMixin, MarkerExpressionMixin, DiagnosticsMixin, ScyanImportMixin, MarkerSetupMixin, CellweaveModel
):
    """Annotate cells from a table that says which populations express which markers.

    An invertible network maps measured markers to latent markers, which are distributed as the table says: around -1 where a
    population does not express a marker, around 1 where it does, anywhere in between where nothing is known. Batch and
    other covariates enter the network, so that the latent markers are free of them. It is an independent implementation of
    the published Scyan.

    Parameters
    ----------
    adata
        AnnData or MuData registered with :meth:`setup_anndata` or :meth:`setup_mudata`.
    table
        Knowledge table: populations as rows, markers (named as in ``adata.var_names``) as columns, -1 negative, 1
        positive, empty for unknown. A frame, the path of a CSV file, or a :class:`~cellweave.io.MarkerTable`.
    registry
        Registry of a saved model, used by :meth:`load` in place of data.
    continuum_markers
        Markers without separate negative and positive cells; -1 and 1 then mean lower and higher.
    n_hidden
        Width of the hidden layers of the networks.
    n_hidden_layers
        Hidden layers of every network.
    n_layers
        Coupling layers.
    prior_std
        Standard deviation of latent markers around their modes.
    temperature
        Strength with which small populations are favoured in epochs that use it, the smaller the stronger.
    temperature_period
        Of this many epochs the first does not use the temperature and the others do (the published model has 3); 1 switches it
        off.
    covariate_scale
        Factor on covariates before they enter the networks.
    identity_init
        Start with latent equal to measured markers, which is more stable than the random start of the published model.
    monotone_weight
        Weight of a penalty on latent markers that do not rise with the measured ones; the published model has none.
    weight_prior
        Weight of a prior of the population weights, which keeps small populations alive: cells of equal shares that are
        added in thought, as a multiple of the data. The published model has none, and uses the temperature instead.
    label_weight
        Weight of the cells labelled in ``labels_key``.
    n_ensemble
        Number of networks that differ by their random start and are trained side by side. Probabilities and latent markers
        are means over them, more accurate and less dependent on the seed, for that many times the work.

    Examples
    --------
    >>> import cellweave as cw
    >>> cw.model.ScyanModel.setup_anndata(adata, batch_key="sample")
    >>> model = cw.model.ScyanModel(adata, "table.csv")
    >>> model.train()
    >>> model.predict(key_added="scyan_population")
    >>> adata.obsm["X_scyan"] = model.get_latent_representation()

    References
    ----------
    Blampey et al., *A biology-driven deep generative model for cell-type annotation in cytometry*, Briefings in
    Bioinformatics, bbad260 (2023).

    See Also
    --------
    cellweave.module.ScyanModule
    """

    def __init__(
        self,
        adata: AnnOrMuData | None = None,
        table: pd.DataFrame | str | PathLike | dict[str, Any] | MarkerTable | None = None,
        registry: dict[str, Any] | None = None,
        continuum_markers: list[str] | None = None,
        n_hidden: int = 16,
        n_hidden_layers: int = 2,
        n_layers: int = 7,
        prior_std: float = 0.3,
        temperature: float = 0.5,
        temperature_period: int = 1,
        covariate_scale: float = 100.0,
        identity_init: bool = True,
        monotone_weight: float = 100.0,
        weight_prior: float = 1.0,
        label_weight: float = 2.0,
        n_ensemble: int = 1,
    ) -> None:
        super().__init__(adata, registry)
        if table is None:
            raise ValueError("`table` is missing; give the table of populations and markers, a frame or a CSV file.")
        self.table = MarkerTable.parse(table)
        table = self.table.to_dict()  # what is saved with the model
        continuum = self._continuum(continuum_markers)
        if adata is not None:
            setup = self._setup
            check_intensities(self._gene_data(adata), self.table.markers, setup["layer"], setup["nan_layer"])
            self._warn_about_table()
        sets = self._label_sets() if label_weight > 0 else None
        if not isinstance(n_ensemble, int) or n_ensemble < 1:
            raise ValueError(f"`n_ensemble` must be a positive integer, got {n_ensemble!r}; 1 trains a single network.")
        create = ScyanModule if n_ensemble == 1 else partial(ScyanEnsemble, n_ensemble)
        self.module = create(
            rho=torch.tensor(self.table.rho.tolist(), dtype=torch.float32),
            continuum=torch.as_tensor(continuum),
            covariates=self._covariate_encoder(),
            n_hidden=n_hidden,
            n_hidden_layers=n_hidden_layers,
            n_layers=n_layers,
            prior_std=prior_std,
            temperature=temperature,
            temperature_period=temperature_period,
            covariate_scale=covariate_scale,
            identity_init=identity_init,
            monotone_weight=monotone_weight,
            weight_prior=weight_prior,
            has_missing=self._setup["nan_layer"] is not None,
        )
        if sets is not None:
            self.module.use_labels(sets, label_weight, self._labelled_share())
        self._model_summary_string = "ScyanModel"
        self.init_params_ = self._get_init_params(locals())

    def __repr__(self) -> str:
        data = "no data attached" if self.adata is None else f"{self.adata.n_obs} cells"
        n_parameters = sum(p.numel() for p in self.module.parameters())
        state = "trained" if self.is_trained else "not trained"
        return f"ScyanModel({self.table!r})\n  data: {data}; parameters: {n_parameters:,}; {state}"

    @property
    def populations(self) -> list[str]:
        """Names of the populations, in the order of the table."""
        return list(self.table.populations)

    @property
    def population_weights(self) -> pd.Series:
        """Share of each population that the model learned, summing to one."""
        weights = self.module.population_weights.cpu().numpy()
        return pd.Series(weights, index=pd.Index(self.populations, name="population"), name="weight")

    # ---------------------------------------------------------------- training

    def train(
        self,
        max_epochs: int | None = None,
        accelerator: str = "auto",
        devices: int | list[int] | str = "auto",
        train_size: float | None = None,
        validation_size: float | None = None,
        shuffle_set_split: bool = True,
        batch_size: int | None = None,
        max_cells_per_epoch: int | None = 200_000,
        early_stopping: bool = False,
        early_stopping_patience: int = 3,
        early_stopping_min_delta: float = 0.1,
        lr: float = 1e-3,
        precision: str = "32-true",
        compile: bool = False,
        checkpoint_dir: str | Path | None = None,
        checkpoint_minutes: float = 15.0,
        resume: Literal["auto"] | str | Path | None = None,
        plan_kwargs: dict[str, Any] | None = None,
        datasplitter_kwargs: dict[str, Any] | None = None,
        **trainer_kwargs: Any,
    ) -> None:
        """Train the model. Loss terms of every epoch are in :attr:`history`.

        The held-out cells are scored once per temperature cycle and always without temperature, so that early stopping
        compares like with like. After training, populations without cells and latent markers that do not follow the
        measured ones are named in a warning; see :meth:`get_marker_diagnostics` and :meth:`get_population_diagnostics`.

        Parameters
        ----------
        max_epochs
            Passes over the training cells; by default as many as give about 520 steps.
        accelerator, devices
            As in scvi-tools and Lightning; ``"auto"`` uses one GPU where there is one.
        train_size, validation_size
            Shares of training and validation cells, 0.9 and 0.1 by default; the rest is the test set.
        shuffle_set_split
            Split at random; in row order otherwise.
        batch_size
            Cells per step; by default as many as give 40 steps per epoch, from 128 to 8,192.
        max_cells_per_epoch
            Cells per epoch at most, others in every epoch.
        early_stopping
            Stop when ``validation_loss`` no longer falls. Off by default: a number of steps is what was found best for labels,
            which get worse again while the likelihood still improves.
        early_stopping_patience
            Temperature cycles without improvement after which training stops.
        early_stopping_min_delta
            Improvement, in nats per cell, that counts.
        lr
            Learning rate of Adam.
        precision
            ``"bf16-mixed"`` computes networks in bfloat16; likelihoods stay in float32.
        compile
            Compile the module with :func:`torch.compile`.
        checkpoint_dir, checkpoint_minutes, resume
            As in :meth:`cellweave.model.StackModel.train`.
        plan_kwargs
            Further arguments of :class:`~cellweave.train.CellweaveTrainingPlan`.
        datasplitter_kwargs
            Further arguments of :class:`~cellweave.data.CellSetSplitter`.
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
        self._check_labels()
        batch_size, max_epochs = self._steps(batch_size, max_epochs, train_size, max_cells_per_epoch)
        columns = {} if self.adata is None else self._loader_options(self.adata)
        splitter = {"n_cells": 1, "by_context": False, "max_cells": max_cells_per_epoch, **columns}
        plan = {"lr": lr, "weight_decay": 0.0, "schedule": "constant", "warmup_steps": 0, "compile": compile}
        trainer = {
            "precision": precision,
            "check_val_every_n_epoch": min(self.module.temperature_period, max_epochs),
            "early_stopping_patience": early_stopping_patience,
            "early_stopping_min_delta": early_stopping_min_delta,
            **trainer_kwargs,
        }
        trainer |= {"checkpoint_dir": checkpoint_dir, "checkpoint_minutes": checkpoint_minutes, "resume": resume}
        self._fit(
            max_epochs,
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
        self._warn_about_fit()

    def _steps(
        self, batch_size: int | None, max_epochs: int | None, train_size: float | None, max_cells: int | None
    ) -> tuple[int, int]:
        """Cells per step, so that all steps of an epoch are about equal, and number of epochs."""
        n_cells = int(np.ceil(self.summary_stats.n_cells * (0.9 if train_size is None else train_size)))
        n_cells = min(n_cells, n_cells if max_cells is None else max_cells)
        if batch_size is None:
            largest = int(np.clip(-(-n_cells // _STEPS_PER_EPOCH), _LEAST_BATCH, _LARGEST_BATCH))
            batch_size = -(-n_cells // -(-n_cells // largest))
        if max_epochs is None:
            max_epochs = -(-_TARGET_STEPS // -(-n_cells // batch_size))
        return batch_size, max_epochs

    # ---------------------------------------------------------------- pieces

    def _continuum(self, names: list[str] | None) -> NDArray[np.bool_]:
        unknown = [name for name in names or () if name not in self.table.markers]
        if unknown:
            raise ValueError(
                f"`continuum_markers` names {len(unknown)} marker(s) that the table does not have (first: {unknown[0]!r}); "
                f"it has {list(self.table.markers)}."
            )
        return np.isin(self.table.markers, names or [])

    def _covariate_encoder(self) -> CovariateEncoder | None:
        """Covariates as the setup names them; None without any."""
        numbers = self._setup["continuous_covariate_keys"] or ()
        sizes = [len(values) for values in self._covariate_categories().values()]
        if not sizes and not numbers:
            return None
        encoder = CovariateEncoder(sizes, len(numbers))
        if numbers and self.adata is not None:
            values = np.asarray(self.adata_manager.get_from_registry(REGISTRY_KEYS.CONTINUOUS), dtype=np.float32)
            encoder.standardize(torch.from_numpy(values))
        return encoder

    def _label_sets(self) -> torch.Tensor | None:
        """Populations that each label allows, bool ``(label, population)``; None without any label."""
        key, blank = self._setup["labels_key"], self._setup["unlabeled_category"]
        names = [] if key is None else self._categories(REGISTRY_KEYS.LABELS)
        known = {*self.table.populations, *(group for groups in self.table.levels.values() for group in groups)}
        strange = [name for name in names if name not in known and name != blank]
        if strange:
            raise ValueError(
                f"`adata.obs[{key!r}]` (`labels_key`) has {len(strange)} label(s) that are neither a population nor a group of "
                f"the table (first: {strange[0]!r}); rename them, or give cells without a label the value {blank!r}."
            )
        if all(name == blank for name in names):
            return None
        everything = [True] * len(self.table.populations)
        return torch.tensor([everything if n == blank else self.table.members_of(n).tolist() for n in names])

    def _labelled_share(self) -> float:
        """Share of cells with a label; without data, 1 until there are some to train on."""
        if self.adata is None:
            return 1.0
        labels = self._labels()
        return float((labels != self._setup["unlabeled_category"]).mean())

    def _labels(self) -> pd.Series:
        """Labels of the data of the model."""
        modality = (self._setup.get("modalities") or {}).get("labels_key")
        obs = (self.adata if modality is None else self.adata.mod[modality]).obs
        key = self._setup["labels_key"]
        check_groups(obs, key, "labels_key")
        check_known(obs, key, "labels_key", np.asarray(self._categories(REGISTRY_KEYS.LABELS)))
        return obs[key]

    def _check_labels(self) -> None:
        """Labels of the data to train on, which after loading may be others than the model was made with."""
        if not self.module.uses_labels or self.adata is None:
            return
        share = self._labelled_share()
        if share == 0:
            raise ValueError(
                f"`adata.obs[{self._setup['labels_key']!r}]` (`labels_key`) has no label, but the model learns from labels; "
                "label some cells, or make a model without `labels_key`."
            )
        self.module.set_label_share(share)
