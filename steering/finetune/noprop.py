"""NoProp (arXiv:2503.24322): a classifier whose blocks each learn to denoise the label, alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steering.digest import digest
from steering.finetune.blocks import settings_of, train_blocks
from steering.finetune.loop import check_numbers

if TYPE_CHECKING:
    from steering.models.noprop import NoPropDenoiser

Loss = Literal["cross-entropy", "squared"]
Weighting = Literal["uniform", "snr", "clamped"]
_WATCHED = 1000  # examples
_PER_CLASS = 500  # examples that prototypes are chosen among
_LARGEST = 1e6  # weight of a loss that has none that is finite
# Adam does not see the scale of a gradient; clipping, which is over all weights together, would
_SCHEDULE = 1e-3
_APART = 0.9  # alpha_bar at which embeddings that are learned are told apart


def noprop(
    network: NoPropDenoiser,
    images: Tensor,
    labels: Tensor,
    *,
    epochs: float,
    loss: Loss = "cross-entropy",
    weighting: Weighting = "uniform",
    limit: float = 5.0,
    test: tuple[Tensor, Tensor] | None = None,
    batch: int = 128,
    lr: float = 1e-3,
    decay: float = 1e-3,
    clip: float = 1.0,
    blocks: Sequence[int] | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    progress: bool = True,
) -> dict[int, list[dict[str, Any]]]:
    """Train a NoProp classifier in place, block by block; see `train_blocks`.

    A block sees z = sqrt(ab) u + sqrt(1 - ab) e of its own level ("fm": t u + (1 - t) e) and the
    image, and lowers its own loss by its own optimiser. Embeddings are what they are: see
    `learn_embedding` and `prototypes`.

        squared        w · |guess - u|²; of "fm" with a velocity |v - (u - e)|². The paper's.
        cross-entropy  w · -log p(y | z, image), p the network's probabilities. It has the same
                       optimum, the exact mean of u, and a gradient where p is sure and wrong, which
                       the square of a softmax has not.

    The weight w is that of the bound, or what is left of it:

        snr      T/2 (SNR after - SNR before) for "dt", SNR'(t) / 2 for "ct", 1 / sigma² for "fm",
                 what the paper's square of velocities comes to. Unbounded: of 10 blocks of "dt" the
                 last is all that counts.
        clamped  the same, at most `limit` (min-SNR, arXiv 2303.09556).
        uniform  1.

    Of "dt" w tells how losses compare, no more: each block has its own Adam, which its scale does
    not change. The schedule of "ct" is learned to have the bound vary least over t, as in
    arXiv 2107.00630, whatever w is.

    Args:
        network: on the device that it is trained on.
        images: [N, C, H, W] uint8, or float in [0, 1].
        labels: [N] int64.
        epochs: of every block.
        loss: see above; "cross-entropy" needs output="probabilities".
        weighting: see above.
        limit: of "clamped".
        test: images and labels that blocks are watched on, the first 1,000; nothing is chosen by
            them. None: none are.
        batch, lr, decay, clip, blocks, seed, out, progress: see `train_blocks`.

    Returns:
        {block: history}: "loss" and "gradient" of every update; after every epoch "weight", the
        largest over the block's times, and "accuracy" on `test` of its guess at its noisiest level.

    Raises:
        ValueError, LocalityError, NotFiniteError: as `train_blocks`.
    """
    rule = NoPropRule(network, images, labels, loss, weighting, limit, test)
    return train_blocks(
        rule, epochs=epochs, batch=batch, lr=lr, decay=decay, clip=clip, blocks=blocks, seed=seed,
        out=out, progress=progress,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class NoPropRule:
    """The local rule of NoProp; arguments as of `noprop`.

    Raises:
        ValueError: an argument that is unknown or does not fit.
    """

    network: NoPropDenoiser
    images: Tensor
    labels: Tensor
    objective: Loss = "cross-entropy"
    weighting: Weighting = "uniform"
    limit: float = 5.0
    test: tuple[Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        if self.objective not in ("cross-entropy", "squared"):
            raise ValueError(f"loss={self.objective!r}: give 'cross-entropy' or 'squared'.")
        if self.weighting not in ("uniform", "snr", "clamped"):
            raise ValueError(f"weighting={self.weighting!r}: give 'uniform', 'snr' or 'clamped'.")
        check_numbers(limit=self.limit, above=True)
        output = self.network.config["output"]
        if self.objective == "cross-entropy" and output != "probabilities":
            raise ValueError(
                f"loss='cross-entropy' of a network with output={output!r}: give loss='squared', "
                "or a network with output='probabilities'."
            )
        check_examples(self.network, "images", self.images, "labels", self.labels)
        if self.test is not None:
            check_examples(self.network, "test[0]", self.test[0], "test[1]", self.test[1])

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The network's blocks; that of "ct" has the schedule."""
        if self.network.schedule is None:
            return [*self.network.blocks]
        return [nn.ModuleList([self.network.blocks[0], self.network.schedule])]

    @property
    def rows(self) -> int:
        return len(self.images)

    def told(self) -> dict[str, Any]:
        return {
            "network": settings_of(self.network),
            "embedding": digest(self.network.label_embedding),
            "data": [digest(self.images), digest(self.labels)],
            "loss": self.objective,
            "weighting": self.weighting,
            "limit": self.limit,
        }

    def loss(self, block: int, numbers: Tensor, rng: torch.Generator) -> Tensor:
        net, variant = self.network, self.network.config["variant"]
        device, n = net.label_embedding.device, len(numbers)
        y = self.labels[numbers].to(device)
        u = net.label_embedding[y]
        noise = torch.randn(u.shape, generator=rng).to(device)
        # stratified: the loss depends on the time
        t = ((torch.arange(n) + torch.rand(n, generator=rng)) / n).to(device)
        if variant == "fm":
            z = t[:, None] * u + (1 - t)[:, None] * noise
        elif net.schedule is not None:
            z = _noised(_level(net.schedule(t)[0].detach()), u, noise)
        else:
            z = _noised(self._alpha_bar[block].to(device), u, noise)
        features = net.block(block).encode(unit(self.images[numbers]).to(device))
        logits = net.block(block)(z, 1000 * (1 - t), features).float()
        if net.config["output"] == "velocity":
            return (net.guess(logits).float() - (u - noise)).square().sum(1).mean()
        if self.objective == "cross-entropy":
            each = F.cross_entropy(logits, y, reduction="none")
        else:
            each = (net.guess(logits) - u).square().sum(1)
        loss = (self.weight(block, t) * each).mean()
        if net.schedule is not None:
            loss = loss + self._schedule_loss(t, u, noise, features.detach())
        return loss

    @torch.no_grad()
    def weight(self, block: int, t: Tensor) -> Tensor:
        """What the loss of a block at times t [N] is weighed by, [N]; "dt" knows one time a block.

        The last block of "dt" ends at an infinite SNR, and so its weight is, but for a bound.
        """
        net = self.network
        if self.weighting == "uniform":
            return torch.ones_like(t)
        if net.config["variant"] == "fm":
            weight = 1 / (1 - t).clamp(min=1e-3).square()
        elif net.schedule is not None:
            gamma, slope = net.schedule(t)
            weight = -slope * (-gamma).exp() / 2
        else:
            level = torch.cat([self._alpha_bar, torch.ones(1)])[block : block + 2].double()
            weight = (level / (1 - level)).diff().to(t).expand(len(t)) * net.steps / 2
        return weight.clamp(max=self.limit if self.weighting == "clamped" else _LARGEST)

    def _schedule_loss(self, t: Tensor, u: Tensor, noise: Tensor, features: Tensor) -> Tensor:
        """A term of value 0, with the gradient of the bound's relative variance over t with respect
        to the schedule, and to nothing else."""
        net = self.network
        assert net.schedule is not None
        gamma, slope = net.schedule(t)
        logits = net.block(0)(_noised(_level(gamma), u, noise), 1000 * (1 - t), features).float()
        bound = -slope * (-gamma).exp() / 2 * (net.guess(logits) - u).square().sum(1)
        spread = bound.square().mean() / bound.detach().mean().square().clamp(min=1e-12)
        weights = list(net.schedule.parameters())
        gradients = torch.autograd.grad(spread, weights)
        term = _SCHEDULE * sum((w * g).sum() for w, g in zip(weights, gradients, strict=True))
        assert isinstance(term, Tensor)
        return term - term.detach()

    @torch.no_grad()
    def watch(self, block: int) -> dict[str, float]:
        net = self.network
        device = net.label_embedding.device
        times = torch.linspace(0, 1, 1001, device=device)
        told = {"weight": float(self.weight(block, times).max())}
        if self.test is None:
            return told
        images, y = self.test[0][:_WATCHED], self.test[1][:_WATCHED]
        features = net.block(block).encode(unit(images).to(device))
        # at the noisiest level it learns: in continuous time, all there is to go by is the image
        noise = torch.randn(
            len(y), net.label_embedding.shape[1], generator=torch.Generator().manual_seed(0)
        ).to(device)
        level = torch.zeros(()) if net.timed else self._alpha_bar[block]
        z = _noised(level.to(device), net.label_embedding[y.to(device)], noise)
        timestep = torch.full((len(y),), 1000.0, device=device)
        right = net.block(block)(z, timestep, features).argmax(-1).cpu() == y
        return told | {"accuracy": float(right.double().mean())}

    @cached_property
    def _alpha_bar(self) -> Tensor:
        """[T] float32 of "dt", before each block."""
        return self.network.alpha_bar().flip(0).float()


