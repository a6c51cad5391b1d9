"""What benchmarks that climb a ladder of budgets have in common: arguments, the sweep, tables."""

from __future__ import annotations

import argparse
import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from samplers import SMC, BestOfN, Importance, Sweep, TreeSampling, table
from samplers.cli.sweep import parse_shard
from samplers.view.plot import plot

# those that draw from a law, with the settings that are searched
SAMPLERS: dict[str, Any] = {
    "importance": Importance(),
    "DTS": TreeSampling(),
    "SMC": [SMC(16), SMC(64), SMC()],
    "best-of-N": [BestOfN(of=4), BestOfN(of=16), BestOfN(of=64)],
    "DTS, published law": TreeSampling(law="published"),
}


def arguments(
    doc: str | None, name: str, nfe: Sequence[int], seeds: int
) -> argparse.ArgumentParser:
    """A parser of what every ladder is told; `--out` is runs/`name` by default."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a minute's worth")
    parser.add_argument("--nfe", type=int, nargs="+", default=list(nfe), help="rows per prompt")
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--out", type=Path, default=Path("runs") / name)
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no run after")
    parser.add_argument(
        "--shard", default="0/1", help="K/N: every N-th piece of work, from the K-th"
    )
    parser.add_argument("--device", default="cpu")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments; a quick run has a folder of its own, and one thread is enough for all."""
    args = parser.parse_args()
    if args.quick:
        args.out = args.out.with_name(args.out.name + "-quick")
    torch.set_num_threads(1)
    return args


def climb(
    sweep: Sweep, args: argparse.Namespace, metrics: Sequence[str], drawn: str
) -> list[table.Row]:
    """Run what is missing; print a table for each metric that there is and what they rest on, and
    draw one metric; the rows of the sweep.

    Raises:
        SystemExit: there was no time for a single run.
    """
    done = sweep.run(args.out, minutes=args.minutes, shard=parse_shard(args.shard))
    print("all of it is there\n" if done else "time was up before all was there\n")
    rows = table.read(args.out)
    there = [m for m in metrics if any(row.get(m) is not None for row in rows)]
    if drawn not in there:
        raise SystemExit(f"{args.out} holds no finished run yet: give more --minutes.")
    for metric in there:
        print(table.markdown(rows, metric))
    print(table.notes(rows, args.out))
    if importlib.util.find_spec("matplotlib") is not None:
        name = sweep.extractor.name if sweep.extractor and drawn in table.DISTANCES else ""
        picture = args.out / f"{args.out.name}.png"
        plot(rows, picture, drawn, note=f"extractor {name}" if name else "")
        print("drew", picture.name)
    return rows
