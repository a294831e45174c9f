"""The Scyan architecture: a coupling flow into a latent space in which every coordinate is a marker."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, NamedTuple, cast

import torch
from scvi.module.base import BaseModuleClass, LossOutput
from torch import Generator, Tensor, nn

from cellweave._keys import LOADER_KEYS, REGISTRY_KEYS, STEP_KEYS
from cellweave.nn import CouplingFlow, CouplingLayer, CovariateEncoder
from cellweave.objective import (
    LabelCrossEntropy,
    LogDeterminant,
    MarkerMonotonicity,
    MixtureLikelihood,
    Objective,
    PopulationLogProb,
    PopulationPrior,
    PopulationWeightPrior,
    population_posterior,
    step_outputs,
)

__all__ = ["ScyanAnnotation", "ScyanModule", "moves_data"]

# Factor on the logits of the population weights, which lets a small learning rate move them fast.
_PI_LOGIT_SCALE = 100.0


def moves_data(method: Callable[..., Any]) -> Callable[..., Any]:
    """Move tensors to the device of the module.

    As ``auto_move_data`` of scvi-tools, which asks every parameter for its device: half the time of annotating few cells.

    Parameters
    ----------
    method
        Method of a module with a ``device``.
    """

    @wraps(method)
    def moved(self: Any, *args: Any, **kwargs: Any) -> Any:
        here = [a.to(self.device) if isinstance(a, Tensor) else a for a in args]
        return method(self, *here, **{k: a.to(self.device) if isinstance(a, Tensor) else a for k, a in kwargs.items()})

    return moved


class ScyanAnnotation(NamedTuple):
    """What the model says about cells."""

    probs: Tensor  # (cell, population): posterior
    population: Tensor  # int64 (cell,): most probable population, the first of equals
    log_joint: Tensor  # (cell,): log p(u|z) + log pi of that population
    log_density: Tensor  # (cell,): log p(u|z) of that population, low where a cell is like none of the table


class ScyanModule(BaseModuleClass):
    r"""Scyan: a conditional normalizing flow whose prior is a table of populations and markers.

    A cell has a population :math:`z \sim \mathrm{Categorical}(\pi)`, latent markers :math:`u|z` as the table says
    (:class:`~cellweave.objective.PopulationPrior`), and the measured markers :math:`x = f^{-1}(u|c)` with covariates
    :math:`c`. The flow :math:`f` (:class:`~cellweave.nn.CouplingFlow`) keeps the markers: coordinate :math:`m` of the
    latent space is marker :math:`m`, -1 negative and 1 positive. Training minimises

    .. math::
        -\frac{1}{N}\sum_n \left[\log\sum_z \pi_z\,p(f(x_n|c_n)|z) + \log|\det J_f(x_n|c_n)|\right].

    Parameter names and shapes of the flow and of ``pi_logit`` are the published ones.

    Parameters
    ----------
    rho
        Table ``(population, marker)``: -1 negative, 1 positive, NaN for unknown.
    n_covariates
        Number of covariates, when tensors bring them as one matrix.
    covariates
        Makes that matrix from batch, categorical and continuous covariates; overrides ``n_covariates``.
    continuum
        True for markers without two separate modes, ``(marker,)``; their modes stand at a fifth of the table's values.
    n_hidden
        Width of the hidden layers of the scale and shift networks.
    n_hidden_layers
        Hidden layers of these networks between the first and the last linear layer.
    n_layers
        Number of coupling layers.
    prior_std
        Standard deviation of a latent marker around its mode.
    temperature
        :math:`T > 0` of the steps in which :attr:`tempered` is on: population weights :math:`\propto \pi^{-1/T}`, so that
        small populations are favoured.
    temperature_period
        Of this many epochs the first has no temperature and the others have; 1 never uses it. See :meth:`start_epoch`.
    covariate_scale
        Factor on all covariates; the published model has 100.
    identity_init
        Start with the identity as flow; the published model starts with torch's random weights.
    monotone_weight
        Weight of :class:`~cellweave.objective.MarkerMonotonicity`, which keeps latent markers rising with the measured
        ones; the published model has 0.
    weight_prior
        Weight of :class:`~cellweave.objective.PopulationWeightPrior`, which keeps small populations alive, in steps without
        temperature; the published model has 0.
    has_missing
        Whether markers may be NaN, which means that they were not measured; such markers are integrated out.

    Attributes
    ----------
    tempered
        While on, training steps use the temperature; evaluation never does. :meth:`start_epoch` switches it.

    References
    ----------
    Blampey et al., *A biology-driven deep generative model for cell-type annotation in cytometry*, Briefings in
    Bioinformatics, bbad260 (2023).
    """

    def __init__(
        self,
        rho: Tensor,
        n_covariates: int = 0,
        continuum: Tensor | None = None,
        n_hidden: int = 16,
        n_hidden_layers: int = 6,
        n_layers: int = 7,
        prior_std: float = 0.3,
        temperature: float = 0.5,
        temperature_period: int = 3,
        covariate_scale: float = 100.0,
        identity_init: bool = False,
        monotone_weight: float = 0.0,
        weight_prior: float = 0.0,
        has_missing: bool = False,
        covariates: CovariateEncoder | None = None,
    ) -> None:
        super().__init__()
        n_covariates = n_covariates if covariates is None else covariates.n_covariates
        sizes = {"n_covariates": (n_covariates, 0), "n_hidden": (n_hidden, 1), "n_layers": (n_layers, 1)}
        sizes |= {"n_hidden_layers": (n_hidden_layers, 0), "temperature_period": (temperature_period, 1)}
        for name, (size, least) in sizes.items():
            if size < least:
                raise ValueError(f"`{name}` must be at least {least}, got {size}.")
        for name, weight in {"monotone_weight": monotone_weight, "weight_prior": weight_prior}.items():
            if not weight >= 0:
                raise ValueError(f"`{name}` must not be negative, got {weight}.")
        if not temperature > 0:
            raise ValueError(f"`temperature` must be above 0, got {temperature}.")
        rho = torch.as_tensor(rho, dtype=torch.get_default_dtype())
        self.prior = PopulationPrior(rho, prior_std, None if continuum is None else torch.as_tensor(continuum))
        self.n_populations, self.n_markers = rho.shape
        self.n_covariates, self.covariates = n_covariates, covariates
        self.temperature, self.temperature_period, self.tempered = temperature, temperature_period, False
        self.pi_logit = nn.Parameter(torch.zeros(self.n_populations))
        self.real_nvp = CouplingFlow(
            self.n_markers, n_covariates, n_hidden, n_hidden_layers, n_layers, covariate_scale, identity_init
        )
        for layer in cast("Iterable[CouplingLayer]", self.real_nvp.module_list):
            layer.requires_grad_(len(layer.transformed) > 0)  # with fewer than three markers some transform none
        self.has_missing = has_missing
        self.objectives: list[Objective] = [MixtureLikelihood(), LogDeterminant()]
        if monotone_weight:
            self.objectives.append(MarkerMonotonicity(monotone_weight))
        if weight_prior:
            self.objectives.append(PopulationWeightPrior(weight_prior))
        self.register_buffer("label_sets", None)

    def use_labels(self, label_sets: Tensor, weight: float, share: float) -> None:
        """Train on labelled cells too, see :class:`~cellweave.objective.LabelCrossEntropy`.

        Parameters
        ----------
        label_sets
            Populations that each label allows, bool ``(label, population)``.
        weight
            Weight of the term.
        share
            Share of labelled cells among the training cells.
        """
        self.label_sets = label_sets.clone()
        self.objectives.append(LabelCrossEntropy(weight, share))

    @property
    def uses_labels(self) -> bool:
        """Whether labels take part in training."""
        return self.label_sets is not None

    def set_label_share(self, share: float) -> None:
        """Change the share of labelled cells, for training on other cells.

        Parameters
        ----------
        share
            Share of labelled cells among the training cells.
        """
        for objective in self.objectives:
            if isinstance(objective, LabelCrossEntropy):
                objective.share = share

    # ---------------------------------------------------------------- the flow and the population weights

    def to_latent(self, x: Tensor, covariates: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r"""Latent markers :math:`u = f(x|c)` ``(cell, marker)`` and :math:`\log|\det J|` ``(cell,)``.

        Parameters
        ----------
        x
            Measured markers ``(cell, marker)``.
        covariates
            Covariates ``(cell, covariate)``; may be left out if the module has none.
        """
        return self.real_nvp(x, covariates)

    def to_expression(self, u: Tensor, covariates: Tensor | None = None) -> Tensor:
        r"""Measured markers :math:`x = f^{-1}(u|c)` ``(cell, marker)``.

        The latent markers of a cell and the covariates of another batch give the cell as that batch would show it.

        Parameters
        ----------
        u
            Latent markers ``(cell, marker)``.
        covariates
            Covariates ``(cell, covariate)``; may be left out if the module has none.
        """
        return self.real_nvp.inverse(u, covariates)

    def log_pi(self, tempered: bool = False) -> Tensor:
        r"""Logarithm of the population weights ``(population,)``.

        Parameters
        ----------
        tempered
            Weights :math:`\propto \pi^{-1/T}` instead. They are constants: no gradient reaches :math:`\pi`.
        """
        logits = _PI_LOGIT_SCALE * self.pi_logit
        if tempered:
            logits = logits.detach() / -self.temperature
        return logits.log_softmax(-1)

    @property
    def device(self) -> torch.device:
        """Device of the parameters; the inherited one asks each of them."""
        return self.pi_logit.device

    @property
    def population_weights(self) -> Tensor:
        r"""Population weights :math:`\pi` ``(population,)``, without gradient."""
        return self.log_pi().detach().exp()

    def latent(self, x: Tensor, covariates: Tensor | None = None) -> Tensor:
        """Latent markers ``(cell, marker)``; what was not measured is expected from the populations that a cell may have.

        Parameters
        ----------
        x
            Measured markers ``(cell, marker)``, sparse or dense.
        covariates
            Covariates ``(cell, covariate)``.
        """
        return self.read_cells(x, covariates)[0] if self.has_missing else self.inference(x, covariates)["u"]

    def read_cells(self, x: Tensor, covariates: Tensor | None = None) -> tuple[Tensor, ScyanAnnotation]:
        """What :meth:`latent` and :meth:`annotate_cells` say, from one pass through the flow.

        Parameters
        ----------
        x
            Measured markers ``(cell, marker)``, sparse or dense.
        covariates
            Covariates ``(cell, covariate)``.
        """
        outputs = self.inference(x, covariates)
        annotation = self.annotate(**self._get_generative_input({}, outputs))
        if not self.has_missing:
            return outputs["u"], annotation
        return torch.where(outputs["measured"], outputs["u"], annotation.probs @ self.prior.modes), annotation

    def annotate_cells(self, x: Tensor, covariates: Tensor | None = None) -> ScyanAnnotation:
        """Posterior over populations and log density of measured cells.

        Parameters
        ----------
        x
            Measured markers ``(cell, marker)``, sparse or dense.
        covariates
            Covariates ``(cell, covariate)``.
        """
        return self.annotate(**self._get_generative_input({}, self.inference(x, covariates)))

    def change_covariates(self, x: Tensor, covariates: Tensor | None, others: Tensor | None) -> Tensor:
        """Cells as they would be measured with other covariates ``(cell, marker)``: their latent markers, mapped back.

        Parameters
        ----------
        x
            Measured markers ``(cell, marker)``, sparse or dense.
        covariates, others
            Covariates that they have, and that they shall have, ``(cell, covariate)``.
        """
        outputs = self.inference(x, covariates)
        return self.real_nvp.inverse(outputs["u"], others, outputs.get("measured"))

    @torch.no_grad()
    @moves_data
    def annotate(self, u: Tensor, measured: Tensor | None = None) -> ScyanAnnotation:
        """Posterior over populations and log density of latent cells; the temperature plays no part.

        Parameters
        ----------
        u
            Latent markers ``(cell, marker)``, 0 where not measured.
        measured
            False where a marker was not measured, bool ``(cell, marker)``; all were by default.
        """
        log_prob, log_pi = self.prior.log_prob(u, measured), self.log_pi()
        joint = log_prob.contrast + log_pi
        best = joint.argmax(-1)
        log_joint = log_prob.common + joint.gather(-1, best[:, None])[:, 0]
        return ScyanAnnotation(population_posterior(log_prob, log_pi), best, log_joint, log_joint - log_pi[best])

    @torch.no_grad()
    def sample(
        self,
        n_samples: int,
        covariates: Tensor | None = None,
        populations: Tensor | None = None,
        generator: Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        r"""Draw cells: measured markers ``(cell, marker)`` and the population of each cell ``(cell,)``.

        Parameters
        ----------
        n_samples
            Number of cells.
        covariates
            Covariates ``(cell, covariate)`` of the cells; needed if the module has covariates.
        populations
            Population of each cell, ``(cell,)``; drawn from :math:`\pi` by default.
        generator
            Source of all draws, on the CPU; the global one by default.

        Raises
        ------
        ValueError
            If ``populations`` or ``covariates`` do not fit.
        """
        if populations is None:
            weights = self.population_weights.cpu()
            populations = torch.multinomial(weights, n_samples, replacement=True, generator=generator)
        self._check_populations(populations, n_samples)
        u = self.prior.latent_cells(populations, *self.prior.draw_noise(n_samples, generator))
        return self.to_expression(u, None if covariates is None else covariates.to(u)), populations

    def _check_populations(self, populations: Tensor, n_samples: int) -> None:
        if populations.shape != (n_samples,):
            raise ValueError(
                f"`populations` must name one population for each of the {n_samples} samples, got shape "
                f"{tuple(populations.shape)}."
            )
        wrong = (populations < 0) | (populations >= self.n_populations)
        if bool(wrong.any()):
            first = int(wrong.nonzero()[0])
            raise ValueError(
                f"`populations` holds {int(wrong.sum())} numbers outside 0 to {self.n_populations - 1}, the first is "
                f"{int(populations[first])} at position {first}."
            )

    # ---------------------------------------------------------------- scvi-tools protocol

    def start_epoch(self, epoch: int) -> None:
        """Switch :attr:`tempered` for an epoch, counted from 0."""
        self.tempered = epoch % self.temperature_period > 0

    def select_gradients(self) -> None:
        """Leave the population weights alone in tempered steps, where processes had to give them a gradient of zero."""
        if self.tempered:
            self.pi_logit.grad = None

    def read_covariates(self, tensors: dict[str, Any]) -> Tensor | None:
        """Covariates of a batch of data ``(cell, covariate)``; None where there are none.

        Parameters
        ----------
        tensors
            The batch.
        """
        if self.covariates is None or REGISTRY_KEYS.COVARIATES in tensors:
            return tensors.get(REGISTRY_KEYS.COVARIATES)
        columns = (REGISTRY_KEYS.BATCH, REGISTRY_KEYS.CATEGORIES)
        codes = [tensors[key] for key in columns if key in tensors]
        return self.covariates(torch.cat(codes, 1) if codes else None, tensors.get(REGISTRY_KEYS.CONTINUOUS))

    def _get_inference_input(self, tensors: dict[str, Any], **_: Any) -> dict[str, Any]:
        return {"x": tensors[REGISTRY_KEYS.X], "covariates": self.read_covariates(tensors)}

    @moves_data
    def inference(self, x: Tensor, covariates: Tensor | None = None) -> dict[str, Tensor]:
        """Latent markers ``u`` ``(cell, marker)`` and ``log_det`` ``(cell,)``; ``x`` may be sparse.

        Where markers may be missing, also ``measured`` ``(cell, marker)``; ``u`` is 0 elsewhere.
        """
        x = _dense(x)
        if not self.has_missing:
            u, log_det = self.to_latent(x, covariates)
            return {"u": u, "log_det": log_det}
        measured = ~x.isnan()
        u, log_det = self.real_nvp(x.nan_to_num(0.0), covariates, measured)
        return {"u": u, "log_det": log_det, "measured": measured}

    def _get_generative_input(self, tensors: dict[str, Any], inference_outputs: dict[str, Tensor]) -> dict[str, Any]:
        return {name: inference_outputs[name] for name in ("u", "measured") if name in inference_outputs}

    @moves_data
    def generative(self, u: Tensor, measured: Tensor | None = None) -> dict[str, Tensor]:
        """The two parts of the log density under each population, see :class:`PopulationLogProb`."""
        log_prob: PopulationLogProb = self.prior.log_prob(u, measured)
        return {"log_prob_common": log_prob.common, "log_prob_contrast": log_prob.contrast}

    def loss(
        self,
        tensors: dict[str, Any],
        inference_outputs: dict[str, Tensor],
        generative_outputs: dict[str, Tensor],
    ) -> LossOutput:
        """Weighted sum of the objectives; every raw term is reported, and the entropy of the population weights."""
        log_det = inference_outputs["log_det"]
        valid = tensors.get(LOADER_KEYS.VALID)
        valid = torch.ones_like(log_det) if valid is None else valid.to(log_det)
        outputs = {**inference_outputs, **generative_outputs, "valid": valid, "x": _dense(tensors[REGISTRY_KEYS.X])}
        if REGISTRY_KEYS.BATCH in tensors:
            outputs["batch"] = tensors[REGISTRY_KEYS.BATCH][:, 0]
        tempered = self.training and self.tempered
        outputs["log_pi"] = self.log_pi(tempered)
        outputs.update(step_outputs(tensors))
        if self.label_sets is not None:
            outputs["allowed"] = self.label_sets[tensors[REGISTRY_KEYS.LABELS][:, 0]]
        terms = {objective.name: objective(outputs) for objective in self.objectives}
        weights = {o.name: o.weight for o in self.objectives}
        if tempered:  # population weights are constants there
            weights.pop(PopulationWeightPrior.name, None)
        loss = torch.stack([weight * terms[name] for name, weight in weights.items()]).sum()
        if tempered and STEP_KEYS.POSITION in tensors:
            loss = loss + 0 * self.pi_logit.sum()  # processes wait for a gradient of every parameter
        terms["pi_entropy"] = torch.special.entr(self.population_weights).sum()
        return LossOutput(
            loss=loss,
            n_obs_minibatch=tensors.get(LOADER_KEYS.N_VALID, len(log_det)),
            extra_metrics={name: value.detach() for name, value in terms.items()},
        )


def _dense(x: Tensor) -> Tensor:
    return x.to_dense() if x.layout != torch.strided else x