def _noised(level: Tensor, u: Tensor, noise: Tensor) -> Tensor:
    """States [N, d] of signal level, [N, 1] or []."""
    return level.sqrt() * u + (1 - level).sqrt() * noise


def _level(gamma: Tensor) -> Tensor:
    """sigmoid(-γ) [N, 1] of γ [N]."""
    return torch.sigmoid(-gamma)[:, None]


def unit(images: Tensor) -> Tensor:
    """Images as floats in [0, 1]."""
    return images if images.is_floating_point() else images.float() / 255


def check_examples(
    network: NoPropDenoiser, images_name: str, images: Tensor, labels_name: str, labels: Tensor
) -> None:
    """ValueError for images or labels that are not the network's, by their argument's name."""
    c, size, m = (network.config[k] for k in ("in_channels", "image_size", "classes"))
    if not isinstance(images, Tensor) or tuple(images.shape[1:]) != (c, size, size):
        shape = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"{images_name} has shape {shape}: give [N, {c}, {size}, {size}].")
    if images.is_floating_point() and not bool(((images >= 0) & (images <= 1)).all()):
        raise ValueError(f"{images_name} has values outside [0, 1]: give uint8, or floats in it.")
    if not images.is_floating_point() and images.dtype != torch.uint8:
        raise ValueError(f"{images_name} is {images.dtype}: give uint8, or floats in [0, 1].")
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        raise ValueError(f"{labels_name}: give a tensor of int64.")
    if tuple(labels.shape) != (len(images),):
        raise ValueError(f"{labels_name} has shape {list(labels.shape)}: give [{len(images)}].")
    if bool(((labels < 0) | (labels >= m)).any()):
        raise ValueError(f"{labels_name}: give classes from 0 to {m - 1}.")


