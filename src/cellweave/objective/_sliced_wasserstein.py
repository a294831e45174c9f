from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Generator, Tensor

from cellweave._keys import STEP_KEYS

from ._base import Objective
from ._shared import normal_per_context, shared_mean

__all__ = ["SlicedWasserstein", "Slices", "draw_slices", "sliced_wasserstein"]

# Cells drawn per context for the comparison with the prior, as in the published Stack training.
_MIN_CELLS, _MAX_CELLS = 32, 128


class Slices(NamedTuple):
    """The random draws of one sliced-Wasserstein evaluation."""

    cells: Tensor  # (drawn cell,)
    prior: Tensor  # (context, drawn cell, dim)
    directions: Tensor  # (slice, dim), any length


@torch.compiler.disable  # a compiled draw of random size fails, and would not follow the seed of the eager one
def draw_slices(
    z: Tensor,
    n_proj: int,
    n_cells: int | None = None,
    generator: Generator | None = None,
    position: Tensor | None = None,
) -> Slices:
    """Draw cells, prior samples and directions for ``z`` of shape ``(context, cell, dim)``.

    Draws are made on the CPU generator, so that a seed means the same on every device.

    Parameters
    ----------
    z
        Embeddings ``(context, cell, dim)``.
    n_proj
        Number of directions.
    n_cells
        Cells to draw from each context. By default a random number from 32 to 128, limited by the context.
    generator
        Source of the draws.
    position
        Place of each context in the step ``(context,)``, on which its prior samples depend; their order by default.
    """
    n_contexts, n_available, dim = z.shape
    if n_cells is None:
        upper = min(_MAX_CELLS, n_available)
        lower = min(_MIN_CELLS, upper)
        n_cells = lower if lower == upper else int(torch.randint(lower, upper + 1, (1,), generator=generator))
    n_cells = min(max(n_cells, 1), n_available)
    cells = torch.randperm(n_available, generator=generator)[:n_cells]
    prior = normal_per_context(n_contexts, (n_cells, dim), position, generator)
    directions = torch.randn(n_proj, dim, generator=generator)
    return Slices(cells.to(z.device), prior.to(z), directions.to(z))


def sliced_wasserstein(z: Tensor, slices: Slices, weight: Tensor | None = None, total: Tensor | None = None) -> Tensor:
    r"""Squared sliced 2-Wasserstein distance between centred embeddings and a standard normal.

    .. math::
        \frac{1}{|\Omega|}\sum_{\omega}\frac1k\sum_{i=1}^{k}
        \left(\langle z-\bar z,\omega\rangle_{(i)}-\langle p,\omega\rangle_{(i)}\right)^2

    with :math:`(i)` the order statistics over the :math:`k` drawn cells of a context; averaged over contexts.

    Parameters
    ----------
    z
        Embeddings ``(context, cell, dim)``.
    slices
        The draws, from :func:`draw_slices`.
    weight
        Weights of the contexts ``(context,)``; all count the same by default.
    total
        Sum of the weights, where it is not that of ``weight``: see ``shared_mean``.

    References
    ----------
    Bonneel et al., *Sliced and Radon Wasserstein barycenters of measures* (2015); as used by Stack, Dong et al. (2026).
    """
    drawn = z[:, slices.cells]  # (context, k, dim)
    centred = drawn - drawn.mean(dim=1, keepdim=True)
    directions = torch.nn.functional.normalize(slices.directions, dim=1, eps=0).T  # (dim, slice)
    projected = (centred @ directions).sort(dim=1).values  # (context, k, slice)
    reference = (slices.prior @ directions).sort(dim=1).values
    distance = (projected - reference).square().mean((1, 2))  # (context,)
    return distance.mean() if weight is None else shared_mean(distance, weight, total)


class SlicedWasserstein(Objective):
    """Pull the centred embeddings of every context towards a standard normal.

    Parameters
    ----------
    weight
        Factor in the total loss.
    n_proj
        Number of random directions per evaluation.
    """

    name: ClassVar[str] = "sw_loss"
    requires: ClassVar[frozenset[str]] = frozenset({"z"})  # and "valid" where processes share a step

    def __init__(self, weight: float = 1.0, n_proj: int = 64) -> None:
        super().__init__(weight)
        self.n_proj = n_proj

    def __call__(self, outputs: Mapping[str, Tensor], generator: Generator | None = None) -> Tensor:
        z = outputs["z"].float() if outputs["z"].dtype == torch.bfloat16 else outputs["z"]
        total = outputs.get(STEP_KEYS.CONTEXTS_PER_PROCESS)
        if total is None:
            return sliced_wasserstein(z, draw_slices(z, self.n_proj, generator=generator))
        # contexts without a valid cell only make the processes even
        weight = outputs["valid"].view(z.shape[:2]).any(1).to(z)
        slices = draw_slices(z, self.n_proj, generator=generator, position=outputs[STEP_KEYS.POSITION])
        return sliced_wasserstein(z, slices, weight, total)
