"""Restoring real digits from measurements: FlowChef beside its peers, all tuned by one search.

    python -m benchmarks.inverse_problems [--quick] [--images 200] [--png FILE]

Box inpainting, super-resolution and deblurring of MNIST test images, easy and hard as published for
64 x 64 pixels, scaled to 28: boxes of 9 and 13 pixels, factors of 2 and 4, blurs of sigma .44 and
4.4 over 5 pixels; the hard ones with noise of .05. The model is the built-in rectified flow
(mnist-flow), told no class. Every method follows the same reward, -|A x - y|², on the same noise;
its settings are searched on 50 images by PSNR and judged on others: step in factors of two, on
beyond an edge of the grid while it pays; then the chain, its ODE or the Gaussian bridge (eta = 1);
where to stop; inner steps or travel back in time; the step again, finer. Seconds are CPU time of
one thread.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.memory import peak_bytes
from benchmarks.report import finish, header
from samplers import Ancestral, sample
from steering import from_pipeline, guidance, measure, operators, zoo
from steering.core import Guidance, Model
from steering.metrics import frechet
from steering.zoo.evaluate import grid, moments

STEPS, NULL, SEED, EXTRACTOR = 25, 10, 0, "mnist-classifier/64"
TUNING_PER_CLASS = 5  # of the 25 images of each class


@dataclass(frozen=True)
class Task:
    """A measurement to restore images from."""

    operator: Any
    noise: float = 0.0


TASKS = {
    "box 9": Task(operators.Box(9)),
    "x2": Task(operators.Downsample(2)),
    "blur .44": Task(operators.Blur(0.44, 5)),
    "box 13": Task(operators.Box(13), 0.05),
    "x4": Task(operators.Downsample(4), 0.05),
    "blur 4.4": Task(operators.Blur(4.4, 5), 0.05),
}


@dataclass(frozen=True)
class Settings:
    """What is searched: step, the chain's share of new noise, where to stop, and one more number of
    the method's own."""

    step: float
    eta: float = 0.0
    stop: float = 1.0
    extra: int = 1


@dataclass(frozen=True)
class Method:
    """A guidance by its settings, the steps to begin a search with, and further values."""

    make: Callable[[Any, Settings], Guidance]
    steps: tuple[float, ...]
    extras: tuple[int, ...] = (1,)


def _flowchef(reward: Any, s: Settings) -> Guidance:
    return guidance.FlowChef(reward, step=s.step, window=(0, s.stop), inner=s.extra)


def _dps(reward: Any, s: Settings) -> Guidance:
    return guidance.DPS(reward, step=s.step, window=(0, s.stop))


def _mpgd(reward: Any, s: Settings) -> Guidance:
    return guidance.MPGD(reward, step=s.step, window=(0, s.stop))


def _freedom(reward: Any, s: Settings) -> Guidance:
    return guidance.FreeDoM(reward, step=s.step, window=(0, s.stop), travel=s.extra)


def _flowdps(reward: Any, s: Settings) -> Guidance:
    return guidance.FlowDPS(reward, step=s.step, window=(0, s.stop), inner=s.extra)


RELATIVE = (0.25, 0.5, 1.0, 2.0)
METHODS = {
    "FlowChef": Method(_flowchef, RELATIVE, (1, 3, 10)),
    "DPS": Method(_dps, (0.5, 1.0, 2.0, 4.0)),
    "MPGD": Method(_mpgd, RELATIVE),
    "FreeDoM": Method(_freedom, (1.0, 2.0, 4.0, 8.0), (1, 2)),
    "FlowDPS": Method(_flowdps, (1.0, 2.0, 4.0, 8.0), (1, 3, 10)),
}


@dataclass(frozen=True)
class Restored:
    """Images made of a task's measurements, and what they cost."""

    images: Tensor  # [N, 1, 28, 28] in [0, 1], in the order of the originals
    seconds: float
    rows: int


