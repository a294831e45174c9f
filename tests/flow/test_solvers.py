"""Solvers, paths and guidance."""

from __future__ import annotations

import importlib.util
import math
import sys

import pytest
import torch

from cellweave.flow import (
    FIXED_SOLVERS,
    Guidance,
    end_point,
    evaluations,
    guide,
    integrate,
    linear_path,
    shift_time,
    time_grid,
)

ORDERS = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4}


def _velocity(t, x):
    """Solution from 1: ``exp(sin(2 t))``."""
    return 2 * math.cos(2 * t) * x


def _error(solver, n_steps):
    end = integrate(_velocity, torch.ones(1, dtype=torch.float64), time_grid(n_steps + 1), solver)
    return abs(end.item() - math.exp(math.sin(2)))


@pytest.mark.parametrize("solver", ORDERS)
def test_order_of_convergence(solver):
    """Protects every coefficient of a solver: half the step makes the error smaller by two to the order."""
    observed = math.log2(_error(solver, 40) / _error(solver, 80))
    assert observed == pytest.approx(ORDERS[solver], abs=0.25)


@pytest.mark.parametrize("solver", FIXED_SOLVERS)
def test_evaluations_are_counted(solver):
    """Protects the stated cost: the velocity is evaluated as often as the solver says."""
    times = []
    integrate(lambda t, x: times.append(t) or x, torch.ones(1), time_grid(4), solver)
    assert len(times) == evaluations(solver, 4)


def test_a_falling_grid_runs_the_flow_backwards():
    """Protects inversion: from the end back to the start on the same times."""
    x, grid = torch.ones(1, dtype=torch.float64), time_grid(60)
    there = integrate(_velocity, x, grid, "rk4")
    torch.testing.assert_close(integrate(_velocity, there, grid.flip(0), "rk4"), x, rtol=1e-6, atol=0)


def test_uneven_times_are_used():
    """Protects shifted grids: a step per pair of neighbours, whatever their distance."""
    grid = torch.tensor([0.0, 0.1, 1.0], dtype=torch.float64)
    torch.testing.assert_close(integrate(lambda t, x: x, torch.ones(1).double(), grid, "euler").item(), 1.1 * 1.9)


def test_shift_keeps_both_ends():
    """Protects the grid: ends stay, a shift below 1 makes early steps small, and inverse shifts cancel."""
    grid = time_grid(11, 0.5)
    assert (grid[0], grid[-1]) == (0, 1)
    assert (grid.diff() > 0).all()
    assert grid[1] < 0.1 < grid[-1] - grid[-2]
    torch.testing.assert_close(shift_time(grid, 2.0), time_grid(11))


def test_adaptive_solver_names_what_to_install(monkeypatch):
    """Protects users without torchdiffeq: one sentence with the command."""
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(ImportError, match=r"need torchdiffeq.*pip install 'cellweave\[flow\]'"):
        integrate(_velocity, torch.ones(1), time_grid(2), "dopri5")


@pytest.mark.skipif(importlib.util.find_spec("torchdiffeq") is None, reason="torchdiffeq is not installed")
@pytest.mark.parametrize("solver", ["dopri5", "bosh3"])
def test_adaptive_solver_reaches_the_tolerance(solver):
    """Protects adaptive steps: the end is exact within the tolerance, from a grid of two times."""
    x = torch.ones(1, dtype=torch.float64)
    end = integrate(_velocity, x, time_grid(2), solver, rtol=1e-8, atol=1e-8)
    assert end.item() == pytest.approx(math.exp(math.sin(2)), rel=1e-6)


@pytest.mark.skipif(importlib.util.find_spec("torchdiffeq") is None, reason="torchdiffeq is not installed")
@pytest.mark.parametrize("solver", ["euler", "midpoint", "rk4"])
def test_fixed_steps_equal_those_of_torchdiffeq(solver):
    """Protects published trajectories, which torchdiffeq made."""
    from torchdiffeq import odeint

    x, grid = torch.ones(1, dtype=torch.float64), time_grid(8)
    expected = odeint(lambda t, y: _velocity(float(t), y), x, grid, method=solver)[-1]
    torch.testing.assert_close(integrate(_velocity, x, grid, solver), expected)


def test_bad_arguments_are_refused():
    """Protects from a KeyError or an empty loop."""
    with pytest.raises(ValueError, match="`solver` must be one of euler, .*, got 'rk5'; choose one of them."):
        integrate(_velocity, torch.ones(1), time_grid(2), "rk5")
    with pytest.raises(ValueError, match="`grid` must hold at least two times"):
        integrate(_velocity, torch.ones(1), torch.zeros(1), "euler")
    with pytest.raises(ValueError, match="`n_points` must be at least 2, got 1"):
        time_grid(1)


def test_path_and_its_end():
    """Protects the path: data at 1, noise at 0, and a point with the true velocity ends at the data."""
    start, end = torch.randn(3, 4, 2), torch.randn(3, 4, 2)
    t = torch.tensor([0.0, 0.3, 1.0])
    path = linear_path(start, end, t)
    torch.testing.assert_close(path.x[0], start[0])
    torch.testing.assert_close(path.x[2], end[2])
    torch.testing.assert_close(end_point(path.x, path.velocity, t), end)


def test_guidance():
    """Protects its meaning: 1 is the conditional velocity, 0 the other, beyond 1 extrapolates; outside its time none."""
    own, other = torch.tensor([3.0]), torch.tensor([1.0])
    assert [guide(own, other, s).item() for s in (0, 1, 2)] == [1, 3, 5]
    guidance = Guidance(2.0, 0.2, 0.8)
    assert [guidance.at(t) for t in (0.1, 0.2, 0.5, 0.9)] == [1.0, 2.0, 2.0, 1.0]
