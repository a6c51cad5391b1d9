"""Answers are applied in virtual-time order, whatever order they come in."""

import itertools

from search.arrivals import Arrivals


def play(order: tuple[int, ...]) -> list[tuple[int, int]]:
    """Two trees: walks 0, 2, 4 of tree 0 and 1, 3 of tree 1; walk 0 is followed by walk 6."""
    arrivals, applied = Arrivals(2), []
    for tree, id, steps in ((0, 0, 2), (0, 2, 5), (0, 4, 5), (1, 1, 3), (1, 3, 1)):
        arrivals.queue(tree, id, steps)
    for id in order:
        arrivals.arrived(id, f"answer {id}")
        for tree, done, answer in arrivals.ready():
            assert answer == f"answer {done}"
            applied.append((tree, done))
            if done == 0:
                arrivals.queue(0, 6, 1)  # ends at 3, before 2 and 4
    assert arrivals.waiting() == (len(applied) < 6)
    return applied


def test_each_tree_sees_one_order():
    for order in itertools.permutations((0, 1, 2, 3, 4, 6)):
        if order.index(6) < order.index(0):
            continue  # nobody asked yet
        applied = play(order)
        assert [id for tree, id in applied if tree == 0] == [0, 6, 2, 4]
        assert [id for tree, id in applied if tree == 1] == [3, 1]


def test_nothing_is_applied_before_what_ends_earlier():
    assert play((2, 4, 1)) == []
    assert play((2, 4, 0)) == [(0, 0)]


def test_a_repeated_or_unknown_answer_is_ignored():
    assert play((0, 0, 99, 6, 0, 2, 2, 4)) == [(0, 0), (0, 6), (0, 2), (0, 4)]


def test_a_walk_of_no_steps_ends_at_once():
    arrivals, seen = Arrivals(1), []
    arrivals.queue(0, 0, 0)
    arrivals.queue(0, 1, 4)
    arrivals.arrived(0, None)
    for _, id, _ in arrivals.ready():
        seen.append(id)
    assert seen == [0]
    assert arrivals.waiting()
