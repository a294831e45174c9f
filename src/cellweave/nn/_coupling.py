"""Masked affine coupling: some features are shifted and scaled by what the others, and the covariates, say."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

__all__ = ["CouplingFlow", "CouplingLayer"]

# A layer transforms every third feature; which third shifts by one from layer to layer.
_PERIOD = 3


def _network(n_in: int, n_hidden: int, n_hidden_layers: int, n_out: int) -> nn.Sequential:
    """Linear and ReLU in turn, ``n_hidden_layers + 2`` linear layers; linear layer ``k`` has the index ``2 * k``."""
    layers: list[nn.Module] = [nn.Linear(n_in, n_hidden), nn.ReLU()]
    for _ in range(n_hidden_layers):
        layers += [nn.Linear(n_hidden, n_hidden), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(n_hidden, n_out))


def _evaluate(network: nn.Sequential, x: Tensor, inputs: Tensor, outputs: Tensor) -> Tensor:
    """Chosen outputs of a network that is given only some of its inputs, the others being zero.

    Cells run along the *last* axis, ``(input, cell)`` to ``(output, cell)``: the networks are narrow and the cells many,
    so that rows are long, and choosing features copies whole rows (a quarter less time in prediction on the CPU).
    """
    first, *hidden, last = cast("Iterable[nn.Linear]", network[::2])
    x = torch.addmm(first.bias[:, None], first.weight[:, inputs], x).relu_()
    for layer in hidden:
        x = torch.addmm(layer.bias[:, None], layer.weight, x).relu_()
    return torch.addmm(last.bias[outputs, None], last.weight[outputs], x)


class CouplingLayer(nn.Module):
    r"""One affine coupling with the mask :math:`m` (1 passes through, 0 is transformed).

    .. math::
        y &= m \odot x + (1-m) \odot \left(x \odot e^{s} + t\right), \qquad
        \log|\det J| = \sum_j (1-m_j)\, s_j \\
        s &= \tanh\left(\mathrm{MLP}_s([m \odot x, c])\right), \qquad t = \mathrm{MLP}_t([m \odot x, c])

    Weights have the shapes of the full networks (all features in, all features out), as published; rows and columns that
    the mask would multiply by zero are neither read nor computed, and receive no gradient but zero.

    The layer works on ``(feature, cell)`` tensors, see :class:`CouplingFlow` for the usual orientation. ``zuko`` has the
    same transformation, equal to 1e-6, but builds it anew in every call (which asks the device for the mask and breaks
    ``torch.compile`` once per layer), takes the logarithm of the exponential for the determinant, and needed 22 % more
    time per training step on the CPU; the few lines below are therefore our own.

    Parameters
    ----------
    mask
        True for features that pass through, ``(feature,)``.
    n_covariates
        Number of covariates.
    n_hidden
        Width of the hidden layers.
    n_hidden_layers
        Hidden layers between the first and the last linear layer.
    """

    passed: Tensor
    transformed: Tensor
    inputs: Tensor

    def __init__(self, mask: Tensor, n_covariates: int = 0, n_hidden: int = 16, n_hidden_layers: int = 6) -> None:
        super().__init__()
        n_features = len(mask)
        self.sfun = _network(n_features + n_covariates, n_hidden, n_hidden_layers, n_features)
        self.tfun = _network(n_features + n_covariates, n_hidden, n_hidden_layers, n_features)
        passed = mask.nonzero().flatten()
        self.register_buffer("passed", passed, persistent=False)
        self.register_buffer("transformed", (~mask).nonzero().flatten(), persistent=False)
        inputs = torch.cat([passed, torch.arange(n_features, n_features + n_covariates)])
        self.register_buffer("inputs", inputs, persistent=False)

    def forward(
        self, x: Tensor, covariates: Tensor | None = None, measured: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Transform ``x`` ``(feature, cell)``; also the log-determinant ``(cell,)``.

        Parameters
        ----------
        x
            Features ``(feature, cell)``.
        covariates
            Covariates ``(covariate, cell)``.
        measured
            1 for features to transform and 0 for others, which are 0 and stay so, ``(feature, cell)``.
        """
        log_scale, shift = self._scale_and_shift(x, covariates, measured)  # (transformed, cell)
        y = torch.addcmul(shift, x.index_select(0, self.transformed), log_scale.exp())
        return x.index_copy(0, self.transformed, y), log_scale.sum(0)

    def inverse(self, y: Tensor, covariates: Tensor | None = None, measured: Tensor | None = None) -> Tensor:
        """The ``x`` that :meth:`forward` maps to ``y``.

        Parameters
        ----------
        y
            Transformed features ``(feature, cell)``.
        covariates, measured
            As in :meth:`forward`.
        """
        log_scale, shift = self._scale_and_shift(y, covariates, measured)
        x = (y.index_select(0, self.transformed) - shift) * torch.exp(-log_scale)
        return y.index_copy(0, self.transformed, x)

    def _scale_and_shift(self, x: Tensor, covariates: Tensor | None, measured: Tensor | None) -> tuple[Tensor, Tensor]:
        known = x.index_select(0, self.passed)
        if covariates is not None:
            known = torch.cat([known, covariates])
        log_scale = _evaluate(self.sfun, known, self.inputs, self.transformed).tanh()
        shift = _evaluate(self.tfun, known, self.inputs, self.transformed)
        if measured is None:
            return log_scale, shift
        here = measured.index_select(0, self.transformed)
        return log_scale * here, shift * here


