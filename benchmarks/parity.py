"""Is our chain the pipeline's? Both run on the same noise, on tiny random-weight pipelines.

The pipeline is called as it is, one row at a time, and draws the noise that our chain draws. Our
chain runs all rows in one batch, each at another step. `error` is the largest difference of two
images. `floor` is that of the pipeline to itself when its start is changed by one part in 10^7,
about one rounding. `driven` is the largest difference of images between the two routes, the native
adapter and the pipeline driven by its own call ("-" where a case is of native adapters alone).
`moved` is how much our chain differs when it is asked for something else, so that a small error
means something. Run `python -m benchmarks.parity [--quick]`.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
import transformers
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor

from benchmarks.report import finish, header
from steering import Model, from_pipeline, noise
from steering.cfg import Rescale
from steering.models.label_pipeline import LabelPipeline
from tests.tiny_pipelines import (
    SD_SCHEDULE,
    SDXL_SCHEDULE,
    dit,
    flux,
    pixel_pipeline,
    stable_diffusion,
    stable_diffusion_3,
    stable_diffusion_xl,
)

diffusers: Any = importlib.import_module("diffusers")  # whose exports type checkers do not see
TOLERANCE = 1e-4
PROMPTS = ["cat", "two long dogs"]
NEGATIVE = {"negative_prompts": ["dog", "a red cat"]}
TEXT = {"prompts": PROMPTS, "guidance_scale": 3.0}
RESCALED = {"cfg": Rescale(0.7)}
# images of a few tokens: move the shift's range to where it tells them apart
DYNAMIC = {
    "use_dynamic_shifting": True,
    "base_image_seq_len": 32,
    "max_image_seq_len": 128,
    "max_shift": 3.0,
}


@dataclass(frozen=True)
class Case:
    """A pipeline, how it is asked, and other requests that must change the images."""

    name: str
    pipe: Callable[[], Any]
    options: dict[str, Any] = field(default_factory=dict)  # of from_pipeline
    others: dict[str, dict[str, Any]] = field(default_factory=dict)


def cases() -> list[Case]:
    return [
        *_pixel_cases(),
        *_label_cases(),
        *_dit_cases(),
        *_stable_diffusion_cases(),
        *_stable_diffusion_xl_cases(),
        *_stable_diffusion_3_cases(),
        *_flux_cases(),
    ]


def _scheduler(name: str, **settings: Any) -> Any:
    return getattr(diffusers, f"{name}Scheduler")(**settings)


def _pixel_cases() -> list[Case]:
    v: dict[str, Any] = {"prediction_type": "v_prediction"}
    trailing: dict[str, Any] = {"timestep_spacing": "trailing"}
    large: dict[str, Any] = {"variance_type": "fixed_large"}
    # a random network that predicts noise does not hold its chain together as a trained one does:
    # from a schedule with little signal at its start, rounding alone would grow past any tolerance
    mild: dict[str, Any] = {"beta_end": 0.004}
    zero_snr: dict[str, Any] = {"rescale_betas_zero_snr": True, **trailing}
    chains = [
        ("leading, clip", "DDIM", mild, 0.0),
        ("trailing, v, clip", "DDIM", v | trailing, 0.0),
        ("cosine, v, clip", "DDIM", v | {"beta_schedule": "squaredcos_cap_v2"}, 0.0),
        ("zero SNR, v, trailing", "DDIM", v | zero_snr, 0.0),
        ("thresholding", "DDIM", mild | {"thresholding": True, "sample_max_value": 2.0}, 0.0),
        ("clip, eta .5", "DDIM", mild, 0.5),
        ("clip, v, eta 1", "DDIM", v, 1.0),
        ("clip, small variance", "DDPM", mild, None),
        ("v, trailing, large variance", "DDPM", v | trailing | large, None),
    ]
    plain = [
        Case(
            f"pixels: {kind}, {name}",
            partial(
                pixel_pipeline, _scheduler(kind, **settings), getattr(diffusers, f"{kind}Pipeline")
            ),
            {} if eta is None else {"eta": eta},
            {"another eta": {"eta": 0.7}},
        )
        for name, kind, settings, eta in chains
    ]
    labelled = Case(
        "pixels: DDIM, class labels, guided",
        partial(pixel_pipeline, _scheduler("DDIM", **v), classes=5),
        {"prompts": [0, 3], "negative_prompts": [4, 4], "guidance_scale": 2.0, "eta": 0.0},
        {"swapped": {"prompts": [3, 0]}, "unguided": {"guidance_scale": 1.0}},
    )
    return [*plain, labelled]


def _label_cases() -> list[Case]:
    flow, guided = "FlowMatchEulerDiscrete", {"guidance_scale": 2.0, "eta": 0.0}
    chains = [
        ("flow", flow, {}, guided),
        ("flow, unguided", flow, {}, {**guided, "guidance_scale": 1.0}),
        ("flow, a scale per row", flow, {}, {**guided, "guidance_scale": [3.0, 1.0]}),
        ("flow, shift 3", flow, {"shift": 3.0}, guided),
        ("flow, re-noising", flow, {"stochastic_sampling": True}, {"guidance_scale": 2.0}),
        ("DDIM, v", "DDIM", {"prediction_type": "v_prediction"}, guided),
    ]
    return [
        _swap_case(
            f"labels: {name}",
            partial(pixel_pipeline, _scheduler(kind, **settings), LabelPipeline, classes=5),
            {"prompts": [0, 3], **options},
        )
        for name, kind, settings, options in chains
    ]


def _dit_cases() -> list[Case]:
    linear: dict[str, Any] = {"clip_sample": False}
    guided = {"prompts": [3, 700], "guidance_scale": 3.0}
    chains = [
        ("DDIM", "DDIM", linear, {"eta": 0.0}, {}),
        ("DDIM, a scale per row", "DDIM", linear, {"guidance_scale": [4.0, 1.0]}, {}),
        ("DDIM, no learned variance", "DDIM", linear, {}, {"learned_variance": False}),
        ("DDPM", "DDPM", linear, {"eta": None}, {}),
        ("DPM++ of order 1", "DPMSolverMultistep", {"solver_order": 1}, {}, {}),
    ]
    return [
        _swap_case(
            f"DiT: {name}",
            partial(dit, _scheduler(kind, **settings), **built),
            {**guided, "eta": 0.0, **options},
        )
        for name, kind, settings, options, built in chains
    ]


def _stable_diffusion_cases() -> list[Case]:
    betas = {k: SD_SCHEDULE[k] for k in ("beta_schedule", "beta_start", "beta_end")}
    ddim: dict[str, Any] = {**SD_SCHEDULE, "clip_sample": False}
    v: dict[str, Any] = {"prediction_type": "v_prediction"}
    trailing: dict[str, Any] = {"timestep_spacing": "trailing"}
    leading: dict[str, Any] = {"timestep_spacing": "leading", "steps_offset": 1}
    karras: dict[str, Any] = {"use_karras_sigmas": True}
    ode = {"eta": 0.0}
    tall = {"eta": 0.0, "height": 32, "width": 16}
    chains = [
        ("DDIM, leading", "DDIM", ddim, ode),
        ("DDIM, negative prompts", "DDIM", ddim, {**ode, **NEGATIVE}),
        ("DDIM, a scale per row", "DDIM", ddim, {**ode, "guidance_scale": [5.0, 1.0]}),
        ("DDIM, 32 x 16", "DDIM", ddim, tall),
        ("DDIM, clip, which the pipeline undoes", "DDIM", SD_SCHEDULE, ode),
        (
            "DDIM, zero SNR, v, trailing",
            "DDIM",
            ddim | v | trailing | {"rescale_betas_zero_snr": True},
            ode,
        ),
        ("DDIM, eta 1", "DDIM", ddim, {"eta": 1.0}),
        ("DDPM", "DDPM", {**betas, "steps_offset": 1, "clip_sample": False}, {}),
        ("Euler, Karras", "EulerDiscrete", betas | karras, ode),
        ("Euler, v, trailing", "EulerDiscrete", betas | v | trailing, ode),
        ("Euler-ancestral, leading", "EulerAncestralDiscrete", betas | leading, {}),
        ("DPM++ of order 1", "DPMSolverMultistep", betas | {"solver_order": 1}, ode),
        ("TCD", "TCD", SD_SCHEDULE, {"eta": 0.3, "steps": 4}),
        ("DDIM, rescaled guidance", "DDIM", ddim, {**ode, "guidance_scale": 10.0, **RESCALED}),
    ]
    guided = [
        _text_case("Stable Diffusion", name, stable_diffusion, _scheduler(kind, **extra), options)
        for name, kind, extra, options in chains
    ]
    student = Case(
        "Stable Diffusion: LCM, distilled scale",
        partial(stable_diffusion, _scheduler("LCM", **SD_SCHEDULE), guidance_embedding=8),
        {**TEXT, "steps": 4},
        {"swapped": {"prompts": PROMPTS[::-1]}, "another scale": {"guidance_scale": 30.0}},
    )
    return [*guided, student]


def _stable_diffusion_xl_cases() -> list[Case]:
    betas = {k: SDXL_SCHEDULE[k] for k in ("beta_schedule", "beta_start", "beta_end")}
    ode = {"eta": 0.0}
    ddim: dict[str, Any] = {**SD_SCHEDULE, "clip_sample": False}
    turbo = {"guidance_scale": 0.0, "steps": 4}
    none = {"negative_prompts": ["", ""]}
    ancestral = betas | {"timestep_spacing": "trailing"}
    chains = [
        ("Euler", "EulerDiscrete", SDXL_SCHEDULE, ode, {}),
        ("Euler, negative prompts", "EulerDiscrete", SDXL_SCHEDULE, {**ode, **NEGATIVE}, {}),
        ("Euler, empty negative prompts", "EulerDiscrete", SDXL_SCHEDULE, {**ode, **none}, {}),
        (
            "Euler, no zeros for no prompt",
            "EulerDiscrete",
            SDXL_SCHEDULE,
            ode,
            {"force_zeros_for_empty_prompt": False},
        ),
        ("Euler, 32 x 16", "EulerDiscrete", SDXL_SCHEDULE, {**ode, "height": 32, "width": 16}, {}),
        ("DDIM", "DDIM", ddim, ode, {}),
        ("DDIM, rescaled guidance", "DDIM", ddim, {**ode, **RESCALED}, {}),
        ("Euler-ancestral, unguided", "EulerAncestralDiscrete", ancestral, turbo, {}),
    ]
    return [
        _text_case(
            "Stable Diffusion XL",
            name,
            partial(stable_diffusion_xl, **built),
            _scheduler(kind, **settings),
            options,
        )
        for name, kind, settings, options, built in chains
    ]


def _stable_diffusion_3_cases() -> list[Case]:
    ode = {"eta": 0.0}
    chains = [
        ("shift 3", {"shift": 3.0}, ode),
        ("negative prompts", {"shift": 3.0}, {**ode, **NEGATIVE}),
        ("dynamic shift, 16 x 16", DYNAMIC, ode),
        ("dynamic shift, 32 x 16", DYNAMIC, {**ode, "height": 32, "width": 16}),
        ("Karras", {"use_karras_sigmas": True}, ode),
        ("re-noising", {"shift": 3.0, "stochastic_sampling": True}, {}),
    ]
    return [
        _text_case(
            "Stable Diffusion 3",
            name,
            stable_diffusion_3,
            _scheduler("FlowMatchEulerDiscrete", **settings),
            options,
        )
        for name, settings, options in chains
    ]


def _flux_cases() -> list[Case]:
    dev = [
        ("dev, dynamic shift", DYNAMIC, {}),
        ("dev, dynamic shift, 32 x 16", DYNAMIC, {"height": 32, "width": 16}),
        ("dev, a scale per row", DYNAMIC, {"guidance_scale": [3.5, 10.0]}),
        ("dev, shift 3", {"shift": 3.0}, {}),
        ("dev, Karras", {"use_karras_sigmas": True}, {}),
    ]
    cases = [
        _text_case("FLUX", name, flux, _scheduler("FlowMatchEulerDiscrete", **settings), options)
        for name, settings, options in [(n, s, {"eta": 0.0, **o}) for n, s, o in dev]
    ]
    student = {"prompts": PROMPTS, "steps": 4}
    schnell = [
        ("schnell", {}, {**student, "eta": 0.0}),
        ("schnell, re-noising", {"stochastic_sampling": True}, student),
    ]
    for name, settings, options in schnell:
        scheduler = _scheduler("FlowMatchEulerDiscrete", **settings)
        pipe = partial(flux, scheduler, guidance=False)
        cases.append(Case(f"FLUX: {name}", pipe, options, {"swapped": {"prompts": PROMPTS[::-1]}}))
    return cases


def _text_case(family: str, name: str, build: Any, scheduler: Any, options: Any) -> Case:
    return _swap_case(f"{family}: {name}", partial(build, scheduler), {**TEXT, **options})


def _swap_case(name: str, pipe: Callable[[], Any], options: dict[str, Any]) -> Case:
    """A case with prompts; the others swap them, drop guidance, its rule, or the height."""
    others = {"swapped": {"prompts": options["prompts"][::-1]}}
    scale = options["guidance_scale"]
    if isinstance(scale, list):  # one of whose rows is unguided already
        others["other scales"] = {"guidance_scale": scale[::-1]}
    elif scale > 1:
        others["unguided"] = {"guidance_scale": 1.0}
    if "cfg" in options:
        others["plain"] = {"cfg": None}
    if "height" in options:
        others["16 x 16"] = {"height": 16}
    return Case(name, pipe, options, others)


@torch.no_grad()
def our_images(model: Model, key: Tensor) -> Tensor:
    """Images of the conditions in turn, all in one batch, each a step behind the one before it."""
    x = model.process.prior(key)
    rows = torch.arange(len(key)) % len(model.prompts)
    for tick in range(model.process.steps + len(key) - 1):
        i = tick - torch.arange(len(key))
        on = ((i >= 0) & (i < model.process.steps)).nonzero().flatten()
        clean = model.denoiser(x[on], model.process.time(i[on]), rows[on])
        law = model.process.transition(x[on], i[on], clean)
        x[on] = law.sample(noise.child_key(key[on], i[on]))
    return model.decode(x)


@torch.no_grad()
def pipeline_images(
    pipe: Any, options: dict[str, Any], key: Tensor, model: Model, nudge: float = 0.0
) -> Tensor:
    """Images of `pipe` itself, one call for each key, on the noise of our chain.

    `nudge` is what its start is changed by, relatively.
    """
    images = []
    shape = model.process.prior(key).shape[1:]
    for k in range(len(key)):
        row = k % len(model.prompts)
        prompt = model.prompts[row]
        call = {
            "num_inference_steps": options["steps"],
            "output_type": "pt",
            **{k: options[k] for k in ("eta", "height", "width") if k in options},
        }
        scale = options.get("guidance_scale")
        scale = scale[row] if isinstance(scale, list) else scale
        negative = options["negative_prompts"][row] if "negative_prompts" in options else None
        one = key[k : k + 1]
        known = inspect.signature(pipe.__call__).parameters
        if "prompt" in known:
            call |= {"prompt": prompt, "negative_prompt": negative}
            call["latents"] = (1 + nudge) * noise.normal(one, shape)
        if "class_labels" in known:
            call["class_labels"] = [prompt]
        if "guidance_scale" in known and scale is not None:
            call["guidance_scale"] = scale
        if "cfg" in options:
            call["guidance_rescale"] = options["cfg"].phi
        if "eta" not in known:
            call.pop("eta", None)
        with _drawing(pipe, one, nudge), _labelled(pipe, prompt, negative, scale):
            images.append(pipe(**call).images)
    return torch.cat(images)


@contextmanager
def _drawing(pipe: Any, key: Tensor, nudge: float) -> Iterator[None]:
    """The pipeline's start and its scheduler's k-th draw are those of our chain under `key`."""
    draws = iter(range(10**6))

    def start(shape: tuple[int, ...], **_: Any) -> Tensor:
        return (1 + nudge) * noise.normal(key, shape[1:])

    def step(shape: tuple[int, ...], **_: Any) -> Tensor:
        return noise.normal(noise.child_key(key, next(draws)), shape[1:])

    patched = [(type(pipe).__module__, start), (type(pipe.scheduler).__module__, step)]
    undo = []
    for name, draw in patched:
        module = importlib.import_module(name)
        if hasattr(module, "randn_tensor"):
            undo.append(mock.patch.object(module, "randn_tensor", draw))
    for patch in undo:
        patch.start()
    try:
        yield
    finally:
        for patch in undo:
            patch.stop()


@contextmanager
def _labelled(pipe: Any, label: Any, null: Any, scale: Any) -> Iterator[None]:
    """Pixel pipelines of diffusers pass no class label: hand it to the network under them."""
    passes = "class_labels" in inspect.signature(pipe.__call__).parameters
    if not isinstance(label, int) or passes:
        yield
        return
    forward = pipe.unet.forward

    def guided(x: Tensor, t: Tensor) -> UNet2DOutput:
        positive = forward(x, t, class_labels=torch.tensor([label])).sample
        negative = forward(x, t, class_labels=torch.tensor([null])).sample
        return UNet2DOutput(sample=negative + scale * (positive - negative))

    with mock.patch.object(pipe.unet, "forward", guided):
        yield


@dataclass(frozen=True)
class Comparison:
    """Largest differences of images; see the module."""

    error: float
    floor: float
    driven: float | None
    moved: dict[str, float]  # by request, the smallest over rows


def compare(case: Case, steps: int, seed: int) -> Comparison:
    """Our chain against the pipeline, the pipeline against itself, our chain against others."""
    options = {"steps": steps, **case.options}
    pipe = case.pipe()
    model = from_pipeline(pipe, **options, route="native")
    # two items even of an unconditional model, so that mixed steps are met
    key = noise.root_key(seed, torch.arange(max(2, len(model.prompts))))
    images = our_images(model, key)
    theirs = pipeline_images(pipe, options, key, model)
    nudged = pipeline_images(pipe, options, key, model, nudge=1e-7)
    moved = {}
    for name, other in case.others.items():
        asked = {**options, **other, "route": "native"}
        others = our_images(from_pipeline(case.pipe(), **asked), key)
        # of another size, the corner that both have
        high, wide = min(images.shape[2], others.shape[2]), min(images.shape[3], others.shape[3])
        difference = images[..., :high, :wide] - others[..., :high, :wide]
        moved[name] = difference.abs().flatten(1).max(1).values.min().item()
    driven = driven_images(pipe, options, key)
    return Comparison(
        (images - theirs).abs().max().item(),
        (theirs - nudged).abs().max().item(),
        None if driven is None else (images - driven).abs().max().item(),
        moved,
    )


def driven_images(pipe: Any, options: dict[str, Any], key: Tensor) -> Tensor | None:
    """What our chain makes of the same request by the other route; None where it has no words for
    it."""
    asked = {name: value for name, value in options.items() if name != "cfg"}
    if isinstance(options.get("cfg"), Rescale):
        asked["call"] = {"guidance_rescale": options["cfg"].phi}
    elif "cfg" in options:
        return None
    if isinstance(pipe, diffusers.DDIMPipeline) and "prompts" in options:
        return None  # class labels go to its network, past its call
    return our_images(from_pipeline(pipe, **asked, route="driven"), key)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="5 steps instead of 50, one seed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    steps, seeds = (5, [0]) if arguments.quick else (50, [0, 1, 2])
    header()
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    print(f"{steps} steps (students 4), seeds {seeds}; images in [0, 1]; error: min..max of seeds")
    print(f"{'case':<54} {'error':>16} {'floor':>8} {'driven':>8}  moved (min of rows and seeds)")
    errors, routes, ratio = {}, {}, float("inf")
    for case in cases():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # diffusers on old configurations
            found = [compare(case, steps, seed) for seed in seeds]
        low, high = min(one.error for one in found), max(one.error for one in found)
        floor = max(one.floor for one in found)
        moved = {name: min(one.moved[name] for one in found) for name in case.others}
        errors[case.name] = high
        apart = [one.driven for one in found if one.driven is not None]
        if apart:
            routes[case.name] = max(apart)
        route = f"{max(apart):8.1e}" if apart else f"{'-':>8}"
        ratio = min(ratio, min(moved.values()) / max(high, 1e-12))
        notes = ", ".join(f"{name} {value:.3f}" for name, value in moved.items())
        print(f"{case.name:<54} {low:7.1e}..{high:.1e} {floor:8.1e} {route}  {notes}", flush=True)
    families = sorted({name.partition(":")[0] for name in errors})
    finish(
        {
            "max_error": max(errors.values()),
            "max_native_to_driven": max(routes.values()),
            "cases_of_both_routes": len(routes),
            "tolerance": TOLERANCE,
            "smallest_move_over_error": ratio,
            "families": {
                family: max(e for name, e in errors.items() if name.startswith(f"{family}:"))
                for family in families
            },
            "cases": errors,
            "steps": steps,
            "seeds": seeds,
        }
    )


if __name__ == "__main__":
    main()
