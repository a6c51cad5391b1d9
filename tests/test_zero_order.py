"""Zero-order search: neighbours of the best noise so far, all walks paid for and none repeated."""

import math

import pytest
import torch

from samplers import BestOfN, ZeroOrder, sample
from samplers.core import PRIOR
from steering.core import Model
from steering.noise import normal
from tests.brownian import brownian, first
from tests.exact import finite_chain
from tests.fake_engine import Recorder, make_plan
from tests.test_svdd import same

STEPS = 3
SD = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)  # the reward is x_T: an ODE
SMALL = ZeroOrder(neighbours=3, pivots=2)


def run(sampler, reward=lambda x: x, sd=SD, stop_after=None, room=64, shuffle=None, **plan):
    fails = plan.pop("fails", lambda id: False)
    plan = make_plan(steps=STEPS, **plan)
    engine = Recorder(plan, sd, reward, room=room, shuffle=shuffle, fails=fails)
    state = engine.run(sampler, stop_after)
    return engine, sampler.result(state), state


@pytest.mark.parametrize("sampler", [ZeroOrder(), SMALL])
@pytest.mark.parametrize("sd", [SD, torch.ones(4).double()], ids=["ode", "noisy"])
def test_no_order_or_room_changes_what_is_found(sampler, sd):
    def found(**how):
        return run(sampler, sd=sd, conditions=2, nfe=200, fails=lambda id: id % 14 == 3, **how)[1]

    whole = found()
    assert len(whole.id) > 100
    for how in ({"room": 3}, {"room": 400}, {"shuffle": 0}, {"room": 5, "shuffle": 1}):
        assert same(found(**how), whole)


def test_a_condition_alone_is_the_same_as_among_others():
    alone, among = (run(SMALL, nfe=200, conditions=n)[1] for n in (1, 3))
    assert among.log_weight[among.row == 0].equal(alone.log_weight)
    assert not same(alone, run(SMALL, nfe=200, seed=1)[1])


def test_every_row_is_a_walk_and_planting_costs_nothing():
    engine, draws, _ = run(SMALL, nfe=100, conditions=2)
    assert engine.spent.tolist() == [99] * 2
    assert engine.scored.tolist() == [33] * 2
    assert draws.finished.all()
    assert draws.ranked
    assert torch.bincount(draws.row).tolist() == [33] * 2
    assert len(run(SMALL, nfe=1000, reward_calls=7)[1].id) == 7
    assert len(run(ZeroOrder(5))[1].id) == 5
    assert len(run(ZeroOrder(3, pivots=8))[1].id) == 3
    assert not SMALL.done(run(SMALL, seconds=1.0, stop_after=300)[2])


def test_conditions_of_different_cost_have_their_own_numbers():
    plan = make_plan(steps=STEPS, conditions=2, nfe=60)
    plan.cost[1] *= 2
    engine = Recorder(plan, SD)
    draws = SMALL.result(engine.run(SMALL))
    assert torch.bincount(draws.row).tolist() == [20, 10]
    assert engine.spent.tolist() == [60, 60]


def test_every_round_turns_the_best_noise_so_far():
    engine, draws, _ = run(ZeroOrder(41, neighbours=2, angle=0.7, pivots=1))
    ids, src, stop, key = (engine.column(name) for name in ("id", "src", "stop", "key"))
    angle = engine.column("angle")
    reward = dict(zip(ids.tolist(), engine.rewards, strict=True))
    began = dict(zip(ids.tolist(), src.tolist(), strict=True))
    by_key = {k: i for i, k in zip(ids[stop > 0].tolist(), key[stop > 0].tolist(), strict=True)}
    walks = ids[stop == STEPS].tolist()
    best, noise, moved = walks[0], PRIOR, 0
    for group in torch.tensor(walks[1:]).view(-1, 2).tolist():
        (here,) = {began[i] for i in group}
        moved += here != noise
        noise = here
        # the noise walked from was planted under the key of the best walk of all before
        assert by_key[int(key[ids == here])] == best
        best = max([best, *group], key=reward.__getitem__)
    assert 3 < moved < 15  # of 20 rounds some bring nothing better
    assert (angle[src != PRIOR] == 0.7).all()
    assert angle[src == PRIOR].isnan().all()
    assert len(key[stop == STEPS].unique()) == 41  # the noise of no two walks is the same
    assert reward[int(draws.id[0])] == max(reward[i] for i in walks)


def test_neighbours_are_turned_noise_to_the_bit_of_their_keys():
    """On the engine, with a chain that ends where it begins: items are the noises themselves."""
    model = brownian(ode=True, steps=2, dim=5)
    sampler = ZeroOrder(7, neighbours=6, angle=0.4, pivots=1)
    run = sample(model, first, sampler, batch=3, progress=False)
    noises = {
        w.key: run._engine.store.get([w.entry])[0] for w in run._engine.record.walks if w.stop
    }
    pivot = run._engine.record.walks[0].key
    for key, x in noises.items():
        z = normal(torch.tensor([key]), (5,))[0]
        turned = math.cos(0.4) * noises[pivot] + math.sin(0.4) * z
        assert torch.allclose(x, z if key == pivot else turned, atol=1e-6)  # float32 rounding
    assert run.nfe == 7 * 2


