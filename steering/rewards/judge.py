"""A judge that answers in words: a vision-language model, behind a function of the user's."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from PIL import Image
from torch import Tensor

from steering.rewards.card import Card
from steering.rewards.compose import Composable
from steering.rewards.pil import FromPil

_LONGEST = 1000  # characters of an answer; a number needs fewer
_SHOWN = 80  # characters of an answer in a warning


@dataclass(frozen=True)
class Judge(Composable):
    """reward(x) = the number in a text that a function answers, held to a range. Not
    differentiable.

    The text must be one JSON number, or one JSON object `{"score": number}`, and nothing else, or
    the item has failed: no number is looked for inside a sentence. What lies beyond the range is
    moved to its end. So a text inside an image, or in its prompt, that tells the judge what to
    answer gains at most `high`: which a judge that obeys it will say. Measure another reward
    beside it (`also=`).

    Args:
        function: (n PIL images, their n prompts) -> n texts; None where it has no answer. How it
            asks is its own matter: ask for `{"score": number}` and for nothing else.
        low, high: the range; tell the judge, too.
        name: for tables.

    Raises:
        TypeError, ValueError: an argument cannot be; on a call, `function` returned something
            else than one text or None per image.
    """

    function: Callable[[list[Image.Image], list[Any]], Sequence[str | None]]
    low: float = 0.0
    high: float = 10.0
    name: str = "judge"
    differentiable: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise TypeError(f"function={self.function!r}: give (images, prompts) -> texts.")
        ends = (self.low, self.high)
        if not all(isinstance(end, Real) and math.isfinite(end) for end in ends):
            raise ValueError(f"low={self.low!r}, high={self.high!r}: give finite numbers.")
        if not self.low < self.high:
            raise ValueError(f"low={self.low} is not below high={self.high}.")

    @property
    def card(self) -> Card:
        """Facts."""
        return Card(
            higher="the judge says so",
            range=(self.low, self.high),
            differentiable=False,
            memory=None,
            source="a function of the user's",
            untrusted_text=True,
            notes="a text in an image can tell the judge what to answer",
        )

    def __call__(self, items: Tensor, prompts: Sequence[Any]) -> Tensor:
        return FromPil(self._ask, self.name)(items, prompts)

    def _ask(self, images: list[Image.Image], prompts: list[Any]) -> list[float | None]:
        answers = self.function(images, prompts)
        if isinstance(answers, str) or not isinstance(answers, Sequence):
            raise TypeError(
                f"{self.name} returned a {type(answers).__name__} for {len(images)} images: return "
                "a list with one text per image."
            )
        numbers = [self._number(answer) for answer in answers]
        wrong = [a for a, n in zip(answers, numbers, strict=True) if a is not None and n is None]
        if wrong:
            shown = wrong[0] if len(wrong[0]) < _SHOWN else f"{wrong[0][:_SHOWN]}..."
            warnings.warn(
                f"{self.name} answered {shown!r}, which is no reward: only a number or "
                '{"score": number} is. Such items fail.',
                stacklevel=2,
            )
        return numbers

    def _number(self, answer: Any) -> float | None:
        if answer is None:
            return None
        if not isinstance(answer, str):
            raise TypeError(f"{self.name} returned {answer!r}: return texts, or None.")
        if len(answer) > _LONGEST:
            return None
        try:
            # pairs, and not a dict, in which a second "score" would go unseen
            value = json.loads(answer, object_pairs_hook=_Pairs)
            if isinstance(value, _Pairs):
                ((key, value),) = value
                if key != "score":
                    return None
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                return None
            number = float(value)
        except (ValueError, RecursionError, OverflowError):
            return None
        return min(max(number, self.low), self.high) if math.isfinite(number) else None


class _Pairs(list):
    """A JSON object as the pairs it was written in."""
