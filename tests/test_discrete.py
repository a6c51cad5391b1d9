"""Kernels of token chains against enumeration and Bayes' rule; whole chains are in tests/exact."""

import math

import pytest
import torch
from torch.nn.functional import one_hot

from steering.discrete import (
    NEVER,
    SCHEDULES,
    CategoricalTransition,
    MaskedProcess,
    UniformProcess,
    certain,
    denoising_loss,
    subs,
)
from tests.exact.tokens import every, noise, token_chain
from tests.guidance.steps import drawn

K, L, T = 3, 2, 4
PROCESSES = {
    "masked": MaskedProcess.of(L, K, T),
    "cosine": MaskedProcess.of(L, K, T, "cosine"),
    "remasked": MaskedProcess.of(L, K, T, remask=0.3),
    "uniform": UniformProcess.of(L, K, T),
    "uniform, cosine": UniformProcess.of(L, K, T, "cosine"),
}
processes = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)


def kernel(process, x, i, seed=0):
    """The law of what follows states x [N, L] at step i, by random guesses; and these."""
    clean = drawn(seed, len(x), L, K).log_softmax(-1)
    if process.states > K:
        clean = subs(x, clean)
    return process.transition(x, torch.full((len(x),), i), clean), clean


def probabilities(transition, n, states):
    """[n, S] float64 of every next state."""
    return torch.stack([transition.log_prob(s.expand(n, -1)).exp() for s in states], 1)


def repeated(transition, n):
    """The law of n particles from each state, one after another."""
    kept = transition.kept
    return CategoricalTransition(
        transition.log_probs.repeat_interleave(n, 0),
        None if kept is None else kept.repeat_interleave(n, 0),
    )


@processes
def test_the_kernel_is_bayes_rule(process):
    """Σ_c clean_c q(x' | x, c) of each site, of the forward chain alone: q(x | x') q(x' | c) /
    q(x | c), where a masked token is never unmasked on the way to the noise."""
    if getattr(process, "remask", 0.0):
        return  # its forward chain is not Markov: see tests/exact
    x = every(process.states, L)
    for i in range(T):
        here, after = (
            noise(process, float(process.level[i])),
            noise(process, float(process.level[i + 1])),
        )
        m, m_after = float(process.level[i]), float(process.level[i + 1])
        stays = (1 - m) / (1 - m_after)
        V = process.states
        step = stays * torch.eye(V, dtype=torch.float64)  # q(x | x') as [x', x]
        if V > K:
            step[:, K] += 1 - stays
        else:
            step += (1 - stays) / K
        found, clean = kernel(process, x, i)
        p = clean.double().exp()
        joint = after[:, :, None] * step  # [c, x', x]
        given = joint / here[:, None].clamp(min=1e-300)
        for site in range(L):
            expected = torch.einsum("nc,cvn->nv", p[:, site], given[..., x[:, site]])
            possible = here[:, x].sum(0).prod(1) > 0  # at the first step no token is left
            z = found.log_probs[:, site].double().exp()
            if found.kept is not None:
                kept = found.kept[:, site].double()
                z = kept + (1 - kept.sum(-1, keepdim=True)) * z
            torch.testing.assert_close(
                z[possible],
                expected[possible],
                rtol=1e-5,
                atol=1e-6,  # float32 kernels
            )


@processes
def test_log_prob_is_a_law_and_draws_have_it(process):
    x = every(process.states, L)[[0, 4, -1, 3]]
    n = 4000
    for i in range(T):
        found, _ = kernel(process, x, i)
        p = probabilities(found, len(x), every(process.states, L))
        torch.testing.assert_close(p.sum(1), torch.ones(len(x)).double(), rtol=0, atol=1e-5)
        after = repeated(found, n).sample(torch.arange(n * len(x)))
        index = (after * process.states ** torch.arange(L - 1, -1, -1)).sum(1).view(len(x), n)
        for k in range(len(x)):
            share = torch.bincount(index[k], minlength=p.shape[1]) / n
            error = (p[k] * (1 - p[k]).clamp(min=0) / n).sqrt()
            # five standard errors, for 1,300 frequencies; one count where hardly one is expected
            assert ((share - p[k]).abs() <= 5 * error + 1.5 / n).all()
            assert (share[p[k] < 1e-30] == 0).all()


