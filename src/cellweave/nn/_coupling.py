"""Masked affine coupling: some features are shifted and scaled by what the others, and the covariates, say."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

__all__ = ["CouplingFlow", "CouplingLayer"]

# A layer transforms every third feature; which third shifts by one from layer to layer.
_PERIOD = 3
_relu_backward = torch.ops.aten.threshold_backward.grad_input
# Cells whose activations are computed again together: few enough for the cache, many enough for long rows.
_CACHED = 4096


def _network(n_in: int, n_hidden: int, n_hidden_layers: int, n_out: int) -> nn.Sequential:
    """Linear and ReLU in turn, ``n_hidden_layers + 2`` linear layers; linear layer ``k`` has the index ``2 * k``."""
    layers: list[nn.Module] = [nn.Linear(n_in, n_hidden), nn.ReLU()]
    for _ in range(n_hidden_layers):
        layers += [nn.Linear(n_hidden, n_hidden), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(n_hidden, n_out))


class _Stack(NamedTuple):
    """Networks of scale and shift of several coupling layers; the last column of every matrix is the bias."""

    first: Tensor  # (layer, 2, hidden, feature and covariate and 1)
    hidden: Tensor  # (layer, depth, 2, hidden, hidden + 1)
    last: Tensor  # (layer, 2, feature, hidden + 1)


class _Layer(NamedTuple):
    """What one coupling layer needs; the last row of hidden matrices gives the constant 1 that biases multiply."""

    inputs: Tensor  # rows of the state that it reads
    transformed: Tensor  # rows that it changes
    first: Tensor  # (2, hidden + 1, input)
    hidden: Sequence[Tensor]  # (2, hidden + 1, hidden + 1) each
    last: Tensor  # (2, transformed, hidden + 1)


class _Tape(NamedTuple):
    """What the derivative of a coupling layer needs."""

    known: Tensor  # (input, cell)
    moved: Tensor  # (transformed, cell), before the layer
    log_scale: Tensor  # (transformed, cell)


def _stack(layers: Sequence[CouplingLayer]) -> _Stack:
    """One tensor per kind of matrix: many small ones would cost more than their products on a few thousand cells."""
    networks = [list(network)[::2] for layer in layers for network in (layer.sfun, layer.tfun)]
    depth = len(networks[0]) - 2
    inner = [networks[i + j][1 + k] for i in range(0, len(networks), 2) for k in range(depth) for j in range(2)]
    first, last = (_joined([network[i] for network in networks]).unflatten(0, (-1, 2)) for i in (0, -1))
    n_hidden = first.shape[2]
    if not inner:
        return _Stack(first, first.new_empty(len(layers), 0, 2, n_hidden, n_hidden + 1), last)
    return _Stack(first, _joined(inner).unflatten(0, (len(layers), depth, 2)), last)


def _joined(linear: Iterable[nn.Module]) -> Tensor:
    """Weights and biases of linear layers of one shape, ``(layer, output, input + 1)``."""
    weights, biases = zip(*((layer.weight, layer.bias) for layer in linear), strict=True)
    return torch.cat([torch.stack(weights), torch.stack(biases)[..., None]], -1)


def _unstacked(stack: _Stack, parts: Sequence[tuple[Tensor, Tensor]]) -> list[_Layer]:
    """Layers with the rows and columns of their matrices that the mask leaves."""
    first, hidden, last = _with_constant(stack.first), _with_constant(stack.hidden), stack.last
    return [
        _Layer(inputs, transformed, a.index_select(-1, inputs), b.unbind(), c.index_select(1, transformed))
        for (inputs, transformed), a, b, c in zip(parts, first, hidden, last, strict=True)
    ]


def _with_constant(matrices: Tensor) -> Tensor:
    """Matrices with a further output, the last input, which is 1."""
    row = torch.zeros_like(matrices[..., :1, :])
    row[..., -1] = 1
    return torch.cat([matrices, row], -2)


def _activations(known: Tensor, layer: _Layer) -> Iterator[Tensor]:
    """Outputs of the hidden layers of the networks of scale and shift, ``(2, hidden + 1, cell)`` each.

    Cells run along the *last* axis: the networks are narrow and the cells many, so that rows are long, and choosing
    features copies whole rows (a quarter less time in prediction on the CPU).
    """
    activation = (layer.first.flatten(0, 1) @ known).unflatten(0, (2, -1)).relu_()
    yield activation
    for matrices in layer.hidden:
        activation = torch.bmm(matrices, activation).relu_()
        yield activation


def _outputs(known: Tensor, layer: _Layer) -> Tensor:
    """Outputs of the networks of scale and shift ``(2, transformed, cell)``."""
    for activation in _activations(known, layer):
        last = activation
    return torch.bmm(layer.last, last)


def _couple(state: Tensor, layer: _Layer, measured: Tensor | None) -> tuple[Tensor, _Tape]:
    """Transform ``state`` ``(feature and covariate and 1, cell)`` in place; part of the log-determinant ``(cell,)``."""
    known, moved = state.index_select(0, layer.inputs), state.index_select(0, layer.transformed)
    outputs = _outputs(known, layer)
    log_scale = outputs[0].tanh()
    y, log_det = torch.addcmul(outputs[1], moved, log_scale.exp()), log_scale
    if measured is not None:
        here = measured.index_select(0, layer.transformed)
        y, log_det = y * here, log_scale * here
    state.index_copy_(0, layer.transformed, y)
    return log_det.sum(0), _Tape(known, moved, log_scale)


def _flow(state: Tensor, layers: Sequence[_Layer], measured: Tensor | None) -> tuple[Tensor, list[_Tape]]:
    """All layers in place; log-determinant ``(cell,)``."""
    parts, tapes = zip(*(_couple(state, layer, measured) for layer in layers), strict=True)
    return sum(parts[1:], parts[0]), list(tapes)


class _LeanFlow(torch.autograd.Function):
    """:func:`_flow` whose derivative keeps no activations, and takes few steps.

    Activations are computed again, for some cells at a time: written to memory and read back, they cost more than their
    few multiplications in the cache. On the CPU a training step takes less time this way, and a fifth of the memory.
    """

    @staticmethod
    def forward(
        ctx: Any, state: Tensor, measured: Tensor | None, parts: Sequence[tuple[Tensor, Tensor]], *stack: Tensor
    ) -> tuple[Tensor, Tensor]:
        after, ctx.parts, ctx.layers = state.clone(), parts, _unstacked(_Stack(*stack), parts)
        log_det, tapes = _flow(after, ctx.layers, measured)
        ctx.save_for_backward(state, measured, *stack, *(tensor for tape in tapes for tensor in tape))
        return after, log_det

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        state, measured, *tensors = ctx.saved_tensors
        stack, kept = _Stack(*tensors[:3]), tensors[3:]
        if torch.is_grad_enabled():  # derivatives of this derivative are wanted
            return _differentiable_grads(state, measured, ctx.parts, stack, grads)
        grad, found = grads[0].clone(memory_format=torch.contiguous_format), _Gradients(stack)
        for i in reversed(range(len(ctx.layers))):
            found.add(i, grad, grads[1], ctx.layers[i], _Tape(*kept[3 * i : 3 * i + 3]), measured)
        return grad, None, None, *found.stack()


class _Gradients:
    """Sums of the derivatives after the matrices of all layers, transposed."""

    def __init__(self, stack: _Stack) -> None:
        self.n_hidden, self.depth = stack.first.shape[2], stack.hidden.shape[1]
        first, hidden = stack.first.flatten(1, 2), stack.hidden.flatten(0, 1)
        self._sums = [m.new_zeros(m.mT.shape) for m in (first, hidden, stack.last)]
        # taken apart once: the many small steps back cost little more than finding what they need
        self._first, self._hidden, self._last = (m.unbind() for m in self._sums)
        self._backwards = hidden[..., : self.n_hidden].mT.contiguous().unbind()

    def add(
        self, i: int, grad: Tensor, grad_log_det: Tensor, layer: _Layer, tape: _Tape, measured: Tensor | None
    ) -> None:
        """Go back through layer ``i``; ``grad``, the derivative after its result, becomes that after its input."""
        grad_y, grad_scale = grad.index_select(0, layer.transformed), grad_log_det
        if measured is not None:
            here = measured.index_select(0, layer.transformed)
            grad_y, grad_scale = grad_y * here, grad_scale * here
        grad_moved = grad_y * tape.log_scale.exp()
        slope = torch.ops.aten.tanh_backward(torch.addcmul(grad_scale, grad_moved, tape.moved), tape.log_scale)
        grad.index_copy_(0, layer.transformed, grad_moved)
        back = torch.stack([slope, grad_y])
        pieces = [slice(start, start + _CACHED) for start in range(0, back.shape[2], _CACHED)]
        of_known = [self._through_networks(i, back[..., cells], layer, tape.known[:, cells]) for cells in pieces]
        grad.index_add_(0, layer.inputs, torch.cat(of_known, 1))

    def _through_networks(self, i: int, back: Tensor, layer: _Layer, known: Tensor) -> Tensor:
        """Derivative after the inputs ``(input, cell)`` of the networks from that after their outputs."""
        *activations, activation = _activations(known, layer)
        self._last[i].index_add_(2, layer.transformed, torch.bmm(activation, back.mT))
        back = self._before_relu(layer.last[..., : self.n_hidden].mT, back, activation)
        for k in reversed(range(self.depth)):
            at = i * self.depth + k
            self._hidden[at].baddbmm_(activations[k], back.mT)
            back = self._before_relu(self._backwards[at], back, activations[k])
        self._first[i].index_add_(0, layer.inputs, known @ back.flatten(0, 1).t())
        return layer.first[:, : self.n_hidden].flatten(0, 1).t() @ back.flatten(0, 1)

    def _before_relu(self, backwards: Tensor, back: Tensor, activation: Tensor) -> Tensor:
        back = torch.bmm(backwards, back)
        # in place: multiplying with a mask takes twenty times as long
        _relu_backward(back, activation[:, : self.n_hidden], 0, grad_input=back)
        return back

    def stack(self) -> _Stack:
        """In the shape of the matrices."""
        first, hidden, last = (m.mT for m in self._sums)
        return _Stack(first.unflatten(1, (2, -1)), hidden.unflatten(0, (len(first), self.depth)), last)


def _differentiable_grads(
    state: Tensor,
    measured: Tensor | None,
    parts: Sequence[tuple[Tensor, Tensor]],
    stack: _Stack,
    grads: tuple[Tensor, ...],
) -> tuple[Tensor | None, ...]:
    """Derivatives of :func:`_flow` that can be differentiated again; None where none is wanted."""
    inputs = [state, *stack]
    wanted = [i for i, tensor in enumerate(inputs) if tensor.requires_grad]
    after = state.clone()
    log_det, _ = _flow(after, _unstacked(stack, parts), measured)
    options = {"create_graph": True, "allow_unused": True}
    found = torch.autograd.grad((after, log_det), [inputs[i] for i in wanted], grads, **options)
    by_input = dict(zip(wanted, found, strict=True))
    return by_input.get(0), None, None, *(by_input.get(i) for i in (1, 2, 3))


def _transformed(
    layers: Sequence[CouplingLayer], x: Tensor, covariates: Tensor | None, measured: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``x`` ``(feature, cell)`` after the layers, and the log-determinant ``(cell,)``."""
    stack, parts, state = _stack(layers), [(layer.inputs, layer.transformed) for layer in layers], _state(x, covariates)
    is_plain = torch.compiler.is_compiling() or x.device.type != "cpu" or torch.is_autocast_enabled("cpu")
    if is_plain or not torch.is_grad_enabled():
        log_det, _ = _flow(state, _unstacked(stack, parts), measured)
    else:
        state, log_det = _LeanFlow.apply(state, measured, parts, *stack)
    return state[: len(x)], log_det


