"""Tree search teaches a model: weighted draws of a tree become its weights, round after round.

A small masked model learns sequences of a Markov chain. A black-box reward, without a gradient,
asks for two motifs. Each round `TreeSampling` draws from p_k · exp(λ/rounds · reward) on a budget
of network rows, and `finetune.distill` makes p_{k+1} of these draws: after the last round the
model itself draws from about p_0 · exp(λ · reward). Beside every round: what plain draws of p_0
weighed by exp(λ k/rounds · reward) say is right (self-normalised, with their effective number), and
tree sampling of p_0 under the same λ for as many rows as all rounds so far took, training included
(a backward row counts as two forward ones).

    python -m benchmarks.search_teaches [--quick]
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import finish, header
from samplers import Ancestral, Result, TreeSampling, sample
from steering.finetune import Tuned, distill, path_kl
from steering.models.sequence_denoiser import SequenceDenoiser
from steering.models.sequence_pipeline import SequencePipeline
from steering.models.token_scheduler import TokenScheduler
from steering.pipelines import from_pipeline

LENGTH, STEPS, LAM = 12, 12, 24.0
MOTIFS = ("GATTAC", "TGACG")


def motifs(items: Tensor, _: Any) -> list[float]:
    """Share of its letters that each motif has right at its best place, averaged: a black box."""
    x = items.argmax(-1)
    scores = []
    for motif in MOTIFS:
        wanted = torch.tensor(["ACGT".index(c) for c in motif])
        right = (x.unfold(1, len(motif), 1) == wanted).double().mean(-1)
        scores.append(right.amax(1))
    return (sum(scores) / len(MOTIFS)).tolist()  # type: ignore[union-attr]


def markov(n: int, generator: torch.Generator) -> Tensor:
    """Sequences [n, L] whose letters follow each other by a fixed table."""
    table = torch.randn(4, 4, generator=torch.Generator().manual_seed(3)).softmax(-1)
    x = torch.randint(4, (n, 1), generator=generator)
    for _ in range(LENGTH - 1):
        x = torch.cat([x, torch.multinomial(table[x[:, -1]], 1, generator=generator)], 1)
    return x


def plain(pipe: SequencePipeline, n: int, seed: int) -> Tensor:
    """Rewards [n] float64 of draws of the model itself."""
    model = from_pipeline(pipe, steps=STEPS)
    found = sample(model, motifs, Ancestral(n), nfe=n * STEPS, seed=seed, batch=256, progress=False)
    return found.rewards.repeat_interleave(found.counts)


def tree(pipe: SequencePipeline, lam: float, nfe: int, seed: int) -> Result:
    """Draws of p · exp(lam · reward)."""
    model = from_pipeline(pipe, steps=STEPS)
    return sample(model, motifs, TreeSampling(), nfe=nfe, lam=lam, seed=seed, progress=False)


def taught(pipe: SequencePipeline, lam: float, nfe: int, updates: int, seed: int) -> Tuned:
    """One round: draws of p · exp(lam · reward) by a tree, and what they make of the model."""
    found = tree(pipe, lam, nfe, seed)
    tokens = found.items.argmax(-1)
    return distill(
        pipe,
        tokens,
        found.weights.log(),
        steps=STEPS,
        updates=updates,
        lr=2e-3,
        every=updates,
        seed=seed,
        progress=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small numbers, under a minute")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    header()
    rounds, nfe, updates = (2, 4096, 150) if quick else (3, 24576, 400)
    seeds, pretraining, looked_at = (1, 150, 500) if quick else (3, 1500, 2000)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = SequenceDenoiser(4, width=48, depth=2, kernel=5, fine=32).eval()
    first = SequencePipeline(net, TokenScheduler(4), length=LENGTH)
    data = markov(20000, torch.Generator().manual_seed(0))
    before = distill(
        first, data, steps=64, updates=pretraining, lr=3e-3, every=pretraining, progress=False
    ).pipe
    p_0 = plain(before, 10 * looked_at, seed=10**6)
    print(f"{looked_at} plain draws of each model, {nfe} rows of search a round; reward 0 to 1")
    print(f"before: {p_0.mean():.4f}, best of {len(p_0)} {p_0.max():.4f}\n")
    print("| seed | round | λ | plain draws | weighed draws of p_0 (eff. number) "
          "| tree on p_0, rows | tree on this, rows | path KL |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|")
    last: list[tuple[float, float, float, float]] = []
    began = time.process_time()
    for seed in range(seeds):
        pipe, spent = before, 0
        for k in range(1, rounds + 1):
            lam = LAM * k / rounds
            tuned = taught(pipe, LAM / rounds, nfe, updates, seed=seed * 100 + k)
            pipe = tuned.pipe
            spent += nfe + round(tuned.total("forward") + 2 * tuned.total("backward"))
            own = plain(pipe, looked_at, seed=seed)
            w = (lam * p_0).softmax(0)
            right, number = float(w @ p_0), float(1 / w.square().sum())
            searched = tree(before, lam, spent, seed)
            both = tree(pipe, LAM / rounds, nfe, seed)
            searched_mean, both_mean = (float(t.weights @ t.rewards) for t in (searched, both))
            kl = path_kl(pipe, before, steps=STEPS, n=200)
            print(
                f"| {seed} | {k} | {lam:.0f} | {own.mean():.4f} | {right:.4f} ({number:.0f}) "
                f"| {searched_mean:.4f}, {spent} | {both_mean:.4f}, {nfe} "
                f"| {kl.mean:.2f} ± {kl.error:.2f} |",
                flush=True,
            )
        last.append((float(own.mean()), right, searched_mean, both_mean))
    means = [sum(column) / len(last) for column in zip(*last, strict=True)]
    print(f"\n{time.process_time() - began:.0f} s of CPU")
    finish(
        {
            "before": float(p_0.mean()),
            "taught": means[0],
            "weighed_p_0": means[1],
            "tree_on_p_0_equal_rows": means[2],
            "tree_on_taught": means[3],
            "rows": spent,
            "seeds": seeds,
        }
    )


if __name__ == "__main__":
    main()
