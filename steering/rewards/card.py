"""What is to be known of a reward before steering by it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """One reward in facts. Higher is always better; `higher` says what that means.

    Args:
        higher: what a higher value says of an item.
        range: least and greatest value there can be.
        differentiable: in its items.
        memory: GB (10^9 bytes) of weights in float32; 0 has none, None is unknown.
        source: hub id, folder or package of the weights.
        revision: commit of the weights; "main" is the newest one, which may change; "" has none.
        licence: of the weights.
        paper: with arXiv id.
        untrusted_text: is the value read from a text that an item's content can influence?
        notes: what else to mind.
    """

    higher: str
    range: tuple[float, float]
    differentiable: bool
    memory: float | None = 0.0
    source: str = ""
    revision: str = ""
    licence: str = ""
    paper: str = ""
    untrusted_text: bool = False
    notes: str = ""
