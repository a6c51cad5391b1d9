"""How many test images do the built-in NoProp classifiers get right, at how many steps?

    python -m steering.zoo.evaluate_noprop --data DIR [--runs 3]

All 10,000 MNIST test images, each classified once by each run's noise. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from steering import zoo
from steering.zoo.train_noprop import examples

STEPS = (2, 5, 10, 50, 200)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds mnist.npz")
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    images, labels = examples(args.data, "test")
    images = images.float() / 255
    figures: dict[str, dict[str, list[float]]] = {}
    for name in ("noprop-dt", "noprop-ct", "noprop-fm"):
        pipe = zoo.load(name)
        figures[name] = {}
        for steps in STEPS if pipe.network.timed else (pipe.steps,):
            right = []
            for seed in range(args.runs):
                rng = torch.Generator().manual_seed(seed)
                found = pipe(images, steps, generator=rng).classes
                right.append((found == labels).double().mean().item())
            figures[name][str(steps)] = right
            told = ", ".join(f"{share:.2%}" for share in right)
            sys.stdout.write(f"{name}, {steps} steps: {told}\n")
    sys.stdout.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()
