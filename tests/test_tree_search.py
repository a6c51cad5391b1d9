"""Tree search: better than best-of-N at equal rows, ranked, and within budget with its looks."""

import math
import random
from dataclasses import replace

import pytest
import torch

from samplers import BestOfN, TreeSearch
from search.widen import Widening
from tests.fake_engine import FakeEngine, make_plan
from tests.test_tree_sampling import RARE, SD, equal, fields, run

KINDS = [
    TreeSearch(),
    TreeSearch(branch="even"),
    TreeSearch(backup="max", branch=(2, 5)),
    TreeSearch(value="clean", branch=(3, 6, 8)),
]


@pytest.mark.parametrize("sampler", KINDS)
def test_the_tree_is_bit_equal_for_any_room_and_any_order_of_answers(sampler):
    def grow(**how):
        _, draws = run(sampler, RARE, conditions=2, nfe=500, fails=lambda id: id % 17 == 3, **how)
        return fields(draws.tree)

    whole = grow()
    for how in ({"room": 3}, {"room": 400}, {"shuffle": 0}, {"room": 5, "shuffle": 1}):
        assert equal(grow(**how), whole)


def test_a_search_beats_best_of_n():
    """Ten increments that add up, 20 trees of 50 walks' rows: a search that keeps good prefixes
    finds more in at least 16 of them (by chance 10 ± 2.2)."""
    best = {}
    for sampler in (BestOfN(), TreeSearch(), TreeSearch(branch="even"), TreeSearch(backup="max")):
        engine, draws = run(sampler, conditions=20, nfe=500)
        final = torch.tensor([engine.state[id][1] for id in draws.id.tolist()])
        found = torch.stack([final[draws.row == r].max() for r in range(20)])
        best[sampler] = found
    plain = best.pop(BestOfN())
    for found in best.values():
        assert (found > plain).sum() >= 16


def test_draws_are_distinct_and_best_first():
    engine, draws = run(TreeSearch(), conditions=3, nfe=500)
    assert draws.ranked
    assert len(draws.id.unique()) == len(draws.id)
    for row in range(3):
        reward = [engine.state[id][1] for id in draws.id[draws.row == row].tolist()]
        assert reward == sorted(reward, reverse=True)
        # the best seen, not the greedy walk's end
        seen = [x for id, (step, x) in engine.state.items() if step == 10 and id % 3 == row]
        assert reward[0] == max(seen)


def test_a_pilot_whose_walks_fail_on_their_way_goes_on():
    """A look shows the beginning of a walk that fails later: there is no leaf to compare with."""
    for seed in range(5):
        chance = random.Random(seed)
        gone = {id for id in range(4000) if chance.random() < 0.3}
        for nfe in (800, 3000):
            _, draws = run(TreeSearch(value="clean"), nfe=nfe, fails=gone.__contains__)
            assert draws.tree.reward[draws.tree.reward.isfinite()].numel() == len(draws.id) > 5


def test_the_greedy_leaf_follows_the_largest_values():
    _, draws = run(TreeSearch(branch=(2, 5)), conditions=3, nfe=600)
    tree = draws.tree
    for row, leaf in enumerate(tree.greedy().tolist()):
        assert tree.row[leaf] == row
        assert tree.step[leaf] == 10
        node = leaf
        while tree.parent[node] >= 0:
            siblings = tree.parent == tree.parent[node]
            assert tree.value[node] == tree.value[siblings].nan_to_num(-math.inf).max()
            node = int(tree.parent[node])
    _, draws = run(TreeSearch(branch=(2,)), nfe=100, fails=lambda id: True)
    assert draws.tree.greedy().tolist() == [-1]


def test_looks_count_when_the_budget_is_judged():
    looks = TreeSearch(value="clean", branch=(1, 2, 4, 6, 8))
    with pytest.raises(ValueError, match="6 reward calls"):
        run(looks, nfe=5000, reward_calls=5)
    assert len(run(looks, nfe=5000, reward_calls=6)[1].id) == 1


def test_a_flat_tree_is_best_of_n():
    flat, plain = (run(s, nfe=300)[1] for s in (TreeSearch(branch=()), BestOfN()))
    assert torch.equal(flat.id, plain.id)
    assert torch.allclose(flat.log_weight.softmax(0), plain.log_weight.softmax(0))


