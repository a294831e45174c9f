"""`StackModel` on the RNA modality of a MuData."""

from __future__ import annotations

import numpy as np
import pytest
from anndata import AnnData
from mudata import MuData

from cellweave.model import StackModel

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:mudata")


def _mudata(rna: AnnData, columns_at_the_top: bool = True, name: str = "rna") -> MuData:
    protein = AnnData(np.ones((rna.n_obs, 3), dtype=np.float32), obs=rna.obs[[]].copy())
    protein.var_names = ["CD3", "CD4", "CD8"]
    mdata = MuData({name: rna, "protein": protein})
    if columns_at_the_top:
        for column in ("batch", "donor", "cell_type"):
            mdata.obs[column] = rna.obs[column]
    return mdata


def _train(mdata, tiny, quick, **setup) -> StackModel:
    StackModel.setup_mudata(mdata, batch_key="batch", context_key="donor", **setup)
    model = StackModel(mdata, **tiny)
    model.train(**quick)
    return model


@pytest.fixture(scope="module")
def model(make_adata, tiny, quick) -> StackModel:
    """A model trained on a MuData. Shared: never change it."""
    return _train(_mudata(make_adata()), tiny, quick)


def test_mudata_gives_the_same_model_as_its_modality(model, make_adata, tiny, quick):
    """Protects `setup_mudata`: training on the modality inside a MuData equals training on it alone."""
    import scvi

    results = []
    for use_mudata in (True, False):
        scvi.settings.seed = 0
        adata = make_adata()
        if use_mudata:
            trained = _train(_mudata(adata), tiny, quick)
        else:
            StackModel.setup_anndata(adata, batch_key="batch", context_key="donor")
            trained = StackModel(adata, **tiny)
            trained.train(**quick)
        results.append(trained.get_latent_representation())
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("at_the_top", [True, False])
def test_columns_may_be_anywhere(make_adata, tiny, at_the_top):
    """Protects `modalities`: columns of the MuData or of the modality, named per argument."""
    mdata = _mudata(make_adata(), columns_at_the_top=at_the_top)
    modalities = {} if at_the_top else {"batch_key": "rna", "context_key": "rna"}
    StackModel.setup_mudata(mdata, batch_key="batch", context_key="donor", modalities=modalities)
    model = StackModel(mdata, **tiny)
    assert model.summary_stats.n_batch == 2
    assert model.summary_stats.n_context == 4
    assert model.summary_stats.n_vars == 20


def test_other_modality_and_layer(make_adata, tiny, quick):
    """Protects names: the RNA modality may be called anything, the counts may be in a layer."""
    adata = make_adata()
    adata.layers["counts"] = adata.X.copy()
    adata.X = np.full(adata.shape, -1.0)
    model = _train(_mudata(adata, name="gex"), tiny, quick, rna_layer="counts", modalities={"rna_layer": "gex"})
    assert np.isfinite(model.get_latent_representation()).all()


def test_every_getter(model):
    """Protects getters on MuData: shapes, names of the cells of the MuData and genes of the modality."""
    assert model.get_latent_representation().shape == (96, 16)
    frame = model.get_normalized_expression(indices=[3, 1])
    assert list(frame.index) == ["cell3", "cell1"]
    assert list(frame.columns) == list(model.adata.mod["rna"].var_names)
    assert model.get_reconstruction_metrics().shape == (2, 3)
    assert model.get_masked_predictions()[0].shape == (96, 10)
    assert model.get_attention([1, 2]).shape == (1, 2, 2, 2)
    assert "96 cells, 20 genes" in repr(model)


def test_results_are_written_where_they_belong(make_adata, tiny, quick):
    """Protects `key_added`: embeddings go to the MuData, layers to the modality, provenance to the MuData."""
    model = _train(_mudata(make_adata()), tiny, quick)
    z = model.get_latent_representation(key_added="X_stack")
    frame = model.get_normalized_expression(key_added="stack_normalized")
    mdata = model.adata
    np.testing.assert_array_equal(mdata.obsm["X_stack"], z)
    np.testing.assert_array_equal(mdata.mod["rna"].layers["stack_normalized"], frame)
    assert set(mdata.uns["cellweave"]) == {"X_stack", "stack_normalized"}


