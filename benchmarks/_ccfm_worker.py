"""Measure the cascaded flow in a process of its own; prints one JSON line. Started by ``benchmarks/ccfm.py``.

Ours and the reference share weights, data and random draws. Times are CPU seconds of interleaved calls in this process.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from _ccfm_reference import NaiveFlow
from torch import Tensor

from cellweave._keys import FLOW_KEYS, REGISTRY_KEYS
from cellweave.flow import Guidance, time_grid
from cellweave.module import CascadedFlowModule, CascadeSampler, FlowSolver, FlowStart

N_GENES, N_TOKENS, N_NEIGHBOURS, N_SPECIAL = 1000, 5004, 40, 4
# Steps of each stage when a whole sample is measured: both solve it by the midpoint rule, two evaluations per step.
N_STEPS = 2


Pair = tuple[Callable[[], Any], Callable[[], Any]]  # ours, the reference


class Setup:
    """A module with reproducible weights that are nowhere zero, its reference, a batch, and the draws of a step."""

    def __init__(self, n_cells: int, n_latent: int) -> None:
        torch.manual_seed(0)
        self.module = CascadedFlowModule(N_TOKENS, n_latent, forbidden=_graph(), zero_init=False)
        for parameter in self.module.parameters():
            if not parameter.any():  # layers that start at zero would hide differences
                torch.nn.init.normal_(parameter, 0, 0.05)
        self.naive, self.n_cells = NaiveFlow(self.module), n_cells
        self.genes, self.perturbation = torch.arange(N_SPECIAL, N_SPECIAL + N_GENES), torch.tensor([[5, 9]])
        self.control = torch.rand(n_cells, N_GENES) * 3
        shape = (n_cells, N_GENES, n_latent)
        self.start = FlowStart(torch.randn(n_cells, N_GENES), torch.randn(shape) if n_latent else None)
        self.batch: dict[str, Tensor] = {
            REGISTRY_KEYS.X: torch.rand(n_cells, N_GENES) * 3,
            FLOW_KEYS.CONTROL: self.control,
            FLOW_KEYS.GENES: self.genes,
            FLOW_KEYS.PERTURBATION: self.perturbation.expand(n_cells, -1),
        }
        if n_latent:
            self.batch[FLOW_KEYS.LATENT] = torch.randn(shape)
        self.draws = self.module.draw(self.batch)._replace(times=self._times())

    def to_double(self) -> None:
        """Weights, batch and draws in double precision."""
        self.module.double()
        self.batch = {k: v.double() if v.is_floating_point() else v for k, v in self.batch.items()}
        times = type(self.draws.times)(*(t.double() for t in self.draws.times))
        self.draws = self.draws._replace(expression=self.draws.expression.double(), times=times)

    def _times(self) -> Any:
        """Times of a step in which the share of cells that teaches the features is the expected one."""
        choice = torch.linspace(0, 1, self.n_cells + 2)[1:-1]
        return self.module.times.from_draws(
            torch.stack([torch.full_like(choice, t) for t in (0.3, 0.6)] + [choice] * 2)
        )

    # ---------------------------------------------------------------- what is measured

    def loss(self, velocities: Callable[..., dict[str, Tensor]]) -> Tensor:
        """Loss of the batch under the draws."""
        inputs = self.module._get_inference_input(self.batch) | {"draws": self.draws}
        points = self.module.inference(**inputs)
        out = velocities(**self.module._get_generative_input(self.batch, points))
        return self.module.loss(self.batch, points, out).loss

    def step(self, velocities: Callable[..., dict[str, Tensor]], option: str = "float32") -> Callable[[], None]:
        """A training step with dropout."""
        optimizer = torch.optim.Adam(self.module.parameters(), 5e-5)

        def run() -> None:
            self.module.train()
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=option == "bfloat16"):
                loss = self.loss(velocities)
            loss.backward()
            optimizer.step()
            self.module.eval()

        return run

    def sample(self) -> tuple[Tensor, Tensor | None]:
        """Cells, and features, as users sample them."""
        grid = time_grid(N_STEPS + 1)
        how = FlowSolver("midpoint", grid, grid)
        return self.module.sample(self.genes, self.control, self.perturbation, self.start, how)

    def naive_sample(self) -> tuple[Tensor, Tensor | None]:
        """The same from the reference."""
        perturbation = self.perturbation.expand(self.n_cells, -1)
        grid = time_grid(N_STEPS + 1)
        return self.naive.sample(self.genes, self.control, perturbation, *self.start, grid)

    @torch.no_grad()
    def stages(self) -> dict[str, Pair]:
        """One evaluation of the velocity of every stage, by us (constants are ready) and by the reference."""
        self.module.eval()
        sampler = CascadeSampler(self.module, self.genes, self.control)
        vector = self.module.read_tokens(self.genes, self.perturbation)[1]
        constants, (x, z) = self.module.read_perturbation(vector), self.start
        zero, one = torch.zeros(self.n_cells), torch.ones(self.n_cells)
        last = sampler.expression_velocity(z, constants, Guidance())
        found: dict[str, Pair] = {
            "evaluation, expression": (lambda: last(0.3, x), lambda: self._naive(x, zero + 0.3, z, one)["v_expr"]),
        }
        if z is not None:
            first = sampler.latent_velocity(x, constants, Guidance())
            found["evaluation, features"] = (
                lambda: first(0.3, z),
                lambda: self._naive(x, zero, z, zero + 0.3)["v_latent"],
            )
        return found

    def _naive(self, x: Tensor, t_expr: Tensor, z: Tensor | None, t_latent: Tensor) -> dict[str, Tensor]:
        perturbation = self.perturbation.expand(self.n_cells, -1)
        return self.naive.generative(self.control, self.genes, perturbation, x, t_expr, z, t_latent)


def _graph() -> Tensor:
    forbidden = torch.ones(N_TOKENS, N_TOKENS, dtype=torch.bool)
    linked = torch.randint(N_SPECIAL, N_TOKENS, (N_TOKENS, N_NEIGHBOURS))
    return forbidden.scatter_(1, linked, False).fill_diagonal_(False)


# ---------------------------------------------------------------- tasks


def seconds(n_cells: int, n_latent: int, what: str, rounds: int) -> dict[str, Any]:
    """CPU seconds of one task by us and by the reference, in turns."""
    setup = Setup(n_cells, n_latent)
    setup.module.eval()
    if what == "training step":
        pair: Pair = setup.step(setup.module.generative), setup.step(setup.naive.generative)
    else:
        pair = (setup.sample, setup.naive_sample) if what == "sampling" else setup.stages()[what]
    with torch.set_grad_enabled(what == "training step"):
        return {"seconds": [[_cpu(function) for function in pair] for _ in range(rounds)]}


@torch.no_grad()
def _largest(ours: Tensor, naive: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return ((ours - naive).abs().max() / naive.abs().max()).item()


def differences(n_cells: int, n_latent: int) -> dict[str, Any]:
    """Largest relative differences of velocities, samples, loss and gradients, without dropout."""
    setup = Setup(n_cells, n_latent)
    setup.module.eval()
    with torch.no_grad():
        found = {
            name.replace("evaluation, ", "velocity of "): _largest(*(f() for f in pair))
            for name, pair in setup.stages().items()
        }
    names = ("sampled expression", "sampled features")
    for name, ours, naive in zip(names, setup.sample(), setup.naive_sample(), strict=True):
        if ours is not None and naive is not None:
            found[name] = _largest(ours, naive)
    (loss, ours), (naive_loss, naive) = _both_gradients(setup)
    found["loss"] = _largest(loss, naive_loss)
    found["gradients"] = _largest(*(torch.cat([g.flatten() for g in grads.values()]) for grads in (ours, naive)))
    # some gradients are small sums of large terms of both signs, of which single precision keeps few digits
    setup.to_double()
    (_, ours), (_, naive) = _both_gradients(setup)
    found["gradients, worst parameter, float64"] = max(_largest(ours[name], naive[name]) for name in naive)
    return {"differences": found}


def _both_gradients(setup: Setup) -> list[tuple[Tensor, dict[str, Tensor]]]:
    results = [_gradients(setup, velocities) for velocities in (setup.module.generative, setup.naive.generative)]
    (_, ours), (_, naive) = results
    if list(ours) != list(naive):
        raise AssertionError(f"gradients of other parameters: {sorted(set(ours) ^ set(naive))}")
    return results


def _gradients(setup: Setup, velocities: Callable[..., dict[str, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss, and the gradients that are not zero."""
    setup.module.zero_grad()
    loss = setup.loss(velocities)
    loss.backward()
    grads = {name: p.grad.clone() for name, p in setup.module.named_parameters() if p.grad is not None}
    return loss.detach(), {name: g for name, g in grads.items() if g.any()}


