"""How accurate are NoProp's three variants on MNIST, beside the same chain trained by backprop?

    python -m benchmarks.noprop_mnist --data DIR --out DIR [--seeds S] [--only dt,ct]
                                      [--recipe short|paper]
    python -m benchmarks.noprop_mnist --data DIR --repairs     # small towers, 2 epochs each
    python -m benchmarks.noprop_mnist --quick                  # no data, under a minute

The network of arXiv 2503.24322 (its figure 6, one-hot labels, 10 blocks of "dt"), batch 128,
learning rate 1e-3, weight decay 1e-3, no augmentation; AdamW with a warm-up and a cosine, where the
paper has Adam or AdamW and says nothing of a schedule. "short" is for two cores: 4 epochs of
everything, the defaults of `steering.finetune.noprop`; with ACCELERATE_MIXED_PRECISION=bf16 set, in
bfloat16. That is 1,872 updates of "ct", of "fm", of each block of "dt" and of backprop's chain,
where one takes ten times as long. "paper" has 100 epochs of everything and the paper's losses,
unclamped: 46,800 updates, ten times that of "dt". It is for a GPU, where an update should take 5 to
10 ms, ten times that of backprop: 2 to 3 hours a seed (an estimate).

`DIR` of the data holds mnist.npz: x_train, y_train, x_test, y_test. Training goes on from the
checkpoints in --out, and what is done is only evaluated: several processes with --only and one
--out share the work, and a last run without it tells all. Accuracy is of the 10,000 test images, by
which nothing is chosen, over S seeds of training and several of inference (the paper: 3 x 5). "ct"
and "fm" are told at 2 to 200 steps ("paper": to 1000, the paper's); what the JSON has is at the
most, without noise.

--repairs compares the paper's losses with the defaults at equal epochs. --quick labels 250 test
images by the built-in checkpoints, and trains small networks on 200 of these images for the 50
others: that shows that the code runs, and nothing about the methods.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.noprop_accuracy import (
    DEVICE,
    HEADING,
    PAPERS,
    RUNS,
    STEPS,
    TOWER,
    VARIANTS,
    Chain,
    Examples,
    Recipe,
    accuracies,
    chains_of,
    evaluated,
    mean,
    papers,
    precision,
    table,
    trained,
)
from benchmarks.report import finish, header
from steering import zoo
from steering.zoo.train_noprop import examples

PAPER = {"dt": "99.47", "ct": "97.84", "fm": "99.21", "backprop": "99.46"}  # table 1, one-hot
VELOCITY = {"output": "velocity"}
RECIPES = {
    "short": {v: Recipe(v, 4) for v in VARIANTS},
    "paper": {
        "dt": Recipe("dt", 100, training=PAPERS),
        "ct": Recipe("ct", 100, training=PAPERS),
        "fm": Recipe("fm", 100, VELOCITY, PAPERS),
        "backprop": Recipe("backprop", 100),
    },
}
REPAIRS = {
    "ct, the paper's, SNR to 9999": Recipe("ct", 2, {"alpha_bar_range": (1e-3, 0.9999)}, PAPERS),
    "ct, the paper's, SNR to 99": Recipe("ct", 2, training=PAPERS),
    "ct, squares, clamped": Recipe("ct", 2, training={"loss": "squared", "weighting": "clamped"}),
    "ct, the defaults": Recipe("ct", 2),
    "fm, the paper's velocity": Recipe("fm", 2, VELOCITY, PAPERS),
    "fm, squares, uniform": Recipe("fm", 2, training={"loss": "squared"}),
    "fm, the defaults": Recipe("fm", 2),
}
_TINY = {"channels": (4, 8, 16), "hidden": 48, "dropout": 0.0}
SMOKE = {
    "dt": Recipe("dt", 10, _TINY, {"batch": 40, "lr": 3e-3}),
    "ct": Recipe(
        "ct", 20, _TINY, {"batch": 20, "lr": 3e-3}
    ),  # without batch norm it takes more updates
    "fm": Recipe("fm", 20, _TINY, {"batch": 20, "lr": 3e-3}),
    "backprop": Recipe("backprop", 10, _TINY, {"batch": 40, "lr": 3e-3}),
}


def full(args: argparse.Namespace) -> dict[str, Any]:
    """Train what is missing, and evaluate all."""
    data = read(args.data)
    recipes = {v: r for v, r in RECIPES[args.recipe].items() if v in args.only}
    out = args.out if args.recipe == "short" else args.out / args.recipe
    print(f"recipe {args.recipe}: training in {precision()}")
    short = args.recipe == "short"
    many, steps = (1, STEPS[:-1]) if short else (RUNS, STEPS)
    found, seconds = evaluated(recipes, data, args.seeds, out, many, steps)
    tested = len(data.test_labels)
    print(f"\n{len(data.labels)} images to train on, {tested} to test, of which alone the standard "
          f"deviation is {(99 / tested) ** 0.5:.2f} at 99 %\n{HEADING}")  # fmt: skip
    for variant, each in found.items():
        table(variant, each, PAPER[variant])
    return {
        **{variant: mean(each[papers(each)]) for variant, each in found.items()},
        "recipe": args.recipe,
        "precision": precision(),
        "seeds": args.seeds,
        "epochs": {variant: recipe.epochs for variant, recipe in recipes.items()},
        "training_seconds": seconds,
        "sweep": {
            f"{variant}/{chain.steps}/{chain.eta:.0f}": mean(runs)
            for variant, each in found.items()
            for chain, runs in each.items()
        },
    }


def repairs(args: argparse.Namespace) -> dict[str, Any]:
    """The paper's losses against the defaults, small towers, one seed."""
    data = read(args.data)
    print(f"small towers {TOWER}, 2 epochs each, one seed, training in {precision()}\n{HEADING}")
    figures = {}
    for name, recipe in REPAIRS.items():
        mine = Recipe(recipe.variant, 2, {**TOWER, **recipe.network}, recipe.training)
        network, _ = trained(mine, data, 0, progress=False)
        chains = [Chain(t, runs=1) for t in STEPS[:-1]]
        each = accuracies(network, data.test_images, data.test_labels, chains)
        table(name, {chain: [runs] for chain, runs in each.items()})
        figures[name] = {chain.steps: runs[0] for chain, runs in each.items()}
    return {"repairs": figures}