def test_steps_of_a_masked_chain_in_closed_form():
    process = MaskedProcess.of(L, K, 4)
    x = torch.tensor([[K, 1]])
    found, clean = kernel(process, x, 1)  # from level 3/4 to 1/2
    go = (0.75 - 0.5) / 0.75
    law = found.log_probs[0, 0].exp()
    torch.testing.assert_close(law[:K], go * clean[0, 0].exp())
    assert float(law[K]) == pytest.approx(1 - go)
    assert found.log_prob(torch.tensor([[K, 0]])) < NEVER / 2  # a token stays what it is
    again = MaskedProcess.of(L, K, 4, remask=0.3).transition(x, torch.tensor([2]), clean)
    p = again.log_probs[0].exp()
    # ReMDM: u = (m - m' + σ (1 - m)) / m, with σ = min(.3, m' / (1 - m)), from 1/2 to 1/4
    assert float(p[0, :K].sum()) == pytest.approx((0.25 + 0.3 * 0.5) / 0.5, rel=1e-5)
    assert p[1].tolist() == pytest.approx([0, 0.7, 0, 0.3], abs=1e-6)


@processes
def test_relaxed_states_at_the_corners_are_the_hard_ones(process):
    if getattr(process, "remask", 0.0):
        return
    x = every(process.states, L)
    i = torch.full((len(x),), 2)
    clean = drawn(0, len(x), L, K).log_softmax(-1)
    hot = process.weights(x)
    assert torch.equal(hot, one_hot(x, process.states).float())
    if process.states > K:
        torch.testing.assert_close(subs(hot, clean).exp(), subs(x, clean).exp())
        clean = subs(x, clean)
    hard, soft = process.transition(x, i, clean), process.transition(hot, i, clean)
    torch.testing.assert_close(soft.log_probs.exp(), hard.log_probs.exp(), rtol=1e-6, atol=1e-7)
    if process.states == K:  # and in between a mixture
        blend = 0.3 * hot + 0.7 * hot.flip(0)
        mixed = process.transition(blend, i, clean).log_probs.exp()
        one, other = hard, process.transition(x.flip(0), i, clean)
        expected = 0.3 * one.log_probs.exp() + 0.7 * other.log_probs.exp()
        torch.testing.assert_close(mixed, expected, rtol=1e-4, atol=1e-6)


@processes
def test_relaxed_draws_have_the_law_of_hard_ones(process):
    """The largest weight is a draw at any temperature (Gumbel's maximum); towards 0 all of it."""
    x = every(process.states, L)[[4, -1]]
    found, _ = kernel(process, x, 2)
    n = 4000
    p = probabilities(found, len(x), every(process.states, L))
    soft = repeated(found, n).rsample(torch.arange(2 * n), 1e-3)
    torch.testing.assert_close(soft.sum(-1), torch.ones(2 * n, L))
    # of two Gumbel draws within .01 of each other there is a share of .01 at most, per pair
    assert (soft.amax(-1) < 0.999).float().mean() < 0.03
    index = (soft.argmax(-1) * process.states ** torch.arange(L - 1, -1, -1)).sum(1).view(2, n)
    for k in range(2):
        share = torch.bincount(index[k], minlength=p.shape[1]) / n
        error = (p[k] * (1 - p[k]).clamp(min=0) / n).sqrt()
        assert ((share - p[k]).abs() <= 5 * error + 1.5 / n).all()


def test_relaxed_draws_have_the_right_slopes():
    """Against central differences of float64, torch.autograd.gradcheck."""
    log_p = drawn(0, 2, L, K + 1).double().requires_grad_()
    kept = (0.2 * drawn(1, 2, L, K + 1).double().softmax(-1)).requires_grad_()
    key = torch.arange(2)

    def relaxed(log_p, kept):
        return CategoricalTransition(log_p.log_softmax(-1), kept).rsample(key, 0.7)

    assert torch.autograd.gradcheck(relaxed, (log_p, kept))

    def masked(x, log_p):
        x = x.softmax(-1)
        process = MaskedProcess.of(L, K, T)
        clean = subs(x, log_p.log_softmax(-1))
        return process.transition(x, torch.tensor([1, 2]), clean).rsample(key, 0.7)

    x, guess = drawn(2, 2, L, K + 1).double(), drawn(3, 2, L, K).double()
    assert torch.autograd.gradcheck(masked, (x.requires_grad_(), guess.requires_grad_()))


