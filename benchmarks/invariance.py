"""Do guidance steps mean the same in a batch, and at twice the resolution?

    python -m benchmarks.invariance [--quick]

One guided step of the built-in flow at five of its steps, for box inpainting, random inpainting,
super-resolution, deblurring and a classifier. What is measured is how much of the residual of the
clean guess a step removes, its share of |A c - y|² or of the classifier's -log p: alone against in
a batch of 16, and at 28 x 28 against 56 x 56 pixels. The model at twice the resolution is the same
one between the mean of 2 x 2 pixels and copies of each, so that all else is equal; operators are
scaled with it. The share is of the guess that moves with the state, d = shift / carry.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.report import finish, header
from steering import from_pipeline, guidance, measure, operators, rewards, zoo
from steering.core import Guidance, Model, Step, images_in_unit_range
from steering.gaussian import GaussianProcess, NormalTransition, over_data

BATCH, NULL, GOAL = 16, 10, 1e-3
OPERATORS: dict[str, Callable[[int], Any]] = {
    "box": lambda k: operators.Box(12 * k),
    "x4": lambda k: operators.Downsample(4 * k),
    "x2": lambda k: operators.Downsample(2 * k),
    "blur": lambda k: _Fine(operators.Blur(1.5), k),
    "random": lambda k: _Fine(operators.Random(0.5), k),
}
GUIDANCES: dict[str, Callable[[Any], Guidance]] = {
    "FlowChef": lambda r: guidance.FlowChef(r, step=0.3),
    "FlowChef, inner 3": lambda r: guidance.FlowChef(r, step=0.3, inner=3),
    "MPGD": lambda r: guidance.MPGD(r, step=0.3),
    "FlowDPS": lambda r: guidance.FlowDPS(r, step=0.3),
    "FlowChef, full": lambda r: guidance.FlowChef(r, step=0.3, jacobian="full"),
}


@dataclass(frozen=True)
class _Fine:
    """The same operator at k times the resolution: of the mean of k x k pixels."""

    coarse: Any
    k: int

    def A(self, x: Tensor) -> Tensor:
        return self.coarse.A(functional.avg_pool2d(x, self.k))


@dataclass(frozen=True)
class _Coarse:
    """A reward of images at k times the resolution: of the mean of k x k pixels."""

    reward: Any
    k: int

    def __call__(self, items: Tensor, prompts: list) -> Tensor:
        return self.reward(functional.avg_pool2d(items, self.k), prompts)


def followed(task: str, images: Tensor, net: Any, k: int, only: int | None = None) -> Any:
    """The reward of a task at k times the resolution, for all images or for `only` one."""
    if task == "classifier":
        return _Coarse(rewards.Classifier(net, [3]), k)
    operator = OPERATORS[task](k)
    # measured of other images than those that the states are made of
    y = operators.observe(operator, fine(images, k)).flip(0)
    return measure(operator, y if only is None else y[only : only + 1])


def fine(x: Tensor, k: int) -> Tensor:
    """Every pixel k x k times."""
    return x.repeat_interleave(k, -1).repeat_interleave(k, -2)


def removed(
    model: Model, x: Tensor, i: int, make: Callable[[Any], Guidance], reward: Any, k: int
) -> Tensor:
    """Share [N] of the residual that one guided step from x [N, 1, 28, 28] removes."""
    process = model.process
    assert isinstance(process, GaussianProcess)
    n = len(x)
    steps, rows = torch.full((n,), i), torch.zeros(n, dtype=torch.int64)

    def denoise(x: Tensor, i: Tensor, row: Tensor) -> Tensor:
        return fine(model.denoiser(functional.avg_pool2d(x, k), process.time(i), row), k)

    def score(clean: Tensor, row: Tensor) -> Tensor:
        return reward(images_in_unit_range(clean), list(range(len(clean))))

    step = Step(fine(x, k), steps, rows, torch.arange(n), 1.0, process, reward, denoise, score)
    proposal = make(reward).propose(step)
    base, guided = proposal.base, proposal.guided
    assert isinstance(base, NormalTransition)
    assert isinstance(guided, NormalTransition)
    move = (guided.mean - base.mean) / over_data(process.carry(steps), x)
    with torch.no_grad():
        before, after = (score(c, rows) for c in (proposal.clean, proposal.clean + move))
    return ((before - after) / before).double()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="two of the steps")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    header()
    model = from_pipeline(zoo.load("mnist-flow"), [NULL], steps=50, eta=0.0)
    net = zoo.load("mnist-classifier")
    images = zoo.mnist_slice()[0][:BATCH, None].float() / 255
    noise = model.process.prior(torch.arange(BATCH))
    at = (10, 40) if quick else (0, 10, 25, 40, 49)
    print(f"{'guidance':20}{'reward':12}{'share removed':>15}{'in a batch':>12}{'at twice':>11}")
    worst = {"batch": 0.0, "resolution": 0.0}
    for name, make in GUIDANCES.items():
        for task in (*OPERATORS, "classifier"):
            shares, batch, resolution = [], 0.0, 0.0
            for i in at:
                sigma = float(model.process.sigma[i])  # type: ignore[attr-defined]
                x = (1 - sigma) * (2 * images - 1) + sigma * noise

                everyone = removed(model, x, i, make, followed(task, images, net, 1), 1)
                alone = torch.cat([
                    removed(model, x[n : n + 1], i, make, followed(task, images, net, 1, n), 1)
                    for n in range(BATCH)
                ])  # fmt: skip
                twice = removed(model, x, i, make, followed(task, images, net, 2), 2)
                shares.append(float(everyone.mean()))
                batch = max(batch, float(((alone - everyone) / everyone).abs().max()))
                resolution = max(resolution, float(((twice - everyone) / everyone).abs().max()))
            print(f"{name:20}{task:12}{min(shares):8.3f}..{max(shares):5.3f}{batch:12.1e}"
                  f"{resolution:11.1e}", flush=True)  # fmt: skip
            worst["batch"] = max(worst["batch"], batch)
            worst["resolution"] = max(worst["resolution"], resolution)
    finish({"batch": worst["batch"], "resolution": worst["resolution"], "goal": GOAL})


if __name__ == "__main__":
    main()
