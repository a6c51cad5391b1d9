"""What tuning leads to, on a chain whose target can be enumerated."""

from __future__ import annotations

import pytest
import torch

from steering.finetune.drakes import Paths
from steering.noise import root_key
from tests.exact.smooth_tokens import enumerated, token_chain
from tests.exact.tokens import every

ALPHA = 0.5


@pytest.mark.parametrize("straight_through", ["end", "step"])
def test_draws_come_near_the_tilted_law(straight_through):
    # p* ∝ p exp(r / alpha). Sites of one step are drawn apart from each other, soft steps are not
    # the chain's, and the gradient is noisy: a tenth of the way is left, not nothing. KL(p | p*) is
    # 1.6 nats before.
    tuned, before = token_chain(steps=4), token_chain(steps=4)
    before.guess.requires_grad_(False)
    generator = torch.Generator().manual_seed(5)
    table = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    paths = Paths(tuned.model, before.model, 4, 0.2, straight_through, checkpointing=False)
    optimizer = torch.optim.Adam(tuned.guess.parameters(), lr=0.03)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 150)
    row = torch.zeros(48, dtype=torch.int64)
    for update in range(150):
        key = root_key(0, torch.arange(48) + update * 48)
        items, apart = paths.end(paths.start(row, key), row, key)
        pairs = items[:, 0, :, None] * items[:, 1, None, :]
        optimizer.zero_grad()
        (ALPHA * apart - (pairs * table).sum((1, 2))).mean().backward()
        optimizer.step()
        decay.step()
    clean = (every(4, 2) < 3).all(1)
    p, q = (enumerated(chain.model)[0][clean] for chain in (before, tuned))
    star = (p.log() + table.flatten() / ALPHA).softmax(0)

    def kl(a: torch.Tensor) -> float:
        return float((a * (a.log() - star.log())).sum())

    assert kl(p) > 1.5
    assert kl(q) < 0.1 * kl(p)