def quick() -> dict[str, Any]:
    """The built-in checkpoints, and a smoke run of training."""
    images, labels = zoo.mnist_slice()
    images, labels = images[:, None], labels.long()
    figures: dict[str, Any] = {}
    print("built-in checkpoints, small towers, 250 test images (of these alone the standard\n"
          f"deviation is {(99 / 250) ** .5:.2f} at 99 %)\n{HEADING}")  # fmt: skip
    for variant in ("dt", "ct", "fm"):
        network = zoo.load(f"noprop-{variant}").network.to(DEVICE)
        chains = chains_of(variant, STEPS[:-1], 1)
        each = accuracies(network, images, labels, chains)
        found = {chain: [runs] for chain, runs in each.items()}
        table(f"noprop-{variant}", found)
        figures[variant] = mean(found[papers(found)])
    held = torch.arange(len(labels)) % 5 == 0
    data = Examples(images[~held], labels[~held], images[held], labels[held])
    print(f"\na smoke run of training: {len(data.labels)} images, 10 to 20 epochs, "
          f"{len(data.test_labels)} images held out\n{HEADING}")  # fmt: skip
    smoke = {}
    for variant, recipe in SMOKE.items():
        network, _ = trained(recipe, data, 0, progress=False)
        each = accuracies(network, data.test_images, data.test_labels, [Chain(10)])
        found = {chain: [runs] for chain, runs in each.items()}
        table(variant, found)
        smoke[variant] = mean(found[papers(found)])
    print("\nin the JSON, dt, ct and fm are the built-in checkpoints', at the most steps, without "
          "noise;\nbackprop, of which there is no checkpoint, is the smoke run's")  # fmt: skip
    return figures | {"backprop": smoke["backprop"], "smoke": smoke}


def read(folder: Path) -> Examples:
    """All of MNIST."""
    return Examples(*examples(folder, "train"), *examples(folder, "test"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="built-in checkpoints, a smoke run")
    parser.add_argument("--repairs", action="store_true", help="losses compared, small towers")
    parser.add_argument("--data", type=Path, help="folder that holds mnist.npz")
    parser.add_argument("--out", type=Path, default=Path("runs") / "noprop_mnist")
    parser.add_argument("--seeds", type=int, default=1, help="of training")
    parser.add_argument("--recipe", choices=tuple(RECIPES), default="short")
    parser.add_argument("--only", default=",".join(VARIANTS), help="variants, with commas")
    args = parser.parse_args()
    args.only = args.only.split(",")
    if unknown := set(args.only) - set(VARIANTS):
        parser.error(f"--only: {', '.join(unknown)} unknown, give some of {', '.join(VARIANTS)}")
    if args.data is None and not args.quick:
        parser.error("--data is missing: a folder that holds mnist.npz")
    torch.set_num_threads(1)
    header()
    began = time.process_time()
    figures = quick() if args.quick else repairs(args) if args.repairs else full(args)
    finish(figures | {"cpu_seconds": round(time.process_time() - began, 1)})


if __name__ == "__main__":
    main()
