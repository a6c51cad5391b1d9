"""FreeDoM: its shift beside DPS's, the law of its way back, and what it may be asked."""

import pytest
import torch

from samplers import Ancestral, sample
from steering import DPS, FreeDoM
from steering.guidance.freedom import up_again
from steering.noise import child_key, normal
from tests.exact import gaussian_chain
from tests.guidance.steps import Squares, drawn, step_of


@pytest.mark.parametrize("kind", ["vp", "flow"])
@pytest.mark.parametrize("rule", [None, "polyak", "normalised", "plain"])
def test_without_travel_it_is_dps_times_alpha(kind, rule):
    model = gaussian_chain(0.3, 2.0, steps=6, dim=3, kind=kind)
    x, reward = drawn(0, 4, 3), Squares(drawn(1, 3))
    for i in range(6):
        step = step_of(model, reward, x, i)
        found = FreeDoM(step=0.3, rule=rule, travel=1).propose(step)
        other = DPS(step=0.3, rule=rule).propose(step)
        shift = other.guided.mean - other.base.mean
        expected = model.process.alpha[i].float() * shift
        moved = found.guided.mean - found.base.mean
        torch.testing.assert_close(moved, expected, rtol=1e-5, atol=1e-6)  # float32


@pytest.mark.parametrize("kind", ["vp", "flow"])
def test_the_way_back_is_the_forward_kernel(kind):
    """From x' = alpha' c + sigma' e, with c fixed, the law of level i again: its mean and variance,
    and for what was there before, alpha / alpha'."""
    process = gaussian_chain(0.0, 1.0, steps=6, dim=1, kind=kind).process
    n = 200_000
    for i in range(6):
        level = torch.full((n,), i)
        e, z = normal(torch.arange(2 * n), (1,)).double().chunk(2)
        alpha, sigma = process.alpha, process.sigma
        reached = alpha[i + 1] * 1.7 + sigma[i + 1] * e
        x = up_again(process, level, reached.float(), z.float()).double()
        # standard errors of the mean, sigma / sqrt(n), and the variance, sigma² sqrt(2 / n)
        assert abs(x.mean() - alpha[i] * 1.7) < 4 * sigma[i] / n**0.5
        assert abs(x.var() - sigma[i] ** 2) < 4 * sigma[i] ** 2 * (2 / n) ** 0.5


def test_a_step_taken_three_times_is_three_steps_and_two_ways_back():
    model = gaussian_chain(0.3, 2.0, steps=10, dim=3, eta=0.5)
    x, reward = drawn(0, 4, 3), Squares(drawn(1, 3))
    guidance = FreeDoM(step=0.3, travel=3, travel_window=(0.3, 0.7))
    i = torch.tensor([1, 3, 6, 7])  # the two in the middle travel
    assert guidance.repeats(i, 10).tolist() == [1, 3, 3, 1]
    assert guidance.rows(i, 10).tolist() == [1, 3, 3, 1]
    found = guidance.propose(step_of(model, reward, x, i))
    by_hand = x.clone()
    for k in (1, 2):
        key = torch.tensor([k])
        for time in range(2):
            once = guidance.once(step_of(model, reward, by_hand[[k]], int(i[k])))
            noise = normal(child_key(key, 2 * time), (3,))
            reached = once.guided.mean + once.guided.std[:, None] * noise
            z = normal(child_key(key, 2 * time + 1), (3,))
            by_hand[k] = up_again(model.process, i[[k]], reached, z)[0]
    expected = guidance.once(step_of(model, reward, by_hand, i))
    torch.testing.assert_close(found.guided.mean, expected.guided.mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.base.mean, expected.base.mean, rtol=0, atol=1e-6)
    assert torch.equal(by_hand[[0, 3]], x[[0, 3]])


def test_it_travels_in_a_run_that_is_not_weighed_and_pays_for_it():
    model = gaussian_chain(0.3, 2.0, steps=10, dim=3)
    guidance = FreeDoM(step=0.3, travel=4, travel_window=(0.2, 0.5))
    assert not guidance.exact
    assert FreeDoM(travel=1).exact
    run = sample(
        model,
        Squares(drawn(1, 3)),
        Ancestral(5),
        guidance=guidance,
        weights="none",
        progress=False,
    )
    assert int(run.spent.rows.sum()) == 5 * (10 + 3 * 3)
