"""A pipeline of six letters that takes no time, and a reward with a gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from steering.models.sequence_denoiser import SequenceDenoiser
from steering.models.sequence_pipeline import SequencePipeline
from steering.models.token_scheduler import TokenScheduler


def small_pipeline(kind: str = "masked", **scheduler: Any) -> SequencePipeline:
    """Random weights, always the same: with ones that are not trained nothing is certain."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = SequenceDenoiser(
            4, masked=kind == "masked", width=16, depth=1, kernel=3, fine=8, timed=kind != "masked"
        )
    return SequencePipeline(net.eval(), TokenScheduler(4, kind, **scheduler), length=6)


def count_c(items: Tensor, prompts: Any) -> Tensor:
    """How many letters are C: E = 6/4 at random."""
    return items[..., 1].sum(1)


def weights(pipe: Any) -> dict[str, Tensor]:
    """What its network holds."""
    return pipe.denoiser.state_dict()


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Are they equal to the bit?"""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
