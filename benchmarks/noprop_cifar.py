"""How accurate is NoProp on CIFAR-10 and CIFAR-100, and what collapses at 100 classes?

    python -m benchmarks.noprop_cifar --data FILE.npz --out DIR [--recipe repaired|paper]
                                      [--embedding one-hot|learned|prototype] [--epochs E]
                                      [--seeds S] [--only dt,ct]
    python -m benchmarks.noprop_cifar --pairs DIR [--epochs E]   # 100 classes without CIFAR-100
    python -m benchmarks.noprop_cifar --quick                    # no data, under a minute

The network, settings and epochs of arXiv 2503.24322 (150 of "dt" and backprop; 500 of "ct" and "fm"
with 10 classes, 1000 with 100); "repaired" has the defaults of `steering.finetune.noprop` and
guesses that are probabilities, "paper" its squares, unclamped weights and raw velocities. It wants
a GPU: on one core of a CPU an update of 128 images took 0.25 to 0.32 s, of backprop's chain 2.4 s,
so that "ct" of CIFAR-10 would take 14 hours, backprop 40, "dt" 50 (measured updates times their
number). On a GPU, where none of this was run, an update should take 5 to 10 ms: 1 to 2 hours for
"dt", as long for backprop, half an hour each for "ct" and "fm" of CIFAR-10 and an hour of CIFAR-100
(estimates). `--quick` measures an update where it runs and says what that comes to. Training goes
on from the checkpoints in --out.

FILE.npz has x_train [N,32,32,3] uint8, y_train [N], x_test and y_test; any set of 10 or 100 classes
of such images will do. From the binary version of the published files
(https://www.cs.toronto.edu/~kriz/cifar.html), where a row of CIFAR-10 is a label and 3072 bytes, of
CIFAR-100 a coarse label, a fine one and 3072 bytes:

    import numpy as np
    def read(*files, labels):                              # labels=2 of CIFAR-100
        rows = np.concatenate([np.fromfile(f, np.uint8).reshape(-1, labels + 3072) for f in files])
        return rows[:, labels:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), rows[:, labels - 1]
    x, y = read(*[f"data_batch_{k}.bin" for k in range(1, 6)], labels=1)   # CIFAR-100: "train.bin"
    x_test, y_test = read("test_batch.bin", labels=1)                      # "test.bin"
    np.savez("FILE.npz", x_train=x, y_train=y, x_test=x_test, y_test=y_test)

Or --data is a folder with cifar10_train_jpeg.npz and cifar10_test.npz, CIFAR-10 that has been
through JPEG: lossy, figures from it compare with each other only, a true copy is to be preferred.

--pairs makes 100 classes of MNIST (mnist.npz in DIR): two digits side by side, each with half its
columns (means of two), class 10 · left + right; n images make n pairs, each image with another of
its own part of the set in an order drawn once, every image once on the left and once on the right.
It is an easier set than CIFAR-100: that something does not collapse here is no proof that it does
not there. What does collapse here, another loss learns in as many epochs. Networks have the paper's
layers behind a small tower, (8, 16, 16) channels.
"""

from __future__ import annotations

import argparse
import io
import itertools
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

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
    evaluated,
    mean,
    papers,
    precision,
    step_seconds,
    table,
    trained,
)
from benchmarks.report import finish, header
from steering import zoo
from steering.zoo.train_noprop import examples

EMBEDDINGS = ("one-hot", "learned", "prototype")
PAPER = {  # table 1, test accuracy in % by classes and variant, in the order of EMBEDDINGS
    10: {
        "backprop": ("79.92", "79.3", "79.58"),
        "dt": ("79.25", "79.12", "80.54"),
        "ct": ("73.35", "71.77", "66.54"),
        "fm": ("73.14", "73.5", "75.18"),
    },
    100: {
        "backprop": ("45.85", "46.57", "47.8"),
        "dt": ("45.93", "45.19", "46.06"),
        "ct": ("33.66", "33.99", "21.31"),
        "fm": ("6.38", "31.14", "37.57"),
    },
}
VELOCITY = {"output": "velocity"}
ALPHA_BAR = {"alpha_bar_range": (1e-3, 0.9999)}  # SNR up to 9999, where the default ends at 99
LEARNED = {"embedding": "learned", "embed_dim": 20}
PAIRS = {
    "ct one-hot, the paper's, SNR to 9999": Recipe("ct", 3, ALPHA_BAR, PAPERS),
    "ct one-hot, the paper's, SNR to 99": Recipe("ct", 3, training=PAPERS),
    "ct one-hot, the defaults": Recipe("ct", 3),
    "ct learned 20, the defaults": Recipe("ct", 3, LEARNED),
    "fm one-hot, the paper's": Recipe("fm", 3, VELOCITY, PAPERS),
    "fm learned 20, the paper's": Recipe("fm", 3, {**LEARNED, **VELOCITY}, PAPERS),
    "fm one-hot, the defaults": Recipe("fm", 3),
    "fm learned 20, the defaults": Recipe("fm", 3, LEARNED),
}
TESTED = 1000  # pairs
COLLAPSED = 0.1  # accuracy below which 100 classes count as collapsed; chance is 0.01


