"""Bad and unusual input of `ScyanModel`, each with its sentence or its documented behaviour."""

from __future__ import annotations

import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import cellweave as cw
from cellweave.model import ScyanModel

BLOCKS = {"block_size": 64, "buffer_size": 256}


def _untouched(adata) -> None:
    assert not adata.uns
    assert not [name for name in adata.obs if name.startswith("_scvi")]
    assert not [name for name in adata.obsm if name.startswith("_scvi")]


def _one_sentence(error) -> str:
    message = str(error.value.args[0])
    assert message.endswith(".")
    assert "\n" not in message
    assert ";" in message
    return message


# ---------------------------------------------------------------- columns

COLUMNS = {
    "text for a number": (
        {"continuous_covariate_keys": ["condition"]},
        ValueError,
        r"`adata.obs\['condition'\]` \(`continuous_covariate_keys`\) holds category values .*`categorical_covariate_keys`",
    ),
    "infinite number": (
        {"continuous_covariate_keys": ["dose"]},
        ValueError,
        r"`adata.obs\['dose'\]` .* NaN or infinite in 2 cell\(s\) \(first: 'cell3'\); fill",
    ),
    "missing category": (
        {"categorical_covariate_keys": ["holes"]},
        ValueError,
        r"`adata.obs\['holes'\]` \(`categorical_covariate_keys`\) is missing in 1 cell\(s\) \(first: 'cell4'\); fill",
    ),
    "no such covariate": (
        {"continuous_covariate_keys": ["size"]},
        KeyError,
        "`continuous_covariate_keys` names 'size', which is not",
    ),
    "no such category": (
        {"categorical_covariate_keys": ["size"]},
        KeyError,
        "`categorical_covariate_keys='size'` not found; ",
    ),
    "text for a list": (
        {"categorical_covariate_keys": "condition"},
        TypeError,
        r"must be a list .*, got 'condition'; pass `\['condition'\]`",
    ),
    "column twice": (
        {"categorical_covariate_keys": ["condition"], "continuous_covariate_keys": ["condition"]},
        ValueError,
        "`continuous_covariate_keys` names 'condition', which `categorical_covariate_keys` has already; name it once",
    ),
    "batch twice": (
        {"categorical_covariate_keys": ["batch"]},
        ValueError,
        "names 'batch', which `batch_key` has already; name it once",
    ),
    "no such layer": ({"layer": "scaled"}, KeyError, "`layer='scaled'` not found; `adata.layers` has nothing"),
    "missing label": (
        {"labels_key": "holes"},
        ValueError,
        r"`adata.obs\['holes'\]` \(`labels_key`\) is missing in 1 cell",
    ),
}


@pytest.mark.parametrize("fault", COLUMNS)
def test_columns_are_refused(make_markers, fault):
    """Protects setup: each wrong column is one sentence, before anything is written."""
    options, error_type, message = COLUMNS[fault]
    adata = make_markers(50)
    adata.obs["dose"] = np.where(np.isin(np.arange(50), [3, 7]), np.inf, 1.0)
    adata.obs["holes"] = adata.obs["condition"].where(np.arange(50) != 4)
    with pytest.raises(error_type, match=message) as error:
        ScyanModel.setup_anndata(adata, **{"batch_key": "batch", **options})
    _one_sentence(error)
    _untouched(adata)


def test_labels_must_be_in_the_table(make_markers, marker_table):
    """Protects `labels_key`: a value that is neither population nor group is named; both kinds and "unknown" are fine."""
    adata = make_markers(60)
    adata.obs["label"] = ["T", "B", "lymphoid", "unknown", "Plasma", "PDC"] * 10
    ScyanModel.setup_anndata(adata, labels_key="label")
    with pytest.raises(
        ValueError, match=r"2 label\(s\) that are neither a population nor a group .*\(first: 'PDC'\); rename"
    ) as error:
        ScyanModel(adata, marker_table)
    _one_sentence(error)
    adata.obs["label"] = ["T", "B", "lymphoid", "none", "CD8 T", "none"] * 10
    ScyanModel.setup_anndata(adata, labels_key="label", unlabeled_category="none")
    model = ScyanModel(adata, marker_table)
    allowed = dict(zip(["B", "CD8 T", "T", "lymphoid", "none"], model.module.label_sets.sum(1).tolist(), strict=True))
    assert allowed == {"B": 1, "CD8 T": 1, "T": 2, "lymphoid": 4, "none": 5}
    assert model.module.objectives[-1].share == pytest.approx(4 / 6)


