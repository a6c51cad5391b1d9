"""Text completion: which search finds the text that a judge likes best, for its network rows?

    python -m benchmarks.text_completion [--quick] [--nfe N ...] [--seeds S] [--device cuda]

The built-in text model completes three beginnings to 64 characters in 64 steps; the reward is
log p(Bible) under the built-in judge, at most 0. A run's figure is the highest reward among all
that it found, averaged over beginnings, then as mean ± standard deviation over seeds (of noise: all
seeds and beginnings are conditions of one run, and share its network calls). Beside it, over the 16
best of each run: the share of distinct ones among their trigrams of words, and two checks that
nothing was steered by: bits per character under counts of characters in chapters that neither the
model nor its judge was trained on, and the share of words that those chapters know. Real windows of
other such chapters stand below, for scale.

DTS* backs up the maximum, as in the published text completion, once with our widening and branch
steps and once with the published ones: C = 2, alpha = .7, steps 64, 54, ..., 14 to go, of which
the first is the root. SMC runs at lam = 10, the published Feynman-Kac steering's, with potentials
"difference" and "max".
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import finish, header
from samplers import SMC, BestOfN, TreeSearch, sample
from samplers.core import Sampler
from search.widen import Widening
from steering import from_pipeline, rewards, zoo
from steering.zoo.evaluate_text import PROMPTS, Check, words_of

STEPS, SHOWN, LAM = 64, 16, 10.0
BRANCH = (10, 20, 30, 40, 50)
SEARCHES: dict[str, Sampler] = {
    "DTS*": TreeSearch(backup="max"),
    "DTS*, published": TreeSearch(backup="max", branch=BRANCH, widening=Widening(2.0, 0.7)),
    "best-of-N": BestOfN(),
    "SMC": SMC(),
    "SMC, max": SMC(potential="max"),
}
# arXiv 2506.20701, figure, read off: the best log p by network rows
PUBLISHED = {
    "DTS*": {12: -0.141, 14: -0.074, 16: -0.045, 18: -0.034},
    "best-of-N": {12: -0.18, 14: -0.10, 16: -0.063, 18: -0.048},
    "SMC (FK)": {12: -0.20, 14: -0.119, 16: -0.088, 18: -0.056},
}
DIFFERENCES = """Not the same protocol: published are MDLM, a model of 64 word pieces of web text,
rewarded by RoBERTa on CoLA, over 15 beginnings x 3 completions, with c_uct unknown; here a model of
64 characters of 1.2 million parameters, its own judge, 3 beginnings. Compare the order of the
methods and the factor in network rows between them, not the numbers."""


@dataclass(frozen=True)
class Found:
    """Of one seed: means over beginnings, and the best texts."""

    best: float
    trigrams: float
    bits: float
    known: float
    texts: list[tuple[float, str]]  # best reward and its text, by beginning


def distinct_trigrams(texts: list[str]) -> float:
    """Share of distinct ones among all trigrams of words."""
    every = []
    for text in texts:
        words = words_of(text)
        every += list(zip(words, words[1:], words[2:], strict=False))
    return len(set(every)) / max(1, len(every))


def search(model: Any, reward: Any, sampler: Sampler, nfe: int, check: Check) -> list[Found]:
    """Run one search for each seed and beginning, which are the conditions of one run."""
    run = sample(model, reward, sampler, nfe=nfe, lam=LAM, progress=False)
    assert run.nfe <= nfe * len(model.prompts)
    texts, found = run.texts, []
    for first in range(0, len(model.prompts), len(PROMPTS)):
        parts = []
        for k, prompt in enumerate(PROMPTS):
            skip = len(prompt)
            here = (run.rows == first + k).nonzero()[:, 0]
            here = here[run.rewards[here].argsort(descending=True, stable=True)][:SHOWN].tolist()
            top = [texts[j] for j in here]
            assert all(text.startswith(prompt) for text in top)
            parts.append(
                (
                    run.rewards[here[0]].item(),
                    distinct_trigrams([text[skip:] for text in top]),
                    statistics.mean(check.bits(text, skip) for text in top),
                    statistics.mean(check.known(text, skip) for text in top),
                    top[0],
                )
            )
        best, trigrams, bits, known = (statistics.mean(part[j] for part in parts) for j in range(4))
        shown = [(part[0], part[4]) for part in parts]
        found.append(Found(best, trigrams, bits, known, shown))
    return found


def spread(values: list[float], digits: int = 3) -> str:
    """mean ± standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def real_windows(pipe: Any, reward: Any, check: Check) -> str:
    """The same figures of windows of real text that start a sentence."""
    texts = []
    for chapter in check.unseen:
        starts = [0] + [k + 2 for k in range(len(chapter)) if chapter[k : k + 2] == ". "]
        texts += [chapter[k : k + pipe.length] for k in starts if k + pipe.length <= len(chapter)]
    items = torch.nn.functional.one_hot(pipe.read(texts), len(pipe.alphabet)).float()
    score = reward(items.to(pipe.device), [None] * len(texts)).cpu()
    skip = round(statistics.mean(map(len, PROMPTS)))
    return (
        f"{len(texts)} real windows: log p {score.mean():.3f} on average, median "
        f"{score.median():.3f}; distinct trigrams {distinct_trigrams(texts[:SHOWN]):.3f} of "
        f"{SHOWN}; bits {statistics.mean(check.bits(t, skip) for t in texts):.2f}; known words "
        f"{statistics.mean(check.known(t, skip) for t in texts):.3f}"
    )


