"""Rewards that read texts: black boxes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from steering.rewards.card import Card
from steering.rewards.compose import Composable
from steering.rewards.functions import Function, ask, card_of, name_of


@dataclass(frozen=True)
class FromText(Composable):
    """A reward made of a function of texts; `from_text` makes one. Not differentiable.

    Finished sequences are read as they are. A guess on the way, which is probabilities at every
    site, is read as its likeliest tokens: a text that the model may never write, and of a state
    that is mostly masked a poor one. Samplers that score only what arrives are not touched by it.

    Args:
        function: (list of n texts[, their n prompts]) -> n numbers, None where it has no opinion.
        write: items -> their texts.
        name: for tables.
    """

    function: Function
    write: Callable[[Tensor], list[str]]
    name: str
    differentiable: bool = field(default=False, init=False)

    @property
    def card(self) -> Card:
        """Facts."""
        return card_of(self.name, "of guesses on the way it reads the likeliest tokens")

    def __call__(self, items: Tensor, prompts: Sequence[Any]) -> Tensor:
        return ask(self.function, self.name, "text", self.write, items, prompts)


def from_text(model: Any) -> Callable[[Callable[..., Any]], FromText]:
    """Turn a function of texts, or of texts and prompts, into a reward of a model that writes them.
    A decorator.

    >>> pipe = zoo.load("dna")
    >>> @from_text(pipe)
    ... def gc_content(texts):
    ...     return [(text.count("G") + text.count("C")) / len(text) for text in texts]

    Args:
        model: a `SequencePipeline`, or a `Model` of sequences: what knows how tokens are written.

    Returns:
        What turns a function into a reward: (list of n texts[, list of n prompts]) -> n numbers,
        higher is better. A second parameter with a default gets prompts only if that is its name.

    Raises:
        TypeError: a model that writes no texts, or no such function.
    """
    if isinstance(model, type) or not callable(getattr(model, "write", None)):
        given = getattr(model, "__name__", type(model).__name__)
        raise TypeError(
            f"model={given} writes no texts: give the pipeline or the model, as in "
            "@from_text(pipe) above the function."
        )

    def reward(function: Callable[..., Any]) -> FromText:
        return FromText(function, model.write, name_of(function, "from_text", "texts"))

    return reward
