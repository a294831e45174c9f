"""Strategies for models that do not fit on one device."""

from __future__ import annotations

import copy
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType
from torch.nn import Module

from cellweave.nn import TabularAttentionLayer

__all__ = ["Unshard", "fsdp_strategy"]


def fsdp_strategy(*layers: type[Module], **kwargs: Any) -> FSDPStrategy:
    """Fully sharded data parallel training, one shard group per layer and one for everything else.

    Parameters
    ----------
    *layers
        Classes of the layers that are gathered one at a time; the tabular attention layers of Stack by default.
    **kwargs
        Passed to :class:`lightning.pytorch.strategies.FSDPStrategy`, for instance ``cpu_offload=True``.

    Returns
    -------
    A strategy for ``model.train(devices=..., strategy=...)``.
    """
    options = {"auto_wrap_policy": set(layers or {TabularAttentionLayer}), "state_dict_type": "full"}
    return FSDPStrategy(**{**options, **kwargs})


class Unshard(Callback):
    """Gives every process the whole module back after training; FSDP leaves each with the shards of a wrapped one.

    Parameters
    ----------
    module
        The module before it is wrapped.
    """

    def __init__(self, module: Module) -> None:
        self._blank = copy.deepcopy(module).to("meta")
        self._weights: dict[str, Tensor] | None = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather the weights while the devices still hold them."""
        root = trainer.strategy.model
        if isinstance(root, FullyShardedDataParallel):
            # weights that are on the CPU already must be copied instead: torch 2.13 offloads them to freed memory
            offload = pl_module.device.type != "cpu"
            config = FullStateDictConfig(offload_to_cpu=offload, rank0_only=False)
            with FullyShardedDataParallel.state_dict_type(root, StateDictType.FULL_STATE_DICT, config):
                self._weights = root.state_dict()

    def whole(self, prefix: str) -> Module | None:
        """The module with the trained weights, whose names began with ``prefix``; None if it was not sharded."""
        if self._weights is None:
            return None
        weights, self._weights = self._weights, None
        module = self._blank.to_empty(device="cpu")
        module.load_state_dict({name.removeprefix(prefix): value for name, value in weights.items()})
        return module
