"""Diffusers pipelines as models to steer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from numbers import Real
from typing import Any, Literal

import torch

from steering.cfg import ClassifierFree
from steering.core import Model
from steering.noise import root_key
from steering.pipelines import driven
from steering.pipelines.request import NotNativeError, Request, as_tuple

__all__ = ["from_pipeline"]

FAMILIES = {
    "DDPMPipeline": "unet2d",
    "DDIMPipeline": "unet2d",
    "StableDiffusionPipeline": "stable_diffusion",
    "StableDiffusionXLPipeline": "stable_diffusion_xl",
    "StableDiffusion3Pipeline": "sd3",
    "FluxPipeline": "flux",
    "DiTPipeline": "dit",
    "LabelPipeline": "unet2d",
    "SequencePipeline": "sequences",
    "AmusedPipeline": "amused",
    "LLaDA2Pipeline": "llada2",
}
# chains of tokens are run on our own kernels: driven, there would be no density to weigh by
_OF_TOKENS = ("sequences", "amused", "llada2")
_WITH_CALL = ("llada2",)
_REFUSED = {
    "VQDiffusionPipeline": "its chain masks and replaces tokens at once, for which there is no "
    "process in steering.discrete",
    "AmusedImg2ImgPipeline": "it starts half-way from an image; AmusedPipeline is run",
    "AmusedInpaintPipeline": "it keeps tokens of an image; AmusedPipeline is run",
    "NoPropPipeline": "its conditions are images to be classified, which "
    "steering.from_noprop(pipe, images) takes",
    "DiffusionGemmaPipeline": "its network remembers its own earlier guesses and text, which walks "
    "from one state cannot share; steering.from_masked_lm takes masked language models",
}
_KNOWN = ("diffusers.", "steering.models.")  # modules that these are from


def from_pipeline(
    pipe: Any,
    prompts: Sequence[Any] | None = None,
    *,
    steps: int = 50,
    eta: float | None = None,
    height: int | None = None,
    width: int | None = None,
    negative_prompts: Sequence[Any] | None = None,
    guidance_scale: float | Sequence[float] | None = None,
    cfg: ClassifierFree | None = None,
    call: Mapping[str, Any] | None = None,
    preview: Any = None,
    route: Literal["native", "driven"] | None = None,
) -> Model:
    """The model that a diffusers pipeline holds: its network, its chain, its decoder.

    Any pipeline with one loop over one scheduler is *driven*: its own `__call__` is asked for one
    step at a time, so its ControlNets, adapters, quantised or offloaded networks and guidance are
    what they are. At opening it is tested against itself, and refused by name where it fails. A few
    families also have a *native* adapter, which calls the network itself: a shared forward for
    gradients, less time a call. The pipeline is left as it was found. Natively no safety checker is
    run and no watermark added.

    Every prompt is encoded once, into a row of a table that walks refer to.

    Args:
        pipe: a diffusers pipeline.
        prompts: texts, or class labels for a class-conditional model; R of them. None for
            unconditional models. For sequences also texts whose characters are kept.
        steps: T, on the grid that the pipeline sets on its own scheduler.
        eta: share of new noise in each step, 0..1; 0 is the pipeline's deterministic chain. None:
            the scheduler's own stochastic kernel where it has one (DDPM, LCM, TCD), else 1, because
            a chain without noise has nothing to branch on.
        height, width: in pixels; the pipeline's own when None.
        negative_prompts: one per prompt; what the pipeline takes for none (an empty text, or
            zeros) when None. For class labels of pixel models, the null class; a `LabelPipeline`
            knows its own.
        guidance_scale: one number, or one per prompt; the pipeline's default when None. Natively,
            rows at 1 or below cost one network row, the others two; where the scale is an input of
            the network (FLUX, LCM) all cost one.
        cfg: the rule of classifier-free guidance, from `steering.cfg`; plain extrapolation when
            None. Steps that it does not guide cost one network row. Native adapters alone take it.
        call: further arguments of the pipeline's own call, `{"control_image": image}`; driven.
        preview: a small autoencoder for the same latents (diffusers' AutoencoderTiny), or a
            function of states, that decodes guesses on the way; what arrives is decoded in full.
        route: "native" or "driven"; None is native where that serves this pipeline. `print(model)`
            says which it is, and why.

    Raises:
        ValueError: a pipeline, scheduler or argument that is not supported, by name.
    """
    request = Request(
        steps,
        eta,
        height,
        width,
        as_tuple("prompts", prompts),
        as_tuple("negative_prompts", negative_prompts),
        _scales(guidance_scale),
        cfg,
        call,
        preview,
    )
    if route not in (None, "native", "driven"):
        raise ValueError(f"route={route!r} is unknown: give 'native', 'driven' or None.")
    if not hasattr(pipe, "components"):
        raise ValueError(f"pipe is a {type(pipe).__name__}, no diffusers pipeline.")
    model = _built(pipe, request, route)
    if model.preview is not None:
        _try_preview(model)
    return model


def _built(pipe: Any, request: Request, route: str | None) -> Model:
    kind = _owner(pipe).__name__
    if kind in _REFUSED:
        raise ValueError(f"pipe is a {kind}, which from_pipeline does not take: {_REFUSED[kind]}.")
    native_only = FAMILIES.get(kind) in _OF_TOKENS
    if route == "driven":
        if native_only:
            raise ValueError(f"route='driven': a {kind} has no kernel of tokens to weigh by.")
        return driven.build(pipe, request)
    try:
        family = _family(pipe, request)
        model = import_module(f"{__name__}.{family}").build(pipe, request)
        return replace(model, about=f"native ({family})")
    except NotNativeError as error:
        if route == "native" or native_only:
            raise
        model = driven.build(pipe, request)
        return replace(model, about=f"{model.about}; {error}")


@torch.no_grad()
def _try_preview(model: Model) -> None:
    """ValueError if a preview does not decode a state: its latents may be another model's."""
    assert model.preview is not None
    try:
        model.preview(model.process.prior(root_key(0, torch.arange(1, device=model.device))))
    except Exception as error:
        raise ValueError(
            f"preview does not decode states of this model, {type(error).__name__}: {error}. Give "
            "the small autoencoder of its latents."
        ) from error


def _family(pipe: Any, request: Request) -> str:
    """The native family that serves a pipeline and a request; NotNativeError if none does."""
    owner = _owner(pipe)
    if owner.__name__ not in FAMILIES or not owner.__module__.startswith(_KNOWN):
        raise NotNativeError(f"{type(pipe).__name__} has no native adapter")
    if request.call and FAMILIES[owner.__name__] not in _WITH_CALL:
        raise NotNativeError(f"native adapters take no {', '.join(request.call)}")
    hooked = [name for name, part in pipe.components.items() if hasattr(part, "_hf_hook")]
    if hooked:
        raise NotNativeError(f"{', '.join(hooked)} are under offload hooks")
    return FAMILIES[owner.__name__]


def _owner(pipe: Any) -> type:
    """The class whose loop a pipeline runs: a subclass without one is of its parent's family."""
    return next(c for c in type(pipe).__mro__ if "__call__" in vars(c) or c is object)


def _scales(guidance_scale: Any) -> float | tuple[float, ...] | None:
    if isinstance(guidance_scale, str):
        raise ValueError(f"guidance_scale={guidance_scale!r} is a text: give a number, or a list.")
    if isinstance(guidance_scale, (int, float, Real)):
        return float(guidance_scale)
    return None if guidance_scale is None else as_tuple("guidance_scale", guidance_scale)
