"""Train the built-in NoProp classifiers of MNIST, block by block: small towers, one-hot labels.

    python -m steering.zoo.train_noprop --data DIR --out DIR --variant dt|ct|fm --epochs 8

writes a pipeline folder (a `NoPropPipeline`, weights in float16) and `train.jsonl`, a line for each
epoch of each block: its mean loss, and the accuracy of the block's own guess, at the noisiest level
it learns, on the first 1,000 test images, by which nothing is chosen. Started again with the same
`--out`, it goes on from the last epoch. In several processes, blocks are shared out:

    accelerate launch --num_processes 2 --cpu -m steering.zoo.train_noprop ...

ACCELERATE_MIXED_PRECISION=bf16 trains in bfloat16 where the processor has it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steering.finetune.noprop import noprop
from steering.models.noprop import NoPropDenoiser, scheduler
from steering.models.noprop_pipeline import NoPropPipeline
from steering.zoo.training import seeded


def build_network(variant: str) -> NoPropDenoiser:
    """At most 0.15 M parameters a block."""
    return NoPropDenoiser(variant, channels=(16, 32, 48), hidden=48)  # pyright: ignore[reportArgumentType]


def examples(data: Path, part: str) -> tuple[Tensor, Tensor]:
    """Images [N, 1, 28, 28] uint8 and labels [N] int64 of "train" or "test"."""
    with np.load(data / "mnist.npz") as arrays:
        images = torch.from_numpy(arrays[f"x_{part}"])[:, None]
        return images, torch.from_numpy(arrays[f"y_{part}"]).long()


def summary(histories: dict[int, list[dict[str, Any]]]) -> list[str]:
    """A line of JSON for each epoch of each block."""
    lines = []
    for block, history in sorted(histories.items()):
        losses, seconds = [], 0.0
        for line in history:
            losses.append(line["loss"])
            seconds += line["seconds"]
            if "accuracy" in line:
                told = {
                    "block": block,
                    "update": line["update"],
                    "loss": round(sum(losses) / len(losses), 5),
                    "accuracy": round(line["accuracy"], 4),
                    "wall_seconds": round(seconds, 1),
                }
                lines.append(json.dumps(told))
                losses = []
    return lines


def train(data: Path, variant: str, epochs: float, out: Path, seed: int) -> None:
    torch.set_num_threads(1)
    network = seeded(lambda: build_network(variant), seed)
    images, labels = examples(data, "train")
    histories = noprop(
        network, images, labels, epochs=epochs, test=examples(data, "test"), seed=seed,
        out=out / "state",
    )  # fmt: skip
    (out / "train.jsonl").write_text("\n".join(summary(histories)) + "\n")
    grid = scheduler(network)  # from the schedule before it is rounded
    NoPropPipeline(network.half(), grid).save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds mnist.npz")
    parser.add_argument("--variant", choices=("dt", "ct", "fm"), required=True)
    parser.add_argument("--epochs", type=float, default=8)
    parser.add_argument("--out", type=Path, required=True, help="pipeline folder to write")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    train(args.data, args.variant, args.epochs, args.out, args.seed)


if __name__ == "__main__":
    main()
