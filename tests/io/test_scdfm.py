"""Checkpoints of scDFM: sizes from shapes, the published numbers, and files that are something else."""

from __future__ import annotations

import json
import os
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from cellweave.io import ModelFileError, ScDFMCheckpoint, read_scdfm
from cellweave.module import CascadedFlowModule

GRAPH = "encoder.perturbation_interaction"


@pytest.fixture(scope="module")
def published() -> dict[str, np.ndarray]:
    """Numbers of a small published model; skips where they are absent."""
    file = Path(os.environ.get("CELLWEAVE_DATA", "shared/data")).parent / "parity" / "ccfm_scdfm.npz"
    if not file.exists():
        pytest.skip(f"{file} not found; set CELLWEAVE_DATA to the data folder of the shared numbers")
    with np.load(file) as arrays:
        return dict(arrays)


def _state(arrays: dict[str, np.ndarray], prefix: str = "sd/") -> OrderedDict[str, torch.Tensor]:
    return OrderedDict((k.removeprefix(prefix), torch.tensor(v)) for k, v in arrays.items() if k.startswith(prefix))


def _checkpoint(weights, **changes) -> dict:
    """A dictionary as the training script of scDFM saves it."""
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.Adam([parameter], lr=5e-5)
    parameter.sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100, 1e-6)
    states = {"optimizer_state_dict": optimizer.state_dict(), "scheduler_state_dict": scheduler.state_dict()}
    return {"iteration": 5000, "model_state_dict": weights, **states, "eval_score": None, **changes}


@pytest.fixture(scope="module")
def made() -> dict[str, torch.Tensor]:
    """Weights of a model of other sizes, with our names, which are the published ones; needs no shared numbers."""
    torch.manual_seed(0)
    options = {"n_hidden": 16, "n_layers": 3, "n_heads": 2, "layout": "scdfm", "perturbation_head": True}
    module = CascadedFlowModule(11, forbidden=torch.zeros(11, 11, dtype=torch.bool), encoder_heads=8, **options)
    return {name: value for name, value in module.state_dict().items() if name != "encoder.allowed_bits"}


def _write(path: Path, content) -> Path:
    torch.save(content, path)
    return path


@pytest.mark.parity
@pytest.mark.parametrize("form", ["whole", "bare", "distributed"])
def test_published_velocities(published, tmp_path, form):
    """Protects the published model: read from each form of the file, it has its sizes and gives its velocities."""
    weights = _state(published)
    content = {
        "whole": _checkpoint(weights),
        "bare": weights,
        "distributed": _checkpoint({f"module.{name}": value for name, value in weights.items()}),
    }[form]
    checkpoint = read_scdfm(_write(tmp_path / "checkpoint.pt", content))
    sizes = (checkpoint.n_tokens, checkpoint.n_hidden, checkpoint.n_layers, checkpoint.n_heads)
    assert sizes == (44, 32, 2, 4)
    assert (checkpoint.has_graph, checkpoint.has_labels, checkpoint.n_labels) == (True, False, 0)
    assert (checkpoint.genes, checkpoint.iteration) == ((), None if form == "bare" else 5000)
    module = CascadedFlowModule(**checkpoint.module_arguments(torch.tensor(published["mask"])))
    checkpoint.load_into(module)
    _assert_velocity(module, published, "vel/out")


@pytest.mark.parity
def test_published_labels(published, tmp_path):
    """Protects models of drugs: no graph, a table of labels instead, and their velocities."""
    path = _write(tmp_path / "checkpoint.pt", _checkpoint(_state(published, "drug/sd/")))
    checkpoint = read_scdfm(path)
    assert (checkpoint.has_graph, checkpoint.has_labels, checkpoint.n_labels, checkpoint.n_layers) == (
        False,
        True,
        44,
        1,
    )
    module = CascadedFlowModule(**checkpoint.module_arguments())
    checkpoint.load_into(module)
    _assert_velocity(module, published, "drug/out")


def _assert_velocity(module, a, name):
    genes, source, perturbation, t, x_t = (
        torch.tensor(a[n]) for n in ("gene_ids", "source", "pert_ids", "vel/t", "vel/x_t")
    )
    with torch.no_grad():
        velocity = module.eval().generative(source, genes, perturbation, x_t, t)["v_expr"]
    torch.testing.assert_close(velocity, torch.tensor(a[name]), rtol=1e-4, atol=2e-5)


