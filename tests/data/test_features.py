"""Features of cells for the second stream of a flow: encoders, their scale, and the cache."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import scvi
import torch
from anndata import AnnData

from cellweave.data import (
    CallableFeatures,
    FeatureCache,
    FeatureCompression,
    FeatureEncoder,
    FeatureStatistics,
    GeneTableFeatures,
    ModelFeatures,
    ObsmFeatures,
    PCAFeatures,
    make_encoder,
)

ROWS = np.arange(96)
TRAIN = np.arange(0, 96, 2)


@pytest.fixture
def cells(make_adata) -> AnnData:
    """Counts in X, an embedding as a DataFrame in obsm."""
    adata = make_adata()
    values = np.random.default_rng(1).normal(3, 2, size=(96, 4))
    adata.obsm["X_other"] = pd.DataFrame(values, index=adata.obs_names, columns=list("abcd"))
    return adata


@pytest.fixture
def x(cells) -> sp.csr_matrix:
    """Log-normalised expression."""
    size = np.asarray(cells.X.sum(1)).ravel()
    return sp.csr_matrix(cells.X.multiply(1e4 / size[:, None]).log1p())


@pytest.fixture
def table(cells) -> pd.DataFrame:
    """Vectors of all but the first two genes, in another order, and of one gene that the data lack."""
    names = [*cells.var_names[:1:-1], "other"]
    return pd.DataFrame(np.random.default_rng(2).normal(size=(len(names), 3)), index=names)


def _state(adata: AnnData) -> tuple:
    parts = [list(getattr(adata, name)) for name in ("layers", "obsm", "uns")]
    return (*parts, list(adata.obs), list(adata.var), adata.X.copy().toarray().tolist())


# ---------------------------------------------------------------- encoders


@pytest.mark.parametrize("kind", ["csr", "csc", "dense"])
def test_pca_is_that_of_training_cells(cells, x, kind):
    """Protects PCA features: scores of centred training cells, other cells in the same axes, sparse or dense alike."""
    matrix = {"csr": x, "csc": x.tocsc(), "dense": x.toarray()}[kind]
    encoder = PCAFeatures(5)
    encoder.fit(cells, matrix, TRAIN)
    scores = encoder.encode(cells, matrix, ROWS[::-1])
    assert scores.dtype == np.float32
    assert scores.shape == (96, encoder.dim) == (96, 5)
    dense = x.toarray().astype(np.float64)
    mean = dense[TRAIN].mean(0)
    axes = np.linalg.svd(dense[TRAIN] - mean)[2][:5]
    expected = (dense - mean)[::-1] @ axes.T
    np.testing.assert_allclose(np.abs(scores), np.abs(expected), atol=1e-3)
    other = PCAFeatures(5)
    other.fit(cells, x, TRAIN)
    np.testing.assert_allclose(other.encode(cells, x, ROWS[::-1]), scores, atol=1e-4)  # signs included


def test_pca_keeps_sparse_cells_sparse(monkeypatch):
    """Protects memory: 50,000 genes, of which few are expressed, are never made dense."""
    matrix = sp.random(300, 50_000, 0.001, format="csr", random_state=0)
    monkeypatch.setattr(sp.csr_matrix, "toarray", lambda *_: pytest.fail("made dense"))
    adata = AnnData(sp.csr_matrix((300, 50_000)))
    encoder = PCAFeatures(3)
    encoder.fit(adata, matrix, np.arange(300))
    assert encoder.encode(adata, matrix, np.arange(300)).shape == (300, 3)


def test_pca_does_not_touch_the_random_state(cells, x):
    """Protects reproducible scripts: two fits are equal whatever was drawn before, and draw nothing themselves."""
    scores = []
    for seed in (0, 1):
        np.random.seed(seed)
        before = np.random.get_state()[1].copy()
        encoder = PCAFeatures(5)
        encoder.fit(cells, x, TRAIN)
        scores.append(encoder.encode(cells, x, ROWS))
        assert np.array_equal(np.random.get_state()[1], before)
    assert np.array_equal(*scores)


def test_pca_of_too_few_cells(cells, x):
    """Protects small data: the message says what there is and what to do."""
    with pytest.raises(ValueError, match=r"`n_components`=30 .* got 96 cells and 20 genes; use `encoder=PCAFeatures"):
        PCAFeatures().fit(cells, x, ROWS)
    with pytest.raises(ValueError, match="`n_components` must be at least 1, got 0"):
        PCAFeatures(0)


@pytest.mark.parametrize("kind", ["frame", "array", "sparse"])
def test_obsm(cells, x, kind):
    """Protects features from `obsm`: the rows asked for, in their order, from every kind of array."""
    values = cells.obsm["X_other"].to_numpy()
    if kind != "frame":
        cells.obsm["X_other"] = values if kind == "array" else sp.csr_matrix(values)
    encoder = ObsmFeatures("X_other")
    encoder.fit(cells, x, TRAIN)
    assert encoder.dim == 4
    np.testing.assert_array_equal(encoder.encode(cells, x, np.array([7, 3, 3])), values[[7, 3, 3]].astype(np.float32))


def test_obsm_that_cannot_be_used(cells, x):
    """Protects the user from a KeyError of pandas, from text, and from NaN, which is named with its cell."""
    with pytest.raises(ValueError, match=r"`adata.obsm` has no 'X_scvi', it has 'X_other'; compute it first"):
        ObsmFeatures("X_scvi").fit(cells, x, TRAIN)
    cells.obsm["text"] = pd.DataFrame({"a": ["u"] * 96}, index=cells.obs_names)
    with pytest.raises(ValueError, match=r"`adata.obsm\['text'\]` holds values that are no numbers .*; keep numeric"):
        ObsmFeatures("text").fit(cells, x, TRAIN)
    cells.obsm["X_other"].iloc[[5, 9], 1] = np.nan
    with pytest.raises(
        ValueError, match=r"'obsm:X_other' gives values that are not finite in 2 cells \(first: 'cell5'\)"
    ):
        FeatureCache(ObsmFeatures("X_other"), cells, x, TRAIN)


def test_stack_model(trained, make_adata):
    """Protects a trained cellweave model as encoder: its embedding in any order, on an AnnData that stays as it was."""
    adata = make_adata()
    before, random = _state(adata), torch.get_rng_state()
    encoder = make_encoder(trained)
    encoder.fit(adata, adata.X, TRAIN)
    rows = ROWS[::-1]
    features = encoder.encode(adata, adata.X, rows)
    assert features.shape == (96, encoder.dim)
    np.testing.assert_array_equal(features[::-1], trained.get_latent_representation(make_adata()))
    assert _state(adata) == before
    assert torch.equal(torch.get_rng_state(), random)


@pytest.fixture(scope="module")
def scvi_model(make_adata):
    """A model of scvi-tools itself, which draws from the global generator and writes into an AnnData it is given."""
    scvi.settings.seed = 0
    adata = make_adata()
    scvi.model.SCVI.setup_anndata(adata, batch_key="batch")
    model = scvi.model.SCVI(adata, n_hidden=8, n_latent=3)
    model.train(max_epochs=1, accelerator="cpu", enable_progress_bar=False)
    return model


def test_scvi_model(scvi_model, make_adata):
    """Protects a model of scvi-tools as encoder: neither data nor random state change, and nothing is kept alive."""
    adata = make_adata()
    before, random, numpy_state = _state(adata), torch.get_rng_state(), np.random.get_state()[1].copy()
    encoder = ModelFeatures(scvi_model)
    encoder.fit(adata, adata.X, TRAIN)
    features = encoder.encode(adata, adata.X, ROWS[::-1])
    assert (features.shape, encoder.dim) == ((96, 3), 3)
    own = encoder.encode(scvi_model.adata, scvi_model.adata.X, ROWS)
    np.testing.assert_allclose(own, features[::-1], rtol=1e-5)
    assert _state(adata) == before
    assert torch.equal(torch.get_rng_state(), random)
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    np.testing.assert_allclose(own, scvi_model.get_latent_representation(), rtol=1e-5)
    assert len(scvi_model._per_instance_manager_store[scvi_model.id]) == 1  # its own data


@pytest.mark.parametrize("kind", ["scvi", "stack"])
def test_copy_of_the_data_of_a_model(scvi_model, trained, kind):
    """Protects copies of registered data, which carry its identifier: other cells than the model's own, and no mix-up."""
    model = scvi_model if kind == "scvi" else trained
    own = model.get_latent_representation()
    features = ModelFeatures(model).encode(copy := model.adata[::-1].copy(), copy.X, ROWS)
    if kind == "scvi":  # the embedding of Stack depends on which cells are together
        np.testing.assert_allclose(features, own[::-1], rtol=1e-5)
    np.testing.assert_array_equal(model.get_latent_representation(), own)
    assert model.get_anndata_manager(model.adata).adata is model.adata


