"""Blocks that train in no time, with dropout and batch norms in them, and rules that misbehave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from steering.finetune.noprop import NoPropRule
from tests.tiny_noprop import network, pictures

ROWS = 32


def small_rule(**options: Any) -> NoPropRule:
    """Three blocks, always the same, and 32 pictures to learn the labels of by heart."""
    labels = torch.arange(ROWS) % 4
    return NoPropRule(network("dt", **{"steps": 3, **options}), pictures(ROWS), labels)


class Watched:
    """A rule that calls something with (block, numbers of examples) before every loss."""

    def __init__(self, rule: Any, before: Callable[[int, Tensor], None]) -> None:
        self.rule, self.before = rule, before

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rule, name)

    def loss(self, block: int, numbers: Tensor, rng: torch.Generator) -> Tensor:
        self.before(block, numbers)
        return self.rule.loss(block, numbers, rng)


class Chain:
    """Linear blocks, each called on what `path` says: (blocks, k, x [N, 2]) -> [N, 2]."""

    rows = 8

    def __init__(self, path: Callable[[list[nn.Module], int, Tensor], Tensor], n: int = 3) -> None:
        rng = torch.Generator().manual_seed(0)
        self.blocks: list[nn.Module] = [nn.Sequential(nn.Linear(2, 2)) for _ in range(n)]
        for block in self.blocks:
            for p in block.parameters():
                p.data = torch.randn(p.shape, generator=rng)
        self.path = path

    def told(self) -> dict[str, Any]:
        return {}

    def loss(self, block: int, numbers: Tensor, rng: torch.Generator) -> Tensor:
        x = torch.randn(len(numbers), 2, generator=rng)
        return self.path(self.blocks, block, x).square().mean()

    def watch(self, block: int) -> dict[str, float]:
        return {}


def states(rule: Any) -> list[dict[str, Tensor]]:
    """What each block holds, copied."""
    return [{k: v.clone() for k, v in b.state_dict().items()} for b in rule.blocks]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Are they equal to the bit?"""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
