"""Widening: how many children a node has after N visits, and what is refused."""

import math

import pytest

from search.widen import ONLY_ROOTS, PUBLISHED, Widening


def children_after(visits: int, rule: Widening) -> int:
    children = 0
    for n in range(1, visits + 1):
        children += rule.expands(children, n)
    return children


def test_the_published_constants_begin_as_best_of_n():
    assert children_after(36, PUBLISHED) == 36
    assert children_after(37, PUBLISHED) < 37
    assert children_after(13, Widening(2, 0.7)) == 13
    assert children_after(14, Widening(2, 0.7)) < 14
    assert children_after(3, Widening(1, 0.5)) == 2


def test_children_grow_as_the_power():
    for c, alpha in ((1, 0.3), (1, 0.5), (2, 0.8)):
        assert children_after(10_000, Widening(c, alpha)) == math.ceil(c * 10_000**alpha)


def test_an_unbounded_node_never_selects():
    assert children_after(500, ONLY_ROOTS) == 500


@pytest.mark.parametrize(
    ("c", "alpha", "message"),
    [
        (0, 0.3, "c=0"),
        (-1, 0.3, "c=-1"),
        (math.nan, 0.3, "c=nan"),
        (1, 0, "alpha=0"),
        (1, 1.1, "1.1"),
    ],
)
def test_mistakes_are_refused(c, alpha, message):
    with pytest.raises(ValueError, match=message):
        Widening(c, alpha)
