"""DPS on linear-Gaussian chains, where the network's Jacobian is known."""

import pytest
import torch

from steering import DPS
from tests.exact import gaussian_chain
from tests.guidance.steps import Squares, drawn, step_of

VAR = [0.2, 1.0, 3.0]


def known(model, x, i, y):
    """Clean guesses and the gradient of -|y - c(x)|² at x, in float64."""
    m, gain, alpha = model.denoiser.mean, model.denoiser.gain[i], model.process.alpha[i]
    clean = m + gain * (x.double() - alpha * m)
    return clean, 2 * gain * (y.double() - clean)


@pytest.mark.parametrize("kind", ["vp", "flow"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_shift_is_the_true_gradient_over_the_residuals_norm(kind, eta):
    model = gaussian_chain([0.3, -1.0, 0.5], VAR, steps=6, dim=3, kind=kind, eta=eta)
    x, y = drawn(0, 4, 3), drawn(1, 3)
    for i in range(6):
        proposal = DPS(step=0.7).propose(step_of(model, Squares(y), x, i))
        clean, slope = known(model, x, i, y)
        expected = 0.7 * slope / (y - clean).norm(dim=1, keepdim=True)
        shift = proposal.guided.mean - proposal.base.mean
        # float32, shifts of at most 5
        torch.testing.assert_close(shift.double(), expected, rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(proposal.clean.double(), clean, rtol=1e-5, atol=1e-5)
        assert torch.equal(proposal.guided.std, proposal.base.std)


def test_rules_are_those_named():
    model = gaussian_chain([0.3, -1.0, 0.5], VAR, steps=6, dim=3)
    x, y = drawn(0, 4, 3), drawn(1, 3)
    clean, slope = known(model, x, 2, y)
    gap = (y - clean).square().sum(1, keepdim=True)
    norm, sigma = slope.norm(dim=1, keepdim=True), model.process.sigma[2]
    expected = {
        "plain": 0.1 * slope,
        "polyak": 0.2 * gap / norm**2 * slope,
        "normalised": 0.1 * sigma * 3**0.5 * slope / norm,
    }
    for rule, shift in expected.items():
        found = DPS(step=0.1, rule=rule).propose(step_of(model, Squares(y), x, 2))
        moved = found.guided.mean - found.base.mean
        torch.testing.assert_close(moved.double(), shift, rtol=1e-5, atol=2e-6)


def test_a_residual_of_zero_moves_nothing():
    model = gaussian_chain(0.0, 1.0, steps=6, dim=3)
    x = torch.zeros(2, 3)  # their guesses are 0
    proposal = DPS().propose(step_of(model, Squares(torch.zeros(3)), x, 3))
    assert torch.equal(proposal.guided.mean, proposal.base.mean)
    assert not proposal.failed.any()