class CouplingFlow(nn.Module):
    r"""Conditional RealNVP: coupling layers whose transformed third of the features shifts from layer to layer.

    Layer :math:`i` transforms the features :math:`j` with :math:`(j - i) \bmod 3 = 0`. With fewer than three features
    some layers transform nothing; they are skipped.

    Parameters
    ----------
    n_features
        Number of features.
    n_covariates
        Number of covariates.
    n_hidden
        Width of the hidden layers of the scale and shift networks.
    n_hidden_layers
        Hidden layers of these networks between the first and the last linear layer.
    n_layers
        Number of coupling layers.
    covariate_scale
        Factor on all covariates before they enter the networks.
    identity_init
        Start as the identity: the last layer of every network is zero. By default weights start as torch draws them.
    """

    def __init__(
        self,
        n_features: int,
        n_covariates: int = 0,
        n_hidden: int = 16,
        n_hidden_layers: int = 6,
        n_layers: int = 7,
        covariate_scale: float = 1.0,
        identity_init: bool = False,
    ) -> None:
        super().__init__()
        self.n_features, self.n_covariates, self.covariate_scale = n_features, n_covariates, covariate_scale
        masks = [(torch.arange(n_features) - i) % _PERIOD > 0 for i in range(n_layers)]
        self.module_list = nn.ModuleList(CouplingLayer(m, n_covariates, n_hidden, n_hidden_layers) for m in masks)
        if identity_init:
            for layer in self._layers():
                for last in (layer.sfun[-1], layer.tfun[-1]):
                    nn.init.zeros_(cast("nn.Linear", last).weight)
                    nn.init.zeros_(cast("nn.Linear", last).bias)

    def forward(
        self, x: Tensor, covariates: Tensor | None = None, measured: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Latent features ``(cell, feature)`` and log-determinants ``(cell,)``.

        Parameters
        ----------
        x
            Features ``(cell, feature)``, 0 where not measured.
        covariates
            Covariates ``(cell, covariate)``; may be left out if the flow has none.
        measured
            False where a feature was not measured, bool ``(cell, feature)``; all were by default. What was not measured
            stays 0, is not seen as a value by any network, and the map is one of the measured features among themselves.
        """
        given, there = self._given(covariates, len(x)), _transposed(measured, x)
        u, log_det = x.t(), x.new_zeros(len(x))
        for layer in self._active_layers():
            u, part = layer(u, given, there)
            log_det = log_det + part
        return u.t(), log_det

    def inverse(self, u: Tensor, covariates: Tensor | None = None, measured: Tensor | None = None) -> Tensor:
        """The features ``(cell, feature)`` that :meth:`forward` maps to ``u``.

        Parameters
        ----------
        u
            Latent features ``(cell, feature)``, 0 where not measured.
        covariates, measured
            As in :meth:`forward`.
        """
        given, there = self._given(covariates, len(u)), _transposed(measured, u)
        x = u.t()
        for layer in reversed(self._active_layers()):
            x = layer.inverse(x, given, there)
        return x.t()

    def _layers(self) -> list[CouplingLayer]:
        return list(cast("Iterable[CouplingLayer]", self.module_list))

    def _active_layers(self) -> list[CouplingLayer]:
        return [layer for layer in self._layers() if len(layer.transformed)]

    def _given(self, covariates: Tensor | None, n_cells: int) -> Tensor | None:
        """Scaled covariates ``(covariate, cell)``, or None where the flow has none."""
        found = (n_cells, 0) if covariates is None else tuple(covariates.shape)
        if found != (n_cells, self.n_covariates):
            raise ValueError(
                f"`covariates` must have the shape (cells, covariates) = {(n_cells, self.n_covariates)}, got {found}; "
                "give one row per cell with the columns that the flow was made for."
            )
        return None if covariates is None or not self.n_covariates else (self.covariate_scale * covariates).t()


def _transposed(measured: Tensor | None, like: Tensor) -> Tensor | None:
    return None if measured is None else measured.to(like).t()
