"""Layers on two concatenated inputs of which the second often stays the same: its half is computed once."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["PairLinear", "PairSequential"]


class PairLinear(nn.Linear):
    r"""A linear layer on two concatenated inputs, :math:`W[x\,|\,y] + b = W_x x + (W_y y + b)`.

    Parameters
    ----------
    first, second
        Widths of the two inputs.
    out
        Width of the output.
    """

    def __init__(self, first: int, second: int, out: int) -> None:
        super().__init__(first + second, out)
        self.n_first = first

    def constant(self, second: Tensor) -> Tensor:
        """The part of the output that the second input gives, with the bias."""
        return F.linear(second, self.weight[:, self.n_first :], self.bias)

    def first(self, first: Tensor) -> Tensor:
        """The part of the output that the first input gives."""
        return F.linear(first, self.weight[:, : self.n_first])


class PairSequential(nn.Sequential):
    """A sequence of layers that starts with a :class:`PairLinear`; parameter names are those of ``nn.Sequential``.

    Parameters
    ----------
    pair
        The first layer.
    rest
        The layers after it.
    """

    def __init__(self, pair: PairLinear, *rest: nn.Module) -> None:
        super().__init__(pair, *rest)

    def constant(self, second: Tensor) -> Tensor:
        """What :meth:`forward` needs of the second input."""
        pair: PairLinear = self[0]  # type: ignore[assignment]
        return pair.constant(second)

    def forward(self, first: Tensor, constant: Tensor) -> Tensor:  # type: ignore[override]
        """Output for the first input and the ``constant`` of the second; the two broadcast."""
        pair: PairLinear = self[0]  # type: ignore[assignment]
        x = pair.first(first) + constant
        for layer in list(self)[1:]:
            x = layer(x)
        return x
