"""How pleasing an image is, by the LAION aesthetic predictor."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from steering.clip import Pixels
from steering.rewards.batched import check_network, in_batches
from steering.rewards.card import Card
from steering.rewards.compose import Composable
from steering.weights import CLIP_LARGE, check_source, frozen, loading, pinned

_HEAD = "ttj/sac-logos-ava1-l14-linearMSE"
_FILE = "model.safetensors"
_WEIGHT = re.compile(r"layers\.(\d+)\.weight")


@dataclass(frozen=True)
class Aesthetic(Composable):
    """reward(x) = head(e / |e|), e the CLIP image embedding of x; differentiable. Prompts are not
    read.

    The head is five linear layers with nothing between them, trained on people's ratings from 1 to
    10; in practice 3 to 8. Schuhmann et al. 2022, LAION-5B, arXiv:2210.08402. The original head
    is a pickle file, which is not loaded here: the default is a port of it to safetensors.

    Args:
        model: hub id or folder of a CLIP with safetensors weights.
        head: hub id or folder with `model.safetensors`, or such a file, of `layers.K.weight` and
            `layers.K.bias`; it belongs to one `model`.
        revision, head_revision: commits; those of the defaults are pinned, others are the newest.
        device, dtype: of the network, loaded at the first call.
        batch: images at a time.
        offload: weights wait in host memory and move to `device` for each call: for a card that
            a pipeline fills.

    Raises:
        TypeError, ValueError: an argument cannot be; on a call, the head does not fit, or items
            are no images [N, C, H, W] of 1 or 3 channels.
    """

    model: str = CLIP_LARGE
    head: str = _HEAD
    revision: str | None = None
    head_revision: str | None = None
    device: str | torch.device = "cpu"
    dtype: torch.dtype = torch.float32
    batch: int = 16
    offload: bool = False
    differentiable: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        check_source("model", self.model)
        if str(self.head).endswith((".pth", ".pt", ".bin", ".ckpt")):
            raise ValueError(
                f"head={self.head!r} is a pickle file, which can run code: give its safetensors "
                f"port, as in {_HEAD}."
            )
        check_source("head", self.head)
        check_network(self.batch, self.device, self.dtype, self.offload)

    @property
    def name(self) -> str:
        """For tables."""
        own = self.head == _HEAD and self.model == CLIP_LARGE
        return "aesthetic" + ("" if own else f" {PurePath(self.head).stem}")

    @property
    def card(self) -> Card:
        """Facts."""
        return Card(
            higher="people rate the image more pleasing",
            range=(-math.inf, math.inf),  # linear: nothing holds it to the ratings' 1 to 10
            differentiable=True,
            memory=1.22 if self.model == CLIP_LARGE else None,
            source=f"{self.model} and {self.head}",
            revision=pinned(self.head, self.head_revision),
            licence="MIT (CLIP), Apache-2.0 (head)" if self.head == _HEAD else "",
            paper="arXiv:2210.08402",
            notes="does not read the prompt; revision is the head's",
        )

    def load(self) -> None:
        """Load the head and the network: now, instead of at the first call."""
        _ = self.layers, self.tower

    @cached_property
    def tower(self) -> tuple[Pixels, Any, Any]:
        """What the vision network sees, the network, and its projection."""
        from transformers import CLIPModel

        revision = pinned(self.model, self.revision)
        with loading(self.name, self.model):
            clip: Any = CLIPModel.from_pretrained(
                self.model, revision=revision, use_safetensors=True
            )
            pixels = Pixels.load(self.model, revision)
        parts = (clip.vision_model, clip.visual_projection)  # the text tower is let go
        home = "cpu" if self.offload else self.device
        vision, projection = (frozen(part, home, self.dtype) for part in parts)
        return pixels, vision, projection

    @cached_property
    def layers(self) -> list[tuple[Tensor, Tensor]]:
        """Weight [o, i] and bias [o] of each layer of the head."""
        from safetensors.torch import load_file
        from transformers.utils.hub import cached_file

        with loading("the aesthetic head", self.head):
            path: Any = self.head
            if not Path(self.head).is_file():
                revision = pinned(self.head, self.head_revision)
                path = cached_file(self.head, _FILE, revision=revision)
            weights = {k: v.to(self.device, torch.float32) for k, v in load_file(path).items()}
            return _chain(weights, self.tower[2].out_features)

    def __call__(self, items: Tensor, prompts: Sequence[Any]) -> Tensor:
        device = torch.device(self.device)
        return in_batches(
            self.name,
            self._score,
            items,
            prompts,
            self.batch,
            device,
            texts=False,
            visitors=self.tower[1:] if self.offload else (),
        )

    def _score(self, images: Tensor, prompts: list[Any]) -> Tensor:
        pixels, vision, projection = self.tower
        embedding = projection(vision(pixel_values=pixels(images).to(self.dtype)).pooler_output)
        x = functional.normalize(embedding.float(), dim=-1)
        for weight, bias in self.layers:
            x = functional.linear(x, weight, bias)
        return x[:, 0]


def _chain(weights: dict[str, Tensor], width: int) -> list[tuple[Tensor, Tensor]]:
    """The layers in their order, which must lead from an embedding of `width` to one number."""
    numbers = sorted(int(found[1]) for found in map(_WEIGHT.fullmatch, weights) if found)
    names = [(f"layers.{n}.weight", f"layers.{n}.bias") for n in numbers]
    if {name for pair in names for name in pair} != set(weights):
        raise ValueError(
            f"it holds {', '.join(sorted(weights)[:4])}, not layers of weight and bias"
        )
    for name, _ in names:
        out, given = weights[name].shape
        if given != width:
            raise ValueError(f"{name} takes {given} numbers and gets {width}: not this CLIP's head")
        width = out
    if not names or width != 1:
        raise ValueError(f"it ends in {width} numbers, not in one")
    return [(weights[weight], weights[bias]) for weight, bias in names]
