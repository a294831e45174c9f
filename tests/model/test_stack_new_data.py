"""Getters of `StackModel` on data it was not trained on: other genes, views, copies, batches, storage."""

from __future__ import annotations

import gc
import weakref

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp

from cellweave.model import StackModel


@pytest.fixture(scope="module")
def reference(trained) -> np.ndarray:
    """Embedding of the training data."""
    return trained.get_latent_representation()


@pytest.fixture
def folder(trained, tmp_path):
    trained.save(tmp_path / "model")
    return tmp_path / "model"


def _genes(adata, names) -> ad.AnnData:
    return adata[:, names].copy()


def _shuffled(adata) -> ad.AnnData:
    return _genes(adata, adata.var_names[np.random.default_rng(1).permutation(adata.n_vars)])


def _with_foreign_genes(adata) -> ad.AnnData:
    foreign = adata[:, :5].copy()
    foreign.var_names = [f"foreign{i}" for i in range(5)]
    return ad.concat([_shuffled(adata), foreign], axis="var", merge="same")


def _train(adata, tiny, quick, **options) -> StackModel:
    setup = {k: options.pop(k) for k in ("layer", "batch_key", "context_key") if k in options}
    StackModel.setup_anndata(adata, **setup)
    model = StackModel(adata, **tiny, **options)
    model.train(**quick)
    return model


# ---------------------------------------------------------------- genes


@pytest.mark.parametrize("change", [_shuffled, _with_foreign_genes])
@pytest.mark.parametrize("how", ["getter", "load", "load_then_getter"])
def test_genes_are_matched_by_name(trained, folder, make_adata, reference, change, how):
    """Protects against silent nonsense (trap R2): shuffled and additional genes give the identical embedding."""
    query = change(make_adata())
    if how == "getter":
        z = trained.get_latent_representation(query)
    elif how == "load":
        z = StackModel.load(folder, query, accelerator="cpu").get_latent_representation()
    else:
        z = StackModel.load(folder, accelerator="cpu").get_latent_representation(query)
    np.testing.assert_allclose(z, reference, rtol=1e-6, atol=1e-6)


def test_aligned_query_is_not_changed(trained, make_adata):
    """Protects the user's object: data with other genes are aligned in a copy; results still go to the original."""
    query = _shuffled(make_adata())
    names = list(query.var_names)
    trained.get_latent_representation(query, key_added="X_stack")
    frame = trained.get_normalized_expression(query, key_added="layer")
    assert list(query.var_names) == names
    assert not [column for column in query.obs if column.startswith("_scvi")]
    np.testing.assert_allclose(query[:, frame.columns].layers["layer"], frame, rtol=1e-6)
    assert set(query.uns) == {"cellweave"}


def test_missing_genes_count_as_zero(trained, make_adata, recwarn):
    """Protects partial panels: silently zero from 90 % overlap, with a warning from 50 %, refused below."""
    adata = make_adata()
    zeroed = adata.copy()
    x = zeroed.X.toarray()
    x[:, 18:] = 0
    zeroed.X = sp.csr_matrix(x)
    expected = trained.get_latent_representation(zeroed)
    np.testing.assert_allclose(trained.get_latent_representation(_genes(adata, adata.var_names[:18])), expected)
    assert not [w for w in recwarn if "genes of the model" in str(w.message)]
    with pytest.warns(UserWarning, match="12 of the 20 genes of the model.*first missing: 'gene12'"):
        trained.get_latent_representation(_genes(adata, adata.var_names[:12]))
    with pytest.raises(ValueError, match="Only 9 of the 20 genes"):
        trained.get_latent_representation(_genes(adata, adata.var_names[:9]))


@pytest.mark.parametrize("how", ["getter", "load"])
def test_no_common_gene_is_refused(trained, folder, make_adata, how):
    """Protects symbols against Ensembl identifiers: both first names are shown."""
    query = make_adata()
    query.var_names = [f"ENSG{i}" for i in range(20)]
    with pytest.raises(ValueError, match="Only 0 of the 20 genes.*'gene0'.*'ENSG0'"):
        trained.get_latent_representation(query) if how == "getter" else StackModel.load(folder, query)
    assert not query.uns


# ---------------------------------------------------------------- views and copies


