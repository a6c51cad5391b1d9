"""The twist of tokens: optimal where it can be, its gains against differences, and what is refused.

Its laws under samplers are in tests/exact/test_tokens.py.
"""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import one_hot

from samplers import TDS, Importance, sample
from steering import (
    DPS,
    MPGD,
    ClassifierGuidance,
    FlowChef,
    FlowDPS,
    FreeDoM,
    Twist,
    from_pipeline,
    jacobian_cosine,
)
from steering.discrete import NEVER
from steering.guidance.tokens import gains_at_guess, gains_through_network
from steering.models.sequence_denoiser import SequenceDenoiser
from steering.models.sequence_pipeline import SequencePipeline
from steering.models.token_scheduler import TokenScheduler
from tests.exact.tokens import every, token_chain
from tests.guidance.steps import drawn, part_of, step_of

WORTH = drawn(1, 2, 3)
LAM = 1.3


def linear(items, _):
    return (items * WORTH[: items.shape[1]]).sum((1, 2))


def pair(items, _):
    """Linear in every site, not in both."""
    return linear(items, None) + 2 * items[:, 0, 1] * items[:, -1, 2] * (items.shape[1] > 1)


def over_next(model, guidance, reward, x, i):
    """log p - log q + λ r(c(x')) of every x' [V^L] that can follow x, less λ r(c(x))."""
    step = step_of(model, reward, x[None], i, LAM)
    found = guidance.propose(step)
    after = every(model.process.states, model.process.length)
    p, q = (
        torch.cat([kernel.log_prob(s[None]) for s in after])
        for kernel in (found.base, found.guided)
    )
    # the look at the end is at the tokens themselves
    last = i + 1 == model.process.steps
    row = torch.zeros(len(after), dtype=torch.int64)
    at = torch.full((len(after),), i + 1)
    clean = after if last else step.denoise(after, at, row)
    here = step.score(step.denoise(step.x, step.i, step.row), step.row)
    weight = p - q + LAM * (step.score(clean, row) - here)
    assert q.exp().sum() == pytest.approx(1, abs=1e-5)
    return weight[p > NEVER / 2]


@pytest.mark.parametrize("i", [0, 1, 2])
@pytest.mark.parametrize(
    ("kind", "jacobian"), [("masked", "skip"), ("masked", "full"), ("uniform", "skip")]
)
def test_with_one_site_the_twist_is_optimal(kind, jacobian, i):
    """q ∝ p · exp(λ r(c(x'))): the weight is one constant, whatever is drawn. Guesses are exact, so
    that Bayes' rule foretells the next one; the slope of a uniform chain's guess at this level does
    not."""
    model = token_chain(kind, sites=1, astray=0.0)
    tokens = range(3) if kind == "uniform" else (3,)
    for token in tokens:
        weight = over_next(model, Twist(jacobian=jacobian), linear, torch.tensor([token]), i)
        assert len(weight) == 3 + (kind == "masked" and i < 2)
        assert weight.std(correction=0) < 1e-5  # float32 guesses and kernels


@pytest.mark.parametrize("i", [1, 2])
def test_with_one_site_left_the_twist_is_optimal(i):
    """For a reward that is linear in that site, whatever it is in others."""
    model = token_chain(astray=0.0)
    x = torch.tensor([1, 3])
    for jacobian in ("skip", "full"):
        weight = over_next(model, Twist(jacobian=jacobian), pair, x, i)
        assert len(weight) == (4 if i == 1 else 3)
        assert weight.std(correction=0) < 1e-5
    both = over_next(model, Twist(jacobian="skip"), pair, torch.tensor([3, 3]), 2)
    assert both.std() > 0.01  # the pair is no sum over sites


def test_one_step_of_one_site_has_one_weight():
    model = token_chain(sites=1, steps=1, conditions=4)
    twist = Twist(jacobian="skip")
    result = sample(model, linear, Importance(50), lam=LAM, guidance=twist, progress=False)
    torch.testing.assert_close(
        result.weights, torch.full((200,), 1 / 50).double(), atol=1e-6, rtol=0
    )
    table = model.denoiser
    log_w = table.laws()[-1].log() + LAM * linear(model.decode(table.states()), None)
    assert (result.log_z - log_w.logsumexp(0)).abs().max() < 1e-5


