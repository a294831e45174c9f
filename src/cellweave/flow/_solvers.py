"""Solvers of ordinary differential equations that keep one state."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor

__all__ = ["ADAPTIVE_SOLVERS", "FIXED_SOLVERS", "Velocity", "evaluations", "integrate"]

Velocity: TypeAlias = Callable[[float, Tensor], Tensor]


def _euler(f: Velocity, t: float, h: float, x: Tensor) -> Tensor:
    return x + h * f(t, x)


def _midpoint(f: Velocity, t: float, h: float, x: Tensor) -> Tensor:
    return x + h * f(t + h / 2, x + h / 2 * f(t, x))


def _heun(f: Velocity, t: float, h: float, x: Tensor) -> Tensor:
    first = f(t, x)
    return x + h / 2 * (first + f(t + h, x + h * first))


def _rk4(f: Velocity, t: float, h: float, x: Tensor) -> Tensor:
    """The 3/8 rule, which is what torchdiffeq calls "rk4"."""
    k1 = f(t, x)
    k2 = f(t + h / 3, x + h * k1 / 3)
    k3 = f(t + 2 * h / 3, x + h * (k2 - k1 / 3))
    k4 = f(t + h, x + h * (k1 - k2 + k3))
    return x + h * (k1 + 3 * (k2 + k3) + k4) / 8


# Step and number of evaluations of it.
_STEPS: dict[str, tuple[Callable[[Velocity, float, float, Tensor], Tensor], int]] = {
    "euler": (_euler, 1),
    "midpoint": (_midpoint, 2),
    "heun": (_heun, 2),
    "rk4": (_rk4, 4),
}
FIXED_SOLVERS = tuple(_STEPS)
ADAPTIVE_SOLVERS = ("dopri5", "bosh3", "dopri8")


def evaluations(solver: str, n_points: int) -> int:
    """How often a fixed-step ``solver`` evaluates the velocity on a grid of ``n_points`` times."""
    return _STEPS[_known(solver, FIXED_SOLVERS)][1] * (n_points - 1)


def integrate(
    velocity: Velocity, x: Tensor, grid: Tensor, solver: str = "midpoint", rtol: float = 1e-3, atol: float = 1e-3
) -> Tensor:
    """Follow ``velocity(t, x)`` along the times of ``grid`` and return the last state.

    Parameters
    ----------
    velocity
        Function of the time, a number, and the state.
    x
        State at the first time.
    grid
        At least two times ``(point,)``, rising or falling. Adaptive solvers use only the first and the last.
    solver
        ``"euler"``, ``"midpoint"``, ``"heun"`` or ``"rk4"`` (the 3/8 rule) with a step between neighbouring times;
        ``"bosh3"``, ``"dopri5"`` or ``"dopri8"`` with steps of their own (needs torchdiffeq). An adaptive step is one for
        all cells of ``x``, so results then depend on which cells are solved together, within the tolerance.
    rtol, atol
        Tolerances of adaptive solvers.

    Returns
    -------
    Tensor of the shape of ``x``.

    Raises
    ------
    ValueError
        If the solver is not known or the grid has fewer than two times.
    ImportError
        If an adaptive solver is asked for without torchdiffeq.
    """
    if grid.ndim != 1 or len(grid) < 2:
        raise ValueError(f"`grid` must hold at least two times, got the shape {tuple(grid.shape)}; give start and end.")
    if _known(solver, FIXED_SOLVERS + ADAPTIVE_SOLVERS) in ADAPTIVE_SOLVERS:
        return _integrate_adaptive(velocity, x, grid, solver, rtol, atol)
    step, _ = _STEPS[solver]
    times = grid.tolist()
    for t, after in zip(times[:-1], times[1:], strict=True):
        x = step(velocity, t, after - t, x)
    return x


def _integrate_adaptive(velocity: Velocity, x: Tensor, grid: Tensor, solver: str, rtol: float, atol: float) -> Tensor:
    ends = grid[[0, -1]].to(x)
    states = _torchdiffeq().odeint(lambda t, y: velocity(float(t), y), x, ends, rtol=rtol, atol=atol, method=solver)
    return states[-1]


def _torchdiffeq() -> Any:
    try:
        return importlib.import_module("torchdiffeq")
    except ImportError as error:
        raise ImportError(
            "Adaptive solvers need torchdiffeq, which is not installed; run `pip install 'cellweave[flow]'`, or use "
            "`solver`='midpoint'."
        ) from error


def _known(solver: str, solvers: tuple[str, ...]) -> str:
    if solver not in solvers:
        raise ValueError(f"`solver` must be one of {', '.join(solvers)}, got {solver!r}; choose one of them.")
    return solver
