"""A rule of three small blocks, each of which learns to undo a shift of its own; as a program, one
of several processes that share them out."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steering.finetune import train_blocks


class Layers:
    """Rows x [40, 3]; block k maps x + k + noise to x, with dropout and batch norm.

    Args:
        crossing: "before": block 1 is fed by block 0 from something that learns; "after": its loss
            is of what block 2 makes of it.
        breaks_at: (block, update) that is interrupted.
        bad: updates whose loss is not finite.
    """

    def __init__(
        self,
        crossing: str | None = None,
        breaks_at: tuple[int, int] | None = None,
        bad: Sequence[int] = (),
    ) -> None:
        self.crossing, self.breaks_at, self.bad = crossing, breaks_at, bad
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            self.blocks: list[Any] = [
                nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 3))
                for _ in range(3)
            ]
        self.x = torch.randn(40, 3, generator=torch.Generator().manual_seed(1))
        self.rows = 40
        self.asked = [0, 0, 0]
        self.looks: Callable[[int], None] | None = None

    def told(self) -> dict[str, Any]:
        return {"rule": "layers"}

    def loss(self, block: int, numbers: Tensor, rng: torch.Generator) -> Tensor:
        self.asked[block] += 1
        done = self.asked[block]
        if self.breaks_at == (block, done):
            raise KeyboardInterrupt
        if self.looks is not None:
            self.looks(block)
        x = self.x[numbers]
        seen = x + block + 0.1 * torch.randn(x.shape, generator=rng)
        if self.crossing == "before":
            seen = self.blocks[0](self.blocks[1](seen))
        out = self.blocks[block](seen)
        if self.crossing == "after":
            out = self.blocks[2](out)
        loss = (out - x).square().mean()
        return loss * torch.nan if done - 1 in self.bad else loss

    def watch(self, block: int) -> dict[str, float]:
        return {}


def main(folder: str) -> None:
    torch.set_num_threads(1)
    rule = Layers()
    train_blocks(rule, epochs=3, batch=8, out=Path(folder) / "run", progress=False)
    told = {
        "trained": [k for k in range(3) if rule.asked[k]],
        "state": [t.flatten().tolist() for b in rule.blocks for t in b.state_dict().values()],
    }
    rank = torch.distributed.get_rank()
    (Path(folder) / f"process-{rank}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(sys.argv[1])