class Bench:
    """The model, told no class, with a condition for every image."""

    def __init__(self, images: Tensor, seed: int) -> None:
        self.images, self.seed = images, seed
        self.models = {eta: without_class(len(images), eta=eta) for eta in (0.0, 1.0)}

    def observed(self, task: Task) -> Tensor:
        return operators.observe(task.operator, self.images, task.noise, seed=self.seed)

    def restore(self, task: Task, method: Method, settings: Settings) -> Restored:
        y = dict(enumerate(self.observed(task)))
        reward = measure(task.operator, y, noise=task.noise)
        return self.draw(reward, method.make(reward, settings), settings.eta)

    def draw(self, reward: Any, bend: Guidance | None, eta: float = 0.0) -> Restored:
        began = time.process_time()
        run = sample(
            self.models[eta],
            reward,
            Ancestral(1),
            guidance=bend,
            weights="none",
            seed=self.seed,
            progress=False,
        )
        images = torch.zeros_like(self.images)
        images[run.rows] = run.items
        return Restored(images, time.process_time() - began, int(run.spent.rows.sum()))

    def psnr(self, images: Tensor) -> Tensor:
        return psnr(images, self.images)


@cache
def _pipeline() -> Any:
    return zoo.load("mnist-flow")


def without_class(n: int, steps: int = STEPS, eta: float = 0.0) -> Model:
    """The flow told no class, with n conditions named 0 .. n - 1."""
    model = from_pipeline(_pipeline(), [NULL] * n, steps=steps, eta=eta)
    return replace(model, prompts=tuple(range(n)))


def psnr(images: Tensor, originals: Tensor) -> Tensor:
    """Peak signal-to-noise ratio [N] in dB of images in [0, 1]."""
    error = (images - originals).square().flatten(1).mean(1)
    return -10 * error.clamp(min=1e-10).log10()


