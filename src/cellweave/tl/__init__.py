"""Evaluation of embeddings."""

from ._scores import integration_scores, label_scores

__all__ = ["integration_scores", "label_scores"]
