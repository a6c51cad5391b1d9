"""FlowDPS against its formula, and against the law of a flow to one point."""

import math

import pytest
import torch

from samplers import Ancestral, sample
from steering import FlowDPS
from steering.core import Model
from steering.gaussian import flow
from tests.exact import gaussian_chain
from tests.guidance.steps import Squares, drawn, step_of
from tests.guidance.test_flowchef import Still


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_step_follows_the_formula(eta):
    model = gaussian_chain(0.3, 2.0, steps=6, dim=3, kind="flow", eta=eta)
    x, y = drawn(0, 4, 3), drawn(1, 3)
    sigma = model.process.sigma
    for i in range(6):
        proposal = FlowDPS(step=0.25, inner=2).propose(step_of(model, Squares(y), x, i))
        c = proposal.clean.double()
        v = (x - c) / sigma[i]
        n = x + (1 - sigma[i]) * v
        c_y = y - (1 - 0.25) ** 2 * (y - c)  # polyak on an identity, twice
        ends = (1 - sigma[i]) * c + sigma[i] * c_y, sigma[i + 1].sqrt() * n
        mean = (1 - sigma[i + 1]) * ends[0] + sigma[i + 1] * ends[1]
        torch.testing.assert_close(proposal.guided.mean.double(), mean, rtol=1e-5, atol=3e-6)
        std = sigma[i + 1] * (1 - sigma[i + 1]).sqrt()
        torch.testing.assert_close(proposal.guided.std.double(), std.expand(4), rtol=1e-6, atol=0)
        assert float(proposal.base.std[0]) == pytest.approx(float(model.process.kernel.std[i]))


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_without_a_step_the_levels_of_a_point_are_kept(eta):
    """With the true noise at the other end, n~ is standard normal again: x' = (1 - sigma') c +
    sigma' n~ at every level, whatever noise the chain itself draws."""
    process = flow((1,), torch.linspace(1, 0, 7, dtype=torch.float64), eta=eta)
    point = torch.tensor([0.8])
    model = Model(Still(point), process)
    n = 100_000
    for i in range(6):
        sigma, to = float(process.sigma[i]), float(process.sigma[i + 1])
        x = (1 - sigma) * 0.8 + sigma * drawn(i, n, 1)
        step = step_of(model, Squares(torch.zeros(1)), x, i)
        reached = FlowDPS(step=0.0).propose(step).guided.sample(step.key).double()
        assert abs(reached.mean() - (1 - to) * 0.8) <= 4 * to / n**0.5 + 1e-6
        assert abs(reached.var() - to**2) <= 4 * to**2 * math.sqrt(2 / n) + 1e-9


def test_outside_its_window_the_chain_draws_its_own_noise():
    model = gaussian_chain(0.3, 2.0, steps=6, dim=3, kind="flow")
    step = step_of(model, Squares(drawn(1, 3)), drawn(0, 4, 3), torch.tensor([0, 2, 3, 4]))
    proposal = FlowDPS(window=(0.0, 0.5)).propose(step)
    assert torch.equal(proposal.guided.mean[2:], proposal.base.mean[2:])
    assert (proposal.guided.std == proposal.base.std).tolist() == [False, False, True, True]


def test_a_diffusion_is_refused_before_the_first_row():
    model = gaussian_chain(0.3, 2.0, steps=6, dim=3, kind="vp")
    with pytest.raises(ValueError, match="FlowDPS is for flows"):
        sample(
            model, Squares(drawn(1, 3)), Ancestral(2), guidance=FlowDPS(), weights="none",
            progress=False,
        )  # fmt: skip
