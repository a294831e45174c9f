"""Published checkpoints of the single-stream flow as models."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

from anndata import AnnData

from cellweave.io import ScDFMCheckpoint, read_scdfm

__all__ = ["FlowImportMixin"]


class FlowImportMixin:
    """Reading of scDFM checkpoints."""

    @classmethod
    def load_scdfm_checkpoint(
        cls,
        path: str | os.PathLike[str],
        vocabulary: str | os.PathLike[str] | Mapping[str, int] | Sequence[str],
        adata: AnnData,
        graph_top_k: int = 30,
        **model_kwargs: Any,
    ) -> Self:
        """Make a model of a published scDFM checkpoint; nothing in the file is executed.

        The file holds neither the genes nor the gene graph: names come from the vocabulary of the run, and the graph is made
        again of the training cells. Perturbations must be gene tokens (genetic screens).

        Parameters
        ----------
        path
            The ``checkpoint.pt`` of a run.
        vocabulary
            Names of the tokens: the JSON file of the run (``{name: id}``), such a mapping, or names in the order of the ids.
        adata
            The training data of the run, set up with :meth:`setup_anndata`, with exactly the genes of the vocabulary.
        graph_top_k
            Genes that every gene of the graph was linked to.
        **model_kwargs
            Further arguments of the model.

        Returns
        -------
        The model, ready to predict; it starts from noise, has no anchor and reads perturbations as published.

        Raises
        ------
        ValueError
            If the file is no such checkpoint, its perturbations are labels, or its genes are not those of ``adata``.
        """
        checkpoint = read_scdfm(path, vocabulary)
        if checkpoint.has_labels:
            raise ValueError(
                f"`{path}` knows perturbations by labels (drugs); read it with `cellweave.io.read_scdfm` and "
                "`CascadedFlowModule(**checkpoint.module_arguments())`."
            )
        model = cls(  # type: ignore[call-arg]
            adata,
            n_hidden=checkpoint.n_hidden,
            n_layers=checkpoint.n_layers,
            n_heads=checkpoint.n_heads,
            gene_graph="coexpression" if checkpoint.has_graph else None,
            graph_top_k=graph_top_k,
            anchor=None,
            start="noise",
            layout="scdfm",
            **model_kwargs,
        )
        model._check_vocabulary(checkpoint.genes)
        _trimmed(checkpoint, model.module.encoder.n_tokens).load_into(model.module)
        model.is_trained_ = True
        model.module.eval()
        return model

    def _check_vocabulary(self, names: Sequence[str]) -> None:
        """Check that the tokens of a checkpoint are those of the model, in the same order."""
        ours = self._tokens.names
        theirs = [name for name in names if name]
        if missing := sorted(set(theirs) - set(ours)):
            raise ValueError(
                f"`adata` lacks {len(missing)} genes of the vocabulary (first: {missing[0]!r}); give the data of the run, with "
                "all of its genes."
            )
        if extra := sorted(set(ours) - set(theirs)):
            raise ValueError(
                f"`adata` has {len(extra)} genes or perturbations that the vocabulary lacks (first: {extra[0]!r}); select its "
                "genes with `adata[:, genes].copy()` before the setup."
            )
        if list(names[: len(ours)]) != ours:
            raise ValueError(
                "`vocabulary` is not special tokens followed by the genes in alphabetical order; give the vocabulary file of the "
                "run."
            )


def _trimmed(checkpoint: ScDFMCheckpoint, n_tokens: int) -> ScDFMCheckpoint:
    """The checkpoint without the rows of its table that no token uses: the published code makes 6,000 for any vocabulary."""
    key = "encoder.embedding.weight"
    return replace(checkpoint, weights={**checkpoint.weights, key: checkpoint.weights[key][:n_tokens]})
