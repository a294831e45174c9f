"""ScyanModel: annotation of cells from a table of populations and markers."""

from __future__ import annotations

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
from cellweave.module import ScyanModule
from cellweave.nn import CovariateEncoder
from cellweave.objective import LabelCrossEntropy

from ._base import CellweaveModel
from ._scyan_annotation import AnnotationMixin
from ._scyan_diagnostics import DiagnosticsMixin
from ._scyan_expression import MarkerExpressionMixin
from ._setup_markers import MarkerSetupMixin

__all__ = ["ScyanModel"]

# Cells per step of large data, and steps per epoch that small data have at least.
_BATCH_SIZE, _LEAST_STEPS, _LEAST_BATCH = 8192, 16, 256


class ScyanModel(AnnotationMixin, MarkerExpressionMixin, DiagnosticsMixin, MarkerSetupMixin, CellweaveModel):
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
        Strength with which small populations are favoured in the epochs that use it, the smaller the stronger.
    temperature_period
        Of this many epochs the first does not use the temperature; 1 switches it off.
    covariate_scale
        Factor on covariates before they enter the networks.
    identity_init
        Start with latent equal to measured markers, which is more stable than the random start of the published model.
    label_weight
        Weight of the cells labelled in ``labels_key``.

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
        n_hidden_layers: int = 6,
        n_layers: int = 7,
        prior_std: float = 0.3,
        temperature: float = 0.5,
        temperature_period: int = 3,
        covariate_scale: float = 100.0,
        identity_init: bool = True,
        label_weight: float = 2.0,
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
        sets = self._label_sets() if label_weight > 0 else None
        self.module = ScyanModule(
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
        max_epochs: int = 100,
        accelerator: str = "auto",
        devices: int | list[int] | str = "auto",
        train_size: float | None = None,
        validation_size: float | None = None,
        shuffle_set_split: bool = True,
        batch_size: int | None = None,
        max_cells_per_epoch: int | None = 200_000,
        early_stopping: bool = True,
        early_stopping_patience: int = 1,
        early_stopping_min_delta: float = 1.0,
        lr: float = 5e-4,
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
            Passes over the training cells at most.
        accelerator, devices
            As in scvi-tools and Lightning; ``"auto"`` uses one GPU where there is one.
        train_size, validation_size
            Shares of training and validation cells, 0.9 and 0.1 by default; the rest is the test set.
        shuffle_set_split
            Split at random; in row order otherwise.
        batch_size
            Cells per step; 8,192 by default, fewer for small data so that an epoch has at least 16 steps of 256 cells.
        max_cells_per_epoch
            Cells per epoch at most, others in every epoch.
        early_stopping
            Stop when ``validation_loss`` no longer falls.
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
            batch_size=self._batch_size(train_size) if batch_size is None else batch_size,
            early_stopping=early_stopping,
        )
        self._warn_about_fit()

    def _batch_size(self, train_size: float | None) -> int:
        """Cells per step: equal steps, of which small data have enough."""
        n_cells = int(np.ceil(self.summary_stats.n_cells * (0.9 if train_size is None else train_size)))
        largest = min(_BATCH_SIZE, max(_LEAST_BATCH, -(-n_cells // _LEAST_STEPS)))
        return -(-n_cells // max(1, -(-n_cells // largest)))

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
        if self.module.label_sets is None or self.adata is None:
            return
        share = self._labelled_share()
        if share == 0:
            raise ValueError(
                f"`adata.obs[{self._setup['labels_key']!r}]` (`labels_key`) has no label, but the model learns from labels; "
                "label some cells, or make a model without `labels_key`."
            )
        for objective in self.module.objectives:
            if isinstance(objective, LabelCrossEntropy):
                objective.share = share