def recipes(name: str, classes: int, embedding: str, epochs: float | None) -> dict[str, Recipe]:
    """By variant; epochs are the paper's unless given."""
    found = {}
    for variant in VARIANTS:
        long = 500 if classes <= 10 else 1000
        network: dict[str, Any] = {"embedding": embedding}
        training: dict[str, Any] = {}
        if name == "paper" and variant != "backprop":
            training = PAPERS
            network |= VELOCITY if variant == "fm" else {}
        papers = long if variant in ("ct", "fm") else 150
        found[variant] = Recipe(variant, epochs or papers, network, training)
    return found


def full(args: argparse.Namespace) -> dict[str, Any]:
    """Train what is missing, and evaluate all."""
    data, said = read(args.data)
    classes = data.shape["classes"]
    wanted = recipes(args.recipe, classes, args.embedding, args.epochs)
    print(f"{said}; {len(data.labels)} to train on, {len(data.test_labels)} to test, "
          f"{classes} classes\nrecipe {args.recipe}, {args.embedding} embeddings, "
          f"training in {precision()}")  # fmt: skip
    found, seconds = evaluated(
        {variant: recipe for variant, recipe in wanted.items() if variant in args.only},
        data,
        args.seeds,
        args.out / f"{classes}-{args.recipe}-{args.embedding}",
        many=RUNS,
    )
    print(f"\n{HEADING}")
    for variant, each in found.items():
        published = PAPER.get(classes, {}).get(variant, ("",) * len(EMBEDDINGS))
        table(variant, each, published[EMBEDDINGS.index(args.embedding)])
    return {variant: mean(each[papers(each)]) for variant, each in found.items()} | {
        "data": said,
        "classes": classes,
        "recipe": args.recipe,
        "seeds": args.seeds,
        "training_seconds": seconds,
    }


def pairs_check(args: argparse.Namespace) -> dict[str, Any]:
    """The paper's losses against the defaults at 100 classes."""
    x, y = paired(*examples(args.pairs, "train"), seed=0)
    x_test, y_test = paired(*examples(args.pairs, "test"), seed=1)
    data = Examples(x, y, x_test[:TESTED], y_test[:TESTED])
    alone = 100 * (0.25 / TESTED) ** 0.5
    print(f"100 classes, pairs of MNIST digits: {len(y)} to train on, {TESTED} to test (of these "
          f"alone the standard\ndeviation is {alone:.1f} at 50 %); one seed, "
          f"{args.epochs or 3:g} epochs each, training in {precision()}\n{HEADING}")  # fmt: skip
    figures = compared(PAIRS, data, args.epochs)
    for name, each in figures.items():
        least = [t for t, a in each.items() if a >= COLLAPSED]
        verdict = f"from {min(least)} steps on" if least else "collapsed"
        print(f"{name:<38}best {100 * max(each.values()):6.2f} %, "
              f"above {100 * COLLAPSED:.0f} %: {verdict}")  # fmt: skip
    return {"pairs": figures}


def compared(
    wanted: dict[str, Recipe], data: Examples, epochs: float | None
) -> dict[str, dict[int, float]]:
    """Train each and tell its accuracy at several numbers of steps."""
    figures = {}
    for name, recipe in wanted.items():
        mine = Recipe(
            recipe.variant, epochs or recipe.epochs, {**TOWER, **recipe.network}, recipe.training
        )
        network, _ = trained(mine, data, 0, progress=False)
        chains = [Chain(t, runs=1) for t in STEPS[:-1]]
        each = accuracies(network, data.test_images, data.test_labels, chains)
        table(name, {chain: [runs] for chain, runs in each.items()})
        figures[name] = {chain.steps: runs[0] for chain, runs in each.items()}
    return figures


