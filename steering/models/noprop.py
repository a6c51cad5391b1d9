"""NoProp classifiers (arXiv:2503.24322): a label is denoised, block by block, beside an image.

Every label y has an embedding u_y, a row of W [m, d]. The chain starts at noise z ~ N(0, I) and
ends near the embedding of the image's label; a network guesses u_y from z, the image and the time.
The paper's time runs towards clean. Here, as everywhere, timesteps are those of diffusers:

    dt  discrete time: T blocks, one a step, each with weights of its own. Timesteps T - 1 .. 0, and
        block 0 is asked at T - 1. alpha_bar before step t of T is sin²(π t / 2 T): 0, pure noise,
        to begin with, and 1 at the end. Guesses u.
    ct  continuous time: one network, timesteps 1000 · (1 - t) for t in [0, 1], on a schedule
        alpha_bar(t) = sigmoid(-γ(t)) that is learned between two ends. Guesses u.
    fm  flow matching: one network, timesteps 1000 · (1 - t), z_t = t u + (1 - t) noise. Puts out
        noise - u, as diffusers' flows do: minus the paper's velocity.

`scheduler` makes the stock diffusers scheduler that runs a network unmodified.

Imports diffusers, so that it is itself imported only where it is used.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.utils.outputs import BaseOutput
from torch import Tensor, nn
from torch.nn import functional as F

TIMES = 1000  # timesteps of continuous time
VARIANTS = ("dt", "ct", "fm")
EMBEDDINGS = ("one-hot", "learned", "prototype")
OUTPUTS = ("probabilities", "linear", "velocity")
_LEAST = 16  # rows of a product from which on each row is the same to the bit in any batch
_WAVES = 64


@dataclass
class NoPropOutput(BaseOutput):
    """What the network puts out."""

    sample: Tensor  # [N, d] guesses of u; of "fm" noise - u


class NoPropDenoiser(ModelMixin, ConfigMixin):
    """Guesses the embedding of an image's label from a noised one.

    The network of the paper's figure 6: each block has a convolutional tower for the image, layers
    for the state, in continuous time layers for the time, and layers over all, up to one logit a
    class. Batch norm in "dt" alone.

    Args:
        variant: "dt", "ct" or "fm"; see the module.
        classes: m.
        steps: T, blocks of "dt"; the others have one.
        embedding: "one-hot", "learned" (orthogonal to begin with), or "prototype": an image of each
            class. `steering.finetune.noprop` sets and learns them.
        embed_dim: d of "learned"; the others know theirs.
        image_size: height and width of images.
        in_channels: their channels.
        channels: of the tower's three convolutions.
        hidden: width of all layers.
        dropout: share that the tower drops.
        output: "probabilities", u guessed as softmax(logits) W, which the labels' posterior given z
            and the image makes the exact mean; "linear", logits W; "velocity", of "fm" alone: the
            paper's v = logits W, without any knowledge of the noise in z.
        alpha_bar_range: of "ct", the ends of the schedule: noise, then clean. SNR stays within.

    Raises:
        ValueError: an argument that is unknown or does not fit the variant.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(
        self,
        variant: Literal["dt", "ct", "fm"] = "dt",
        classes: int = 10,
        steps: int = 10,
        embedding: Literal["one-hot", "learned", "prototype"] = "one-hot",
        embed_dim: int = 20,
        image_size: int = 28,
        in_channels: int = 1,
        channels: Sequence[int] = (32, 64, 128),
        hidden: int = 256,
        dropout: float = 0.2,
        output: Literal["probabilities", "linear", "velocity"] = "probabilities",
        alpha_bar_range: Sequence[float] = (0.001, 0.99),
    ) -> None:
        super().__init__()
        for name, value, known in (
            ("variant", variant, VARIANTS),
            ("embedding", embedding, EMBEDDINGS),
            ("output", output, OUTPUTS),
        ):
            if value not in known:
                raise ValueError(f"{name}={value!r} is unknown: give one of {', '.join(known)}.")
        if output == "velocity" and variant != "fm":
            raise ValueError(f"output='velocity' is of variant 'fm', not {variant!r}.")
        low, high = alpha_bar_range
        if not 0 < low < high < 1:
            raise ValueError(
                f"alpha_bar_range={alpha_bar_range}: give two increasing numbers between 0 and 1."
            )
        pixels = in_channels * image_size**2
        d = {"one-hot": classes, "learned": embed_dim, "prototype": pixels}[embedding]
        timed = variant != "dt"
        shape = (in_channels, image_size, image_size) if embedding == "prototype" else (d,)
        self.blocks = nn.ModuleList(
            NoPropBlock(shape, in_channels, image_size, channels, hidden, classes, dropout, timed)
            for _ in range(1 if timed else steps)
        )
        self.schedule = _Schedule(low, high) if variant == "ct" else None
        weight = torch.eye(classes) if embedding == "one-hot" else torch.empty(classes, d)
        if embedding != "one-hot":
            nn.init.orthogonal_(weight)
        self.label_embedding = nn.Parameter(weight, requires_grad=False)

    @property
    def steps(self) -> int:
        """T, timesteps there are: of "dt" its blocks."""
        return TIMES if self.timed else len(self.blocks)

    @property
    def timed(self) -> bool:
        """Is this continuous time: one block that is told the time?"""
        return self.config["variant"] != "dt"

    def alpha_bar(self) -> Tensor:
        """[T] float64 by timestep, 0 the cleanest; of "fm" there is none.

        Raises:
            ValueError: variant "fm", whose levels are sigma = timestep / 1000.
        """
        if self.config["variant"] == "fm":
            raise ValueError("variant 'fm' has no alpha_bar: sigma is timestep / 1000.")
        k = torch.arange(self.steps, dtype=torch.float64)
        if self.schedule is None:
            return (math.pi / 2 * (1 - (k + 1) / self.steps)).sin().square()
        with torch.no_grad():  # in half precision neighbouring levels would be the same
            gamma, _ = copy.deepcopy(self.schedule).double().cpu()(1 - k / TIMES)
        return torch.sigmoid(-gamma)

    def block(self, k: int) -> NoPropBlock:
        """The k-th block, from noise on."""
        found = self.blocks[k]
        assert isinstance(found, NoPropBlock)
        return found

    def block_of(self, timestep: Tensor) -> Tensor:
        """Which block is asked at timesteps [N]: [N] int64."""
        if self.timed:
            return torch.zeros_like(timestep, dtype=torch.int64)
        return self.steps - 1 - timestep.round().long()

    def encode(self, images: Tensor) -> Tensor:
        """Features [N, B, hidden] of images, one row for each of B blocks.

        Args:
            images: [N, C, H, W] in [0, 1].

        Raises:
            ValueError: images of another shape.
        """
        c, size = self.config["in_channels"], self.config["image_size"]
        if images.ndim != 4 or tuple(images.shape[1:]) != (c, size, size):
            raise ValueError(
                f"images have shape {list(images.shape)}: give [N, {c}, {size}, {size}] in [0, 1]."
            )
        return torch.stack([self.block(k).encode(images) for k in range(len(self.blocks))], 1)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        images: Tensor | None = None,
        features: Tensor | None = None,
        return_dict: bool = True,
    ) -> NoPropOutput | tuple[Tensor]:
        """Guesses [N, d] of u; of "fm" of noise - u.

        Args:
            sample: [N, d] states z.
            timestep: [N] or []; see the module.
            images: [N, C, H, W] in [0, 1]; or else
            features: [N, hidden] what `encode` said of them, by the block that `block_of` tells.
            return_dict: False gives a tuple of one.

        Raises:
            ValueError: neither images nor features, or both.
        """
        if (images is None) == (features is None):
            raise ValueError("give images, or their features: one of the two.")
        timestep = timestep.to(sample.device).expand(len(sample))
        which = self.block_of(timestep)
        if features is None:
            every = torch.arange(len(sample), device=sample.device)
            features = self.encode(images)[every, which]  # pyright: ignore[reportArgumentType]
        logits = sample.new_empty(len(sample), self.config["classes"])
        for k in which.unique().tolist():
            at = (which == k).nonzero().flatten()
            n = len(at)
            if n < _LEAST and not self.training:
                at = torch.cat([at, at[:1].expand(_LEAST - n)])
            said = self.block(k)(sample[at], timestep[at], features[at])
            logits = logits.index_copy(0, at[:n], said[:n].to(logits))
        guess = self.guess(logits)
        if self.config["variant"] == "fm":
            if self.config["output"] == "velocity":
                guess = -guess
            else:
                sigma = (timestep.to(sample) / TIMES).clamp(min=1 / TIMES)[:, None]
                guess = (sample - guess) / sigma
        return NoPropOutput(sample=guess) if return_dict else (guess,)

    def guess(self, logits: Tensor) -> Tensor:
        """What logits [N, m] say of u, or of a velocity: [N, d]."""
        if self.config["output"] == "probabilities":
            logits = logits.softmax(-1)
        return logits @ self.label_embedding.to(logits)

    def nearest(self, z: Tensor) -> Tensor:
        """Labels [N] int64 whose embeddings are nearest to states z [N, d]."""
        return torch.cdist(z, self.label_embedding.to(z)).argmin(-1)

    def probabilities(self, z: Tensor) -> Tensor:
        """How much of each class [N, m] clean states z [N, d] are made of; they sum to 1.

        The weights p of z = p W by least squares, negative ones left out. Exact for guesses made
        of probabilities, where d >= m and embeddings are independent; differentiable.
        """
        p = (z @ torch.linalg.pinv(self.label_embedding.to(z))).clamp(min=0)
        return (p + 1e-9) / (p + 1e-9).sum(-1, keepdim=True)


