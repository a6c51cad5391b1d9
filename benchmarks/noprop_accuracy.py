"""What benchmarks of NoProp's test accuracy share: training by a recipe, and chains over steps and
seeds.

A chain starts at noise, so that accuracy varies with the seed of training and, less, with that of
inference: both spreads are told.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.noprop_chain import EndToEnd
from steering.finetune.blocks import train_blocks
from steering.finetune.noprop import learn_embedding, noprop, prototypes, unit
from steering.models.noprop import NoPropDenoiser, scheduler
from steering.models.noprop_pipeline import NoPropPipeline
from steering.zoo.training import seeded

VARIANTS = ("dt", "ct", "fm", "backprop")
STEPS = (2, 5, 10, 50, 200, 1000)  # of continuous time; the paper's is the last
RUNS = 5  # of inference, with seeds of their own
CHUNK = 1000  # images that are encoded at once
TOWER = {"channels": (8, 16, 16)}  # small; other layers stay as wide as the paper's
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAPERS = {"loss": "squared", "weighting": "snr"}  # of "fm" also output="velocity"


@dataclass(frozen=True)
class Examples:
    """A set of images with classes."""

    images: Tensor  # [N, C, H, W] uint8, to train on
    labels: Tensor  # [N] int64
    test_images: Tensor  # [M, C, H, W] uint8
    test_labels: Tensor  # [M] int64

    @property
    def shape(self) -> dict[str, int]:
        """What a network is told of them."""
        _, channels, size, _ = self.images.shape
        classes = 1 + int(self.labels.max())
        return {"classes": classes, "in_channels": channels, "image_size": size}


@dataclass(frozen=True)
class Recipe:
    """How a classifier is trained."""

    variant: str  # of `VARIANTS`
    epochs: float  # of each block
    network: Mapping[str, Any] = field(default_factory=dict)  # of `NoPropDenoiser`
    training: Mapping[str, Any] = field(default_factory=dict)  # of `noprop`, `train_blocks`


@dataclass(frozen=True)
class Chain:
    """How labels are drawn."""

    steps: int
    eta: float = 0.0
    runs: int = RUNS


def trained(
    recipe: Recipe, data: Examples, seed: int, out: Path | None = None, progress: bool = True
) -> tuple[NoPropDenoiser, float]:
    """A network, and the seconds of wall time that its updates took.

    Args:
        recipe: "backprop" trains the chain of "dt" end to end, in as many epochs.
        data: what it is trained on; on its test images blocks are watched, nothing is chosen.
        seed: of weights, the order of images, and all that is drawn.
        out: folder of checkpoints, from which training goes on, and of the network.
        progress: show bars.
    """
    end_to_end = recipe.variant == "backprop"
    variant: Any = "dt" if end_to_end else recipe.variant
    options: dict[str, Any] = {**data.shape, **recipe.network}
    network: Any = seeded(lambda: NoPropDenoiser(variant, **options), seed)
    network.to(DEVICE)
    _embed(network, data, seed, out, progress)
    told: dict[str, Any] = {
        "epochs": recipe.epochs, "seed": seed, "out": out, "progress": progress, **recipe.training
    }  # fmt: skip
    if end_to_end:
        histories = train_blocks(EndToEnd(network, data.images, data.labels), **told)
    else:
        test = data.test_images, data.test_labels
        histories = noprop(network, data.images, data.labels, test=test, **told)
    if out is not None:
        network.save_pretrained(out)
    return network.eval(), sum(line["seconds"] for h in histories.values() for line in h)


def _embed(
    network: NoPropDenoiser, data: Examples, seed: int, out: Path | None, progress: bool
) -> None:
    """Embeddings that are not one-hot are learned in one epoch, or read from `out`."""
    if network.config["embedding"] == "one-hot":
        return
    kept = None if out is None else out / "embedding.safetensors"
    if kept is not None and kept.exists():
        network.label_embedding.data.copy_(load_file(kept)["embedding"])
        return
    if network.config["embedding"] == "prototype":
        prototypes(network, data.images, data.labels)
    # the probe's weights come from the global generator
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        learn_embedding(network, data.images, data.labels, seed=seed, progress=progress)
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        save_file({"embedding": network.label_embedding.detach().cpu()}, kept)


@torch.no_grad()
def accuracies(
    network: NoPropDenoiser, images: Tensor, labels: Tensor, chains: Sequence[Chain]
) -> dict[Chain, list[float]]:
    """Share of images [N, C, H, W] that are labelled right, in each run of each chain."""
    pipe = NoPropPipeline(network, scheduler(network))
    pipe.set_progress_bar_config(disable=True)
    random = {
        (chain, run): torch.Generator().manual_seed(run)
        for chain in chains
        for run in range(chain.runs)
    }
    right = dict.fromkeys(random, 0)
    for some, y in zip(images.split(CHUNK), labels.split(CHUNK), strict=True):
        features = network.encode(unit(some).to(DEVICE))
        for (chain, run), generator in random.items():
            said = pipe(
                num_inference_steps=chain.steps,
                eta=chain.eta,
                generator=generator,
                features=features,
            )
            assert not isinstance(said, tuple)
            right[chain, run] += int((said.classes == y).sum())
    return {c: [right[c, run] / len(labels) for run in range(c.runs)] for c in chains}


def chains_of(variant: str, steps: Sequence[int], many: int) -> list[Chain]:
    """Of "dt" its own; of the others the ODE at each number of steps, of "ct" with noise, too.

    Args:
        variant: of `VARIANTS`.
        steps: numbers of them.
        many: runs of more than 50 steps; of fewer, and of "dt", there are 5.
    """
    if variant in ("dt", "backprop"):
        return [Chain(10)]
    etas = (0.0, 1.0) if variant == "ct" else (0.0,)
    return [Chain(t, eta, RUNS if t <= 50 else many) for eta in etas for t in steps]


Found = Mapping[Chain, Sequence[Sequence[float]]]  # accuracies [trainings][runs]


def evaluated(
    recipes: Mapping[str, Recipe],
    data: Examples,
    seeds: int,
    out: Path,
    many: int,
    steps: Sequence[int] = STEPS,
) -> tuple[dict[str, Found], dict[str, list[float]]]:
    """Accuracies by variant, and seconds of each training; what is not trained in `out` is."""
    found: dict[str, Found] = {}
    seconds: dict[str, list[float]] = {}
    print(f"{'':<12}{'epochs':>8}{'seed':>6}{'s of training (wall time)':>27}")
    for variant, recipe in recipes.items():
        chains = chains_of(variant, steps, many)
        each, seconds[variant] = [], []
        for seed in range(seeds):
            network, took = trained(recipe, data, seed, out / f"{variant}-{seed}")
            print(f"{variant:<12}{recipe.epochs:>8g}{seed:>6}{took:>27.0f}", flush=True)
            seconds[variant].append(took)
            each.append(accuracies(network, data.test_images, data.test_labels, chains))
        found[variant] = {chain: [runs[chain] for runs in each] for chain in chains}
    return found, seconds


def papers(found: Found) -> Chain:
    """The chain that the paper tells of: the one without noise that has the most steps."""
    return max((chain for chain in found if not chain.eta), key=lambda chain: chain.steps)


def mean(each: Sequence[Sequence[float]]) -> float:
    """Over all runs of all trainings."""
    return statistics.mean(a for runs in each for a in runs)


HEADING = (
    f"{'':<36}{'steps':>5}{'eta':>5}{'accuracy %':>12}{'± trainings':>13}{'± inference':>13}"
    f"{'runs':>8}{'paper':>8}"
)


def table(name: str, found: Found, paper: str = "") -> None:
    """Print the accuracy of each chain under `HEADING`: its mean, its standard deviations over
    trainings and over runs of one training, and the paper's."""
    for chain, each in found.items():
        trainings = [statistics.mean(runs) for runs in each]
        within = [statistics.variance(runs) for runs in each if len(runs) > 1]
        apart = f"{100 * statistics.stdev(trainings):.2f}" if len(each) > 1 else "-"
        inside = f"{100 * statistics.mean(within) ** 0.5:.2f}" if within else "-"
        percent, runs = 100 * mean(each), f"{len(each)} x {chain.runs}"
        print(f"{name:<36}{chain.steps:>5}{chain.eta:>5.0f}{percent:>12.2f}{apart:>13}{inside:>13}"
              f"{runs:>8}{paper if chain == papers(found) else '':>8}", flush=True)  # fmt: skip


def precision() -> str:
    """What accelerate trains in."""
    from accelerate import Accelerator

    return {"no": "float32"}.get(found := Accelerator().mixed_precision, found)


def step_seconds(recipe: Recipe, shape: Mapping[str, int], steps: int) -> float:
    """Seconds that an update of 128 random images takes: on a CPU those of the processor, which
    other work does not lengthen."""
    rng = torch.Generator().manual_seed(0)
    size = (128 * steps, shape["in_channels"], shape["image_size"], shape["image_size"])
    images = torch.randint(0, 256, size, generator=rng, dtype=torch.uint8)
    labels = torch.arange(len(images)) % shape["classes"]
    data = Examples(images, labels, images[:1], labels[:1])
    clock = time.perf_counter if DEVICE == "cuda" else time.process_time
    once = Recipe(
        recipe.variant, 1, {**shape, **recipe.network}, {**recipe.training, "blocks": [0]}
    )
    if DEVICE == "cuda":
        trained(once, data, 0, progress=False)  # what is set up once is not counted
    began = clock()
    trained(once, data, 0, progress=False)
    return (clock() - began) / steps
