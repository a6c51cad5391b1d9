"""Judge the built-in MNIST flows with the built-in classifier, before and after reflow.

    python -m steering.zoo.evaluate_flow [--n 1000] [--seed 0] [--png FILE] [--quick]

prints how straight each flow is, and for few and many Euler steps, plain and guided, in how many
samples the classifier sees the digit that was asked for and their Fréchet distance to the test
images; and writes a picture: a row of every digit of each flow, at 1, 2, 4 and 25 steps, guided.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from steering import zoo
from steering.metrics import frechet
from steering.noise import normal, root_key
from steering.zoo.evaluate import EXTRACTOR, grid, moments

FLOWS = {"base": "mnist-flow-base", "reflow": "mnist-flow"}
STEPS = (1, 2, 4, 8, 25, 50)
SCALES = (1.0, 2.0)
SHOWN = (1, 2, 4, 25)
BATCH = 100


def start(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noise [n,1,28,28], keyed, and labels [n], every digit in turn."""
    return normal(root_key(seed, torch.arange(n)), (1, 28, 28)), torch.arange(n) % 10


def draw(pipe: Any, x: Tensor, labels: Tensor, steps: int, scale: float) -> Tensor:
    """Images [N,1,28,28] in [0,1] from noise x, by Euler's rule."""
    parts = zip(x.split(BATCH), labels.split(BATCH), strict=True)
    return torch.cat([pipe(c, steps, scale, latents=z, output_type="pt").images for z, c in parts])


@torch.no_grad()
def straightness(pipe: Any, x: Tensor, labels: Tensor, steps: int = 50) -> float:
    """How far a flow's own paths are from straight lines: 0 is straight.

    mean over sigma of E|(x_1 - x_0) - v(x_sigma)|² / E|x_1 - x_0|², along the paths x_sigma by
    Euler's rule from noise x_1 = x [N,1,28,28] to their ends x_0, without guidance
    (arXiv:2209.03003, eq. 4, divided by what it would be for v = 0).
    """
    velocities, state = [], x
    for k in range(steps):
        t = torch.full((len(x),), 1000 * (1 - k / steps))
        velocities.append(pipe.unet(state, t, class_labels=labels).sample)
        state = state - velocities[-1] / steps
    whole = x - state
    off = torch.stack([(whole - v).square().mean() for v in velocities]).mean()
    return float(off / whole.square().mean())


def judge(images: Tensor, labels: Tensor) -> tuple[float, float]:
    """In what share of images the classifier sees their label, and their Fréchet distance."""
    classifier = zoo.load(EXTRACTOR)
    with torch.inference_mode():
        features = classifier.features(images)
        right = classifier.head(features).argmax(-1) == labels
    distance = frechet(features, moments("mnist-test"), extractor=EXTRACTOR)
    return right.double().mean().item(), distance.value


def picture(pipes: dict[str, Any], seed: int) -> Image.Image:
    """Rows of the digits 0 to 9 from the same noise, one for each of SHOWN, flow under flow."""
    x, labels = start(10, seed)
    rows = [draw(pipe, x, labels, steps, 2.0) for pipe in pipes.values() for steps in SHOWN]
    return grid(torch.cat(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--n", type=int, default=1000, help="samples of each setting")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--png", type=Path, default=Path("mnist_flow.png"))
    parser.add_argument("--quick", action="store_true", help="100 samples, at most 8 steps")
    args = parser.parse_args()
    n, counts = (100, STEPS[:4]) if args.quick else (args.n, STEPS)
    if n < 10:
        parser.error(f"--n {n}: give at least 10, one of every digit.")
    torch.set_num_threads(1)
    pipes = {name: zoo.load(known) for name, known in FLOWS.items()}
    x, labels = start(n, args.seed)
    result: dict[str, Any] = {"n": n, "seed": args.seed, "extractor": EXTRACTOR}
    floor = frechet(moments("mnist-train"), moments("mnist-test"), extractor=EXTRACTOR).value
    result["frechet_train_test"] = floor
    out = sys.stdout
    out.write(f"command: python -m steering.zoo.evaluate_flow {shlex.join(sys.argv[1:])}\n")
    out.write(f"machine: {platform.machine()}, one thread of torch {torch.__version__}\n")
    out.write(f"{n} samples, seed {args.seed}; straightness of {min(n, 200)}, ")
    out.write(f"seed {args.seed + 1}; train against test images: {floor:.3f}\n")
    for name, pipe in pipes.items():
        bent = straightness(pipe, *start(min(n, 200), args.seed + 1))
        result[name] = {"straightness": bent}
        out.write(f"\n{name}: straightness {bent:.4f} (0 is straight)\n")
        out.write("scale  steps  right digit  Fréchet distance\n")
        for scale in SCALES:
            for steps in counts:
                begun = time.process_time()
                images = draw(pipe, x, labels, steps, scale)
                rows = n * steps * (2 if scale > 1 else 1)
                ms = 1e3 * (time.process_time() - begun) / rows
                right, distance = judge(images, labels)
                result[name][f"scale {scale:g}, {steps} steps"] = {
                    "right": right,
                    "frechet": distance,
                    "ms_per_row": ms,
                }
                out.write(f"{scale:5.1f} {steps:6d} {right:12.1%} {distance:17.3f}\n")
                out.flush()
    picture(pipes, args.seed).save(args.png)
    out.write(f"\npicture {args.png}\n{json.dumps(result)}\n")


if __name__ == "__main__":
    main()