def test_model_that_is_not_trained(make_adata, tiny):
    """Protects against features of random weights."""
    from cellweave.model import StackModel

    adata = make_adata()
    StackModel.setup_anndata(adata)
    with pytest.raises(ValueError, match="`encoder` is a StackModel that is not trained; train it first"):
        make_encoder(StackModel(adata, **tiny))


def test_function_of_cells_and_of_genes(cells, x):
    """Protects functions: dense float32 blocks in, features of cells or of genes out, in the order of the rows."""
    seen = []

    def total(block):
        seen.append(block)
        return block.sum(1, keepdims=True)

    encoder = make_encoder(total)
    encoder.fit(cells, x, TRAIN)
    assert (encoder.name, encoder.level, encoder.dim) == ("total", "cell", 1)
    np.testing.assert_allclose(encoder.encode(cells, x, ROWS[::-1])[:, 0], x.toarray().sum(1)[::-1], rtol=1e-5)
    assert all(isinstance(block, np.ndarray) and block.dtype == np.float32 for block in seen)
    encoder = CallableFeatures(lambda block: np.stack([block, block**2], 2), "gene", "powers")
    encoder.fit(cells, x, TRAIN)
    assert encoder.dim == 2
    np.testing.assert_allclose(encoder.encode(cells, x, ROWS)[:, :, 1], x.toarray() ** 2, rtol=1e-5)
    assert encoder.encode(cells, x, ROWS[:0]).shape == (0, 20, 2)


