"""The built-in text model writes what its card says, and keeps what a prompt asks for."""

import math

import pytest
import torch
from torch.nn.functional import one_hot

from samplers import BestOfN, TreeSearch, sample
from steering import from_pipeline, rewards, zoo
from steering.zoo.evaluate_text import Check, held_out_windows
from steering.zoo.sequence_training import masked_bound
from steering.zoo.train_text import ALPHABET, LENGTH
from steering.zoo.train_text_judge import garbled, shuffled


@pytest.fixture(scope="module")
def pipe():
    return zoo.load("text")


@pytest.fixture(scope="module")
def judge():
    return zoo.load("text-judge")


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def weights(texts, pipe):
    return one_hot(pipe.read(texts), len(pipe.alphabet)).float()


def test_held_out_chapters_are_in_its_letters(pipe):
    chapters = zoo.held_out_text()
    assert len(chapters) == 119  # every tenth of 1,189
    assert set("".join(chapters)) == set(pipe.alphabet) == set(ALPHABET)
    assert not any("  " in chapter for chapter in chapters)
    assert pipe.length == LENGTH == 64


def test_bits_per_character_are_those_of_the_card(pipe):
    with torch.no_grad():
        x = held_out_windows(zoo.held_out_text(), 256, seed=1)
        bits = masked_bound(pipe.denoiser, x, rng()).double() / LENGTH / math.log(2)
    # the card's figure is of 4,096 windows; this one of others and fewer, 4 standard errors
    assert bits.mean().item() == pytest.approx(1.98, abs=4 * bits.std().item() / 16)


def test_texts_begin_as_asked(pipe):
    prompts = ["in the beginning ", "_nd it came to pass", "a" * 60, None]
    texts = pipe(prompts, 16, generator=rng()).sequences
    assert [len(text) for text in texts] == [64] * 4
    for prompt, text in zip(prompts, texts, strict=True):
        for asked, written in zip(prompt or "", text, strict=False):
            assert asked in ("_", written)
        assert set(text) <= set(pipe.alphabet)
    again = pipe(prompts, 16, generator=rng()).sequences
    assert again == texts


@pytest.mark.parametrize("sampler", [BestOfN(), TreeSearch(backup="max")])
def test_searches_keep_the_beginning(pipe, judge, sampler):
    prompts = ["in the beginning ", "behold, ______ will"]
    model = from_pipeline(pipe, prompts=prompts, steps=8)
    run = sample(model, rewards.Classifier(judge, [1]), sampler, nfe=32, progress=False)
    assert set(run.rows.tolist()) == {0, 1}
    for text, row in zip(run.texts, run.rows.tolist(), strict=True):
        assert len(text) == 64
        kept = [(a, b) for a, b in zip(prompts[row], text, strict=False) if a != "_"]
        assert all(a == b for a, b in kept)
    # rewards are those of the texts, one by one
    again = rewards.Classifier(judge, [1])(weights(run.texts, pipe), [None] * len(run.texts))
    torch.testing.assert_close(run.rewards.float(), again, rtol=1e-4, atol=1e-4)


def test_words_that_are_not_known_are_refused(pipe):
    with pytest.raises(ValueError, match=r"'In the beginning' with 'I'"):
        pipe(["In the beginning"])
    with pytest.raises(ValueError, match="65 characters"):
        from_pipeline(pipe, prompts=["a" * 65], steps=4)


def test_the_judge_tells_the_bible_from_what_was_done_to_it(pipe, judge):
    x = held_out_windows(zoo.held_out_text(), 400, seed=2)
    with torch.inference_mode():
        real, mixed, broken = (
            judge(each).log_softmax(1)[:, 1] for each in (x, shuffled(x, rng()), garbled(x, rng()))
        )
    # shares of pairs told apart, of the card, less 4 standard errors of 400 windows
    for other, least in ((mixed, 0.93), (broken, 0.83)):
        assert (real[:, None] > other).double().mean() > least
    one = one_hot(x[:8], len(ALPHABET)).float()
    torch.testing.assert_close(judge(one), judge(x[:8]))


def test_the_judge_is_differentiable_in_guesses(pipe, judge):
    tokens = pipe.read(["in the beginning god created"])
    x = pipe.denoiser(torch.where(tokens < 0, len(ALPHABET), tokens)).logits.softmax(-1)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(rewards.Classifier(judge, [1])(x, [None]).sum(), x)
    assert gradient.isfinite().all()
    assert (gradient[0, 40:].abs().amax(1) > 0).any()


def test_the_check_knows_real_text_from_noise():
    check = Check.load()
    assert len(check.unseen) == 30
    real = check.unseen[3][:500]
    noise = "".join(ALPHABET[k] for k in torch.randint(34, (500,), generator=rng()))
    assert check.bits(real) < 2.5 < 5 < check.bits(noise)
    assert check.known(real) > 0.85
    assert check.known(noise) < 0.2
    assert check.known("and the king qzx went") == 0.75  # the last word may be cut off
