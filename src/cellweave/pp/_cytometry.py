"""From measured intensities to values that models read, and back."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from anndata import AnnData

from ._intensities import Intensities, per_marker
from ._logicle import automatic_logicle
from ._reference import check_same_transform, reference_step, table_column
from ._transforms import Arcsinh, Logicle, Scaling, some

__all__ = ["arcsinh", "logicle", "scale_markers"]


def arcsinh(
    adata: AnnData,
    cofactor: float | Mapping[str, float] = 5,
    translation: float | Mapping[str, float] = 0,
    layer: str | None = None,
    key_added: str | None = None,
    allow_nan: bool = False,
) -> None:
    """Transform intensities to arcsinh((x - translation) / cofactor): linear around zero, logarithmic far from it.

    Parameters
    ----------
    adata
        Cells x markers, with intensities as they were measured (compensated, in flow cytometry). Sparse matrices stay
        sparse where ``translation`` is 0, and become dense otherwise.
    cofactor
        Width of the linear part, in units of the intensities; larger than 0. About 5 in mass cytometry and 150 in
        fluorescence. One number, or one for each marker by name.
    translation
        Subtracted before; some mass cytometry files are randomised within [-1, 0], for which the literature takes 1. One
        number, or one for each marker by name.
    layer
        Layer to transform; ``adata.X`` by default.
    key_added
        Layer for the result; the transformed matrix itself by default.
    allow_nan
        Leave NaN, which stands for markers that were not measured, instead of refusing it.

    Returns
    -------
    Nothing. Writes the values (float32, float64 where they were) and, for
    :func:`~cellweave.pp.inverse_transform`, the parameters to ``adata.uns["cellweave_transforms"]``.

    Raises
    ------
    KeyError
        If there is no such layer.
    TypeError
        If ``adata`` is no AnnData, or holds no numbers.
    ValueError
        If a parameter is wrong, a value is NaN or infinite, ``adata`` is a view or backed, or the matrix was
        transformed already. Nothing is written then.

    Examples
    --------
    >>> cw.pp.arcsinh(adata, cofactor=5)
    >>> cw.pp.scale_markers(adata)
    """
    values = Intensities(adata, layer, key_added, Arcsinh, allow_nan)
    factors = per_marker(cofactor, values.markers, "cofactor")
    shifts = per_marker(translation, values.markers, "translation")
    if not (factors > 0).all():
        first = int(np.argmin(factors > 0))
        raise ValueError(
            f"`cofactor` must be larger than 0, got {factors[first]:g} for marker {values.markers[first]!r}; take about 5 "
            "for mass cytometry, 150 for fluorescence."
        )
    step = Arcsinh(np.array(values.markers, dtype=object), factors, shifts)
    values.replace(step, keep_sparse=not shifts.any())


def logicle(
    adata: AnnData,
    q: float = 0.05,
    m: float = 4.5,
    quantile_clip: float | None = 1e-5,
    reference: AnnData | pd.DataFrame | None = None,
    layer: str | None = None,
    key_added: str | None = None,
    allow_nan: bool = False,
) -> None:
    """Transform intensities to the logicle scale, whose parameters are found for each marker.

    The top of the scale ``t`` is the largest intensity. The width of the linear part follows from a low quantile r of
    the negative intensities without outliers: w = (m - log10(t / abs(r))) / 2. Where this gives no usable scale, mostly
    because there are no negative intensities, t = 5e5 and w = 1 are taken, with a warning. Needs
    ``pip install "cellweave[cytometry]"``.

    Parameters
    ----------
    adata
        Cells x markers, with (compensated) intensities. Sparse matrices become dense, because zero is not kept.
    q
        Quantile r of the negative intensities that the linear part reaches, in [0, 1].
    m
        Decades of the scale.
    quantile_clip
        Values below this quantile of a marker are raised to it; None or 0 leaves them.
    reference
        Take the parameters of data that were transformed with this function, so that new samples are treated as those
        that a model was trained on; or a table with markers as index and columns ``t``, ``m`` and ``w``. The three
        parameters above are not read then.
    layer
        Layer to transform; ``adata.X`` by default.
    key_added
        Layer for the result; the transformed matrix itself by default.
    allow_nan
        Leave NaN, which stands for markers that were not measured, instead of refusing it.

    Returns
    -------
    Nothing. Writes the values (about 0 to 1; float32, float64 where they were) and, for
    :func:`~cellweave.pp.inverse_transform`, the parameters to ``adata.uns["cellweave_transforms"]``.

    Raises
    ------
    KeyError
        If there is no such layer.
    ModuleNotFoundError
        If ``flowutils`` is not installed.
    TypeError
        If ``adata`` is no AnnData, or holds no numbers.
    ValueError
        If a parameter is wrong, ``reference`` lacks a marker, a value is NaN or infinite, ``adata`` is a view or backed,
        or the matrix was transformed already. Nothing is written then.

    References
    ----------
    Parks, Roederer, Moore: A new "logicle" display method. Cytometry A 69 (2006).
    Moore, Parks: Update for the logicle data scale including operational code implementations. Cytometry A 81 (2012).
    """
    values = Intensities(adata, layer, key_added, Logicle, allow_nan)
    if reference is None:
        step = automatic_logicle(values, q, m, quantile_clip or 0.0)
    elif isinstance(reference, pd.DataFrame):
        step = _logicle_of_table(reference, values.markers)
    else:
        step = reference_step(reference, values, Logicle)[0]
    values.replace(step)


def _logicle_of_table(table: pd.DataFrame, markers: list[str]) -> Logicle:
    t, m, w = (table_column(table, name, markers) for name in ("t", "m", "w"))
    bad = ~((t > 0) & (m > 0) & (w >= 0) & (2 * w <= m))
    if bad.any():
        j = int(np.argmax(bad))
        raise ValueError(
            f"`reference` gives no logicle scale for {int(bad.sum())} marker(s) (first: {markers[j]!r} with t={t[j]:g}, "
            f"m={m[j]:g}, w={w[j]:g}); t and m must be larger than 0, and w between 0 and m / 2."
        )
    return Logicle(np.array(markers, dtype=object), t, m, w, low=np.full(len(markers), -np.inf))


def scale_markers(
    adata: AnnData,
    center: bool | None = None,
    max_value: float | None = 10,
    reference: AnnData | pd.DataFrame | None = None,
    layer: str | None = None,
    key_added: str | None = None,
    allow_nan: bool = False,
) -> None:
    """Scale transformed intensities to a standard deviation of one per marker, and cut off extreme values.

    Parameters
    ----------
    adata
        Cells x markers, transformed by :func:`~cellweave.pp.arcsinh` or :func:`~cellweave.pp.logicle`. Sparse matrices
        become dense, because zero is not kept.
    center
        True: (x - mean) / std. False: x / std - 1, which brings an intensity of zero to -1, where a marker table has
        negative markers. By default False after ``arcsinh`` and True otherwise.
    max_value
        Values are cut off at plus and minus this number; None leaves them.
    reference
        Take the statistics of data that were scaled with this function (and with them ``center`` and ``max_value``):
        new samples must be scaled as those that a model was trained on. Or a table with markers as index, a column
        ``std``, and for centring ``mean``.
    layer
        Layer to scale; ``adata.X`` by default.
    key_added
        Layer for the result; the scaled matrix itself by default.
    allow_nan
        Leave NaN, which stands for markers that were not measured, instead of refusing it; the statistics are those of
        the other values.

    Returns
    -------
    Nothing. Writes the values (float32, float64 where they were) and, for
    :func:`~cellweave.pp.inverse_transform`, the statistics (population standard deviations, ``ddof=0``) to
    ``adata.uns["cellweave_transforms"]``.

    Raises
    ------
    KeyError
        If there is no such layer.
    TypeError
        If ``adata`` is no AnnData, or holds no numbers.
    ValueError
        If a marker is constant, ``reference`` lacks a marker or was transformed in another way, a value is NaN or infinite,
        ``adata`` is a view or backed, or the matrix was scaled already. Nothing is written then.
    """
    values = Intensities(adata, layer, key_added, Scaling, allow_nan)
    if max_value is not None and not 0 < max_value < np.inf:
        raise ValueError(
            f"`max_value` must be a number larger than 0, got {max_value!r}; pass None to cut off nothing."
        )
    after_arcsinh = any(isinstance(step, Arcsinh) for step in values.steps)
    if reference is None:
        step = _own_scaling(values, not after_arcsinh if center is None else center, max_value)
    elif isinstance(reference, pd.DataFrame):
        step = _scaling_of_table(reference, values.markers, center, max_value)
    else:
        step = _scaling_of_reference(reference, values, center)
    values.replace(step)


def _own_scaling(values: Intensities, center: bool, max_value: float | None) -> Scaling:
    mean, std = np.zeros(len(values.markers)), np.zeros(len(values.markers))
    for j, column in values.columns():
        # rounding gives constant values a tiny spread
        if len(column) and column.min() < column.max():
            mean[j], std[j] = column.mean(), column.std()
    if not std.all():
        constant = [marker for marker, spread in zip(values.markers, std, strict=True) if spread == 0]
        raise ValueError(
            f"`{values.where}` is constant in {len(constant)} marker(s) (first: {some(constant)}), which cannot be scaled; "
            f"leave them out with `adata = adata[:, ~adata.var_names.isin({constant[:5]!r})].copy()`."
        )
    return Scaling(np.array(values.markers, dtype=object), std, mean if center else None, max_value)


def _scaling_of_table(table: pd.DataFrame, markers: list[str], center: bool | None, max_value: float | None) -> Scaling:
    std = table_column(table, "std", markers)
    if not (std > 0).all():
        first = markers[int(np.argmin(std > 0))]
        raise ValueError(f"`reference['std']` must be larger than 0, which it is not for marker {first!r}; correct it.")
    is_centered = "mean" in table if center is None else center
    mean = table_column(table, "mean", markers) if is_centered else None
    return Scaling(np.array(markers, dtype=object), std, mean, max_value)


def _scaling_of_reference(reference: AnnData, values: Intensities, center: bool | None) -> Scaling:
    step, before = reference_step(reference, values, Scaling)
    if center is not None and center != (step.mean is not None):
        raise ValueError(
            f"`center={center}` contradicts `reference`, which was scaled with `center={step.mean is not None}`; leave out "
            "`center`."
        )
    check_same_transform(before, values)
    return step
