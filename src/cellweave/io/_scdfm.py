"""Checkpoints that the training script of scDFM wrote."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ._model_files import ModelFileError

__all__ = ["ScDFMCheckpoint", "read_scdfm"]

Vocabulary = str | os.PathLike[str] | Mapping[str, int] | Sequence[str]
Shapes = dict[str, tuple[int, ...]]

# The published gene encoder has this many heads, whatever the heads of the backbone.
_ENCODER_HEADS = 8
_FREQUENCIES = 256
_GRAPH, _LABELS = "encoder.perturbation_interaction.", "perturbation_embedder."
_BLOCK = re.compile(r"blocks\.(\d+)\.")
# Tensors that tell the sizes.
_TABLE, _SUBLN = "encoder.embedding.weight", "blocks.0.diff_self_attn.attn.subln.weight"
# Buffers that are ours alone: the gene graph, which the published code keeps elsewhere, and what a model adds.
_OWN = ("encoder.allowed_bits", "anchors.")
_ADVICE = "give the `checkpoint.pt` of an scDFM run, or its `model_state_dict`"


@dataclass(frozen=True)
class ScDFMCheckpoint:
    """A published single-stream flow: weights, sizes, and the genes of its tokens.

    Parameters
    ----------
    weights
        Weights by their published names, which :class:`~cellweave.module.CascadedFlowModule` shares.
    n_tokens
        Number of gene tokens, special ones included.
    n_hidden
        Width of a token.
    n_layers
        Blocks of the backbone.
    n_heads
        Heads of the backbone.
    has_graph
        Whether genes interact along a gene graph, which the file does not hold.
    has_labels
        Whether perturbations are labels (drugs) instead of gene tokens.
    n_labels
        Number of labels; 0 where perturbations are gene tokens.
    genes
        Name of every token ``(token,)``, empty for tokens without a name; empty tuple without a vocabulary.
    iteration
        Training step of the checkpoint; None if the file does not say.
    """

    weights: dict[str, Tensor]
    n_tokens: int
    n_hidden: int
    n_layers: int
    n_heads: int
    has_graph: bool
    has_labels: bool
    n_labels: int
    genes: tuple[str, ...]
    iteration: int | None

    def module_arguments(self, forbidden: Tensor | None = None) -> dict[str, Any]:
        """Arguments with which :class:`~cellweave.module.CascadedFlowModule` is this model.

        Parameters
        ----------
        forbidden
            Gene graph, bool ``(token, token)``, true where a token must not see another one; made of the training data by
            :func:`~cellweave.data.coexpression_mask`. Needed by a model with a graph, and only by it.

        Raises
        ------
        ValueError
            If the graph is missing, not needed, or of another size.
        """
        if self.has_graph != (forbidden is not None):
            says = "has a gene graph, which is not in the file; make it of the training data"
            raise ValueError(
                f"`forbidden`: the checkpoint {says if self.has_graph else 'has no gene graph; leave it out'}."
            )
        size = (self.n_tokens, self.n_tokens)
        if forbidden is not None and tuple(forbidden.shape) != size:
            raise ValueError(
                f"`forbidden` must have the shape {size}, got {tuple(forbidden.shape)}; make it for the tokens of the vocabulary."
            )
        return {
            "n_tokens": self.n_tokens,
            "n_labels": self.n_labels,
            "forbidden": forbidden,
            "n_hidden": self.n_hidden,
            "n_layers": self.n_layers,
            "n_heads": self.n_heads,
            "encoder_heads": _ENCODER_HEADS,
            "layout": "scdfm",
            "adapter_residual": False,
            "perturbation_head": True,
            "latent_noise": 0.0,
            "condition_dropout": 0.0,
        }

    def load_into(self, module: nn.Module) -> None:
        """Load the weights into a module made with :meth:`module_arguments`; all of them must be there, and fit.

        Parameters
        ----------
        module
            The module.

        Raises
        ------
        ValueError
            If the module has other weights.
        """
        expected = {n: tuple(t.shape) for n, t in module.state_dict().items() if not n.startswith(_OWN)}
        found = {n: tuple(t.shape) for n, t in self.weights.items()}
        if wrong := [n for n in {**expected, **found} if expected.get(n) != found.get(n)]:
            raise ValueError(
                f"`module` differs from the checkpoint in {len(wrong)} weights (first: `{wrong[0]}`); create it with "
                "`CascadedFlowModule(**checkpoint.module_arguments())`."
            )
        module.load_state_dict(self.weights, strict=False)  # strict by the comparison above, but for what is ours alone


def read_scdfm(
    path: str | os.PathLike[str], vocabulary: Vocabulary | None = None, labels: bool | None = None
) -> ScDFMCheckpoint:
    """Read a checkpoint of scDFM; nothing in it is executed.

    All sizes come from the shapes of the weights. The file holds neither the names of genes nor the gene graph.

    Parameters
    ----------
    path
        The ``checkpoint.pt`` of a training run, or a file with its ``model_state_dict`` alone.
    vocabulary
        Names of the tokens: the JSON file of the run (``{name: id}``), such a mapping, or names in the order of the ids.
    labels
        Whether perturbations are labels (drugs) instead of genes. Published files have a table of labels in either case and
        do not say whether it was used; by default it was where there is no gene graph. An unused table is left out.

    Returns
    -------
    The checkpoint. :meth:`cellweave.model.CascadedFlowModel.load_scdfm_checkpoint` makes a model of it in one step.

    Raises
    ------
    ModelFileError
        If the file is missing, damaged, or not a checkpoint of scDFM.
    ValueError
        If the vocabulary does not fit.

    References
    ----------
    scDFM, arXiv 2602.07103 (2026).
    """
    path = Path(path)
    weights, iteration = _read(path)
    has_graph = any(name.startswith(_GRAPH) for name in weights)
    has_table = f"{_LABELS}embedding.weight" in weights
    labels = has_table and not has_graph if labels is None else labels
    if labels and not has_table:
        raise ModelFileError(
            f"`{path}` has no table of labels, which `labels=True` asks for; read it with `labels=False`."
        )
    if not labels:
        weights = {name: value for name, value in weights.items() if not name.startswith(_LABELS)}
    n_layers = 1 + max((int(match[1]) for name in weights if (match := _BLOCK.match(name))), default=-1)
    n_tokens, n_hidden, n_heads = _sizes(path, weights)
    n_labels = len(weights[f"{_LABELS}embedding.weight"]) if labels else 0
    _check(path, weights, _expected(n_tokens, n_hidden, n_layers, n_heads, has_graph, n_labels))
    return ScDFMCheckpoint(
        weights=weights,
        n_tokens=n_tokens,
        n_hidden=n_hidden,
        n_layers=n_layers,
        n_heads=n_heads,
        has_graph=has_graph,
        has_labels=labels,
        n_labels=n_labels,
        genes=() if vocabulary is None else _gene_names(vocabulary, n_tokens),
        iteration=iteration,
    )


# ---------------------------------------------------------------- the file


def _read(path: Path) -> tuple[dict[str, Tensor], int | None]:
    """Weights of either kind of file, without the prefix of distributed training, and the step."""
    if not path.is_file():
        raise ModelFileError(f"`{path}` is not a file; {_ADVICE}.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds, all of which mean the same here
        raise ModelFileError(
            f"`{path}` cannot be read with `weights_only=True`, so it is damaged or holds more than weights; {_ADVICE}."
        ) from error
    if not isinstance(content, dict):
        raise ModelFileError(f"`{path}` holds a {type(content).__name__} and no weights; {_ADVICE}.")
    weights, iteration = content.get("model_state_dict", content), content.get("iteration")
    if not isinstance(weights, dict):
        raise ModelFileError(f"`{path}` holds a {type(weights).__name__} as `model_state_dict`; {_ADVICE}.")
    if others := [name for name, value in weights.items() if not isinstance(value, Tensor)]:
        raise ModelFileError(
            f"`{path}` has {len(others)} entries that are no weights (first: {others[0]!r}) and no `model_state_dict`; {_ADVICE}."
        )
    if all(name.startswith("module.") for name in weights):
        weights = {name.removeprefix("module."): value for name, value in weights.items()}
    return weights, iteration if isinstance(iteration, int) else None


def _sizes(path: Path, weights: Mapping[str, Tensor]) -> tuple[int, int, int]:
    """Numbers of tokens, of hidden units and of heads."""
    for name, ndim in ((_TABLE, 2), (_SUBLN, 1)):
        if name not in weights or weights[name].ndim != ndim:
            raise ModelFileError(f"`{path}` lacks `{name}`, so it is no model of scDFM; {_ADVICE}.")
    (n_tokens, n_hidden), width = weights[_TABLE].shape, len(weights[_SUBLN])
    if not width or n_hidden % width:
        raise ModelFileError(f"`{path}` has heads of {width} of {n_hidden} units, which scDFM cannot have; {_ADVICE}.")
    return n_tokens, n_hidden, n_hidden // width


def _check(path: Path, weights: Mapping[str, Tensor], expected: Shapes) -> None:
    """Refuse other weights than those of this size, and values that are not finite."""
    if missing := [name for name in expected if name not in weights]:
        raise ModelFileError(f"`{path}` lacks {len(missing)} weights of scDFM (first: `{missing[0]}`); {_ADVICE}.")
    if others := [name for name in weights if name not in expected]:
        raise ModelFileError(
            f"`{path}` has {len(others)} weights that scDFM has not (first: `{others[0]}`); {_ADVICE}."
        )
    if wrong := [name for name, shape in expected.items() if tuple(weights[name].shape) != shape]:
        found = tuple(weights[wrong[0]].shape)
        raise ModelFileError(
            f"`{path}` has {len(wrong)} weights of another shape (first: `{wrong[0]}`, {found} instead of "
            f"{expected[wrong[0]]}); {_ADVICE}."
        )
    if bad := [name for name, value in weights.items() if not torch.isfinite(value).all()]:
        raise ModelFileError(
            f"`{path}` has {len(bad)} weights that are not finite (first: `{bad[0]}`); use an earlier checkpoint."
        )


# ---------------------------------------------------------------- the published layout


def _linear(name: str, n_out: int, n_in: int) -> Shapes:
    return {f"{name}.weight": (n_out, n_in), f"{name}.bias": (n_out,)}


def _norm(name: str, dim: int) -> Shapes:
    return {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}


def _expected(n_tokens: int, d: int, n_layers: int, n_heads: int, has_graph: bool, n_labels: int) -> Shapes:
    """Name and shape of every weight."""
    shapes: Shapes = {"p_mask_embed": (d,), _TABLE: (n_tokens, d), **_norm("encoder.enc_norm", d)}
    shapes |= _linear("t_embedder.mlp.0", d, _FREQUENCIES) | _linear("t_embedder.mlp.2", d, d)
    shapes |= _linear("fusion_layer.0", d, 2 * d) | _linear("fusion_layer.2", d, d) | _norm("fusion_layer.3", d)
    for name in ("value_encoder_1", "value_encoder_2"):
        shapes |= _linear(f"{name}.linear1", d, 1) | _linear(f"{name}.linear2", d, d) | _norm(f"{name}.norm", d)
    if has_graph:
        shapes |= _graph(d)
    if n_labels:
        shapes |= {f"{_LABELS}embedding.weight": (n_labels, d), **_norm(f"{_LABELS}enc_norm", d)}
    for i in range(n_layers):
        for attention in ("diff_self_attn", "diff_cross_attn"):
            shapes |= _attention_block(f"blocks.{i}.{attention}", d, n_heads)
        shapes |= _linear(f"gene_adaLN.{i}.adaLN_modulation.1", 3 * d, d) | _norm(f"gene_adaLN.{i}.norm", d)
        shapes |= _linear(f"adapter_layer.{i}.0", d, 2 * d) | _linear(f"adapter_layer.{i}.3", d, d)
    shapes |= _norm("p_head.0", d) | _linear("p_head.1", d, d)
    return (
        shapes
        | _linear("final_layer.fc.0", d, 2 * d)
        | _linear("final_layer.fc.2", d, d)
        | _linear("final_layer.fc.4", 1, d)
    )


def _graph(d: int) -> Shapes:
    attention = f"{_GRAPH}cross_attn."
    shapes: Shapes = {f"{attention}in_proj_weight": (3 * d, d), f"{attention}in_proj_bias": (3 * d,)}
    shapes |= _linear(f"{attention}out_proj", d, d) | _norm(f"{_GRAPH}norm1", d) | _norm(f"{_GRAPH}norm2", d)
    return shapes | _linear(f"{_GRAPH}linear1", 4 * d, d) | _linear(f"{_GRAPH}linear2", d, 4 * d)


def _attention_block(name: str, d: int, n_heads: int) -> Shapes:
    width = (d // n_heads,)
    shapes: Shapes = {f"{name}.attn.lambda_{part}": width for part in ("q1", "k1", "q2", "k2")}
    projections = ("q_proj_1", "k_proj_1", "q_proj_2", "k_proj_2", "v_proj", "out_proj")
    shapes |= {f"{name}.attn.{part}.weight": (d, d) for part in projections}
    shapes |= {f"{name}.attn.subln.weight": width, **_linear(f"{name}.adaLN_modulation.1", 6 * d, d)}
    return shapes | _linear(f"{name}.mlp.fc1", 4 * d, d) | _linear(f"{name}.mlp.fc2", d, 4 * d)


# ---------------------------------------------------------------- the vocabulary


def _gene_names(vocabulary: Vocabulary, n_tokens: int) -> tuple[str, ...]:
    """Name of every token."""
    if isinstance(vocabulary, str | os.PathLike):
        vocabulary = _vocabulary_file(Path(vocabulary))
    pairs = vocabulary if isinstance(vocabulary, Mapping) else {}
    if not isinstance(vocabulary, Mapping):
        names = [str(name) for name in vocabulary]
        pairs = dict(zip(names, range(len(names)), strict=True))
        if twice := len(names) - len(pairs):
            raise ValueError(f"`vocabulary` has {twice} repeated names; give one name per token.")
    bad = [name for name, i in pairs.items() if not isinstance(i, int | np.integer) or not 0 <= i < n_tokens]
    if bad:
        raise ValueError(
            f"`vocabulary` has {len(bad)} names whose id is none of the {n_tokens} tokens of the checkpoint (first: {bad[0]!r}: "
            f"{pairs[bad[0]]!r}); give the vocabulary that the model was trained with."
        )
    names = [""] * n_tokens
    for name, i in pairs.items():
        if names[i]:
            raise ValueError(f"`vocabulary` gives {name!r} and {names[i]!r} the same id {i}; give every name its own.")
        names[i] = str(name)
    return tuple(names)


def _vocabulary_file(path: Path) -> Mapping[str, int] | Sequence[str]:
    if not path.is_file():
        raise ModelFileError(f"`vocabulary`: `{path}` is not a file; give the JSON file of the run.")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ModelFileError(f"`vocabulary`: `{path}` is no JSON ({error}); give the JSON file of the run.") from error
    if not isinstance(content, dict | list):
        raise ModelFileError(
            f"`vocabulary`: `{path}` holds a {type(content).__name__}; it must hold names with ids, or names."
        )
    return content