def _restored(layers: Sequence[CouplingLayer], y: Tensor, covariates: Tensor | None, measured: Tensor | None) -> Tensor:
    """The ``x`` that :func:`_transformed` maps to ``y``."""
    stack, parts, state = _stack(layers), [(layer.inputs, layer.transformed) for layer in layers], _state(y, covariates)
    for layer in reversed(_unstacked(stack, parts)):
        scale, shift = _outputs(state.index_select(0, layer.inputs), layer)
        x = (state.index_select(0, layer.transformed) - shift) * torch.exp(-scale.tanh())
        if measured is not None:
            x = x * measured.index_select(0, layer.transformed)
        state.index_copy_(0, layer.transformed, x)
    return state[: len(y)]


def _state(x: Tensor, covariates: Tensor | None) -> Tensor:
    """Features, covariates and a row of ones ``(feature and covariate and 1, cell)``, new memory."""
    ones = x.new_ones(1, x.shape[1])
    return torch.cat([x, ones] if covariates is None else [x, covariates, ones])


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
        # the row after the covariates is the constant that biases multiply
        inputs = torch.cat([passed, torch.arange(n_features, n_features + n_covariates + 1)])
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
        return _transformed([self], x, covariates, measured)

    def inverse(self, y: Tensor, covariates: Tensor | None = None, measured: Tensor | None = None) -> Tensor:
        """The ``x`` that :meth:`forward` maps to ``y``.

        Parameters
        ----------
        y
            Transformed features ``(feature, cell)``.
        covariates, measured
            As in :meth:`forward`.
        """
        return _restored([self], y, covariates, measured)


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
        u, log_det = _transformed(self._active_layers(), x.t(), given, there)
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
        return _restored(self._active_layers(), u.t(), given, there).t()

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
