"""What a call of a pipeline asks for, as far as a guidance is told, and how states are decoded."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steering.core import images_in_unit_range
from steering.pipelines.flux import PackedCodec
from steering.pipelines.latent import LatentCodec

Decode = Callable[[Tensor], Any]
_UNPACKS = ["latents", "height", "width", "vae_scale_factor"]  # as FLUX and its kin unpack


@dataclass(frozen=True, eq=False)
class Asked:
    """Arguments of a pipeline's call.

    Args:
        prompts: one for each image, None where the pipeline has none.
        height, width: in pixels; None is the pipeline's own.
        generator: what noise is drawn from.
        eta: the share of new noise; None is the scheduler's own.
    """

    prompts: tuple[Any, ...] | None = None
    height: int | None = None
    width: int | None = None
    generator: Any = None
    eta: Any = None

    @staticmethod
    def of(call: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Asked:
        """Of a call with these arguments; none where they do not fit, which the call will say."""
        try:
            bound = inspect.signature(call).bind(*args, **kwargs)
        except TypeError:
            return Asked()
        bound.apply_defaults()
        given = bound.arguments
        prompts = given.get("prompt", given.get("class_labels"))
        if isinstance(prompts, Tensor):
            prompts = prompts.tolist()
        if prompts is not None:
            prompts = prompts if isinstance(prompts, (list, tuple)) else [prompts]
            each = given.get("num_images_per_prompt", given.get("num_videos_per_prompt")) or 1
            prompts = tuple(prompt for prompt in prompts for _ in range(each))
        others = ("height", "width", "generator", "eta")
        return Asked(prompts, *map(given.get, others))

    def count(self, states: Tensor) -> int:
        """How many of the states [N, *D] are there, and not copies of those before them, which some
        pipelines step along for their guidance?

        Raises:
            ValueError: there are others than prompts.
        """
        n = 1 if self.prompts is None else len(self.prompts)
        if self.prompts is None or len(states) == n:
            return len(states)
        copies = states.split(n)
        if len(states) % n == 0 and all(torch.equal(copies[0], copy) for copy in copies):
            return n
        if n > 1:
            raise ValueError(
                f"the pipeline steps {len(states)} states for {n} prompts: it is not known which "
                "is whose. Give it one prompt, or one for each image."
            )
        return len(states)

    def prompts_of(self, count: int) -> tuple[Any, ...]:
        """One for each of `count` states."""
        prompts = (None,) if self.prompts is None else self.prompts
        return prompts if len(prompts) == count else prompts * count

    def keys(self, count: int, device: torch.device) -> Tensor:
        """Noise keys [count] int64 from copies of the call's generators, which stay untouched."""
        own = self.generator
        if own is None:
            cuda = device.type == "cuda"
            own = torch.cuda.default_generators[device.index or 0] if cuda else None
            own = own or torch.default_generator
        several = isinstance(own, (list, tuple))
        draws = [
            torch.randint(
                -(2**63),
                2**63 - 1,
                (1 if several else count,),
                generator=each.clone_state(),
                device=each.device,
            )
            for each in (own if several else [own])
        ]
        return torch.cat([draw.to(device) for draw in draws])


def decoding(pipe: Any, asked: Asked, x: Tensor, vae: Any = None) -> Decode:
    """How states like x [N, *D] become images [N, C, H, W] in [0, 1].

    Args:
        pipe: whose states.
        asked: of which call.
        x: states.
        vae: what decodes them; None is the pipeline's own autoencoder.

    Raises:
        ValueError: it is not known how.
    """
    vae = vae or getattr(pipe, "vae", None)
    if vae is None:
        if x.dim() == 4 and x.shape[1] in (1, 3):
            return images_in_unit_range
        raise _unknown(pipe, x)
    config, channels = vae.config, vae.config.get("latent_channels")
    factor = 2 ** (len(config.get("block_out_channels", [0])) - 1)
    # some autoencoders say a shift that the families of U-Nets do not use
    unshifted = hasattr(pipe, "unet") or type(pipe).__name__ == "DiTPipeline"
    shift = 0.0 if unshifted else config.get("shift_factor") or 0.0
    plain = config.get("latents_mean") is None and "scaling_factor" in config
    if plain and x.dim() == 4 and x.shape[1] == channels:
        return _codec(pipe, vae, factor**2 * math.prod(x.shape[2:]), shift)
    unpack = getattr(pipe, "_unpack_latents", None)
    packed = unpack is not None and list(inspect.signature(unpack).parameters) == _UNPACKS
    if plain and packed and x.dim() == 3 and x.shape[2] == 4 * channels:
        own = pipe.default_sample_size * pipe.vae_scale_factor
        height, width = asked.height or own, asked.width or own
        sides = [side // (2 * pipe.vae_scale_factor) for side in (height, width)]
        if math.prod(sides) != x.shape[1]:
            raise ValueError(
                f"height={height}, width={width} do not give {x.shape[1]} tokens: give the "
                "pipeline the height and width of its images."
            )
        return PackedCodec(_codec(pipe, vae, height * width, shift), pipe, height, width)
    raise _unknown(pipe, x)


def _codec(pipe: Any, vae: Any, pixels: int, shift: float) -> LatentCodec:
    upcast = vae.dtype == torch.float16 and vae.config.get("force_upcast", True)
    if upcast and hasattr(vae, "_hf_hook"):  # a copy must not bring the hooks, and all they hold
        if any(weight.is_meta for weight in vae.parameters()):
            raise ValueError(
                "pipe.vae is in float16, which overflows, and its weights are offloaded one by "
                "one: give vae=, a small autoencoder of the same latents (AutoencoderTiny)."
            )
        fresh = type(vae).from_config(vae.config)
        fresh.load_state_dict(vae.state_dict())
        vae = fresh.eval().requires_grad_(False).to(pipe._execution_device)
    return LatentCodec.of(vae, pixels, shift)


def _unknown(pipe: Any, x: Tensor) -> ValueError:
    return ValueError(
        f"it is not known how states {list(x.shape)} of {type(pipe).__name__} become images: give "
        "steer(..., decode=), a differentiable function of them, or a reward of the states "
        "themselves, as measure(..., space='states') is."
    )
