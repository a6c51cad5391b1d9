"""What cannot be steered gets one clear error, before the network where that can be."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
)
from torch import Tensor

from steering import FlowChef, FlowDPS, FreeDoM, measure, steer
from steering.pipelines.steered.asked import Asked
from tests.steered import (
    Target,
    pointwise,
    run,
    scheduler_of,
)


class Shapeless(Target):
    def __call__(self, x, prompts):
        return super().__call__(x, prompts).sum()


class Detached(Target):
    def __call__(self, x, prompts):
        return super().__call__(x, prompts).detach()


class Black(Target):
    differentiable = False


def about(kind) -> Any:
    return kind(torch.zeros(1, 4, 4), torch.ones(1, 4, 4))


@pytest.mark.parametrize(
    ("guidance", "options", "error", "words"),
    [
        (FlowChef, {}, TypeError, "guidance is the class FlowChef"),
        ("FlowChef", {}, TypeError, "guidance is a str"),
        (FlowChef(), {}, TypeError, "FlowChef has no reward to follow"),
        (FlowChef(3), {}, TypeError, "reward=3 of FlowChef cannot be called"),
        (FlowChef(about(Black)), {}, TypeError, "reward Black has no gradient"),
        (FlowChef(about(Target)), {"decode": 3}, TypeError, "decode=3"),
        (FlowChef(about(Target)), {"vae": 3}, TypeError, "vae is a int"),
    ],
)
def test_bad_arguments_are_refused_at_once(guidance, options, error, words):
    with pytest.raises(error, match=words), steer(pointwise(DDIMScheduler()), guidance, **options):
        pass


@pytest.mark.parametrize(
    ("guidance", "error", "words"),
    [
        (FlowChef(about(Shapeless)), ValueError, r"Shapeless returned \[\] for 2 items at step 0"),
        (FlowChef(about(Detached)), TypeError, "reward Detached has no gradient at step 0 of 6"),
        (FlowChef(measure(torch.sin, torch.zeros(2, 3), space="states")), TypeError, "y has shape"),
    ],
)  # fmt: skip
def test_a_reward_that_does_not_fit_is_refused_before_the_first_network_call(
    guidance, error, words
):
    pipe = pointwise(DDIMScheduler(clip_sample=False))
    plain = run(pipe)
    calls = pipe.unet.calls
    with pytest.raises(error, match=words), steer(pipe, guidance):
        run(pipe)
    assert pipe.unet.calls == calls
    assert torch.equal(run(pipe), plain)


def test_what_cannot_be_steered_is_refused_by_name():
    guidance, mask = FlowChef(about(Target)), torch.ones(1, 4, 4)
    with pytest.raises(ValueError, match="KDPM2DiscreteScheduler is not supported"):
        steer(pointwise(diffusers.KDPM2DiscreteScheduler()), guidance).__enter__()
    with pytest.raises(ValueError, match="PNDMScheduler with skip_prk_steps=False"):
        steer(pointwise(diffusers.PNDMScheduler()), guidance).__enter__()
    with pytest.raises(ValueError, match="no diffusers pipeline"):
        steer(mask, guidance).__enter__()
    pipe = pointwise(DDIMScheduler())
    with (
        steer(pipe, guidance),
        pytest.raises(ValueError, match="steered already"),
        steer(pipe, guidance),
    ):
        pass
    with steer(pipe, guidance):
        pipe.scheduler = DDIMScheduler()
        with pytest.raises(ValueError, match="exchanged inside the block"):
            run(pipe)
    with (
        steer(pipe, guidance),
        torch.inference_mode(),
        pytest.raises(RuntimeError, match="inference_mode"),
    ):
        run(pipe)
    multistep = pointwise(DPMSolverMultistepScheduler())
    with (
        steer(multistep, FreeDoM(about(Target))),
        pytest.raises(ValueError, match="FreeDoM travels back in time, which DPMSolverMultistep"),
    ):
        run(multistep)
    flowing = pointwise(scheduler_of("FlowMatchHeunDiscrete"))
    with (
        steer(flowing, FlowDPS(about(Target))),
        pytest.raises(ValueError, match="FlowDPS draws noise, which FlowMatchHeunDiscrete"),
    ):
        run(flowing)
    with pytest.raises(ValueError, match="3 states for 2 prompts"):
        Asked(("a", "b")).count(torch.zeros(3, 1))


def test_what_is_not_finite_says_whose_and_where():
    class Infinite(Target):
        def __call__(self, x, prompts):
            value = super().__call__(x, prompts)
            return value / (torch.arange(len(x)) == 0)

    pipe = pointwise(DDIMScheduler(clip_sample=False))
    with (
        steer(pipe, FlowChef(about(Infinite))),
        pytest.raises(ValueError, match=r"reward Infinite .* at step 0 of 6, for items \[1\] of 2"),
    ):
        run(pipe)


def test_states_that_are_not_known_how_to_decode_ask_for_a_way():
    pipe = pointwise(DDIMScheduler())
    pipe.unet.config["in_channels"] = 5
    with (
        steer(pipe, FlowChef(Watching())),
        pytest.raises(ValueError, match=r"decode=.*space='states'"),
    ):
        run(pipe)


class Watching:
    """A reward that keeps what it is shown."""

    differentiable = True

    def __init__(self) -> None:
        self.items: list[Tensor] = []
        self.prompts: list[Any] = []

    def __call__(self, items, prompts):
        self.items.append(items.detach())
        self.prompts.append(list(prompts))
        return items.flatten(1).mean(1)