def test_unused_categories_of_a_covariate_get_no_weights(make_markers, marker_table):
    """Protects subsets: categories that no cell has are left out of the model and kept in the user's column."""
    adata = make_markers(60)
    adata.obs["condition"] = (
        adata.obs["condition"].cat.add_categories(["a", "z"]).cat.reorder_categories(["a", "stim", "z", "rest"])
    )
    ScyanModel.setup_anndata(adata, batch_key="batch", categorical_covariate_keys=["condition"])
    model = ScyanModel(adata, marker_table)
    assert model.module.n_covariates == 4
    assert model._covariate_categories() == {"batch": ["b0", "b1"], "condition": ["stim", "rest"]}
    assert list(adata.obs["condition"].cat.categories) == ["a", "stim", "z", "rest"]
    codes = (
        adata.obsm["_scvi_extra_categorical_covs"]["condition"]
        if "_scvi_extra_categorical_covs" in adata.obsm
        else None
    )
    if codes is not None:
        assert (np.asarray(["stim", "rest"])[codes] == adata.obs["condition"].to_numpy()).all()


# ---------------------------------------------------------------- data


def test_view_is_refused_for_training_and_read_as_query(scyan, scyan_data):
    """Protects views: setup does not write into a part of another object; a query is copied for the call."""
    with pytest.raises(ValueError, match=r"`adata` is a view .*`adata = adata.copy\(\)`"):
        ScyanModel.setup_anndata(scyan_data[:20])
    view = scyan_data[10:30]
    pd.testing.assert_series_equal(scyan.predict(view), scyan.predict()[10:30])
    assert view.is_view
    _untouched(scyan_data)


QUERIES = {
    "marker missing": (
        lambda a: a[:, [0, 1, 3, 4, 5, 6]].copy(),
        ValueError,
        r"1 of the 6 markers .* \(first: 'CD8'\)",
    ),
    "marker renamed": (
        lambda a: setattr(a, "var_names", ["CD3", "CD4", "cd8a", *a.var_names[3:]]) or a,
        ValueError,
        r"first: 'CD8'\), which has 'cd8a'; rename",
    ),
    "unseen batch": (lambda a: a.obs.__setitem__("batch", "b9") or a, ValueError, "1 value.* in 500 cell.*'b9'"),
    "unseen category": (
        lambda a: a.obs.__setitem__("condition", ["rest", "late"] * 250) or a,
        ValueError,
        r"`adata.obs\['condition'\]` \(`categorical_covariate_keys`\) has 1 value\(s\) in 250 cell\(s\).*'late'",
    ),
    "no batch": (lambda a: a.obs.drop(columns="batch", inplace=True) or a, KeyError, "`batch_key='batch'` not found; "),
    "no age": (
        lambda a: a.obs.drop(columns="age", inplace=True) or a,
        KeyError,
        "`continuous_covariate_keys` names 'age'",
    ),
    "age as text": (
        lambda a: a.obs.__setitem__("age", "old") or a,
        ValueError,
        r"`adata.obs\['age'\]` .* no numbers; name it",
    ),
}


@pytest.mark.parametrize("fault", QUERIES)
@pytest.mark.parametrize("getter", ["predict", "correct_batch", "get_population_diagnostics"])
def test_queries_are_refused(scyan, scyan_data, getter, fault):
    """Protects predictions on new samples: what the model cannot know is refused, and nothing is written."""
    change, error_type, message = QUERIES[fault]
    query = change(scyan_data)
    options = {} if getter == "get_population_diagnostics" else {"key_added": "new"}
    with pytest.raises(error_type, match=message) as error:
        getattr(scyan, getter)(query, **options)
    _one_sentence(error) if error_type is ValueError else None
    _untouched(query)
    assert "new" not in query.obs
    assert not query.layers


def test_level_that_does_not_exist(scyan):
    """Protects `level`: the levels there are stand in the message."""
    for name in ("predict", "predict_proba"):
        with pytest.raises(
            ValueError, match=r"`level='cluster'` is not in `table`; it has the levels \['lineage', 'origin'\]"
        ):
            getattr(scyan, name)(level="cluster")


