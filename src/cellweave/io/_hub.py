"""Model cards for the Hugging Face hub, next to the files of a saved model."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import pandas as pd

from cellweave import _compat

from ._inspect import ModelInfo, inspect_model
from ._model_files import read_model

__all__ = ["write_hub_card"]

# names that `scvi.hub` reads
_CARD, _METADATA = "README.md", "_scvi_required_metadata.json"
_MISSING = "Not provided by the uploader."


def write_hub_card(
    dir_path: str | os.PathLike[str],
    license: str,
    *,
    description: str = _MISSING,
    metrics: pd.DataFrame | None = None,
    references: str = _MISSING,
    training_data_url: str | None = None,
    training_code_url: str | None = None,
    modalities: Sequence[str] = (),
    tissues: Sequence[str] = (),
    is_annotated: bool | None = None,
    model_parent_module: str = "cellweave.model",
    overwrite: bool = False,
) -> None:
    """Make a saved model ready for the Hugging Face hub: a model card and the metadata that :mod:`scvi.hub` reads.

    The card has the fields of an scvi-hub card (class, arguments, setup, data registry, numbers of cells, genes and
    batches, metrics, training data and code), and a checksum of the weights it describes. The files of the model stay
    as they are: no pickle is written. Nothing is uploaded. Needs ``pip install "cellweave[hub]"``.

    Parameters
    ----------
    dir_path
        Directory that ``save`` of a model wrote.
    license
        License of the model, as the hub spells it, for example ``"cc-by-4.0"``.
    description
        What the model was trained on and what it is for.
    metrics
        Scores, for example from ``model.get_reconstruction_metrics()``.
    references
        What to cite.
    training_data_url, training_code_url
        Where the training data and code are.
    modalities, tissues
        Of the training data; tags of the hub.
    is_annotated
        Whether the training data are annotated; a tag of the hub.
    model_parent_module
        Module from which the class of the model is imported.
    overwrite
        Replace a card that is there, for instance after the model was trained on.

    Raises
    ------
    ModelFileError
        If the directory does not hold an intact model.
    FileExistsError
        If there is a card and ``overwrite`` is false.
    ModuleNotFoundError
        If ``huggingface_hub`` is not installed.
    ValueError
        If an address is not one of the web.
    """
    folder = Path(dir_path)
    info, registry = inspect_model(folder), read_model(folder).registry
    urls = {"training_data_url": training_data_url, "training_code_url": training_code_url}
    for name, url in urls.items():
        _check_url(name, url)
    present = [name for name in (_CARD, _METADATA) if (folder / name).exists()]
    if present and not overwrite:
        raise FileExistsError(f"`{folder / present[0]}` already exists; pass `overwrite=True` to replace the card.")
    tags = _tags(info, registry, modalities, tissues, is_annotated)
    sections = {
        "Description": description,
        "Use": _usage(info, model_parent_module),
        "Metrics": _MISSING if metrics is None else _table(metrics),
        "Model arguments": _code(info.arguments),
        "Setup arguments": _code(info.setup),
        "Data registry": _table(_data_registry(registry)),
        "Summary statistics": _table(_statistics(registry)),
        "Training data": training_data_url or _MISSING,
        "Training code": training_code_url or _MISSING,
        "Files": f"No pickles. SHA-256 of the weights: `{info.weights_sha256}`.",
        "References": references,
    }
    card = _card(license, tags, info, sections)
    metadata = _metadata(info, registry, training_data_url, model_parent_module)
    _write(folder / _METADATA, metadata)
    _write(folder / _CARD, card)


def _check_url(name: str, url: str | None) -> None:
    if url is not None and not (urlsplit(url).scheme in ("http", "https", "ftp") and urlsplit(url).netloc):
        raise ValueError(f"`{name}` must be an address that starts with https://, got {url!r}.")


def _tags(
    info: ModelInfo,
    registry: Mapping[str, Any],
    modalities: Sequence[str],
    tissues: Sequence[str],
    is_annotated: bool | None,
) -> list[str]:
    return [
        "biology",
        "genomics",
        "single-cell",
        f"model_cls_name:{info.model}",
        f"cellweave_version:{info.cellweave}",
        f"scvi_version:{registry[_compat.SCVI_VERSION_KEY]}",
        f"anndata_version:{version('anndata')}",
        *(f"modality:{modality}" for modality in modalities),
        *(f"tissue:{tissue}" for tissue in tissues),
        *([] if is_annotated is None else [f"annotated:{is_annotated}"]),
    ]


def _usage(info: ModelInfo, module: str) -> str:
    return (
        "```python\n"
        "from huggingface_hub import snapshot_download\n"
        f"from {module} import {info.model}\n\n"
        f'model = {info.model}.load(snapshot_download("OWNER/NAME"), adata)\n'
        "```\n\n"
        f"{'Trained' if info.is_trained else 'Not trained'}; {info.n_genes:,} genes. Genes of `adata` are matched by name."
    )


def _code(values: Mapping[str, Any]) -> str:
    return f"```json\n{json.dumps(dict(values), indent=2, default=str)}\n```"


def _data_registry(registry: Mapping[str, Any]) -> pd.DataFrame:
    fields = registry[_compat.FIELD_REGISTRIES_KEY]
    rows = {name: field["data_registry"] for name, field in fields.items() if field["data_registry"]}
    where = {
        name: ".".join(str(row[key]) for key in ("mod_key", "attr_name", "attr_key") if row.get(key) is not None)
        for name, row in rows.items()
    }
    return pd.DataFrame({"location": where})


def _statistics(registry: Mapping[str, Any]) -> pd.DataFrame:
    fields = registry[_compat.FIELD_REGISTRIES_KEY]
    return pd.DataFrame({"value": {k: v for field in fields.values() for k, v in field["summary_stats"].items()}})


def _table(frame: pd.DataFrame) -> str:
    """A frame as a Markdown table; pandas needs another package for it."""
    rows = [["", *frame.columns], *([index, *row] for index, row in zip(frame.index, frame.to_numpy(), strict=True))]
    cells = [[f"{cell:.4g}" if isinstance(cell, float) else str(cell).replace("|", r"\|") for cell in r] for r in rows]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([lines[0], "|" + " --- |" * len(cells[0]), *lines[1:]])


def _card(license: str, tags: list[str], info: ModelInfo, sections: Mapping[str, str]) -> str:
    from huggingface_hub import ModelCard, ModelCardData

    header = ModelCardData(license=license, library_name="cellweave", tags=tags).to_yaml()
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items())
    content = f"---\n{header}\n---\n\n# {info.model}\n\n{body}\n"
    return str(ModelCard(content))  # parses the header


def _metadata(info: ModelInfo, registry: Mapping[str, Any], url: str | None, module: str) -> str:
    from scvi.hub import HubMetadata

    metadata = HubMetadata(
        scvi_version=registry[_compat.SCVI_VERSION_KEY],
        anndata_version=version("anndata"),
        model_cls_name=info.model,
        model_parent_module=module,
    )
    # not given to the constructor, which opens the address
    return json.dumps({**dataclasses.asdict(metadata), "training_data_url": url}, indent=2)


def _write(path: Path, text: str) -> None:
    staging = path.with_name(f".{path.name}.{uuid4().hex[:8]}")
    try:
        staging.write_text(text, encoding="utf-8")
        staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)
