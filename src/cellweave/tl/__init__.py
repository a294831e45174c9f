"""Evaluation of embeddings and annotations, and what follows from populations."""

from ._annotation import evaluate_annotation
from ._ratios import population_ratios
from ._scores import integration_scores, label_scores
from ._subcluster import subcluster_population

__all__ = ["evaluate_annotation", "integration_scores", "label_scores", "population_ratios", "subcluster_population"]
