"""Answers in virtual-time order: what a search decides does not depend on who answers first.

Every walk takes as much virtual time as it has steps: asked at time t, it ends at t + steps. Each
tree has its own clock, and its answers are handed over in the order (end, id), whatever order they
come in. A walk that follows from an answer starts at that answer's end.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Any


class Arrivals:
    """What is under way, per tree, and what of it has been answered.

    Args:
        trees: number of independent clocks (one per condition).
    """

    def __init__(self, trees: int) -> None:
        self._clock = [0] * trees  # virtual time of the answer being applied
        self._heap: list[list[tuple[int, int]]] = [[] for _ in range(trees)]  # (end, id)
        self._tree: dict[int, int] = {}  # id under way -> tree
        self._answer: dict[int, Any] = {}  # id answered and not yet applied -> answer
        self._told: set[int] = set()  # trees that have got an answer since `ready` last ran

    def queue(self, tree: int, id: int, steps: int) -> None:
        """A walk of `steps` steps sets out now on `tree`'s clock; ids are never used twice."""
        heapq.heappush(self._heap[tree], (self._clock[tree] + steps, id))
        self._tree[id] = tree

    def arrived(self, id: int, answer: Any) -> None:
        """Take an answer in; one that nobody waits for (a repeated id) is ignored."""
        tree = self._tree.get(id)
        if tree is not None and id not in self._answer:
            self._answer[id] = answer
            self._told.add(tree)

    def ready(self) -> Iterator[tuple[int, int, Any]]:
        """Yield (tree, id, answer) in virtual-time order as far as the answers reach.

        Walks may be queued while this runs; they start at the time of the answer last yielded.
        """
        told, self._told = sorted(self._told), set()
        for tree in told:
            heap = self._heap[tree]
            while heap and heap[0][1] in self._answer:
                self._clock[tree], id = heapq.heappop(heap)
                del self._tree[id]
                yield tree, id, self._answer.pop(id)

    def waiting(self) -> bool:
        """Is any walk under way, or answered and not yet applied?"""
        return bool(self._tree)
