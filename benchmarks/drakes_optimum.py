"""Where does DRAKES lead? Its draws against the law p(x) exp(r(x) / alpha), all enumerated.

Two sites of three tokens, a random table as reward, a smooth network of a few hundred weights: the
law of the tuned chain is pushed forward over all states. KL(q | p*) is how far its draws are from
the target; the ratio at equal KL is (r - r_p) / (r* - r_p), with r* the best that any law as far
from p can have. Rows differ in the steps that are relaxed, their temperature, and where tokens are
hard; alpha is in nats of the path KL everywhere.

    python -m benchmarks.drakes_optimum [--quick]
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.report import finish, header
from steering.finetune.drakes import Paths
from steering.noise import root_key
from tests.exact.smooth_tokens import enumerated, token_chain
from tests.exact.tokens import every

ALPHA, BATCH, LEARNING_RATE = 0.5, 64, 0.02


@dataclass(frozen=True)
class Outcome:
    """What a tuned chain draws."""

    apart: float  # KL(q | p*)
    reward: float
    kl: float  # KL(q | p) of the draws
    path: float  # of the paths
    ratio: float  # at equal KL


def tuned(steps: int, truncate: int, tau: float, through: str, updates: int, seed: int) -> Outcome:
    """Tune, and enumerate what came of it."""
    mine, other = (token_chain(steps=steps) for _ in range(2))
    other.guess.requires_grad_(False)
    random = torch.Generator().manual_seed(5)
    table = torch.randn(3, 3, generator=random, dtype=torch.float64)
    paths = Paths(mine.model, other.model, truncate, tau, through, checkpointing=False)
    optimizer = torch.optim.Adam(mine.guess.parameters(), lr=LEARNING_RATE)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    row = torch.zeros(BATCH, dtype=torch.int64)
    for update in range(updates):
        optimizer.zero_grad()
        key = root_key(seed, torch.arange(BATCH) + update * BATCH)
        x = paths.start(row, key, lambda apart: (ALPHA * apart.mean()).backward())
        items, apart = paths.end(x, row, key)
        reward = torch.einsum("na,nb,ab->n", items[:, 0], items[:, 1], table.to(items))
        (ALPHA * apart - reward).mean().backward()
        optimizer.step()
        decay.step()
    clean = (every(4, 2) < 3).all(1)
    law, path = enumerated(mine.model, other.model)
    q, p, r = law[clean], enumerated(other.model)[0][clean], table.flatten()
    best = equal_kl(p, r, kl(q, p))
    ratio = float((q - p) @ r) / float((best - p) @ r)
    return Outcome(kl(q, tilted(p, r, ALPHA)), float(q @ r), kl(q, p), path, ratio)


def tilted(p: Tensor, r: Tensor, alpha: float) -> Tensor:
    """p exp(r / alpha), normalised."""
    return (p.log() + r / alpha).softmax(0)


def kl(q: Tensor, p: Tensor) -> float:
    return float((q * (q.log() - p.log())).sum())


def equal_kl(p: Tensor, r: Tensor, nats: float) -> Tensor:
    """The tilted law that is this far from p: none as far has a larger mean of r."""
    low, high = 1e-3, 1e3
    for _ in range(80):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if kl(tilted(p, r, middle), p) > nats else (low, middle)
    return tilted(p, r, low)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small numbers, under a minute")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    header()
    steps, updates, seeds = (4, 80, 1) if quick else (16, 250, 3)
    random = torch.Generator().manual_seed(5)
    r = torch.randn(3, 3, generator=random, dtype=torch.float64).flatten()
    clean = (every(4, 2) < 3).all(1)
    p = enumerated(token_chain(steps=steps).model)[0][clean]
    star = tilted(p, r, ALPHA)
    print(f"{steps} steps, alpha {ALPHA}, {updates} updates of {BATCH} paths, seeds 0..{seeds - 1}")
    print(f"before: reward {p @ r:.3f}, KL(p | p*) {kl(p, star):.3f}")
    print(f"target: reward {star @ r:.3f}, KL(p* | p) {kl(star, p):.3f}\n")
    print("| relaxed | tau | hard | KL(q, p*) | reward | KL(q, p) | path KL | ratio at equal KL |")
    print("|---|---|---|---|---|---|---|---|")
    best, ratios, began = float("inf"), [], time.process_time()
    for truncate in (steps, steps * 3 // 8):
        for through in ("end", "step"):
            for tau in (1.0, 0.5, 0.2):
                made = [tuned(steps, truncate, tau, through, updates, s) for s in range(seeds)]
                columns = torch.tensor([list(vars(o).values()) for o in made]).T
                cells = [f"{c.mean():.3f} ({c.min():.3f}..{c.max():.3f})" for c in columns]
                print(f"| {truncate} of {steps} | {tau} | {through} | {' | '.join(cells)} |",
                      flush=True)  # fmt: skip
                best = min(best, float(columns[0].mean()))
                ratios.append(float(columns[4].mean()))
    print(f"\nmean (least..most) of the seeds; {time.process_time() - began:.0f} s of CPU")
    finish({"before": kl(p, star), "best": best, "ratio_at_equal_kl": min(ratios)})


if __name__ == "__main__":
    main()
