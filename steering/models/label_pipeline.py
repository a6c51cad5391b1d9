"""A pipeline that diffusers lacks: images by class label from a UNet on pixels, with guidance.

Imports diffusers, so that it is itself imported only where it is used.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

_OUTPUTS = ("pil", "np", "pt", "latent")


class LabelPipeline(DiffusionPipeline):
    """Images by class label, with classifier-free guidance (arXiv:2207.12598).

    Args:
        unet: a `UNet2DModel` with `num_class_embeds`, the last of which stands for no class.
        scheduler: any that steps from one output to the next state: flow matching, DDIM, ...

    Raises:
        ValueError: the network takes no class labels.
    """

    model_cpu_offload_seq = "unet"
    unet: UNet2DModel
    scheduler: Any

    def __init__(self, unet: UNet2DModel, scheduler: Any) -> None:
        super().__init__()
        if unet.config.get("num_class_embeds") is None:
            raise ValueError(
                "unet takes no class labels: give one with num_class_embeds, of which the last is "
                "the null class."
            )
        self.register_modules(unet=unet, scheduler=scheduler)

    @property
    def null_class(self) -> int:
        """The label that stands for no class."""
        return self.unet.config["num_class_embeds"] - 1

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int] | Tensor,
        num_inference_steps: int = 25,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """One image for each label: N of them.

        With a guidance scale s above 1, the output is null + s · (labelled - null), of both in one
        batch. At 1 or below it is the labelled one, at half the cost.

        Args:
            class_labels: [N] labels, ints; `null_class` asks for an image of any class.
            num_inference_steps: T of the scheduler; FlowMatchEuler's sigmas are 1, 1 - 1/T, ...,
                1/T, before any shift of its own.
            guidance_scale: s.
            generator: of the start and of what the scheduler draws: one, or one for each image.
            latents: [N, C, H, W] standard normal start in place of drawn numbers.
            output_type: "pil", "np" [N,H,W,C] in [0,1], "pt" [N,C,H,W] in [0,1], or "latent", the
                last state as it is, which is about in [-1,1].
            return_dict: False gives a tuple of one.

        Raises:
            ValueError: an argument that is wrong, by name.
        """
        labels = self._labels(class_labels)
        n, config = len(labels), self.unet.config
        size = config["sample_size"]
        high, wide = (size, size) if isinstance(size, int) else size
        shape = (n, config["in_channels"], high, wide)
        _check(num_inference_steps, guidance_scale, output_type)
        if isinstance(generator, list) and len(generator) != n:
            raise ValueError(
                f"generator has {len(generator)} entries for {n} labels: give one for each, or one."
            )
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"latents has shape {tuple(latents.shape)}: give {shape}.")

        device, dtype, scheduler = self._execution_device, self.unet.dtype, self.scheduler
        grid: dict[str, Any] = {}
        if type(scheduler).__name__ == "FlowMatchEulerDiscreteScheduler":
            # left to itself, it puts its last level at 1/1000: the last step would be for nothing
            grid["sigmas"] = [1 - i / num_inference_steps for i in range(num_inference_steps)]
        scheduler.set_timesteps(num_inference_steps, device=device, **grid)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        x = latents.to(device, dtype) * getattr(scheduler, "init_noise_sigma", 1.0)
        labels = labels.to(device)
        guided = guidance_scale > 1
        if guided:
            labels = torch.cat([labels, torch.full_like(labels, self.null_class)])
        takes = inspect.signature(scheduler.step).parameters
        more = {"generator": generator} if "generator" in takes else {}
        progress_bar: Any = self.progress_bar
        for t in progress_bar(scheduler.timesteps):
            both = torch.cat([x, x]) if guided else x
            if hasattr(scheduler, "scale_model_input"):
                both = scheduler.scale_model_input(both, t)
            output = self.unet(both, t.expand(len(both)), labels, return_dict=False)[0]
            if guided:
                labelled, null = output.chunk(2)
                output = null + guidance_scale * (labelled - null)
            x = scheduler.step(output, t, x, **more, return_dict=False)[0]
        images: Any = x if output_type == "latent" else _images(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _labels(self, given: Any) -> Tensor:
        """[N] int64."""
        values = given.tolist() if isinstance(given, Tensor) else given
        if isinstance(values, (str, bytes)) or not isinstance(values, Sequence) or not values:
            raise ValueError(f"class_labels={given!r} is no list of labels: give one for an image.")
        for label in values:
            if type(label) is not int or not 0 <= label <= self.null_class:
                raise ValueError(
                    f"class_labels has {label!r}: give ints from 0 to {self.null_class}, which "
                    "stands for no class."
                )
        return torch.tensor(values)


def _check(steps: Any, scale: Any, output_type: Any) -> None:
    if type(steps) is not int or steps < 1:
        raise ValueError(f"num_inference_steps={steps!r} is no number of steps: give an int >= 1.")
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise ValueError(f"guidance_scale={scale!r} is no scale: give a finite number.")
    if output_type not in _OUTPUTS:
        raise ValueError(f"output_type={output_type!r} is unknown: give one of {_OUTPUTS}.")


def _images(x: Tensor, output_type: str) -> Any:
    x = (x.float() / 2 + 0.5).clamp(0, 1)
    if output_type == "pt":
        return x
    arrays = x.cpu().permute(0, 2, 3, 1).numpy()
    return DiffusionPipeline.numpy_to_pil(arrays) if output_type == "pil" else arrays
