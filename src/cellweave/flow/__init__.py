"""Probability paths, times, solvers, guidance and noise of flow matching."""

from ._guidance import Guidance, guide
from ._noise import cell_generator, cell_uniform, gaussian_noise, poisson_noise, poisson_rate
from ._path import PathSample, end_point, linear_path
from ._solvers import ADAPTIVE_SOLVERS, FIXED_SOLVERS, Velocity, evaluations, integrate
from ._times import CascadedTimes, FlowTimes, TimeMode, cascade_grids, shift_time, time_grid
from ._transport import Transport, expected_transport, move_cells

__all__ = [
    "Transport",
    "expected_transport",
    "move_cells",
    "ADAPTIVE_SOLVERS",
    "FIXED_SOLVERS",
    "CascadedTimes",
    "FlowTimes",
    "Guidance",
    "PathSample",
    "TimeMode",
    "Velocity",
    "cascade_grids",
    "cell_generator",
    "cell_uniform",
    "end_point",
    "evaluations",
    "gaussian_noise",
    "guide",
    "integrate",
    "linear_path",
    "poisson_noise",
    "poisson_rate",
    "shift_time",
    "time_grid",
]