def scheduler(network: NoPropDenoiser) -> Any:
    """The stock diffusers scheduler that runs a network: DDPM, DDIM or FlowMatchEuler.

    DDPM with sample prediction is the paper's update of "dt" (eq. 3), time reversed; DDIM with
    eta = 0 the ODE of "ct", exact for a guess that stays; FlowMatchEuler the ODE of "fm".
    """
    if network.config["variant"] == "fm":
        return FlowMatchEulerDiscreteScheduler(shift=1.0)
    alpha_bar = network.alpha_bar()
    before = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    grid: dict[str, Any] = {
        "num_train_timesteps": network.steps,
        "trained_betas": (1 - alpha_bar / before).tolist(),
        "prediction_type": "sample",
        "clip_sample": False,
    }
    if network.timed:
        return DDIMScheduler(**grid, timestep_spacing="trailing", set_alpha_to_one=True)
    return DDPMScheduler(**grid, variance_type="fixed_small")


def _tower(
    in_channels: int, size: int, channels: Sequence[int], hidden: int, dropout: float
) -> list[nn.Module]:
    """Three convolutions, the size halved twice, and a layer on all of it."""
    a, b, c = channels
    flat = c * (size // 4) ** 2
    return [
        *(nn.Conv2d(in_channels, a, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(dropout)),
        *(nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.Dropout(dropout)),
        *(nn.Conv2d(b, c, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(dropout)),
        *(nn.Flatten(), nn.Linear(flat, hidden)),
    ]


class NoPropBlock(nn.Module):
    """One network of logits from a state, the features of an image, and the time."""

    def __init__(
        self,
        shape: tuple[int, ...],
        in_channels: int,
        size: int,
        channels: Sequence[int],
        hidden: int,
        classes: int,
        dropout: float,
        timed: bool,
    ) -> None:
        super().__init__()

        def norm(width: int) -> list[nn.Module]:
            return [] if timed else [nn.BatchNorm1d(width)]

        tail = [nn.ReLU()] if timed else [nn.BatchNorm1d(hidden)]
        self.image = nn.Sequential(*_tower(in_channels, size, channels, hidden, dropout), *tail)
        self.shape = shape
        if len(shape) == 3:
            enter = _tower(shape[0], shape[1], channels, hidden, dropout)
        else:
            enter = [nn.Linear(shape[0], hidden)]
        self.state = nn.Sequential(*enter, *norm(hidden), nn.ReLU())
        self.residual = None
        if not timed:
            self.residual = nn.Sequential(
                *(nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden), nn.ReLU()),
                *(nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden)),
            )
        self.time = nn.Sequential(nn.Linear(_WAVES, hidden), nn.ReLU()) if timed else None
        self.join = nn.Sequential(
            *(nn.Linear((3 if timed else 2) * hidden, hidden), *norm(hidden), nn.ReLU()),
            *(nn.Linear(hidden, hidden // 2), *norm(hidden // 2), nn.ReLU()),
            nn.Linear(hidden // 2, classes),
        )

    def encode(self, images: Tensor) -> Tensor:
        """Features [N, hidden] of images [N, C, H, W] in [0, 1]."""
        # a convolution on a CPU is faster by half where channels come last
        images = (2 * images - 1).to(next(self.image.parameters()).dtype)
        return self.image(images.contiguous(memory_format=torch.channels_last))

    def forward(self, z: Tensor, timestep: Tensor, features: Tensor) -> Tensor:
        """Logits [N, m] of states z [N, d], timesteps [N] and features [N, hidden]."""
        z = self.state(z.to(features.dtype).view(-1, *self.shape))
        if self.residual is not None:
            z = z + self.residual(z)
        parts = [features, z]
        if self.time is not None:
            parts.append(self.time(_waves(timestep / TIMES).to(features.dtype)))
        return self.join(torch.cat(parts, 1))


class _Schedule(nn.Module):
    """γ(t) = γ0 + (γ1 - γ0)(1 - γbar(t)), γbar increasing from 0 to 1: alpha_bar = sigmoid(-γ).

    γbar is a line and positive multiples of increasing sigmoids, scaled to its ends
    (arXiv:2107.00630, appendix H). The ends stay, so that the SNR stays bounded.

    Args:
        low, high: alpha_bar at t = 0, noise, and at t = 1, clean.
    """

    def __init__(self, low: float, high: float, units: int = 16) -> None:
        super().__init__()
        self.clean = -math.log(high / (1 - high))  # γ0
        self.noise = -math.log(low / (1 - low))  # γ1
        self.height = nn.Parameter(torch.full((units,), -3.0))
        self.slope = nn.Parameter(torch.full((units,), 8.0))
        self.place = nn.Parameter(torch.linspace(0, 1, units))

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """γ and dγ/dt at times t [N], which run towards clean: [N] each."""
        ends = t.new_tensor([0.0, 1.0])
        height, slope = F.softplus(self.height), F.softplus(self.slope)
        curve = torch.sigmoid(slope * (torch.cat([ends, t])[:, None] - self.place))
        line = torch.cat([ends, t]) + (height * curve).sum(1)
        low, high = line[0], line[1]
        rise = 1 + (height * slope * curve[2:] * (1 - curve[2:])).sum(1)
        share, whole = (line[2:] - low) / (high - low), self.clean - self.noise
        return self.noise + whole * share, whole * rise / (high - low)


def _waves(t: Tensor) -> Tensor:
    """[N, 64] float32 sines and cosines of times t [N] in [0, 1]."""
    frequency = torch.exp(torch.linspace(0, math.log(1000.0), _WAVES // 2, device=t.device))
    angle = t.float()[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], 1)
