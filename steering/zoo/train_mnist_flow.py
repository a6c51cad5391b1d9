"""Train the built-in class-conditional MNIST flow: a small UNet, rectified flow, one reflow round.

    python -m steering.zoo.train_mnist_flow --data DIR --out DIR --stage base --minutes 35
    python -m steering.zoo.train_mnist_flow --out DIR --stage pairs
    python -m steering.zoo.train_mnist_flow --out DIR --stage reflow --minutes 20

x_sigma = (1 - sigma) · clean + sigma · noise, and the network predicts noise - clean; it is told
the time 1000 · sigma and the class, 0 to 9, or 10 for no class. Rectified flow and reflow:
Liu, Gong & Liu 2022, arXiv:2209.03003; the class left out at random: Ho & Salimans 2022,
arXiv:2207.12598.

- base starts from the weights of "mnist" (unless --no-warm), whose network is the same but for the
  class: its chain has the same ratio of noise to signal at the time (2000 / pi) · atan(sigma /
  (1 - sigma)), which is within 46 of 1000 · sigma, and a·noise - s·clean is close to noise - clean.
- pairs follows the base flow from 20,000 noises to images, without guidance.
- reflow trains the base further, on the straight lines between the two ends of the pairs.

Every stage may be stopped and started again with the same arguments.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path

import numpy as np
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import steering.zoo as zoo
from steering.zoo.train_mnist import build_unet
from steering.zoo.training import fit, seeded

NULL = 10  # the class that stands for none
DROPPED = 0.12  # share of the rows whose class is left out
PEAK_LR = 1e-3
PAIRS = 20_000
PART = 1000  # pairs in one file
HEUN_STEPS = 20  # 39 evaluations


def flow_loss(
    unet: nn.Module, clean: Tensor, noise: Tensor, labels: Tensor, rng: torch.Generator
) -> Tensor:
    """Mean of |v_hat - (noise - clean)|² on the lines between clean and noise [N,1,28,28].

    sigma is stratified over the batch; every other row has a logit-normal one, which puts more
    weight on the middle, where the prediction is hard. labels [N]; some are replaced by NULL.
    """
    n = len(clean)
    u = ((torch.arange(n) + torch.rand(n, generator=rng)) / n).clamp(1e-5, 1 - 1e-5)
    sigma = torch.where(torch.arange(n) % 2 == 0, u, torch.special.ndtri(u).sigmoid())
    labels = torch.where(torch.rand(n, generator=rng) < DROPPED, NULL, labels)
    s = sigma.view(-1, 1, 1, 1)
    v = unet((1 - s) * clean + s * noise, 1000 * sigma, class_labels=labels).sample
    return (v - (noise - clean)).square().mean()


def load_base(out: Path) -> UNet2DModel:
    """The network that the first stage wrote, in float32."""
    folder = out / "base" / "unet"
    return UNet2DModel.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)


@torch.no_grad()
def follow(unet: nn.Module, x: Tensor, labels: Tensor, steps: int) -> Tensor:
    """The flow's images [N,1,28,28] from noise x: Heun's rule on an even grid, Euler at the end."""

    def v(x: Tensor, sigma: float) -> Tensor:
        return unet(x, torch.full((len(x),), 1000 * sigma), class_labels=labels).sample

    sigmas = torch.linspace(1, 0, steps + 1).tolist()
    for a, b in itertools.pairwise(sigmas):
        slope = v(x, a)
        if b > 0:
            slope = (slope + v(x + (b - a) * slope, b)) / 2
        x = x + (b - a) * slope
    return x


def save_parts(weights: dict[str, Tensor], out: Path) -> None:
    """Write the network with these weights, in float16, and its scheduler, as diffusers does."""
    unet = build_unet(NULL + 1)
    unet.load_state_dict(weights)
    unet.half().save_pretrained(out / "unet")
    FlowMatchEulerDiscreteScheduler(shift=1.0).save_pretrained(out / "scheduler")


def base(data: Path, out: Path, minutes: float, seed: int, warm: bool) -> None:
    """Train on real images and fresh noise."""
    rng = torch.Generator().manual_seed(seed)
    with np.load(data / "mnist.npz") as arrays:
        images = torch.from_numpy(arrays["x_train"])[:, None]
        labels = torch.from_numpy(arrays["y_train"]).long()
    unet = seeded(lambda: build_unet(NULL + 1), seed)
    if warm:
        unet.load_state_dict(zoo.load("mnist").unet.state_dict(), strict=False)
        # at first the classes make no difference
        unet.get_parameter("class_embedding.weight").data.zero_()

    def loss(rows: Tensor) -> Tensor:
        clean = images[rows].float() / 127.5 - 1
        noise = torch.randn(clean.shape, generator=rng)
        return flow_loss(unet, clean, noise, labels[rows], rng)

    folder = out / "base"
    fit(unet, loss, len(images), lambda w: save_parts(w, folder), folder, minutes, PEAK_LR, rng)


def pairs(out: Path, seed: int) -> None:
    """Write noise, images (float16) and labels, every class equally often, PART to a file."""
    unet = load_base(out)
    folder = out / "pairs"
    folder.mkdir(parents=True, exist_ok=True)
    labels = torch.arange(PART) % NULL
    for i in range(PAIRS // PART):
        path = folder / f"{i:02d}.safetensors"
        if path.exists():
            continue
        wall, cpu = time.monotonic(), time.process_time()
        rng = torch.Generator().manual_seed(1000 * seed + i)
        # rounded before it is followed, so that the stored noise is the one the image belongs to
        noise = torch.randn(PART, 1, 28, 28, generator=rng).half()
        halves = zip(noise.float().split(50), labels.split(50), strict=True)
        images = torch.cat([follow(unet, x, c, HEUN_STEPS) for x, c in halves])
        part = path.with_suffix(".part")
        save_file({"noise": noise, "images": images.half(), "labels": labels}, part)
        part.replace(path)
        line = {
            "pairs": (i + 1) * PART,
            "cpu_seconds": round(time.process_time() - cpu, 1),
            "wall_seconds": round(time.monotonic() - wall, 1),
        }
        print(json.dumps(line), flush=True)


def reflow(out: Path, minutes: float, seed: int) -> None:
    """Train the base flow further, on its own pairs."""
    rng = torch.Generator().manual_seed(seed)
    unet = load_base(out).train()
    parts = [load_file(path) for path in sorted((out / "pairs").glob("*.safetensors"))]
    if len(parts) < PAIRS // PART:
        raise SystemExit(f"{out / 'pairs'} is not complete: run --stage pairs first")
    noise, images, labels = (
        torch.cat([part[key] for part in parts]) for key in ("noise", "images", "labels")
    )

    def loss(rows: Tensor) -> Tensor:
        return flow_loss(unet, images[rows].float(), noise[rows].float(), labels[rows], rng)

    folder = out / "reflow"
    fit(unet, loss, len(images), lambda w: save_parts(w, folder), folder, minutes, PEAK_LR, rng)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--stage", choices=("base", "pairs", "reflow"), required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of all three stages")
    parser.add_argument("--data", type=Path, help="folder that holds mnist.npz; for base")
    parser.add_argument("--minutes", type=float, default=35.0, help="wall time, resumes included")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--warm", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.stage == "base":
        if args.data is None:
            parser.error("--stage base needs --data")
        base(args.data, args.out, args.minutes, args.seed, args.warm)
    elif args.stage == "pairs":
        pairs(args.out, args.seed)
    else:
        reflow(args.out, args.minutes, args.seed)


if __name__ == "__main__":
    main()
