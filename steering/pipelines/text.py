"""Prompts as rows of a table, through a pipeline's own encoders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from steering.pipelines.conditional import evaluating


@torch.no_grad()
def text_tables(
    pipe: Any,
    prompts: Sequence[str],
    negatives: Sequence[str | None] | None,
    dtype: torch.dtype,
    **fixed: Any,
) -> list[Tensor]:
    """Tables [R, ...] of each thing that `pipe.encode_prompt` returns, one prompt at a time.

    Args:
        negatives: a text, or None for the pipeline's own nothing, to each prompt; None for a
            pipeline whose encoder takes no negative prompt.
        dtype: of the tables.
        fixed: more arguments of `encode_prompt`.
    """
    asked = [{"prompt": prompt} for prompt in prompts]
    if negatives is not None:
        asked = [{**one, "negative_prompt": no} for one, no in zip(asked, negatives, strict=True)]
    encoders = [part for name, part in pipe.components.items() if name.startswith("text_encoder")]
    with evaluating(*encoders):
        encoded = [
            pipe.encode_prompt(**one, device=pipe._execution_device, **fixed) for one in asked
        ]
    return [torch.cat(table).to(dtype) for table in zip(*encoded, strict=True)]
