"""Draws and means that do not depend on how many processes share a step.

Processes that train together each see a part of the contexts of a step. The loss and its random numbers are still those
of one process that sees all of them:

- every draw that concerns the whole step comes from a generator with the same state in all processes;
- every draw that concerns one context depends on the place of that context in the step, not on its process;
- every mean divides by the number of units per process, averaged over processes, so that the average of the processes'
  values (and of their gradients, which is what ``ddp`` takes) is the mean over all units of the step.

The training plan puts what this needs into the batch, see ``STEP_KEYS``; without it the batch is the whole step.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from typing import Any

import torch
from torch import Generator, Tensor

from cellweave._keys import STEP_KEYS

__all__ = ["derive_seed", "normal_per_context", "shared_mean", "step_generator", "step_outputs"]


def derive_seed(*numbers: int) -> int:
    """A 63-bit seed from any integers; sequences that differ anywhere give unrelated seeds."""
    words = struct.pack(f"<{len(numbers)}Q", *(number % 2**64 for number in numbers))
    return int.from_bytes(hashlib.blake2b(words, digest_size=8).digest(), "little") >> 1


@torch.compiler.disable  # the seed differs in every step and must not become a constant of compiled code
def step_generator(tensors: Mapping[str, Any], stream: int) -> Generator | None:
    """Generator of the draws of a step, the same in all processes; the global one (None) if the batch has no seed.

    Parameters
    ----------
    tensors
        The batch.
    stream
        Number of the purpose; draws of two streams are independent.
    """
    seed = tensors.get(STEP_KEYS.SEED)
    return None if seed is None else Generator().manual_seed(derive_seed(int(seed), stream))


def step_outputs(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    """What objectives need of the batch to give the same loss on any number of processes; empty on one process."""
    keys = (STEP_KEYS.POSITION, STEP_KEYS.CELLS_PER_PROCESS, STEP_KEYS.CONTEXTS_PER_PROCESS)
    return {key: tensors[key] for key in keys if key in tensors}


def shared_mean(values: Tensor, weight: Tensor, total: Tensor | None = None) -> Tensor:
    """Weighted mean, or its share of one process.

    Parameters
    ----------
    values
        Any shape.
    weight
        Weights of the same shape, for instance 1 for valid cells and 0 for others.
    total
        Sum of the weights per process, averaged over processes; the sum of ``weight``, at least 1, by default.
    """
    total = weight.sum().clamp(min=1) if total is None else total
    return (values * weight).sum() / total


def normal_per_context(
    n_contexts: int, shape: tuple[int, ...], position: Tensor | None = None, generator: Generator | None = None
) -> Tensor:
    """Standard normal draws ``(context, *shape)`` on the CPU; those of a context depend on its place in the step only.

    Parameters
    ----------
    n_contexts
        Number of contexts of this process.
    shape
        Shape of the draws of one context.
    position
        Place of each context in the step ``(context,)``; their order by default.
    generator
        Source of the draws, in the same state in all processes.
    """
    seed = int(torch.randint(2**62, (), generator=generator))
    places = range(n_contexts) if position is None else position.tolist()
    draws = [torch.randn(shape, generator=Generator().manual_seed(derive_seed(seed, place))) for place in places]
    return torch.stack(draws) if draws else torch.empty(0, *shape)
