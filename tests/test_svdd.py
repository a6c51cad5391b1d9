"""SVDD's books: what is asked for, chosen, let go and paid. Its laws are in tests/exact."""

import math
import random

import pytest
import torch

from samplers import SVDD
from samplers.core import PRIOR
from tests.fake_engine import Recorder, make_plan

STEPS = 6
SD = torch.ones(STEPS + 1, dtype=torch.float64)
SAMPLERS = [SVDD(proposals=3), SVDD(proposals=3, levels=(2, 5), selection="argmax")]


def run(sampler, reward=lambda x: x, stop_after=None, room=64, shuffle=None, fails=None, **plan):
    fails = fails or (lambda id: False)
    plan = make_plan(steps=STEPS, **plan)
    engine = Recorder(plan, SD, reward, room=room, shuffle=shuffle, fails=fails)
    state = engine.run(sampler, stop_after)
    return engine, sampler.result(state), state


def same(a, b) -> bool:
    names = ("id", "row", "log_weight", "root", "finished", "log_z")
    return all(getattr(a, n).nan_to_num(-7).equal(getattr(b, n).nan_to_num(-7)) for n in names)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_order_or_room_changes_what_is_found(sampler):
    def found(**how):
        return run(sampler, conditions=2, nfe=250, fails=lambda id: id % 7 == 3, **how)[1]

    whole = found()
    assert len(whole.id) > 10
    for how in ({"room": 3}, {"room": 400}, {"shuffle": 0}, {"room": 5, "shuffle": 1}):
        assert same(found(**how), whole)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_condition_alone_is_the_same_as_among_others(sampler):
    alone, among = (run(sampler, nfe=200, conditions=n)[1] for n in (1, 3))
    assert among.log_weight[among.row == 0].equal(alone.log_weight)
    assert among.log_z[0].nan_to_num(-7).equal(alone.log_z[0].nan_to_num(-7))
    assert not same(alone, run(sampler, nfe=200, seed=1)[1])


@pytest.mark.parametrize("reuses", [True, False])
@pytest.mark.parametrize("sampler", [SVDD(), SVDD(proposals=3, levels=(2, 4))])
def test_the_budget_is_spent_to_the_last_whole_particle(sampler, reuses):
    looks = 5 if sampler.levels is None else 2
    each = sampler.proposals * (STEPS if reuses else STEPS + looks)
    engine, draws, _ = run(sampler, nfe=3 * each + each - 1, conditions=2, reuses=reuses)
    assert engine.spent.tolist() == [3 * each] * 2
    assert engine.scored.tolist() == [3 * sampler.proposals * (looks + 1)] * 2
    assert draws.finished.all()
    assert torch.bincount(draws.row).tolist() == [3 * sampler.proposals] * 2
    with pytest.raises(ValueError, match=rf"affords no particle of {sampler.proposals} proposals"):
        sampler.init(make_plan(steps=STEPS, nfe=each - 1, reuses=reuses))


def test_the_smallest_limit_counts():
    assert run(SVDD(proposals=2), nfe=100, reward_calls=37)[0].scored.tolist() == [36]
    assert len(run(SVDD(2, 3), nfe=1000)[1].id) == 6
    assert len(run(SVDD(2, 3))[1].id) == 6
    state = run(SVDD(proposals=3), seconds=1.0, stop_after=400)[2]
    assert not SVDD().done(state)


def test_every_proposal_walks_under_a_key_of_its_own_from_the_one_kept():
    engine, draws, _ = run(SVDD(4, 3))
    key, start, src = (engine.column(name) for name in ("key", "start", "src"))
    assert len(key.unique()) == len(key) == 4 * 3 * STEPS
    assert (src[start == 0] == PRIOR).all()
    for step in range(1, STEPS):
        _, times = src[start == step].unique(return_counts=True)
        assert times.tolist() == [3] * 4  # one state of each particle
    roots = engine.column("id")[start == 0]
    assert torch.isin(draws.root, roots).all()
    assert len(draws.root.unique()) == 4


