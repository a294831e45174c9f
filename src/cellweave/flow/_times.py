"""At which times the two streams of a cascaded flow are trained and sampled."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Generator, Tensor

__all__ = ["CascadedTimes", "FlowTimes", "TimeMode", "cascade_grids", "shift_time", "time_grid"]

TimeMode = Literal["uniform", "cascaded", "shifted_independent", "shifted_aligned"]
_MODES = ("uniform", "cascaded", "shifted_independent", "shifted_aligned")
# Draws of a cell per mode; noised latents need one more.
_N_DRAWS = {"uniform": 3, "cascaded": 5, "shifted_independent": 2, "shifted_aligned": 3}

# Logit-normal times (mean, standard deviation) and the share of early times, as published by LatentForcing.
_LATENT_LOGIT, _EXPRESSION_LOGIT = (-1.2, 1.0), (-0.4, 0.8)
_EARLY_SHARE, _EARLY_END = 0.1, 0.5


class FlowTimes(NamedTuple):
    """Times and loss weights of the two streams, each ``(cell,)``."""

    t_expr: Tensor
    t_latent: Tensor
    w_expr: Tensor
    w_latent: Tensor


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Times in [0, 1] moved up (``shift`` > 1) or down with both ends fixed: ``shift t / (1 + (shift - 1) t)``."""
    return shift * t / (1 + (shift - 1) * t)


def time_grid(n_points: int, shift: float = 1.0) -> Tensor:
    """Times from 0 to 1 at which a solver stops, ``(n_points,)`` in float64.

    Parameters
    ----------
    n_points
        Number of times; the solver takes one step less.
    shift
        See :func:`shift_time`; below 1 the steps are small at first.

    Raises
    ------
    ValueError
        If there are fewer than two times.
    """
    if n_points < 2:
        raise ValueError(f"`n_points` must be at least 2, got {n_points}; a solver needs a start and an end.")
    return shift_time(torch.linspace(0, 1, n_points, dtype=torch.float64), shift)


def cascade_grids(n_steps: int, latent_shift: float = 1.0) -> tuple[Tensor, Tensor]:
    """One schedule for both streams: first the latent goes from 0 to 1, then the expression.

    Parameters
    ----------
    n_steps
        Steps of both stages together; even.
    latent_shift
        Shift of the latent's times, see :func:`shift_time`.

    Returns
    -------
    Times of the expression and of the latent, each ``(n_steps + 1,)``.

    Raises
    ------
    ValueError
        If ``n_steps`` is odd or below 2.
    """
    if n_steps < 2 or n_steps % 2:
        raise ValueError(f"`n_steps` must be even and at least 2, got {n_steps}; both stages take half of the steps.")
    half = n_steps // 2
    zeros, ones = torch.zeros(half, dtype=torch.float64), torch.ones(half, dtype=torch.float64)
    return torch.cat([zeros, time_grid(half + 1)]), torch.cat([time_grid(half + 1, latent_shift), ones])


