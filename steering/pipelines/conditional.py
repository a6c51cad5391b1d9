"""One network, a table of conditions built once, and classifier-free guidance in one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from steering.gaussian import ToClean

Conditions = dict[str, Tensor]  # each [R, ...], one row per condition, on the model's device


@dataclass(frozen=True, eq=False)
class ConditionalDenoiser:
    """Guesses the clean end under row `row` of a table of conditions.

    Rows with scale > 1 are guided (classifier-free guidance, arXiv:2207.12598): two network rows,

        out = negative + scale · (positive - negative)

    the others cost one. Both halves go through the network in one batch.

    Args:
        network: (x [N, *D] float32, t [N], conditions of these rows) -> output [N, *D] float32.
        to_clean: turns an output into a clean guess.
        positive: what each row asks for.
        negative: what each row is guided away from; None if no row is guided.
        scale: [R] float32 on the CPU, guidance scale of each row.
    """

    network: Callable[[Tensor, Tensor, Conditions], Tensor]
    to_clean: ToClean
    positive: Conditions
    negative: Conditions | None
    scale: Tensor

    def rows(self, t: Tensor, row: Tensor) -> Tensor:
        return 1 + self._guided(row).long()

    def __call__(self, x: Tensor, t: Tensor, row: Tensor) -> Tensor:
        pairs = self._guided(row).nonzero().flatten()  # [K] on the CPU, like `row`
        table_rows = row.to(x.device)
        conditions = {name: table[table_rows] for name, table in self.positive.items()}
        if self.negative is None or len(pairs) == 0:
            return self.to_clean(self.network(x, t, conditions), x, t)
        scale = self.scale[row[pairs]].to(x.device).view(-1, *[1] * (x.dim() - 1))
        pairs = pairs.to(x.device)
        both = {
            name: torch.cat([conditions[name], table[table_rows[pairs]]])
            for name, table in self.negative.items()
        }
        output = self.network(torch.cat([x, x[pairs]]), torch.cat([t, t[pairs]]), both)
        positive, negative = output.split([len(x), len(pairs)])
        guided = negative + scale * (positive[pairs] - negative)
        return self.to_clean(positive.index_copy(0, pairs, guided), x, t)

    def _guided(self, row: Tensor) -> Tensor:
        if self.negative is None:
            return torch.zeros_like(row, dtype=torch.bool)
        return self.scale[row] > 1


@contextmanager
def evaluating(*modules: nn.Module | None) -> Iterator[None]:
    """Dropout and its like off inside, and every module as it was found afterwards."""
    training = [
        module
        for root in modules
        if root is not None and root.training
        for module in root.modules()
        if module.training
    ]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
