"""The two laws of a finished tree, by hand and against long decimals; and the arena it grew in."""

import math
import random
from decimal import localcontext

import pytest
import torch

from benchmarks.leaf_law import check
from search.arena import Arena
from search.backup import log_mean_exp
from search.tree import Tree


def small() -> Arena:
    """Two x_T: one with leaves of reward 0 and log 2, one with a leaf of log 3 and a failed one."""
    arena = Arena(1.0, log_mean_exp)

    def walk(parent, step, handle):
        arena.pending[parent] += 1
        return arena.plant(parent, step, handle, 0, 0.0)

    a, b = walk(0, 0, 10), walk(0, 0, 20)
    for parent, handle, reward in ((a, 11, 0.0), (a, 12, math.log(2)), (b, 21, math.log(3))):
        leaf, path = walk(parent, 5, handle), [0, parent]
        arena.enter([*path, leaf])
        arena.leave([*path, leaf], finished=True)
        arena.finish(leaf, reward, 0.0)
    arena.fail(walk(b, 5, 22))
    arena.pending[a] += 1  # one that never answers
    return arena


def test_the_published_law_by_hand():
    tree = Tree.of([small()], 1.0)
    leaf, log_weight, log_z = tree.law("published")
    assert tree.handle[leaf].tolist() == [11, 12, 21]
    # x_T 10 is worth 3/2, x_T 20 is worth 3: draws go there by 1/3 and 2/3
    assert torch.allclose(log_weight.softmax(0), torch.tensor([1 / 9, 2 / 9, 2 / 3]).double())
    assert math.isclose(log_z, math.log(2.25), rel_tol=1e-12)
    assert tree.top(leaf).tolist() == [10, 10, 20]
    assert math.isclose(tree.value[0], math.log(2.25), rel_tol=1e-12)


def test_the_path_law_by_hand():
    arena = small()
    # a selection of x_T 10 with q = 1/4 of 2 ended in leaf 12 again
    arena.revisit([0, 1, 4])
    arena.weigh(4, -math.log(2 * 0.25))
    tree = Tree.of([arena], 1.0)
    _, log_weight, log_z = tree.law("path")
    assert torch.allclose(log_weight.softmax(0), torch.tensor([1, 2 * 3, 3]).double() / 10)
    assert math.isclose(log_z, math.log(10 / 4), rel_tol=1e-12)
    assert tree.visits.tolist() == [4, 3, 1, 1, 2, 1, 0]
    assert tree.failed.nonzero().flatten().tolist() == [6]


def test_two_trees_keep_apart():
    empty, tree = Arena(1.0, log_mean_exp), Tree.of([small()], 1.0)
    for arenas in ([small(), small()], [small(), empty, small()]):
        both = Tree.of(arenas, 1.0)
        for law in ("path", "published"):
            leaf, log_weight, log_z = both.law(law)
            assert torch.equal(log_weight, tree.law(law)[1].repeat(2))
            assert torch.equal(log_z[[0, -1]], tree.law(law)[2].repeat(2))
            assert both.handle[leaf].tolist() == [11, 12, 21] * 2
        assert both.row[leaf].tolist() == [0] * 3 + [len(arenas) - 1] * 3
    assert both.law("path")[2][1].isnan()


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1e38])
@pytest.mark.parametrize("lam", [0.0, 1.0, 1e3])
def test_random_trees_follow_their_law(lam, scale, published):
    # probabilities in float64: products of some ten factors
    chance = random.Random(1)
    with localcontext() as context:
        context.prec = 60
        for rollouts in (1, 20, 80):
            error, value, _ = check(chance, lam, scale, published, rollouts)
            assert error <= 1e-12
            assert value <= 1e-12


def test_a_node_dies_with_all_its_children():
    arena = Arena(1.0, log_mean_exp)
    arena.pending[0] += 1
    a = arena.plant(0, 0, 0, 0, 0.0)
    arena.pending[a] += 1
    leaf = arena.plant(a, 5, 1, 0, 0.0)
    assert arena.fail(leaf) == [a]
    assert arena.failed == [False, True, True]
    assert arena.pending == [0, 0, 0]
    assert Tree.of([arena], 1.0).law("path")[2].isnan().all()


def test_an_unknown_law_is_refused():
    with pytest.raises(ValueError, match="law='exact'"):
        Tree.of([small()], 1.0).law("exact")


def test_a_tree_whose_walks_share_nothing_is_flat_and_says_so():
    from samplers import Importance, TreeSampling, sample
    from tests.brownian import brownian, first

    options = {"nfe": 800, "draws": 8, "progress": False}
    flat = sample(brownian(prompts=("a", "b")), first, TreeSampling(), **options)  # no pilot fits
    grown = sample(brownian(prompts=("a", "b")), first, TreeSampling(branch="even"), **options)
    assert flat.tree.flat
    assert not grown.tree.flat
    assert "the tree is flat" in str(flat)
    assert "flat" not in str(grown) + str(sample(brownian(), first, Importance(), **options))