def table(found: dict[str, dict[int, list[Found]]], seconds: dict[str, float]) -> str:
    """A Markdown table: a search and a budget on a line."""
    lines = [
        "| search | rows | best log p | distinct trigrams | bits per character | known words |",
        "|---|---|---|---|---|---|",
    ]
    for name, by_nfe in found.items():
        for nfe, runs in by_nfe.items():
            lines.append(
                f"| {name} | {nfe} | {spread([r.best for r in runs])} | "
                f"{spread([r.trigrams for r in runs])} | {spread([r.bits for r in runs], 2)} | "
                f"{spread([r.known for r in runs])} |"
            )
    took = ", ".join(f"{name} {took:.0f}" for name, took in seconds.items())
    return "\n".join([*lines, "", f"CPU seconds in all: {took}"])


def plot(found: dict[str, dict[int, list[Found]]], path: Path) -> None:
    """Curves of the best reward, and of what it costs in bits under the check."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for name, by_nfe in found.items():
        for axis, of in zip(axes, ("best", "bits"), strict=True):
            values = [[getattr(run, of) for run in runs] for runs in by_nfe.values()]
            axis.errorbar(
                list(by_nfe),
                [statistics.mean(v) for v in values],
                [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values],
                label=name, marker="o", markersize=4, capsize=2,
            )  # fmt: skip
    labels = ("best log p(Bible), judge", "bits per character of the 16 best, counts")
    for axis, label in zip(axes, labels, strict=True):
        axis.set_xscale("log", base=2)
        axis.set_xlabel("network rows per beginning")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="less than a minute")
    parser.add_argument("--nfe", type=int, nargs="+", help="default 2^10 to 2^12, 2^14 on cuda")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--plot", type=Path, help="file of the curves")
    args = parser.parse_args()
    torch.set_num_threads(1)
    header()
    budgets = args.nfe or [2**k for k in range(10, 15 if args.device == "cuda" else 13)]
    seeds = args.seeds
    if args.quick:
        budgets, seeds = [256, 512], 2
    # half the bits, and on a CPU that has them less than half the time
    pipe = zoo.load("text", dtype=torch.bfloat16, device=args.device)
    reward = rewards.Classifier(zoo.load("text-judge", device=args.device), [1])
    model = from_pipeline(pipe, prompts=PROMPTS * seeds, steps=STEPS)
    check = Check.load()

    found: dict[str, dict[int, list[Found]]] = {}
    seconds: dict[str, float] = {}
    for name, sampler in SEARCHES.items():
        began = time.process_time()
        found[name] = {nfe: search(model, reward, sampler, nfe, check) for nfe in budgets}
        seconds[name] = time.process_time() - began
        print(f"{name}: {seconds[name]:.0f} CPU seconds", flush=True)
    print(f"\n{seeds} seeds x {len(PROMPTS)} beginnings\n")
    print(table(found, seconds))
    print("\n" + real_windows(pipe, reward, check))
    print(f"\nThe best of seed 0 at {budgets[-1]} rows:")
    for name, by_nfe in found.items():
        for score, text in by_nfe[budgets[-1]][0].texts:
            print(f"  {name:16} {score:8.3f}  {text!r}")
    print("\nPublished, best log p (arXiv 2506.20701, read off a figure):\n")
    print("| search |" + "".join(f" 2^{k} |" for k in PUBLISHED["DTS*"]))
    print("|---|" + "---|" * len(PUBLISHED["DTS*"]))
    for name, values in PUBLISHED.items():
        print(f"| {name} |" + "".join(f" {v} |" for v in values.values()))
    print(f"\n{DIFFERENCES}\n")
    if args.plot:
        plot(found, args.plot)

    def means(of: str) -> dict[str, dict[int, float]]:
        return {
            name: {nfe: statistics.mean(getattr(r, of) for r in runs) for nfe, runs in by.items()}
            for name, by in found.items()
        }

    finish(
        {
            "seeds": seeds,
            "best_log_reward": means("best"),
            "distinct_trigrams": means("trigrams"),
            "bits_per_character": means("bits"),
            "known_words": means("known"),
        }
    )


if __name__ == "__main__":
    main()
