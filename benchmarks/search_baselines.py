"""Which search finds the highest reward for its network rows? Best found, with default settings.

Three questions, each asked of every search at equal hard budgets of rows; a run's figure is the
highest reward among all that it found, given as mean ± standard deviation over seeds, beside the
number of seeds in which it was above best-of-N's on the same seed, and the reward calls of a run:
rows are equal, those are not, and where a reward is dear that is what decides.
    plane   eight independent copies of eight modes in the plane, whose rewards add up, with an
            exact denoiser (50 steps): no network and no guess is at fault
    digits  a 4 and a 9 at once, twice the smaller log p of the built-in classifier, at most
            2 log(1/2) = -1.386, on the built-in MNIST model (20 steps, DDIM eta = 1)
    ode     the same with eta = 0, where nothing but the noise can be searched; searches that need
            noise on the way refuse it
Nothing is tuned. lam = 1, and 10 for the published search by SMC (Feynman-Kac steering with the
"max" potential); it matters to SMC and to SVDD that samples.

    python -m benchmarks.search_baselines [--quick] [--seeds S]
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.report import finish, header
from samplers import SMC, SVDD, Beam, BestOfN, TreeSearch, ZeroOrder, sample
from samplers.core import Sampler
from steering import from_pipeline, rewards, zoo
from steering.core import Model
from tests.exact import Modes, planar_chain

SEARCHES: dict[str, tuple[Sampler, float]] = {  # and lam
    "best-of-N": (BestOfN(), 1.0),
    "DTS*": (TreeSearch(), 1.0),
    "beam": (Beam(), 1.0),
    "beams of 4": (Beam(4), 1.0),
    "SVDD": (SVDD(), 1.0),
    "SVDD, argmax": (SVDD(selection="argmax"), 1.0),
    "SMC": (SMC(), 1.0),
    "SMC, max, lam = 10": (SMC(potential="max"), 10.0),
    "zero-order": (ZeroOrder(), 1.0),
}
Question = tuple[str, Model, Any, int, int]  # name, model, reward, rows, runs per seed asked for


def questions(quick: bool) -> list[Question]:
    """What is searched."""
    density = Modes()
    plane = planar_chain(density, 50, copies=8)
    net = zoo.load("mnist-classifier")
    pair = 2 * rewards.Minimum([rewards.Classifier(net, [c]) for c in (4, 9)])
    noisy, ode = (from_pipeline(zoo.load("mnist"), steps=20, eta=eta) for eta in (1.0, 0.0))
    if quick:
        return [("plane", plane, density.reward, 2000, 2), ("ode", ode, pair, 400, 1)]
    return [
        ("plane", plane, density.reward, 2000, 4),
        ("plane", plane, density.reward, 10_000, 4),
        ("digits", noisy, pair, 800, 1),
        ("digits", noisy, pair, 3200, 1),
        ("ode", ode, pair, 800, 1),
        ("ode", ode, pair, 3200, 1),
    ]


def best_found(
    question: Question, sampler: Sampler, lam: float, seeds: int
) -> list[tuple[float, int]]:
    """By seed, the highest reward of all found and the reward calls that it took; empty if the
    sampler refuses the chain."""
    _, model, reward, nfe, times = question
    found = []
    for seed in range(seeds * times):
        try:
            run = sample(model, reward, sampler, nfe=nfe, lam=lam, seed=seed, progress=False)
        except ValueError as error:
            if "finds no level" not in str(error):
                raise
            return []
        assert run.nfe <= nfe
        found.append((float(run.rewards.max()), int(run.spent.reward_calls.sum())))
    return found


def table(
    question: Question,
    found: dict[str, list[float]],
    calls: dict[str, int],
    seconds: dict[str, float],
) -> str:
    """A Markdown table of one question, the best search first."""
    name, model, _, nfe, _ = question
    lines = [
        f"**{name}**, {nfe:,} rows ({nfe // model.process.steps} walks)",
        "",
        "| search | best found | above best-of-N | reward calls | CPU seconds |",
        "|---|---|---|---|---|",
    ]
    order = sorted(found, key=lambda s: -statistics.mean(found[s]) if found[s] else math.inf)
    for search in order:
        best = found[search]
        if not best:
            lines.append(f"| {search} | refused: no noise on the way | | | |")
            continue
        ahead = sum(a > b for a, b in zip(best, found["best-of-N"], strict=True))
        lines.append(
            f"| {search} | {statistics.mean(best):.3f} ± {statistics.stdev(best):.3f} | "
            f"{ahead} of {len(best)} | {calls[search]} | {seconds[search]:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="less than a minute")
    parser.add_argument(
        "--seeds",
        type=int,
        default=3,
        help="at least 2; four times as many in the plane (default 3)",
    )
    args = parser.parse_args()
    if args.seeds < 2:
        parser.error("--seeds: give at least 2, or there is no spread")
    torch.set_num_threads(1)
    header()
    print()
    clock: Callable[[], float] = time.process_time
    figures: dict[str, Any] = {}
    for question in questions(args.quick):
        found, calls, seconds = {}, {}, {}
        for search, (sampler, lam) in SEARCHES.items():
            began = clock()
            runs = best_found(question, sampler, lam, args.seeds)
            found[search] = [best for best, _ in runs]
            calls[search] = max((n for _, n in runs), default=0)
            seconds[search] = (clock() - began) / (args.seeds * question[4])
        print(table(question, found, calls, seconds), "\n", flush=True)
        figures[f"{question[0]}/{question[3]}"] = {
            search: {"mean": statistics.mean(best), "std": statistics.stdev(best)}
            for search, best in found.items()
            if best
        }
    finish({"seeds": args.seeds, "best_found": figures})


if __name__ == "__main__":
    main()
