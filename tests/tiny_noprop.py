"""NoProp networks that take no time: random ones, and one that knows the exact posterior."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from steering.models.noprop import TIMES, NoPropBlock, NoPropDenoiser, scheduler
from steering.models.noprop_pipeline import NoPropPipeline

SIZE = 8  # of images
TINY = {"classes": 4, "steps": 5, "embed_dim": 6, "image_size": SIZE, "channels": (4, 4, 6),
        "hidden": 16}  # fmt: skip


def network(
    variant: Any = "dt", seed: int = 0, *, loud: bool = True, **options: Any
) -> NoPropDenoiser:
    """Untrained, always the same for a seed; `loud`, with logits that tell states and images apart,
    from which it would not learn well."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        net = NoPropDenoiser(variant, **{**TINY, **options})
    if loud:
        for p in net.blocks.parameters():
            p.data *= 2 if p.ndim > 1 else 1
        for k in range(len(net.blocks)):
            net.block(k).join[-1].weight.data *= 8
    return net.eval()


def pipeline(net: NoPropDenoiser, names: Sequence[str] | None = None) -> NoPropPipeline:
    """Of a network and its stock scheduler, silent."""
    pipe = NoPropPipeline(net, scheduler(net), names)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pictures(n: int, seed: int = 0) -> Tensor:
    """[n, 1, 8, 8] in [0, 1]."""
    return torch.rand(n, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


class ExactBlock(NoPropBlock):
    """Knows p(y | image), which it reads in the first pixels of an image, and so the posterior

        p(y | z, image) ∝ p(y | image) N(z; alpha u_y, sigma²)

    of states z = alpha u + sigma noise: its softmax times W is the exact mean of u.
    """

    def __init__(self, net: NoPropDenoiser) -> None:
        super().__init__((1,), 1, SIZE, (1, 1, 1), 2, 2, 0.0, True)
        self.embedding = net.label_embedding.detach()
        flow = net.config["variant"] == "fm"
        self.alpha_bar = None if flow else net.alpha_bar()

    def encode(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, : len(self.embedding)].log()

    def forward(self, z: Tensor, timestep: Tensor, features: Tensor) -> Tensor:
        u = self.embedding.to(z)
        if self.alpha_bar is None:
            sigma = timestep.to(z) / TIMES
            alpha = 1 - sigma
        else:
            level = self.alpha_bar[timestep.long()].to(z)
            alpha, sigma = level.sqrt(), (1 - level).sqrt()
        alpha, variance = alpha[:, None], sigma.square()[:, None]
        return features + (alpha * z @ u.T - alpha.square() * u.square().sum(1) / 2) / variance


def exact(variant: Any, embedding: Tensor | None = None, **options: Any) -> NoPropDenoiser:
    """A network with the exact posterior in each of its blocks; d-dimensional embeddings [m, d]."""
    if embedding is not None:
        m, d = embedding.shape
        options = {"classes": m, "embed_dim": d, "embedding": "learned", **options}
    net = network(variant, **options)
    if embedding is not None:
        net.label_embedding.data.copy_(embedding)
    for k in range(len(net.blocks)):
        net.blocks[k] = ExactBlock(net)
    return net.eval()


def told(p: Tensor) -> Tensor:
    """Images [N, 1, 8, 8] that say p [N, m] to `exact` networks."""
    images = torch.zeros(len(p), SIZE * SIZE)
    images[:, : p.shape[1]] = p
    return images.view(-1, 1, SIZE, SIZE)
