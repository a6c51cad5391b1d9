"""Where the weights of well-known networks come from: safetensors, named to the commit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

CLIP_LARGE = "openai/clip-vit-large-patch14"
# so that a score means the same next year
_PINNED = {
    CLIP_LARGE: "32bd64288804d66eefd0ccbe215aa642df71cc41",
    "yuvalkirstain/PickScore_v1": "a4e4367c6dfa7288a00c550414478f865b875800",
    "ttj/sac-logos-ava1-l14-linearMSE": "1e77fa05081323d99725fc40a9bf9f88180490e7",
}


def pinned(model: str, revision: str | None = None) -> str:
    """The commit that is meant when none is given: of well-known weights, else the newest one."""
    return _PINNED.get(model, "main") if revision is None else revision


def frozen(net: Any, device: str | torch.device, dtype: torch.dtype) -> Any:
    """A network that is only evaluated."""
    return net.to(torch.device(device), dtype).eval().requires_grad_(False)


def check_source(name: str, model: Any) -> None:
    """Refuse what can be no hub id and no folder, before anything is downloaded."""
    if not isinstance(model, str) or not model.strip():
        raise TypeError(f"{name}={model!r}: give a hub id, as in {CLIP_LARGE}, or a folder.")
    local = model.startswith((".", os.sep)) or model.count("/") > 1
    if local and not Path(model).exists():
        raise ValueError(f"{name}={model!r} does not exist: give a folder, or a hub id.")


@contextmanager
def loading(what: str, source: str) -> Iterator[None]:
    """Say in one line what could not be loaded.

    Raises:
        ImportError: as for a missing package, and not the kind of error that a single item makes:
            no item can be scored.
    """
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        why = str(error).strip().partition("\n")[0]
        raise ImportError(f"{what} cannot be loaded from {source}: {why}") from error
