"""Named feature extractors: a distance means nothing without the name of what made its features."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steering.clip import Pixels
from steering.weights import frozen, pinned

_BATCH = 250  # images at a time


@dataclass(frozen=True)
class Extractor:
    """Features of images, and the name they go by in every figure made of them."""

    name: str
    features: Callable[[Tensor], Tensor]  # images [N, C, H, W] in [0, 1] -> [N, d]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """[N, d] float32 on the CPU, of images [N, C, H, W] in [0, 1], a few at a time.

        Raises:
            TypeError: the features are not [N, d].
        """
        parts = [torch.as_tensor(self.features(part)).cpu() for part in images.split(_BATCH)]
        features = torch.cat(parts) if parts else torch.empty(0, 0)
        if features.ndim != 2 or len(features) != len(images):
            raise TypeError(
                f"extractor {self.name} returned shape {tuple(features.shape)} for {len(images)} "
                "images: return features [N, d]."
            )
        return features.float()


def extractor(name: str, device: str | torch.device = "cpu") -> Extractor:
    """The extractor of a name.

    Args:
        name: "mnist-classifier", the 64 hidden units of the built-in classifier; "inception", the
            2,048 pooled features that the usual FID takes (needs `pip install
            diffusion-steering[fid]` and a download); "clip:MODEL", the image embedding of a CLIP
            model by hub id or folder, as CMMD takes; or "MODULE:FUNCTION" of your own, images
            [N, C, H, W] in [0, 1] -> [N, d].
        device: where a network runs.

    Raises:
        ValueError: no extractor has this name.
        ImportError: the extra it needs is not installed.
    """
    kind, _, rest = name.partition(":")
    if name in _BUILDERS or (kind == "clip" and rest):
        return Extractor(name, _BUILDERS[kind](rest, torch.device(device)))
    if not rest:
        known = ", ".join(_BUILDERS)
        raise ValueError(f"extractor={name!r} is unknown: give one of {known}, or MODULE:FUNCTION.")
    return Extractor(name, own_function(kind, rest))


def own_function(module: str, name: str) -> Callable[..., Any]:
    """A user's function, from a module that can be imported from the current folder too.

    Raises:
        ValueError: the module has no such function.
        ImportError: there is no such module.
    """
    if "" not in sys.path:
        sys.path.insert(0, "")  # a module in the folder the command was given in
    function = getattr(importlib.import_module(module), name, None)
    if not callable(function):
        raise ValueError(f"module {module} has no function {name}.")
    return function


def _mnist(rest: str, device: torch.device) -> Callable[[Tensor], Tensor]:
    from steering import zoo

    net = zoo.load("mnist-classifier", device=device)
    return lambda images: net.features(images.to(device))


def _inception(rest: str, device: torch.device) -> Callable[[Tensor], Tensor]:
    try:
        module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    except ImportError as error:
        raise ImportError(
            'extractor "inception" needs torch-fidelity: pip install "diffusion-steering[fid]".'
        ) from error
    net: Any = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    net = net.to(device).eval()
    return lambda images: net(_bytes(images).to(device))[0]


def _clip(rest: str, device: torch.device) -> Callable[[Tensor], Tensor]:
    from transformers import CLIPVisionModelWithProjection

    revision = pinned(rest)
    net: Any = CLIPVisionModelWithProjection.from_pretrained(
        rest, revision=revision, use_safetensors=True
    )
    net, pixels = frozen(net, device, torch.float32), Pixels.load(rest, revision)

    # bytes first: what a model drew is compared with images that were stored as bytes
    return lambda images: net(pixel_values=pixels(_bytes(images).to(device) / 255)).image_embeds


def _bytes(images: Tensor) -> Tensor:
    """uint8 [N, 3, H, W]; gray images are shown to all three channels."""
    pixels = (images.float() * 255).round().clamp(0, 255).byte()
    return pixels.expand(-1, 3, -1, -1) if pixels.shape[1] == 1 else pixels


_BUILDERS: dict[str, Callable[[str, torch.device], Callable[[Tensor], Tensor]]] = {
    "mnist-classifier": _mnist,
    "inception": _inception,
    "clip": _clip,
}
