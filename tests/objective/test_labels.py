"""Cross-entropy of labelled cells, whose labels may be groups."""

from __future__ import annotations

import pytest
import torch

from cellweave.objective import LabelCrossEntropy


def _outputs(n_cells: int = 12, n_populations: int = 4, seed: int = 0, dtype=torch.float64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    allowed = torch.rand(n_cells, n_populations, generator=generator) < 0.4
    allowed[:, 0] |= ~allowed.any(1)
    allowed[0], allowed[1] = True, torch.tensor([False, True, False, False])
    return {
        "log_prob_contrast": 5 * torch.randn(n_cells, n_populations, generator=generator, dtype=dtype),
        "log_pi": torch.randn(n_populations, generator=generator, dtype=dtype).log_softmax(-1),
        "allowed": allowed,
        "valid": torch.ones(n_cells, dtype=dtype),
    }


def test_value_is_the_probability_of_the_label():
    """Protects the formula: minus the logarithm of the summed posterior of the allowed populations."""
    outputs = _outputs()
    posterior = torch.softmax(outputs["log_prob_contrast"] + outputs["log_pi"], -1)
    expected = -(posterior * outputs["allowed"]).sum(-1).log()
    torch.testing.assert_close(LabelCrossEntropy()(outputs), expected.mean())
    assert expected[0].item() == pytest.approx(0, abs=1e-12), "a cell without a label adds nothing"
    torch.testing.assert_close(LabelCrossEntropy(share=0.25)(outputs), 4 * expected.mean())


def test_padding_does_not_count():
    """Protects batches that are filled up: cells that are not valid change nothing."""
    outputs = _outputs()
    outputs["valid"][5:] = 0
    first = {key: value if key == "log_pi" else value[:5] for key, value in outputs.items()}
    torch.testing.assert_close(LabelCrossEntropy()(outputs), LabelCrossEntropy()(first))


def test_gradients():
    """Protects training: gradients agree with differences, those of cells without a label are zero."""
    outputs = _outputs()
    contrast, log_pi = (outputs[key].clone().requires_grad_() for key in ("log_prob_contrast", "log_pi"))

    def value(contrast: torch.Tensor, log_pi: torch.Tensor) -> torch.Tensor:
        return LabelCrossEntropy(share=0.5)({**outputs, "log_prob_contrast": contrast, "log_pi": log_pi})

    assert torch.autograd.gradcheck(value, (contrast, log_pi))
    (gradient,) = torch.autograd.grad(value(contrast, log_pi), contrast)
    torch.testing.assert_close(gradient[0], torch.zeros(4, dtype=torch.float64), atol=1e-12, rtol=0)
    assert gradient[1].abs().max() > 1e-3


def test_impossible_labels_stay_finite():
    """Protects the first steps: a label that is a thousand nats away gives a large, finite loss and gradient."""
    outputs = _outputs(dtype=torch.float32)
    outputs["log_prob_contrast"][1] = torch.tensor([2000.0, -2000.0, 0.0, 0.0])
    contrast = outputs["log_prob_contrast"].requires_grad_()
    loss = LabelCrossEntropy()(outputs)
    loss.backward()
    assert loss.item() == pytest.approx(4000 / 12, rel=0.05)
    assert contrast.grad is not None
    assert contrast.grad.isfinite().all()


@pytest.mark.parametrize("share", [0, -1, 1.5])
def test_share_must_be_a_share(share):
    """Protects against a division by zero."""
    with pytest.raises(ValueError, match="`share` must be above 0 and at most 1"):
        LabelCrossEntropy(share=share)
