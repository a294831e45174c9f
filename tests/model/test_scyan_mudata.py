"""`ScyanModel` on the protein modality of a MuData."""

from __future__ import annotations

import mudata
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from mudata import MuData

from cellweave.model import ScyanModel

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:mudata", "ignore:Cannot join columns:UserWarning")
SETUP = {"categorical_covariate_keys": ["condition"], "continuous_covariate_keys": ["age"], "labels_key": "truth"}


def _mudata(protein: AnnData, at_the_top: bool = True, name: str = "prot") -> MuData:
    rna = AnnData(np.ones((protein.n_obs, 3), dtype=np.float32), obs=protein.obs[[]].copy())
    rna.var_names = ["g1", "g2", "g3"]
    columns = protein.obs
    protein = AnnData(protein.X, obs=columns[[]].copy() if at_the_top else columns.copy(), var=protein.var)
    mdata = MuData({"rna": rna, name: protein})
    if at_the_top:
        for column in columns:
            mdata.obs[column] = columns[column]
    return mdata


def _fit(mdata, scyan_quick, marker_table, **setup) -> ScyanModel:
    ScyanModel.setup_mudata(mdata, batch_key="batch", **{**SETUP, **setup})
    model = ScyanModel(mdata, marker_table)
    model.train(**scyan_quick)
    return model


@pytest.fixture
def mdata(make_markers) -> MuData:
    return _mudata(make_markers(200))


def test_mudata_gives_the_same_model_as_its_modality(mdata, make_markers, fit_scyan, scyan_quick, marker_table):
    """Protects `setup_mudata`: labels, draws and correction equal those of the modality alone; columns may be in it."""
    expected = fit_scyan(make_markers(200), setup=SETUP)
    inside = _mudata(make_markers(200), at_the_top=False, name="adt")
    arguments = ("protein_layer", "batch_key", "labels_key", "categorical_covariate_keys", "continuous_covariate_keys")
    for data, options in ((mdata, {}), (inside, {"modalities": dict.fromkeys(arguments, "adt")})):
        import scvi

        scvi.settings.seed = 0
        model = _fit(data, scyan_quick, marker_table, **options)
        pd.testing.assert_frame_equal(model.predict_proba(), expected.predict_proba())
        pd.testing.assert_frame_equal(model.correct_batch(), expected.correct_batch())
        np.testing.assert_array_equal(model.sample(6, seed=1).X, expected.sample(6, seed=1).X)
        model.train(**scyan_quick)


def test_results_are_where_the_user_looks(mdata, scyan_quick, marker_table, tmp_path):
    """Protects results: labels and frames belong to the MuData, the layer to the modality; a file holds all of them."""
    model = _fit(mdata, scyan_quick, marker_table)
    labels = model.predict(key_added="scyan_population")
    probabilities = model.predict_proba(key_added="scyan_proba")
    latent = model.get_latent_representation(key_added="X_scyan")
    corrected = model.correct_batch(key_added="scyan_corrected", reference="b0")
    mdata.write_h5mu(tmp_path / "m.h5mu")
    for data in (mdata, mudata.read_h5mu(tmp_path / "m.h5mu")):
        assert data.obs["scyan_population"].tolist() == labels.tolist()
        assert list(data.obs["scyan_population_origin"].cat.categories) == ["lymphoid", "myeloid"]
        np.testing.assert_array_equal(data.obsm["scyan_proba"], probabilities)
        np.testing.assert_array_equal(data.obsm["X_scyan"], latent)
        np.testing.assert_array_equal(data["prot"].layers["scyan_corrected"][:, :6], corrected)
        assert data.uns["cellweave"]["scyan_corrected"]["parameters"]["reference"] == "b0"
    assert "scyan_population" not in mdata["prot"].obs


def test_queries_and_saved_models(mdata, make_markers, scyan_quick, marker_table, tmp_path):
    """Protects new samples: a MuData as query and after loading; faults in it are named."""
    model = _fit(mdata, scyan_quick, marker_table)
    model.save(tmp_path / "m")
    query = _mudata(make_markers(150, seed=3))
    expected = model.predict_proba(query)
    loaded = ScyanModel.load(tmp_path / "m", accelerator="cpu")
    pd.testing.assert_frame_equal(loaded.predict_proba(query), expected)
    pd.testing.assert_frame_equal(
        ScyanModel.load(tmp_path / "m", _mudata(make_markers(150, seed=3)), accelerator="cpu").predict_proba(), expected
    )
    with pytest.raises(ValueError, match="modality 'prot', but `mdata.mod` has"):
        loaded.predict(_mudata(make_markers(20), name="adt"))
    other = _mudata(make_markers(20))
    other.obs["condition"] = "new"
    with pytest.raises(ValueError, match=r"`adata.obs\['condition'\]` .*1 value\(s\) in 20 cell.*'new'"):
        loaded.predict(other)


def test_setup_names_what_is_wrong(make_markers):
    """Protects setup: a modality that is not there, of the values or of a column."""
    mdata = _mudata(make_markers(20), name="adt")
    with pytest.raises(ValueError, match=r"Modality 'prot' of `protein_layer` not found, .*`modalities="):
        ScyanModel.setup_mudata(mdata, batch_key="batch")
    with pytest.raises(ValueError, match="Modality 'gex' of `batch_key` not found"):
        ScyanModel.setup_mudata(mdata, batch_key="batch", modalities={"protein_layer": "adt", "batch_key": "gex"})
