"""Figures of training, predictions, attention, marker tables, populations and perturbations, drawn with matplotlib."""

from ._attention import context_attention
from ._curves import training_curves
from ._marker_table import marker_table
from ._perturbation_cells import perturbation_embedding, perturbation_genes
from ._perturbation_effects import de_agreement, perturbation_shift
from ._perturbation_scores import perturbation_scores
from ._population_shares import annotation_confusion, population_hierarchy, population_palette, population_ratios
from ._populations import batch_correction, latent_density, marker_monotonicity, population_profile
from ._reconstruction import masked_reconstruction

__all__ = [
    "annotation_confusion",
    "batch_correction",
    "context_attention",
    "de_agreement",
    "latent_density",
    "marker_monotonicity",
    "marker_table",
    "masked_reconstruction",
    "perturbation_embedding",
    "perturbation_genes",
    "perturbation_scores",
    "perturbation_shift",
    "population_hierarchy",
    "population_palette",
    "population_profile",
    "population_ratios",
    "training_curves",
]