def test_function_gets_blocks(cells, monkeypatch):
    """Protects memory: a large set of cells reaches the function in parts, and comes back whole."""
    sizes = []

    def first_gene(block):
        sizes.append(len(block))
        return block[:, :1]

    matrix = np.arange(2500 * 2, dtype=np.float32).reshape(2500, 2)
    values = CallableFeatures(first_gene).encode(AnnData(matrix), matrix, np.arange(2500))
    assert max(sizes) <= 1024
    assert np.array_equal(values, matrix[:, :1])


def test_function_with_other_axes(cells, x):
    """Protects against a level that does not fit to what the function gives."""
    with pytest.raises(
        ValueError, match=r"'<lambda>' of `level`='cell' must give 2 axes, got the shape \(1, 20, 1\); give"
    ):
        CallableFeatures(lambda block: block[:, :, None]).fit(cells, x, TRAIN)
    with pytest.raises(ValueError, match="`level` must be 'gene' or 'cell', got 'token'; choose one of them"):
        CallableFeatures(np.sum, "token")


def test_gene_table(cells, x, table):
    """Protects vectors of genes: matched by name, times the expression, none for genes that the table lacks."""
    encoder = GeneTableFeatures(table)
    encoder.fit(cells, x, TRAIN)
    assert encoder.has_features.tolist() == [False, False, *[True] * 18]
    features = encoder.encode(cells, x, ROWS[::-1])
    assert features.shape == (96, 20, 3)
    gene = cells.var_names[7]
    expected = x.toarray()[::-1, 7][:, None] * table.loc[gene].to_numpy()
    np.testing.assert_allclose(features[:, 7], expected, rtol=1e-5)
    assert not features[:, :2].any()
    cells.var["symbol"] = cells.var_names
    cells.var_names = [f"ENSG{i}" for i in range(20)]
    by_symbol = GeneTableFeatures(table, "symbol")
    by_symbol.fit(cells, x, TRAIN)
    np.testing.assert_array_equal(by_symbol.encode(cells, x, ROWS[::-1]), features)


