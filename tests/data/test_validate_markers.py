"""Checks of marker intensities."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData

from cellweave.data import check_intensities, check_measured, find_markers

MARKERS = ["CD3", "CD4"]


def _adata(n_cells: int = 40) -> AnnData:
    x = np.random.default_rng(0).normal(size=(n_cells, 3)).astype(np.float32)
    x[:, 1] = 5000  # no marker of the table
    return AnnData(
        x, obs=pd.DataFrame(index=[f"c{i}" for i in range(n_cells)]), var=pd.DataFrame(index=["CD4", "FSC", "CD3"])
    )


def test_markers_are_found_by_name():
    """Protects the order: positions follow the table, not the data."""
    assert find_markers(_adata().var_names, MARKERS).tolist() == [2, 0]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["cd4", "FSC", "CD3"], r"1 of the 2 markers .* \(first: 'CD4'\), which has 'cd4'.*; rename the columns"),
        (["CD4", "FSC", "CD3(Er170)"], r"first: 'CD3'\), which has 'CD3\(Er170\)'; rename"),
        (
            ["a", "b", "c"],
            r"2 of the 2 markers of the table are not in `adata.var_names` \(first: 'CD3', 'CD4'\); rename",
        ),
    ],
)
def test_similar_names_are_proposed(names, message):
    """Protects users whose names differ a little: the message has the candidates, and none where there are none."""
    with pytest.raises(ValueError, match=message):
        find_markers(pd.Index(names), MARKERS)


FAULTS = {
    "NaN": (np.nan, r"2 value\(s\) of 1 marker\(s\) in 2 cell\(s\) that are NaN .*'CD3' of cell 'c7'\); .*`nan_layer`"),
    "infinite": (-np.inf, "that are infinite .*'CD3' of cell 'c7'"),
    "raw": (
        -1000.0,
        r"at or above 1000 in size .*raw intensities .*; transform and scale .*`cellweave.pp.scale_markers`",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("convert", [np.asarray, sp.csr_matrix, sp.csc_matrix, np.asfortranarray])
def test_faults_are_located(fault, convert):
    """Protects training from values that are no scaled intensities, whatever the matrix: count, marker and first cell."""
    value, message = FAULTS[fault]
    adata = _adata()
    adata.X[[7, 20], 2] = value
    adata.X = convert(adata.X)
    with pytest.raises(ValueError, match=message):
        check_intensities(adata, MARKERS)
    adata.layers["scaled"] = adata.X
    adata.X = np.zeros(adata.shape)
    with pytest.raises(ValueError, match=r"`adata.layers\['scaled'\]` has"):
        check_intensities(adata, MARKERS, layer="scaled")


def test_faults_beyond_the_first_chunk_are_located():
    """Protects large data, which are read in parts: all are checked, and the cell is counted from the first of all."""
    adata = _adata(20_000)
    adata.X[19_990, 0] = np.nan
    with pytest.raises(ValueError, match="1 value.*'CD4' of cell 'c19990'"):
        check_intensities(adata, MARKERS)


def test_variables_that_are_no_markers_may_hold_anything():
    """Protects panels with scatter channels and unused markers."""
    adata = _adata()
    adata.X[0, 1] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_intensities(adata, MARKERS)


@pytest.mark.parametrize("factor", [0.1, 20])
def test_spread_is_worth_a_word(factor):
    """Protects users who forgot to scale: one warning with the spread found; none for new data."""
    adata = _adata()
    adata.X[:, [0, 2]] *= factor
    with pytest.warns(
        UserWarning, match=r"standard deviation of .* on average, where scaled ones have 1; transform"
    ) as caught:
        check_intensities(adata, MARKERS)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_intensities(adata, MARKERS, warn=False)


def test_what_was_not_measured_does_not_matter():
    """Protects panels that differ between batches: NaN is allowed where the layer says 0, and nowhere else."""
    adata = _adata()
    measured = np.ones(adata.shape)
    measured[:10, 2] = 0
    adata.X[:10, 2], adata.layers["measured"] = np.nan, measured
    check_measured(adata, "measured")
    check_intensities(adata, MARKERS, measured="measured")
    adata.X[12, 2] = np.nan
    with pytest.raises(ValueError, match=r"1 value\(s\) .* NaN .*'CD3' of cell 'c12'"):
        check_intensities(adata, MARKERS, measured="measured")
    adata.layers["measured"][:, 0] = 0
    with pytest.raises(
        ValueError, match=r"1 marker\(s\) .* measured in no cell.*`nan_layer='measured'`.*'CD4'\); leave"
    ):
        check_intensities(_measured_nowhere(), MARKERS, measured="measured")


def _measured_nowhere() -> AnnData:
    adata = _adata()
    adata.layers["measured"] = np.ones(adata.shape)
    adata.layers["measured"][:, 0] = 0
    return adata


def test_mask_must_be_a_mask():
    """Protects `nan_layer`: a layer that does not exist, or holds other values than 0 and 1, is named."""
    adata = _adata()
    with pytest.raises(KeyError, match="`nan_layer='measured'` not found; `adata.layers` has nothing"):
        check_measured(adata, "measured")
    adata.layers["measured"] = np.ones(adata.shape)
    adata.layers["measured"][3, 1] = np.nan
    with pytest.raises(
        ValueError, match=r"`adata.layers\['measured'\]` has 1 value.* \(first: nan in cell 'c3'\); give 1"
    ):
        check_measured(adata, "measured")
    adata.layers["measured"] = sp.csr_matrix(np.ones(adata.shape))
    check_measured(adata, "measured")
