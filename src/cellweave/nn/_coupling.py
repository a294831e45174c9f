"""Masked affine coupling: some features are shifted and scaled by what the others, and the covariates, say."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

__all__ = ["CouplingFlow", "CouplingLayer"]

# A layer transforms every third feature; which third shifts by one from layer to layer.
_PERIOD = 3
# Cells whose activations are computed again together: few enough for the cache, many enough for long rows.
_CACHED = 4096


def _network(n_in: int, n_hidden: int, n_hidden_layers: int, n_out: int) -> nn.Sequential:
    """Linear and ReLU in turn, ``n_hidden_layers + 2`` linear layers; linear layer ``k`` has the index ``2 * k``."""
    layers: list[nn.Module] = [nn.Linear(n_in, n_hidden), nn.ReLU()]
    for _ in range(n_hidden_layers):
        layers += [nn.Linear(n_hidden, n_hidden), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(n_hidden, n_out))


class _Weights(NamedTuple):
    """Weights ``(output, input)`` and biases ``(output,)`` of the layers of a network."""

    weights: Sequence[Tensor]
    biases: Sequence[Tensor]


def _chosen(network: nn.Sequential, inputs: Tensor, outputs: Tensor) -> _Weights:
    """What is needed for some outputs of a network that is given only some of its inputs, the others being zero."""
    layers = list(cast("Iterable[nn.Linear]", network[::2]))
    weights: list[Tensor] = [layer.weight for layer in layers]
    biases: list[Tensor] = [layer.bias for layer in layers]
    weights[0], weights[-1] = weights[0].index_select(1, inputs), weights[-1].index_select(0, outputs)
    biases[-1] = biases[-1].index_select(0, outputs)
    return _Weights(weights, biases)


def _output(x: Tensor, network: _Weights) -> Tensor:
    """Output of a network, ReLU between layers.

    Cells run along the *last* axis, ``(input, cell)`` to ``(output, cell)``: the networks are narrow and the cells many,
    so that rows are long, and choosing features copies whole rows (a quarter less time in prediction on the CPU).
    """
    *hidden, (weight, bias) = zip(*network, strict=True)
    for args in hidden:
        x = _hidden_layer(x, *args)
    return torch.addmm(bias[:, None], weight, x)


def _hidden_layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.addmm(bias[:, None], weight, x).relu_()


def _affine(x: Tensor, known: Tensor, scale: _Weights, shift: _Weights) -> tuple[Tensor, Tensor]:
    """Scaled and shifted features and the logarithm of the scale, both ``(feature, cell)``."""
    log_scale = _output(known, scale).tanh()
    return torch.addcmul(_output(known, shift), x, log_scale.exp()), log_scale


class _LeanAffine(torch.autograd.Function):
    """:func:`_affine` that keeps no activations for its derivative, but computes them again for some cells at a time.

    Written to memory and read back, activations cost more than their few multiplications in the cache: on the CPU a
    training step takes less time this way, and a fifth of the memory.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, known: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        y, log_scale = _affine(x, known, *_split(parameters))
        ctx.save_for_backward(x, known, log_scale, *parameters)
        return y, log_scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, known, log_scale, *parameters = ctx.saved_tensors
        if torch.is_grad_enabled():  # derivatives of this derivative are wanted
            return _differentiable_grads([x, known, *parameters], grads)
        scale, shift = _split(parameters)
        grad_x = grads[0] * log_scale.exp()
        grad_scale = torch.ops.aten.tanh_backward(torch.addcmul(grads[1], grad_x, x), log_scale)
        grad_known = torch.zeros_like(known)
        of_scale = _add_gradients(known, scale, grad_scale, grad_known)
        return grad_x, grad_known, *of_scale, *_add_gradients(known, shift, grads[0], grad_known)


def _add_gradients(x: Tensor, network: _Weights, grad_output: Tensor, grad_x: Tensor) -> list[Tensor]:
    """Derivatives after weights, then biases; that after ``x`` is added to ``grad_x``."""
    weights, biases = network
    of_weights, of_biases = [torch.zeros_like(w) for w in weights], [torch.zeros_like(b) for b in biases]
    for start in range(0, x.shape[1], _CACHED):
        cells = slice(start, start + _CACHED)
        layers = [x[:, cells]]
        for args in zip(weights[:-1], biases[:-1], strict=True):
            layers.append(_hidden_layer(layers[-1], *args))
        grad = grad_output[:, cells]
        for i in range(len(weights) - 1, 0, -1):
            of_weights[i].addmm_(grad, layers[i].t())
            of_biases[i] += grad.sum(1)
            grad = weights[i].t() @ grad
            # of the ReLU, in place: multiplying with a mask takes twenty times as long
            torch.ops.aten.threshold_backward.grad_input(grad, layers[i], 0, grad_input=grad)
        of_weights[0].addmm_(grad, layers[0].t())
        of_biases[0] += grad.sum(1)
        grad_x[:, cells].addmm_(weights[0].t(), grad)
    return [*of_weights, *of_biases]


def _split(parameters: Sequence[Tensor]) -> tuple[_Weights, _Weights]:
    """The two networks, whose weights and biases follow each other."""
    n = len(parameters) // 4
    parts = [parameters[i : i + n] for i in range(0, 4 * n, n)]
    return _Weights(*parts[:2]), _Weights(*parts[2:])


def _differentiable_grads(inputs: Sequence[Tensor], grads: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Derivatives of :func:`_affine` that can be differentiated again; None where none is wanted."""
    wanted = [i for i, tensor in enumerate(inputs) if tensor.requires_grad]
    outputs = _affine(inputs[0], inputs[1], *_split(inputs[2:]))
    found = torch.autograd.grad(outputs, [inputs[i] for i in wanted], grads, create_graph=True)
    by_input = dict(zip(wanted, found, strict=True))
    return tuple(by_input.get(i) for i in range(len(inputs)))


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
        known, scale, shift = self._networks(x, covariates)
        changed = x.index_select(0, self.transformed)
        is_plain = torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type) or x.device.type != "cpu"
        if is_plain or not torch.is_grad_enabled():
            y, log_scale = _affine(changed, known, scale, shift)
        else:
            y, log_scale = _LeanAffine.apply(
                changed, known, *scale.weights, *scale.biases, *shift.weights, *shift.biases
            )
        if measured is not None:
            here = measured.index_select(0, self.transformed)
            y, log_scale = y * here, log_scale * here
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
        known, scale, shift = self._networks(y, covariates)
        log_scale, moved = _output(known, scale).tanh(), y.index_select(0, self.transformed)
        x = (moved - _output(known, shift)) * torch.exp(-log_scale)
        if measured is not None:
            x = x * measured.index_select(0, self.transformed)
        return y.index_copy(0, self.transformed, x)

    def _networks(self, x: Tensor, covariates: Tensor | None) -> tuple[Tensor, _Weights, _Weights]:
        """Inputs of the networks ``(feature and covariate, cell)``, and the networks of scale and shift."""
        known = x.index_select(0, self.passed)
        if covariates is not None:
            known = torch.cat([known, covariates])
        scale = _chosen(self.sfun, self.inputs, self.transformed)
        return known, scale, _chosen(self.tfun, self.inputs, self.transformed)


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
