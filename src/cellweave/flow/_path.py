from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["PathSample", "end_point", "linear_path"]


class PathSample(NamedTuple):
    """Points on paths from noise to data, and the velocities there."""

    x: Tensor  # the shape of the data
    velocity: Tensor  # likewise


def linear_path(start: Tensor, end: Tensor, t: Tensor) -> PathSample:
    r"""Points :math:`x_t = (1-t)\,x_0 + t\,x_1` and their velocities :math:`x_1 - x_0`.

    Parameters
    ----------
    start
        Noise :math:`x_0` ``(cell, ...)``.
    end
        Data :math:`x_1` of the same shape.
    t
        Time of every cell ``(cell,)``.

    References
    ----------
    Lipman et al., *Flow matching for generative modeling* (2023), the conditional optimal-transport path.
    """
    t = t.view(-1, *[1] * (end.ndim - 1))
    return PathSample((1 - t) * start + t * end, end - start)


def end_point(x: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
    """Where a straight path from ``x`` at the time ``t`` ``(cell,)`` ends at the time 1."""
    return x + velocity * (1 - t.view(-1, *[1] * (x.ndim - 1)))
