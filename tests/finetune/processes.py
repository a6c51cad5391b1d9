"""One of several processes that tune a pipeline together; started by `test_processes`."""

from __future__ import annotations

import sys

import torch

from steering.finetune import drakes
from tests.finetune.small import count_c, small_pipeline

SETTINGS = {"alpha": 0.5, "steps": 4, "truncate": 3, "lr": 1e-3, "every": 2, "progress": False}


def main(out: str, batch: int, updates: int) -> None:
    torch.set_num_threads(1)
    drakes(small_pipeline(), count_c, batch=batch, updates=updates, out=out, **SETTINGS)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
