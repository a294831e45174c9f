from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Generator, Tensor, nn

from cellweave._keys import STEP_KEYS

from ._base import Objective
from ._shared import shared_mean

__all__ = [
    "LogDeterminant",
    "MixtureLikelihood",
    "PopulationLogProb",
    "PopulationPrior",
    "PopulationWeightPrior",
    "mixture_log_likelihood",
    "population_posterior",
]

# Modes of a continuum marker stand at this share of the values of the table.
_CONTINUUM_SHARE = 0.2
# Logarithm of a share (1e-26) that is nothing beside one, in float64 too, and whose products are no subnormal numbers.
_LOG_FLOOR = -60.0


class PopulationLogProb(NamedTuple):
    r"""Log density of latent cells under each population, :math:`\log p(u|z)` = ``common`` + ``contrast``.

    What all populations have in common grows with the square of the latent values, what tells them apart only linearly.
    Kept apart, posteriors stay exact in float32 where the sum has lost its digits.
    """

    common: Tensor  # (cell,)
    contrast: Tensor  # (cell, population)

    def total(self) -> Tensor:
        r""":math:`\log p(u|z)` in nats, ``(cell, population)``."""
        return self.common[:, None] + self.contrast


class PopulationPrior(nn.Module):
    r"""Density of latent cells given their population, made from a table of expected marker expressions.

    The table :math:`\rho` has a row per population :math:`z` and a column per marker :math:`m`: -1 negative, 1 positive,
    values between for graded expression, NaN (NA) for unknown. A cell of population :math:`z` has the latent markers
    :math:`u = e + h` with :math:`h \sim N(0, \sigma^2 I)`, :math:`e_m = \rho_{zm}` where known and
    :math:`e_m \sim U(-1, 1)` where not. The density of a marker is

    - known: :math:`N(u_m;\, \rho_{zm}, \sigma^2)`, with :math:`\rho_{zm} / 5` for *continuum* markers;
    - unknown: :math:`\gamma\, N\!\left(\max(|u_m| - r, 0);\, 0, \sigma^2\right)` with :math:`r = 1 - \sigma` and
      :math:`\gamma = \left(1 + \tfrac{r}{\sigma}\sqrt{2/\pi}\right)^{-1}`: flat within :math:`[-r, r]`, Gaussian tails
      outside, in place of the convolution of the uniform and the normal.

    With :math:`K` the mask of known entries, :math:`n_m = \max(|u_m| - r, 0)^2` and :math:`g_m = u_m^2 - n_m` (a Huber
    function, linear for large :math:`|u_m|`)

    .. math::
        \log p(u|z) = \underbrace{-\frac{\sum_m n_m}{2\sigma^2} - M\log\sigma - \frac{M}{2}\log 2\pi}_\text{common}
            \underbrace{- \frac{g K^\top - 2u\,(\rho \odot K)^\top + \sum_m \rho^2 K}{2\sigma^2}
            + |\mathrm{NA}_z| \log\gamma}_\text{contrast}

    Two matrix products replace a ``(cell, population, marker)`` tensor.

    Parameters
    ----------
    rho
        Table :math:`\rho`, ``(population, marker)``, NaN for unknown.
    prior_std
        Standard deviation :math:`\sigma` of a marker around its mode, above 0 and at most 1.
    continuum
        True for continuum markers, ``(marker,)``; none by default.

    Attributes
    ----------
    rho
        The table with 0 for unknown entries.
    rho_mask
        True for unknown entries.

    Raises
    ------
    ValueError
        If the table is not a matrix with finite or NaN entries, if ``continuum`` does not fit it, or if ``prior_std`` is
        out of range.
    """

    rho: Tensor
    rho_mask: Tensor
    continuum: Tensor

    def __init__(self, rho: Tensor, prior_std: float = 0.3, continuum: Tensor | None = None) -> None:
        super().__init__()
        if rho.ndim != 2 or 0 in rho.shape:
            raise ValueError(
                f"`rho` must be a table of at least one population and one marker, got shape {tuple(rho.shape)}."
            )
        if bool(rho.isinf().any()):
            row, column = rho.isinf().nonzero()[0].tolist()
            raise ValueError(
                f"`rho` holds {int(rho.isinf().sum())} infinite values, the first in row {row}, column {column}; use "
                "finite values, or NaN for unknown."
            )
        continuum = torch.zeros(rho.shape[1], dtype=torch.bool) if continuum is None else continuum.bool()
        if continuum.shape != (rho.shape[1],):
            raise ValueError(
                f"`continuum` must have one entry for each of the {rho.shape[1]} markers, got shape "
                f"{tuple(continuum.shape)}."
            )
        self.prior_std = prior_std
        self.register_buffer("rho", rho.nan_to_num(0.0))
        self.register_buffer("rho_mask", rho.isnan())
        self.register_buffer("continuum", continuum.clone())  # of its own: files refuse tensors that share memory

    @property
    def prior_std(self) -> float:
        r"""Standard deviation :math:`\sigma` of a marker around its mode; may be changed at any time."""
        return self._prior_std

    @prior_std.setter
    def prior_std(self, value: float) -> None:
        if not 0 < value <= 1:
            raise ValueError(f"`prior_std` must be above 0 and at most 1, got {value}.")
        self._prior_std = float(value)

    @property
    def radius(self) -> float:
        """Half width :math:`r` of the flat part of the density of an unknown entry."""
        return 1 - self.prior_std

    @property
    def log_gamma(self) -> float:
        r""":math:`\log\gamma`, which makes the density of an unknown entry integrate to one."""
        return -math.log1p(self.radius / self.prior_std * math.sqrt(2 / math.pi))

    @property
    def modes(self) -> Tensor:
        """Where known entries have their mode, ``(population, marker)``; 0 for unknown ones."""
        return torch.where(self.continuum, self.rho * _CONTINUUM_SHARE, self.rho)

    def log_prob(self, u: Tensor, measured: Tensor | None = None) -> PopulationLogProb:
        """Log density under each population, in nats.

        Parameters
        ----------
        u
            Latent markers ``(cell, marker)``, 0 where not measured.
        measured
            False where a marker was not measured and adds nothing, bool ``(cell, marker)``; all were by default.
        """
        # squares of latent values and their differences need the digits that autocast would take
        with torch.autocast(u.device.type, enabled=False):
            u = u.to(torch.promote_types(u.dtype, self.rho.dtype))
            scale, n_markers = 0.5 / self.prior_std**2, u.shape[1]
            unknown, modes = self.rho_mask.to(u.dtype), self.modes.to(u.dtype)
            size = u.abs()
            inner = size.clamp(max=self.radius)
            beyond = (size - inner).square().sum(-1)  # (cell,)
            huber = inner * (2 * size - inner)  # (cell, marker)
            constant = self.log_gamma * unknown.sum(-1) - scale * modes.square().sum(-1)  # (population,)
            contrast = torch.addmm(constant, huber, 1 - unknown.t(), alpha=-scale)
            contrast = torch.addmm(contrast, u, modes.t(), alpha=2 * scale)
            width = math.log(self.prior_std) + 0.5 * math.log(2 * math.pi)
            common = -scale * beyond - n_markers * width
            if measured is not None:  # take back the constants that markers have at 0
                missing = 1 - measured.to(u.dtype)
                common = common + width * missing.sum(-1)
                contrast = torch.addmm(contrast, missing, (scale * modes.square() - self.log_gamma * unknown).t())
        return PopulationLogProb(common, contrast)

    def log_prob_per_marker(self, u: Tensor) -> Tensor:
        """Log density of every marker under each population, ``(cell, population, marker)``.

        Parameters
        ----------
        u
            Latent markers ``(cell, marker)``.
        """
        u = u[:, None].to(torch.promote_types(u.dtype, self.rho.dtype))
        beyond = (u.abs() - self.radius).clamp(min=0)
        distance = torch.where(self.rho_mask, beyond, u - self.modes)
        constant = self.log_gamma * self.rho_mask.to(u.dtype) - math.log(self.prior_std) - 0.5 * math.log(2 * math.pi)
        return constant - 0.5 * (distance / self.prior_std).square()

    def draw_noise(self, n_cells: int, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draws behind latent cells: uniform in [-1, 1] and standard normal, each ``(cell, marker)`` on the CPU.

        Parameters
        ----------
        n_cells
            Number of cells.
        generator
            Source of the draws, on the CPU.
        """
        shape = (n_cells, self.rho.shape[1])
        uniform = torch.empty(shape, dtype=self.rho.dtype).uniform_(-1, 1, generator=generator)
        return uniform, torch.randn(shape, dtype=self.rho.dtype, generator=generator)

    def latent_cells(self, populations: Tensor, uniform: Tensor, normal: Tensor) -> Tensor:
        """Latent markers ``(cell, marker)`` of cells of the given populations.

        Known entries of continuum markers lie around the mode that the density has there.

        Parameters
        ----------
        populations
            Row of the table for each cell, ``(cell,)``.
        uniform, normal
            Draws as :meth:`draw_noise` makes them, ``(cell, marker)``.
        """
        populations, uniform, normal = (t.to(self.rho.device) for t in (populations, uniform, normal))
        expression = torch.where(self.rho_mask[populations], uniform, self.modes[populations])
        return expression + self.prior_std * normal


def mixture_log_likelihood(log_prob: PopulationLogProb, log_pi: Tensor) -> Tensor:
    r"""Log density of latent cells whatever their population, :math:`\log\sum_z \pi_z\,p(u|z)`, ``(cell,)`` in nats.

    Parameters
    ----------
    log_prob
        Log density under each population.
    log_pi
        Logarithm of the population weights :math:`\pi`, ``(population,)``.
    """
    top, terms = _terms(log_prob.contrast + log_pi)
    return log_prob.common + top + terms.sum(-1).log()


def population_posterior(log_prob: PopulationLogProb, log_pi: Tensor) -> Tensor:
    r"""Probability of each population for each cell, :math:`p(z|u) \propto \pi_z\,p(u|z)`, ``(cell, population)``.

    Parameters
    ----------
    log_prob
        Log density under each population.
    log_pi
        Logarithm of the population weights :math:`\pi`, ``(population,)``.
    """
    terms = _terms(log_prob.contrast + log_pi)[1]
    return terms / terms.sum(-1, keepdim=True)


def _terms(joint: Tensor) -> tuple[Tensor, Tensor]:
    """Largest value of every row ``(cell,)`` and the exponentials relative to it, ``(cell, population)``.

    Terms below the floor change neither a sum nor a step, but as subnormal numbers they made the exponential eighty times
    slower on the CPU, and the matrix products of their gradients slow too.
    """
    top = joint.detach().amax(-1)
    return top, (joint - top[:, None]).clamp(min=_LOG_FLOOR).exp()


class MixtureLikelihood(Objective):
    r"""Mean of :math:`-\log\sum_z \pi_z\,p(u|z)` over the valid cells, in nats per cell.

    With :class:`LogDeterminant` at the same weight it is the negative log-likelihood of the measured cells, which Scyan
    calls the Kullback-Leibler loss.
    """

    name: ClassVar[str] = "prior_loss"
    requires: ClassVar[frozenset[str]] = frozenset({"log_prob_common", "log_prob_contrast", "log_pi", "valid"})

    def __call__(self, outputs: Mapping[str, Tensor], generator: Generator | None = None) -> Tensor:
        log_prob = PopulationLogProb(outputs["log_prob_common"], outputs["log_prob_contrast"])
        value = mixture_log_likelihood(log_prob, outputs["log_pi"])  # (cell,)
        return -shared_mean(value, outputs["valid"], outputs.get(STEP_KEYS.CELLS_PER_PROCESS))


class PopulationWeightPrior(Objective):
    r"""Dirichlet prior of the population weights, :math:`-\frac{1}{P}\sum_z \log\pi_z` in nats.

    With weight :math:`w` the weights tend to :math:`(\bar p_z + w / P) / (1 + w)` where :math:`\bar p_z` is the share of a
    population among the cells: no population dies out because it is small, which is what the temperature of the published
    model is for.
    """

    name: ClassVar[str] = "weight_loss"
    requires: ClassVar[frozenset[str]] = frozenset({"log_pi"})

    def __call__(self, outputs: Mapping[str, Tensor], generator: Generator | None = None) -> Tensor:
        return -outputs["log_pi"].mean()


class LogDeterminant(Objective):
    r"""Mean of :math:`-\log|\det J|` of a flow over the valid cells, in nats per cell."""

    name: ClassVar[str] = "log_det_loss"
    requires: ClassVar[frozenset[str]] = frozenset({"log_det", "valid"})

    def __call__(self, outputs: Mapping[str, Tensor], generator: Generator | None = None) -> Tensor:
        return -shared_mean(outputs["log_det"], outputs["valid"], outputs.get(STEP_KEYS.CELLS_PER_PROCESS))
