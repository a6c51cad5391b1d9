"""Advice: what the pilot measures is right, and what follows from it is what should pay."""

from __future__ import annotations

import math
import time

import pytest
import torch

from samplers import SMC, BestOfN, Importance, TreeSampling, TreeSearch, advise, sample
from samplers.core import Budget
from samplers.engine import Engine, Settings
from samplers.probe import Probe
from steering.core import Model
from tests.brownian import Brownian, Walk, brownian, first

QUIET = {"progress": False}


def rare(items, prompts):
    """exp of it is about .001 under N(0, 1): a narrow peak three deviations out."""
    return -((items[:, 0] - 3.5) ** 2) * 6


def probe(model, reward, **budget):
    engine = Engine(model, reward, None, Settings(64))
    plan = engine.plan(1.0, 0, Budget(**budget))
    state = Probe().init(plan)
    assert engine.run(Probe(), state, plan) == "done"
    return engine, state


def test_siblings_and_guesses_correlate_as_the_chain_says():
    """A random walk of T steps: what two walks share up to step i is i/T of their variance, and so
    is the squared correlation of the clean guess with the end."""
    engine, state = probe(brownian(steps=50), first, nfe=200_000)
    assert state.stops == (10, 20, 28, 35, 40, 44, 50)
    for k, step in enumerate(state.stops[:-1]):
        pairs, looks = (torch.tensor(f(k, 0)).T for f in (state.pairs, state.looks))
        assert pairs.shape[1] * 4 == looks.shape[1] > 2000
        share = step / 50
        # standard error of a correlation: (1 - rho²) / sqrt(n)
        for found, rho in ((pairs, share), (looks, math.sqrt(share))):
            error = (1 - rho**2) / math.sqrt(found.shape[1])
            assert abs(float(torch.corrcoef(found)[0, 1]) - rho) < 4 * error
    assert int(engine.ledger.rows) <= 200_000
    assert int(engine.ledger.rows) > 195_000


def test_the_pilot_shares_no_noise_with_the_run():
    advice = advise(brownian(), first, nfe=5000, seed=3, **QUIET)
    run = sample(brownian(), first, Importance(), nfe=1000, seed=3, **QUIET)
    _, state = probe(brownian(), first, nfe=1000)
    assert not set(run.rewards.tolist()) & set(state.rewards(0).tolist())
    assert advice.pilot_rows <= 500


@pytest.mark.parametrize("conditions", [1, 3])
def test_every_condition_is_looked_at_and_failures_are_counted(conditions):
    model = brownian(prompts=("a", "b", "c")[:conditions])
    fails = lambda x, p: torch.where(x[:, 1] > 1, torch.nan, x[:, 0])  # noqa: E731
    engine, state = probe(model, fails, nfe=3000)
    for row in range(conditions):
        assert 10 < len(state.rewards(row)) < 190
        assert state.rewards(row).isfinite().all()
        assert all(len(state.pairs(k, row)) > 3 for k in range(6))
    assert (engine.ledger.rows <= 3000).all()
    assert advise(model, fails, nfe=20_000, **QUIET).failed > 0


def test_common_rewards_want_importance_sampling():
    advice = advise(brownian(steps=50), first, nfe=20_000, lam=0.5, **QUIET)
    assert advice.sampler == Importance()
    # ESS per draw of exp(x / 2) under N(0, 1) is exp(-1/4); 20 or so walks say it to .2
    assert abs(advice.share - math.exp(-0.25)) < 0.2
    assert "effective draws" in str(advice)
    assert advice.nfe + advice.pilot_rows == 20_000


def test_without_a_budget_it_recommends_one():
    advice = advise(brownian(steps=50), first, lam=0.5, **QUIET)
    assert advice.sampler == Importance()
    walks = advice.nfe / 50
    assert walks == math.ceil(100 / advice.share)
    assert f"{advice.nfe} network rows per prompt give about 100" in str(advice)


def test_a_reward_that_cannot_read_guesses_is_still_judged_by_its_ends():
    """nan on every half-denoised guess: the ends are all there, and nothing foretells them."""

    def on_data(x, prompts):
        return torch.where(x.abs().amax(1) < 0.3, torch.nan, x[:, 0])

    advice = advise(brownian(steps=50), on_data, nfe=20_000, **QUIET)
    assert advice.walks + advice.failed == 24
    assert advice.failed < 8  # of two normals both are below .3 in 1 of 18 cases


def test_slow_rewards_do_not_count_as_slow_rows():
    def slow(x, prompts):
        time.sleep(0.01)
        return first(x, prompts)

    quick, waited = (advise(brownian(), r, nfe=2000, **QUIET) for r in (first, slow))
    assert waited.seconds_per_row < 5 * quick.seconds_per_row + 1e-3
    assert waited.seconds_per_reward > quick.seconds_per_reward


def test_rare_rewards_that_show_early_want_resampling():
    advice = advise(brownian(steps=50), rare, nfe=100_000, **QUIET)
    assert isinstance(advice.sampler, SMC)
    assert "foretells" in str(advice)


class Late(Walk):
    """A guess that knows nothing of the end: the mean of the data, whatever the state."""

    def __call__(self, x, t, row):
        return super().__call__(x, t, row) * 0


class Ahead(Brownian):
    """The chain of `Brownian`, whose clean guess plays no part in it."""

    def transition(self, x, i, clean):
        return super().transition(x, i, x)


def test_rare_rewards_that_cannot_be_foreseen_want_a_tree():
    advice = advise(Model(Late(), Ahead(50, 2)), rare, nfe=100_000, **QUIET)
    assert isinstance(advice.sampler, TreeSampling)
    assert max(advice.foreseen) < 0.5 < max(advice.agree)


def test_a_search_wants_something_to_follow():
    advice = advise(brownian(steps=50), first, nfe=50_000, goal="best", **QUIET)
    assert isinstance(advice.sampler, TreeSearch)
    ode = advise(brownian(steps=50, ode=True), first, nfe=50_000, goal="best", **QUIET)
    assert ode.sampler == BestOfN()


def test_what_cannot_be_advised_on_is_refused_before_the_first_row():
    model = brownian()
    for wrong, named in (
        ({"nfe": 300}, "nfe=300"),
        ({"goal": "fun"}, "goal"),
        ({"lam": -1.0}, "lam"),
        ({"lam": "1"}, "lam"),
        ({"pilot": 0}, "pilot=0"),
        ({"nfe": 0}, "nfe=0"),
        ({"pilot": 30}, "nfe=30"),
    ):
        with pytest.raises(ValueError, match=named):
            advise(model, first, **wrong, **QUIET)
    assert model.denoiser.rows_seen == []
    with pytest.raises(ValueError, match="the reward failed"):
        advise(model, lambda x, p: x[:, 0] * math.nan, nfe=5000, **QUIET)
