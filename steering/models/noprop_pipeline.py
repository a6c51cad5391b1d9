"""A pipeline that diffusers lacks: labels of images by denoising them, with a NoProp network.

Imports diffusers, so that it is itself imported only where it is used.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils.outputs import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from steering.models.noprop import NoPropDenoiser


@dataclass
class LabelOutput(BaseOutput):
    """What the pipeline says of N images."""

    labels: list[str]  # N names of classes
    classes: Tensor  # [N] int64
    states: Tensor  # [N, d] float32, the ends of the chains


class NoPropPipeline(DiffusionPipeline):
    """Labels of images, from noise, one chain an image (arXiv:2503.24322).

    Args:
        network: a `NoPropDenoiser`.
        scheduler: what `steering.models.noprop.scheduler` makes for it, or another that steps from
            its outputs.
        names: of the classes; None: "0", "1", ...

    Raises:
        ValueError: not one different name a class.
    """

    model_cpu_offload_seq = "network"
    network: NoPropDenoiser
    scheduler: Any

    def __init__(
        self, network: NoPropDenoiser, scheduler: Any, names: Sequence[str] | None = None
    ) -> None:
        super().__init__()
        classes = network.config["classes"]
        names = [*map(str, range(classes))] if names is None else list(names)
        if len(names) != classes or len(set(names)) != classes:
            raise ValueError(f"names={names}: give {classes} different ones, one for each class.")
        self.register_modules(network=network, scheduler=scheduler)
        self.register_to_config(names=names)

    @property
    def names(self) -> list[str]:
        """Of the classes."""
        return list(self.config["names"])

    @property
    def steps(self) -> int:
        """T when none is asked for: of "dt" its blocks, else 50."""
        return 50 if self.network.timed else self.network.steps

    @torch.no_grad()
    def __call__(
        self,
        images: Tensor | None = None,
        num_inference_steps: int | None = None,
        eta: float = 0.0,
        generator: torch.Generator | None = None,
        features: Tensor | None = None,
        return_dict: bool = True,
    ) -> LabelOutput | tuple[Any, ...]:
        """One chain for each image; features of an image are computed once.

        Args:
            images: [N, C, H, W] in [0, 1]; or else `features`.
            num_inference_steps: T; of "dt" the number of its blocks and nothing else.
            eta: share of new noise in each step, of DDIM ("ct") alone.
            generator: of all that is drawn.
            features: [N, B, hidden] what `network.encode` said of images that are labelled often.
            return_dict: False gives a tuple.

        Raises:
            ValueError: an argument that is wrong, by name.
        """
        network, scheduler, device = self.network, self.scheduler, self._execution_device
        steps = check_steps(
            network, self.steps if num_inference_steps is None else num_inference_steps
        )
        if (images is None) == (features is None):
            raise ValueError("give images, or their features: one of the two.")
        if images is not None:
            check_images(images)
            features = network.encode(images.to(device, network.dtype))
        assert features is not None
        shape = (len(features), network.label_embedding.shape[1])
        x = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        even = network.config["variant"] == "fm"
        grid = {"sigmas": [1 - i / steps for i in range(steps)]} if even else {}
        scheduler.set_timesteps(steps, device=device, **grid)
        takes = inspect.signature(scheduler.step).parameters
        more = {k: v for k, v in {"eta": eta, "generator": generator}.items() if k in takes}
        progress_bar: Any = self.progress_bar
        for t in progress_bar(scheduler.timesteps):
            block = network.block_of(t.expand(1))[0]
            guess = network(x, t, features=features[:, block], return_dict=False)[0]
            x = scheduler.step(guess.float(), t, x, **more, return_dict=False)[0]
        classes = network.nearest(x).cpu()
        labels = [self.names[k] for k in classes.tolist()]
        self.maybe_free_model_hooks()
        output = LabelOutput(labels=labels, classes=classes, states=x)
        return output if return_dict else (labels, classes, x)


def check_images(images: Any) -> None:
    """ValueError unless these are images to be classified: a tensor of floats in [0, 1]."""
    if not isinstance(images, Tensor) or not len(images):
        raise ValueError("images: give a tensor [N, C, H, W] in [0, 1], N from 1 on.")
    if not images.is_floating_point() or not bool(((images >= 0) & (images <= 1)).all()):
        raise ValueError("images: give floats in [0, 1], images.float() / 255 of bytes.")


def check_steps(network: NoPropDenoiser, steps: Any) -> int:
    """Steps, if a network has a chain of so many.

    Raises:
        ValueError: it has not.
    """
    if type(steps) is not int or not 1 <= steps <= network.steps:
        raise ValueError(f"steps={steps!r}: give an int from 1 to {network.steps}.")
    if not network.timed and steps != network.steps:
        raise ValueError(
            f"steps={steps}: this network has a block for each of {network.steps} steps, give that."
        )
    return steps
