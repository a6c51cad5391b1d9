"""Products, standard scores, one reward per clip: against what they are defined to be."""

import math

import pytest
import torch

from steering.rewards import Jpeg, Minimum, OverFrames, Product, Standardized, Sum, from_pil


def images(n=5, channels=3, size=8, seed=0):
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(seed))


def bright(items, prompts):
    return items.flatten(1).mean(1)


def red(items, prompts):
    return items[:, 0].flatten(1).mean(1)


bright.differentiable = red.differentiable = True  # type: ignore[attr-defined]


def test_a_product_is_the_product_however_it_is_written():
    x, prompts = images(), [None] * 5
    expected = bright(x, None) * red(x, None) * bright(x, None)
    one = Product((bright, red))
    for product in (Product((bright, red, bright)), one * bright, bright * Product((red, bright))):
        torch.testing.assert_close(product(x, prompts), expected)
        assert product.differentiable
        assert product.name in ("bright * red * bright",)
    assert isinstance(2 * one, Sum)
    assert isinstance(one * 2, Sum)
    assert not (one * Jpeg()).differentiable
    assert ((one + bright) * red).name == "(1*bright * red + 1*bright) * red"
    for wrong in ("a", None, True):
        with pytest.raises(TypeError):
            one * wrong


def test_the_gradient_of_a_product_is_by_the_product_rule():
    x = images(3).requires_grad_()
    (gradient,) = torch.autograd.grad(Product((bright, red))(x, [None] * 3).sum(), x)
    a, b = bright(x, None)[:, None, None, None], red(x, None)[:, None, None, None]
    expected = (b / 192).expand_as(x).clone()
    expected[:, :1] += a / 64
    torch.testing.assert_close(gradient, expected.detach())


def test_a_product_fails_where_a_part_is_negative_or_not_finite():
    parts = [[-1.0, 2.0, math.inf, 0.0, 3.0], [-1.0, -2.0, 0.0, None, 4.0]]
    product = Product([lambda items, prompts, part=part: part for part in parts])
    scores = product(images(), [None] * 5).tolist()
    assert [math.isnan(score) for score in scores] == [True, True, True, True, False]
    assert scores[4] == 12


def test_standard_scores_have_mean_0_and_deviation_1_where_they_were_fitted():
    x, prompts = images(50), [None] * 50
    reward = Standardized.fit(bright, x, prompts)
    z = reward(x, prompts).double()
    assert reward.count == 50
    # float32 scores
    assert z.mean().item() == pytest.approx(0, abs=1e-5)
    assert z.std().item() == pytest.approx(1, abs=1e-5)
    assert reward.differentiable
    assert reward.name == "z(bright)"


def test_standard_scores_do_not_depend_on_the_batch():
    reward = Standardized.fit(bright, images(50), [None] * 50)
    x = images(8, seed=1)
    alone = torch.cat([reward(x[k : k + 1], [None]) for k in range(8)])
    assert torch.equal(alone, reward(x, [None] * 8))
    total = 0.5 * reward + 2 * Standardized(red, 0.5, 0.1)
    expected = 0.5 * (bright(x, 0) - reward.mean) / reward.std + 2 * (red(x, 0) - 0.5) / 0.1
    torch.testing.assert_close(total(x, [None] * 8), expected)


def test_failed_items_are_left_out_of_a_fit():
    values = [1.0, None, 3.0, math.inf, 5.0]
    reward = Standardized.fit(lambda items, prompts: values, images(), [None] * 5)
    assert (reward.mean, reward.std, reward.count) == (3.0, 2.0, 3)
    for same in ([1.0] * 5, [None, None, 1.0, None, None], [None] * 5):
        with pytest.raises(ValueError, match=r"items: reward .* finite values over 5 of them"):
            Standardized.fit(lambda items, prompts, same=same: same, images(), [None] * 5)


@pytest.mark.parametrize("by", ["mean", "min"])
def test_a_clip_gets_the_reward_of_its_frames(by):
    clips = images(20).reshape(4, 5, 3, 8, 8)
    reward = OverFrames(bright, by)
    frames = clips.mean((2, 3, 4))
    expected = frames.mean(1) if by == "mean" else frames.amin(1)
    torch.testing.assert_close(reward(clips, [None] * 4), expected)
    assert reward.differentiable
    assert reward.name == f"{by} over frames of bright"
    clips.requires_grad_()
    (gradient,) = torch.autograd.grad(reward(clips, [None] * 4)[0], clips)
    assert (gradient[1:] == 0).all()
    touched = (gradient[0] != 0).flatten(1).any(1)
    assert touched.sum() == (5 if by == "mean" else 1)


@pytest.mark.parametrize(
    ("frames", "at"),
    [(1, [3]), (2, [0, 6]), (3, [0, 3, 6]), (4, [0, 2, 4, 6]), (7, range(7)), (99, range(7))],
)
def test_frames_that_are_looked_at_are_spread_over_the_clip(frames, at):
    looked = []

    def number(items, prompts):
        looked.append((items[:, 0, 0, 0].int().tolist(), prompts))
        return items[:, 0, 0, 0]

    clips = torch.arange(14.0).reshape(2, 7, 1, 1, 1).expand(2, 7, 3, 2, 2)
    OverFrames(number, frames=frames)(clips, ["a", "b"])
    n = len(at)
    assert looked == [([*at, *(7 + k for k in at)], ["a"] * n + ["b"] * n)]


@pytest.mark.parametrize("by", ["mean", "min"])
def test_a_clip_fails_where_a_frame_fails(by):
    clips = images(6).reshape(2, 3, 3, 8, 8)
    clips[1, 2, 0, 0, 0] = math.inf
    assert OverFrames(Jpeg(), by)(clips, [None] * 2).isnan().tolist() == [False, True]
    # not even where it is not looked at
    clips[1, 2, 0, 0, 0], clips[0, 1, 2, 7, 7] = 0.5, math.nan
    assert OverFrames(bright, by, 2)(clips, [None] * 2).isnan().tolist() == [True, False]
    clips[1, 2, 0, 0, 0], clips[0, 1, 2, 7, 7] = math.inf, 0.5
    # an infinite frame does not hide behind a lower one
    assert OverFrames(bright, by)(clips, [None] * 2).isnan().tolist() == [False, True]


@pytest.mark.parametrize("items", [torch.rand(2, 3, 8, 8), torch.rand(2, 0, 3, 8, 8), "clip"])
def test_what_is_no_clip_is_refused(items):
    with pytest.raises(TypeError, match=r"no clips.*\[N, F, C, H, W\]"):
        OverFrames(bright)(items, [None] * 2)


def test_the_cards_of_a_users_function_say_so():
    card = from_pil(lambda images: [0.0]).card
    assert card.source == "a function of the user's"
    assert card.memory is None
    assert Jpeg().card.memory == 0


def test_loading_reaches_every_part():
    loaded = []

    class Learned(Jpeg):
        def load(self):
            loaded.append(self.quality)

    a, b, c, d = (Learned(quality=q) for q in (10, 20, 30, 40))
    whole = 0.5 * (a * b) + Standardized(OverFrames(Minimum([c, bright])), 0.0, 1.0) + d + bright
    whole.load()
    assert sorted(loaded) == [10, 20, 30, 40]