def test_a_neighbour_is_a_draw_of_the_prior_that_agrees_by_the_cosine():
    """4,000 pivots with a neighbour each: variance 1 within sqrt(2 / n), correlation cos(angle)
    within (1 - cos²) / sqrt(n), and the better of the two is sqrt((1 - cos) / pi) on average."""
    n, angle = 4000, 0.9
    engine, draws, _ = run(ZeroOrder(2, neighbours=1, angle=angle, pivots=1), conditions=n, room=n)
    reward = {i: engine.state[i][1] for i in draws.id.tolist()}
    pivot = torch.tensor([reward[2 * r + 1] for r in range(n)])
    turned = torch.tensor([reward[2 * (n + r) + 1] for r in range(n)])
    cos = math.cos(angle)
    assert abs(float(turned.var()) - 1) < 3 * math.sqrt(2 / n)
    assert abs(float(turned.mean())) < 3 / math.sqrt(n)
    found = float(torch.corrcoef(torch.stack([pivot, turned]))[0, 1])
    assert abs(found - cos) < 3 * (1 - cos**2) / math.sqrt(n)
    best = torch.maximum(pivot, turned)
    truth = math.sqrt((1 - cos) / math.pi)
    assert abs(float(best.mean()) - truth) < 3 * float(best.std()) / math.sqrt(n)


def test_climbing_finds_more_than_chance():
    """Rewards N(0, 1) that turn with the noise. The best of 121 draws is 2.6 ± .4; a climb rises to
    where turning away costs what the best of 8 neighbours brings, far above: ahead in 20 of 20."""
    climbed = run(ZeroOrder(pivots=1), nfe=121 * STEPS, conditions=20)
    chance = run(BestOfN(), nfe=121 * STEPS, conditions=20)
    best = [
        torch.stack([max_of(engine, draws, r) for r in range(20)])
        for engine, draws, _ in (climbed, chance)
    ]
    assert (best[0] > best[1]).all()


def max_of(engine, draws, row):
    return max(torch.tensor(engine.state[i][1]) for i in draws.id[draws.row == row].tolist())


def test_noises_that_nobody_turns_again_are_let_go():
    engine, draws, state = run(SMALL, nfe=300)
    kept = [i for i in set(engine.state) - set(state.drop) if engine.state[i][0] == 0]
    assert len(kept) <= 2  # one of each pivot
    assert {i for i in engine.state if i % 2} == set(draws.id.tolist())


def test_a_failed_walk_is_never_turned():
    dead = {1, 9, 11, 13}  # the first noise of a pivot, and neighbours
    engine, draws, _ = run(SMALL, nfe=100, fails=lambda id: id in dead)
    planted = engine.column("id")[engine.column("stop") == 0]
    assert not torch.isin(planted, torch.tensor([8, 10, 12])).any()
    assert not torch.isin(draws.id, torch.tensor(sorted(dead))).any()
    assert len(draws.id) == 33 - 4
    nothing = run(SMALL, nfe=100, fails=lambda id: id % 2 == 1)
    assert len(nothing[1].id) == 0
    assert nothing[0].scored.tolist() == [33]  # it goes on around the noise it has
    hostile = run(SMALL, nfe=100, reward=lambda x: torch.where(x > 0, torch.nan, 1e308 * x))[1]
    assert not hostile.log_weight.isnan().any()


@pytest.mark.parametrize("told", [0, 1, 5, 20])
def test_a_result_can_be_had_at_any_time(told):
    engine, draws, state = run(SMALL, nfe=200, stop_after=told, shuffle=1, conditions=2)
    assert set(draws.id.tolist()) <= set(engine.state) - set(state.drop)
    assert draws.finished.all()
    assert len(draws.id.unique()) == len(draws.id)


def test_a_larger_budget_begins_with_the_same_walks():
    for few, many in ((10, 11), (13, 40), (26, 27)):
        (small, *_), (large, *_) = (run(SMALL, nfe=n * STEPS) for n in (few, many))
        assert set(small.column("key").tolist()) <= set(large.column("key").tolist())
        assert set(small.column("id").tolist()) <= set(large.column("id").tolist())


def test_chains_that_begin_with_tokens_are_refused_before_the_first_row():
    model: Model = finite_chain()
    with pytest.raises(ValueError, match="starts from tokens: use BestOfN"):
        sample(model, lambda x, _: x[:, 0, 0], ZeroOrder(), nfe=100, progress=False)


def test_a_budget_below_a_walk_is_refused():
    with pytest.raises(ValueError, match="affords no walk"):
        ZeroOrder().init(make_plan(steps=50, nfe=49))
    with pytest.raises(ValueError, match="never end"):
        ZeroOrder().init(make_plan())
