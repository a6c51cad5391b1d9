"""Classifier guidance on the built-in flow: the gradient skipped, in full, and MPGD's.

    python -m benchmarks.classifier_guidance [--quick] [--images 1000]

The built-in rectified flow (mnist-flow), told no class, on its ODE of 25 steps, follows
log p(class) of the built-in classifier for each of the ten classes. Every method's step and window
are searched on 200 other noises: nearest to real digits by Fréchet distance among settings that
reach 95 % of the classes, else those that reach most. Judged by the classifier that is followed, by
nearest neighbours among 250 real images that it never saw ("held-out"), and by Fréchet distance to
the test images, in the features of the same classifier. Plain samples and the flow told the class
itself are beside. Seconds are CPU time of one thread.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.inverse_problems import EXTRACTOR, distance
from benchmarks.memory import peak_bytes
from benchmarks.report import finish, header
from samplers import Ancestral, sample
from steering import from_pipeline, zoo
from steering.core import Guidance, Model
from steering.guidance import MPGD, FlowChef

STEPS, NULL, REACHED = 25, 10, 0.95


@dataclass(frozen=True)
class Wanted:
    """log p(class | image) [N], the class by prompt; differentiable."""

    net: Any
    differentiable: bool = True
    name: str = "log p(prompt)"

    def __call__(self, items: Tensor, prompts: list) -> Tensor:
        log_p = self.net(items).log_softmax(1)
        return log_p.gather(1, torch.tensor([int(p) for p in prompts])[:, None])[:, 0]


METHODS: dict[str, Callable[[float, float], Guidance]] = {
    "skip": lambda step, stop: FlowChef(step=step, window=(0, stop)),
    "full": lambda step, stop: FlowChef(step=step, window=(0, stop), jacobian="full"),
    "MPGD": lambda step, stop: MPGD(step=step, window=(0, stop)),
}
GRID = (0.01, 0.02, 0.04, 0.08)


@dataclass(frozen=True)
class Judged:
    """What became of a run."""

    accuracy: float
    held_out: float
    frechet: float
    seconds: float
    rows: int


class Bench:
    """The flow and its judges."""

    def __init__(self) -> None:
        self.net = zoo.load("mnist-classifier")
        self.pipe = zoo.load("mnist-flow")
        self.images, self.labels = zoo.mnist_slice()

    def model(self, labels: list[int], scale: float | None = None, steps: int = STEPS) -> Model:
        """The flow with ten conditions named by their class, told the labels."""
        told = from_pipeline(self.pipe, labels, steps=steps, eta=0.0, guidance_scale=scale)
        return replace(told, prompts=tuple(range(10)))

    def judge(self, model: Model, bend: Guidance | None, per_class: int, seed: int) -> Judged:
        began = time.process_time()
        run = sample(
            model,
            Wanted(self.net),
            Ancestral(per_class),
            guidance=bend,
            weights="none",
            seed=seed,
            progress=False,
        )
        seconds = time.process_time() - began
        with torch.no_grad():
            seen = torch.cat([self.net(part).argmax(1) for part in run.items.split(500)])
        nearest = torch.cdist(run.items.flatten(1), self.images.flatten(1).float() / 255)
        near = self.labels.long()[nearest.topk(3, largest=False).indices].mode(1).values
        right, held_out = (float((v == run.rows).float().mean()) for v in (seen, near))
        rows = int(run.spent.rows.sum())
        return Judged(right, held_out, distance(run.items), seconds, rows)

    def search(self, name: str, per_class: int) -> tuple[float, float, int]:
        """Step, where to stop, and how many settings were tried."""
        model = self.model([NULL] * 10)
        tried: dict[tuple[float, float], Judged] = {}

        def attempt(step: float, stop: float) -> None:
            if (step, stop) not in tried:
                tried[step, stop] = self.judge(model, METHODS[name](step, stop), per_class, 10**6)

        def best() -> tuple[float, float]:
            good = {s: -j.frechet for s, j in tried.items() if j.accuracy >= REACHED}
            value = good or {s: j.accuracy for s, j in tried.items()}
            return max(value, key=lambda s: value[s])

        for step in GRID:
            attempt(step, 1.0)
        for _ in range(6):  # on beyond an edge, while that is where the best is
            steps, at = [step for step, _ in tried], best()[0]
            if at not in (min(steps), max(steps)):
                break
            attempt(at / 2 if at == min(steps) else at * 2, 1.0)
        for stop in (0.8, 0.6):
            for factor in (1.0, 2.0):
                attempt(best()[0] * factor, stop)
        return *best(), len(tried)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="few images, no search")
    parser.add_argument("--images", type=int, default=1000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    header()
    bench, per_class = Bench(), 5 if args.quick else args.images // 10
    plain = bench.model([NULL] * 10)
    real = bench.images[:, None].float() / 255
    print(f"model {plain.name}, {STEPS} steps of its ODE; {10 * per_class} images; Fréchet "
          f"distance ({EXTRACTOR}) of {len(real)} real images {distance(real):.2f}")  # fmt: skip
    print(f"{'':14}{'accuracy':>9}{'held-out':>10}{'Fréchet':>9}{'s':>8}{'rows':>8}")
    table: dict[str, dict[str, Any]] = {}

    def show(name: str, found: Judged, note: str = "") -> None:
        table[name] = {**vars(found), "settings": note}
        print(f"{name:14}{found.accuracy:9.3f}{found.held_out:10.3f}{found.frechet:9.2f}"
              f"{found.seconds:8.1f}{found.rows:8}  {note}", flush=True)  # fmt: skip

    show("plain", bench.judge(plain, None, per_class, 0))
    for scale in (1.0, 2.0):
        told = bench.model(list(range(10)), scale)
        show(f"told, cfg {scale:g}", bench.judge(told, None, per_class, 0))
    for name, make in METHODS.items():
        step, stop, count = (GRID[1], 1.0, 0) if args.quick else bench.search(name, 20)
        found = bench.judge(plain, make(step, stop), per_class, 0)
        show(name, found, f"step {step:g}, window (0, {stop:g}), {count} tried")
    short = bench.model([NULL] * 10, steps=4)
    held = {
        name: peak_bytes(lambda bend=bend: bench.judge(short, bend, 3, 0))
        for name, bend in {"plain": None, **{n: m(0.02, 1.0) for n, m in METHODS.items()}}.items()
    }
    print("most bytes held by 30 images:", ", ".join(f"{k} {v / 1e6:.1f} MB"
          for k, v in held.items()))  # fmt: skip
    finish({"table": table, "bytes": held, "extractor": EXTRACTOR})


if __name__ == "__main__":
    main()
