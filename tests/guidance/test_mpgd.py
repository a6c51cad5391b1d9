"""MPGD beside FlowChef: the same on a diffusion, (1 - sigma') of it on a flow."""

import pytest
import torch

from steering import MPGD, FlowChef
from steering.core import Model
from steering.gaussian import GaussianProcess, ddpm_kernel
from tests.exact import gaussian_chain
from tests.guidance.steps import Squares, drawn, step_of


def shift_of(guidance, step):
    proposal = guidance.propose(step)
    return proposal.guided.mean - proposal.base.mean


def ancestral(model: Model) -> Model:
    """The same levels with the forward chain's posterior as the kernel, which weighs x too."""
    p = model.process
    kernel = ddpm_kernel(p.alpha[:-1], p.sigma[:-1], p.alpha[1:], p.sigma[1:])
    return Model(model.denoiser, GaussianProcess(p.shape, p.times, p.alpha, p.sigma, kernel))


@pytest.mark.parametrize("rule", ["polyak", "normalised", "plain"])
def test_on_a_diffusion_it_is_flowchef(rule):
    ddim = gaussian_chain(0.3, 2.0, steps=6, dim=3)
    x, reward = drawn(0, 4, 3), Squares(drawn(1, 3))
    for model in (ddim, ancestral(ddim)):
        for i in range(6):
            step = step_of(model, reward, x, i)
            found, other = (shift_of(kind(step=0.3, rule=rule), step) for kind in (MPGD, FlowChef))
            torch.testing.assert_close(found, other, rtol=1e-5, atol=1e-6)  # float32
            assert found.abs().max() > 1e-3


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_on_a_flow_the_noise_is_held_instead_of_the_velocity(eta):
    """x' = (1 - sigma') c~ + what the kernel makes of eps as it was, by its own formula."""
    model = gaussian_chain(0.3, 2.0, steps=6, dim=3, kind="flow", eta=eta)
    x, y = drawn(0, 4, 3), drawn(1, 3)
    p = model.process
    for i in range(6):
        step = step_of(model, Squares(y), x, i)
        proposal = MPGD(step=0.4).propose(step)
        clean = proposal.clean.double()
        eps = (x - p.alpha[i] * clean) / p.sigma[i]
        moved = clean + 0.4 * (y - clean)  # polyak on an identity removes that share
        held = (p.sigma[i + 1] ** 2 - p.kernel.std[i] ** 2).sqrt() * eps
        expected = p.alpha[i + 1] * moved + held
        torch.testing.assert_close(proposal.guided.mean.double(), expected, rtol=1e-5, atol=2e-6)
        if not eta:  # where FlowChef goes as far as the guess
            other = shift_of(FlowChef(step=0.4), step) * (1 - p.sigma[i + 1]).float()
            torch.testing.assert_close(shift_of(MPGD(step=0.4), step), other, rtol=1e-4, atol=1e-6)
