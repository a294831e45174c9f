"""Labels of perturbation screens (rows 43 and 44): control cells, combinations, and perturbations that training never saw."""

from __future__ import annotations

import numpy as np
import pytest

from cellweave.data import UnseenPerturbationError

pytestmark = pytest.mark.reads("expression")


@pytest.mark.parametrize("batch", [None, "b1"])
def test_control_cells_are_missing(family, make, refuses, batch):
    """Protects row 43: without control cells, in all data or in one group, nothing is compared with the wrong cells."""
    adata = make()
    gone = adata.obs["perturbation"] == "control"
    adata = adata[~(gone if batch is None else gone & (adata.obs["batch"] == batch))].copy()
    message = (
        "no control cells, labelled 'control'; it has 'drug'" if batch is None else r"1 group\(s\) .* \('b1'\); leave"
    )
    with refuses(adata, ValueError, message):
        family.register(adata, batch_key="batch")


def test_the_order_of_a_combination_does_not_matter(family, make):
    """Protects row 44: `A+B` in the training data and `B+A` in a question are one condition."""
    plain, turned = make(), make()
    turned.obs["perturbation"] = turned.obs["perturbation"].replace("gene1+drug", "drug+gene1")
    models = [family.fit(adata) for adata in (plain, turned)]
    x = [model.predict_perturbation(["drug+gene1", "gene1+drug"], n_cells=3).X for model in models]
    np.testing.assert_array_equal(x[0], x[1])
    np.testing.assert_array_equal(x[0][:3], x[0][3:])


def test_a_perturbation_seen_only_in_the_test_cells(fitted, refuses):
    """Protects row 44: data with a perturbation that training never saw are read, and predicting it is refused."""
    query = fitted.make()
    query.obs["perturbation"] = query.obs["perturbation"].replace("drug", "aspirin")
    assert np.isfinite(fitted.model.get_latent_representation(query)).all()
    assert np.isfinite(fitted.model.predict_perturbation("drug", query, n_cells=3).X).all()
    with refuses(fitted.model.adata, UnseenPerturbationError, "`perturbation_reps`.*`unseen='average'`"):
        fitted.model.predict_perturbation("aspirin")
    assert np.isfinite(fitted.model.predict_perturbation("aspirin", query, n_cells=3, unseen="average").X).all()