def test_gains_are_of_probabilities_not_of_their_logarithms():
    """Σ_v p_v = 1 at every site, and one token is never guessed: it gains what it is worth."""
    model = token_chain()
    step = step_of(model, linear, torch.tensor([[3, 3], [0, 3]]), 1)
    p = torch.tensor([[[0.9, 0.1, 0.0], [1e-12, 0.5, 0.5]], [[1.0, 0.0, 0.0], [0.2, 0.2, 0.6]]])
    clean = torch.where(p > 0, p.log(), NEVER)
    found = gains_at_guess(step, clean)
    expected = WORTH - (p * WORTH).sum(-1, keepdim=True)
    torch.testing.assert_close(found.gradient[..., :3], expected, rtol=1e-5, atol=1e-5)
    assert (found.gradient[..., 3].abs() < 1e-6).all()  # the mask
    assert torch.equal(found.clean, clean)


def test_the_next_token_of_a_uniform_chain_tells_by_bayes_rule():
    """E[value_c | x, x' = v] from the joint law, c by c; its mean over x' is E[value_c | x]."""
    process = token_chain("uniform", steps=4).process
    x, i = torch.tensor([[0, 2]]), torch.tensor([1])
    clean, value = drawn(0, 1, 2, 3).log_softmax(-1), drawn(1, 1, 2, 3)
    m, after = (float(process.level[k]) for k in (1, 2))
    stays = (1 - m) / (1 - after)
    for site in range(2):
        joint = torch.zeros(3, 3, dtype=torch.float64)  # [x', c]
        for v in range(3):
            for c in range(3):
                there = (1 - after) * (v == c) + after / 3
                back = stays * (int(x[0, site]) == v) + (1 - stays) / 3
                joint[v, c] = there * back
        joint = joint / joint.sum(0) * clean[0, site].double().exp()
        expected = (joint @ value[0, site].double()) / joint.sum(1)
        found = process.expected(x, i, clean, value)[0, site].double()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        mean = process.transition(x, i, clean).log_probs[0, site].double().exp() @ found
        assert mean == pytest.approx(float(clean[0, site].exp() @ value[0, site]), abs=1e-5)


def network(kind: str):
    torch.manual_seed(0)
    denoiser = SequenceDenoiser(
        4, masked=kind == "masked", width=8, depth=1, kernel=3, fine=6, timed=kind == "uniform"
    )
    scheduler = TokenScheduler(tokens=4, kind=kind)
    return from_pipeline(SequencePipeline(denoiser, scheduler, "ACGT", 6), steps=5)


def curved(items, _):
    return (items * drawn(2, 6, 4)).sum((1, 2)) + 3 * items[:, 0, 0] * items[:, 3, 1].square()


@pytest.mark.parametrize("kind", ["masked", "uniform"])
def test_full_gains_against_differences(kind):
    """Central differences of r(c(x)) along the way to each token, of a network with SUBS."""
    model = network(kind)
    x = (
        torch.tensor([[0, 4, 2, 4, 4, 1]])
        if kind == "masked"
        else torch.tensor([[0, 3, 2, 1, 1, 1]])
    )
    step = step_of(model, curved, x, 2)
    gains = gains_through_network(step).gradient
    hot = model.process.weights(x)
    for site in range(6):
        for v in range(model.process.states):
            way = torch.zeros_like(hot)
            way[0, site] = one_hot(torch.tensor(v), model.process.states) - hot[0, site]
            low, high = (
                step.score(step.denoise(hot + e * way, step.i, step.row), step.row).detach()
                for e in (-0.005, 0.005)
            )
            moves = kind == "uniform" or int(x[0, site]) == 4
            expected = float(high - low) / 0.01 if moves else 0.0
            # differences of float32 values of about 5: 5 · 2^-23 / 0.01
            assert float(gains[0, site, v]) == pytest.approx(expected, abs=2e-3, rel=2e-2)