def test_gene_table_that_cannot_be_used(cells, x, table):
    """Protects against other gene names, repeated genes, NaN, text and plain arrays."""
    with pytest.raises(ValueError, match=r"none of the 20 genes of the data \(first: 'gene0', in the table 'Gene19'\)"):
        GeneTableFeatures(table.rename(index=str.capitalize)).fit(cells, x, TRAIN)
    with pytest.raises(ValueError, match=r"`table` has 1 repeated genes \(first: 'other'\); keep one row"):
        GeneTableFeatures(pd.concat([table, table.tail(1)]))
    with pytest.raises(ValueError, match=r"not finite in 1 genes \(first: 'other'\); fill or drop"):
        GeneTableFeatures(table.drop("other").reindex(table.index))
    with pytest.raises(ValueError, match="no numbers .*; keep numeric columns only"):
        GeneTableFeatures(table.assign(text="u"))
    with pytest.raises(ValueError, match="`table` must be a DataFrame .*, got a ndarray"):
        GeneTableFeatures(table.to_numpy())
    with pytest.raises(ValueError, match="`gene_symbols_key`='symbol' is not in `adata.var`; name one"):
        GeneTableFeatures(table, "symbol").fit(cells, x, TRAIN)


@pytest.mark.parametrize("kind", ["pca", "obsm", "model", "function", "table"])
def test_config_is_json_and_tells_encoders_apart(cells, x, table, trained, kind):
    """Protects saved models: what they say about their encoder is plain JSON, and another encoder says something else."""
    make = {
        "pca": (lambda: PCAFeatures(3), lambda: PCAFeatures(4)),
        "obsm": (lambda: ObsmFeatures("X_other"), lambda: ObsmFeatures("X_more")),
        "model": (lambda: ModelFeatures(trained), None),
        "function": (lambda: CallableFeatures(np.log1p), lambda: CallableFeatures(np.log1p, name="other")),
        "table": (lambda: GeneTableFeatures(table), lambda: GeneTableFeatures(table * 2)),
    }[kind]
    cells.obsm["X_more"] = np.ones((96, 4))
    configs = []
    for function in filter(None, make):
        encoder = function()
        assert isinstance(encoder, FeatureEncoder)
        assert encoder.dim == (3 if kind == "table" else 0)
        encoder.fit(cells, x, TRAIN)
        assert encoder.dim > 0
        configs.append(json.loads(json.dumps(encoder.config())))
        assert {"name", "level", "dim"} <= set(configs[-1])
        assert (configs[-1]["name"], configs[-1]["level"]) == (encoder.name, encoder.level)
    assert len(configs) == 1 or configs[0] != configs[1]


def test_config_of_a_model_follows_its_weights(trained):
    """Protects saved models: the checksum changes with the weights, and only with them."""
    import copy

    same, other = copy.deepcopy(trained.module), copy.deepcopy(trained.module)
    with torch.no_grad():
        next(other.parameters()).view(-1)[0] += 1e-3

    def checksum(module):
        return ModelFeatures(type("Model", (), {"module": module})()).config()["weights"]

    assert checksum(trained.module) == checksum(same) != checksum(other)


def test_make_encoder(trained):
    """Protects the choice by name, object and function; nothing else is taken for an encoder."""
    own = ObsmFeatures("X_pca")
    assert make_encoder("none") is make_encoder(None) is None
    assert isinstance(make_encoder("pca"), PCAFeatures)
    assert make_encoder("obsm:X_scvi").key == "X_scvi"
    assert make_encoder(own) is own
    assert make_encoder(trained).model is trained
    assert isinstance(make_encoder(np.log1p), CallableFeatures)
    for name in ("scgpt", "geneformer", "scGPT"):
        with pytest.raises(
            ValueError, match=f"`encoder` got the name '{name}' of a model; pass the trained model object"
        ):
            make_encoder(name)
    for bad in ("umap", "obsm:", "", 3, PCAFeatures):
        with pytest.raises(
            ValueError, match="`encoder` must be 'none', 'pca', 'obsm:KEY', .* got .*; choose one of them"
        ):
            make_encoder(bad) if bad != "" else make_encoder("obsm:")


# ---------------------------------------------------------------- the scale


