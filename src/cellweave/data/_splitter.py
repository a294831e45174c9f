"""Training and validation cells, and their loaders."""

from __future__ import annotations

import secrets
from typing import Any, Literal, Protocol

import numpy as np
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray
from scvi import settings
from scvi.data import AnnDataManager

from cellweave._keys import REGISTRY_KEYS
from cellweave._types import ContextRule

from ._loader import CellSetLoader, chosen_block_size
from ._rows import is_on_disk
from ._sampler import BUFFER_SIZE, block_labels

__all__ = ["CellSetSplitter", "split_cells"]


def split_cells(
    groups: NDArray[np.integer],
    train_size: float,
    validation_size: float,
    rng: _Permuter,
    split_by: Literal["cell", "context"] = "cell",
    block_size: int | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Split cells into training, validation and test rows.

    Parameters
    ----------
    groups
        Group of each cell ``(cell,)``.
    train_size, validation_size
        Shares of the cells (``split_by="cell"``) or of the groups (``"context"``); the rest is the test set.
    rng
        Source of the split.
    split_by
        Split cells at random, or keep every group whole.
    block_size
        With ``split_by="cell"``, keep this many neighbouring cells of a group together, so that each set can be read in
        long runs.

    Returns
    -------
    Sorted row positions of the three sets.
    """
    if split_by == "context":
        unit = np.unique(groups, return_inverse=True)[1]
    elif block_size is None:
        unit = np.arange(len(groups))
    else:
        by_group = np.argsort(groups, kind="stable")
        unit = np.empty(len(groups), dtype=np.int64)
        unit[by_group] = block_labels(groups[by_group], block_size)
    order = rng.permutation(unit.max() + 1)
    n_train = int(np.ceil(train_size * len(order)))
    n_val = min(len(order) - n_train, round(validation_size * len(order)))
    part = np.full(len(order), 2)
    part[order[:n_train]] = 0
    part[order[n_train : n_train + n_val]] = 1
    train, validation, test = (np.flatnonzero(part[unit] == p) for p in range(3))
    return train, validation, test


class CellSetSplitter(LightningDataModule):
    """Splits the cells of a registered object and gives loaders of contexts.

    The constructor takes what the training mixin of scvi-tools passes, plus the keyword arguments that concern
    contexts. Training contexts are drawn anew every epoch from (seed, epoch); validation contexts are fixed.

    Parameters
    ----------
    adata_manager
        Manager of the registered object.
    train_size
        Share of training cells; 0.9 by default.
    validation_size
        Share of validation cells; the rest by default.
    batch_size
        Cells per step.
    shuffle_set_split
        Split at random; in row order otherwise.
    distributed_sampler
        Share contexts among ranks; needs ``scvi.settings.seed``.
    load_sparse_tensor
        Keep sparse counts sparse until they are on the device.
    n_cells
        Cells per context.
    by_context
        Draw contexts within the groups of ``context_key``.
    rule
        How contexts are cut; see :func:`~cellweave.data.draw_contexts`.
    split_by
        ``"cell"`` splits cells, ``"context"`` whole groups of ``context_key``.
    block_size
        See :class:`CellSetLoader`. Blocks stay whole when more cells than ``buffer_size`` are split by cell.
    buffer_size
        Cells that are read together, when there are blocks.
    max_cells
        Training cells per epoch at most, others in every epoch; all by default.
    **loader_kwargs
        Passed to the loaders.

    Raises
    ------
    ValueError
        If a share is out of range, ``split_by`` is unknown, the training set is empty, or several processes would split without a seed.
    """

    def __init__(
        self,
        adata_manager: AnnDataManager,
        train_size: float | None = None,
        validation_size: float | None = None,
        batch_size: int = 512,
        shuffle_set_split: bool = True,
        distributed_sampler: bool = False,
        load_sparse_tensor: bool = False,
        *,
        n_cells: int,
        by_context: bool = True,
        rule: ContextRule = "random",
        split_by: Literal["cell", "context"] = "cell",
        block_size: int | Literal["auto"] | None = "auto",
        buffer_size: int = BUFFER_SIZE,
        max_cells: int | None = None,
        **loader_kwargs: Any,
    ) -> None:
        super().__init__()
        self.max_cells = max_cells
        if distributed_sampler and settings.seed is None:
            raise ValueError(
                "Training on several devices needs `scvi.settings.seed`: without it each process would split the cells differently."
            )
        if split_by not in ("cell", "context"):
            raise ValueError(f"`split_by` must be 'cell' or 'context', got {split_by!r}.")
        self.adata_manager = adata_manager
        self.seed = settings.seed if settings.seed is not None else secrets.randbits(32)
        self.train_size, validation_size = _check_sizes(train_size, validation_size)
        groups = _groups(adata_manager)
        if split_by == "context" and len(np.unique(groups)) < 2:
            raise ValueError("`split_by='context'` needs at least two groups; set `context_key` in `setup_anndata`.")
        rng = np.random.default_rng(self.seed) if shuffle_set_split else _InOrder()
        blocks = chosen_block_size(block_size, is_on_disk(adata_manager.get_from_registry(REGISTRY_KEYS.X)))
        self.train_idx, self.val_idx, self.test_idx = split_cells(
            groups if by_context or split_by == "context" else np.zeros_like(groups),
            self.train_size,
            validation_size,
            rng,
            split_by,
            blocks if len(groups) > buffer_size else None,
        )
        self.n_train, self.n_val = len(self.train_idx), len(self.val_idx)
        if self.n_train == 0:
            raise ValueError(f"`train_size={self.train_size}` leaves no training cell of {len(groups)}; raise it.")
        self.data_loader_kwargs = {
            "n_cells": n_cells,
            "batch_size": batch_size,
            "by_context": by_context,
            "rule": rule,
            "load_sparse_tensor": load_sparse_tensor,
            "distributed_sampler": distributed_sampler,
            "block_size": blocks,
            "buffer_size": buffer_size,
            "seed": self.seed,
            **loader_kwargs,
        }

    @property
    def registry(self) -> dict[str, Any]:
        """Registry of the data, from which a model without data is made: ``StackModel(registry=...)``."""
        return self.adata_manager.registry

    def train_dataloader(self) -> CellSetLoader:
        """Contexts of training cells, new ones every epoch."""
        return CellSetLoader(
            self.adata_manager, self.train_idx, shuffle=True, max_cells=self.max_cells, **self.data_loader_kwargs
        )

    def val_dataloader(self) -> CellSetLoader | list[Any]:
        """Fixed contexts of validation cells; an empty list when there are none."""
        return self._fixed(self.val_idx)

    def test_dataloader(self) -> CellSetLoader | list[Any]:
        """Fixed contexts of test cells; an empty list when there are none."""
        return self._fixed(self.test_idx)

    def _fixed(self, rows: NDArray[np.int64]) -> CellSetLoader | list[Any]:
        return CellSetLoader(self.adata_manager, rows, shuffle=False, **self.data_loader_kwargs) if len(rows) else []


def _groups(adata_manager: AnnDataManager) -> NDArray[np.integer]:
    """Context group of each cell ``(cell,)``; the same for all where the model has no contexts."""
    if REGISTRY_KEYS.CONTEXT not in adata_manager.data_registry:
        return np.zeros(adata_manager.adata.n_obs, dtype=np.int64)
    return np.asarray(adata_manager.get_from_registry(REGISTRY_KEYS.CONTEXT)).ravel()


class _Permuter(Protocol):
    """What a split needs of a random generator."""

    def permutation(self, n: int, /) -> NDArray[np.int64]: ...


class _InOrder:
    """Stands in for a generator where the split follows the row order."""

    def permutation(self, n: int, /) -> NDArray[np.int64]:
        return np.arange(n)


def _check_sizes(train_size: float | None, validation_size: float | None) -> tuple[float, float]:
    if train_size is None:
        train_size = 0.9 if validation_size is None else 1.0 - validation_size
    if validation_size is None:
        validation_size = 1.0 - train_size
    if not 0 < train_size <= 1 or not 0 <= validation_size < 1 or train_size + validation_size > 1 + 1e-9:
        raise ValueError(
            "`train_size` must be in (0, 1], `validation_size` in [0, 1), and their sum at most 1; got "
            f"{train_size} and {validation_size}."
        )
    return train_size, validation_size
