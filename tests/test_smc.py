"""SMC's books: barriers, copies, budgets, failures. Its laws are in tests/exact."""

import math

import pytest
import torch

from samplers import SMC, Walked
from samplers.core import PRIOR
from tests.fake_engine import FakeEngine, Recorder, make_plan

STEPS = 10
SD = torch.ones(STEPS + 1, dtype=torch.float64)
LEVELS = (2, 4, 6, 8)


def run(sampler, reward=lambda x: x, stop_after=None, room=64, shuffle=None, fails=None, **plan):
    engine = Recorder(
        make_plan(steps=STEPS, **plan),
        SD,
        reward,
        room=room,
        shuffle=shuffle,
        fails=fails or (lambda id: False),
    )
    state = engine.run(sampler, stop_after)
    return engine, sampler.result(state), state


@pytest.mark.parametrize("potential", ["difference", "max", "add"])
def test_no_order_or_room_changes_what_is_found(potential):
    sampler = SMC(8, potential=potential, ess=1.0)
    first = run(sampler, conditions=2, nfe=250)[1]
    for room, shuffle in ((5, None), (7, 1), (400, 2)):
        draws = run(sampler, conditions=2, nfe=250, room=room, shuffle=shuffle)[1]
        assert draws.log_weight.sort()[0].equal(first.log_weight.sort()[0])
        assert draws.log_z.equal(first.log_z)


def test_one_condition_alone_is_the_same_as_among_others():
    sampler = SMC(30)
    alone, among = run(sampler)[1], run(sampler, conditions=3)[1]
    first = among.row == 0
    assert among.log_weight[first].sort()[0].equal(alone.log_weight.sort()[0])


def test_every_copy_walks_on_under_a_key_of_its_own():
    engine, draws, _ = run(SMC(50, ess=1.0))
    key, start, src = (engine.column(name) for name in ("key", "start", "src"))
    assert len(key.unique()) == len(key) == 50 * (len(LEVELS) + 1)
    second = src[start == LEVELS[0]]
    assert len(second.unique()) < 50  # some were copied, from one kept state each
    assert (src[start == 0] == PRIOR).all()
    assert len(draws.id.unique()) == len(draws.id) == 50
    roots = engine.column("id")[start == 0]
    assert torch.isin(draws.root, roots).all()
    assert len(draws.root.unique()) < 50


def test_states_that_nobody_walks_from_again_are_let_go():
    engine, draws, state = run(SMC(20, ess=1.0), nfe=20 * STEPS * 3)
    # all but the last request's: items at the data, and the last level of the last population
    kept = set(engine.state) - set(state.drop)
    assert kept == set(draws.id.tolist())


@pytest.mark.parametrize("reuses", [True, False])
def test_the_budget_is_never_overrun_and_none_is_left_unscored(reuses):
    # a kept state's look is its copies' first row, but for an engine that cannot reuse it
    for nfe in (40, 99, 234):
        for sampler in (SMC(), SMC(2)):
            engine, draws, _ = run(sampler, nfe=nfe, conditions=2, reuses=reuses)
            if not reuses:
                assert (engine.spent <= nfe).all()
            assert draws.finished.all()
            assert len(draws.id) == int((engine.column("stop") == STEPS).sum())


def test_tempered_rewards_count_by_their_levels_share():
    """log G_k = λ (β_k r_k - β_{k-1} r_{k-1})."""
    sampler = SMC(5, ess=0.0, levels=(3, 7), tempering=0.005)
    engine, draws, state = run(sampler, lam=0.6)
    reward, stop = torch.tensor(engine.rewards, dtype=torch.float64), engine.column("stop")
    spent = 0.6 * (1.005**70 - 1) * reward[stop == 7]  # what was spent at level 3 cancels
    torch.testing.assert_close(state.populations[0].spent, spent)
    # not resampled, a particle's weight is λ r in the end, whatever was spent on the way
    expected = 0.6 * reward[stop == STEPS] - math.log(5)
    torch.testing.assert_close(draws.log_weight, expected)


