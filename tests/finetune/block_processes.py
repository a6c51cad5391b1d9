"""One of several processes that train blocks; started by `test_blocks`."""

from __future__ import annotations

import os
import sys

import torch
from safetensors.torch import save_file

from steering.finetune.blocks import train_blocks
from tests.finetune.small_blocks import small_rule

SETTINGS = {"epochs": 2, "batch": 8, "average": 0.5, "progress": False}


def main(out: str) -> None:
    torch.set_num_threads(1)
    rule = small_rule()
    histories = train_blocks(rule, out=out, **SETTINGS)
    assert sorted(histories) == [0, 1, 2]
    save_file(rule.network.state_dict(), f"{out}/process-{os.environ['RANK']}.safetensors")


if __name__ == "__main__":
    main(sys.argv[1])
