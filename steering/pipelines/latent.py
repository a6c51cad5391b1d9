"""From latents to images through a pipeline's autoencoder, and back."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steering.core import images_in_unit_range
from steering.pipelines.conditional import evaluating

PIXELS_AT_ONCE = 2**20  # one image of 1024 x 1024 or four of 512 x 512: some GiB of activations


def check_images(images: Any) -> None:
    """TypeError or ValueError unless `images` is a tensor of floats in [0, 1]."""
    if not isinstance(images, Tensor) or not images.is_floating_point():
        what = images.dtype if isinstance(images, Tensor) else f"a {type(images).__name__}"
        raise TypeError(f"images is {what}: give a tensor of floats in [0, 1], [N, C, H, W].")
    low, high = float(images.min()), float(images.max())
    if not (low >= -1e-3 and high <= 1 + 1e-3):
        raise ValueError(f"images go from {low:g} to {high:g}: give values in [0, 1].")


@dataclass(frozen=True, eq=False)
class LatentCodec:
    """Images of latents: vae.decode(latents / scaling + shift), a few at a time, in [0, 1].

    And back: (vae.encode(2 images - 1) - shift) · scaling, the mean where it is a law. Both are
    differentiable; see `images_in_unit_range` for the clamp. An image with a value that is not
    finite becomes nan as a whole, so that no reward mistakes it for an image.

    Args:
        vae: a diffusers autoencoder.
        pixels: height times width of one image.
        shift: the family's own; some have it in their configuration and do not use it.
    """

    vae: Any
    pixels: int
    shift: float = 0.0

    @staticmethod
    def of(vae: Any, pixels: int, shift: float = 0.0) -> LatentCodec:
        """The codec of `vae`; in float32, on a copy, where float16 is known to overflow."""
        if vae.dtype == torch.float16 and vae.config.get("force_upcast", True):
            vae = copy.deepcopy(vae).float()
        return LatentCodec(vae, pixels, shift)

    def __call__(self, x: Tensor) -> Tensor:
        """Images [N, C, H, W] float32 of latents x [N, *D]."""
        return torch.cat([self._decode(part) for part in x.split(self._chunk)])

    def encode(self, images: Tensor) -> Tensor:
        """Latents [N, *D] float32 of images [N, 3, H, W] in [0, 1].

        Raises:
            TypeError: they are no tensor of floats. ValueError: of another size, or range.
        """
        check_images(images)
        if images.ndim != 4 or images.shape[2] * images.shape[3] != self.pixels:
            raise ValueError(
                f"images have shape {list(images.shape)}: give [N, 3, H, W] of the model's own "
                f"size, {self.pixels} pixels."
            )
        return torch.cat([self._encode(part) for part in images.split(self._chunk)])

    @property
    def _chunk(self) -> int:
        return max(1, PIXELS_AT_ONCE // self.pixels)

    def _decode(self, latents: Tensor) -> Tensor:
        latents = latents / self.vae.config.scaling_factor + self.shift
        with evaluating(self.vae):
            pixels = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0].float()
        finite = pixels.flatten(1).isfinite().all(1).view(-1, 1, 1, 1)
        return images_in_unit_range(torch.where(finite, pixels, torch.nan))

    def _encode(self, images: Tensor) -> Tensor:
        pixels = (2 * images.float() - 1).to(self.vae.dtype)
        with evaluating(self.vae):
            encoded = self.vae.encode(pixels)
        # small autoencoders give the latents themselves
        law = getattr(encoded, "latent_dist", None)
        latents = encoded.latents if law is None else law.mode()
        return (latents.float() - self.shift) * self.vae.config.scaling_factor