def test_one_population(make_markers, fit_scyan, marker_table):
    """Protects gating of a single population: one warning, and every cell gets its label or none."""
    with pytest.warns(UserWarning, match="one population only") as caught:
        model = fit_scyan(make_markers(200), marker_table.iloc[:1])
    assert len([w for w in caught if "one population only" in str(w.message)]) == 1
    labels = model.predict(log_density_threshold=float(model.get_log_density().median()))
    assert set(labels.dropna()) == {"B"}
    assert labels.isna().any()
    assert (model.predict_proba() == 1).all(axis=None)
    assert model.sample(3, seed=0).obs["population"].tolist() == ["B"] * 3


@pytest.mark.parametrize("markers", [["CD3"], ["CD3", "CD19"]])
def test_one_or_two_markers(make_markers, fit_scyan, markers):
    """Protects the smallest panels, for which most coupling layers transform nothing: cells are told apart."""
    table = pd.DataFrame(np.array([[1, -1], [-1, 1]])[:, : len(markers)], index=["T", "other"], columns=markers)
    model = fit_scyan(
        make_markers(300, shift=0.2), table, training={"max_epochs": None, "batch_size": None, "lr": 1e-3}
    )
    truth = model.adata.obs["truth"].isin(["CD4 T", "CD8 T"]).to_numpy()
    found = (model.predict(log_density_threshold=-np.inf) == "T").to_numpy()
    sure = truth | (model.adata.obs["truth"] == "B").to_numpy() if len(markers) == 2 else slice(None)
    assert (found == truth)[sure].mean() > 0.97
    assert model.correct_batch().shape == (300, len(markers))
    assert model.get_marker_diagnostics().shape == (len(markers), 3)


def test_raw_intensities_get_advice(make_markers, marker_table):
    """Protects users who forgot to transform or scale: an error for raw values, a warning for unscaled ones."""
    with pytest.raises(ValueError, match="raw intensities .*`cellweave.pp.arcsinh` and `cellweave.pp.scale_markers`"):
        ScyanModel(_times(make_markers(100), 1000), marker_table)
    with pytest.warns(UserWarning, match="standard deviation of .*; transform and scale them"):
        ScyanModel(_times(make_markers(100), 5), marker_table)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        clean = make_markers(100)
        ScyanModel.setup_anndata(clean)
        ScyanModel(clean, marker_table)


def _times(adata, factor: float):
    adata.X = adata.X * np.float32(factor)
    ScyanModel.setup_anndata(adata)
    return adata


# ---------------------------------------------------------------- storage


@pytest.mark.parametrize("kind", ["backed", "h5ad", "zarr"])
def test_data_on_disk(make_markers, fit_scyan, tmp_path, kind):
    """Protects large data: training and every getter on files give what the same cells in memory give."""
    adata = make_markers(300)
    in_memory = fit_scyan(adata.copy(), training={"datasplitter_kwargs": BLOCKS})
    if kind == "zarr":
        store = cw.pp.write_store(adata, tmp_path / "a.zarr", shuffle=False)
    else:
        adata.write_h5ad(tmp_path / "a.h5ad")
        backed = kind == "backed"
        store = ad.read_h5ad(tmp_path / "a.h5ad", backed="r") if backed else cw.io.open_store(tmp_path / "a.h5ad")
    model = fit_scyan(store, training={"datasplitter_kwargs": BLOCKS})
    for name in ("predict_proba", "get_latent_representation", "correct_batch", "get_population_diagnostics"):
        pd.testing.assert_frame_equal(getattr(model, name)(), getattr(in_memory, name)())
    labels = model.predict(key_added="scyan_population")
    assert store.obs["scyan_population"].tolist() == labels.tolist()
    pd.testing.assert_series_equal(in_memory.predict(store), in_memory.predict())


def test_large_results_of_a_store(make_markers, scyan, tmp_path):
    """Protects `key_added` on a store: columns and frames are held, and a layer is refused or written as asked."""
    adata = make_markers(300, effect=0.4)
    adata.write_h5ad(tmp_path / "a.h5ad")
    store = cw.io.open_store(tmp_path / "a.h5ad")
    scyan.predict_proba(store, key_added="scyan_proba")
    pd.testing.assert_frame_equal(store.obsm["scyan_proba"], scyan.predict_proba(adata))
    corrected = scyan.correct_batch(store, reference="b0", key_added="scyan_corrected")
    np.testing.assert_array_equal(np.asarray(store.layers["scyan_corrected"][:])[:, :6], corrected)
