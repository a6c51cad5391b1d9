"""Beam search: the best few go on, within budget, the same in any room."""

import pytest
import torch

from samplers import SVDD, Beam, BestOfN
from samplers.core import PRIOR
from tests.fake_engine import Recorder, make_plan
from tests.test_svdd import SD, STEPS, run, same

SAMPLERS = [Beam(), Beam(2, 3), Beam(1, 2, levels=(1, 4))]


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
    assert not same(alone, run(sampler, nfe=200, seed=1)[1])


def test_the_best_of_all_proposals_walk_on_under_keys_of_their_own():
    engine, draws, _ = run(Beam(3, 4, levels=(1, 2, 4)))
    reward = dict(zip(engine.column("id").tolist(), engine.rewards, strict=True))
    src, start, stop, ids = (engine.column(name) for name in ("src", "start", "stop", "id"))
    assert (src[start == 0] == PRIOR).all()
    for level in (1, 2, 4):
        proposed = sorted(ids[stop == level].tolist(), key=lambda i: -reward[i])
        assert len(proposed) == 12
        kept, times = src[start == level].unique(return_counts=True)
        assert sorted(kept.tolist()) == sorted(proposed[:3])
        assert times.tolist() == [4] * 3
    assert len(engine.column("key").unique()) == len(ids) == 4 * 12
    assert sorted(draws.id.tolist()) == sorted(ids[stop == STEPS].tolist())


def test_draws_are_distinct_and_best_first_of_all_searches():
    engine, draws, _ = run(Beam(2, 3), nfe=4 * 6 * STEPS, conditions=2)
    assert draws.ranked
    assert len(draws.id.unique()) == len(draws.id) == 2 * 4 * 6
    for row in range(2):
        reward = [engine.state[id][1] for id in draws.id[draws.row == row].tolist()]
        assert reward == sorted(reward, reverse=True)
        assert float(draws.log_weight[draws.row == row][0]) == 0


def test_one_beam_is_greedy_svdd():
    """The same walks under the same keys, so the same items."""
    beam = run(Beam(1, 4, levels=(2, 4)), nfe=4 * STEPS * 3)[0]
    greedy = run(SVDD(3, 4, levels=(2, 4), selection="argmax"))[0]
    assert beam.column("key").sort()[0].equal(greedy.column("key").sort()[0])
    assert sorted(beam.rewards) == sorted(greedy.rewards)


@pytest.mark.parametrize("reuses", [True, False])
def test_the_budget_holds_and_none_is_left_unscored(reuses):
    each = STEPS if reuses else STEPS + 5
    for nfe in (100, 234):
        for sampler in (Beam(), Beam(2, 3)):
            engine, draws, _ = run(sampler, nfe=nfe, conditions=2, reuses=reuses)
            # whole searches, or as many beams as one affords
            unit = 4 if sampler.beams is None else 6
            assert engine.spent.tolist() == [nfe // (unit * each) * unit * each] * 2
            assert draws.finished.all()
            assert len(draws.id) == int((engine.column("stop") == STEPS).sum())


def test_all_of_the_budget_is_one_search_and_more_keeps_its_size():
    _, draws, state = run(Beam(), nfe=205)
    assert len(draws.id) == 32  # 8 beams of 4 proposals, 24 rows each
    fixed = Beam().resolved(state)
    assert fixed == Beam(8)
    engine, more, _ = run(fixed, nfe=410)
    assert len(more.id) == 64
    assert set(run(Beam(), nfe=205)[0].column("key").tolist()) < set(engine.column("key").tolist())


def test_a_beam_beats_best_of_n_where_guesses_foretell():
    """Increments that add up and a guess without error: 20 searches, each at the rows of 50 walks;
    by chance the beam would be ahead in 10 ± 2.2."""
    best = []
    for sampler in (BestOfN(), Beam()):
        engine, draws, _ = run(sampler, nfe=50 * STEPS, conditions=20)
        final = torch.tensor([engine.state[id][1] for id in draws.id.tolist()])
        best.append(torch.stack([final[draws.row == r].max() for r in range(20)]))
    assert int((best[1] > best[0]).sum()) >= 18


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_states_that_nobody_walks_from_again_are_let_go(sampler):
    engine, draws, state = run(sampler, nfe=200)
    assert set(engine.state) - set(state.drop) == set(draws.id.tolist())


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("told", [0, 3, 40, 100])
def test_a_result_can_be_had_at_any_time(sampler, told):
    engine, draws, state = run(sampler, nfe=200, stop_after=told, shuffle=1, conditions=2)
    assert set(draws.id.tolist()) <= set(engine.state) - set(state.drop)
    at = torch.tensor([engine.state[i][0] for i in draws.id.tolist()])
    assert draws.finished.equal(at == STEPS)
    assert not draws.log_weight.isnan().any()


def test_a_failed_proposal_is_never_kept():
    dead = {0, 1, 2, 3, 4, 7, 12, 20}  # of the first leg one of six lives
    engine, draws, _ = run(Beam(2, 3, levels=(1, 3)), fails=lambda id: id in dead)
    assert not torch.isin(engine.column("src"), torch.tensor(sorted(dead))).any()
    assert set(engine.column("src")[engine.column("start") == 1].tolist()) == {5}
    assert len(draws.id) == 5  # of 12 to 17
    nothing = run(Beam(2, 3), fails=lambda id: True)[1]
    assert len(nothing.id) == 0


def test_what_cannot_be_is_refused():
    plan = make_plan(steps=STEPS, nfe=100)
    assert Beam(2).init(plan).stops == [1, 2, 3, 4, 5, STEPS]
    with pytest.raises(ValueError, match="affords no search of 9 beams and 4 proposals"):
        Beam(9).init(plan)
    with pytest.raises(ValueError, match="affords no beam of 40 proposals"):
        Beam(proposals=40).init(plan)
    with pytest.raises(ValueError, match="beams=None takes its number from the budget"):
        Beam().init(make_plan(steps=STEPS, seconds=1.0))
    quiet = torch.zeros(STEPS, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"Beam finds no level .* BestOfN, ZeroOrder"):
        Beam().init(make_plan(steps=STEPS, nfe=100, stochastic=quiet))
    engine = Recorder(make_plan(steps=STEPS), SD)
    assert len(Beam(2, 3).result(engine.run(Beam(2, 3))).id) == 6  # without a budget: one search
