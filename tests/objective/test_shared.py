"""Draws and means that do not depend on how many processes share a step."""

from __future__ import annotations

import pytest
import torch

from cellweave._keys import STEP_KEYS
from cellweave.objective import (
    MaskedNegativeBinomial,
    SlicedWasserstein,
    derive_seed,
    normal_per_context,
    shared_mean,
    step_generator,
    step_outputs,
)


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_seeds_differ_with_every_number_and_fit_a_generator():
    """Protects independence of draws: neighbouring epochs, batches and processes share no seed; no overflow."""
    seeds = {
        derive_seed(seed, epoch, batch) for seed in (0, 1, -1, 2**64 - 2) for epoch in range(9) for batch in range(9)
    }
    assert len(seeds) == 4 * 81
    assert min(seeds) >= 0
    assert max(seeds) < 2**63
    assert derive_seed(0, 1) != derive_seed(1, 0)


@pytest.mark.parametrize("world", [2, 3])
def test_draws_of_the_processes_together_are_those_of_one(world):
    """Protects DDP equality: a context draws the same wherever it is; other contexts, epochs and seeds differ."""
    whole = normal_per_context(7, (5, 2), generator=_generator())
    for rank in range(world):
        position = torch.arange(rank, 7, world)
        assert torch.equal(normal_per_context(len(position), (5, 2), position, _generator()), whole[rank::world])
    assert not torch.equal(whole[0], whole[1])
    assert not torch.equal(whole, normal_per_context(7, (5, 2), generator=_generator(1)))


def test_draws_are_standard_normal():
    """Protects the distribution across contexts, which all have generators of their own."""
    draws = normal_per_context(4000, (3,), generator=_generator()).double()
    assert draws.mean().abs() < 0.03
    assert draws.std() == pytest.approx(1, abs=0.03)
    assert torch.corrcoef(draws.T).fill_diagonal_(0).abs().max() < 0.06


def test_streams_of_a_step():
    """Protects the purposes of draws from each other: equal seeds, another stream, other numbers; no seed, no generator."""
    batch = {STEP_KEYS.SEED: torch.tensor(2**62)}
    first, again, other = (torch.rand(4, generator=step_generator(batch, stream)) for stream in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert step_generator({}, 0) is None


def test_mean_over_processes_is_the_mean_over_units():
    """Protects weighted means: processes with 1 and 3 valid cells average to the mean over 4 cells, none is nan."""
    values, weight = torch.tensor([1.0, 9.0, 2.0, 3.0, 6.0]), torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0])
    assert shared_mean(values, weight) == 3
    parts = [shared_mean(values[part], weight[part], torch.tensor(2.0)) for part in (slice(0, 2), slice(2, 5))]
    assert torch.stack(parts).mean() == 3
    assert shared_mean(values, torch.zeros(5)) == 0


def _outputs(contexts: list[int], n_cells: int = 6) -> dict[str, torch.Tensor]:
    """Outputs of seven contexts, some cells invalid, restricted to some of them; context 6 has no valid cell."""
    generator = _generator(4)
    valid = torch.rand(7, n_cells, generator=generator) > 0.4
    valid[:6, 0], valid[6] = True, False
    everything = {
        "z": torch.randn(7, n_cells, 3, generator=generator),
        "target": torch.randint(0, 5, (7, n_cells, 4), generator=generator).float(),
        "px_rate": torch.rand(7, n_cells, 4, generator=generator) + 0.5,
        "px_r": torch.rand(7, n_cells, 4, generator=generator) + 0.5,
        "valid": valid.float(),
    }
    return {
        name: value[contexts] if name == "z" else value[contexts].flatten(0, 1) for name, value in everything.items()
    }


@pytest.mark.parametrize("objective", [MaskedNegativeBinomial(), SlicedWasserstein(n_proj=8)], ids=lambda o: o.name)
def test_objectives_of_two_processes_average_to_that_of_one(objective):
    """Protects every objective under DDP: unequal numbers of valid cells, and a context that only evens the ranks."""
    whole = objective(_outputs([0, 1, 2, 3, 4, 5]), _generator())
    outputs = [_outputs(contexts) for contexts in ([0, 2, 4], [1, 3, 5])] + [_outputs([6, 6, 6])]
    n_valid = sum(part["valid"].sum() for part in outputs)
    parts = []
    for rank, part in enumerate(outputs):
        part[STEP_KEYS.POSITION] = torch.arange(3) * 2 + rank
        part[STEP_KEYS.CELLS_PER_PROCESS], part[STEP_KEYS.CONTEXTS_PER_PROCESS] = n_valid / 3, torch.tensor(6 / 3)
        parts.append(objective(part, _generator()))
    assert parts[2] == 0
    torch.testing.assert_close(torch.stack(parts).mean(), whole)


def test_step_outputs_takes_what_is_there():
    """Protects single processes: nothing is passed on unless processes share the step."""
    assert step_outputs({"X": 1, STEP_KEYS.SEED: 2}) == {}
    assert step_outputs({STEP_KEYS.POSITION: 1, "X": 2}) == {STEP_KEYS.POSITION: 1}
