"""Times of training and noise of cells."""

from __future__ import annotations

import pytest
import torch

from cellweave.flow import CascadedTimes, cascade_grids, gaussian_noise, poisson_noise, poisson_rate


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("mode", ["uniform", "cascaded"])
@pytest.mark.parametrize("latent_noise", [0.0, 0.25])
def test_a_cell_teaches_one_stream(mode, latent_noise):
    """Protects the cascade: features beside expression at 0, expression beside features at, or close to, 1."""
    t = CascadedTimes(mode, 0.4, latent_noise).sample(20_000, _generator())
    chosen = t.w_latent == 1
    assert chosen.float().mean() == pytest.approx(0.4, abs=0.02)
    assert ((t.w_latent + t.w_expr) == 1).all()
    assert (t.t_expr[chosen] == 0).all()
    given = t.t_latent[~chosen]
    assert given.min() >= 1 - latent_noise
    assert given.mean() == pytest.approx(1 - latent_noise / 2, abs=0.01)


def test_uniform_times_are_uniform():
    """Protects the seed's times: mean and quartiles of both streams."""
    t = CascadedTimes("uniform").sample(40_000, _generator())
    quartiles = torch.tensor([0.25, 0.5, 0.75])
    for times, weight in ((t.t_expr, t.w_expr), (t.t_latent, t.w_latent)):
        torch.testing.assert_close(times[weight == 1].quantile(quartiles), quartiles, atol=0.015, rtol=0)


def test_logit_normal_times_have_the_published_centre():
    """Protects the published times: median of the features sigmoid(-1.2); a tenth of the expression's early."""
    t = CascadedTimes("cascaded").sample(40_000, _generator())
    assert t.t_latent[t.w_latent == 1].median() == pytest.approx(0.2315, abs=0.01)
    expression = t.t_expr[t.w_expr == 1]
    normal = torch.distributions.Normal(-0.4, 0.8)
    below = 0.9 * normal.cdf(torch.tensor(0.1).logit()) + 0.1 * 0.2
    assert (expression < 0.1).float().mean() == pytest.approx(below.item(), abs=0.005)


def test_shifted_modes():
    """Protects the other published modes: both streams at once, or features ahead of the expression."""
    both = CascadedTimes("shifted_independent").sample(1000, _generator())
    assert (both.w_expr == 1).all()
    assert (both.w_latent == 1).all()
    assert abs(torch.corrcoef(torch.stack([both.t_expr, both.t_latent]))[0, 1]) < 0.1
    aligned = CascadedTimes("shifted_aligned").sample(1000, _generator())
    assert (aligned.t_latent > aligned.t_expr).all()


def test_times_repeat_with_the_seed():
    """Protects repeatable training: the generator decides, the global one is not touched."""
    before = torch.get_rng_state()
    first, second = (CascadedTimes("cascaded").sample(5, _generator()) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "other"}, "`mode` must be one of uniform, .* got 'other'"),
        ({"choose_latent_p": 1.5}, r"`choose_latent_p` must be in \[0, 1\], got 1.5"),
        ({"latent_noise": -0.1}, r"`latent_noise` must be in \[0, 1\], got -0.1"),
        ({"shift": 0.0}, "`shift` must be positive, got 0.0"),
    ],
)
def test_bad_times_are_refused(arguments, message):
    """Protects from times outside 0 to 1."""
    with pytest.raises(ValueError, match=message):
        CascadedTimes(**arguments)


def test_joint_schedule_needs_even_steps():
    """Protects both stages from unequal shares."""
    assert [len(grid) for grid in cascade_grids(6)] == [7, 7]
    with pytest.raises(ValueError, match="`n_steps` must be even and at least 2, got 5"):
        cascade_grids(5)


def test_noise_belongs_to_the_cell():
    """Protects samples from batch size and order: the noise of a cell is the same alone, in any company and order."""
    cells = torch.tensor([4, 0, 7, 2])
    together = gaussian_noise((3, 2), cells, seed=5)
    alone = torch.cat([gaussian_noise((3, 2), cell[None], seed=5) for cell in cells])
    assert torch.equal(together, alone)
    assert torch.equal(gaussian_noise((3, 2), cells.flip(0), seed=5), together.flip(0))


def test_noise_differs_between_cells_seeds_and_streams():
    """Protects independence: neighbours in any of the three numbers have unrelated, standard normal noise."""
    keys = [(seed, cell, stream) for seed in range(3) for cell in range(3) for stream in range(2)]
    noise = torch.cat([gaussian_noise((4000,), torch.tensor([c]), s, t) for s, c, t in keys])
    correlation = torch.corrcoef(noise)
    correlation.fill_diagonal_(0)
    assert correlation.abs().max() < 0.08
    assert noise.mean() == pytest.approx(0, abs=0.02)
    assert noise.std() == pytest.approx(1, abs=0.02)


def test_noise_leaves_the_global_state_alone():
    """Protects the user's random numbers; a negative or large seed is a seed too."""
    before = torch.get_rng_state()
    assert not torch.equal(gaussian_noise((3,), torch.arange(2), -1), gaussian_noise((3,), torch.arange(2), 2**63))
    assert torch.equal(before, torch.get_rng_state())


def test_poisson_noise_looks_like_the_control_cell():
    """Protects the noise from the published default that makes it all zeros: sums and means are those of the rates."""
    control = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).repeat(3000, 1)
    rate = poisson_rate(control, target_sum=100.0)
    torch.testing.assert_close(rate.sum(1), torch.full((3000,), 100.0))
    counts = poisson_noise(rate, torch.arange(3000), seed=0).expm1()
    torch.testing.assert_close(counts.mean(0), rate[0], rtol=0.03, atol=1e-6)
    torch.testing.assert_close(counts.var(0), rate[0], rtol=0.1, atol=1e-6)
    alone = poisson_noise(rate[7:8], torch.tensor([7]), seed=0)
    assert torch.equal(alone.expm1(), counts[7:8])


def test_poisson_rates_without_a_sum():
    """Protects the alternative, and refuses the sum of -1."""
    control = torch.tensor([[0.0, 1.0]])
    torch.testing.assert_close(poisson_rate(control, None, 0.5), 0.5 * control.expm1(), atol=1e-7, rtol=0)
    with pytest.raises(ValueError, match="`target_sum` must be positive, got -1; use None for no fixed sum."):
        poisson_rate(control, -1)
    assert poisson_noise(control[:0], torch.arange(0), 0).shape == (0, 2)
