"""`steer demo`: the built-in model, steered to even digits, beside plain draws of it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

import samplers
from samplers.result import Result
from samplers.view.curve import curve
from samplers.view.files import account, draws_picture, trees
from steering import from_pipeline, rewards, zoo

_EVEN = (0, 2, 4, 6, 8)
_STEPS, _DRAWS = 25, 32


def add(commands: Any) -> None:
    """The parser of this command."""
    demo = commands.add_parser("demo", help="steer the built-in MNIST model to even digits")
    demo.description = (
        "Draws from the built-in MNIST model with and without steering to even digits, prints a "
        "table of what each sampler found and spent, and writes pictures."
    )
    demo.add_argument("--out", type=Path, default=Path("demo"), help="folder (default: demo)")
    demo.add_argument("--seed", type=int, default=0, help="of all noise (default: 0)")
    demo.add_argument(
        "--nfe", type=int, default=2000, help="network rows per sampler (default: 2000)"
    )
    demo.set_defaults(run=_demo)


def _demo(given: argparse.Namespace) -> int:
    run(given.out, seed=given.seed, nfe=given.nfe)
    return 0


def run(out: Path, *, seed: int, nfe: int) -> dict[str, Result]:
    """Draw with each sampler, print what it found and spent, and write pictures to `out`.

    Args:
        out: folder, made if missing.
        seed: of all noise.
        nfe: network rows of each steered sampler, at least one walk.
    """
    least = _STEPS * _DRAWS
    if nfe < least:
        raise ValueError(f"--nfe {nfe}: the demo draws {_DRAWS} images, give at least {least}.")
    torch.set_num_threads(1)  # a small network: threads would only wait for each other
    out.mkdir(parents=True, exist_ok=True)
    model = from_pipeline(zoo.load("mnist"), steps=_STEPS)
    classifier = zoo.load("mnist-classifier")
    reward = rewards.Classifier(classifier, _EVEN)
    print(f"MNIST, {_STEPS} steps a walk; reward: log-probability of an even digit; lam = 1")
    columns = ("rows", "draws", "distinct", "mean reward", "even", "ESS", "seconds")
    print(" " * 16 + "".join(f"{column:>12}" for column in columns))
    runs = (
        ("plain draws", "plain", samplers.Ancestral(_DRAWS)),
        ("importance", "importance", samplers.Importance()),
        ("DTS", "dts", samplers.TreeSampling()),
        # the default keeps fewer leaves in flight of so small a budget, and is slower
        ("DTS*", "dts_star", samplers.TreeSearch(parallel=16)),
    )
    results = {}
    for title, name, sampler in runs:
        result = samplers.sample(
            model, reward, sampler, nfe=nfe, draws=_DRAWS, seed=seed, progress=False
        )
        results[name] = result
        share = result.counts.double() / result.counts.sum()
        even = float(share @ result.rewards.exp())
        cells = (
            f"{result.nfe}",
            f"{int(result.counts.sum())}",
            f"{result.distinct}",
            f"{float(share @ result.rewards):.3f}",
            f"{even:.0%}",
            f"{float(result.ess[0]):.1f}",
            f"{result.spent.seconds:.1f}",
        )
        print(f"{title:<16}" + "".join(f"{cell:>12}" for cell in cells), flush=True)
        draws_picture(result, out / f"{name}.png", f"{title}: {even:.0%} even")
    trees(results["dts_star"], out, "DTS*: where the best even digits came from")
    curve({"DTS": results["dts"].history, "DTS*": results["dts_star"].history}).save(
        out / "curve.png"
    )
    figures = {name: account(result) for name, result in results.items()}
    (out / "result.json").write_text(json.dumps(figures, indent=1, allow_nan=False) + "\n")
    names = sorted(path.name for path in out.iterdir())
    print(f"wrote {', '.join(names)} to {out}")
    return results