# --- embeddings ------------------------------------------------------------------------------


def prototypes(network: NoPropDenoiser, images: Tensor, labels: Tensor) -> None:
    """Set each class's embedding to the image of least median distance to others of its class.

    Args:
        network: with embedding="prototype"; changed in place.
        images: [N, C, H, W] uint8 or in [0, 1]; of each class the first 500 are looked at.
        labels: [N] int64.

    Raises:
        ValueError: another embedding, images that are not the network's, a class without one.
    """
    if network.config["embedding"] != "prototype":
        raise ValueError("network has no prototypes: make one with embedding='prototype'.")
    check_examples(network, "images", images, "labels", labels)
    for k in range(network.config["classes"]):
        mine = 2 * unit(images[labels == k][:_PER_CLASS]).flatten(1) - 1
        if not len(mine):
            raise ValueError(f"labels has no example of class {k}: give one at least.")
        middle = torch.cdist(mine, mine).median(1).values.argmin()
        network.label_embedding.data[k] = mine[middle].to(network.label_embedding)


def learn_embedding(
    network: NoPropDenoiser,
    images: Tensor,
    labels: Tensor,
    *,
    epochs: float = 1,
    batch: int = 128,
    lr: float = 1e-3,
    seed: int = 0,
    progress: bool = True,
) -> None:
    """Learn the labels' embeddings in a phase of their own, before the blocks; changed in place.

    The paper has every block pull at them, which ties the blocks together. Here a network like one
    block, which is thrown away, learns beside them,

        |guess - u|² - log p(y | z'),       p ∝ exp(-|z' - u_y|² / 2 (1 - ab')),   ab' = .9

    the guess from a z at a random level, z' the embedding at little noise: the first term draws
    together what looks alike, the second keeps it apart. Afterwards they are frozen.

    Args:
        network: with embedding="learned" or "prototype".
        images: [N, C, H, W] uint8 or in [0, 1].
        labels: [N] int64.
        epochs, batch, lr, seed, progress: see `train_blocks`.

    Raises:
        ValueError: one-hot embeddings, which are fixed; images that are not the network's.
    """
    if network.config["embedding"] == "one-hot":
        raise ValueError("network has one-hot embeddings, which are fixed: there is no phase.")
    check_examples(network, "images", images, "labels", labels)
    rule = _EmbeddingRule(network, images, labels, seed)
    network.label_embedding.requires_grad_(True)
    try:
        train_blocks(rule, epochs=epochs, batch=batch, lr=lr, seed=seed, progress=progress)
    finally:
        network.label_embedding.requires_grad_(False)


