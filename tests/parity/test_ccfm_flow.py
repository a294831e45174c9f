"""Numerical parity of times, noise and the maximum mean discrepancy with the published originals."""

from __future__ import annotations

import pytest
import torch
from ccfm_numbers import assert_close, numbers, tensors

from cellweave.flow import CascadedTimes, cascade_grids, poisson_rate
from cellweave.objective import median_bandwidths, squared_mmd

pytestmark = pytest.mark.parity

TIMES = {
    "dino_first_cascaded": CascadedTimes("cascaded"),
    "dino_first_cascaded_noised": CascadedTimes("cascaded", latent_noise=0.25),
    "shifted_independent_uniform": CascadedTimes("shifted_independent"),
    "dino_first_shifted_aligned": CascadedTimes("shifted_aligned"),
}


@pytest.mark.parametrize("mode", TIMES)
def test_times(mode):
    """Protects the four published ways to draw times and weights, from the recorded draws."""
    a = numbers("ccfm_times", f"{mode}/")
    draws = torch.tensor(a["draw_0"])
    if draws.ndim == 1:
        draws = torch.stack(tensors(a, *sorted(name for name in a if name.startswith("draw"))))
    assert len(draws) == TIMES[mode].n_draws
    times = TIMES[mode].from_draws(draws)
    for name, field in (("t_data", "t_expr"), ("t_latent", "t_latent"), ("w_data", "w_expr"), ("w_latent", "w_latent")):
        assert_close(getattr(times, field), a[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shift", [1.0, 0.575])
def test_sampling_grids(shift):
    """Protects the joint schedule: half of the steps per stage, the shift on the latent's times."""
    a = numbers("ccfm_times", f"grid_shift{shift}/")
    t_expr, t_latent = cascade_grids(50, shift)
    assert_close(t_expr, a["t_data"], atol=1e-6)
    assert_close(t_latent, a["t_latent"], atol=1e-6)


def test_poisson_rates():
    """Protects the rates of Poisson noise; the published default of -1, which makes them all zero, is refused."""
    a = numbers("ccfm_scdfm")
    [source] = tensors(a, "source")
    assert_close(poisson_rate(source, None).log1p(), a["poisson/log1p_rate_none"])
    assert_close(poisson_rate(source, 1e4).log1p(), a["poisson/log1p_rate_1e4"])
    assert a["poisson/log1p_rate_minus1"].max() < 1e-7
    with pytest.raises(ValueError, match="`target_sum` must be positive, got -1"):
        poisson_rate(source, -1)


@pytest.mark.parametrize("case", ["0", "1", "2"])
def test_mmd(case):
    """Protects kernel widths, value and gradient of the unbiased estimate, also for samples of unequal size."""
    a = numbers("ccfm_mmd", f"{case}/")
    x, y, sigmas = tensors(a, "x", "y", "sigmas")
    assert_close(median_bandwidths(y), a["sigmas"], rtol=1e-6)
    mmd = squared_mmd(x.requires_grad_(), y, sigmas)
    assert_close(mmd, a["mmd2"], atol=1e-6)
    mmd.backward()
    assert_close(x.grad, a["grad_x"], atol=1e-6)
    assert_close(squared_mmd(x, y, torch.ones(1)), a["mmd2_sigma1"], atol=1e-6)
