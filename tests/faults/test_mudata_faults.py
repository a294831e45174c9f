"""Faults of MuData (row 41), for every family that reads one: the modality is named."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from mudata import MuData

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:mudata", "ignore:Cannot join columns:UserWarning")


def _mudata(rna: AnnData, protein_cells: slice = slice(None), name: str = "rna", protein_first: bool = False) -> MuData:
    protein = AnnData(
        np.ones((rna.n_obs, 3), dtype=np.float32), obs=rna.obs[[]].copy(), var=pd.DataFrame(index=["p0", "p1", "p2"])
    )[protein_cells].copy()
    parts = {name: rna, "protein": protein}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mdata = MuData(dict(reversed(parts.items())) if protein_first else parts)
    for column in ("batch", "cell_type"):
        mdata.obs[column] = rna.obs[column]
    return mdata


REFUSED = {
    "41 other modality lacks cells": (
        lambda a: _mudata(a, slice(50)),
        "Modality 'protein' lacks 46 of the 96 .*'cell50'",
    ),
    "41 cells of a modality in another order": (
        lambda a: _mudata(a, slice(None, None, -1), protein_first=True),
        r"Modality 'rna' has 96 cells in another order .*'cell0'\); .*`mdata = mdata\[mdata.obs_names\].copy\(\)`",
    ),
    "41 modality missing": (lambda a: _mudata(a, name="gex"), r"odality 'rna'.*`mdata.mod` has \['gex', 'protein'\]"),
}


@pytest.fixture
def reads_mudata(family):
    if not hasattr(family.model, "setup_mudata"):
        pytest.skip("a family without setup_mudata")
    return family


def _fit(family, mdata: MuData):
    return family.fit(mdata, "setup_mudata", modalities={family.part: "rna"})


@pytest.mark.parametrize("row", REFUSED)
def test_mudata_is_refused_at_setup(reads_mudata, make, refuses, row):
    """Protects pairing: cells that are not the same in all modalities are refused before anything is written."""
    change, message = REFUSED[row]
    mdata = change(make())
    with refuses(mdata, ValueError, message):
        reads_mudata.model.setup_mudata(mdata, batch_key="batch", modalities={reads_mudata.part: "rna"})


@pytest.mark.parametrize("row", REFUSED)
def test_mudata_is_refused_as_query(reads_mudata, make, refuses, row):
    """Protects queries: the same faults are found in new data, before anything is computed."""
    model = _fit(reads_mudata, _mudata(make()))
    change, message = REFUSED[row]
    query = change(make())
    with refuses(query, ValueError, message):
        model.get_latent_representation(query)


def test_order_of_a_modality_that_is_not_read_does_not_matter(reads_mudata, make):
    """Protects unread modalities: their order is their own affair."""
    results = [
        _fit(reads_mudata, mdata).get_latent_representation()
        for mdata in (_mudata(make()), _mudata(make(), slice(None, None, -1)))
    ]
    np.testing.assert_array_equal(*results)


def test_advice_about_the_order_works(reads_mudata, make):
    """Protects the advice in the message: after it, every cell has its own batch and embedding."""
    expected = _fit(reads_mudata, _mudata(make()))
    mixed = _mudata(make(), slice(None, None, -1), protein_first=True)
    repaired = mixed[mixed.obs_names].copy()
    order = expected.adata.obs_names.get_indexer(repaired.obs_names)
    options = {"contexts": "sequential"} if reads_mudata.reads == "counts" else {}
    z = expected.get_latent_representation(repaired, indices=np.arange(96), **options)
    again = expected.get_latent_representation(_mudata(make()[order].copy()), **options)
    np.testing.assert_allclose(z, again, atol=1e-6)
