"""Rewards against what they are defined to be, and against hostile input."""

import io
import math

import pytest
import torch
from PIL import Image
from torch import nn

from steering.rewards import Classifier, Jpeg, Minimum, Sum, from_pil
from steering.rewards.pil import to_pil


class Linear(nn.Module):
    """Logits of three classes from the first three pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return self.scale * x.flatten(1)[:, :3]


def images(n=5, channels=1, size=8, seed=0):
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(seed))


def brightness(items, prompts):
    return items.flatten(1).mean(1)


def test_classifier_is_the_log_of_the_summed_probability():
    x = images()
    p = Linear()(x).softmax(1)
    reward = Classifier(Linear(), [0, 2])
    # float32 rounding of a handful of operations on numbers of order 1
    torch.testing.assert_close(reward(x, [None] * 5).exp(), p[:, 0] + p[:, 2], rtol=1e-5, atol=0)
    assert reward.name == "log p(0,2)"
    assert reward.differentiable


def test_classifier_never_exceeds_certainty():
    assert (Classifier(Linear(), [0, 1, 2])(images(2000), [None] * 2000) <= 0).all()


def test_classifier_is_differentiable():
    x = images(2, size=4).double().requires_grad_()
    reward = Classifier(Linear().double(), [1])
    (gradient,) = torch.autograd.grad(reward(x, [None] * 2).sum(), x)
    p = Linear()(x).softmax(1)
    expected = torch.zeros_like(x).flatten(1)
    expected[:, :3] = 2 * (torch.eye(3)[1] - p)  # d log softmax_c / d logits = onehot(c) - p
    # log_softmax runs in float32, whose rounding unit is 6e-8
    torch.testing.assert_close(gradient.flatten(1), expected.detach(), rtol=0, atol=1e-6)


def test_classifier_survives_logits_without_any_hope():
    # exp(-2000) is 0 in every float; its logarithm is not
    x = torch.zeros(1, 1, 2, 2)
    x[0, 0, 0, 0] = 1000.0
    assert Classifier(Linear(), [1])(x, [None]).item() == pytest.approx(-2000)


@pytest.mark.parametrize(
    ("classes", "error"),
    [
        ([], ValueError),
        ([1, 1], ValueError),
        ([-1], ValueError),
        ([1.5], ValueError),
        (["4"], ValueError),
        (3, TypeError),
        ("3", TypeError),
    ],
)
def test_classifier_refuses_bad_classes(classes, error):
    with pytest.raises(error, match="classes="):
        Classifier(Linear(), classes)


def test_classifier_says_when_a_class_is_beyond_the_net():
    with pytest.raises(TypeError, match=r"classes=\(7,\)"):
        Classifier(Linear(), [7])(images(), [None] * 5)


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_minus_the_size_of_the_file(channels):
    x = images(3, channels, 32)
    scores = Jpeg(quality=80)(x, [None] * 3)
    for image, score in zip(to_pil(x), scores.tolist(), strict=True):
        file = io.BytesIO()
        image.save(file, "JPEG", quality=80)
        assert score == -len(file.getvalue()) / 1000


def test_jpeg_prefers_the_smooth():
    noise = images(1, 3, 32)
    scores = Jpeg()(torch.cat([noise, torch.full_like(noise, 0.5)]), [None] * 2)
    assert scores[0] < scores[1] < 0


@pytest.mark.parametrize("quality", [0, 96, 50.5, True, "90"])
def test_jpeg_refuses_bad_quality(quality):
    with pytest.raises(ValueError, match="quality="):
        Jpeg(quality=quality)


def test_pixels_that_are_not_finite_score_nan_alone():
    x = images(3)
    whole = Jpeg()(x, [None] * 3)
    x[1, 0, 0, 0] = math.nan
    scores = Jpeg()(x, [None] * 3)
    assert scores.isnan().tolist() == [False, True, False]
    assert scores[[0, 2]].tolist() == whole[[0, 2]].tolist()


def test_to_pil_rounds_and_round_trips():
    levels = torch.arange(256, dtype=torch.float32).reshape(1, 1, 16, 16) / 255
    (image,) = to_pil(levels)
    assert list(image.tobytes()) == list(range(256))
    with pytest.raises(TypeError, match="no images"):
        to_pil(torch.zeros(2, 16))


def test_from_pil_gives_images_and_prompts():
    @from_pil
    def red_if_asked(images: list[Image.Image], prompts: list[str]):
        return [
            image.getpixel((0, 0))[0] if prompt == "red" else None
            for image, prompt in zip(images, prompts, strict=True)
        ]

    scores = red_if_asked(torch.ones(2, 3, 4, 4), ["red", "blue"])
    assert scores[0] == 255
    assert scores[1].isnan()
    assert red_if_asked.name == "red_if_asked"
    assert not red_if_asked.differentiable


def test_from_pil_takes_a_function_of_images_alone():
    assert from_pil(lambda images: [i.width for i in images])(images(2), ["a", "b"]).tolist() == [
        8,
        8,
    ]


def test_from_pil_refuses_the_wrong_number_of_scores():
    with pytest.raises(TypeError, match="1 numbers for 5 images"):
        from_pil(lambda images: [0.0])(images(), [None] * 5)
    with pytest.raises(TypeError, match="from_pil takes a function"):
        from_pil(lambda: 0.0)


def test_sum_is_the_weighted_sum_however_it_is_written():
    x, prompts = images(), [None] * 5
    a, b = Classifier(Linear(), [0]), Jpeg()
    expected = 0.7 * a(x, prompts) + 0.3 * b(x, prompts)
    for reward in (0.7 * a + 0.3 * b, Sum(((0.7, a), (0.3, b))), 0.3 * b + a * 0.7):
        torch.testing.assert_close(reward(x, prompts), expected, rtol=1e-12, atol=0)
        assert not reward.differentiable
    assert (0.7 * a + 0.3 * b).name == "0.7*log p(0) + 0.3*-jpeg kB"
    assert (2 * (a + a)).differentiable


def test_sum_takes_plain_functions():
    x, prompts = images(), [None] * 5
    total = Jpeg() + brightness
    torch.testing.assert_close(
        total(x, prompts), Jpeg()(x, prompts) + brightness(x, prompts).double()
    )
    assert total.name == "1*-jpeg kB + 1*brightness"
    assert len((brightness + Jpeg()).terms) == 2
    with pytest.raises(TypeError):
        Jpeg() + 3
    with pytest.raises(TypeError):
        Jpeg() * "a"


def test_a_part_that_fails_makes_the_sum_fail_for_that_item_only():
    def half(items, prompts):
        return [1.0, None]

    scores = (half + 1.0 * Jpeg())(images(2), [None] * 2)
    assert scores.isnan().tolist() == [False, True]
    # a part of weight 0 is not even asked
    assert not Sum(((0.0, half), (1.0, Jpeg())))(images(2), [None] * 2).isnan().any()


@pytest.mark.parametrize("terms", [(), ((math.nan, brightness),)])
def test_sum_refuses_bad_terms(terms):
    with pytest.raises(ValueError, match="terms"):
        Sum(terms)


def test_sum_says_which_part_has_the_wrong_shape():
    def scalar(items, prompts):
        return items.mean()

    with pytest.raises(TypeError, match="reward scalar returned shape"):
        (scalar + 1.0 * Jpeg())(images(), [None] * 5)


def test_minimum_is_the_worst_and_its_gradient_is_the_worst_ones():
    net = Linear()
    pair = 2 * Minimum((Classifier(net, [0]), Classifier(net, [1])))
    x = images(200).requires_grad_()
    p = net(x).log_softmax(1)
    torch.testing.assert_close(pair(x, [None] * 200), 2 * p[:, :2].min(1).values)
    (gradient,) = torch.autograd.grad(pair(x, [None] * 200).sum(), x)
    (expected,) = torch.autograd.grad(2 * p[:, :2].min(1).values.sum(), x)
    torch.testing.assert_close(gradient, expected)
    assert pair.differentiable
    assert pair.name == "2*min(log p(0), log p(1))"
    with pytest.raises(ValueError, match="at least two"):
        Minimum((Jpeg(),))
