"""Judge the built-in MNIST models with the built-in classifier.

    python -m steering.zoo.evaluate [--model mnist] [--n 1000] [--seed 0] [--steps 50] [--png FILE]

draws samples (DDIM, eta = 1), prints how many the classifier is sure of, their classes and their
Fréchet distance to the test images beside that of the training images, and writes 100 of them as
a picture. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from steering import zoo
from steering.metrics import Moments, frechet

BATCH = 100
EXTRACTOR = "mnist-classifier"


def draw(pipe: Any, n: int, seed: int, steps: int) -> Tensor:
    """n images [n,1,28,28] in [0,1] of a `DDIMPipeline`, with eta = 1."""
    rng = torch.Generator().manual_seed(seed)
    parts = []
    for start in range(0, n, BATCH):
        size = min(BATCH, n - start)
        # with return_dict=False a pipeline returns a tuple of one: arrays [size,28,28,1]
        (images,) = pipe(size, rng, 1.0, steps, output_type="np", return_dict=False)
        parts.append(torch.from_numpy(images).permute(0, 3, 1, 2))
    return torch.cat(parts)


def moments(name: str) -> Moments:
    """The shipped statistics of real images, as the metrics want them."""
    stats = zoo.reference(name)
    return Moments(stats["mean"], stats["cov"], float(stats["n"]))


def grid(images: Tensor) -> Image.Image:
    """images [N,1,28,28] in [0,1] -> ten a row, twice their size."""
    rows = images[: len(images) // 10 * 10].view(-1, 10, 28, 28).permute(0, 2, 1, 3)
    pixels = (rows.reshape(-1, 280) * 255).round().to(torch.uint8).numpy()
    picture = Image.fromarray(pixels)
    return picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", choices=("mnist", "mnist-blockwise"), default="mnist")
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--png", type=Path, default=Path("mnist_samples.png"))
    args = parser.parse_args()
    if args.n < 10:
        parser.error(f"--n {args.n}: give at least 10, a row of the picture.")
    torch.set_num_threads(1)
    start = time.process_time()
    images = draw(zoo.load(args.model), args.n, args.seed, args.steps)
    seconds = time.process_time() - start
    classifier = zoo.load("mnist-classifier")
    with torch.inference_mode():
        features = classifier.features(images)
        probability, label = classifier.head(features).softmax(-1).max(-1)
    sure = (probability > 0.9).double().mean().item()
    counts = label.bincount(minlength=10).tolist()
    test = moments("mnist-test")
    distance = frechet(features, test, extractor=EXTRACTOR)
    floor = frechet(moments("mnist-train"), test, extractor=EXTRACTOR)
    grid(images[:100]).save(args.png)
    result = {
        "model": args.model,
        "n": args.n,
        "seed": args.seed,
        "steps": args.steps,
        "sure": sure,
        "classes": counts,
        "frechet": distance.value,
        "frechet_train_test": floor.value,
        "extractor": EXTRACTOR,
        "ms_per_row": 1e3 * seconds / (args.n * args.steps),
    }
    lines = [
        f"classified with p > 0.9   {sure:.1%}",
        f"classes 0 .. 9            {counts}",
        f"samples against test      {distance}",
        f"train against test        {floor}",
        f"CPU time per network row  {result['ms_per_row']:.2f} ms",
        f"picture                   {args.png}",
        json.dumps(result),
    ]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
