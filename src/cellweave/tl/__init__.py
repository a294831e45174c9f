"""Evaluation of embeddings, annotations and predicted perturbations, and what follows from populations."""

from ._annotation import evaluate_annotation
from ._perturbation import evaluate_perturbation
from ._perturbation_cell_eval import to_cell_eval
from ._ratios import population_ratios
from ._scores import integration_scores, label_scores
from ._subcluster import subcluster_population

__all__ = [
    "evaluate_annotation",
    "evaluate_perturbation",
    "integration_scores",
    "label_scores",
    "population_ratios",
    "subcluster_population",
    "to_cell_eval",
]