class _EmbeddingRule:
    """One block: the embeddings and a probe."""

    def __init__(self, network: NoPropDenoiser, images: Tensor, labels: Tensor, seed: int) -> None:
        with torch.random.fork_rng(devices=[]):  # weights are drawn from the global generator
            torch.default_generator.manual_seed(seed)
            self.probe = type(network)(
                **{**settings_of(network), "steps": 1, "output": "probabilities"}
            )
        self.probe.label_embedding = network.label_embedding  # the same parameter
        self.probe.blocks.to(network.label_embedding.device)
        self.blocks = [self.probe]
        self.images, self.labels, self.rows = images, labels, len(images)

    def told(self) -> dict[str, Any]:
        return {}

    def loss(self, block: int, numbers: Tensor, rng: torch.Generator) -> Tensor:
        embedding = self.probe.label_embedding
        y, n = self.labels[numbers].to(embedding.device), len(numbers)
        u = embedding[y]
        noise, other = (torch.randn(n, u.shape[1], generator=rng).to(u) for _ in range(2))
        t = ((torch.arange(n) + torch.rand(n, generator=rng)) / n).to(u)
        features = self.probe.block(0).encode(unit(self.images[numbers]).to(u.device))
        z = _noised(t[:, None], u, noise)
        guess = self.probe.guess(self.probe.block(0)(z, 1000 * (1 - t), features).float())
        apart = _APART**0.5 * u + (1 - _APART) ** 0.5 * other
        far = torch.cdist(apart, _APART**0.5 * embedding).square() / (2 * (1 - _APART))
        return (guess - u).square().sum(1).mean() + F.cross_entropy(-far, y)

    def watch(self, block: int) -> dict[str, float]:
        return {}
