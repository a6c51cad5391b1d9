"""A network that guesses the tokens of a masked or noised sequence: DNA, protein, text.

Imports diffusers, so that it is itself imported only where it is used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.outputs import BaseOutput
from torch import Tensor, nn
from torch.nn.functional import gelu, one_hot


@dataclass
class TokenLogits(BaseOutput):
    """What a denoiser of tokens puts out."""

    logits: Tensor  # [N, L, K] of the K ordinary tokens at every site, not normalised


class SequenceDenoiser(ModelMixin, ConfigMixin):
    """Logits of the clean tokens, from a sequence some of whose tokens are masked or replaced.

    Convolutions that look at every site, around blocks of dilated convolutions that look at every
    `stride`-th: width at the blocks costs little, and any length that `stride` divides will do.
    Tokens may be relaxed: a site's input is then its weights over the tokens, and the output is
    differentiable in them.

    Args:
        tokens: K, ordinary tokens, 0 .. K - 1.
        masked: is token K the mask? Then inputs have K + 1 tokens.
        width: channels of the blocks.
        depth: number of blocks.
        kernel: sites that a convolution sees, an odd number.
        dilations: of the blocks in turn, over and over.
        stride: sites to one of the blocks.
        fine: channels at every site.
        classes: number of class labels; label `classes` stands for none. None: takes no labels.
        timed: is it told the time? Masked sequences show theirs by what is masked, noised ones
            do not.

    Raises:
        ValueError: an even kernel; from `forward`, an input that does not fit.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(
        self,
        tokens: int,
        masked: bool = True,
        width: int = 128,
        depth: int = 8,
        kernel: int = 9,
        dilations: Sequence[int] = (1, 2, 4, 8),
        stride: int = 1,
        fine: int = 48,
        classes: int | None = None,
        timed: bool = False,
    ) -> None:
        super().__init__()
        if kernel % 2 == 0:
            raise ValueError(f"kernel={kernel} is even: give an odd number of sites.")
        self.inputs = tokens + masked
        pad = kernel // 2
        self.embed = nn.Linear(self.inputs, fine)
        self.look = nn.Conv1d(fine, fine, kernel, padding=pad)
        self.down = nn.Conv1d(fine, width, stride, stride)
        self.class_embedding = None if classes is None else nn.Embedding(classes + 1, width)
        self.time_embedding = None if not timed else nn.Sequential(nn.Linear(32, width), nn.GELU(),
                                                         nn.Linear(width, width))  # fmt: skip
        self.blocks = nn.ModuleList(
            _Block(width, kernel, dilations[k % len(dilations)]) for k in range(depth)
        )
        self.up = nn.ConvTranspose1d(width, fine, stride, stride)
        self.join = nn.Conv1d(fine, fine, kernel, padding=pad)
        self.out = nn.Linear(fine, tokens)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> TokenLogits | tuple[Tensor]:
        """Logits [N, L, K] of the clean tokens.

        Args:
            sample: [N, L] int64 tokens, or [N, L, K + 1] (K where nothing is masked) weights of
                relaxed ones.
            timestep: [N] or [] in (0, 1], where the network is `timed`.
            class_labels: [N] int64; None is no class.
            return_dict: False gives a tuple of one.
        """
        if not sample.is_floating_point():
            sample = one_hot(sample, self.inputs).to(self.dtype)
        if sample.ndim != 3 or sample.shape[2] != self.inputs:
            raise ValueError(
                f"sample has shape {list(sample.shape)}: give tokens [N, L], or weights "
                f"[N, L, {self.inputs}]."
            )
        if sample.shape[1] % self.config["stride"]:
            raise ValueError(
                f"sample has {sample.shape[1]} sites: this network needs a multiple of "
                f"{self.config['stride']}."
            )
        fine = self.embed(sample.to(self.dtype)).mT  # [N, fine, L]
        fine = fine + gelu(self.look(fine))
        x = self.down(fine)
        n = len(sample)
        if self.class_embedding is not None:
            null = torch.full((n,), self.config["classes"], device=x.device)
            x = x + self.class_embedding(null if class_labels is None else class_labels)[..., None]
        elif class_labels is not None:
            raise ValueError("class_labels: this network takes no class labels.")
        if self.time_embedding is not None:
            if timestep is None:
                raise ValueError("timestep: this network is told the time, give it.")
            x = x + self.time_embedding(_waves(timestep.expand(n)).to(x.dtype))[..., None]
        for block in self.blocks:
            x = block(x)
        fine = fine + self.up(x)
        logits = self.out((fine + gelu(self.join(fine))).mT)
        return TokenLogits(logits=logits) if return_dict else (logits,)


class _Block(nn.Module):
    """A dilated convolution of each channel alone, then a perceptron of each site alone."""

    def __init__(self, width: int, kernel: int, dilation: int) -> None:
        super().__init__()
        pad = dilation * (kernel // 2)
        self.mix = nn.Conv1d(width, width, kernel, padding=pad, dilation=dilation, groups=width)
        self.norm = nn.LayerNorm(width)
        self.wide = nn.Linear(width, 2 * width)
        self.narrow = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.mix(x).mT)
        return x + self.narrow(gelu(self.wide(y))).mT


def _waves(t: Tensor) -> Tensor:
    """[N, 32] float32 sines and cosines of times t [N] in (0, 1]."""
    frequency = torch.exp(torch.linspace(0, math.log(1000.0), 16, device=t.device))
    angle = t.float()[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], 1)
