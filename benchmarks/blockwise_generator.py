"""What does it cost a generator to be trained block by block? MNIST, equal size, equal compute.

Two generators of the same chain, v prediction, images, batch, optimiser and moving average:

    end to end  one UNet for all levels of noise, the network of "mnist"
    blockwise   three UNets, each for a third of the timesteps and each trained alone, as
                "mnist-blockwise"; no gradient crosses from one to another

All blocks together have about the weights of the one network. Compute is equal in floating-point
operations of training, counted by torch; so the blocks take fewer epochs if they cost more. A step
of a chain asks one block, so that drawing from the blockwise generator costs a fraction. Sampled
with DDIM, eta = 1; Fréchet distance to the 10,000 test images in the features of
"mnist-classifier", of N images for each of several seeds of the noise; both are trained once.

    python -m benchmarks.blockwise_generator --data DIR --out DIR [--epochs 6]
    python -m benchmarks.blockwise_generator --quick      a short run on 250 images: the same code,
                                                          figures that say nothing
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.pipelines.ddim.pipeline_ddim import DDIMPipeline
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.report import finish, header
from steering import zoo
from steering.finetune.noise_blocks import noise_blocks
from steering.metrics import frechet
from steering.zoo.evaluate import EXTRACTOR, draw, grid, moments
from steering.zoo.train_mnist import build_scheduler, build_unet
from steering.zoo.train_mnist_blockwise import build_blockwise
from steering.zoo.train_noprop import examples
from steering.zoo.training import seeded

SEEDS = 3


def operations(network: nn.Module) -> int:
    """Floating-point operations of one call for one image; backward costs twice as many, always."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 1, 28, 28), torch.zeros(1))
    return counter.get_total_flops()


def size(network: nn.Module) -> int:
    """How many weights."""
    return sum(p.numel() for p in network.parameters())


def judge(network: nn.Module, n: int, steps: int, seeds: int) -> tuple[dict[str, Any], Tensor]:
    """Fréchet distances and shares of clear digits over seeds, CPU time a row; and some images."""
    pipe = DDIMPipeline(unet=cast(Any, network.eval()), scheduler=build_scheduler())
    pipe.set_progress_bar_config(disable=True)
    classifier, test = zoo.load("mnist-classifier"), moments("mnist-test")
    distances, sure, images = [], [], torch.empty(0)
    began = time.process_time()
    for seed in range(seeds):
        images = draw(pipe, n, seed, steps)
        with torch.inference_mode():
            features = classifier.features(images)
            best = classifier.head(features).softmax(-1).amax(-1)
        distances.append(frechet(features, test, extractor=EXTRACTOR).value)
        sure.append((best > 0.9).double().mean().item())
    spent = time.process_time() - began
    mean = sum(distances) / seeds
    spread = math.sqrt(sum((d - mean) ** 2 for d in distances) / max(1, seeds - 1))
    return {
        "frechet": mean,
        "spread": spread,
        "distances": distances,
        "sure": sum(sure) / seeds,
        "ms_per_row": 1e3 * spent / (seeds * n * steps),
    }, images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a short run, under a minute")
    parser.add_argument("--data", type=Path, help="folder that holds mnist.npz")
    parser.add_argument("--out", type=Path, help="folder of checkpoints, which it goes on from")
    parser.add_argument("--epochs", type=float, default=6.0, help="of the end-to-end generator")
    parser.add_argument("--n", type=int, default=2000, help="images for each seed")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--png", type=Path, help="PNG of both generators' images")
    args = parser.parse_args()
    if not args.quick and (args.data is None or args.out is None):
        parser.error("--data and --out are missing; or give --quick.")
    torch.set_num_threads(1)
    header()
    epochs, n, steps, seeds = args.epochs, args.n, args.steps, SEEDS
    if args.quick:
        images, epochs, n, steps, seeds = zoo.mnist_slice()[0][:, None], 8.0, 100, 10, 2
    else:
        images, _ = examples(args.data, "train")
    whole, blocks = seeded(build_unet, 0), seeded(build_blockwise, 0)
    costs = operations(whole), [operations(cast(nn.Module, block)) for block in blocks.blocks]
    share = costs[0] / sum(costs[1])
    print(f"weights: end to end {size(whole):,}; blockwise {size(blocks):,}")
    print(
        f"operations of one call: end to end {costs[0] / 1e6:.1f} M; each block "
        f"{costs[1][0] / 1e6:.1f} M"
    )
    print(f"epochs at equal compute: end to end {epochs:g}, each block {epochs * share:.4g}")
    figures: dict[str, Any] = {}
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) if args.quick else args.out
        for name, unet, passes in (
            ("end_to_end", whole, epochs),
            ("blockwise", blocks, epochs * share),
        ):
            histories = noise_blocks(
                unet, build_scheduler(), images, epochs=passes, out=out / name, progress=False
            )
            seconds = sum(line["seconds"] for history in histories.values() for line in history)
            found, some = judge(unet, n, steps, seeds)
            rows.append(some[:50])
            figures[name] = {"training_seconds": seconds, **found}
            print(
                f"{name:11} Fréchet ({EXTRACTOR}) {found['frechet']:.3f} ± {found['spread']:.3f} "
                f"(s.d. over {seeds} seeds of {n} images, {steps} steps), clear digits "
                f"{found['sure']:.1%}, {found['ms_per_row']:.2f} ms of CPU a row; trained in "
                f"{seconds / 60:.1f} min",
                flush=True,
            )
    floor = frechet(moments("mnist-train"), moments("mnist-test"), extractor=EXTRACTOR)
    ratio = figures["blockwise"]["frechet"] / figures["end_to_end"]["frechet"]
    cheaper = figures["end_to_end"]["ms_per_row"] / figures["blockwise"]["ms_per_row"]
    print(f"training images against test images {floor}")
    print(f"blockwise / end to end {ratio:.3f} (goal 1.15); end to end costs {cheaper:.2f} a row")
    if args.png is not None:
        both = Image.new("L", (560, 2 * 280 + 8), 255)
        for k, some in enumerate(rows):
            both.paste(grid(some), (0, k * 288))
        both.save(args.png)
        print(f"picture: {args.png}, above end to end, below blockwise")
    finish({"ratio": ratio, "floor": floor.value, "row_cost_ratio": cheaper, **figures})


if __name__ == "__main__":
    main()
