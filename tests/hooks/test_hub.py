"""Model cards for the Hugging Face hub. Nothing is uploaded or downloaded."""

from __future__ import annotations

import json
import os
from importlib.metadata import version

import numpy as np
import pytest

from cellweave.io import ModelFileError, inspect_model, write_hub_card
from cellweave.model import StackModel

hub = pytest.importorskip("huggingface_hub", reason='needs huggingface_hub: pip install "cellweave[hub]"')

CARD, METADATA = "README.md", "_scvi_required_metadata.json"


@pytest.fixture
def folder(trained, tmp_path):
    trained.save(tmp_path / "model")
    return tmp_path / "model"


def test_card_says_what_the_model_is(trained, folder, make_adata):
    """Protects the card: class, arguments, setup, sizes, scores, license and sources, read back by the hub's parser."""
    scores = trained.get_reconstruction_metrics(make_adata())
    write_hub_card(
        folder,
        "cc-by-4.0",
        description="Simulated blood.",
        metrics=scores,
        references="Somebody, 2026.",
        training_data_url="https://example.org/data.h5ad",
        training_code_url="https://example.org/train.py",
        modalities=["rna"],
        tissues=["blood"],
        is_annotated=True,
    )
    card = hub.ModelCard.load(folder / CARD)
    assert card.data.license == "cc-by-4.0"
    assert card.data.library_name == "cellweave"
    written_by = f"cellweave_version:{version('cellweave')}"
    tags = {"model_cls_name:StackModel", "modality:rna", "tissue:blood", "annotated:True", written_by}
    assert tags <= set(card.data.tags)
    for text in (
        "Simulated blood.",
        "Somebody, 2026.",
        "https://example.org/data.h5ad",
        "https://example.org/train.py",
    ):
        assert text in card.text
    assert '"n_hidden": 4' in card.text
    assert '"batch_key": "batch"' in card.text
    assert "| n_cells | 96 |" in card.text
    assert "| n_vars | 20 |" in card.text
    assert "| n_batch | 2 |" in card.text
    assert "| batch | obs._scvi_batch |" in card.text
    assert f"| StackModel | {scores.iloc[0, 0]:.4g} |" in card.text
    assert inspect_model(folder).weights_sha256 in card.text


def test_scvi_hub_loads_the_directory(trained, folder, make_adata):
    """Protects users of `scvi.hub`: its HubModel reads card and metadata and loads the model, without a pickle."""
    from scvi.hub import HubModel

    write_hub_card(folder, "mit")
    model = HubModel(str(folder))
    model.load_model(adata=make_adata(), accelerator="cpu")
    assert model.metadata.model_cls_name == "StackModel"
    z = model.model.get_latent_representation()
    np.testing.assert_array_equal(z, trained.get_latent_representation(make_adata()))
    assert not list(folder.rglob("*.pt"))


def test_model_loads_with_its_card(trained, folder, make_adata):
    """Protects the model: a card beside it changes no file and nothing of what is loaded."""
    before = {name: (folder / name).read_bytes() for name in os.listdir(folder)}
    write_hub_card(folder, "mit")
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert sorted(os.listdir(folder)) == sorted([*before, CARD, METADATA])
    z = StackModel.load(folder, make_adata(), accelerator="cpu").get_latent_representation()
    np.testing.assert_array_equal(z, trained.get_latent_representation(make_adata()))


def test_addresses_are_stored_without_opening_them(folder, monkeypatch):
    """Protects work without a network: the address of the data is stored for scvi.hub, and not visited."""
    monkeypatch.setattr("requests.get", lambda *a, **k: pytest.fail("the address was opened"))
    write_hub_card(folder, "mit", training_data_url="https://example.org/data.h5ad")
    assert json.loads((folder / METADATA).read_text())["training_data_url"] == "https://example.org/data.h5ad"


def test_card_is_not_replaced_without_asking(folder):
    """Protects a card that was edited by hand; it also survives saving the model again."""
    write_hub_card(folder, "mit")
    (folder / CARD).write_text("edited")
    with pytest.raises(FileExistsError, match="README.md` already exists; pass `overwrite=True`"):
        write_hub_card(folder, "mit")
    assert (folder / CARD).read_text() == "edited"
    StackModel.load(folder).save(folder, overwrite=True)
    assert (folder / CARD).read_text() == "edited"
    write_hub_card(folder, "mit", overwrite=True)
    assert hub.ModelCard.load(folder / CARD).data.license == "mit"


def test_card_of_nothing_is_refused(folder, tmp_path):
    """Protects the hub: neither a damaged model nor a wrong address gets a card, and nothing is written."""
    with pytest.raises(ValueError, match="`training_code_url` must be an address that starts with https://, got 'me'"):
        write_hub_card(folder, "mit", training_code_url="me")
    (folder / "weights.safetensors").write_bytes(b"x")
    with pytest.raises(ModelFileError, match="weights.safetensors"):
        write_hub_card(folder, "mit")
    assert not (folder / CARD).exists()
    with pytest.raises(ModelFileError, match="does not exist"):
        write_hub_card(tmp_path / "nothing", "mit")
