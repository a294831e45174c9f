"""Published checkpoints of the single-stream flow as models."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from anndata import AnnData

from cellweave.flow import time_grid
from cellweave.model import CascadedFlowModel
from cellweave.module import CascadeSampler, FlowSolver, FlowStart
from cellweave.nn._embedders import _pack

SPECIAL = ["<pad>", "<cls>", "<mask>", "control"]


@pytest.fixture(scope="module")
def published():
    """Numbers of a small published model; skips where they are absent."""
    file = Path(os.environ.get("CELLWEAVE_DATA", "shared/data")).parent / "parity" / "ccfm_scdfm.npz"
    if not file.exists():
        pytest.skip(f"{file} not found; set CELLWEAVE_DATA to the data folder of the shared numbers")
    with np.load(file) as arrays:
        return dict(arrays)


def _screen(n_genes=40, n_cells=80):
    rng = np.random.default_rng(0)
    x = np.log1p(rng.poisson(1.5, (n_cells, n_genes)) * 0.7).astype(np.float32)
    adata = AnnData(sp.csr_matrix(x))
    adata.var_names = [f"T{i:02d}" for i in rng.permutation(n_genes)]
    adata.obs_names = [f"cell{i}" for i in range(n_cells)]
    adata.obs["perturbation"] = np.resize(["control", "T03", "T03+T07", "T01"], n_cells)
    return adata


def _file(published, path, extra_tokens=0):
    weights = {name.removeprefix("sd/"): torch.tensor(v) for name, v in published.items() if name.startswith("sd/")}
    if extra_tokens:  # the released code makes a larger table than the vocabulary needs
        key = "encoder.embedding.weight"
        weights[key] = torch.cat([weights[key], torch.randn(extra_tokens, weights[key].shape[1])])
    torch.save({"iteration": 7, "model_state_dict": weights, "optimizer_state_dict": {}}, path)
    return path


def _load(published, tmp_path, adata=None, vocabulary=None, extra_tokens=0):
    adata = _screen() if adata is None else adata
    CascadedFlowModel.setup_anndata(adata, "perturbation")
    names = [*SPECIAL, *sorted(adata.var_names)] if vocabulary is None else vocabulary
    names = {name: i for i, name in enumerate(names)}
    return CascadedFlowModel.load_scdfm_checkpoint(_file(published, tmp_path / "c.pt", extra_tokens), names, adata)


@pytest.mark.parity
@pytest.mark.parametrize("extra_tokens", [0, 5])
def test_the_model_follows_the_published_flow(published, tmp_path, extra_tokens):
    """Protects checkpoints of users: the model that is loaded solves the flow of the published one."""
    model = _load(published, tmp_path, extra_tokens=extra_tokens)
    module = model.module
    # the graph is made of the data; the fixture has one of its own
    module.encoder.allowed_bits.copy_(_pack(~torch.tensor(published["mask"])))
    genes, source, perturbation = (torch.tensor(published[name]) for name in ("gene_ids", "source", "pert_ids"))
    grid = time_grid(20)
    with torch.no_grad():
        sampler = CascadeSampler(module.eval(), genes, source)
        start = FlowStart(torch.tensor(published["ode_noise"]))
        end = sampler.generate(perturbation, start, FlowSolver("rk4", grid, grid)).expression
    np.testing.assert_allclose(end.numpy(), published["ode_rk4/traj_last"], rtol=1e-4, atol=2e-5)


@pytest.mark.parity
def test_a_loaded_checkpoint_predicts_and_is_saved(published, tmp_path):
    """Protects the use of a checkpoint: predictions, single perturbations read as published, and our own files."""
    model = _load(published, tmp_path)
    pred = model.predict_perturbation(["T03", "T07+T03"], n_cells=5, n_steps=3)
    assert pred.shape == (10, 40)
    assert np.isfinite(pred.X).all()
    assert model._tokens.encode([("T03",)], True).tolist() == [[7, 3]]
    model.save(tmp_path / "model")
    again = CascadedFlowModel.load(tmp_path / "model", model.adata)
    same = again.predict_perturbation(["T03", "T03+T07"], n_cells=5, n_steps=3)
    np.testing.assert_array_equal(same.X, pred.X)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda names: [*names, "T99"], r"`adata` lacks 1 genes of the vocabulary \(first: 'T99'\)"),
        (lambda names: names[:-1], r"`adata` has 1 genes or perturbations that the vocabulary lacks \(first: 'T39'\)"),
        (lambda names: [*names[:4], *names[:3:-1]], "`vocabulary` is not special tokens followed by the genes"),
    ],
)
def test_another_vocabulary_is_refused(published, tmp_path, change, message):
    """Protects from weights that stand for other genes."""
    names = [*SPECIAL, *sorted(_screen().var_names)]
    with pytest.raises(ValueError, match=message):
        _load(published, tmp_path, vocabulary=change(names), extra_tokens=1 if len(change(names)) > 44 else 0)
