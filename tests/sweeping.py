"""A small sweep on a random walk, and a script that runs it, to be killed at any moment."""

from __future__ import annotations

import sys
from pathlib import Path

from samplers import SMC, Importance, TreeSampling
from samplers.sweep import Sweep
from steering.metrics import Extractor
from tests.brownian import brownian, first


def second(items, prompts):
    return items[:, 1]


def small(**changed) -> Sweep:
    """Two tasks, three samplers, of which one has settings to choose from."""
    usual = {
        "model": brownian(prompts=("a", "b")),
        "tasks": {"first": first, "2nd one": second},
        "samplers": {
            "importance": Importance(),
            "DTS": TreeSampling(branch="even", parallel=4),
            "SMC": [SMC(8), SMC(16)],
        },
        "nfe": [200, 400],
        "seeds": 2,
        "draws": 200,
        "also": [second],
        "extractor": Extractor("identity", lambda x: x),
        "reference": 700,
        "objective": "mmd",
        "tuning_seeds": 1,
        "batch": 16,
    }
    return Sweep(**{**usual, **changed})


if __name__ == "__main__":
    small().run(Path(sys.argv[1]))
