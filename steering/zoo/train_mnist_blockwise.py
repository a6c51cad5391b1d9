"""Train the built-in blockwise MNIST generator: three UNets, each for a third of the noise.

    python -m steering.zoo.train_mnist_blockwise --data DIR --out DIR --epochs 6

The chain, its v prediction and the images are those of "mnist". Its 1,000 timesteps are split into
blocks of equal probability under the loss, and no gradient crosses from one to another: each block
has its own optimiser, moving average and checkpoint (arXiv:2506.14202). All three together have
about as many weights as the one network of "mnist"; a step of a chain costs one of them. Writes a
pipeline folder (a `DDIMPipeline`, weights in float16) and `train.jsonl`; started again with the
same `--out`, it goes on from the last epoch.

ACCELERATE_MIXED_PRECISION=bf16 trains in bfloat16 where the processor has it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.pipelines.ddim.pipeline_ddim import DDIMPipeline

from steering.finetune.noise_blocks import noise_blocks
from steering.models.blockwise_unet import BlockwiseUNet2D, equal_mass
from steering.zoo.train_mnist import build_scheduler
from steering.zoo.train_noprop import examples
from steering.zoo.training import seeded

BLOCKS = 3
CHANNELS = (8, 16, 24)


def build_blockwise() -> BlockwiseUNet2D:
    """Three UNets of 107,361 parameters."""
    evenly = torch.ones(build_scheduler().config["num_train_timesteps"])
    return BlockwiseUNet2D(equal_mass(evenly, BLOCKS), block_out_channels=CHANNELS)


def summary(histories: dict[int, list[dict[str, Any]]], every: int) -> list[str]:
    """A line of JSON for every so many updates of each block."""
    lines = []
    for block, history in sorted(histories.items()):
        for start in range(0, len(history), every):
            part = history[start : start + every]
            told = {
                "block": block,
                "update": part[-1]["update"],
                "loss": round(sum(line["loss"] for line in part) / len(part), 5),
                "wall_seconds": round(sum(line["seconds"] for line in part), 1),
            }
            lines.append(json.dumps(told))
    return lines


def train(data: Path, epochs: float, out: Path, seed: int) -> None:
    torch.set_num_threads(1)
    unet = seeded(build_blockwise, seed)
    images, _ = examples(data, "train")
    histories = noise_blocks(
        unet, build_scheduler(), images, epochs=epochs, seed=seed, out=out / "state"
    )
    (out / "train.jsonl").write_text("\n".join(summary(histories, 500)) + "\n")
    pipe = DDIMPipeline(unet=cast(Any, unet.half()), scheduler=build_scheduler())
    pipe.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds mnist.npz")
    parser.add_argument("--epochs", type=float, default=6)
    parser.add_argument("--out", type=Path, required=True, help="pipeline folder to write")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    train(args.data, args.epochs, args.out, args.seed)


if __name__ == "__main__":
    main()