@pytest.mark.parametrize("level", ["cell", "gene"])
def test_statistics_of_batches(level):
    """Protects mean and variance: batches of any sizes give what all values at once give, genes without features aside."""
    rng = np.random.default_rng(0)
    values = rng.normal(1e4, [1, 5, 0.1], size=(50, 3) if level == "cell" else (50, 6, 3))
    has = None if level == "cell" else np.array([True, False, True, True, False, True])
    statistics = FeatureStatistics(3)
    for part in np.split(values, [1, 1, 20]):
        statistics.update(part, has)
    flat = values if has is None else values[:, has].reshape(-1, 3)
    assert statistics.count == len(flat)
    np.testing.assert_allclose(statistics.mean, flat.mean(0), rtol=1e-12)
    np.testing.assert_allclose(statistics.variance, flat.var(0), rtol=1e-6)
    z = statistics.standardize(values, has)
    assert z.dtype == np.float32
    used = z if has is None else z[:, has].reshape(-1, 3)
    np.testing.assert_allclose(used, (flat - flat.mean(0)) / np.sqrt(flat.var(0) + 1e-6), rtol=1e-4, atol=1e-4)
    if has is not None:
        assert not z[:, ~has].any()
    np.testing.assert_allclose(statistics.restore(used), flat, rtol=1e-6)


def test_features_that_do_not_vary():
    """Protects against a division by zero: a constant channel becomes 0."""
    statistics = FeatureStatistics(2)
    statistics.update(np.ones((5, 2)))
    assert not statistics.standardize(np.ones((5, 2))).any()


def test_mask_per_cell():
    """Protects models that give features to the expressed genes of a cell only."""
    rng = np.random.default_rng(0)
    values, has = rng.normal(size=(10, 4, 2)), rng.random((10, 4)) < 0.5
    statistics = FeatureStatistics(2)
    statistics.update(values, has)
    np.testing.assert_allclose(statistics.mean, values[has].mean(0))
    assert not statistics.standardize(values, has)[~has].any()


def test_running_statistics_freeze():
    """Protects the running form: the estimate moves for some batches, and then stays."""
    rng, statistics = np.random.default_rng(0), FeatureStatistics(2, warmup_batches=2)
    np.testing.assert_array_equal(
        statistics.standardize([[3.0, 4.0]]), np.float32([[3, 4]]) / np.sqrt(np.float32(1 + 1e-6))
    )
    batches = rng.normal(size=(4, 10, 2))
    for i, batch in enumerate(batches):
        assert statistics.frozen == (i >= 2)
        statistics.update(batch)
    assert statistics.count == 20
    np.testing.assert_allclose(statistics.mean, batches[:2].reshape(-1, 2).mean(0))


def test_statistics_survive_json():
    """Protects saved models: the same numbers, to the last bit, and the running form goes on where it was."""
    rng = np.random.default_rng(0)
    batches = rng.normal(size=(3, 10, 2))
    whole, first = FeatureStatistics(2, 3), FeatureStatistics(2, 3)
    for batch in batches:
        whole.update(batch)
    first.update(batches[0])
    copy = FeatureStatistics.from_dict(json.loads(json.dumps(first.to_dict())))
    assert np.array_equal(copy.mean, first.mean)
    assert np.array_equal(copy.variance, first.variance)
    for batch in batches[1:]:
        copy.update(batch)
    assert copy.to_dict() == whole.to_dict()
    assert copy.frozen
    buffers = whole.buffers()
    assert set(buffers) == {"feature_mean", "feature_var", "feature_count"}
    torch.testing.assert_close(buffers["feature_mean"], torch.tensor(whole.mean, dtype=torch.float32))
    torch.testing.assert_close(buffers["feature_var"], torch.tensor(whole.variance, dtype=torch.float32))
    assert int(buffers["feature_count"]) == 30


def test_bad_statistics():
    """Protects the arguments of the statistics."""
    with pytest.raises(ValueError, match="`dim` must be at least 1, got 0"):
        FeatureStatistics(0)
    with pytest.raises(ValueError, match="`warmup_batches` must be at least 1, got 0"):
        FeatureStatistics(2, 0)
    with pytest.raises(ValueError, match="`covariance` was not kept; create the statistics with `covariance=True`"):
        FeatureStatistics(2).covariance()