@pytest.mark.parametrize("jacobian", ["skip", "full"])
@pytest.mark.parametrize("kind", ["masked", "uniform"])
def test_an_item_is_bent_the_same_alone_and_among_others_and_in_its_window(kind, jacobian):
    model = network(kind)
    x = model.process.prior(torch.arange(5))
    x[1:, 2], x[3:, 4] = 1, 0
    step = step_of(model, curved, x, torch.tensor([0, 1, 2, 3, 4]))
    guidance = Twist(window=(0.2, 0.8), jacobian=jacobian)
    found = guidance.propose(step)
    bent = (found.guided.log_probs.exp() - found.base.log_probs.exp()).abs() > 1e-5
    assert bent.flatten(1).any(1).tolist() == [False, True, True, True, False]
    for k in range(5):
        alone = guidance.propose(part_of(step, k))
        for name in ("guided", "base"):
            one, many = getattr(alone, name).log_probs, getattr(found, name).log_probs[[k]]
            torch.testing.assert_close(one, many, rtol=0, atol=1e-5)
    none = guidance.propose(replace(step, i=torch.zeros(5, dtype=torch.int64)))
    torch.testing.assert_close(
        none.guided.log_probs.exp(), none.base.log_probs.exp(), rtol=0, atol=1e-6
    )


def test_what_cannot_follow_never_does_and_a_broken_gradient_moves_nothing():
    model = token_chain()
    step = step_of(model, linear, torch.tensor([[1, 3], [3, 3]]), 1, lam=1e6)
    found = Twist(jacobian="skip").propose(step)
    drawn_ = found.guided.sample(torch.arange(2))
    assert int(drawn_[0, 0]) == 1
    assert (found.base.log_prob(drawn_) > NEVER / 2).all()

    def broken(items, prompts):
        bad = torch.where(torch.arange(len(items)) == 1, torch.nan, 1.0)
        return bad * linear(items, prompts)

    found = Twist().propose(step_of(model, broken, torch.tensor([[1, 3], [3, 3]]), 1))
    assert found.failed.tolist() == [False, True]
    torch.testing.assert_close(found.guided.log_probs[1], found.base.log_probs[1])


@pytest.mark.parametrize("jacobian", ["skip", "full"])
def test_a_reward_that_raises_loses_its_particle_only(jacobian):
    model = token_chain("uniform", conditions=2)

    def picky(items, prompts):
        if (items.amax(-1) < 0.34).any() or (items[:, 0, 0] > 0.9).any():
            raise RuntimeError("no such sequence")
        return linear(items, prompts)

    result = sample(model, picky, TDS(10, jacobian=jacobian), progress=False)
    assert result.spent.first_error == "RuntimeError: no such sequence"
    assert result.weights.isfinite().all()
    assert (result.items[:, 0, 0] == 0).all()


class Asked:
    """A denoiser that must not be."""

    def __call__(self, x, t, row):
        raise AssertionError("the network was called")

    def rows(self, t, row):
        return torch.ones(len(t), dtype=torch.int64)


@pytest.mark.parametrize("kind", ["masked", "uniform"])
@pytest.mark.parametrize("guidance", [
    FlowChef(), FlowChef(jacobian="full"), FlowChef(rule="polyak"), DPS(), MPGD(), FlowDPS(),
    FreeDoM(travel=1), ClassifierGuidance(lambda x, t, row: x.sum(1)),
], ids=lambda g: type(g).__name__)  # fmt: skip
def test_other_guidances_are_refused_before_the_first_row(kind, guidance):
    model = replace(token_chain(kind), denoiser=Asked())
    with pytest.raises(TypeError, match="Twist bends steps of tokens too"):
        sample(model, linear, Importance(4), guidance=guidance, progress=False)


@pytest.mark.parametrize("guidance", [Twist(), Twist(jacobian="skip")], ids=str)
@pytest.mark.parametrize("reward", [
    lambda items, _: items[:, 0, 0].detach(), lambda items, _: items[:, 0],
], ids=["no-gradient", "shape"])  # fmt: skip
def test_what_is_wrong_with_a_reward_is_said_before_the_first_row(guidance, reward):
    model = replace(token_chain(), denoiser=Asked())
    with pytest.raises((TypeError, ValueError), match=r"no gradient|one number per item"):
        sample(model, reward, Importance(4), guidance=guidance, progress=False)


def test_the_jacobians_of_tokens_are_not_compared():
    with pytest.raises(TypeError, match="model of tokens"):
        jacobian_cosine(token_chain(), linear)
