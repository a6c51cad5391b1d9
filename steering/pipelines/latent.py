"""From latents to images through a pipeline's autoencoder."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steering.core import images_in_unit_range
from steering.pipelines.conditional import evaluating

PIXELS_AT_ONCE = 2**20  # one image of 1024 x 1024 or four of 512 x 512: some GiB of activations


@dataclass(frozen=True, eq=False)
class LatentDecoder:
    """Images of latents: vae.decode(latents / scaling + shift), a few at a time, in [0, 1].

    An image with a value that is not finite becomes nan as a whole, so that no reward mistakes it
    for an image. Differentiable.

    Args:
        vae: a diffusers autoencoder.
        pixels: height times width of one image.
        shift: the family's own; some have it in their configuration and do not use it.
    """

    vae: Any
    pixels: int
    shift: float = 0.0

    @staticmethod
    def of(vae: Any, pixels: int, shift: float = 0.0) -> LatentDecoder:
        """The decoder of `vae`; in float32, on a copy, where float16 is known to overflow."""
        if vae.dtype == torch.float16 and vae.config.get("force_upcast", True):
            vae = copy.deepcopy(vae).float()
        return LatentDecoder(vae, pixels, shift)

    def __call__(self, latents: Tensor) -> Tensor:
        """Images [N, C, H, W] float32 of latents [N, *D]."""
        chunk = max(1, PIXELS_AT_ONCE // self.pixels)
        return torch.cat([self._decode(part) for part in latents.split(chunk)])

    def _decode(self, latents: Tensor) -> Tensor:
        latents = latents / self.vae.config.scaling_factor + self.shift
        with evaluating(self.vae):
            pixels = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0].float()
        finite = pixels.flatten(1).isfinite().all(1).view(-1, 1, 1, 1)
        return images_in_unit_range(torch.where(finite, pixels, torch.nan))
