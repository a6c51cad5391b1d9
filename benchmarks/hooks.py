"""Do ordinary pipelines, steered from inside their schedulers, go where they should?

    python -m benchmarks.hooks [--quick]

On tiny random pipelines: a target inside a mask, the left half of the latent. The loss (mean square
inside the mask) of the final latents, unsteered over steered, under one setting for all. Goal: a
fall of 1,000 for each. Further: outside the mask the sample stays on the model (a flow in closed
form, whose numbers are independent); step = 0 is plain sampling to the bit; the pipeline after the
block, left normally or by an exception, is the pipeline before it.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor

from benchmarks.report import finish, header
from steering import FlowChef, steer
from tests.steered import Pointwise, latents_of, of, pointwise, seeded, target
from tests.tiny_pipelines import (
    SD_SCHEDULE,
    dit,
    flux,
    stable_diffusion,
    stable_diffusion_3,
    stable_diffusion_xl,
)

GOAL = 1000.0
STEP = 0.9  # of the residual, in each step
STEPS = 20

LATENT = (4, 8, 8)
SD = {k: v for k, v in SD_SCHEDULE.items() if k != "set_alpha_to_one"}
Make = Callable[[], Any]
PIPELINES: dict[str, tuple[Make, tuple[int, ...], tuple[str, ...]]] = {
    "FLUX, FlowMatchEuler": (flux, (16, 16), ("skip", "full")),
    "SD3, FlowMatchEuler": (stable_diffusion_3, LATENT, ("skip", "full")),
    "SD3, FlowMatchHeun": (
        lambda: stable_diffusion_3(diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)),  # type: ignore[attr-defined]
        LATENT,
        ("skip",),
    ),
    "SD 1.5, DDIM": (stable_diffusion, LATENT, ("skip", "full")),
    "SD 1.5, DPM++ 2M": (
        lambda: stable_diffusion(diffusers.DPMSolverMultistepScheduler(**SD)),  # type: ignore[attr-defined]
        LATENT,
        ("skip",),
    ),
    "SDXL, Euler": (stable_diffusion_xl, LATENT, ("skip", "full")),
    "DiT, DDIM": (dit, LATENT, ("skip",)),
}


def final(pipe: Any, seed: int = 0) -> Tensor:
    """Final latents of two images."""
    call = {"num_inference_steps": STEPS, "generator": seeded(seed)}
    if type(pipe).__name__ == "DiTPipeline":
        return latents_of(pipe, [3, 7], **call)
    return pipe(["a red fox", "a cat"], output_type="latent", **call).images


def fall(pipe: Any, shape: tuple[int, ...], jacobian: Any) -> dict[str, Any]:
    """Steered against plain, and what became of the pipeline."""
    reward = target(shape)
    inside = 2 * float(reward.mask.sum())
    plain, before = final(pipe), of(pipe)
    with steer(pipe, FlowChef(reward, step=0.0, jacobian=jacobian)):
        zero = final(pipe)
    began = time.perf_counter()
    with steer(pipe, FlowChef(reward, step=STEP, jacobian=jacobian)):
        steered = final(pipe)
    seconds = time.perf_counter() - began
    same = of(pipe) == before and torch.equal(final(pipe), plain)
    try:
        with steer(pipe, FlowChef(Breaks(), jacobian=jacobian)):
            final(pipe)
    except ArithmeticError:
        pass
    else:
        raise RuntimeError("the reward did not fail")
    same_after_exception = of(pipe) == before and torch.equal(final(pipe), plain)
    losses = [reward.left(x) / inside for x in (plain, steered)]
    return {
        "plain": losses[0],
        "steered": losses[1],
        "fall": losses[0] / max(losses[1], 1e-30),
        "zero_is_plain": torch.equal(zero, plain),
        "left_as_found": same,
        "left_as_found_after_exception": same_after_exception,
        "seconds": seconds,
    }


class Breaks:
    """A reward of states that fails half-way."""

    of_states = differentiable = True

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Tensor, prompts: Any) -> Tensor:
        self.calls += 1
        if self.calls > STEPS // 2:
            raise ArithmeticError
        return x.flatten(1).sum(1)


class GaussianFlow(Pointwise):
    """The velocity of the flow from noise to independent numbers of N(1, 1/4), in closed form."""

    mean, variance = 1.0, 0.25

    def forward(self, x: Tensor, t: Tensor, labels: Tensor, return_dict: bool = False) -> tuple:
        sigma = (t / 1000).view(-1, 1, 1, 1)
        alpha = 1 - sigma
        gain = self.variance * alpha / (alpha**2 * self.variance + sigma**2)
        clean = self.mean + gain * (x - alpha * self.mean)
        return ((x - clean) / sigma,)


def outside() -> dict[str, float]:
    """A flow of independent numbers: outside the mask the steered sample is the plain one, which
    has the model's moments; inside it is the target."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()  # type: ignore[attr-defined]
    pipe, reward = pointwise(scheduler), target((1, 4, 4))
    pipe.unet = GaussianFlow()
    call: dict[str, Any] = {"num_inference_steps": 50, "output_type": "latent"}
    plain = pipe([0] * 4096, generator=seeded(0), **call).images
    with steer(pipe, FlowChef(reward, step=STEP)):
        steered = pipe([0] * 4096, generator=seeded(0), **call).images
    free = steered[..., 2:]
    return {
        "largest_difference_outside": float((free - plain[..., 2:]).abs().max()),
        "mean_outside": float(free.mean()),
        "std_outside": float(free.std()),
        "fall_inside": reward.left(plain) / max(reward.left(steered), 1e-30),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer of the true gradient")
    args = parser.parse_args()
    torch.set_num_threads(1)
    header()
    warnings.simplefilter("ignore")
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    print(f"FlowChef(step={STEP}), {STEPS} steps, every step; two images of each")
    columns = ("plain", "steered", "fall", "zero", "after", "broken", "s")
    print(f"{'pipeline':<24}{'jacobian':<10}" + "".join(f"{name:>11}" for name in columns))
    found: dict[str, dict[str, Any]] = {}
    for name, (make, shape, jacobians) in PIPELINES.items():
        for jacobian in jacobians[:1] if args.quick and "FLUX" not in name else jacobians:
            at = found[f"{name}, {jacobian}"] = fall(make(), shape, jacobian)
            told = ("zero_is_plain", "left_as_found", "left_as_found_after_exception")
            print(
                f"{name:<24}{jacobian:<10}{at['plain']:>11.3g}{at['steered']:>11.3g}"
                f"{at['fall']:>11.3g}"
                + "".join(f"{'same' if at[key] else 'CHANGED':>11}" for key in told)
                + f"{at['seconds']:>11.1f}",
                flush=True,
            )
    closed = outside()
    print("closed-form flow:", ", ".join(f"{k} {v:.4g}" for k, v in closed.items()))
    figures = list(found.values())
    least = min(at["fall"] for at in figures)
    finish(
        {
            "min_fall": least,
            "min_fall_skip": min(v["fall"] for k, v in found.items() if k.endswith("skip")),
            "goal": GOAL,
            "within_goal": least >= GOAL,
            "zero_is_plain": all(at["zero_is_plain"] for at in figures),
            "left_as_found": all(
                at["left_as_found"] and at["left_as_found_after_exception"] for at in figures
            ),
            "outside": closed,
            "by_pipeline": found,
        }
    )


if __name__ == "__main__":
    main()
