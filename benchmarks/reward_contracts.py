"""Does every reward keep the contract? In batches, in gradients, and on broken images.

    python -m benchmarks.reward_contracts [--quick]

All rewards, on random networks of some thousand weights that are built here and on images of
several sizes, some gray. For each:
    batch     largest difference between one call of 16 and 16 calls of one (at most 1e-4 is asked
              for), beside `spread`, the standard deviation of the scores that are compared,
    gradient  of those that say they are differentiable: largest relative error of the gradient
              against central differences along it, but at `kinks`, where a minimum passes from
              one part to another; of the others: does the score really carry
              none? `leak` is the largest gradient of a score in another item, and must be 0,
    broken    images with one pixel nan or infinite, of how many the score failed, and no other's;
              scored as the engine scores them, so that a crash would show.

The scorers of the imscore package are stand-ins of its interface; what they check is the adapter.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import finish, header
from samplers.scoring import call_reward
from steering.rewards import OverFrames
from tests import tiny_rewards

N = 16
PROMPTS = ["a red fox", "two dogs on a hill", "a sign that says 10", ""] * (N // 4)
SIZES = [(3, 40, 48), (3, 32, 32), (1, 28, 28), (3, 90, 61)]
STEP = 0.02  # of the differences; float32 scores leave three of their digits
KINK = 0.2  # the slopes of both sides differ by this share


@dataclass
class Findings:
    """The worst of what was seen of one reward."""

    batch: float = 0.0
    spread: float = math.inf
    gradient: float = 0.0
    leak: float = 0.0
    flag: bool = True
    points: int = 0
    kinks: int = 0
    broken: int = 0
    failed: int = 0
    wrongly: int = 0


def images(shape: tuple[int, int, int], rng: torch.Generator) -> Tensor:
    """Noise over a slope, 16 of a shape."""
    slope = torch.linspace(0, 1, shape[2]) * torch.linspace(0, 1, N)[:, None, None, None]
    return (torch.rand(N, *shape, generator=rng) + slope) / 2


def batches(reward: Any, x: Tensor, found: Findings) -> None:
    with torch.no_grad():
        together = reward(x, PROMPTS).double()
        alone = [reward(x[k : k + 1], PROMPTS[k : k + 1]).double() for k in range(N)]
    found.batch = max(found.batch, float((together - torch.cat(alone)).abs().max()))
    found.spread = min(found.spread, float(together.std()))


def gradients(reward: Any, x: Tensor, found: Findings) -> None:
    x = x.clone().requires_grad_()
    scores = reward(x, PROMPTS)
    if not reward.differentiable:
        found.flag &= not scores.requires_grad
        return
    for k in (0, N - 1):
        (gradient,) = torch.autograd.grad(scores[k], x, retain_graph=True)
        others = torch.cat([gradient[:k], gradient[k + 1 :]])
        found.leak = max(found.leak, float(others.abs().max()))
        size = float(gradient[k].norm())
        found.flag &= 0 < size < math.inf
        way = STEP * gradient[k] / size
        with torch.no_grad():
            up, here, down = (
                float(reward((x[k] + sign * way)[None], PROMPTS[k : k + 1])) for sign in (1, 0, -1)
            )
        found.points += 1
        if abs(up - 2 * here + down) > KINK * STEP * size:
            found.kinks += 1  # a minimum changes its mind between the two: no slope to compare
        else:
            found.gradient = max(found.gradient, abs((up - down) / (2 * STEP) / size - 1))
    found.flag &= 2 * found.kinks < found.points


def breaks(reward: Any, x: Tensor, rng: torch.Generator, found: Findings) -> None:
    broken = torch.randperm(N, generator=rng)[: N // 4]
    x = x.clone()
    for k, pixel in zip(broken.tolist(), (math.nan, math.inf, -math.inf, math.nan), strict=True):
        x[k].view(-1)[int(torch.randint(x[k].numel(), (), generator=rng))] = pixel
    failed = call_reward(reward, x, PROMPTS, "fail").reward.isnan()
    found.broken += len(broken)
    found.failed += int(failed[broken].sum())
    found.wrongly += int(failed.sum() - failed[broken].sum())


def rows(everything: dict[str, Any], seeds: Sequence[int], sizes: Sequence[Any]):
    for name, reward in everything.items():
        found = Findings()
        for seed in seeds:
            rng = torch.Generator().manual_seed(seed)
            for shape in sizes:
                x = images(shape, rng)
                if isinstance(reward, OverFrames):
                    x = torch.stack([x, x.flip(0), x.roll(1, 0)], 1)
                batches(reward, x, found)
                gradients(reward, x, found)
                breaks(reward, x, rng, found)
        yield name, reward, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer seeds and sizes")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    header()
    seeds, sizes = (range(1), SIZES[:2]) if quick else (range(8), SIZES)
    print(f"{len(seeds)} seeds, sizes {', '.join('x'.join(map(str, size)) for size in sizes)}\n")
    print(f"{'reward':<26} batch     spread    gradient                          broken images")
    worst, table = Findings(), {}
    with tempfile.TemporaryDirectory() as folder, tiny_rewards.imscore():
        everything = tiny_rewards.every(Path(folder))
        everything |= {
            f"OverFrames {by}": OverFrames(everything["ClipScore"], by, frames=2)
            for by in ("mean", "min")
        }
        with contextlib.redirect_stdout(sys.stderr):  # loading talks
            for name, reward in everything.items():
                reward(torch.rand((1, 2, 3, 32, 32) if "Over" in name else (1, 3, 32, 32)), ["a"])
        for name, reward, found in rows(everything, seeds, sizes):
            slope = f"{found.gradient:.1e} leak {found.leak:g}" if reward.differentiable else "none"
            slope += f", {found.kinks} of {found.points} kinks" if found.kinks else ""
            slope += "" if found.flag else " FLAG IS WRONG"
            print(
                f"{name:<26} {found.batch:.1e}   {found.spread:<9.2g} {slope:<33} "
                f"{found.failed} of {found.broken} failed, {found.wrongly} others",
                flush=True,
            )
            table[name] = vars(found)
            worst.batch = max(worst.batch, found.batch)
            worst.gradient = max(worst.gradient, found.gradient)
            worst.leak = max(worst.leak, found.leak)
            worst.flag &= found.flag
            worst.broken += found.broken
            worst.failed += found.failed
            worst.wrongly += found.wrongly
    finish(
        {
            "max_batch_difference": worst.batch,
            "gradient_flags_true": worst.flag and worst.leak == 0 and worst.gradient < 0.05,
            "max_gradient_error": worst.gradient,
            "broken_images_failed": worst.failed / worst.broken,
            "whole_images_failed": worst.wrongly,
            "rewards": len(table),
            "table": table,
            "noise_seeds": list(seeds),
        }
    )


if __name__ == "__main__":
    main()