def test_reward_calls_limit_the_particles():
    engine, draws, _ = run(SMC(), reward_calls=53)
    assert engine.scored.tolist() == [50]
    assert len(draws.id) == 10


def test_more_budget_adds_populations_and_keeps_the_first():
    def walks(nfe):
        engine, draws, _ = run(SMC(10), nfe=nfe, conditions=2, room=1000)
        return set(engine.column("key").tolist()), len(draws.id)

    (few, n), (many, m) = walks(10 * STEPS), walks(30 * STEPS)
    assert few < many
    assert (n, m) == (20, 60)


def test_all_of_the_budget_is_one_population_and_more_keeps_its_size():
    sampler = SMC()
    _, draws, state = run(sampler, nfe=205, room=1000)
    assert len(draws.id) == 20
    fixed = sampler.resolved(state)
    assert fixed.particles == 20
    assert len(run(fixed, nfe=405)[1].id) == 40


def test_without_a_budget_one_population_walks():
    assert len(run(SMC(10))[1].id) == 10


def test_populations_are_merged_by_their_estimates():
    draws = run(SMC(10, ess=1.0), nfe=30 * STEPS)[1]
    each = [run(SMC(10, ess=1.0), nfe=n * 10 * STEPS)[1].log_z.exp()[0] for n in (1, 2, 3)]
    z = [each[0], 2 * each[1] - each[0], 3 * each[2] - 2 * each[1]]
    total = [float(w.exp().sum()) for w in draws.log_weight.split(10)]
    assert total == pytest.approx([float(v) for v in z])


def test_failed_particles_have_no_copy_and_no_weight():
    dead = {3, 4, 5, 25, 47}  # ids of legs
    engine, draws, _ = run(SMC(10, ess=1.0), fails=lambda id: id in dead)
    assert not torch.isin(engine.column("src"), torch.tensor(sorted(dead))).any()
    assert len(draws.id) == 9  # the fifth leg's 47 failed; earlier failures were resampled away
    assert draws.log_weight.isfinite().all()


def test_without_resampling_a_failed_particle_leaves_its_place_empty():
    engine, draws, _ = run(SMC(10, ess=0.0), fails=lambda id: id in {3, 4})
    assert len(draws.id) == 8
    assert len(engine.column("id")) == 10 + 4 * 8
    reward = torch.stack([torch.tensor(engine.state[i][1]) for i in draws.id.tolist()])
    assert draws.log_z[0] == pytest.approx(float(reward.logsumexp(0) - torch.tensor(8.0).log()))


def test_when_all_fail_the_population_ends_without_an_item():
    draws = run(SMC(10), fails=lambda id: id < 10, nfe=20 * STEPS)[1]
    assert len(draws.id) == 10  # of the second population
    assert draws.log_z.isfinite().all()
    nothing = run(SMC(10), fails=lambda id: True)[1]
    assert len(nothing.id) == 0
    assert nothing.log_z.isnan().all()


@pytest.mark.parametrize("told", [0, 1, 25, 60, 165, 199])
def test_a_result_can_be_had_at_any_time(told):
    engine, draws, state = run(SMC(20, ess=1.0), stop_after=told, shuffle=1, conditions=2)
    assert draws.log_weight.isfinite().all()
    assert len(draws.id.unique()) == len(draws.id)
    assert set(draws.id.tolist()) <= set(engine.state) - set(state.drop)
    at = torch.tensor([engine.state[i][0] for i in draws.id.tolist()])
    assert draws.finished.equal(at == STEPS)