def test_sizes_come_from_shapes(made, tmp_path):
    """Protects models of any size: every number is read from the file, and every weight arrives."""
    checkpoint = read_scdfm(_write(tmp_path / "checkpoint.pt", _checkpoint(made)))
    sizes = (checkpoint.n_tokens, checkpoint.n_hidden, checkpoint.n_layers, checkpoint.n_heads)
    assert sizes == (11, 16, 3, 2)
    module = CascadedFlowModule(**checkpoint.module_arguments(torch.zeros(11, 11, dtype=torch.bool)))
    checkpoint.load_into(module)
    assert all(torch.equal(module.state_dict()[name], value) for name, value in made.items())


def test_an_unused_table_of_labels_is_left_out(made, tmp_path):
    """Protects genes as perturbations: published files have a table of labels even then, which is read if asked for, or without a graph."""
    table = {"embedding.weight": torch.ones(7, 16), "enc_norm.weight": torch.ones(16), "enc_norm.bias": torch.ones(16)}
    path = _write(tmp_path / "c.pt", {**made, **{f"perturbation_embedder.{k}": v for k, v in table.items()}})
    genes, labels = read_scdfm(path), read_scdfm(path, labels=True)
    assert (genes.n_labels, labels.n_labels) == (0, 7)
    plain = {name: value for name, value in torch.load(path).items() if not name.startswith(GRAPH)}
    without_graph = _write(tmp_path / "e.pt", plain)
    assert [read_scdfm(without_graph, labels=labels).n_labels for labels in (None, False)] == [7, 0]
    assert not any(name.startswith("perturbation_embedder") for name in genes.weights)
    with pytest.raises(ModelFileError, match="has no table of labels, which `labels=True` asks for; read it with"):
        read_scdfm(_write(tmp_path / "d.pt", made), labels=True)


@pytest.mark.parametrize("form", ["file", "mapping", "names", "numpy"])
def test_vocabulary(made, tmp_path, form):
    """Protects the names of tokens: by id from a file or mapping, in order from names; ids without a name stay empty."""
    pairs = {"g2": 2, "<pad>": 0, "g1": 1}
    names = ["<pad>", "g1", "g2"]
    file = tmp_path / "vocab.json"
    file.write_text(json.dumps(pairs))
    vocabulary = {"file": file, "mapping": pairs, "names": names, "numpy": np.array(names)}[form]
    checkpoint = read_scdfm(_write(tmp_path / "c.pt", made), vocabulary)
    assert checkpoint.genes == ("<pad>", "g1", "g2", *[""] * 8)


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [
        (
            {"a": 0, "b": 11},
            r"has 1 names whose id is none of the 11 tokens of the checkpoint \(first: 'b': 11\); give the",
        ),
        ({"a": "0"}, r"has 1 names whose id is none of the 11 tokens .* \(first: 'a': '0'\)"),
        ({"a": 1, "b": 1}, "gives 'b' and 'a' the same id 1; give every name its own"),
        (["a", "b", "a"], "has 1 repeated names; give one name per token"),
        ([f"g{i}" for i in range(12)], r"has 1 names whose id is none of the 11 tokens .* \(first: 'g11': 11\)"),
    ],
)
def test_bad_vocabulary(made, tmp_path, vocabulary, message):
    """Protects against the vocabulary of another model, which would swap genes without a word."""
    with pytest.raises(ValueError, match=f"`vocabulary` {message}"):
        read_scdfm(_write(tmp_path / "c.pt", made), vocabulary)


def test_bad_vocabulary_file(made, tmp_path):
    """Protects against a missing file, and one that is no JSON of names."""
    path, file = _write(tmp_path / "c.pt", made), tmp_path / "vocab.json"
    for text, message in ((None, "is not a file"), ("{", "is no JSON"), ("3", "holds a int")):
        if text is not None:
            file.write_text(text)
        with pytest.raises(ModelFileError, match=f"`vocabulary`: .*{message}"):
            read_scdfm(path, file)


