"""From a registered screen to batches of perturbed cells beside control cells."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from scvi import settings
from scvi.data import AnnDataManager
from torch import Tensor
from torch.utils.data import DataLoader

from cellweave._keys import FLOW_KEYS, LOADER_KEYS, REGISTRY_KEYS

from ._loader import CellSetDataset
from ._pair_sampler import CellPairs, PairSampler
from ._screen import Screen
from ._splitter import _check_sizes

__all__ = ["GroupStarts", "PairDataset", "PairLoader", "PairSplitter", "PairTables", "Pairing", "pair_within_sets"]

Pairing = Literal["random", "ot"]

# Validation is a look at the curve, not a measurement: it must not cost as much as training.
_MOST_VALIDATION_STEPS = 5


class GroupStarts(NamedTuple):
    """Where the flows of control cells start, looked up by group."""

    transport: NDArray[np.float32]  # (row, 4, gene): how control cells are expected to move
    reference: NDArray[np.float32]  # (row, 2, gene): mean of the context's control cells, and its expected change
    row: NDArray[np.int64]  # (group,)


@dataclass(frozen=True)
class PairTables:
    """What a batch holds beyond expression, looked up by treatment, group or cell.

    Attributes
    ----------
    screen
        Treatments and contexts of the cells; a group is ``treatment * n_contexts + context``.
    genes
        Token of every gene ``(gene,)``.
    tokens
        Tokens of every treatment ``(treatment, slot)``, -1 where there is none.
    doses
        Their doses ``(treatment, slot)``; None without doses.
    starts
        Where the flows of groups start; None where they start from noise.
    features
        Gives the features of rows, ``(cell, latent)`` or ``(cell, gene, latent)``; None without.
    has_features
        Genes that have features ``(gene,)``; None where all have.
    """

    screen: Screen
    genes: NDArray[np.int64]
    tokens: NDArray[np.int64]
    doses: NDArray[np.float32] | None = None
    starts: GroupStarts | None = None
    features: Callable[[NDArray[np.int64]], NDArray[np.float32]] | None = None
    has_features: NDArray[np.bool_] | None = None


class PairDataset(CellSetDataset):
    """Batches of cell pairs.

    Parameters
    ----------
    adata_manager
        Manager of the registered object.
    tables
        What batches hold beyond expression.
    pairing
        ``"random"`` keeps the drawn pairs; ``"ot"`` pairs every set so that the squared distances add up to the least.
    n_cells
        Cells per set.
    load_sparse_tensor
        Give sparse expression as CSR tensors, to be densified on the device.

    Raises
    ------
    ValueError
        If ``pairing`` is unknown.
    """

    def __init__(
        self,
        adata_manager: AnnDataManager,
        tables: PairTables,
        pairing: Pairing = "random",
        n_cells: int = 1,
        load_sparse_tensor: bool = False,
    ) -> None:
        _check_pairing(pairing)
        super().__init__(adata_manager, load_sparse_tensor and pairing == "random")
        self.tables, self.pairing, self.n_cells = tables, pairing, n_cells
        self._genes, self._tokens = torch.from_numpy(tables.genes), torch.from_numpy(tables.tokens)

    def __getitem__(self, pairs: CellPairs) -> dict[str, Any]:  # type: ignore[override]
        """Batch of one step; see ``FLOW_KEYS``."""
        tables, (rows, controls, group) = self.tables, pairs
        batch = super().__getitem__((rows, np.ones(len(rows), dtype=bool)))
        control = self._expression(controls)
        if self.pairing == "ot":
            control = control[pair_within_sets(batch[REGISTRY_KEYS.X].numpy(), control.numpy(), self.n_cells)]
        treatment = group // len(tables.screen.contexts)
        batch |= {
            FLOW_KEYS.CONTROL: control,
            FLOW_KEYS.GENES: self._genes,
            FLOW_KEYS.PERTURBATION: self._tokens[treatment],
            FLOW_KEYS.CONDITION: torch.from_numpy(group),
            LOADER_KEYS.N_CELLS: self.n_cells,
        }
        if tables.doses is not None:
            batch[FLOW_KEYS.DOSE] = torch.from_numpy(tables.doses[treatment])
        if tables.starts is not None:
            row = tables.starts.row[group]
            batch[FLOW_KEYS.TRANSPORT] = torch.from_numpy(tables.starts.transport[row])
            batch[FLOW_KEYS.REFERENCE] = torch.from_numpy(tables.starts.reference[row])
        if tables.features is not None:
            batch[FLOW_KEYS.LATENT] = torch.from_numpy(tables.features(rows))
            if tables.has_features is not None:
                batch[FLOW_KEYS.HAS_LATENT] = torch.from_numpy(tables.has_features)
        return batch

    def _expression(self, rows: NDArray[np.int64]) -> Tensor:
        return super().__getitem__((rows, np.ones(len(rows), dtype=bool)))[REGISTRY_KEYS.X]


def pair_within_sets(target: NDArray[np.float32], control: NDArray[np.float32], n_cells: int) -> NDArray[np.int64]:
    """Control cell of each target cell such that the squared distances within every set add up to the least.

    Parameters
    ----------
    target, control
        Expression ``(cell, gene)``, set-major.
    n_cells
        Cells per set.

    Returns
    -------
    Rows of ``control`` ``(cell,)``.
    """
    out = np.empty(len(target), dtype=np.int64)
    for start in range(0, len(target), n_cells):
        part = slice(start, start + n_cells)
        rows, columns = linear_sum_assignment(cdist(target[part], control[part], "sqeuclidean"))
        out[start + rows] = start + columns
    return out


class PairLoader(DataLoader):
    """Batches of perturbed cells beside control cells; rows are set-major.

    Parameters
    ----------
    dataset
        The data.
    sampler
        Which cells meet in which step.
    **kwargs
        Passed to :class:`torch.utils.data.DataLoader`.
    """

    def __init__(self, dataset: PairDataset, sampler: PairSampler, **kwargs: Any) -> None:
        kwargs.setdefault("num_workers", settings.dl_num_workers)
        # without a generator of its own, every iterator would draw a number from the user's global one
        kwargs.setdefault("generator", torch.Generator().manual_seed(sampler.seed))
        super().__init__(dataset, sampler=sampler, batch_size=None, **kwargs)


class PairSplitter(LightningDataModule):
    """Splits the cells of a registered screen and gives loaders of cell pairs.

    Parameters
    ----------
    adata_manager
        Manager of the registered object.
    train_size
        Share of training cells; 0.9 by default.
    validation_size
        Share of validation cells; the rest by default.
    batch_size
        Perturbed cells per step.
    shuffle_set_split
        Split at random; in row order otherwise.
    distributed_sampler
        Share the sets of a step among ranks; needs ``scvi.settings.seed``.
    load_sparse_tensor
        Keep sparse expression sparse until it is on the device.
    tables
        What batches hold beyond expression.
    split
        Part of each cell, 0 training, 1 validation, 2 test ``(cell,)``, instead of a random split.
    held_out
        Groups all of whose cells are for validation.
    n_sets
        Conditions per step.
    n_batches
        Steps per epoch.
    control_fraction
        Share of the sets that are control cells.
    pairing
        See :class:`PairDataset`.
    **loader_kwargs
        Passed to the loaders.

    Raises
    ------
    ValueError
        If a share is out of range, a part has no cells to draw, or several processes would split without a seed.
    """

    def __init__(
        self,
        adata_manager: AnnDataManager,
        train_size: float | None = None,
        validation_size: float | None = None,
        batch_size: int = 48,
        shuffle_set_split: bool = True,
        distributed_sampler: bool = False,
        load_sparse_tensor: bool = False,
        *,
        tables: PairTables,
        split: NDArray[np.integer] | None = None,
        held_out: NDArray[np.integer] | None = None,
        n_sets: int = 1,
        n_batches: int = 100,
        control_fraction: float = 0.0,
        pairing: Pairing = "random",
        **loader_kwargs: Any,
    ) -> None:
        super().__init__()
        if distributed_sampler and settings.seed is None:
            raise ValueError(
                "Training on several devices needs `scvi.settings.seed`: without it each process would split the cells "
                "differently."
            )
        if batch_size < n_sets:
            raise ValueError(
                f"`batch_size={batch_size}` is below `n_conditions_per_step={n_sets}`; each of them needs at least one cell."
            )
        self.adata_manager, self.tables, self.pairing = adata_manager, tables, pairing
        self.seed = settings.seed if settings.seed is not None else secrets.randbits(32)
        part = self._split(train_size, validation_size, shuffle_set_split) if split is None else np.array(split)
        if held_out is not None:
            group = tables.screen.treatment * len(tables.screen.contexts) + tables.screen.context
            part[np.isin(group, held_out) & (part == 0)] = 1
        self.train_idx, self.val_idx, self.test_idx = (np.flatnonzero(part == p) for p in range(3))
        control = tables.screen.is_control
        self.n_train, self.n_val = len(self.train_idx), int((~control[self.val_idx]).sum())
        if self.n_train == 0:
            raise ValueError(f"The split leaves no training cell of {len(part)}; raise `train_size`.")
        # in a small set every cell is drawn about once
        self.n_val_batches = int(np.clip(-(-self.n_val // batch_size), 1, _MOST_VALIDATION_STEPS))
        self.data_loader_kwargs = {
            "n_sets": n_sets,
            "n_cells": batch_size // n_sets,
            "batch_size": batch_size,
            "n_batches": n_batches,
            "control_fraction": control_fraction,
            "distributed_sampler": distributed_sampler,
            "load_sparse_tensor": load_sparse_tensor,
            "seed": self.seed,
            **loader_kwargs,
        }
        # what cannot be drawn is refused here: an error inside Lightning leaves its changes to all loaders behind
        _check_pairing(pairing)
        self._sampler(self.train_idx, shuffle=True, n_batches=n_batches, options=self.data_loader_kwargs)

    def train_dataloader(self) -> PairLoader:
        """Pairs of training cells, drawn anew every epoch."""
        return self._loader(self.train_idx, shuffle=True, n_batches=self.data_loader_kwargs["n_batches"])

    def val_dataloader(self) -> PairLoader | list[Any]:
        """Fixed pairs of validation cells and any control cells seen in training; an empty list when there are none."""
        return self._held_out(self.val_idx)

    def test_dataloader(self) -> PairLoader | list[Any]:
        """Fixed pairs of test cells and any control cells; an empty list when there are none."""
        return self._held_out(self.test_idx)

    def _held_out(self, rows: NDArray[np.int64]) -> PairLoader | list[Any]:
        control = self.tables.screen.is_control
        perturbed = rows[~control[rows]]
        if len(perturbed) == 0:
            return []
        seen = np.union1d(self.train_idx, rows)
        return self._loader(
            np.union1d(perturbed, seen[control[seen]]),
            shuffle=False,
            n_batches=self.n_val_batches,
            control_fraction=0.0,
        )

    def _loader(self, rows: NDArray[np.int64], shuffle: bool, n_batches: int, **changed: Any) -> PairLoader:
        options = {**self.data_loader_kwargs, **changed}
        sampler, n_cells = self._sampler(rows, shuffle, n_batches, options), options["n_cells"]
        dataset = PairDataset(self.adata_manager, self.tables, self.pairing, n_cells, options["load_sparse_tensor"])
        others = {key: options[key] for key in options if key not in _SAMPLING}
        return PairLoader(dataset, sampler, **others)

    def _sampler(self, rows: NDArray[np.int64], shuffle: bool, n_batches: int, options: dict[str, Any]) -> PairSampler:
        screen = self.tables.screen
        return PairSampler(
            rows,
            screen.treatment[rows],
            screen.context[rows],
            n_contexts=len(screen.contexts),
            n_sets=options["n_sets"],
            n_cells=options["n_cells"],
            n_batches=n_batches,
            shuffle=shuffle,
            seed=options["seed"],
            control_fraction=options["control_fraction"],
            distributed=options["distributed_sampler"],
        )

    def _split(self, train_size: float | None, validation_size: float | None, shuffle: bool) -> NDArray[np.int64]:
        """Part of each cell; every group keeps the share of its cells, control cells of every context stay in training."""
        train_size, validation_size = _check_sizes(train_size, validation_size)
        screen = self.tables.screen
        n_cells = len(screen.treatment)
        key = np.random.default_rng(self.seed).random(n_cells) if shuffle else np.arange(n_cells)
        group = screen.treatment * len(screen.contexts) + screen.context
        order = np.lexsort((key, group))
        size = np.bincount(group)
        rank = np.empty(n_cells, dtype=np.int64)
        rank[order] = np.arange(n_cells) - np.repeat(np.cumsum(size) - size, size)
        # a group of one cell is for training
        n_train = np.maximum(np.ceil(train_size * size), 1)
        n_val = np.minimum(size - n_train, np.round(validation_size * size))
        return np.where(rank < n_train[group], 0, np.where(rank < (n_train + n_val)[group], 1, 2))


def _check_pairing(pairing: str) -> None:
    if pairing not in ("random", "ot"):
        raise ValueError(f"`pairing` must be 'random' or 'ot', got {pairing!r}; choose one of them.")


# Options of a loader that say which cells it draws.
_SAMPLING = (
    "n_sets",
    "n_cells",
    "batch_size",
    "n_batches",
    "control_fraction",
    "distributed_sampler",
    "load_sparse_tensor",
    "seed",
)
