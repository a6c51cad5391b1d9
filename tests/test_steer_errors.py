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

from steering import FlowChef, FlowDPS, FreeDoM, Twist, measure, steer
from steering.pipelines.steered.asked import Asked
from tests.steered import (
    Target,
    Watching,
    pointwise,
    run,
    scheduler_of,
    target,
)
from tests.tiny_pipelines import quiet, stable_diffusion


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


@pytest.mark.parametrize(
    ("guidance", "words"),
    [
        (Twist(about(Target)), "Twist moves a step by its own noise"),
        (FlowChef(about(Target), window=(0.0, 0.1)), r"window=\(0.0, 0.1\) .* none of 6 steps"),
    ],
)
def test_a_guidance_that_would_do_nothing_is_refused_before_every_network_call(guidance, words):
    pipe = pointwise(DDIMScheduler())
    with steer(pipe, guidance):
        for _ in range(2):
            with pytest.raises(ValueError, match=words):
                run(pipe)
    assert pipe.unet.calls == 0


def test_a_guidance_by_noise_is_taken_where_the_call_or_its_scheduler_draws_some():
    reward, call = target((4, 8, 8)), {"num_inference_steps": 4, "output_type": "latent"}
    pipe = quiet(stable_diffusion())
    with steer(pipe, Twist(reward)):
        pipe("a red fox", eta=1.0, **call)
        with pytest.raises(ValueError, match="eta > 0"):
            pipe("a red fox", eta=0.0, **call)
    drawing = pointwise(scheduler_of("EulerAncestralDiscrete"))
    plain = run(drawing)
    reward = target((1, 4, 4))
    with steer(drawing, Twist(reward, step=0.3, jacobian="skip")):
        assert reward.left(run(drawing)) < reward.left(plain) / 2


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
