"""Operators against scipy, counting and their own transposes; measurements against their sums."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import scipy.ndimage
import torch

import steering
from samplers import BestOfN, sample
from samplers.scoring import call_reward
from steering import measure, operators
from steering.operators import Blur, Box, Downsample, Random, observe
from steering.rewards import Jpeg, Measure
from tests.exact import gaussian_chain

ALL = [Box(3), Random(0.3), Downsample(2), Blur(1.2)]


def images(n=3, channels=2, h=8, w=12, seed=0):
    return torch.rand(n, channels, h, w, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("operator", ALL, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_becomes_float32_at_the_border(operator, dtype):
    x = images().to(dtype)
    assert operator.A(x).dtype == torch.float32
    assert torch.equal(operator.A(x), operator.A(x.float()))


@pytest.mark.parametrize("operator", ALL, ids=str)
def test_operators_are_linear_and_their_gradient_is_the_transpose(operator):
    x, z = images(), images(seed=1).requires_grad_()
    whole = operator.A(x + 2 * z)
    # float32 rounding of sums of numbers below 3
    torch.testing.assert_close(whole, operator.A(x) + 2 * operator.A(z), atol=2e-6, rtol=0)
    y = operator.A(x)
    (back,) = torch.autograd.grad(operator.A(z), z, y)
    z = z.detach()
    torch.testing.assert_close((back * z).sum(), (y * operator.A(z)).sum(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("operator", ALL, ids=str)
def test_an_item_does_not_depend_on_those_beside_it(operator):
    x = images(5)
    # matrix products may round otherwise for another batch
    torch.testing.assert_close(operator.A(x)[2:3], operator.A(x[2:3]), atol=1e-6, rtol=0)


def test_a_box_hides_the_centre_or_where_it_is_told():
    assert Box(4).mask(8, 12).sum() == 8 * 12 - 16
    assert not Box(4).mask(8, 12)[2:6, 4:8].any()
    assert not Box((2, 3), top=5, left=0).mask(8, 12)[5:7, 0:3].any()
    assert Box((2, 3), top=5, left=0).mask(8, 12).sum() == 8 * 12 - 6
    x = images()
    assert torch.equal(Box(4).A(x), x * Box(4).mask(8, 12))


def test_a_random_mask_is_a_function_of_seed_and_size_alone():
    mask = Random(0.3, seed=5).mask(20, 30)
    assert (mask == 0).sum() == 180
    assert torch.equal(mask, Random(0.3, seed=5).mask(20, 30))
    assert not torch.equal(mask, Random(0.3, seed=6).mask(20, 30))
    x = images(4, channels=3, h=20, w=30)
    assert torch.equal(Random(0.3, seed=5).A(x), x * mask)
    mask.zero_()  # the caller's own: the operator's stays
    assert Random(0.3, seed=5).mask(20, 30).any()


def test_a_mask_first_made_in_inference_mode_does_for_gradients():
    with torch.inference_mode():
        Random(0.25, seed=77).A(images())
    x = images().requires_grad_()
    (gradient,) = torch.autograd.grad(Random(0.25, seed=77).A(x).sum(), x)
    assert torch.equal(gradient[0, 0], Random(0.25, seed=77).mask(8, 12))


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_downsampling_is_the_mean_of_blocks(factor):
    x = images()
    expected = torch.tensor(
        [
            [x[1, 0, i : i + factor, j : j + factor].mean() for j in range(0, 12, factor)]
            for i in range(0, 8, factor)
        ]
    )
    torch.testing.assert_close(Downsample(factor).A(x)[1, 0], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("sigma", "size"), [(1.0, None), (2.2, None), (10.0, 11), (0.4, 1)])
def test_blur_is_scipys_gaussian_filter(sigma, size):
    x = images()
    radius = math.ceil(3 * sigma) if size is None else size // 2
    expected = scipy.ndimage.gaussian_filter(
        x[1, 1].double().numpy(), sigma, mode="mirror", radius=radius
    )
    # weights are rounded to float32, 6e-8, and each pixel is a sum of 2 x 17 of them at most
    np.testing.assert_allclose(Blur(sigma, size).A(x)[1, 1].numpy(), expected, atol=1e-6)
    flat = Blur(sigma, size).A(torch.ones(1, 1, 8, 12))
    torch.testing.assert_close(flat, torch.ones_like(flat), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Box(0), "size=0"),
        (lambda: Box((3, 2.5)), "size="),
        (lambda: Box(3, top=-1), "top=-1"),
        (lambda: Random(1.0), "share=1.0"),
        (lambda: Random(0.5, seed=0.5), "seed=0.5"),
        (lambda: Downsample(0), "factor=0"),
        (lambda: Downsample(2.0), "factor=2.0"),
        (lambda: Blur(0.0), "sigma=0.0"),
        (lambda: Blur(1.0, size=4), "size=4"),
        (lambda: observe(Box(3), images(), noise=-1.0), "noise=-1.0"),
    ],
)
def test_a_bad_operator_is_refused_where_it_is_made(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    ("operator", "x", "words"),
    [
        (Box(9), images(), "does not fit into 8 x 12"),
        (Box(4, left=9), images(), "does not fit into 8 x 12"),
        (Downsample(5), images(), "does not divide 8 x 12"),
        (Downsample(3), images(), "does not divide 8 x 12"),
        (Blur(3.0), images(), "reaches 9 pixels, which a side of 8"),
        (Blur(1.0), images()[0], "floats"),
        (Box(3), (255 * images()).byte(), "floats"),
    ],
)
def test_an_image_that_does_not_suit_is_one_clear_error(operator, x, words):
    with pytest.raises(TypeError, match=words):
        operator.A(x)


class Physics:
    """As deepinv's: `A` is the operator, a call measures, with new noise each time."""

    def A(self, x):
        return 2 * x

    def __call__(self, x):
        return self.A(x) + torch.randn_like(x)


