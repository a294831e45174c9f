"""Weights averaged over the steps of training, which sample better than those of the last step."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

__all__ = ["ExponentialMovingAverage"]


class ExponentialMovingAverage(Callback):
    r"""Average the weights over the steps of training; validate with the average, and end with it.

    After step :math:`n` (from 0) the average becomes :math:`d_n\bar w+(1-d_n)w` with
    :math:`d_n=\min(d,\frac{1+n}{10+n})`, so that the random first weights are soon forgotten. However training ends, by
    itself, by Ctrl-C or with an error, the module holds the average. Checkpoints hold the average as the weights and
    those of the last step beside it, so that a resumed run ends bit-equal to one that was never stopped. Buffers, such as
    running statistics, are not averaged.

    Parameters
    ----------
    decay
        Share :math:`d` of the old average in the new one, in [0, 1); 0 keeps the weights of the last step.

    Raises
    ------
    ValueError
        If the decay is out of range; in training, if weights are sharded or in half precision, or a checkpoint that is
        continued was written without the average or with another decay.

    References
    ----------
    Polyak and Juditsky, *Acceleration of stochastic approximation by averaging* (1992).

    Notes
    -----
    ``EMAWeightAveraging`` of Lightning is not used: it came with Lightning 2.6, has no warm-up, copies the whole training
    plan, updates tensor by tensor, and leaves the weights of the last step after Ctrl-C.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"`decay` must be in [0, 1), got {decay}; 0.999 averages over about a thousand steps.")
        self.decay = decay
        self._forget()

    def _forget(self) -> None:
        self._weights: dict[str, Tensor] = {}  # parameters of the plan
        self._others: list[Tensor] = []  # the average; the weights of the last step while the two are swapped
        self._swapped = False
        self._n_updates, self._step = 0, 0
        self._current: dict[str, Tensor] | None = None  # weights of the last step, from a checkpoint

    # ---------------------------------------------------------------- the run

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start anew; a checkpoint is read after this."""
        if isinstance(trainer.strategy, FSDPStrategy):
            raise ValueError(
                "`ExponentialMovingAverage` cannot average weights that FSDP shards; train without one of them."
            )
        self._forget()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with the first weights, or where a checkpoint left off; the weights are on their device now."""
        weights: dict[str, Tensor] = {n: p for n, p in pl_module.named_parameters() if p.is_floating_point()}
        if half := [name for name, p in weights.items() if p.element_size() < 4]:
            raise ValueError(
                f"`ExponentialMovingAverage` cannot average {len(half)} weights in half precision (first: {half[0]!r}), "
                "which would not move; train with `precision='bf16-mixed'`."
            )
        self._weights, self._others = weights, [p.detach().clone() for p in weights.values()]
        if self._current is not None:  # the checkpoint brought the average as the weights
            self._copy(list(weights.values()), [self._current[name].to(p.device) for name, p in weights.items()])
            self._current = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the average after an optimiser step."""
        if trainer.global_step == self._step:  # gradients are still being accumulated
            return
        decay = min(self.decay, (1 + self._n_updates) / (10 + self._n_updates))
        get_ema_multi_avg_fn(decay)(self._others, list(self._weights.values()), 0)
        self._n_updates, self._step = self._n_updates + 1, trainer.global_step

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate the average."""
        self._put(average=True)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on with the weights of the last step."""
        self._put(average=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the average in the module."""
        self._put(average=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the average in the module after Ctrl-C and errors too."""
        self._put(average=True)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Free the second set of weights: a trained model keeps its trainer, and that its callbacks."""
        self._forget()

    def _put(self, average: bool) -> None:
        """Swap the two sets of weights, unless the wanted one is in the module already."""
        if average == self._swapped:
            return
        weights = list(self._weights.values())
        held = [p.detach().clone() for p in weights]
        self._copy(weights, self._others)
        self._copy(self._others, held)
        self._swapped = average

    @staticmethod
    @torch.no_grad()
    def _copy(to: list[Tensor], values: list[Tensor]) -> None:
        if to:  # nothing is kept before training starts
            torch._foreach_copy_(to, values)

    # ---------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the average as the weights, also of a run whose last step is done but whose end has not come."""
        if self._swapped:
            return
        average = {id(p): value for p, value in zip(self._weights.values(), self._others, strict=True)}
        names = pl_module.named_parameters(
            remove_duplicate=False
        )  # weights in two places have two names in a checkpoint
        checkpoint["state_dict"].update({name: average[id(p)] for name, p in names if id(p) in average})

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs beside the average; empty outside of training."""
        if not self._weights:
            return {}
        values = self._others if self._swapped else [p.detach() for p in self._weights.values()]
        current = dict(zip(self._weights, values, strict=True))
        return {"decay": self.decay, "n_updates": self._n_updates, "step": self._step, "current": current}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of a run with other weights."""
        state = checkpoint["callbacks"].get(self.state_key)
        if not state:
            raise ValueError(
                f"The checkpoint has no averaged weights, which `decay`={self.decay} asks for; continue it without the average."
            )
        if state["decay"] != self.decay:
            raise ValueError(
                f"The checkpoint was written with `decay`={state['decay']}, got {self.decay}; continue it with the same."
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue an average; the weights take their places when training starts.

        Parameters
        ----------
        state_dict
            What :meth:`state_dict` gave.
        """
        if state_dict:
            self._n_updates, self._step = state_dict["n_updates"], state_dict["step"]
            self._current = state_dict["current"]
