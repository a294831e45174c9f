"""Several Scyan modules side by side, which differ by their random start."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from typing import Any, cast

import torch
from scvi.module.base import BaseModuleClass, LossOutput
from torch import Generator, Tensor, nn

from cellweave.nn import CovariateEncoder
from cellweave.objective import PopulationPrior

from ._scyan import ScyanAnnotation, ScyanModule, moves_data

__all__ = ["ScyanEnsemble"]


class ScyanEnsemble(BaseModuleClass):
    """An ensemble of :class:`ScyanModule`: probabilities and latent markers are means over its members.

    Members have no weights in common and the loss is the mean of theirs, so that each is trained as it would be alone on
    the same batches.

    Parameters
    ----------
    n_members
        Number of members.
    *args, **kwargs
        Arguments of every :class:`ScyanModule`.

    Raises
    ------
    ValueError
        If there are fewer than two members.
    """

    def __init__(self, n_members: int, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        if n_members < 2:
            raise ValueError(f"`n_members` must be at least 2, got {n_members}; one member is a ScyanModule.")
        # members share nothing, not even what is the same in all of them
        self.members = nn.ModuleList(ScyanModule(*args, **deepcopy(kwargs)) for _ in range(n_members))

    def __iter__(self) -> Iterator[ScyanModule]:
        return iter(cast("Iterable[ScyanModule]", self.members))

    @property
    def first(self) -> ScyanModule:
        """The first member."""
        return cast("ScyanModule", self.members[0])

    @property
    def prior(self) -> PopulationPrior:
        """The prior, the same in all members."""
        return self.first.prior

    @property
    def covariates(self) -> CovariateEncoder | None:
        """The covariates, the same in all members."""
        return self.first.covariates

    @property
    def temperature_period(self) -> int:
        """See :class:`ScyanModule`."""
        return self.first.temperature_period

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.first.device

    @property
    def population_weights(self) -> Tensor:
        """Mean population weights ``(population,)``, without gradient."""
        return torch.stack([member.population_weights for member in self]).mean(0)

    def use_labels(self, label_sets: Tensor, weight: float, share: float) -> None:
        """See :meth:`ScyanModule.use_labels`.

        Parameters
        ----------
        label_sets, weight, share
            As there.
        """
        for member in self:
            member.use_labels(label_sets, weight, share)

    @property
    def uses_labels(self) -> bool:
        """See :attr:`ScyanModule.uses_labels`."""
        return self.first.uses_labels

    def set_label_share(self, share: float) -> None:
        """See :meth:`ScyanModule.set_label_share`.

        Parameters
        ----------
        share
            As there.
        """
        for member in self:
            member.set_label_share(share)

    def start_epoch(self, epoch: int) -> None:
        """See :meth:`ScyanModule.start_epoch`."""
        for member in self:
            member.start_epoch(epoch)

    def select_gradients(self) -> None:
        """See :meth:`ScyanModule.select_gradients`."""
        for member in self:
            member.select_gradients()

    def read_covariates(self, tensors: dict[str, Any]) -> Tensor | None:
        """See :meth:`ScyanModule.read_covariates`.

        Parameters
        ----------
        tensors
            The batch.
        """
        return self.first.read_covariates(tensors)

    # ---------------------------------------------------------------- results: means over the members

    def latent(self, x: Tensor, covariates: Tensor | None = None) -> Tensor:
        """Latent markers ``(cell, marker)``.

        Parameters
        ----------
        x
            Measured markers ``(cell, marker)``, sparse or dense.
        covariates
            Covariates ``(cell, covariate)``.
        """
        return torch.stack([member.latent(x, covariates) for member in self]).mean(0)

    def annotate_cells(self, x: Tensor, covariates: Tensor | None = None) -> ScyanAnnotation:
        """Posterior and log densities; the population is the one with the largest mean posterior.

        Parameters
        ----------
        x
            Measured markers ``(cell, marker)``, sparse or dense.
        covariates
            Covariates ``(cell, covariate)``.
        """
        return _mean_annotation([member.annotate_cells(x, covariates) for member in self])

    def read_cells(self, x: Tensor, covariates: Tensor | None = None) -> tuple[Tensor, ScyanAnnotation]:
        """See :meth:`ScyanModule.read_cells`.

        Parameters
        ----------
        x
            Measured markers ``(cell, marker)``, sparse or dense.
        covariates
            Covariates ``(cell, covariate)``.
        """
        latent, annotations = zip(*(member.read_cells(x, covariates) for member in self), strict=True)
        return torch.stack(latent).mean(0), _mean_annotation(annotations)

    def change_covariates(self, x: Tensor, covariates: Tensor | None, others: Tensor | None) -> Tensor:
        """Cells as they would be measured with other covariates ``(cell, marker)``.

        Parameters
        ----------
        x
            Measured markers ``(cell, marker)``, sparse or dense.
        covariates, others
            Covariates that they have, and that they shall have, ``(cell, covariate)``.
        """
        return torch.stack([member.change_covariates(x, covariates, others) for member in self]).mean(0)

    def sample(
        self,
        n_samples: int,
        covariates: Tensor | None = None,
        populations: Tensor | None = None,
        generator: Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draw cells, each from a randomly chosen member; see :meth:`ScyanModule.sample`.

        Parameters
        ----------
        n_samples, covariates, populations, generator
            As there.
        """
        if populations is None:
            weights = self.population_weights.cpu()
            populations = torch.multinomial(weights, n_samples, replacement=True, generator=generator)
        member_of = torch.randint(len(self.members), (n_samples,), generator=generator)
        drawn = [member.sample(n_samples, covariates, populations, generator)[0] for member in self]
        return torch.stack(drawn)[member_of, torch.arange(n_samples)], populations

    # ---------------------------------------------------------------- scvi-tools protocol, a leading axis for the members

    def _get_inference_input(self, tensors: dict[str, Any], **_: Any) -> dict[str, Any]:
        return self.first._get_inference_input(tensors)

    @moves_data
    def inference(self, x: Tensor, covariates: Tensor | None = None) -> dict[str, Tensor]:
        """Outputs of every member: ``u`` ``(member, cell, marker)`` and ``log_det`` ``(member, cell)``."""
        return _stacked([member.inference(x, covariates) for member in self])

    def _get_generative_input(self, tensors: dict[str, Any], inference_outputs: dict[str, Tensor]) -> dict[str, Any]:
        return self.first._get_generative_input(tensors, inference_outputs)

    @moves_data
    def generative(self, u: Tensor, measured: Tensor | None = None) -> dict[str, Tensor]:
        """Outputs of every member, see :meth:`ScyanModule.generative`, with a leading axis."""
        there = [None] * len(u) if measured is None else measured
        return _stacked([member.generative(part, m) for member, part, m in zip(self, u, there, strict=True)])

    def loss(
        self,
        tensors: dict[str, Any],
        inference_outputs: dict[str, Tensor],
        generative_outputs: dict[str, Tensor],
    ) -> LossOutput:
        """Mean over the members of the loss and of every term."""
        outputs = [
            member.loss(tensors, _part(inference_outputs, i), _part(generative_outputs, i))
            for i, member in enumerate(self)
        ]
        terms = _stacked([dict(output.extra_metrics) for output in outputs])
        return LossOutput(
            loss=torch.stack([output.loss for output in outputs]).mean(),
            n_obs_minibatch=outputs[0].n_obs_minibatch,
            extra_metrics={name: value.mean() for name, value in terms.items()},
        )


def _mean_annotation(found: Sequence[ScyanAnnotation]) -> ScyanAnnotation:
    names = ("probs", "log_joint", "log_density")
    probs, joint, density = (torch.stack([getattr(a, name) for a in found]).mean(0) for name in names)
    return ScyanAnnotation(probs, probs.argmax(-1), joint, density)


def _stacked(outputs: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([output[name] for output in outputs]) for name in outputs[0]}


def _part(outputs: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    return {name: value[i] for name, value in outputs.items()}
