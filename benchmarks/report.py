"""How a benchmark reports: what it ran on first, its figures as one line of JSON last."""

from __future__ import annotations

import itertools
import json
import math
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def header() -> None:
    """Print the command, the machine and the versions that the figures were made with."""
    module = Path(sys.argv[0]).stem
    print("command:", "python -m", f"benchmarks.{module}", shlex.join(sys.argv[1:]))
    print("machine:", _processor(), f"({torch.get_num_threads()} threads of torch)")
    if torch.cuda.is_available():
        print("device: ", torch.cuda.get_device_name())
    names = ("torch", "diffusers")
    print("version:", f"python {platform.python_version()},",
          ", ".join(f"{name} {version(name)}" for name in names), flush=True)  # fmt: skip


def finish(figures: dict[str, Any]) -> None:
    """Print the figures as the last line, as JSON; what is not finite becomes null."""
    print(json.dumps(_plain(figures), allow_nan=False), flush=True)


def nfe_factor(mine: dict[int, float], other: dict[int, float], at: int) -> str:
    """NFE at which another sampler has this one's distance at `at`, over `at`.

    Above 1 this one needs less. Read off the other's best so far, interpolated in logarithms; a
    bound where that does not reach.

    Args:
        mine, other: distance by NFE.
        at: one of `mine`.
    """
    target, best = mine[at], math.inf
    curve: list[tuple[int, float]] = []
    for nfe in sorted(other):
        best = min(best, other[nfe])
        curve.append((nfe, best))
    if min(target, best) <= 0:
        return "a distance is at its floor"
    if curve[0][1] <= target:
        return f"< {curve[0][0] / at:.2f}" if curve[0][1] < target else f"{curve[0][0] / at:.2f}"
    for (low, a), (high, b) in itertools.pairwise(curve):
        if b <= target:
            share = math.log(a / target) / math.log(a / b)
            return f"{low * (high / low) ** share / at:.2f}"
    return f"> {curve[-1][0] / at:.2f}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, torch.Tensor):
        return _plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} x {len(names)}" if names else platform.processor() or platform.machine()
