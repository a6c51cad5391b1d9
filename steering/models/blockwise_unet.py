"""A UNet whose range of noise is split into blocks, each with a network of its own.

As in DiffusionBlocks (arXiv:2506.14202) each block can be trained alone, by the denoising loss of
its own range: `steering.finetune.noise_blocks`. A step of a chain costs one block.

Imports diffusers, so that it is itself imported only where it is used.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DModel, UNet2DOutput
from torch import Tensor, nn


class BlockwiseUNet2D(ModelMixin, ConfigMixin):
    """A `UNet2DModel` for each range of timesteps; called like one, and in pipelines like one.

    Args:
        bounds: B + 1 increasing timesteps: block b is asked at bounds[b] <= t < bounds[b + 1], and
            the last also beyond, the first also before.
        num_class_embeds: see `UNet2DModel`, as are all others.

    Raises:
        ValueError: bounds that do not increase, or fewer than two.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(
        self,
        bounds: Sequence[float],
        sample_size: int = 28,
        in_channels: int = 1,
        out_channels: int = 1,
        block_out_channels: Sequence[int] = (8, 16, 24),
        layers_per_block: int = 1,
        down_block_types: Sequence[str] = ("DownBlock2D",) * 3,
        up_block_types: Sequence[str] = ("UpBlock2D",) * 3,
        norm_num_groups: int = 8,
        attention_head_dim: int = 8,
        class_embed_type: str | None = None,
        num_class_embeds: int | None = None,
    ) -> None:
        super().__init__()
        if len(bounds) < 2 or not all(a < b for a, b in itertools.pairwise(bounds)):
            raise ValueError(f"bounds={list(bounds)}: give increasing timesteps, two at least.")
        self.blocks = nn.ModuleList(
            UNet2DModel(
                sample_size=sample_size,
                in_channels=in_channels,
                out_channels=out_channels,
                block_out_channels=tuple(block_out_channels),
                layers_per_block=layers_per_block,
                down_block_types=tuple(down_block_types),
                up_block_types=tuple(up_block_types),
                norm_num_groups=norm_num_groups,
                attention_head_dim=attention_head_dim,
                class_embed_type=class_embed_type,
                num_class_embeds=num_class_embeds,
            )
            for _ in range(len(bounds) - 1)
        )

    @property
    def class_embedding(self) -> nn.Module | None:
        """Of the first block; None where the network takes no labels."""
        first = self.blocks[0]
        assert isinstance(first, UNet2DModel)
        return first.class_embedding

    def block_of(self, timestep: Tensor) -> Tensor:
        """Which block is asked at timesteps [N]: [N] int64."""
        inner = torch.tensor(self.config["bounds"][1:-1], device=timestep.device)
        return torch.bucketize(timestep.to(inner.dtype).contiguous(), inner, right=True)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[Tensor]:
        """The outputs [N, C, H, W] of the blocks that the timesteps call for.

        Args:
            sample: [N, C, H, W].
            timestep: [N], [] or a number.
            class_labels: [N] int64, where the network takes labels.
            return_dict: False gives a tuple of one.
        """
        time = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        which = self.block_of(time)
        output = torch.empty_like(sample[:, :1]).repeat(1, self.config["out_channels"], 1, 1)
        for k in which.unique().tolist():
            at = (which == k).nonzero().flatten()
            labels = None if class_labels is None else class_labels[at]
            said = self.blocks[k](sample[at], time[at], labels, return_dict=False)[0]
            output = output.index_copy(0, at, said.to(output))
        return UNet2DOutput(sample=output) if return_dict else (output,)


def equal_mass(density: Tensor, blocks: int) -> list[int]:
    """Bounds that split timesteps into blocks of equal probability, as near as whole ones allow.

    Args:
        density: [T], how often each timestep is trained on, up to a factor; uniform for the usual
            loss.
        blocks: how many.

    Raises:
        ValueError: a density that is negative or holds too few timesteps.
    """
    if density.ndim != 1 or bool((density < 0).any()) or not float(density.sum()) > 0:
        raise ValueError("density: give [T] numbers from 0 on, not all 0.")
    if type(blocks) is not int or not 1 <= blocks <= len(density):
        raise ValueError(f"blocks={blocks!r}: give a number from 1 to {len(density)}.")
    reached = density.double().cumsum(0) / density.double().sum()
    share = torch.arange(1, blocks, dtype=torch.float64) / blocks
    inner = [int(torch.searchsorted(reached, s - 1e-9)) + 1 for s in share.tolist()]
    bounds = [0, *inner, len(density)]
    if any(a >= b for a, b in itertools.pairwise(bounds)):
        raise ValueError(f"density is too narrow for {blocks} blocks: one would have no timestep.")
    return bounds
