"""Arguments of a pipeline's own call, for any batch of the conditions that were asked for."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from steering.pipelines.request import Request

# arguments of pipelines that are arguments of `from_pipeline`; the rest may be given as `call`
_OURS = {
    "prompt": "prompts",
    "class_labels": "prompts",
    "negative_prompt": "negative_prompts",
    "guidance_scale": "guidance_scale",
    "height": "height",
    "width": "width",
    "num_inference_steps": "steps",
    "eta": "eta",
}
# arguments that belong to the run, or would change what a call is
_TAKEN = (
    *("latents", "generator", "batch_size", "output_type", "return_dict", "timesteps", "sigmas"),
    *("num_images_per_prompt", "num_videos_per_prompt", "denoising_start", "denoising_end"),
    *("callback", "callback_steps", "callback_on_step_end", "callback_on_step_end_tensor_inputs"),
)


@dataclass
class Inputs:
    """rows [N] int -> arguments of `pipe.__call__`, all but the states.

    Args:
        takes: names of the pipeline's arguments.
        fixed: those that are the same in every call.
        prompts, negative_prompts, scales: [R], or None where nothing is handed over.
        device: where the pipeline runs.
        repeats: are images handed over once for every state?
    """

    takes: frozenset[str]
    fixed: Mapping[str, Any]
    prompts: tuple[Any, ...] | None
    negative_prompts: tuple[Any, ...] | None
    scales: tuple[float, ...] | None
    device: torch.device
    repeats: bool = False

    @staticmethod
    def of(pipe: Any, request: Request) -> Inputs:
        """What a request comes to for this pipeline.

        Raises:
            ValueError: an argument that the pipeline does not take, or one that it needs.
        """
        name, takes = type(pipe).__name__, _takes(pipe)
        for argument in request.call or {}:
            if argument in _OURS:
                raise ValueError(f"call has {argument!r}: give {_OURS[argument]}= instead.")
            if argument in _TAKEN or "embeds" in argument:
                raise ValueError(f"call has {argument!r}, which is set by the run: leave it out.")
            if argument not in takes:
                raise ValueError(
                    f"call has {argument!r}, which {name} does not take: its arguments are "
                    f"{', '.join(sorted(takes - {*_OURS, *_TAKEN, 'self', 'kwargs'}))}."
                )
        asked = {
            "negative_prompt": request.negative_prompts,
            "guidance_scale": request.guidance_scale,
            "height": request.height,
            "width": request.width,
        }
        for argument, value in asked.items():
            if value is not None and argument not in takes:
                raise ValueError(
                    f"{_OURS[argument]} is given, but {name} takes no {argument}: leave it out."
                )
        sides = {"height", "width"} & takes
        given = [side for side in sides if asked[side] is not None]
        if len(sides) == 2 and len(given) == 1:  # some leave out one that comes alone
            raise ValueError(
                f"{given[0]}={asked[given[0]]} is given without the other side: give height and "
                "width."
            )
        conditional = {"prompt", "class_labels"} & takes
        if conditional and request.prompts is None:
            raise ValueError(f"prompts is missing: {name} needs a list of them.")
        if not conditional and request.prompts is not None:
            raise ValueError(f"prompts is given, but {name} is unconditional: leave it out.")
        if "prompt" in takes:
            request.texts()
        sizes = {size: asked[size] for size in ("height", "width") if asked[size] is not None}
        scales = None
        if request.guidance_scale is not None:
            scales = tuple(request.scales(default=0.0).tolist())
        return Inputs(
            takes,
            {"num_inference_steps": request.steps, **sizes, **(request.call or {})},
            request.prompts,
            request.negative_prompts,
            scales,
            pipe._execution_device,
        )

    def __call__(self, rows: Sequence[int]) -> dict[str, Any]:
        call: dict[str, Any] = dict(self.fixed)
        if self.prompts is None:
            call["batch_size"] = len(rows)
        else:
            argument = "prompt" if "prompt" in self.takes else "class_labels"
            call[argument] = [self.prompts[r] for r in rows]
        if self.negative_prompts is not None:
            call["negative_prompt"] = [self.negative_prompts[r] for r in rows]
        if self.scales is not None:
            call["guidance_scale"] = self.scales[rows[0]]
        if self.repeats:
            call |= {name: _repeated(value, len(rows)) for name, value in self.fixed.items()}
        if "generator" in self.takes:  # what depends on no state is drawn alike for all
            call["generator"] = [torch.Generator(self.device).manual_seed(0) for _ in rows]
        return call

    def asked(self, row: int) -> Any:
        """What a condition is made of: conditions that are asked for alike are one."""
        return (
            None if self.prompts is None else self.prompts[row],
            None if self.negative_prompts is None else self.negative_prompts[row],
        )

    def scale(self, row: int) -> float | None:
        """Its guidance scale, which all rows of one call share; None is the pipeline's own."""
        return None if self.scales is None else self.scales[row]


def _repeated(value: Any, count: int) -> Any:
    """An image, or a batch of one, `count` times; anything else as it is."""
    if isinstance(value, Image.Image):
        return [value] * count
    one = isinstance(value, Tensor) and value.dim() == 4 and len(value) == 1
    return value.expand(count, *value.shape[1:]) if one else value


def _takes(pipe: Any) -> frozenset[str]:
    return frozenset(inspect.signature(type(pipe).__call__).parameters)
