"""FlowChef against closed forms: where its steps lead, on flows and on diffusions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from samplers import Ancestral, sample
from steering import FlowChef, measure, operators
from steering.core import Model, Step, images_in_unit_range
from steering.gaussian import Clamp, ddpm_kernel, flow, vp
from steering.noise import child_key, root_key
from tests.guidance.steps import Squares

QUIET = {"progress": False, "weights": "none"}


class Still:
    """A straight model: every state's clean guess is the one point it came from."""

    def __init__(self, point: Tensor) -> None:
        self.point = point

    def __call__(self, x, t, row):
        return self.point.expand_as(x)

    def rows(self, t, row):
        return torch.ones(len(t), dtype=torch.int64)


def one_step(process, x, clean, reward, i, guidance):
    """(mean of the next states unguided, guided) from given clean guesses."""
    n = len(x)
    step = Step(
        x,
        torch.full((n,), i),
        torch.zeros(n, dtype=torch.int64),
        torch.arange(n),
        1.0,
        process,
        reward,
        lambda x, i, row: clean,
        lambda c, row: reward(c, [None] * len(c)),
    )
    proposal = guidance.propose(step)
    return proposal.base.mean, proposal.guided.mean


@pytest.mark.parametrize("kind", ["flow", "vp"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_other_end_of_the_line_is_held(kind, eta):
    """Moving the state so that its guess moves by d, with the velocity (a flow) or the noise (a
    diffusion) as it was, and then taking the model's own step, is the shift that is made."""
    levels = torch.linspace(1, 0, 6, dtype=torch.float64)
    bar = torch.tensor([0.02, 0.1, 0.4, 0.7, 0.9, 1.0], dtype=torch.float64)
    process = flow((3,), levels, eta=eta) if kind == "flow" else vp((3,), bar, eta=eta)
    x, clean, y = torch.randn(3, 4, 3, generator=torch.Generator().manual_seed(0))
    reward = Squares(y, torch.ones(3))
    for i in range(process.steps):
        base, guided = one_step(process, x, clean, reward, i, FlowChef(reward, step=0.25))
        d = 0.25 * (y - clean)
        alpha, sigma = float(process.alpha[i]), float(process.sigma[i])
        eps = (x - alpha * clean) / sigma
        ends = clean + d, eps + (d if kind == "flow" else 0)
        moved = alpha * ends[0] + sigma * ends[1]
        steps = torch.full((4,), i)
        again = process.transition(moved, steps, clean + d).mean
        torch.testing.assert_close(guided, again, rtol=0, atol=2e-6)  # float32, values near 1
        assert (guided - base).abs().max() > 0.02 or i == 0


def test_on_a_flow_the_shift_is_that_of_the_guess_moved_alone():
    """clean' = clean - g · sigma / (sigma - sigma'), the state held, ends in the same place."""
    process = flow((3,), torch.tensor([1.0, 0.7, 0.2, 0.0]), eta=0.0)
    x, clean, y = torch.randn(3, 4, 3, generator=torch.Generator().manual_seed(0))
    reward = Squares(y, torch.ones(3))
    for i in range(3):
        base, guided = one_step(process, x, clean, reward, i, FlowChef(reward, step=0.5))
        g = -0.5 * (y - clean)
        factor = float(process.sigma[i] / (process.sigma[i] - process.sigma[i + 1]))
        alone = process.transition(x, torch.full((4,), i), clean - g * factor).mean
        torch.testing.assert_close(guided, alone, rtol=0, atol=2e-6)
        torch.testing.assert_close(guided, base - g, rtol=0, atol=1e-6)


class Line(Still):
    """A straight flow: one velocity, the noise minus the point, wherever the state is pushed to."""

    def __init__(self, process, point: Tensor, noise: Tensor) -> None:
        super().__init__(point)
        self.process, self.noise = process, noise

    def __call__(self, x, t, row):
        return x - self.process.sigma[t.long()].float().view(-1, 1, 1) * (self.noise - self.point)


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_every_step_removes_its_share_of_the_residual_on_a_straight_flow(share):
    """N steps leave (1 - step)^N of the residual inside a mask, and nothing moves outside of it."""
    point, y = torch.full((4, 4), 0.5), torch.linspace(-2, 2, 16).view(4, 4)
    mask = torch.zeros(4, 4)
    mask[1:3] = 1
    process = flow((4, 4), torch.linspace(1, 0, 8), eta=0.0)
    noise = process.prior(child_key(root_key(0, torch.zeros(1, dtype=torch.int64)), 0))
    model = Model(Line(process, point, noise), process)
    guidance = FlowChef(step=share)
    run = sample(model, Squares(y, mask), Ancestral(1), guidance=guidance, **QUIET)
    left = (y - point) * (1 - share) ** 7
    seen = mask > 0
    # float32, values up to 2, seven steps
    torch.testing.assert_close((y - run.items[0])[seen], left[seen], rtol=0, atol=1e-5)
    free = run.items[0][~seen]
    plain = sample(model, Squares(y, mask), Ancestral(1), progress=False).items[0][~seen]
    assert torch.equal(free, plain)
    assert int(run.spent.rows.sum()) == 7


@pytest.mark.parametrize("kind", ["DDIM", "DDPM"])
def test_where_a_chain_clips_guesses_the_moved_one_is_clipped(kind):
    """step = 1 ends on the measurement, though raw guesses lie far outside of what is kept."""
    bar = torch.tensor([0.02, 0.1, 0.4, 0.7, 0.9, 1.0], dtype=torch.float64)
    process = vp((3,), bar, eta=1.0, bound=Clamp(1.0))
    if kind == "DDPM":
        levels = bar[:-1].sqrt(), (1 - bar[:-1]).sqrt(), bar[1:].sqrt(), (1 - bar[1:]).sqrt()
        process = replace(process, kernel=ddpm_kernel(*levels))
    x, clean, y = torch.randn(3, 4, 3, generator=torch.Generator().manual_seed(0))
    clean, y = 5 * clean, y.clamp(-0.9, 0.9)
    reward = Squares(y, torch.ones(3))
    for i in range(process.steps):
        _, guided = one_step(process, x, clean, reward, i, FlowChef(reward, step=1.0))
        alpha, sigma = float(process.alpha[i]), float(process.sigma[i])
        # the guess on the measurement, the noise as the raw guess has it
        moved = alpha * y + sigma * (x - alpha * clean) / sigma
        again = process.transition(moved, torch.full((4,), i), y).mean
        torch.testing.assert_close(guided, again, rtol=0, atol=1e-5)  # float32, values to 10
    torch.testing.assert_close(guided, y, rtol=0, atol=1e-5)


def test_the_published_pixel_step_removes_its_share_of_images():
    """8.1 % of the residual inside a mask in each step: 2 · 500 / 12288, of images in [0, 1]."""
    process = flow((1, 8, 8), torch.linspace(1, 0, 101), eta=0.0)
    x, clean, y = 0.2 * torch.randn(3, 4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    reward = measure(operators.Box(4), operators.Box(4).A(images_in_unit_range(y)))
    guidance = FlowChef.published("pixel", reward)
    n = torch.arange(4)
    step = Step(x, 0 * n, n, n, 1.0, process, reward, lambda x, i, row: clean,
                lambda c, row: reward(images_in_unit_range(c), row.tolist()))  # fmt: skip
    proposal = guidance.propose(step)
    moved = proposal.guided.mean - proposal.base.mean
    seen = operators.Box(4).mask(8, 8).expand_as(moved) > 0
    share = (moved / (y - clean))[seen]
    torch.testing.assert_close(share, torch.full_like(share, 1000 / 12288), rtol=1e-3, atol=0)
    assert (moved[~seen] == 0).all()