def test_save_and_load(model, make_adata, tmp_path):
    """Protects files: the same embedding after loading, with data at once or later."""
    model.save(tmp_path / "m")
    expected = model.get_latent_representation()
    at_once = StackModel.load(tmp_path / "m", _mudata(make_adata()), accelerator="cpu")
    np.testing.assert_array_equal(at_once.get_latent_representation(), expected)
    later = StackModel.load(tmp_path / "m", accelerator="cpu")
    np.testing.assert_array_equal(later.get_latent_representation(_mudata(make_adata())), expected)


def test_copies_and_views(model):
    """Protects copies and views of the training data: both are accepted and give their own results."""
    expected = model.get_latent_representation()
    np.testing.assert_array_equal(model.get_latent_representation(model.adata.copy()), expected)
    assert len(model.get_latent_representation(model.adata[:10])) == 10
    np.testing.assert_array_equal(model.get_latent_representation(), expected)


def test_other_genes_are_refused_with_advice(model, make_adata):
    """Protects against mixed-up genes: a MuData is not aligned silently, the message names the function that does."""
    adata = make_adata()
    mdata = _mudata(adata[:, ::-1].copy())
    with pytest.raises(ValueError, match=r"genes of this MuData differ.*`cellweave.pp.align_genes\(mdata"):
        model.get_latent_representation(mdata)


def test_missing_modality_is_named(model, make_adata):
    """Protects against a bare KeyError: the modality, the argument and what there is, at setup and at query."""
    mdata = MuData({"protein": make_adata()})
    with pytest.raises(ValueError, match=r"Modality 'rna' of `rna_layer` not found, `mdata.mod` has \['protein'\]"):
        StackModel.setup_mudata(mdata)
    with pytest.raises(ValueError, match=r"reads modality 'rna', but `mdata.mod` has \['protein'\]"):
        model.get_latent_representation(mdata)
    with pytest.raises(ValueError, match=r"Modality 'rnaa' of `batch_key` not found"):
        StackModel.setup_mudata(_mudata(make_adata()), batch_key="batch", modalities={"batch_key": "rnaa"})
    with pytest.raises(ValueError, match="Extraneous modality mapping"):
        StackModel.setup_mudata(_mudata(make_adata()), modalities={"atac": "rna"})


def test_unequal_cells_are_refused(make_adata):
    """Protects pairing: modalities with other cells are refused before anything is written."""
    adata = make_adata()
    mdata = MuData({"rna": adata, "protein": adata[:50, :3].copy()})
    with pytest.raises(ValueError, match="Modality 'protein' lacks 46 of the 96 cells .*'cell50'"):
        StackModel.setup_mudata(mdata)
    assert not [column for column in mdata.mod["rna"].obs if column.startswith("_scvi")]


@pytest.mark.parametrize("fault", ["nan", "column"])
def test_faults_are_found_in_the_modality(make_adata, fault):
    """Protects the checks of `setup_mudata`: counts of the modality, columns of the MuData; nothing is written."""
    adata = make_adata()
    if fault == "nan":
        adata.X = np.where(np.arange(20) == 5, np.nan, adata.X.toarray())
    mdata = _mudata(adata)
    if fault == "column":
        mdata.obs["donor"] = np.where(np.arange(96) == 2, None, "d")
    message = "NaN.*'cell0', gene 'gene5'" if fault == "nan" else r"`adata.obs\['donor'\]` .*missing in 1 cell"
    with pytest.raises(ValueError, match=message):
        StackModel.setup_mudata(mdata, context_key="donor")
    assert not mdata.uns
    assert not [column for column in mdata.obs if column.startswith("_scvi")]