def test_relaxed_draws_of_a_uniform_chain_have_the_right_slopes():
    process, key = UniformProcess.of(L, K, T), torch.arange(2)
    x, guess, way = drawn(2, 2, L, K), drawn(3, 2, L, K), drawn(4, 2, L, K)

    def value(x, guess):
        law = process.transition(x.softmax(-1), torch.tensor([1, 2]), guess.log_softmax(-1))
        return (law.rsample(key, 0.7) * way).sum()

    for which in range(2):
        at = [x.clone(), guess.clone()]
        at[which].requires_grad_()
        (slope,) = torch.autograd.grad(value(*at), at[which])
        for k in range(x[0].numel()):
            move = torch.zeros_like(x).flatten()
            move[k] = 0.02
            low, high = [x, guess], [x, guess]
            low[which] = low[which] - move.view_as(x)
            high[which] = high[which] + move.view_as(x)
            found = float(value(*high) - value(*low)) / 0.04
            # float32: 2^-23 / 0.04, and the third derivative times 0.02² / 6
            assert float(slope.flatten()[k]) == pytest.approx(found, abs=5e-4)


@processes
def test_kl_is_that_of_the_joint_laws(process):
    x = every(process.states, L)
    for i in range(T):
        (one, _), (other, _) = kernel(process, x, i), kernel(process, x, i, seed=5)
        p, q = (probabilities(t, len(x), x) for t in (one, other))
        expected = torch.where(p > 1e-30, p * (p / q.clamp(min=1e-300)).log(), 0.0).sum(1)
        torch.testing.assert_close(one.kl(other).double(), expected, rtol=1e-4, atol=1e-5)
        assert (one.kl(one).abs() < 1e-6).all()


@pytest.mark.parametrize("kind", ["masked", "uniform"])
def test_the_loss_is_the_bound_of_the_chain(kind):
    """Its mean over steps and noise is Σ_i E KL(q(x_{i+1} | x_i, c) || p(x_{i+1} | x_i)), here over
    all states, which is above -log p(c) of the law pushed forward, for every c."""
    model = token_chain(kind, steps=3)
    table, process = model.denoiser, model.process
    states, data = table.states(), every(K, L)
    row = torch.zeros(len(states), dtype=torch.int64)
    law = table.laws()[-1]
    n = 6000
    for c in data[[0, 4, 5]]:
        bound = 0.0
        for i in range(process.steps):
            at = torch.full((len(states),), i)
            q = noise(process, float(process.level[i]))[c]  # [L, V]
            reach = q[torch.arange(L), states].prod(1)
            clean = table(states, process.time(at), row)
            truth = process.transition(states, at, certain(c.expand_as(states), K))
            p, model_p = (
                probabilities(t, len(states), states)
                for t in (truth, process.transition(states, at, clean))
            )
            some = (p > 1e-30) & (reach[:, None] > 0)
            gap = torch.where(some, p * (p.log() - model_p.clamp(min=1e-300).log()), 0.0)
            bound += float(reach @ gap.sum(1))
        assert bound > -float(law[table.index(c[None])].log()) - 1e-6

        def guess(x, i):
            return table(x, process.time(i), i)

        i = torch.arange(n) % process.steps
        loss = denoising_loss(process, guess, c.expand(n, L), i, torch.arange(n)).double()
        each = loss.view(-1, process.steps).mean(1)  # every step has its share
        error = float(each.std()) / math.sqrt(len(each))
        assert abs(float(each.mean()) - bound) < 3.5 * error < 0.25


def test_the_loss_of_a_masked_chain_is_a_cross_entropy():
    process = MaskedProcess.of(L, K, T)
    logits = drawn(0, 8, L, K)
    clean = every(K, L)[:8]
    i, key = torch.arange(8) % T, torch.arange(8)
    loss = denoising_loss(process, lambda x, i: subs(x, logits.log_softmax(-1)), clean, i, key)
    x = process.noised(clean, i, key)
    level = process.level
    u = ((level[:-1] - level[1:]) / level[:-1])[i]
    nats = -logits.log_softmax(-1).gather(-1, clean[..., None])[..., 0]
    expected = T * u * ((x == K) * nats).sum(1)
    torch.testing.assert_close(loss, expected.float(), rtol=1e-4, atol=1e-4)