class CascadedTimes:
    """Draws the times at which cells train the two streams of a cascaded flow.

    Parameters
    ----------
    mode
        ``"uniform"`` and ``"cascaded"`` train one stream per cell: the latent at a time of its own with the expression at
        0, or the expression with the latent at 1. Times are uniform, or logit-normal (with a tenth of the expression's
        uniform in [0, 0.5]). ``"shifted_independent"`` trains both streams at independent times, so that one model can
        be sampled in any order; ``"shifted_aligned"`` one stream per cell, the latent ahead of the expression.
    choose_latent_p
        Probability that a cell trains the latent.
    latent_noise
        With the first two modes, the latent is at a uniform time in ``[1 - latent_noise, 1]`` instead of 1 when the
        expression is trained, which teaches that stage to live with imperfect latents.
    shift
        How far the latent is ahead (modes ``"shifted_..."``), see :func:`shift_time`.

    Raises
    ------
    ValueError
        If an argument is out of range.

    References
    ----------
    Baade et al., *Latent forcing*, arXiv 2602.11401 (2026).
    """

    def __init__(
        self, mode: TimeMode = "uniform", choose_latent_p: float = 0.4, latent_noise: float = 0.0, shift: float = 2.0
    ) -> None:
        if mode not in _MODES:
            raise ValueError(f"`mode` must be one of {', '.join(_MODES)}, got {mode!r}; choose one of them.")
        for name, share in (("choose_latent_p", choose_latent_p), ("latent_noise", latent_noise)):
            if not 0 <= share <= 1:
                raise ValueError(f"`{name}` must be in [0, 1], got {share}; choose a share.")
        if shift <= 0:
            raise ValueError(f"`shift` must be positive, got {shift}; 1 means no shift.")
        self.mode, self.choose_latent_p, self.latent_noise, self.shift = mode, choose_latent_p, latent_noise, shift

    @property
    def n_draws(self) -> int:
        """Number of draws that every cell needs."""
        return _N_DRAWS[self.mode] + (self._is_cascade and self.latent_noise > 0)

    def sample(self, n_cells: int, generator: Generator | None = None) -> FlowTimes:
        """Times of ``n_cells`` cells on the CPU."""
        return self.from_draws(self._draw(n_cells, generator))

    def from_draws(self, draws: Tensor) -> FlowTimes:
        """Times from ``draws`` ``(draw, cell)``.

        Rows are, in this order: ``"uniform"``: uniform of the latent's time, of the expression's time, of the choice;
        ``"cascaded"``: normal of the latent's and of the expression's time, uniforms of whether a time is early, of the
        early time, of the choice; both with the uniform of the latent's noise last, if there is any;
        ``"shifted_independent"``: uniform of the expression's and of the latent's time; ``"shifted_aligned"``: normal of
        the latent's and of the expression's time, uniform of the choice.
        """
        if self._is_cascade:
            return self._cascade(draws)
        if self.mode == "shifted_independent":
            ones = torch.ones_like(draws[0])
            # the shift towards noise: the time at which a stream `shift` times noisier would be
            slow = 1 / self.shift
            return FlowTimes(shift_time(draws[0], slow), shift_time(draws[1], slow), ones, ones)
        chosen = draws[2] < self.choose_latent_p
        latent = _logit_normal(draws[0], _LATENT_LOGIT)
        t_expr = torch.where(chosen, shift_time(latent, 1 / self.shift), _logit_normal(draws[1], _EXPRESSION_LOGIT))
        return FlowTimes(t_expr, shift_time(t_expr, self.shift), (~chosen).to(draws), chosen.to(draws))

    @property
    def _is_cascade(self) -> bool:
        return self.mode in ("uniform", "cascaded")

    def _cascade(self, draws: Tensor) -> FlowTimes:
        if self.mode == "uniform":
            t_latent, t_expr, choice = draws[:3]
        else:
            early = draws[2] < _EARLY_SHARE
            t_latent = _logit_normal(draws[0], _LATENT_LOGIT)
            t_expr = torch.where(early, _EARLY_END * draws[3], _logit_normal(draws[1], _EXPRESSION_LOGIT))
            choice = draws[4]
        chosen = choice < self.choose_latent_p
        given = 1 - self.latent_noise + self.latent_noise * draws[-1] if self.latent_noise else torch.ones_like(choice)
        zero = torch.zeros_like(choice)
        return FlowTimes(
            torch.where(chosen, zero, t_expr),
            torch.where(chosen, t_latent, given),
            (~chosen).to(draws),
            chosen.to(draws),
        )

    def _draw(self, n_cells: int, generator: Generator | None) -> Tensor:
        draws = torch.rand(self.n_draws, n_cells, generator=generator)
        if self.mode in ("cascaded", "shifted_aligned"):
            draws[:2] = torch.randn(2, n_cells, generator=generator)
        return draws


def _logit_normal(normal: Tensor, logit: tuple[float, float]) -> Tensor:
    mean, std = logit
    return (normal * std + mean).sigmoid()