def ssim(images: Tensor, originals: Tensor) -> float:
    """Mean structural similarity (torchmetrics, Gaussian window of 11)."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    found = structural_similarity_index_measure(images, originals, data_range=1.0)
    assert isinstance(found, Tensor)
    return float(found)


def distance(images: Tensor) -> float:
    """Fréchet distance to the test images, in the 64 features of the built-in classifier."""
    real = moments("mnist-test")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numbers of images are printed, and equal in a table
        features = zoo.load("mnist-classifier").features(images)
        return frechet(features, real, extractor=EXTRACTOR).value


def degraded(task: Task, y: Tensor) -> Tensor:
    """The measurement as an image."""
    size = 28 / y.shape[-1]
    return (functional.interpolate(y, scale_factor=size) if size > 1 else y).clamp(0, 1)


def search(bench: Bench, task: Task, method: Method, limit: int = 6) -> tuple[Settings, float, int]:
    """The settings with the best mean PSNR, that PSNR, and how many were tried."""
    tried: dict[Settings, float] = {}

    def value(settings: Settings) -> float:
        if settings not in tried:
            found = bench.psnr(bench.restore(task, method, settings).images).mean()
            tried[settings] = float(found) if found.isfinite() else -math.inf
        return tried[settings]

    def best() -> Settings:
        return max(tried, key=value)

    for step in method.steps:
        value(Settings(step))
    for _ in range(limit):  # on beyond an edge, while that is where the best is
        steps = [s.step for s in tried]
        step = best().step
        if step not in (min(steps), max(steps)):
            break
        value(Settings(step / 2 if step == min(steps) else step * 2))
    for factor in (1.0, 2.0):
        at = best()
        value(replace(at, eta=1.0, step=at.step * factor))
    for stop in (0.9, 0.7):
        value(replace(best(), stop=stop))
    for extra in method.extras[1:]:
        for factor in (0.5, 1.0):
            at = best()
            value(replace(at, extra=extra, step=at.step * factor))
    at = best()
    for factor in (2**-0.5, 2**0.5):
        value(replace(at, step=at.step * factor))
    return best(), tried[best()], len(tried)


def memory() -> dict[str, int]:
    """Most bytes of tensors in a run of 32 images over four steps, by method."""
    images = zoo.mnist_slice()[0][:32, None].float() / 255
    bench = Bench(images, SEED)
    bench.models = {0.0: without_class(32, steps=4)}
    task = TASKS["x2"]
    reward = measure(task.operator, dict(enumerate(bench.observed(task))))
    found = {"plain": peak_bytes(lambda: bench.draw(reward, None))}
    for name, method in METHODS.items():
        bend = method.make(reward, Settings(method.steps[0]))
        found[name] = peak_bytes(lambda bend=bend: bench.draw(reward, bend))
    return found


def split() -> tuple[Tensor, Tensor]:
    """Images to tune on [50, 1, 28, 28] and to judge by [200, 1, 28, 28], all classes alike."""
    images, labels = zoo.mnist_slice()
    images = images[:, None].float() / 255
    seen = torch.zeros(10, dtype=torch.int64)
    first = torch.zeros(len(labels), dtype=torch.bool)
    for k, label in enumerate(labels.tolist()):
        first[k] = seen[label] < TUNING_PER_CLASS
        seen[label] += 1
    order = torch.cat([(~first & (labels == c)).nonzero().flatten() for c in range(10)])
    order = order.view(10, -1).T.flatten()  # the first ten are one of each
    return images[first], images[order]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="few images, two tasks, no search")
    parser.add_argument("--images", type=int, default=200, help="to judge by")
    parser.add_argument("--png", type=Path, help="write a picture of one image of each class")
    args = parser.parse_args()
    torch.set_num_threads(1)
    header()
    tuning, images = split()
    images = images[: 20 if args.quick else args.images]
    names: Sequence[str] = ("box 9", "x4") if args.quick else tuple(TASKS)
    tune, judge = Bench(tuning, SEED + 1), Bench(images, SEED)
    plain = judge.draw(lambda x, p: x.flatten(1).sum(1), None)
    print(f"model {judge.models[0.0].name}, {STEPS} steps, no class; {len(images)} images, "
          f"tuned on {0 if args.quick else len(tuning)} others")  # fmt: skip
    print(f"plain sampling {plain.seconds:.1f} s; Fréchet distance ({EXTRACTOR}) of the originals "
          f"{distance(images):.2f}, of plain samples {distance(plain.images):.2f}\n")  # fmt: skip
    print(f"{'task':10}{'method':12}{'PSNR':>13}{'SSIM':>7}{'Fréchet':>9}{'s':>7}{'rows':>8}"
          "  settings (tuning PSNR, tried)")  # fmt: skip
    table: dict[str, dict[str, dict[str, Any]]] = {}
    pictures = [images[:10]]
    for task_name in names:
        task, rows = TASKS[task_name], {}
        y = judge.observed(task)
        for name, method in {"degraded": None, **METHODS}.items():
            note = ""
            if method is None:
                made = Restored(degraded(task, y), 0.0, 0)
            else:
                settings = Settings(method.steps[1])
                if not args.quick:
                    settings, found, count = search(tune, task, method)
                    note = f" ({found:.2f}, {count})"
                note = f"{settings}{note}"
                made = judge.restore(task, method, settings)
            each = judge.psnr(made.images)
            rows[name] = {
                "psnr": float(each.mean()),
                "psnr_error": float(each.std() / len(each) ** 0.5),
                "ssim": ssim(made.images, images),
                "frechet": distance(made.images),
                "seconds": made.seconds,
                "rows": made.rows,
                "settings": note,
            }
            pictures.append(made.images[:10])
            r = rows[name]
            print(f"{task_name:10}{name:12}{r['psnr']:7.2f} ± {r['psnr_error']:.2f}{r['ssim']:7.3f}"
                  f"{r['frechet']:9.2f}{r['seconds']:7.1f}{r['rows']:8}  {note}",
                  flush=True)  # fmt: skip
        table[task_name] = rows
        print()
    held = memory()
    print("most bytes held:", ", ".join(f"{k} {v / 1e6:.1f} MB" for k, v in held.items()))
    gaps = {
        task: max(r["psnr"] for name, r in rows.items() if name != "degraded")
        - rows["FlowChef"]["psnr"]
        for task, rows in table.items()
    }
    seconds = {name: sum(rows[name]["seconds"] for rows in table.values()) for name in METHODS}
    if args.png:
        grid(torch.cat(pictures)).save(args.png)
    finish(
        {
            "worst_psnr_gap": max(gaps.values()),
            "psnr_gaps": gaps,
            "time_over_dps": seconds["FlowChef"] / seconds["DPS"],
            "time_over_plain": seconds["FlowChef"] / (plain.seconds * len(names)),
            "memory_over_plain": held["FlowChef"] / held["plain"],
            "memory_dps_over_plain": held["DPS"] / held["plain"],
            "table": table,
        }
    )


if __name__ == "__main__":
    main()
