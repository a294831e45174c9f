"""Strategies for models that do not fit on one device."""

from __future__ import annotations

import torch
from lightning.pytorch.strategies import FSDPStrategy

from cellweave.module import StackModule
from cellweave.nn import TabularAttentionLayer
from cellweave.train import fsdp_strategy


def test_published_size_can_be_planned_without_memory():
    """Protects the 217 M-parameter model: built on the meta device, and sharded by its nine attention layers."""
    with torch.device("meta"):
        module = StackModule(15_012, n_hidden=100, token_dim=16, n_cells=256, n_layers=9)
    assert sum(p.numel() for p in module.parameters()) == 217_484_712
    assert {p.device.type for p in module.parameters()} == {"meta"}
    policy = fsdp_strategy().kwargs["auto_wrap_policy"]
    wrapped = [m for m in module.modules() if policy(module=m, recurse=False, nonwrapped_numel=0)]
    assert wrapped == list(module.layers)


def test_layers_and_options_can_be_chosen():
    """Protects later families: other layers are wrapped, other options reach Lightning, defaults stay."""
    strategy = fsdp_strategy(torch.nn.Linear, state_dict_type="sharded", limit_all_gathers=False)
    assert type(strategy) is FSDPStrategy
    policy = strategy.kwargs["auto_wrap_policy"]
    assert policy(module=torch.nn.Linear(1, 1), recurse=False, nonwrapped_numel=0)
    assert not policy(module=TabularAttentionLayer(2, 2, 1), recurse=False, nonwrapped_numel=0)
    assert strategy.kwargs["limit_all_gathers"] is False
    assert strategy._state_dict_type == "sharded"
    assert fsdp_strategy()._state_dict_type == "full"
