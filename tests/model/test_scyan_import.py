"""Files that the published Scyan package saved: same predictions, clear refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData

from cellweave.io import ModelFileError, read_scyan_weights
from cellweave.model import ScyanModel
from cellweave.nn import CouplingFlow

FOLDER = Path(__file__).parents[1] / "parity" / "fixtures"
CASES = json.loads((FOLDER / "scyan_core.json").read_text())["cases"]
SMALL = [case for case in CASES if case != "paper_bmmc_like"]


def _arrays(case: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / "scyan_core.npz") as arrays:
        return {name.removeprefix(f"{case}/"): arrays[name] for name in arrays.files if name.startswith(f"{case}/")}


def _foreign(arrays: dict[str, np.ndarray], prior_std: float) -> dict[str, torch.Tensor]:
    """Content of a file of ``Scyan.save``, as its names, shapes and types are documented."""
    flow = {k.removeprefix("param/"): torch.tensor(v) for k, v in arrays.items() if k.startswith("param/real_nvp")}
    rho, n_markers = torch.tensor(arrays["rho"], dtype=torch.float32), arrays["rho"].shape[1]
    content = {"x": torch.tensor(arrays["x"]), "covariates": torch.tensor(arrays["covariates"])}
    content |= {f"module.{k}": v for k, v in flow.items()}
    content |= {f"module.{k.replace('module_list', 'module')}": v for k, v in flow.items()}
    for i in range(1 + max(int(k.split(".")[2]) for k in flow)):
        mask = ((torch.arange(n_markers) - i) % 3 > 0).long()
        content |= {f"module.real_nvp.{name}.{i}.mask": mask for name in ("module_list", "module")}
    content["module.pi_logit"] = torch.tensor(arrays["pi_logit"])
    prior = {"rho": rho.nan_to_num(0), "rho_mask": rho.isnan(), "modes": torch.tensor(arrays["modes"]).float()[None]}
    prior |= {"loc": torch.zeros(n_markers), "cov": prior_std**2 * torch.eye(n_markers)}
    prior["na_constant_term"] = torch.tensor(arrays["na_constant_term"]).float()
    return content | {f"module.prior.{name}": value for name, value in prior.items()}


def _table(arrays: dict[str, np.ndarray]) -> pd.DataFrame:
    n_populations, n_markers = arrays["rho"].shape
    return pd.DataFrame(
        arrays["rho"], [f"pop{i}" for i in range(n_populations)], [f"marker{j}" for j in range(n_markers)]
    )


def _data(arrays: dict[str, np.ndarray]) -> AnnData:
    """The cells of a case; every column of its covariates becomes a continuous covariate."""
    n_cells, n_markers = arrays["x"].shape
    columns = {f"c{j}": column for j, column in enumerate(arrays["covariates"].T)}
    adata = AnnData(arrays["x"].astype(np.float32), obs=pd.DataFrame(columns, [f"cell{i}" for i in range(n_cells)]))
    adata.var_names = [f"marker{j}" for j in range(n_markers)]
    ScyanModel.setup_anndata(adata, continuous_covariate_keys=list(columns) or None)
    return adata


@pytest.mark.filterwarnings("ignore:The markers in")
@pytest.mark.parametrize("case", SMALL)
def test_a_foreign_model_predicts_the_same(case, tmp_path):
    """Protects users who come from the published package: posterior, density and latent markers of the fixture."""
    arrays = _arrays(case)
    torch.save(_foreign(arrays, CASES[case]["prior_std"]), tmp_path / "scyan.pt")
    model = ScyanModel.from_scyan(tmp_path / "scyan.pt", _data(arrays), _table(arrays))
    assert model.is_trained
    np.testing.assert_allclose(model.predict_proba().to_numpy(), arrays["probs"], atol=2e-4)
    np.testing.assert_allclose(model.get_log_density(), arrays["max_log_prob_u"], rtol=1e-3)
    np.testing.assert_allclose(model.get_latent_representation(), arrays["u"], rtol=1e-3, atol=1e-3)
    assert model.module.prior.continuum.numpy().tolist() == arrays["continuum"].astype(bool).tolist()
    model.save(tmp_path / "ours")
    again = ScyanModel.load(tmp_path / "ours", adata=_data(arrays))
    pd.testing.assert_frame_equal(again.predict_proba(), model.predict_proba())


def test_what_the_file_says(tmp_path):
    """Protects the sizes that are inferred from shapes, and the training data, which must not be kept."""
    case = "cov_continuum"
    arrays, sizes = _arrays(case), CASES[case]
    torch.save(_foreign(arrays, sizes["prior_std"]), tmp_path / "scyan.pt")
    found = read_scyan_weights(tmp_path / "scyan.pt")
    assert (found.n_hidden, found.n_hidden_layers) == (sizes["hidden_size"], sizes["n_hidden_layers"])
    assert (found.n_layers, found.n_covariates, found.prior_std) == (sizes["n_layers"], sizes["C"], sizes["prior_std"])
    np.testing.assert_array_equal(found.rho, arrays["rho"].astype(np.float32))
    assert not any(name in found.weights for name in ("x", "covariates"))


@pytest.mark.filterwarnings("ignore:The markers in")
def test_the_batch_comes_last_among_their_categories(tmp_path):
    """Protects the order of covariates: theirs has the batch behind the other categories, ours before."""
    rng = np.random.default_rng(0)
    n_cells, n_markers = 40, 4
    obs = pd.DataFrame({"age": rng.normal(size=n_cells)}, index=[f"cell{i}" for i in range(n_cells)])
    obs["sample"] = pd.Categorical.from_codes(np.arange(n_cells) % 3, ["s0", "s1", "s2"])
    obs["sex"] = pd.Categorical.from_codes(np.arange(n_cells) % 2, ["f", "m"])
    adata = AnnData(rng.normal(size=(n_cells, n_markers)).astype(np.float32), obs=obs)
    adata.var_names = list("ABCD")
    theirs = np.c_[np.eye(2)[obs["sex"].cat.codes], np.eye(3)[obs["sample"].cat.codes], obs["age"]]
    torch.manual_seed(0)
    flow = CouplingFlow(n_markers, 6, n_hidden=5, n_hidden_layers=1, n_layers=3, covariate_scale=100.0)
    weights = {f"real_nvp.{name}": value.numpy() for name, value in flow.state_dict().items()}
    rho = np.array([[1.0, -1, np.nan, 1], [-1, 1, 1, np.nan]])
    arrays = {"x": adata.X, "covariates": theirs, "rho": rho, "modes": np.nan_to_num(rho), "pi_logit": np.zeros(2)}
    arrays |= {"na_constant_term": np.zeros(2), **{f"param/{name}": value for name, value in weights.items()}}
    torch.save(_foreign(arrays, 0.3), tmp_path / "scyan.pt")
    ScyanModel.setup_anndata(
        adata, batch_key="sample", categorical_covariate_keys=["sex"], continuous_covariate_keys=["age"]
    )
    table = pd.DataFrame(rho, ["P", "Q"], list("ABCD"))
    u = ScyanModel.from_scyan(tmp_path / "scyan.pt", adata, table).get_latent_representation()
    expected, _ = flow(torch.tensor(adata.X), torch.tensor(theirs, dtype=torch.float32))
    np.testing.assert_allclose(u, expected.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:The markers in")
def test_other_tables_and_covariates_are_refused(tmp_path):
    """Protects against a table with rows in another order, which would silently swap populations."""
    arrays = _arrays("cov_continuum")
    torch.save(_foreign(arrays, 0.25), tmp_path / "scyan.pt")
    table, adata = _table(arrays), _data(arrays)
    with pytest.raises(ModelFileError, match=r"`table` has .* for population .*; give the table that the model"):
        ScyanModel.from_scyan(tmp_path / "scyan.pt", adata, table.iloc[::-1])
    with pytest.raises(ModelFileError, match="has a table of 5 populations and 7 markers, `table` has 4 and 7"):
        ScyanModel.from_scyan(tmp_path / "scyan.pt", adata, table.iloc[:4])
    ScyanModel.setup_anndata(adata)
    with pytest.raises(ModelFileError, match="was trained with 4 covariate columns, `adata` is set up with 0"):
        ScyanModel.from_scyan(tmp_path / "scyan.pt", adata, table)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read as weights"),
        (b"no weights", "cannot be read as weights"),
        ([1, 2], "holds a list and no weights"),
        ({"module.pi_logit": torch.zeros(2)}, "lacks `module.prior.rho`"),
    ],
)
def test_other_files_are_refused(content, message, tmp_path):
    """Protects the user from a torch traceback where the file is damaged or of something else."""
    path = tmp_path / "file.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ModelFileError, match=message):
        read_scyan_weights(path)
    with pytest.raises(ModelFileError, match="is not a file"):
        read_scyan_weights(tmp_path / "nowhere.pt")


def test_a_pickle_is_not_executed(tmp_path):
    """Protects the user's machine: a file with code in it is refused and does nothing."""

    class Attack:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"x": Attack()}, tmp_path / "attack.pt")
    with pytest.raises(ModelFileError, match="cannot be read as weights"):
        read_scyan_weights(tmp_path / "attack.pt")
    assert not (tmp_path / "executed").exists()
