"""Tree sampling: the same tree in any room, within budget, without the published law's bias."""

import math
import random
from dataclasses import replace

import pytest
import torch

from samplers import Importance, TreeSampling
from search.tree import Tree
from search.widen import Widening
from tests.fake_engine import FakeEngine, make_plan

SD = torch.full((11,), 0.5, dtype=torch.float64)  # ten steps; the reward is the end, N(0, 11 / 4)
RARE = 3 * SD  # exp(reward) is rare
BRANCHED = TreeSampling(branch=(0, 3, 6, 8))


def run(sampler, sd=SD, room=64, shuffle=None, reward=lambda x: x, fails=lambda id: False, **plan):
    plan = make_plan(steps=len(sd) - 1, **plan)
    engine = FakeEngine(plan, sd, reward, room, shuffle, fails)
    state = engine.run(sampler)
    return engine, sampler.result(state)


def fields(tree: Tree, row: int | None = None):
    """The tree's tensors; of one condition as if it were alone, if `row` is given."""
    keep = slice(None) if row is None else tree.row == row
    rows = len(tree.ended)
    handle = tree.handle if row is None else torch.where(tree.handle < 0, -1, tree.handle // rows)
    parent = tree.parent[keep]
    parent = torch.where(parent < 0, parent, parent - (0 if row is None else parent.argmin()))
    names = ("step", "value", "visits", "reward", "failed", "log_ratio", "log_w")
    return [parent, handle[keep], *(getattr(tree, name)[keep] for name in names)]


def equal(a, b) -> bool:
    return all(
        torch.equal(x.double().nan_to_num(-7), y.double().nan_to_num(-7))
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("sampler", [TreeSampling(), BRANCHED, TreeSampling(law="published")])
@pytest.mark.parametrize("sd", [SD, RARE], ids=["common", "rare"])
def test_the_tree_is_bit_equal_for_any_room_and_any_order_of_answers(sampler, sd):
    def grow(**how):
        _, draws = run(sampler, sd, conditions=2, nfe=700, fails=lambda id: id % 17 == 3, **how)
        return fields(draws.tree)

    whole = grow()
    assert len(whole[0]) > 100
    for how in ({"room": 3}, {"room": 7}, {"room": 400}, {"shuffle": 0}, {"room": 5, "shuffle": 1}):
        assert equal(grow(**how), whole)


@pytest.mark.parametrize("sampler", [TreeSampling(), BRANCHED])
def test_a_tree_alone_is_the_same_as_among_four(sampler):
    alone = run(sampler, RARE, nfe=700)[1].tree
    four = run(sampler, RARE, nfe=700, conditions=4)[1].tree
    assert equal(fields(four, row=0), fields(alone, row=0))
    assert not equal(fields(four, row=1)[3:4], fields(alone, row=0)[3:4])


def test_path_weights_take_out_the_bias_of_the_published_rule():
    """Three levels that add N(0, .7²) each, 100 trees of 60 rollouts: log Z = 3 · .49 / 2."""
    sd, log_z = torch.full((3,), 0.7, dtype=torch.float64), 1.5 * 0.49
    plan = {"conditions": 100, "reward_calls": 60}
    widening = Widening(1, 0.5)
    path = TreeSampling(branch=(0, 1), widening=widening)
    ratio = (run(path, sd, **plan)[1].log_z - log_z).exp()
    assert abs(ratio.mean() - 1) < 3 * ratio.std() / 10  # standard error over 100 trees
    published = TreeSampling(law="published", branch=(0, 1), widening=widening)
    ratio = (run(published, sd, **plan)[1].log_z - log_z).exp()
    assert ratio.mean() - 1 < -3 * ratio.std() / 10


def test_draws_follow_the_tilted_law():
    """N(0, s²) tilted by exp(x) has mean s². Weighted without normalising, by the known log Z, the
    mean of a tree is unbiased: E[Σ w r] / Z."""
    _, draws = run(BRANCHED, conditions=100, nfe=600)
    tree, s2 = draws.tree, 11 / 4
    leaf, log_weight, _ = tree.law("path")
    best = torch.full((100,), -torch.inf, dtype=torch.float64)
    best.scatter_reduce_(0, tree.row[leaf], tree.reward[leaf], "amax")
    log_w = log_weight + best[tree.row[leaf]] - tree.ended.double().log()[tree.row[leaf]] - s2 / 2
    means = torch.zeros(100, dtype=torch.float64)
    means.index_add_(0, tree.row[leaf], log_w.exp() * tree.reward[leaf])
    assert abs(means.mean() - s2) < 3 * means.std() / 10


@pytest.mark.parametrize("law", ["path", "published"])
def test_a_guided_proposal_is_corrected(law):
    """Steps pushed by .1 each bring their ratios, so log Z is that of the chain left alone."""
    sampler = TreeSampling(
        branch=(3, 6, 8), law=law, widening=Widening(math.inf, 1)
    )  # no selection
    plan = make_plan(steps=10, conditions=100, nfe=300)
    draws = sampler.result(FakeEngine(plan, SD, push=0.1).run(sampler))
    ratio = (draws.log_z - 11 / 8).exp()
    assert abs(ratio.mean() - 1) < 3 * ratio.std() / 10
    ignored = (draws.log_z - draws.tree.log_ratio[draws.tree.log_ratio != 0].mean()).exp()
    assert ignored.mean() > 1


def test_guided_trees_are_corrected_too():
    plan = make_plan(steps=10, conditions=100, nfe=600)
    draws = BRANCHED.result(FakeEngine(plan, SD, push=0.1).run(BRANCHED))
    ratio = (draws.log_z - 11 / 8).exp()
    assert abs(ratio.mean() - 1) < 3 * ratio.std() / 10


def test_budgets_hold_and_nothing_is_unscored():
    """1,000 random configurations; the engine counts by itself."""
    chance = random.Random(0)
    for _ in range(1000):
        steps, price = chance.randint(2, 8), chance.choice((1, 2))
        nfe = steps * price * chance.randint(1, 9) + chance.randint(0, steps)
        calls = chance.choice((None, chance.randint(1, 60)))
        branch = chance.choice(
            ("auto", "even", (), tuple(sorted(chance.sample(range(steps), min(steps, 3)))))
        )
        law = chance.choice(("path", "published"))
        sampler = TreeSampling(
            law=law,
            branch=branch,
            widening=chance.choice((None, Widening(1, 0.1), Widening(2, 0.8))),
            parallel=chance.choice((None, 5, 64)),
            pilot=chance.choice((None, 0, 3)) if (law, branch) == ("path", "auto") else None,
        )
        sd = torch.full((steps + 1,), chance.choice((0.3, 2.0)), dtype=torch.float64)
        rows = chance.randint(1, 2)
        plan = {"conditions": rows, "nfe": nfe, "reward_calls": calls, "cost": price}
        engine, draws = run(sampler, sd, chance.randint(4, 64), **plan)
        tree = draws.tree
        assert (engine.spent <= nfe).all()
        assert calls is None or (engine.scored <= calls).all()
        # spent to the last walk: what is left affords no walk from the noise
        assert ((nfe - engine.spent < steps * price) | (engine.scored == calls)).all()
        # every node has a scored leaf below it, and every leaf was scored once
        inner = (tree.step >= 0) & (tree.step < steps)
        assert set(inner.nonzero().flatten().tolist()) <= set(tree.parent.tolist())
        assert len(draws.id) == int(engine.scored.sum())


def test_a_larger_budget_asks_for_the_same_walks_and_more():
    asked = []

    class Recording(FakeEngine):
        def walk(self, asked_now):
            legs = zip(
                asked_now.row.tolist(),
                asked_now.key.tolist(),  # which says the whole way from the root
                asked_now.start.tolist(),
                asked_now.stop.tolist(),
                strict=True,
            )
            asked[-1].update(legs)
            return super().walk(asked_now)

    for sampler in (TreeSampling(), BRANCHED, TreeSampling(law="published")):
        for sd in (SD, RARE):
            asked[:] = [set()]
            small = make_plan(steps=10, conditions=2, nfe=700)
            state = Recording(small, sd).run(sampler)
            resolved = sampler.resolved(state)
            asked.append(set())
            Recording(small, sd).run(resolved)
            assert asked[1] == asked[0]  # what was taken from the budget is now said
            asked.append(set())
            Recording(make_plan(steps=10, conditions=2, nfe=1600), sd).run(resolved)
            assert asked[0] < asked[2]


def test_1000_hostile_reward_vectors():
    chance = random.Random(0)
    extremes = (math.nan, math.inf, -math.inf, 1e38, -1e38, 0.0, 1.0, -1.0, 1e-38, 1e300, -1e300)
    for trial in range(1000):
        values = chance.choices(extremes, k=chance.randint(1, 4))
        rewards = iter(lambda: values[chance.randrange(len(values))], None)  # noqa: B023
        sampler = (TreeSampling(), BRANCHED, TreeSampling(law="published"))[trial % 3]
        sampler = replace(sampler, parallel=16)
        lam = chance.choice((0.0, 1.0, 1e3))
        seen = []

        def reward(x):
            seen.append(next(rewards))  # noqa: B023
            return torch.tensor([seen[-1]], dtype=torch.float64)  # noqa: B023

        _, draws = run(sampler, nfe=chance.choice((30, 100)), lam=lam, reward=reward)
        finite = [r for r in seen if math.isfinite(r)]
        assert len(draws.id) == len(finite)
        assert draws.log_weight.isfinite().all()
        if finite:
            assert draws.tree.reward[draws.tree.reward.isfinite()].max() == max(finite)
            assert draws.log_weight.softmax(0).isfinite().all()


def test_a_failure_counts_nowhere():
    """Walks fail at random: what is left has the law of the chain."""
    fails = {"fails": lambda id: id % 7 == 2}
    _, draws = run(BRANCHED, conditions=100, nfe=600, **fails)
    tree = draws.tree
    assert tree.failed.any()
    assert not tree.failed[tree.value.isfinite()].any()
    assert (tree.reward.isfinite() == (tree.log_w > -torch.inf)).all()
    ratio = (draws.log_z - 11 / 8).exp()
    assert abs(ratio.mean() - 1) < 3 * ratio.std() / 10
    _, draws = run(BRANCHED, nfe=1000, fails=lambda id: True)
    assert len(draws.id) == 0
    assert draws.log_z.isnan().all()


def test_without_noise_only_the_prior_branches():
    still = torch.zeros(10, dtype=torch.bool)
    for branch in ("auto", "even", (), (0,)):
        _, draws = run(TreeSampling(branch=branch), nfe=300, stochastic=still)
        assert len(draws.id) == len(draws.root.unique()) == 30
    with pytest.raises(ValueError, match="no step from 4 on draws noise"):
        run(TreeSampling(branch=(4,)), nfe=300, stochastic=still)
    late = torch.arange(10) < 7  # the last steps are deterministic
    assert (
        run(TreeSampling(branch="even"), RARE, nfe=300, stochastic=late)[1].tree.step != 8
    ).all()


def test_a_common_reward_makes_a_flat_tree_and_a_rare_one_branches_late():
    _, draws = run(TreeSampling(), SD, nfe=2000)
    assert len(draws.root.unique()) == len(draws.id) == 200
    assert set(draws.tree.step[draws.tree.parent == 0][60:].tolist()) == {10}
    _, draws = run(TreeSampling(), 2 * RARE, nfe=2000)
    assert len(draws.id) > 300
    assert len(draws.root.unique()) < 100
    children = torch.bincount(draws.tree.parent[1:], minlength=len(draws.tree.parent))
    branching = draws.tree.step[(children > 2)]
    assert branching[1:].min() >= 4


def test_a_pilot_is_not_worth_it_in_a_small_budget():
    flat, plain = (run(s, RARE, nfe=300)[1] for s in (TreeSampling(), Importance()))
    assert torch.equal(flat.id, plain.id)
    assert torch.allclose(flat.log_z, plain.log_z)


def test_the_published_preset_begins_as_best_of_n():
    _, draws = run(TreeSampling(law="published", parallel=1), nfe=360)
    assert len(draws.root.unique()) == 36
    _, draws = run(TreeSampling(law="published", parallel=1), nfe=380)
    assert len(draws.root.unique()) < len(draws.id)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"law": "exact"}, "law='exact'"),
        ({"branch": "late"}, "branch='late'"),
        ({"branch": [1, 2]}, "tuple of step indices"),
        ({"branch": (1.0,)}, "tuple of step indices"),
        ({"branch": (3, 2)}, "rising step indices"),
        ({"branch": (2, 2)}, "rising step indices"),
        ({"branch": (-1,)}, "rising step indices"),
        ({"branch": (10,)}, "from 0 .noise. to 9"),
        ({"parallel": 0}, "parallel=0"),
        ({"parallel": 2.5}, "parallel=2.5"),
        ({"pilot": -1}, "pilot=-1"),
        ({"widening": 0.3}, "widening=0.3"),
        ({}, "affords no walk"),
    ],
)
def test_mistakes_get_one_clear_error_before_the_first_row(options, message):
    with pytest.raises(ValueError, match=message):
        TreeSampling(**options).init(make_plan(steps=10, nfe=9 if not options else 100))
