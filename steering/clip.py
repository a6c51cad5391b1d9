"""CLIP, for metrics and rewards: what its vision tower sees, and both of its towers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from steering.weights import frozen, pinned

_BICUBIC = 3  # in PIL's numbering, which processors write down


@dataclass(frozen=True)
class Pixels:
    """What a CLIP vision tower sees of images, as its own processor makes it, but differentiable.

    Bicubic resize with antialiasing, clamp to [0, 1], centre crop, (x - mean) / std. Processors
    round to bytes after each of the two passes of the resize; so the two differ by less than 1.5
    levels of 255, over std.

    Args:
        size: shortest edge after the resize, or (height, width).
        crop: (height, width) of the centre that is kept; None keeps all.
        mean, std: per channel.
    """

    size: int | tuple[int, int]
    crop: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def load(cls, model: str, revision: str) -> Pixels:
        """As the processor of a hub id or folder says.

        Raises:
            ValueError: the processor does something else than resize, crop and normalise.
        """
        import transformers

        # where there are two, the other one wants torchvision
        pil = hasattr(transformers, "CLIPImageProcessorPil")
        kind = getattr(transformers, "CLIPImageProcessorPil" if pil else "CLIPImageProcessor")
        own: Any = kind.from_pretrained(model, revision=revision)
        size = {k: v for k, v in dict(own.size).items() if v is not None}
        known = size.keys() in ({"shortest_edge"}, {"height", "width"})
        steps = own.do_resize and own.do_normalize and own.do_rescale
        if not (known and steps and int(own.resample) == _BICUBIC):
            raise ValueError(
                f"the processor of {model} resizes to {size} with filter {own.resample}: only a "
                "bicubic resize, a centre crop and a normalisation are known; give another model."
            )
        crop = own.crop_size if own.do_center_crop else None
        edge = size.get("shortest_edge")
        return cls(
            (size["height"], size["width"]) if edge is None else edge,
            None if crop is None else (crop["height"], crop["width"]),
            tuple(own.image_mean),
            tuple(own.image_std),
        )

    def __call__(self, images: Tensor) -> Tensor:
        """Images [N, 1 or 3, H, W] in [0, 1] -> [N, 3, *crop] float32; gray goes to each channel.

        Raises:
            ValueError: the resized images are smaller than the crop.
        """
        height, width = images.shape[-2:]
        if isinstance(self.size, int):
            short = min(height, width)
            height, width = self.size * height // short, self.size * width // short
        else:
            height, width = self.size
        x = images.float()
        if (height, width) != images.shape[-2:]:  # PIL leaves a right size as it is, too
            x = functional.interpolate(x, (height, width), mode="bicubic", antialias=True)
        x = x.clamp(0, 1)  # bicubic overshoots at edges; bytes cannot
        if self.crop is not None:
            top, left = (height - self.crop[0]) // 2, (width - self.crop[1]) // 2
            if min(top, left) < 0:
                raise ValueError(f"images resized to {height} x {width} hold no crop {self.crop}.")
            x = x[..., top : top + self.crop[0], left : left + self.crop[1]]
        mean, std = (x.new_tensor(v)[:, None, None] for v in (self.mean, self.std))
        return (x.expand(-1, 3, -1, -1) - mean) / std


@dataclass(frozen=True)
class Towers:
    """Both towers of a CLIP: where images and texts meet.

    Args:
        net: a `CLIPModel`, frozen, on its device.
        pixels: what its vision tower sees.
        tokenizer: its own.
    """

    net: Any
    pixels: Pixels
    tokenizer: Any

    @classmethod
    def load(
        cls, model: str, revision: str | None, device: str | torch.device, dtype: torch.dtype
    ) -> Towers:
        """From a hub id or folder with safetensors weights."""
        from transformers import AutoTokenizer, CLIPModel

        revision = pinned(model, revision)
        net: Any = CLIPModel.from_pretrained(model, revision=revision, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(model, revision=revision)
        return cls(frozen(net, device, dtype), Pixels.load(model, revision), tokenizer)

    @property
    def scale(self) -> Tensor:
        """exp(logit_scale): what the training multiplied cosines by."""
        return self.net.logit_scale.exp().float()

    def cosine(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """[N] float32: cosine of each image [N, C, H, W] with its own prompt.

        Texts longer than the tower's (77 tokens) are cut.
        """
        texts = list(dict.fromkeys(prompts))  # each text once: walks of a prompt share it
        tokens = self.tokenizer(
            texts,
            padding="max_length",
            truncation=True,
            max_length=self.net.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(images.device)
        out = self.net(**tokens, pixel_values=self.pixels(images).to(self.net.dtype))
        of = torch.tensor([texts.index(prompt) for prompt in prompts], device=images.device)
        image, text = out.image_embeds.float(), out.text_embeds.float()[of]
        return functional.cosine_similarity(image, text, dim=-1)