@pytest.mark.parametrize("ess", [0.0, 1.0])
@pytest.mark.parametrize("potential", ["difference", "max", "add"])
def test_potentials_along_a_line_of_descent(potential, ess):
    # stopped on the way to the data: what stands at the last level carries the weights so far
    k, sampler = 6, SMC(6, potential, levels=LEVELS, ess=ess)
    engine = Recorder(make_plan(steps=STEPS, lam=0.5), SD)
    state = sampler.init(engine.plan)
    reward, descent = {}, {}
    for _ in LEVELS:
        asked = sampler.ask(state, 100)
        answers = engine.walk(asked)
        for (id, r, *_), src in zip(answers, asked.src.tolist(), strict=True):
            reward[id], descent[id] = r, [*descent.get(src, []), id]
        columns = [torch.tensor(c) for c in zip(*answers, strict=True)]
        sampler.tell(state, Walked(*columns))
    sampler.ask(state, 100)
    population = state.populations[0]
    for slot, id in enumerate(population.here.tolist()):
        r = [reward[i] for i in descent[id]]
        log_g = {
            "difference": [b - a for a, b in zip([0.0, *r], r, strict=False)],
            "max": [max(r[: n + 1]) for n in range(len(r))],
            "add": [sum(r[: n + 1]) for n in range(len(r))],
        }[potential]
        assert float(population.spent[slot]) == pytest.approx(0.5 * sum(log_g))
        assert float(population.log_w[slot]) == pytest.approx(0.0 if ess else 0.5 * sum(log_g))
    assert len(population.here) == k


def test_guided_walks_carry_their_ratio():
    plan = make_plan(steps=STEPS)
    plain, guided = (FakeEngine(plan, SD, drift=d) for d in (0.0, 0.3))
    sampler = SMC(20, ess=1.0)
    a, b = (sampler.result(e.run(sampler)) for e in (plain, guided))
    assert b.log_z[0] - a.log_z[0] == pytest.approx(0.3 * STEPS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"particles": 1}, "particles=1"),
        ({"particles": 4.0}, "particles=4.0"),
        ({"potential": "diff"}, "potential='diff' is unknown: give one of difference, max, add"),
        ({"scheme": "residual"}, "scheme='residual' is unknown"),
        ({"ess": 2}, "ess=2"),
        ({"ess": -0.1}, "ess=-0.1"),
    ],
)
def test_bad_settings_are_refused_where_they_are_made(arguments, message):
    with pytest.raises(ValueError, match=message):
        SMC(**arguments)


@pytest.mark.parametrize("levels", [(), (0, 5), (5, 5), (3, STEPS), (-1,), (2.5,)])
def test_levels_off_the_grid_are_refused(levels):
    with pytest.raises(ValueError, match="levels="):
        SMC(10, levels=levels).init(make_plan(steps=STEPS))


def test_levels_with_no_noise_after_them_are_refused():
    early = torch.arange(STEPS) < 5
    plan = make_plan(steps=STEPS, stochastic=early)
    with pytest.raises(ValueError, match="no step from 5 to 10 draws noise"):
        SMC(10, levels=(2, 5)).init(plan)
    assert SMC(10).init(plan).stops == [2, 4, STEPS]
    with pytest.raises(ValueError, match="eta > 0"):
        SMC(10).init(make_plan(steps=STEPS, stochastic=torch.zeros(STEPS, dtype=torch.bool)))
    with pytest.raises(ValueError, match="no level"):
        SMC(10).init(make_plan(steps=1))


def test_a_budget_below_one_population_is_refused():
    with pytest.raises(ValueError, match="affords no population of 30 particles"):
        SMC(30).init(make_plan(steps=STEPS, nfe=299))
    with pytest.raises(ValueError, match="affords no population of 2 particles"):
        SMC().init(make_plan(steps=STEPS, nfe=19))
    with pytest.raises(ValueError, match="particles=None"):
        SMC().init(make_plan(steps=STEPS))


def test_default_levels_are_fifths_of_the_way():
    assert SMC(2).init(make_plan(steps=50)).stops == [10, 20, 30, 40, 50]