def _correlated(n: int = 400) -> np.ndarray:
    """Six channels of very different scale that vary in three directions, with a mean."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(n, 3)) @ rng.normal(size=(3, 6)) * [1, 10, 100, 0.1, 1, 5] + 7


def test_compression():
    """Protects compressed features: standard scores, all of what varies, and the way back."""
    values, statistics = _correlated(), FeatureStatistics(6, covariance=True)
    for part in np.split(values, [3, 100]):
        statistics.update(part)
    z = statistics.standardize(values)
    np.testing.assert_allclose(statistics.covariance(), np.cov(z.T, bias=True), atol=1e-5)
    compression = FeatureCompression.fit(statistics, 3)
    scores = compression.transform(z)
    assert (scores.shape, scores.dtype, compression.dim) == ((400, 3), np.float32, 3)
    np.testing.assert_allclose(np.cov(scores.T, bias=True), np.eye(3), atol=1e-4)
    assert compression.explained == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(compression.inverse(scores), z, atol=1e-3)
    assert (compression.components.max(1) == np.abs(compression.components).max(1)).all()  # signs are fixed
    fewer = FeatureCompression.fit(statistics, 2)
    np.testing.assert_allclose(fewer.transform(z), scores[:, :2], atol=1e-5)
    lost = ((fewer.inverse(fewer.transform(z)) - z) ** 2).sum() / (z**2).sum()
    assert lost == pytest.approx(1 - fewer.explained, abs=1e-4)
    copy = FeatureCompression.from_dict(json.loads(json.dumps(compression.to_dict())))
    assert np.array_equal(copy.transform(z), scores)


def test_compression_that_is_impossible():
    """Protects against more components than features, or than directions in which they vary."""
    statistics = FeatureStatistics(6, covariance=True)
    statistics.update(_correlated())
    with pytest.raises(
        ValueError, match="`latent_dim` must be from 1 to the number of features, 6, got 7; choose fewer"
    ):
        FeatureCompression.fit(statistics, 7)
    with pytest.raises(
        ValueError, match="`latent_dim`=4 components cannot be made of features that vary in 3 directions"
    ):
        FeatureCompression.fit(statistics, 4)


# ---------------------------------------------------------------- the cache


class Counting:
    """A gene-level encoder that remembers which cells it was asked for."""

    name, level, dim = "counting", "gene", 0

    def __init__(self, level: str = "gene") -> None:
        self.level, self.asked = level, []

    def fit(self, adata, x, rows):
        self.dim, self.fitted = 2, rows

    def encode(self, adata, x, rows):
        self.asked.append(list(rows))
        values = x[rows].toarray()
        values = np.stack([values, np.sqrt(values)], 2)
        return values if self.level == "gene" else values.mean(1)

    def config(self):
        return {"name": self.name}


def test_cache_of_cells(cells, x):
    """Protects features of cells: encoded once, standardised by the training cells, in the order asked for."""
    encoder = Counting("cell")
    cache = FeatureCache(encoder, cells, x, TRAIN)
    assert cache.in_memory
    assert sum(map(len, encoder.asked)) == 96
    assert encoder.fitted.tolist() == TRAIN.tolist()
    np.testing.assert_allclose(cache.get(TRAIN).mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(cache.get(TRAIN).std(0), 1, atol=1e-2)
    assert abs(cache.get(np.arange(1, 96, 2)).mean()) > 1e-3  # the other cells have no part in it
    np.testing.assert_array_equal(cache.get([5, 3, 3]), cache.get(ROWS)[[5, 3, 3]])
    np.testing.assert_array_equal(cache.get(ROWS < 3), cache.get([0, 1, 2]))
    raw = encoder.encode(cells, x, ROWS)
    np.testing.assert_allclose(cache.inverse(cache.get(ROWS)), raw, rtol=1e-4)


def test_cache_of_some_cells(cells, x):
    """Protects memory and the user: only the needed cells are encoded, and asking for another one says so."""
    encoder = Counting("cell")
    cache = FeatureCache(encoder, cells, x, TRAIN, rows=[2, 4, 5])
    assert encoder.asked[0] == [2, 4, 5]
    np.testing.assert_allclose(cache.get([5]), FeatureCache(Counting("cell"), cells, x, TRAIN).get([5]), rtol=1e-4)
    with pytest.raises(ValueError, match=r"`rows` names 2 cells without features \(first: 'cell3'\); make the cache"):
        cache.get([2, 3, 6])


@pytest.mark.parametrize("latent_dim", [None, 1])
def test_cache_of_genes_under_a_limit(cells, x, latent_dim):
    """Protects features of genes that do not fit: equal to those in memory, made when asked for, the last ones kept."""
    whole = FeatureCache(Counting(), cells, x, TRAIN, latent_dim=latent_dim)
    encoder = Counting()
    per_cell = 4 * 20 * (latent_dim or 2)
    limited = FeatureCache(encoder, cells, x, TRAIN, latent_dim=latent_dim, memory_limit=4 * per_cell + 1)
    assert (whole.in_memory, limited.in_memory) == (True, False)
    encoder.asked.clear()
    for rows in ([7, 3, 3], [3, 7], [1, 2], [3], [5], [3], [7], ROWS.tolist(), []):
        np.testing.assert_allclose(limited.get(rows), whole.get(rows), rtol=1e-5, atol=1e-6)
        assert len(limited._kept) <= 4
    # 5 pushes out 7, the one that was used longest ago
    assert encoder.asked[:4] == [[3, 7], [1, 2], [5], [7]]
    assert limited.get(ROWS).shape == (96, 20, latent_dim or 2)


def test_genes_without_features(cells, x, table):
    """Protects genes that the encoder does not know: 0 after standardising and compressing, and no part in the scale."""
    plain = FeatureCache(GeneTableFeatures(table), cells, x, TRAIN)
    small = FeatureCache(GeneTableFeatures(table), cells, x, TRAIN, latent_dim=2)
    assert plain.has_features.sum() == 18
    for cache in (plain, small):
        assert not cache.get(ROWS)[:, ~cache.has_features].any()
        np.testing.assert_allclose(cache.get(TRAIN)[:, 2:].mean((0, 1)), 0, atol=1e-5)
        np.testing.assert_allclose(cache.get(TRAIN)[:, 2:].var((0, 1)), 1, atol=1e-3)
    assert plain.statistics.count == len(TRAIN) * 18


def test_statistics_come_from_a_sample(monkeypatch):
    """Protects large data: at most 4,096 training cells, drawn by the seed, whatever the global random state."""
    matrix = np.arange(10_000, dtype=np.float32)[:, None]
    adata, train = AnnData(matrix), np.arange(5000, 10_000)
    caches = [FeatureCache(CallableFeatures(np.asarray), adata, matrix, train, seed=seed) for seed in (0, 0, 1)]
    assert [cache.statistics.count for cache in caches] == [4096] * 3
    means = [cache.statistics.mean[0] for cache in caches]
    assert means[0] == means[1] != means[2]
    assert means[0] == pytest.approx(7500, abs=50)


def test_bad_cache(cells, x):
    """Protects the arguments of the cache, and against encoders that do not keep their word."""
    with pytest.raises(ValueError, match="`train_rows` names no cells; give the cells"):
        FeatureCache(Counting(), cells, x, [])
    with pytest.raises(ValueError, match=r"`rows` has 1 rows outside of the 96 cells \(first: 96\); give rows from 0"):
        FeatureCache(Counting(), cells, x, TRAIN, rows=[1, 96])
    with pytest.raises(ValueError, match="`train_rows` is a mask of 3 cells, the data have 96; make it for all cells"):
        FeatureCache(Counting(), cells, x, np.ones(3, dtype=bool))
    with pytest.raises(ValueError, match=r"`x` must have the shape of `adata`, \(96, 20\), got \(50, 20\); give all"):
        FeatureCache(Counting(), cells, x[:50], TRAIN)
    encoder = Counting("cell")
    encoder.encode = lambda adata, x, rows: np.zeros((len(rows), 3))
    with pytest.raises(ValueError, match=r"'counting' must give features of the shape \(96, 2\), got \(96, 3\); mend"):
        FeatureCache(encoder, cells, x, TRAIN)
