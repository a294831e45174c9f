"""Where flows start: noise that belongs to a cell, so that it does not depend on which cells are drawn together."""

from __future__ import annotations

import numpy as np
import torch
from torch import Generator, Tensor

__all__ = ["cell_generator", "cell_uniform", "gaussian_noise", "poisson_noise", "poisson_rate"]

# Smallest rate of the published noise.
_MIN_RATE = 1e-8


def cell_generator(seed: int, cell: int, stream: int = 0) -> Generator:
    """CPU generator of one cell; another seed, cell or stream gives unrelated draws.

    Parameters
    ----------
    seed
        Seed of all cells.
    cell
        Number of the cell, from 0.
    stream
        Number of the purpose, from 0.
    """
    # SeedSequence wants numbers that are not negative
    words = np.random.SeedSequence((seed % 2**64, cell, stream)).generate_state(1, np.uint64)
    return Generator().manual_seed(int(words[0] >> np.uint64(1)))


def cell_uniform(shape: tuple[int, ...], cells: Tensor, seed: int, stream: int = 0) -> Tensor:
    """Uniform numbers in [0, 1) on the CPU.

    Parameters
    ----------
    shape
        Shape of the numbers of one cell.
    cells
        Numbers of the cells ``(cell,)``; a cell has the same draws in any company.
    seed, stream
        See :func:`cell_generator`.

    Returns
    -------
    Tensor ``(cell, *shape)``.
    """
    out = torch.empty(len(cells), *shape)
    for row, cell in zip(out, cells.tolist(), strict=True):
        row.copy_(torch.rand(shape, generator=cell_generator(seed, cell, stream)))
    return out


def gaussian_noise(shape: tuple[int, ...], cells: Tensor, seed: int, stream: int = 0) -> Tensor:
    """Standard normal noise on the CPU.

    Parameters
    ----------
    shape
        Shape of the noise of one cell.
    cells
        Numbers of the cells ``(cell,)``; a cell has the same noise in any company.
    seed, stream
        See :func:`cell_generator`.

    Returns
    -------
    Tensor ``(cell, *shape)``.
    """
    out = torch.empty(len(cells), *shape)
    for row, cell in zip(out, cells.tolist(), strict=True):
        row.copy_(torch.randn(shape, generator=cell_generator(seed, cell, stream)))
    return out


def poisson_rate(control: Tensor, target_sum: float | None = 1e4, alpha: float = 0.8) -> Tensor:
    r"""Rates of Poisson noise that looks like the control cell.

    Parameters
    ----------
    control
        Log-normalised expression ``(cell, gene)``.
    target_sum
        The rates of a cell add up to this number; None multiplies :math:`e^x-1` by ``alpha`` instead.
    alpha
        That factor.

    Returns
    -------
    Tensor ``(cell, gene)``.

    Raises
    ------
    ValueError
        If ``target_sum`` is not positive: the published default of -1 makes all rates, and so the noise, zero.
    """
    base = control.expm1()
    if target_sum is None:
        return (alpha * base).clamp(min=_MIN_RATE)
    if target_sum <= 0:
        raise ValueError(f"`target_sum` must be positive, got {target_sum}; use None for no fixed sum.")
    return (base * (target_sum / (base.sum(-1, keepdim=True) + _MIN_RATE))).clamp(min=_MIN_RATE)


def poisson_noise(rate: Tensor, cells: Tensor, seed: int, stream: int = 0) -> Tensor:
    """``log1p`` of Poisson counts on the CPU.

    Parameters
    ----------
    rate
        Rates ``(cell, gene)``, see :func:`poisson_rate`.
    cells
        Numbers of the cells ``(cell,)``; a cell has the same noise in any company.
    seed, stream
        See :func:`cell_generator`.

    Returns
    -------
    Tensor ``(cell, gene)``.
    """
    rows = zip(rate.cpu(), cells.tolist(), strict=True)
    counts = [torch.poisson(row, generator=cell_generator(seed, cell, stream)) for row, cell in rows]
    return torch.stack(counts).log1p() if counts else torch.empty_like(rate, device="cpu")
