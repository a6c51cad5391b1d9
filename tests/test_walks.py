"""Independent walks: budgets, keys and ends, and the three samplers that live on them."""

import pytest
import torch

from samplers import Ancestral, BestOfN, Importance, Walked
from tests.fake_engine import FakeEngine, make_plan

INDEPENDENT = (Ancestral, BestOfN, Importance)
SD = torch.ones(6, dtype=torch.float64)


def run(sampler, reward=lambda x: x, sd=SD, fails=lambda id: False, room=64, shuffle=None, **plan):
    plan = make_plan(steps=len(sd) - 1, **plan)
    engine = FakeEngine(plan, sd, reward, room=room, shuffle=shuffle, fails=fails)
    state = engine.run(sampler)
    return engine, sampler.result(state), state


@pytest.mark.parametrize("kind", INDEPENDENT)
def test_the_budget_is_spent_to_the_last_whole_walk(kind):
    engine, draws, _ = run(kind(), conditions=3, nfe=104)
    assert engine.spent.tolist() == [100] * 3
    assert torch.bincount(draws.row).tolist() == [20] * 3
    assert draws.finished.all()
    assert (draws.root == draws.id).all()


@pytest.mark.parametrize("kind", INDEPENDENT)
def test_the_smallest_limit_counts(kind):
    assert len(run(kind(), nfe=100, reward_calls=7)[1].id) == 7
    assert len(run(kind(4), nfe=100)[1].id) == 4
    assert len(run(kind(4))[1].id) == 4


@pytest.mark.parametrize("kind", INDEPENDENT)
def test_conditions_of_different_cost_have_their_own_numbers(kind):
    plan = make_plan(steps=5, conditions=3, nfe=30)
    plan.cost[1] *= 2
    engine = FakeEngine(plan, SD)
    draws = kind().result(engine.run(kind()))
    assert torch.bincount(draws.row).tolist() == [6, 3, 6]
    assert engine.spent.tolist() == [30, 30, 30]


@pytest.mark.parametrize("kind", INDEPENDENT)
def test_no_order_or_room_changes_what_is_found(kind):
    first = run(kind(), conditions=2, nfe=200)[1]
    for room, shuffle in ((1, None), (3, 1), (17, 2), (1000, 3)):
        draws = run(kind(), conditions=2, nfe=200, room=room, shuffle=shuffle)[1]
        assert (draws.id == first.id).all()
        assert (draws.log_weight == first.log_weight).all()


@pytest.mark.parametrize("kind", INDEPENDENT)
def test_a_larger_budget_asks_for_the_same_walks_again(kind):
    def asked(nfe, **more):
        state = kind().init(make_plan(conditions=2, nfe=nfe, **more))
        rollouts = kind().ask(state, 1000)
        return set(zip(rollouts.row.tolist(), rollouts.key.tolist(), strict=True))

    small, large = asked(50), asked(100)
    assert len(small) == 20
    assert small < large
    assert not small & asked(50, seed=1)


@pytest.mark.parametrize("kind", INDEPENDENT)
def test_without_a_limit_but_time_it_never_ends(kind):
    sampler = kind()
    plan = make_plan(seconds=1.0)
    state = FakeEngine(plan, SD, room=30).run(sampler, stop_after=200)
    assert not sampler.done(state)
    assert len(sampler.result(state).id) >= 200


@pytest.mark.parametrize("kind", INDEPENDENT)
def test_failed_walks_are_told_and_never_drawn(kind):
    _, draws, state = run(kind(40), reward=lambda x: torch.where(x > 1, torch.nan, x))
    assert 0 < len(draws.id) < 40
    assert (state.reward[draws.id] <= 1).all()
    nothing = run(kind(5), fails=lambda id: True)[1]
    assert len(nothing.id) == 0
    assert nothing.log_z.isnan().all()


@pytest.mark.parametrize("kind", INDEPENDENT)
def test_nothing_told_is_no_result(kind):
    state = kind(3).init(make_plan())
    assert len(kind(3).result(state).id) == 0
    kind(3).ask(state, 2)
    assert not kind(3).done(state)


@pytest.mark.parametrize("kind", INDEPENDENT)
@pytest.mark.parametrize("n", [0, -1, 2.5, True, "10"])
def test_a_number_of_walks_that_is_none_is_refused(kind, n):
    with pytest.raises(ValueError, match="n="):
        kind(n)


@pytest.mark.parametrize("kind", INDEPENDENT)
def test_a_budget_below_one_walk_is_refused(kind):
    with pytest.raises(ValueError, match="affords no walk"):
        kind().init(make_plan(steps=50, nfe=49))
    with pytest.raises(ValueError, match="never end"):
        kind().init(make_plan())


def test_best_of_n_ranks_by_reward():
    _, draws, state = run(BestOfN(50), conditions=2)
    for row in range(2):
        reward = state.reward[draws.id[draws.row == row]]
        assert (reward.diff() <= 0).all()
    assert draws.ranked


def test_weights_are_those_of_the_tilt_and_the_guidance():
    plan = make_plan(lam=2.5)
    engine = FakeEngine(plan, SD, drift=0.1)
    for sampler in (Importance(30), BestOfN(30)):
        state = engine.run(sampler)
        engine.state.clear()
        draws = sampler.result(state)
        expected = 2.5 * state.reward[draws.id] + 5 * 0.1
        assert torch.allclose(draws.log_weight, expected)
        mean = expected.logsumexp(0) - torch.tensor(30.0).log()
        assert draws.log_z[0] == pytest.approx(float(mean))
    equal = Ancestral(30).result(engine.run(Ancestral(30)))
    assert (equal.log_weight == 0).all()


def test_rejection_keeps_each_walk_with_its_own_uniform():
    # λ reward = log(1/4) for all: 2,000 coins, s.e. sqrt(p (1 - p) / 2000) = .0097
    sampler = Importance(2000, rejection=True)
    _, draws, _ = run(sampler, reward=lambda x: x * 0 + torch.tensor(0.25).log())
    assert abs(len(draws.id) / 2000 - 0.25) < 4 * 0.0097
    assert (draws.log_weight == 0).all()
    assert draws.log_z[0] == pytest.approx(float(torch.tensor(0.25).log()))


def test_rejection_refuses_what_it_cannot_thin():
    sampler = Importance(50, rejection=True)
    with pytest.raises(ValueError, match=r"needs rewards <= 0 and got .*: subtract"):
        run(sampler)
    with pytest.raises(ValueError, match="guided"):
        FakeEngine(make_plan(), SD, lambda x: -x.abs(), drift=0.1).run(sampler)
    everything_failed = run(sampler, fails=lambda id: True)[1]
    assert len(everything_failed.id) == 0


def test_a_repeated_answer_changes_nothing():
    sampler = Importance(3)
    state = sampler.init(make_plan())
    id = sampler.ask(state, 3).id
    one = torch.ones(1, dtype=torch.float64)
    first = Walked(id[:1], one, 0 * one, torch.tensor([False]))
    again = Walked(id[[0, 0]], torch.tensor([9.0, 8.0]).double(), one.expand(2), torch.ones(2) > 0)
    sampler.tell(state, first)
    sampler.tell(state, again)
    assert sampler.result(state).log_weight.tolist() == [1.0]
    assert state.waiting == 2