def test_observation_noise_is_drawn_once_and_by_item():
    x = images(400, h=8, w=8)
    y = observe(Physics(), x, noise=0.5, seed=3)
    assert torch.equal(y, observe(Physics(), x, noise=0.5, seed=3))
    assert torch.equal(y[:7], observe(Physics(), x[:7], noise=0.5, seed=3))
    assert not torch.equal(y, observe(Physics(), x, noise=0.5, seed=4))
    assert torch.equal(observe(Physics(), x), 2 * x)
    z = (y - 2 * x) / 0.5
    n = z.numel()  # 51,200: five standard errors
    assert z.mean().abs() < 5 / math.sqrt(n)
    assert (z.square().mean() - 1).abs() < 5 * math.sqrt(2 / n)


def test_observation_noise_is_not_the_prior_of_a_walk():
    x = torch.zeros(1, 1, 8, 8)
    key = steering.noise.root_key(0, torch.tensor([0]))
    drawn = observe(Physics(), x, noise=1.0)
    for walk in (key, *(steering.noise.child_key(key, k) for k in range(5))):
        assert not torch.equal(drawn, steering.noise.normal(walk, (1, 8, 8)))


def test_measure_is_minus_the_squared_residual():
    x, y = images(), images(1, seed=1)
    for operator in (*ALL, Physics(), lambda x: x.flatten(2)):
        seen = operators.forward(operator)
        wanted = seen(y)
        expected = [-((seen(x)[n] - wanted[0]) ** 2).sum().item() for n in range(3)]
        for one in (wanted, wanted[0], wanted[0].double()):
            reward = steering.measure(operator, one)
            assert reward(x, [None] * 3).tolist() == pytest.approx(expected, rel=1e-5)
            assert reward(x, [None] * 3).dtype == torch.float32


def test_measurements_go_by_prompt_or_for_a_batch_by_order():
    x, operator = images(), Downsample(2)
    y = operator.A(x)
    by_prompt = Measure(operator, {"cat": y[0], 7: y[1:2], None: y[2]})
    assert by_prompt(x, ["cat", 7, None]).tolist() == [0, 0, 0]
    assert by_prompt(x[[1, 1, 0]], [7, 7, "cat"]).tolist() == [0, 0, 0]
    assert (by_prompt(x, [None, "cat", 7]) < 0).all()
    assert Measure(operator, y)(x, [None] * 3).tolist() == [0, 0, 0]
    assert (Measure(operator, y)(x.flip(0), [None] * 3) < 0).tolist() == [True, False, True]


def test_measure_gradient_is_that_of_least_squares():
    x, operator = images().requires_grad_(), Blur(1.0)
    y = operator.A(images(1, seed=1))
    (gradient,) = torch.autograd.grad(Measure(operator, y)(x, [None] * 3).sum(), x)
    matrices = operator._along(8), operator._along(12)
    expected = -2 * matrices[0].T @ (operator.A(x) - y) @ matrices[1]
    torch.testing.assert_close(gradient, expected.detach(), atol=1e-5, rtol=0)


def test_measure_works_in_float32_on_half_precision_items():
    x = images().half()
    reward = Measure(Box(3), Box(3).A(images(1, seed=1)))
    assert torch.equal(reward(x, [None] * 3), reward(x.float(), [None] * 3))


def test_what_guidances_ask_of_a_measure():
    y = torch.zeros(2, 4, 6)
    reward = Measure(Downsample(2), y, noise=0.5)
    assert reward.differentiable
    assert reward.least_squares
    assert not reward.of_states
    assert reward.floor == 0.25 * 48
    for same in (y[None], y.expand(3, -1, -1, -1), y.flatten(), y.flatten()[None], {"a": y}):
        assert Measure(Downsample(2), same, noise=0.5).floor == reward.floor
    assert Measure(Downsample(2), y).floor == 0
    assert Measure(Box(3), y, space="states").of_states
    assert re.fullmatch(r"measure\(Downsample #[0-9a-f]{8}\)", reward.name)
    assert (0.5 * reward + Jpeg()).name == f"0.5*{reward.name} + 1*-jpeg kB"
    assert reward.card.source == "Downsample"


