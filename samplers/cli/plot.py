"""`steer plot`: pictures and tables of a sweep."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from samplers import table
from samplers.view.plot import plot


def add(commands: Any) -> None:
    """The parser of this command."""
    own = commands.add_parser("plot", help="draw what a sweep has found")
    own.description = (
        "Draws compute against quality from the folder of a sweep, with 95 % intervals over seeds "
        "and prompts, and writes its tables anew."
    )
    own.add_argument("folder", type=Path, metavar="DIR", help="what `steer sweep --out` wrote")
    own.add_argument(
        "--metric",
        action="append",
        default=[],
        help="reward, best, frechet, mmd, diversity, ess, log_z, distinct, 'also: NAME'; "
        "repeatable (default: the distances there are, and the rewards)",
    )
    own.add_argument(
        "--format", choices=("png", "pdf", "svg"), default="png", help="default: %(default)s"
    )
    own.set_defaults(run=_plot)


def _plot(given: argparse.Namespace) -> int:
    rows = table.read(given.folder)
    plan = json.loads((given.folder / table.PLAN).read_text())
    written = table.write(rows, given.folder)
    if not table.metrics(rows):
        raise ValueError(f"{given.folder} holds no figure yet.\n{table.notes(rows, given.folder)}")
    for metric in given.metric or table.metrics(rows):
        note = f"extractor {plan['extractor']}" if metric in table.DISTANCES else ""
        timed = any(math.isfinite(p.seconds) for p in table.points(rows, metric))
        for against in ("nfe", "seconds") if timed else ("nfe",):
            name = f"{table.slug(metric)}-{against}.{given.format}"
            written.append(plot(rows, given.folder / name, metric, against=against, note=note))
    print("wrote " + ", ".join(map(str, written)))
    return 0