def quick() -> dict[str, Any]:
    """What an update costs here, and a smoke run of the check at 100 classes."""
    where = "one core of the CPU" if DEVICE == "cpu" else "the GPU"
    print("the paper's network, 32 x 32 x 3, random pixels: seconds of an update of 128 images on "
          f"{where}, and what full runs come to")  # fmt: skip
    shape = {"classes": 10, "in_channels": 3, "image_size": 32}
    seconds, hours = {}, {}
    for classes in (10, 100):
        for variant, recipe in recipes("repaired", classes, "one-hot", None).items():
            if variant not in seconds:
                seconds[variant] = step_seconds(recipe, shape, 2 if variant == "backprop" else 4)
            updates = recipe.epochs * (50_000 // 128) * (10 if variant == "dt" else 1)
            hours[f"{variant}/{classes}"] = updates * seconds[variant] / 3600
            print(f"  {variant:<9}{classes:>4} classes {seconds[variant]:8.4f} s x {updates:>7} = "
                  f"{hours[f'{variant}/{classes}']:6.1f} h", flush=True)  # fmt: skip
    images, labels = zoo.mnist_slice()
    images, labels = images[:, None], labels.long()
    held = torch.arange(len(labels)) % 5 == 0
    x, y = zip(*(paired(images[~held], labels[~held], seed) for seed in range(10)), strict=True)
    x_test, y_test = paired(images[held], labels[held], seed=10)
    data = Examples(torch.cat(x), torch.cat(y), x_test, y_test)
    print(f"\na smoke run: {len(data.labels)} pairs of 200 digits, {len(y_test)} pairs of 50 "
          f"others; too few to tell losses apart\n{HEADING}")  # fmt: skip
    smoke = {
        "fm one-hot, the paper's": Recipe("fm", 4, VELOCITY, {**PAPERS, "batch": 32}),
        "fm one-hot, the defaults": Recipe("fm", 4, training={"batch": 32}),
    }
    figures = compared(smoke, data, None)
    return {"update_seconds": seconds, "hours": hours, "smoke": figures}


def paired(images: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Pairs [N, 1, 28, 28] uint8 of digits side by side, and their classes [N]."""
    other = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    half = images.float().unflatten(-1, (14, 2)).mean(-1).round().to(torch.uint8)
    return torch.cat([half, half[other]], -1), 10 * labels + labels[other]


def read(path: Path) -> tuple[Examples, str]:
    """A set, and what it is."""
    if path.is_dir():
        return _lossy(path), "CIFAR-10 that has been through JPEG, LOSSY: no figures for papers"
    with np.load(path) as arrays:
        if missing := {f"{a}_{b}" for a in "xy" for b in ("train", "test")} - set(arrays):
            raise SystemExit(f"{path} lacks {', '.join(sorted(missing))}: see --help.")
        parts = [
            (_channels_first(arrays[f"x_{part}"]), torch.from_numpy(arrays[f"y_{part}"]).flatten())
            for part in ("train", "test")
        ]
    (x, y), (x_test, y_test) = parts
    return Examples(x, y.long(), x_test, y_test.long()), f"{path.name} as given"


def _lossy(folder: Path) -> Examples:
    from PIL import Image

    with np.load(folder / "cifar10_train_jpeg.npz") as arrays:
        files, at = arrays["jpeg"], arrays["offsets"]
        train = np.stack(
            [
                np.asarray(Image.open(io.BytesIO(files[a:b].tobytes())))
                for a, b in itertools.pairwise(at)
            ]
        )
        y = torch.from_numpy(arrays["y"]).long()
    with np.load(folder / "cifar10_test.npz") as arrays:
        x_test, y_test = _channels_first(arrays["x"]), torch.from_numpy(arrays["y"]).long()
    return Examples(_channels_first(train), y, x_test, y_test)


def _channels_first(images: np.ndarray) -> Tensor:
    """[N, 3, 32, 32] of [N, 32, 32, 3]."""
    if images.shape[1:] != (32, 32, 3) or images.dtype != np.uint8:
        raise SystemExit(
            f"images are {images.dtype} {images.shape}: give uint8 [N, 32, 32, 3], see --help."
        )
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="time of an update, a smoke run")
    parser.add_argument("--pairs", type=Path, help="100 classes of MNIST, in this folder")
    parser.add_argument("--data", type=Path, help="FILE.npz, or the folder of a lossy CIFAR-10")
    parser.add_argument("--out", type=Path, default=Path("runs") / "noprop_cifar")
    parser.add_argument("--recipe", choices=("repaired", "paper"), default="repaired")
    parser.add_argument("--embedding", choices=EMBEDDINGS, default="one-hot")
    parser.add_argument("--epochs", type=float, help="of each block; the paper's by default")
    parser.add_argument("--seeds", type=int, default=1, help="of training")
    parser.add_argument("--only", default=",".join(VARIANTS), help="variants, with commas")
    args = parser.parse_args()
    args.only = args.only.split(",")
    if unknown := set(args.only) - set(VARIANTS):
        parser.error(f"--only: {', '.join(unknown)} unknown, give some of {', '.join(VARIANTS)}")
    if not args.quick and (args.data is None) == (args.pairs is None):
        parser.error("give --data, --pairs or --quick, one of them")
    torch.set_num_threads(1)
    header()
    began = time.process_time()
    figures = quick() if args.quick else full(args) if args.data else pairs_check(args)
    finish(figures | {"cpu_seconds": round(time.process_time() - began, 1)})


if __name__ == "__main__":
    main()