def _without(name):
    return lambda weights: {k: v for k, v in weights.items() if k != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: list(w.values()), "holds a list and no weights; give the `checkpoint.pt`"),
        (lambda w: {"model_state_dict": 3}, "holds a int as `model_state_dict`"),
        (
            lambda w: {"epoch": 3, "net": w},
            r"has 2 entries that are no weights \(first: 'epoch'\) and no `model_state_dict`",
        ),
        (lambda w: {}, "lacks `encoder.embedding.weight`, so it is no model of scDFM"),
        (_without("encoder.embedding.weight"), "lacks `encoder.embedding.weight`, so it is no model"),
        (_without("p_head.1.bias"), r"lacks 1 weights of scDFM \(first: `p_head.1.bias`\)"),
        (
            _without("blocks.1.diff_self_attn.attn.v_proj.weight"),
            r"lacks 1 .*first: `blocks.1.diff_self_attn.attn.v_proj",
        ),
        (_without(f"{GRAPH}.norm1.bias"), rf"lacks 1 weights of scDFM \(first: `{GRAPH}.norm1.bias`\)"),
        (
            lambda w: {**w, "latent_decoder.x": torch.ones(1)},
            r"has 1 weights that scDFM has not \(first: `latent_decoder.x`",
        ),
        (
            lambda w: {**w, "fusion_layer.0.weight": torch.ones(16, 16)},
            r"1 weights of another shape \(first: `fusion_layer.0.weight`, \(16, 16\) instead of \(16, 32\)\)",
        ),
        (
            lambda w: {**w, "p_mask_embed": torch.full((16,), torch.nan)},
            r"1 weights that are not finite \(first: `p_mask_emb",
        ),
        (
            lambda w: {**w, "blocks.0.diff_self_attn.attn.subln.weight": torch.ones(5)},
            "has heads of 5 of 16 units, which scDFM cannot have",
        ),
    ],
)
def test_files_that_are_something_else(made, tmp_path, change, message):
    """Protects against files of other models: one sentence that names the file and the first thing that is wrong."""
    path = _write(tmp_path / "c.pt", change(made))
    with pytest.raises(ModelFileError, match=message) as caught:
        read_scdfm(path)
    assert str(path) in str(caught.value)
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


class _Bomb:
    def __reduce__(self):
        return (os.mkdir, (os.environ["BOMB"],))


def test_nothing_is_executed(made, tmp_path, monkeypatch):
    """Protects the machine: a file whose pickle runs code is refused, in either form, and the code has not run."""
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    (tmp_path / "raw.pkl").write_bytes(pickle.dumps(_Bomb()))
    _write(tmp_path / "zip.pt", _checkpoint(made, eval_score=_Bomb()))
    for name in ("raw.pkl", "zip.pt"):
        with pytest.raises(ModelFileError, match="cannot be read with `weights_only=True`"):
            read_scdfm(tmp_path / name)
    assert not (tmp_path / "exploded").exists()


def test_damaged_and_missing_files(made, tmp_path):
    """Protects against half a download, an empty file and a wrong path."""
    path = _write(tmp_path / "c.pt", _checkpoint(made))
    content = path.read_bytes()
    for part in (content[: len(content) // 2], b"", b"text"):
        path.write_bytes(part)
        with pytest.raises(ModelFileError, match="cannot be read with `weights_only=True`"):
            read_scdfm(path)
    with pytest.raises(ModelFileError, match="is not a file; give the `checkpoint.pt`"):
        read_scdfm(tmp_path / "absent.pt")


def test_graph_that_does_not_fit(made, tmp_path):
    """Protects models with a graph: it must be given, in their size, and only to them."""
    checkpoint = read_scdfm(_write(tmp_path / "c.pt", made))
    with pytest.raises(
        ValueError, match="`forbidden`: the checkpoint has a gene graph, which is not in the file; make it"
    ):
        checkpoint.module_arguments()
    with pytest.raises(
        ValueError, match=r"`forbidden` must have the shape \(11, 11\), got \(3, 3\); make it for the tokens"
    ):
        checkpoint.module_arguments(torch.zeros(3, 3, dtype=torch.bool))
    plain = {name: value for name, value in made.items() if not name.startswith(GRAPH)}
    checkpoint = read_scdfm(_write(tmp_path / "d.pt", plain))
    assert isinstance(checkpoint, ScDFMCheckpoint)
    assert not checkpoint.has_graph
    with pytest.raises(ValueError, match="`forbidden`: the checkpoint has no gene graph; leave it out"):
        checkpoint.module_arguments(torch.zeros(11, 11, dtype=torch.bool))


def test_module_of_another_size(made, tmp_path):
    """Protects against loading half of the weights: another module is refused and keeps what it has."""
    checkpoint = read_scdfm(_write(tmp_path / "c.pt", made))
    arguments = checkpoint.module_arguments(torch.zeros(11, 11, dtype=torch.bool))
    module = CascadedFlowModule(**{**arguments, "n_layers": 2})
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(ValueError, match=r"`module` differs from the checkpoint in \d+ weights \(first: `blocks.2"):
        checkpoint.load_into(module)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
