"""Times of a pipeline's loop that are not what the pipeline set: any step, or one for each row."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor


class PerRow(Tensor):
    """Times [N] of the rows of a batch where a pipeline expects a scalar.

    Expanding one to a multiple of N repeats it: guidance puts copies of a batch one after another.
    """

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is Tensor.expand and args[0].dim() == 1:
            size = args[1] if isinstance(args[1], int) else args[1][0]
            times = plain(args[0])
            return times.repeat(size // len(times)).as_subclass(PerRow)
        return super().__torch_function__(func, types, args, kwargs or {})


class Turns(Tensor):
    """Times of a loop that yields `turns` instead, and counts them from `index`."""

    turns: list[Tensor]
    index: int
    note: Callable[[int], None]

    def __iter__(self) -> Iterator[Tensor]:
        self.note(len(self))  # which a pipeline may have cut
        return iter(self.turns)


def turns_of(turns: list[Tensor], index: int, note: Callable[[int], None]) -> type[Turns]:
    """The class of times that a loop finds to be `turns`; `note` is told how long it would be."""
    # a class of its own, because slices of a tensor keep their class but no attributes
    return type("Turns", (Turns,), {"turns": turns, "index": index, "note": staticmethod(note)})


def enumerate_turns(iterable: Any, start: int = 0) -> enumerate:
    """`enumerate`, which counts replaced times from the index of the step asked for."""
    times = getattr(iterable, "iterable", iterable)  # under a progress bar
    return builtins.enumerate(iterable, times.index if isinstance(times, Turns) else start)


def plain(x: Tensor) -> Tensor:
    """A tensor of no class of ours."""
    return x.as_subclass(Tensor) if isinstance(x, (PerRow, Turns)) else x
