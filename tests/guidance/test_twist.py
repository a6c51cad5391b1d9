"""The twist and its tempering against closed forms; TDS's and DAS's laws are in tests/exact."""

import pytest
import torch

from steering import Twist
from steering.guidance.twist import tempered
from tests.exact import gaussian_chain
from tests.guidance.steps import Squares, drawn, step_of


@pytest.mark.parametrize("kind", ["vp", "flow"])
@pytest.mark.parametrize("tempering", [None, 0.02])
@pytest.mark.parametrize("var", [1.0, 3.0])
def test_the_shift_is_the_variance_times_the_gradient(kind, tempering, var):
    """With the Jacobian skipped too, where the data have unit variance."""
    model = gaussian_chain(0.3, var, steps=6, dim=3, kind=kind)
    x, y = drawn(0, 4, 3), drawn(1, 3)
    for i in range(6):
        step = step_of(model, Squares(y), x, i, lam=0.7)
        gain, alpha = model.denoiser.gain[i], model.process.alpha[i]
        clean = 0.3 + gain * (x.double() - alpha * 0.3)
        share = 1.0 if tempering is None else min(1.0, 1.02 ** (100 * (i + 1) / 6) - 1)
        length = model.process.kernel.std[i] ** 2 * 0.7 * share
        expected = length * 2 * gain * (y.double() - clean)
        for jacobian in ("full", "skip") if var == 1.0 else ("full",):
            found = Twist(jacobian=jacobian, tempering=tempering).propose(step)
            shift = (found.guided.mean - found.base.mean).double()
            torch.testing.assert_close(shift, expected, rtol=1e-4, atol=1e-6)  # float32
    assert torch.equal(found.guided.mean, found.base.mean)  # the last step draws no noise


def test_for_a_linear_reward_the_twisted_step_is_optimal():
    """exp(λ r(c(x'))) is log-linear in x': the optimal kernel is moved by std² times its slope at
    the next level, the twist's is that at this one, and they agree as steps get small."""
    off = []
    for steps in (20, 200):
        model = gaussian_chain(0.0, 2.0, steps=steps, dim=1)
        at = steps // 2
        found = Twist().propose(step_of(model, lambda x, _: x[:, 0], drawn(0, 4, 1), at))
        optimal = model.process.kernel.std[at] ** 2 * model.denoiser.gain[at + 1]
        shift = (found.guided.mean - found.base.mean).double()
        off.append(float((shift / optimal - 1).abs().max()))
    assert off[0] < 0.2
    assert off[1] < 0.2 * off[0]


def test_tempering_grows_by_its_power_and_stops_at_one():
    found = tempered(0.008, torch.arange(101), 100)
    expected = (1.008 ** torch.arange(101, dtype=torch.float64) - 1).clamp(max=1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert int((found < 1).sum()) == 87  # 1 from step 87 of 100 on
    torch.testing.assert_close(tempered(0.008, torch.arange(11), 10), found[::10])
    assert torch.equal(tempered(None, torch.arange(11), 10), torch.ones(11, dtype=torch.float64))
    assert float(tempered(1e300, torch.tensor(50), 100)) == 1.0


@pytest.mark.parametrize("tempering", [0, -0.1, float("nan"), float("inf"), True, "a"])
def test_a_tempering_that_cannot_be_is_refused(tempering):
    with pytest.raises(ValueError, match="tempering="):
        Twist(tempering=tempering)
