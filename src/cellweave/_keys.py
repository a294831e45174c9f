"""Every string key that crosses a room of the package: what loaders put in a batch, where results are written."""

from __future__ import annotations

from typing import Final, NamedTuple

__all__ = ["FLOW_KEYS", "LOADER_KEYS", "OUTPUT_KEYS", "REGISTRY_KEYS", "STEP_KEYS"]


class _RegistryKeys(NamedTuple):
    """Keys under which setup methods register data."""

    X: str = "X"
    BATCH: str = "batch"
    LABELS: str = "labels"
    PERTURBATION: str = "perturbation_label"  # codes of the labels of conditions
    CONTEXT: str = "context"
    CATEGORIES: str = "extra_categorical_covs"  # int64 (cell, column): codes of categorical covariates
    CONTINUOUS: str = "extra_continuous_covs"  # float (cell, column): continuous covariates
    COVARIATES: str = "covariates"  # float (cell, covariate): one-hot categories, then standardised columns
    MEASURED: str = "measured"  # (cell, gene): 0 where a marker was not measured


class _LoaderKeys(NamedTuple):
    """Keys that set-of-cells loaders add to the registered tensors of a batch."""

    ROW: str = "row"  # int64 (cell,): position of the cell in the AnnData
    VALID: str = "valid"  # bool (cell,): false for cells that only fill up a context
    N_CELLS: str = "n_cells"  # int: cells per context; rows are set-major
    N_VALID: str = "n_valid"  # int: number of valid cells, known without asking the device
    MASK_GENES: str = "mask_genes"  # int64 (masked gene,): fixes the masked genes instead of drawing them


class _StepKeys(NamedTuple):
    """Keys that the training plan adds to a batch, so that a step means the same on any number of processes."""

    SEED: str = "seed"  # int64 () on the CPU: seed of the draws of this step, the same in all processes
    # only where several processes share a step:
    POSITION: str = "position"  # int64 (context,) on the CPU: place of each context among those of all processes
    CELLS_PER_PROCESS: str = "cells_per_process"  # float (): valid cells of the step, averaged over processes
    CONTEXTS_PER_PROCESS: str = "contexts_per_process"  # float (): contexts with a valid cell, averaged likewise


class _FlowKeys(NamedTuple):
    """Keys of a batch of a model that turns control cells into perturbed ones; ``X`` holds the perturbed cells."""

    CONTROL: str = "control"  # float (cell, gene): expression of the control cell paired with each cell
    PERTURBATION: str = "perturbation"  # int64 (cell, slot): tokens or labels of the perturbation, negative for none
    REFERENCE: str = "reference"  # float (cell, 2, gene): mean of the context's control cells, and its expected change
    GENES: str = "genes"  # int64 (gene,): token of every gene
    LATENT: str = "latent"  # float (cell, gene, latent) or (cell, latent): features of the perturbed cell
    HAS_LATENT: str = "has_latent"  # bool (gene,) or (cell, gene): false for genes without features
    CONDITION: str = "condition"  # int64 (cell,): which cells are compared as one distribution
    ANCHOR: str = "anchor"  # float (cell, gene): expected change, from where a flow from control cells starts
    TRANSPORT: str = (
        "transport"  # float (cell, 4, gene): how control cells are expected to move, which gives the anchor
    )
    DOSE: str = "dose"  # float (cell, slot): doses of the perturbation, positive where there is one


class _OutputKeys(NamedTuple):
    """Places in the user's AnnData that every model writes to."""

    PROVENANCE: str = "cellweave"  # uns
    TRANSFORMS: str = "cellweave_transforms"  # uns: steps that intensities went through, per layer


REGISTRY_KEYS: Final = _RegistryKeys()
LOADER_KEYS: Final = _LoaderKeys()
STEP_KEYS: Final = _StepKeys()
FLOW_KEYS: Final = _FlowKeys()
OUTPUT_KEYS: Final = _OutputKeys()