def test_view(trained, make_adata):
    """Protects views: accepted, embedded as their copy would be, and not turned into copies."""
    adata = make_adata()
    view = adata[::2]
    z = trained.get_latent_representation(view)
    assert view.is_view
    np.testing.assert_array_equal(z, trained.get_latent_representation(adata[::2].copy()))


def test_view_of_the_training_data(trained, reference):
    """Protects the training data from their views: both get their own results, again and again."""
    for _ in range(2):
        assert trained.get_latent_representation(trained.adata[:10]).shape[0] == 10
        np.testing.assert_array_equal(trained.get_latent_representation(), reference)


def test_copy_of_the_training_data(trained, reference):
    """Protects copies, which carry the identifier of the original: changed counts in a copy are read."""
    copy = trained.adata.copy()
    np.testing.assert_array_equal(trained.get_latent_representation(copy), reference)
    changed = trained.adata.copy()
    changed.X = changed.X * 2
    assert not np.allclose(trained.get_latent_representation(changed), reference, atol=1e-3)
    np.testing.assert_array_equal(trained.get_latent_representation(), reference)


def test_changed_counts_of_registered_data_are_read(trained, make_adata, reference):
    """Protects against stale caches: counts that change in place change the embedding."""
    query = make_adata()
    np.testing.assert_array_equal(trained.get_latent_representation(query), reference)
    query.X = query.X * 2
    assert not np.allclose(trained.get_latent_representation(query), reference, atol=1e-3)


def test_written_results_of_a_view_reach_its_own_object(trained, make_adata):
    """Protects `key_added` with a view: the result is in the object that was passed."""
    view = make_adata()[:12]
    with pytest.warns(Warning, match="(?i)view"):
        z = trained.get_latent_representation(view, key_added="X_stack")
    np.testing.assert_array_equal(view.obsm["X_stack"], z)


def test_two_models_share_data(make_adata, tiny, quick):
    """Protects two models on one object with different columns: each keeps reading its own, in any order."""
    adata = make_adata()
    by_donor = _train(adata, tiny, quick, context_key="donor")
    before = by_donor.get_latent_representation()
    by_batch = _train(adata, tiny, quick, context_key="batch")
    other = by_batch.get_latent_representation()
    for _ in range(2):
        np.testing.assert_array_equal(by_donor.get_latent_representation(), before)
        np.testing.assert_array_equal(by_batch.get_latent_representation(), other)
    np.testing.assert_array_equal(by_donor.get_latent_representation(adata), before)


def test_data_of_one_model_passed_to_another(make_adata, tiny, quick):
    """Protects the first model: showing its data to a second one does not disturb it."""
    first = _train(make_adata(), tiny, quick, context_key="donor")
    second = _train(make_adata(seed=1), tiny, quick, context_key="batch")
    before = first.get_latent_representation()
    uuid = first.adata.uns["_scvi_uuid"]
    second.get_latent_representation(first.adata)
    assert first.adata.uns["_scvi_uuid"] == uuid
    np.testing.assert_array_equal(first.get_latent_representation(), before)


def test_query_data_can_be_forgotten(trained, make_adata):
    """Protects memory: data that had to be copied for a getter are not kept alive by the model."""
    query = _shuffled(make_adata())
    trained.get_latent_representation(query)
    alive = weakref.ref(query)
    n_managers = len(StackModel._per_instance_manager_store[trained.id])
    for seed in range(3):
        trained.get_latent_representation(_shuffled(make_adata(seed=seed)))
    assert len(StackModel._per_instance_manager_store[trained.id]) == n_managers
    del query
    gc.collect()
    assert alive() is None


# ---------------------------------------------------------------- columns of new data


def _new_batches(adata):
    adata.obs["batch"] = [f"new{i % 3}" for i in range(adata.n_obs)]
    return adata


def test_new_batches_without_batch_condition(trained, make_adata, reference):
    """Protects zero-shot use: a model that never reads the batch accepts data of new batches."""
    np.testing.assert_array_equal(trained.get_latent_representation(_new_batches(make_adata())), reference)