@processes
def test_noised_tokens_have_the_forward_law(process):
    n, c = 6000, torch.tensor([0, 2])
    for i in range(T):
        x = process.noised(c.expand(n, L), torch.full((n,), i), torch.arange(n))
        q = noise(process, float(process.level[i]))[c]
        for site in range(L):
            share = torch.bincount(x[:, site], minlength=process.states) / n
            error = (q[site] * (1 - q[site]) / n).sqrt()
            assert ((share - q[site]).abs() <= 4.5 * error).all()
    clean = process.noised(c[None], torch.tensor([T]), torch.arange(1))
    assert torch.equal(clean[0], c)


@processes
def test_noise_is_the_same_in_any_batch(process):
    key = torch.arange(16) * 2**33 + 5
    x = process.prior(key)
    x[1::2, 0] = 1
    i = torch.arange(16) % T
    clean = drawn(0, 16, L, K).log_softmax(-1)
    law = process.transition(x, i, clean)

    def everything(n):
        one = CategoricalTransition(law.log_probs[:n], None if law.kept is None else law.kept[:n])
        return (
            process.prior(key[:n]),
            process.noised(x[:n].clamp(max=K - 1), i[:n], key[:n]),
            one.sample(key[:n]),
            one.rsample(key[:n], 0.5),
        )

    whole = everything(16)
    for n in range(1, 16):
        for part, all_ in zip(everything(n), whole, strict=True):
            assert torch.equal(part, all_[:n])
    assert len({tuple(v) for v in process.prior(key).tolist()}) > (1 if process.states == K else 0)


def test_what_is_impossible_stays_so_when_it_is_tilted():
    law = CategoricalTransition(torch.tensor([[[0.5, 0.5, 0.0]]]).log().clamp(min=NEVER))
    tilted = law.tilted(torch.tensor([[[1.0, 0.0, 1e6]]]))
    e = math.e / (1 + math.e)
    assert tilted.log_probs.exp()[0, 0].tolist() == pytest.approx([e, 1 - e, 0])


WRONG = {
    "schedule": (lambda: MaskedProcess.of(2, 3, 4, "linear"), "schedule='linear' is unknown"),
    "steps": (lambda: UniformProcess.of(2, 3, 0), "steps=0"),
    "steps-bool": (lambda: UniformProcess.of(2, 3, True), "steps=True"),
    "remask": (lambda: MaskedProcess.of(2, 3, 4, remask=1.5), "remask=1.5"),
    "ends": (
        lambda: MaskedProcess(2, 3, torch.ones(2), torch.tensor([0.9, 0.5, 0.0]).double()),
        "falling from 1 to 0",
    ),
    "rises": (
        lambda: MaskedProcess(2, 3, torch.ones(2), torch.tensor([1.0, 1.0, 0.0]).double()),
        "falling from 1 to 0",
    ),
    "lengths": (
        lambda: UniformProcess(2, 3, torch.ones(3), torch.tensor([1.0, 0.5, 0.0]).double()),
        "one more level than times",
    ),
    "relaxed": (
        lambda: MaskedProcess.of(2, 3, 4, remask=0.2).transition(
            torch.ones(1, 2, 4), torch.tensor([1]), torch.zeros(1, 2, 3)
        ),
        "remask: relaxed states",
    ),
}


@pytest.mark.parametrize(("call", "said"), WRONG.values(), ids=WRONG)
def test_one_clear_error(call, said):
    with pytest.raises(ValueError, match=said):
        call()


def test_schedules_fall_from_one_to_zero_and_tables_move():
    for name, schedule in SCHEDULES.items():
        assert float(schedule(torch.tensor(1.0))) == pytest.approx(1)
        assert float(schedule(torch.tensor(0.0))) == pytest.approx(0, abs=1e-7)
        process = MaskedProcess.of(2, 3, 7, name).to("cpu")
        assert process.steps == 7
        assert process.stochastic.all()
        assert (process.times.diff() < 0).all()
    half = MaskedProcess.of(2, 3, 2, "cosine")
    assert float(half.level[1]) == pytest.approx(math.cos(math.pi / 4))
