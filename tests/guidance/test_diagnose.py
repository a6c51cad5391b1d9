"""The cosine between the skipped gradient and the true one, where it is known."""

import warnings

import pytest
import torch

from steering import jacobian_cosine
from steering.core import Model
from steering.gaussian import flow
from tests.exact import gaussian_chain
from tests.guidance.test_flowchef import Line


def line(items, prompts):
    return items.flatten(1).sum(1)


@pytest.mark.parametrize("kind", ["vp", "flow"])
def test_it_is_that_of_the_jacobians_diagonal(kind):
    """J = diag(gain) and ∇_c r = (1, .., 1): cosine = Σ gain / (sqrt(D) |gain|), at every state."""
    model = gaussian_chain(0.0, [0.01, 1.0, 1.0, 1.0], steps=6, dim=4, kind=kind)
    gain = model.denoiser.gain
    expected = gain.sum(1) / (2 * gain.norm(dim=1))  # 0 / 0 at a flow's first level
    found = jacobian_cosine(model, line)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5, equal_nan=True)
    assert found.isnan().sum() == (kind == "flow")
    some = jacobian_cosine(model, line, steps=[4, 2])
    assert torch.equal(some, found[[4, 2]])


def test_on_a_straight_flow_it_is_one():
    process = flow((2, 2), torch.linspace(1, 0, 8, dtype=torch.float64), eta=0.0)
    still = Line(process, torch.full((2, 2), 0.5), torch.zeros(2, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = jacobian_cosine(Model(still, process), lambda x, _: -x.flatten(1).square().sum(1))
    torch.testing.assert_close(found, torch.ones(7), rtol=0, atol=1e-6)


def test_it_warns_where_the_gradients_have_little_in_common():
    """One coordinate in 100 varies: J is nearly a projection on it, the cosine 1 / sqrt(100)."""
    model = gaussian_chain(0.0, [4.0] + [1e-6] * 99, steps=6, dim=100)
    with pytest.warns(UserWarning, match=r"gaussian-vp: .*unsafe.* 0\.10"):
        found = jacobian_cosine(model, line, samples=2)
    torch.testing.assert_close(found, torch.full((6,), 0.1), rtol=0, atol=2e-3)


def test_samples_do_not_share_their_walks():
    """With a reward whose gradient depends on the state, the mean is over different cosines."""
    model = gaussian_chain(0.0, [0.1, 1.0], steps=6, dim=2)
    one, many = (
        jacobian_cosine(model, lambda x, _: -x.square().sum(1), samples=n) for n in (1, 64)
    )
    assert not torch.equal(one, many)
    assert ((many > 0) & (many < 1)).all()


@pytest.mark.parametrize(
    "given", [{"samples": 0}, {"samples": True}, {"steps": [9]}, {"steps": []}]
)
def test_wrong_input_is_named(given):
    model = gaussian_chain(0.0, 1.0, steps=6, dim=2)
    with pytest.raises(ValueError, match=next(iter(given))):
        jacobian_cosine(model, line, **given)
