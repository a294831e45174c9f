"""What a trained model remembers of the means of its training cells."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["AnchorTable"]


class AnchorTable(nn.Module):
    """Means and detection rates of control cells and their shifts in perturbed cells, kept with the weights of a model.

    Parameters
    ----------
    n_contexts
        Number of contexts.
    n_rows
        Number of observed pairs of context and condition.
    n_genes
        Number of genes.
    """

    control_mean: Tensor
    control_detection: Tensor
    control_count: Tensor
    shift: Tensor
    detection_shift: Tensor
    variance: Tensor
    control_variance: Tensor
    count: Tensor
    context: Tensor
    condition: Tensor
    trained: Tensor
    trust: Tensor

    def __init__(self, n_contexts: int, n_rows: int, n_genes: int) -> None:
        super().__init__()
        self.register_buffer("control_mean", torch.zeros(n_contexts, n_genes))
        self.register_buffer("control_detection", torch.zeros(n_contexts, n_genes))
        self.register_buffer("control_count", torch.zeros(n_contexts, dtype=torch.int64))
        self.register_buffer("shift", torch.zeros(n_rows, n_genes))
        self.register_buffer("detection_shift", torch.zeros(n_rows, n_genes))
        for prefix in ("", "detection_"):  # sampling variances of the means
            self.register_buffer(f"{prefix}variance", torch.zeros(n_rows, n_genes))
            self.register_buffer(f"{prefix}control_variance", torch.zeros(n_contexts, n_genes))
        for name in ("count", "context", "condition"):  # of every row
            self.register_buffer(name, torch.zeros(n_rows, dtype=torch.int64))
        self.register_buffer("trained", torch.ones(n_rows, dtype=torch.bool))  # whether the flow was trained on a row
        # share of the way along the flow that predictions go, of rows it was trained on and of others
        self.register_buffer("trust", torch.ones(2))