def test_budgets_hold_with_looks():
    chance = random.Random(1)
    for _ in range(100):
        steps, price = chance.randint(2, 12), chance.choice((1, 2))
        nfe = steps * price * chance.randint(2, 9) + chance.randint(0, steps)
        calls = chance.choice((None, chance.randint(10, 60)))
        sampler = TreeSearch(
            backup=chance.choice(("soft", "max")),
            value=chance.choice(("rollout", "clean")),
            branch=(branch := chance.choice(("auto", "even", tuple(range(0, steps, 2))))),
            widening=chance.choice((Widening(1, 0.3), Widening(2, 0.8))),
            parallel=chance.choice((3, 9)),
            pilot=chance.choice((None, 0, 4)) if branch == "auto" else None,
        )
        plan = {"nfe": nfe, "reward_calls": calls, "cost": price, "conditions": 2}
        engine, draws = run(sampler, torch.ones(steps + 1).double(), chance.randint(4, 64),
                            reuses=chance.random() < 0.5, **plan)  # fmt: skip
        assert (engine.spent <= nfe).all()
        assert calls is None or (engine.scored <= calls).all()
        tree = draws.tree
        inner = (tree.step >= 0) & (tree.step < steps)
        assert set(inner.nonzero().flatten().tolist()) <= set(tree.parent.tolist())


def test_a_clean_value_is_scored_once_per_node_and_then_replaced():
    engine, draws = run(TreeSearch(value="clean", branch=(3, 6)), nfe=300)
    tree = draws.tree
    nodes = int((tree.step >= 0).sum())
    assert int(engine.scored) == nodes
    inner = tree.step == 3
    assert tree.value[inner].isfinite().all()
    assert tree.reward[inner].isnan().all()
    # a node whose walks all fail keeps what the look said, and is tried again
    _, draws = run(TreeSearch(value="clean", branch=(3,)), nfe=300, fails=lambda id: id > 2)
    arrived = (draws.tree.step == 3) & ~draws.tree.failed
    assert 0 < int(arrived.sum()) < 4
    assert draws.tree.value[arrived].isfinite().all()


def test_a_larger_budget_grows_the_same_tree():
    sampler = TreeSearch()
    state = FakeEngine(make_plan(steps=10, nfe=600), SD).run(sampler)
    resolved = sampler.resolved(state)
    assert (resolved.parallel, resolved.pilot) == (10, 7)
    larger = FakeEngine(make_plan(steps=10, nfe=1500), SD).run(resolved)
    small, large = sampler.result(state).tree, sampler.result(larger).tree
    ends = [t.reward[t.reward.isfinite()].tolist() for t in (small, large)]
    assert set(ends[0]) < set(ends[1])


def test_hostile_rewards():
    chance = random.Random(0)
    extremes = (math.nan, math.inf, -math.inf, 1e38, -1e38, 0.0, 1.0, 1e300, -1e300)
    for trial in range(100):
        values = chance.choices(extremes, k=chance.randint(1, 4))
        seen = []

        def reward(x):
            seen.append(chance.choice(values))  # noqa: B023
            return torch.tensor([seen[-1]], dtype=torch.float64)  # noqa: B023

        lam = chance.choice((0.0, 1.0, 1e3))
        _, draws = run(replace(KINDS[trial % 3], parallel=16), nfe=60, lam=lam, reward=reward)
        finite = [r for r in seen if math.isfinite(r)]
        assert draws.log_weight.isfinite().all()
        if finite:
            best = draws.tree.reward[draws.tree.handle == draws.id[0]]
            assert float(best) == max(finite)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backup": "mean"}, "backup='mean'"),
        ({"value": "tweedie"}, "value='tweedie'"),
        ({"c_uct": -1}, "c_uct=-1"),
        ({"c_uct": math.nan}, "c_uct=nan"),
        ({"widening": 0.3}, "widening=0.3"),
        ({"branch": "late"}, "branch='late'"),
        ({"parallel": 0}, "parallel=0"),
        ({}, "affords no walk"),
    ],
)
def test_mistakes_get_one_clear_error_before_the_first_row(options, message):
    with pytest.raises(ValueError, match=message):
        TreeSearch(**options).init(make_plan(steps=10, nfe=9 if not options else 100))