@pytest.mark.parametrize("categories", [["b0", "b7"], [5, 6], [0, 6]])
def test_new_batches_with_batch_condition_are_refused(make_adata, tiny, quick, categories):
    """Protects the decoder: an unknown batch has no weights; the message names it, the known ones and the column."""

    def data(names):
        adata = make_adata()
        adata.obs["batch"] = np.array(names)[np.arange(96) % 2]
        return adata

    known = ["b0", "b1"] if isinstance(categories[0], str) else [5, 7]
    model = _train(data(known), tiny, quick, batch_key="batch", batch_condition="decoder")
    query = data(categories)
    before = sorted(query.obs), dict(query.uns)
    unknown = [c for c in categories if c not in known][0]
    with pytest.raises(ValueError, match=rf"`adata.obs\['batch'\]` .*{unknown!r}.*{known[0]!r}, {known[1]!r}"):
        model.get_latent_representation(query)
    assert (sorted(query.obs), dict(query.uns)) == before
    assert len(model.get_latent_representation(data(known))) == 96


@pytest.mark.parametrize("how", ["getter", "load"])
@pytest.mark.parametrize("column", ["donor", "cell_type", "batch"])
def test_new_data_without_a_column(trained, folder, make_adata, column, how):
    """Protects unannotated queries: groups, labels and unread batches may be missing; all cells form one group."""
    query = make_adata()
    del query.obs[column]
    model = trained if how == "getter" else StackModel.load(folder, query, accelerator="cpu")
    z = model.get_latent_representation(query if how == "getter" else None)
    if column == "donor":
        expected = trained.get_latent_representation(by_context=False)
    else:
        expected = trained.get_latent_representation()
    np.testing.assert_allclose(z, expected, rtol=1e-6, atol=1e-6)


def test_batch_column_is_needed_where_it_is_read(make_adata, tiny, quick):
    """Protects the decoder: without the batch column a model that reads it cannot decode; the message names it."""
    model = _train(make_adata(), tiny, quick, batch_key="batch", batch_condition="decoder")
    query = make_adata()
    del query.obs["batch"]
    with pytest.raises(KeyError, match="batch"):
        model.get_latent_representation(query)


def test_new_groups_are_kept_apart(trained, make_adata):
    """Protects contexts of new donors: groups of the query are respected although the model never saw them."""
    query = make_adata()
    query.obs["donor"] = [f"new{i % 2}" for i in range(96)]
    z = trained.get_latent_representation(query)
    odd = query.copy()
    odd.X = odd.X.multiply((1 + np.arange(96) % 2)[:, None]).tocsr()
    np.testing.assert_allclose(trained.get_latent_representation(odd)[::2], z[::2], rtol=1e-6)


@pytest.mark.parametrize("column", ["donor", "batch"])
def test_missing_values_in_columns_of_new_data(trained, make_adata, column):
    """Protects queries with gaps: the column, the number of cells and the first of them are named."""
    query = make_adata()
    query.obs.loc[["cell3", "cell8"], column] = np.nan
    with pytest.raises(ValueError, match=rf"`adata.obs\['{column}'\]` .*missing in 2 cell\(s\) \(first: 'cell3'\)"):
        trained.get_latent_representation(query)


def test_stale_split_is_not_applied_to_new_data(trained, folder, make_adata):
    """Protects the baseline: rows of the training split mean nothing in other data, which are scored on their own."""
    query = make_adata(n_cells=30, seed=5)
    loaded = StackModel.load(folder, query, accelerator="cpu")
    expected = trained.get_reconstruction_metrics(make_adata(n_cells=30, seed=5))
    metrics = loaded.get_reconstruction_metrics()
    np.testing.assert_allclose(metrics.loc["StackModel"], expected.loc["StackModel"], rtol=1e-5)
    assert np.isfinite(metrics.loc["gene mean share", "masked_corr"])


# ---------------------------------------------------------------- storage