def ours(n_cells: int, n_latent: int, rounds: int, option: str) -> dict[str, Any]:
    """CPU seconds of ours alone: in ``"float32"``, or under ``"bfloat16"`` autocast."""
    setup = Setup(n_cells, n_latent)
    tasks: dict[str, Callable[[], Any]] = {"training step": setup.step(setup.module.generative, option)}
    tasks |= {name: pair[0] for name, pair in setup.stages().items()}
    found = {}
    for name, task in tasks.items():
        half = torch.autocast("cpu", torch.bfloat16, enabled=option == "bfloat16")
        with torch.set_grad_enabled(name == "training step"), half:
            task()
            found[name] = [_cpu(task) for _ in range(rounds)]
    return {"seconds": found}


def memory(n_cells: int, n_latent: int, who: str, what: str) -> dict[str, float]:
    """Peak resident memory of one task beyond what the process held before, in MB."""
    setup = Setup(n_cells, n_latent)
    if what == "training step":
        run: Callable[[], Any] = setup.step(setup.module.generative if who == "cellweave" else setup.naive.generative)
    else:
        run = setup.sample if who == "cellweave" else setup.naive_sample
    setup.module.eval()
    setup.naive._forbidden  # noqa: B018 - a table of the reference, like the packed graph of ours
    Path("/proc/self/clear_refs").write_text("5")  # what building took is not asked for: peaks count from here
    before = psutil.Process().memory_info().rss
    run()
    return {"memory_mb": (_peak() - before) / 2**20}


def _peak() -> int:
    """Largest resident memory since peaks were reset, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _cpu(function: Callable[[], Any]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


TASKS: dict[str, Callable[..., dict[str, Any]]] = {
    "seconds": seconds,
    "differences": differences,
    "ours": ours,
    "memory": memory,
}


def main() -> None:
    """Run one task."""
    parser = argparse.ArgumentParser()
    parser.add_argument("task", choices=list(TASKS))
    parser.add_argument("arguments", type=json.loads)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(TASKS[args.task](**args.arguments)))


if __name__ == "__main__":
    main()
