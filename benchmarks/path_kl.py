"""Is the KL of paths what it claims? Its estimate against an enumeration, on small chains.

Chains of a few sites and tokens with random smooth networks, two for each: every state of every
step is enumerated, p_i pushed forward, and Σ_i Σ_x p_i(x) KL(kernel | kernel) summed. The estimate
draws paths of the chain itself; z = (estimate - enumeration) / standard error. Beside it, over the
same paths, the weighting of DRAKES' released code, which is 0 at hard states, and over relaxed
paths (all steps, temperatures 1 and .2) what a loss would see: soft steps unmask too early, so that
less of the KL is seen the hotter they are.

    python -m benchmarks.path_kl [--quick]
"""

from __future__ import annotations

import argparse
import time

import torch

from benchmarks.report import finish, header
from steering.core import Model
from steering.finetune import path_kl
from steering.finetune.drakes import Paths
from steering.finetune.path_kl import published_kl
from steering.noise import child_key, root_key
from tests.exact.smooth_tokens import enumerated, token_chain

CHAINS = [  # kind, schedule, sites, tokens, steps
    ("masked", "loglinear", 2, 3, 3),
    ("masked", "loglinear", 2, 3, 8),
    ("masked", "cosine", 2, 3, 3),
    ("masked", "cosine", 3, 2, 5),
    ("masked", "loglinear", 4, 2, 4),
    ("uniform", "loglinear", 2, 3, 3),
    ("uniform", "cosine", 2, 4, 4),
]


@torch.no_grad()
def published_on_hard(a: Model, b: Model, n: int, seed: int) -> float:
    """Largest value of the published weighting at any state of n paths of the chain itself."""
    paths = Paths(a, b, 1)
    process, row, key = (
        paths.process,
        torch.zeros(n, dtype=torch.int64),
        root_key(seed, torch.arange(n)),
    )
    x, largest = process.prior(child_key(key, process.steps)), 0.0
    for i in range(process.steps):
        at = torch.full_like(key, i)
        t = process.time(at)
        said = [m.denoiser.log_probs(x, t, row) for m in (a, b)]  # type: ignore[attr-defined]
        largest = max(largest, float(published_kl(process, x, at, *said).abs().max()))
        x = process.transition(x, at, said[0]).sample(child_key(key, i))
    return largest


@torch.no_grad()
def relaxed(a: Model, b: Model, kl: str, n: int, seed: int, tau: float = 1.0) -> float:
    """Mean over n relaxed paths of the whole chain."""
    paths = Paths(a, b, a.process.steps, tau, kl=kl, checkpointing=False)
    row, key = torch.zeros(n, dtype=torch.int64), root_key(seed, torch.arange(n))
    return float(paths.end(paths.start(row, key), row, key)[1].mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small numbers, under a minute")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    header()
    seeds, n = (1, 2000) if quick else (5, 20000)
    print(f"noise seeds 0..{seeds - 1}, {n} paths each; nats\n")
    print("| chain | sites | tokens | steps | enumerated | KL of the ends | estimate | error | z "
          "| relaxed, τ = 1 | τ = .2 | published, hard | relaxed, τ = 1 |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|---|---|---|")
    values, hard, began = [], 0.0, time.process_time()
    for kind, schedule, length, tokens, steps in CHAINS:
        made = (token_chain(kind, schedule, length, tokens, steps, seed) for seed in (0, 1))
        a, b = (chain.model for chain in made)
        (p, truth), (q, _) = enumerated(a, b), enumerated(b)
        ends = float(torch.where(p > 0, p * (p.log() - q.log()), 0.0).sum())
        for seed in range(seeds):
            found = path_kl(a, b, n=n, batch=2000, seed=seed)
            z = (found.mean - truth) / found.error
            values.append(z)
            weighed = ["—", "—"]
            if kind == "masked":
                most = published_on_hard(a, b, 500, seed)
                hard = max(hard, most)
                weighed = [f"{most:g}", f"{relaxed(a, b, 'published', 2000, seed):.4f}"]
            print(
                f"| {kind} {schedule} | {length} | {tokens} | {steps} | {truth:.5f} | {ends:.5f} "
                f"| {found.mean:.5f} | {found.error:.5f} | {z:+.2f} "
                f"| {relaxed(a, b, 'path', 2000, seed):.4f} "
                f"| {relaxed(a, b, 'path', 2000, seed, 0.2):.4f} | {weighed[0]} | {weighed[1]} |",
                flush=True,
            )
    print(f"\n{len(values)} comparisons, {time.process_time() - began:.0f} s of CPU")
    finish(
        {
            "z": max(abs(v) for v in values),
            "comparisons": len(values),
            "rms_z": float(torch.tensor(values).square().mean().sqrt()),
            "published_on_hard_states": hard,
        }
    )


if __name__ == "__main__":
    main()
