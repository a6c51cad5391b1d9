"""The chain of NoProp's blocks trained end to end, by backprop: what block-local training is
measured against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steering.digest import digest
from steering.finetune.blocks import settings_of
from steering.finetune.noprop import unit
from steering.gaussian import GaussianProcess
from steering.models.noprop import NoPropDenoiser, scheduler
from steering.pipelines.schedulers import read_scheduler


class EndToEnd:
    """One block, which is all of a "dt" network: the same chain from noise to the last guess, its
    loss the cross-entropy of that, backpropagated through every block."""

    def __init__(self, network: NoPropDenoiser, images: Tensor, labels: Tensor) -> None:
        self.network, self.images, self.labels = network, images, labels
        self.blocks: Sequence[nn.Module] = [network]
        self.rows = len(images)
        shape = (network.label_embedding.shape[1],)
        chain, _ = read_scheduler(scheduler(network), shape, steps=network.steps)
        self.chain: GaussianProcess = chain.to(network.label_embedding.device)

    def told(self) -> dict[str, Any]:
        data = [digest(self.images), digest(self.labels)]
        return {"rule": "backprop", "network": settings_of(self.network), "data": data}

    def loss(self, block: int, numbers: Tensor, rng: torch.Generator) -> Tensor:
        """Cross-entropy of the last block's logits."""
        embedding = self.network.label_embedding
        images = unit(self.images[numbers]).to(embedding.device)
        n, logits = len(numbers), None
        z = torch.randn(n, embedding.shape[1], generator=rng).to(embedding)
        for k in range(self.network.steps):
            part = self.network.block(k)
            i = torch.full((n,), k, device=embedding.device)
            logits = part(z, i, part.encode(images)).float()
            step = self.chain.transition(z, i, self.network.guess(logits))
            noise = torch.randn(z.shape, generator=rng).to(embedding)
            z = step.mean + step.std[:, None] * noise
        assert logits is not None
        return F.cross_entropy(logits, self.labels[numbers].to(embedding.device))

    def watch(self, block: int) -> dict[str, float]:
        """Nothing."""
        return {}