def test_the_floor_is_right_or_refused_whatever_the_dimensions_of_a_measurement():
    for y in (images()[:1, 0], {None: images()[:1, 0]}):  # [1, H, W]
        reward = Measure(gray, y, noise=1.0)
        assert reward(images(), [None] * 3)[0] == 0
        assert reward.floor == 96
    assert Measure(gray, images()[0, 0])(images(), [None] * 3)[0] == 0  # without noise, no floor


def test_the_floor_is_what_noise_leaves_of_the_residual():
    x = images(1, h=64, w=64)
    y = observe(Blur(1.0), x, noise=0.1)
    reward = Measure(Blur(1.0), y, noise=0.1)
    # chi-square with 2 * 64 * 64 degrees of freedom: five standard errors
    left = -reward(x, [None]).item() / reward.floor
    assert abs(left - 1) < 5 * math.sqrt(2 / 8192)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda y: Measure(3, y), TypeError, "A is a int"),
        (lambda y: Measure(Box, y), TypeError, "the class Box"),
        (lambda y: Measure(torch.eye(3), y), TypeError, "A is a Tensor"),
        (lambda y: Measure(Box(3), [1.0]), TypeError, "y is list"),
        (lambda y: Measure(Box(3), (255 * y).byte()), TypeError, "y is torch.uint8"),
        (lambda y: Measure(Box(3), y / 0), ValueError, "nan or inf"),
        (lambda y: Measure(Box(3), {3: y, 4: y * math.nan}), ValueError, r"y\[4\]"),
        (lambda y: Measure(Box(3), {}), ValueError, "y has shapes"),
        (lambda y: Measure(Box(3), {3: y, 4: y[:, :, :4]}), ValueError, "y has shapes"),
        (lambda y: Measure(Box(3), y[:0]), ValueError, "y is"),
        (lambda y: Measure(Box(3), y, noise=-0.1), ValueError, "noise=-0.1"),
        (lambda y: Measure(Box(3), y, space="latent"), ValueError, "space='latent'"),
    ],
)
def test_a_bad_measure_is_refused_where_it_is_made(make, error, words):
    with pytest.raises(error, match=words):
        make(images())


def gray(x):
    return x[:, 0]


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        (Measure(Downsample(2), images()[0]), r"A puts out \[2, 4, 6\].* y has shape \[2, 8, 12\]"),
        (Measure(Box(3), images(2)), r"y has shape \[2, 2, 8, 12\]: give one"),
        (Measure(Box(3), {"a": images()[0]}), "no measurement for prompt None"),
        (Measure(lambda x: x.sum(), images()), "one measurement per item"),
        (Measure(gray, images()[0, 0], noise=1.0), r"give one .*\[1, 8, 12\]"),
        (Measure(gray, {None: images()[0, 0]}, noise=1.0), r"give one .*\[1, 8, 12\]"),
        (Measure(Downsample(5), images()), "does not divide"),
    ],
)
def test_what_does_not_match_ends_a_run_with_one_clear_error(reward, words):
    with pytest.raises(TypeError, match=words) as caught:
        call_reward(reward, images(), [None] * 3, "fail")  # which makes a value of other errors
    assert len(str(caught.value)) < 500


def test_another_measurement_has_another_name():
    y = torch.zeros(1, 1, 4, 4)
    rewards = [
        measure(operators.Box(2), y),
        measure(operators.Box(1), y),
        measure(operators.Box(2), y + 1),
        measure(operators.Box(2), y, noise=0.1),
        measure(operators.Box(2), y, space="states"),
        measure(operators.Box(2), {0: y, 1: y}),
        measure(operators.Box(2), {0: y, 1: y + 1}),
    ]
    assert len({reward.name for reward in rewards}) == len(rewards)
    assert measure(operators.Box(2), y.clone()).name == rewards[0].name


def test_a_record_of_another_measurement_is_refused(tmp_path):
    model = replace(gaussian_chain(steps=4, dim=1), decode=lambda x: x.view(-1, 1, 1, 1))
    y = torch.zeros(1, 1, 1, 1)
    identity = operators.Downsample(1)
    first = measure(identity, y)
    sample(model, first, BestOfN(3), record=tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match="its reward is"):
        sample(model, measure(identity, y + 5), BestOfN(3), record=tmp_path / "run", progress=False)


def test_one_number_may_be_measured_of_an_item():
    x = images(2)
    reward = measure(lambda x: x.mean((1, 2, 3)), torch.tensor([0.0, 1.0]))
    expected = -torch.stack([x[0].mean().square(), (x[1].mean() - 1).square()])
    torch.testing.assert_close(reward(x, [0, 1]), expected, rtol=1e-5, atol=0)