def test_a_particle_weighs_what_its_line_says():
    """W and the choice's frequencies, computed again from the answers."""
    engine, draws, _ = run(SVDD(3, 4, levels=(1, 3)), lam=0.7)
    reward = dict(zip(engine.column("id").tolist(), engine.rewards, strict=True))
    legs = {stop: engine.column("stop") == stop for stop in (1, 3, STEPS)}
    ids, src = engine.column("id"), engine.column("src")
    for root in draws.root.unique().tolist():
        mine, log_w, kept = (ids[legs[1]] // 4 == root // 4), 0.0, None
        for stop in (1, 3, STEPS):
            if kept is not None:
                mine = src[legs[stop]] == kept
            v = torch.tensor([0.7 * reward[i] for i in ids[legs[stop]][mine].tolist()])
            log_w += float(v.double().logsumexp(0)) - math.log(4)
            if stop == STEPS:
                break
            (kept,) = set(src.tolist()) & set(ids[legs[stop]][mine].tolist())
            log_w -= 0.7 * reward[kept]
        total = float(draws.log_weight[draws.root == root].logsumexp(0))
        assert total == pytest.approx(log_w, abs=1e-5)  # float32 on this side
    mean = draws.log_weight.logsumexp(0) - math.log(3)
    assert float(draws.log_z[0]) == pytest.approx(float(mean))


def test_argmax_keeps_the_best_at_every_level_and_says_so():
    sampler = SVDD(5, 4, selection="argmax")
    engine, draws, _ = run(sampler)
    reward = dict(zip(engine.column("id").tolist(), engine.rewards, strict=True))
    src, stop, ids = (engine.column(name) for name in ("src", "stop", "id"))
    for level in range(1, STEPS):
        groups = ids[stop == level].view(-1, 4).tolist()
        best = {max(group, key=reward.__getitem__) for group in groups}
        assert set(src[engine.column("start") == level].tolist()) == best
    assert len(draws.id) == 5
    assert (draws.log_weight == 0).all()
    assert draws.biased == "the best of 4 proposals at every level"
    assert draws.log_z.isnan().all()
    assert run(SVDD(5, 4))[1].biased == ""


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_states_that_nobody_walks_from_again_are_let_go(sampler):
    engine, draws, state = run(sampler, nfe=200)
    kept = {id for id in set(engine.state) - set(state.drop) if engine.state[id][0] < STEPS}
    assert not kept
    assert set(draws.id.tolist()) <= set(engine.state) - set(state.drop)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("told", [0, 2, 10, 50, 100])
def test_a_result_can_be_had_at_any_time(sampler, told):
    engine, draws, state = run(sampler, nfe=200, stop_after=told, shuffle=1, conditions=2)
    assert draws.log_weight.isfinite().all()
    assert set(draws.id.tolist()) <= set(engine.state) - set(state.drop)
    at = torch.tensor([engine.state[i][0] for i in draws.id.tolist()])
    assert draws.finished.equal(at == STEPS)


def test_a_failed_proposal_is_never_kept_and_counts_in_no_mean():
    dead = {0, 1, 5, 17}  # handles: a particle has six legs of three
    engine, draws, _ = run(SVDD(2, 3), fails=lambda id: id in dead)
    assert not torch.isin(engine.column("src"), torch.tensor(sorted(dead))).any()
    assert not torch.isin(draws.id, torch.tensor(sorted(dead))).any()
    assert len(draws.id) == 5
    # with equal rewards all weights are equal, whatever has failed on the way
    flat = run(SVDD(2, 3), reward=lambda x: 0 * x + 2.0, fails=lambda id: id in dead)[1]
    assert float(flat.log_z[0]) == pytest.approx(2.0)


def test_a_particle_whose_proposals_all_fail_ends_without_an_item():
    draws = run(SVDD(3, 3), fails=lambda id: id in (3, 4, 5))[1]
    assert len(draws.id) == 6
    assert draws.log_z.isfinite().all()
    nothing = run(SVDD(3, 3), fails=lambda id: True)[1]
    assert len(nothing.id) == 0
    assert nothing.log_z.isnan().all()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_hostile_rewards(sampler):
    chance = random.Random(0)
    values = (math.nan, math.inf, -math.inf, 1e308, -1e308, 0.0, 1.0)
    for _ in range(100):
        given = {k: chance.choice(values) for k in range(7)}

        def reward(x, given=given):
            return torch.tensor([given[int(v.abs() * 100) % 7] for v in x], dtype=torch.float64)

        draws = run(sampler, reward, nfe=60, lam=chance.choice([0.0, 1.0, 10.0]))[1]
        assert not draws.log_weight.isnan().any()
        assert (draws.log_weight < torch.inf).all()


def test_steps_that_draw_no_noise_get_no_proposals():
    noisy = torch.tensor([True, True, False, True, True, False])
    state = SVDD(2, 3).init(make_plan(steps=STEPS, stochastic=noisy))
    # not at 3, between which and 2 nothing is drawn, nor at 5, after which nothing is
    assert state.stops == [1, 2, 4, STEPS]
    with pytest.raises(ValueError, match="no step from 2 to 3 draws noise, so there is nothing"):
        SVDD(2, levels=(2, 3)).init(make_plan(steps=STEPS, stochastic=noisy))
    with pytest.raises(ValueError, match="no step from 5 to 6 draws noise"):
        SVDD(2, levels=(5,)).init(make_plan(steps=STEPS, stochastic=noisy))


@pytest.mark.parametrize("steps", [1, 6])
def test_without_noise_on_the_way_it_names_what_to_use(steps):
    quiet = torch.zeros(steps, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"SVDD finds no level .* BestOfN, ZeroOrder"):
        SVDD(2).init(make_plan(steps=steps, stochastic=quiet))


@pytest.mark.parametrize("levels", [(), (0, 5), (5, 5), (3, STEPS), (-1,), (2.5,)])
def test_levels_off_the_grid_are_refused(levels):
    with pytest.raises(ValueError, match="levels="):
        SVDD(2, levels=levels).init(make_plan(steps=STEPS))
