"""The KL of paths against an enumeration; the published weighting beside it."""

from __future__ import annotations

import pytest
import torch

from steering.finetune import path_kl
from steering.finetune.path_kl import published_kl
from tests.exact.smooth_tokens import enumerated, token_chain
from tests.exact.tokens import every
from tests.finetune.small import small_pipeline


@pytest.mark.parametrize(
    ("kind", "schedule"), [("masked", "loglinear"), ("masked", "cosine"), ("uniform", "loglinear")]
)
def test_is_what_enumeration_gives(kind, schedule):
    a, b = (token_chain(kind, schedule, seed=s).model for s in (0, 1))
    found = path_kl(a, b, n=2000, batch=2000)
    truth = enumerated(a, b)[1]
    assert abs(found.mean - truth) < 3 * found.error
    assert found.error < 0.03 * truth


@torch.no_grad()
def test_published_weighting_of_hard_states_is_exactly_zero():
    a, b = (token_chain(seed=s).model for s in (0, 1))
    process = a.process
    x = every(process.states, process.length)
    i = torch.ones(len(x), dtype=torch.int64)
    said = [m.denoiser.log_probs(x, process.time(i), 0 * i) for m in (a, b)]
    assert (published_kl(process, x, i, *said) == 0).all()
    laws = [process.transition(x, i, log_p) for log_p in said]
    assert (laws[0].kl(laws[1])[(x == 3).any(1)] > 0.01).all()
    # relaxed, it is not: half a mask, the rest on token 0
    soft = 0.6 * process.weights(torch.full((1, 2), 3)) + 0.4 * process.weights(0 * x[:1])
    said = [m.denoiser.log_probs(soft, process.time(i[:1]), i[:1] * 0) for m in (a, b)]
    p, q = (s.exp()[0, :, 0] for s in said)
    by_hand = float((0.4 * 0.4 * (p * (p / q).log() - p + q)).sum() / process.level[1])
    assert float(published_kl(process, soft, i[:1], *said)) == pytest.approx(by_hand)


def test_prompts_take_turns_and_nothing_is_far_from_itself():
    pipe = small_pipeline()
    assert path_kl(pipe, pipe, prompts=["AC", None], steps=4, n=8) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"n": 1}, "n=1: one path"),
        ({"n": 2.5}, "n=2.5"),
        ({"batch": 0}, "batch=0"),
        ({"steps": 0}, "steps=0"),
    ],
)
def test_wrong_arguments(given, match):
    with pytest.raises(ValueError, match=match):
        path_kl(small_pipeline(), small_pipeline(), **given)


def test_chains_must_be_the_same():
    with pytest.raises(ValueError, match="different tokens"):
        path_kl(small_pipeline(), small_pipeline("uniform"), steps=4)
    with pytest.raises(ValueError, match="another schedule"):
        path_kl(small_pipeline(), small_pipeline(schedule="cosine"), steps=4)