def test_backed_data_end_to_end(make_adata, tiny, quick, tmp_path):
    """Protects data on disk: setup, training and every result equal those of the same data in memory."""
    make_adata().write_h5ad(tmp_path / "a.h5ad")
    in_memory = _train(make_adata(), tiny, quick, context_key="donor")
    for parameter in in_memory.module.parameters():
        parameter.detach_()
    backed_data = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    StackModel.setup_anndata(backed_data, context_key="donor")
    from_disk = StackModel(backed_data, **tiny)
    from_disk.train(**quick)
    assert np.isfinite(from_disk.history["train_loss"].to_numpy()).all()
    from_disk.module.load_state_dict(in_memory.module.state_dict())
    np.testing.assert_array_equal(from_disk.get_latent_representation(), in_memory.get_latent_representation())
    np.testing.assert_array_equal(
        in_memory.get_latent_representation(ad.read_h5ad(tmp_path / "a.h5ad", backed="r"), indices=[50, 3, 3]),
        in_memory.get_latent_representation(indices=[50, 3, 3]),
    )
    assert from_disk.get_reconstruction_metrics().shape == (2, 3)
    from_disk.save(tmp_path / "m")
    loaded = StackModel.load(tmp_path / "m", ad.read_h5ad(tmp_path / "a.h5ad", backed="r"), accelerator="cpu")
    np.testing.assert_array_equal(loaded.get_latent_representation(), in_memory.get_latent_representation())


def test_backed_view(trained, make_adata, tmp_path, reference):
    """Protects views of data on disk, which anndata cannot copy in place."""
    make_adata().write_h5ad(tmp_path / "a.h5ad")
    backed = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    z = trained.get_latent_representation(backed[:20])
    np.testing.assert_array_equal(z, trained.get_latent_representation(make_adata()[:20]))


def test_layer_end_to_end(make_adata, tiny, quick, tmp_path):
    """Protects `layer=`: training, queries with shuffled genes and loading read the layer, never X."""
    plain = make_adata()
    layered = make_adata()
    layered.layers["counts"] = layered.X.copy()
    layered.X = np.full(layered.shape, -1.0)
    model = _train(layered, tiny, quick, layer="counts")
    query = _shuffled(layered)
    np.testing.assert_allclose(
        model.get_latent_representation(query), model.get_latent_representation(), rtol=1e-6, atol=1e-6
    )
    model.save(tmp_path / "m")
    loaded = StackModel.load(tmp_path / "m", query, accelerator="cpu")
    np.testing.assert_allclose(
        loaded.get_latent_representation(), model.get_latent_representation(), rtol=1e-6, atol=1e-6
    )
    with pytest.raises(KeyError, match="`layer='counts'` not found"):
        model.get_latent_representation(plain)


@pytest.mark.parametrize(
    "convert",
    [
        lambda x: x.astype(np.int32),
        lambda x: x.astype(np.uint16).toarray(),
        sp.csr_array,
        sp.csc_matrix,
        lambda x: np.asfortranarray(x.toarray().astype(np.float64)),
    ],
    ids=["int32", "uint16", "csr_array", "csc", "fortran64"],
)
def test_storage_of_a_query_does_not_matter(trained, make_adata, reference, convert):
    """Protects all matrix types at once: the same embedding, bit for bit, also with shuffled genes to 1e-6."""
    query = make_adata()
    query.X = convert(query.X)
    np.testing.assert_array_equal(trained.get_latent_representation(query), reference)
    np.testing.assert_allclose(trained.get_latent_representation(_shuffled(query)), reference, rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Transforming to str index")
def test_integer_cell_names(make_adata, tiny, quick):
    """Protects data without cell names: numbers as names work, and name the rows of the results."""
    source = make_adata()
    obs = source.obs.reset_index(drop=True)
    adata = ad.AnnData(source.X, obs=obs, var=source.var)
    frame = _train(adata, tiny, quick).get_normalized_expression(indices=[5, 2])
    assert list(frame.index) == ["5", "2"]


def test_faulty_query_is_refused_like_faulty_training_data(trained, make_adata):
    """Protects queries: NaN, negative values and repeated genes are found before anything is computed or written."""
    for value, word in [(np.nan, "NaN"), (-1, "negative")]:
        query = make_adata()
        x = query.X.toarray()
        x[9, 4] = value
        query.X = x
        with pytest.raises(ValueError, match=f"{word}.*'cell9', gene 'gene4'"):
            trained.get_latent_representation(query)
        assert not query.uns
    query = make_adata()
    query.var_names = ["gene0", "gene0", *query.var_names[2:]]
    with pytest.raises(ValueError, match="repeats 1 gene name"):
        trained.get_latent_representation(query)
