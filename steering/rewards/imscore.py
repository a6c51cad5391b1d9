"""Preference models that live in the imscore package."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor

from steering.rewards.batched import check_network, in_batches
from steering.rewards.card import Card
from steering.rewards.compose import Composable
from steering.weights import check_source, frozen, loading, pinned


@dataclass(frozen=True)
class _Known:
    title: str
    module: str
    kind: str
    source: str
    memory: float | None
    paper: str
    range: tuple[float, float]
    higher: str


_LINE = (-math.inf, math.inf)
_KNOWN = {
    "imagereward": _Known(
        "ImageReward", "imscore.imreward.model", "ImageReward", "RE-N-Y/ImageReward", 1.79,
        "arXiv:2304.05977", _LINE, "people rank the image higher; normal(0, 1) over its training",
    ),
    "hpsv2.1": _Known(
        "HPSv2.1", "imscore.hps.model", "HPSv2", "RE-N-Y/hpsv21", 3.94,
        "arXiv:2306.09341", (-1.0, 1.0), "people prefer the image; a cosine, in practice .2 to .35",
    ),
    "cyclereward": _Known(
        "CycleReward", "imscore.cyclereward.model", "CycleReward",
        "NagaSaiAbhinay/CycleReward-Combo", None,
        "arXiv:2506.02095", _LINE, "image and prompt can be made of each other",
    ),
    "pickscore-siglip": _Known(
        "PickScore SigLIP", "imscore.preference.model", "SiglipPreferenceScorer",
        "RE-N-Y/pickscore-siglip", 3.51,
        "arXiv:2305.01569", _LINE, "people pick the image more often",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Imscore(Composable):
    """reward(x) = what a preference model of the imscore package scores x with its prompt;
    differentiable.

    "imagereward": Xu et al. 2023, arXiv:2304.05977. "hpsv2.1": Wu et al. 2023, arXiv:2306.09341.
    "cyclereward": Bahng et al. 2025, arXiv:2506.02095. "pickscore-siglip": a SigLIP trained on
    Pick-a-Pic, arXiv:2305.01569. imscore states that its ports differ from the originals by 0.4 %
    (HPSv2.1) and 0.8 % (ImageReward), from preprocessing. Its MPS is not offered: it allows code
    from the hub to run.

    Args:
        scorer: one of these names.
        model: hub id or folder of its weights, safetensors; None is the well-known one.
        revision: commit of the weights; None is the newest one.
        device: of the network, float32, loaded at the first call.
        batch: images at a time.
        offload: weights wait in host memory and move to `device` for each call: for a card that
            a pipeline fills.

    Raises:
        TypeError, ValueError: an argument cannot be; on a call, items are no images [N, C, H, W]
            of 1 or 3 channels or prompts no texts.
        ImportError: imscore is missing: `pip install diffusion-steering[imscore]`.
    """

    scorer: str
    model: str | None = None
    revision: str | None = None
    device: str | torch.device = "cpu"
    batch: int = 16
    offload: bool = False
    differentiable: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        if self.scorer not in _KNOWN:
            raise ValueError(f"scorer={self.scorer!r}: give one of {', '.join(_KNOWN)}.")
        if self.model is not None:
            check_source("model", self.model)
        check_network(self.batch, self.device, offload=self.offload)
        if find_spec("imscore") is None:  # told here, not after the first walk
            raise ImportError(
                f"{self.name} needs imscore: pip install 'diffusion-steering[imscore]'."
            )

    @property
    def name(self) -> str:
        """For tables."""
        own = "" if self.model is None else f" {PurePath(self.model).name}"
        return _KNOWN[self.scorer].title + own

    @property
    def card(self) -> Card:
        """Facts."""
        known = _KNOWN[self.scorer]
        return Card(
            higher=known.higher,
            range=known.range,
            differentiable=True,
            memory=known.memory if self.model is None else None,
            source=self.model or known.source,
            revision=pinned(self.model or known.source, self.revision),
            paper=known.paper,
            notes="the package downloads its tokenizer, and for HPSv2.1 a CLIP ViT-H/14, besides",
        )

    def load(self) -> None:
        """Load the network: now, instead of at the first call."""
        _ = self.net

    @cached_property
    def net(self) -> Any:
        """The network."""
        from transformers.utils.hub import cached_file

        known = _KNOWN[self.scorer]
        kind = getattr(importlib.import_module(known.module), known.kind)
        source = self.model or known.source
        revision = pinned(source, self.revision)
        with loading(self.name, source):
            # asked for first, because imscore would take a pickle file where this one is missing
            cached_file(source, "model.safetensors", revision=revision)
            net = kind.from_pretrained(source, revision=revision)
        return frozen(net, "cpu" if self.offload else self.device, torch.float32)

    def __call__(self, items: Tensor, prompts: Sequence[Any]) -> Tensor:
        device = torch.device(self.device)
        visitors = [self.net] if self.offload else []
        return in_batches(
            self.name, self._score, items, prompts, self.batch, device, visitors=visitors
        )

    def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
        colour = images.float().expand(-1, 3, -1, -1)
        scores = self.net.score(colour, prompts)
        if scores.numel() != len(images):
            raise TypeError(
                f"imscore's {self.name} returned shape {tuple(scores.shape)} for {len(images)} "
                "images: this version of imscore is not known here."
            )
        return scores.reshape(len(images))  # [N] or [N, 1]
