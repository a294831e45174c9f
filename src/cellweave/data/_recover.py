"""Integer counts from log-normalised values, with a proof for every cell that the result is the only possible one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import scipy.sparse as sp

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["RecoveredCounts", "recover_counts", "stored_precision"]

# The smallest count of a cell is nearly always 1; larger values than 5 do not occur in cells that pass quality control.
MAX_SMALLEST_COUNT = 5
# Digits after the point that files are rounded to in practice; more digits cannot be told from float32 itself.
DECIMALS = (2, 3, 4, 5)
TINY = 1e-12


class RecoveredCounts(NamedTuple):
    """Counts and how they were found.

    Parameters
    ----------
    counts
        Integer counts as float32, CSR, cells x genes.
    scale
        Per cell the factor s of the stored ``log(1 + s * count)``: target sum / library size; NaN for an empty cell.
    deviation
        Per cell the largest distance between a stored value and ``log(1 + s * count)``, in natural log units.
    """

    counts: sp.csr_matrix
    scale: NDArray[np.float64]
    deviation: NDArray[np.float64]


def recover_counts(
    values: Any, *, tolerance: float | None = None, cell_names: Sequence[str] | None = None
) -> RecoveredCounts:
    r"""Find the integer counts c behind stored values :math:`x = \log(1 + s\,c)` with one unknown s > 0 per cell.

    The smallest nonzero value of a cell belongs to a count k, almost always 1; k = 1, ..., 5 are tried in turn. Because
    a stored value is only known within the tolerance, k allows an interval of s; the interval leaves one integer for
    every small value; these integers narrow the interval, which then leaves one integer for the larger values, and so
    on. The result is therefore proven: no s fits the smaller k, and no other integers fit this one.

    Parameters
    ----------
    values
        Cells x genes, dense or sparse, finite and not negative: natural log of 1 + depth-normalised counts.
    tolerance
        Largest rounding error of a stored value, in natural log units: 0.5 * 10^-d for d decimals. Default: read off the
        data, see :func:`stored_precision`. The floating-point error of the values is added.
    cell_names
        Names for error messages; default: row numbers.

    Returns
    -------
    RecoveredCounts
        Counts, scale and deviation per cell.

    Raises
    ------
    ValueError
        Values are negative, not finite or all integers, or the counts of a cell are not determined by its values.

    Notes
    -----
    A common divisor of all counts of a cell cannot be seen in its values; the smallest counts that fit are returned.
    """
    matrix = _checked_csr(values)
    tolerance = stored_precision(matrix.data) if tolerance is None else tolerance + _float_error(matrix.data)
    counts = matrix.astype(np.float32)
    scale, deviation = np.full(matrix.shape[0], np.nan), np.zeros(matrix.shape[0])
    for row, (start, stop) in enumerate(zip(matrix.indptr[:-1], matrix.indptr[1:], strict=True)):
        if start == stop:
            continue
        log_values = matrix.data[start:stop].astype(np.float64)
        name = row if cell_names is None else cell_names[row]
        counts.data[start:stop], scale[row] = _recover_cell(log_values, tolerance, name)
        deviation[row] = np.abs(np.log1p(scale[row] * counts.data[start:stop].astype(np.float64)) - log_values).max()
    return RecoveredCounts(counts, scale, deviation)


def stored_precision(values: NDArray[np.floating]) -> float:
    """Largest rounding error of stored values, in their own units.

    Values that all have at most d (2 to 5) digits after the point are off by up to half a unit of the last digit. To this
    comes the error of the floating-point type: four units in the last place of the largest value (the value itself and
    the three operations that made it: division, multiplication, logarithm). float64 is treated as float32, because most
    float64 files were written from float32.

    Parameters
    ----------
    values
        Nonzero stored values, any shape.

    Returns
    -------
    float
        Half of the last decimal, if there is one, plus the floating-point error.
    """
    float_error = _float_error(values)
    for decimals in DECIMALS:
        if np.all(np.abs(values - np.round(values.astype(np.float64), decimals)) <= float_error):
            return 0.5 * 10.0**-decimals + float_error
    return float_error


def _float_error(values: NDArray[np.floating]) -> float:
    """Four units in the last place of the largest value."""
    epsilon = max(np.finfo(values.dtype).eps, np.finfo(np.float32).eps)
    return 4 * float(epsilon) * float(values.max(initial=1.0))


def _checked_csr(values: Any) -> sp.csr_matrix:
    """CSR copy without stored zeros, after the checks that do not depend on a cell."""
    matrix = sp.csr_matrix(values, copy=True)
    matrix.sum_duplicates()
    matrix.eliminate_zeros()
    if matrix.dtype.kind != "f":
        matrix = matrix.astype(np.float64)
    if not np.all(np.isfinite(matrix.data)):
        raise ValueError(f"Log-normalised values must be finite, found {_first(matrix, ~np.isfinite(matrix.data))}.")
    if np.any(matrix.data < 0):
        where = _first(matrix, matrix.data < 0)
        raise ValueError(f"Log-normalised values cannot be negative, found {where}; scaled data hold no counts.")
    if matrix.nnz and np.array_equal(matrix.data, np.rint(matrix.data)):
        raise ValueError("All values are integers, so they look like counts already; pass log-normalised values.")
    return matrix


def _first(matrix: sp.csr_matrix, bad: NDArray[np.bool_]) -> str:
    """Where the first bad stored value is, for messages."""
    position = int(np.flatnonzero(bad)[0])
    row = int(np.searchsorted(matrix.indptr, position, side="right")) - 1
    found, column = matrix.data[position], int(matrix.indices[position])
    return f"{int(bad.sum())} such values, the first is {found} in row {row}, column {column}"


def _recover_cell(log_values: NDArray[np.float64], tolerance: float, name: Any) -> tuple[NDArray[np.float64], float]:
    """Counts and scale of one cell for the smallest k that is possible."""
    # the true value of s * count lies between these two; a stored nonzero value is never the count 0
    low, high = np.maximum(np.expm1(log_values - tolerance), TINY), np.expm1(log_values + tolerance)
    for smallest in range(1, MAX_SMALLEST_COUNT + 1):
        least, most = _possible_counts(low, high, smallest)
        if np.any(least > most):
            continue  # no integer is left for some value: the smallest count is not k
        if np.any(least < most):
            raise ValueError(
                f"The values of cell '{name}' are stored too coarsely to tell a count of {least[least < most].min():.0f} "
                f"from its neighbours (tolerance {tolerance:.2g}, natural log units); use a file with more decimals."
            )
        return least, float(((low / least).max() + (high / least).min()) / 2)
    raise ValueError(
        f"The values of cell '{name}' are not log(1 + scale * count) of integer counts: at best a value is "
        f"{_best_deviation(log_values):.2g} away from an integer multiple of the smallest one (natural log units, "
        f"tolerance {tolerance:.2g}); pass log1p of depth-normalised counts, neither scaled nor batch-corrected."
    )


def _possible_counts(
    low: NDArray[np.float64], high: NDArray[np.float64], smallest: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Least and most integer that each value can be if the smallest value is the count ``smallest``.

    The range of s and the ranges of the counts narrow each other until nothing changes; every round settles at least
    one more value, so the loop ends.
    """
    scale_low, scale_high, n_settled = low.min() / smallest, high.min() / smallest, -1
    while True:
        least, most = np.maximum(np.ceil(low / scale_high), 1), np.floor(high / scale_low)
        settled = least == most
        if np.any(least > most) or settled.sum() == n_settled:
            return least, most
        n_settled = int(settled.sum())
        scale_low = max(scale_low, (low[settled] / least[settled]).max(initial=0.0))
        scale_high = min(scale_high, (high[settled] / least[settled]).min(initial=np.inf))


def _best_deviation(log_values: NDArray[np.float64]) -> float:
    """Distance of the worst value from the closest multiple of the smallest value / k, for the best k."""
    units = np.expm1(log_values.min()) / np.arange(1, MAX_SMALLEST_COUNT + 1)[:, None]
    fitted = np.log1p(units * np.rint(np.expm1(log_values) / units))
    return float(np.abs(fitted - log_values).max(axis=1).min())
