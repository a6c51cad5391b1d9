"""What a steered call decodes, draws and takes again, and what it leaves as it was found."""

from __future__ import annotations

import inspect
import json
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor

from steering import FlowChef, FlowDPS, FreeDoM, steer
from steering.pipelines.schedulers import read_grid
from steering.pipelines.steered import guided_steps
from steering.pipelines.steered.recorded import Recorded
from tests.steered import (
    STEPS,
    Target,
    of,
    pointwise,
    run,
    scheduler_of,
    seeded,
    target,
)
from tests.tiny_pipelines import (
    flux,
    stable_diffusion,
    stable_diffusion_3,
    stable_diffusion_xl,
)


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


DECODED = {
    "flux": flux,
    "sd3": stable_diffusion_3,
    "sd15": lambda: stable_diffusion(DDIMScheduler(clip_sample=False, set_alpha_to_one=True)),
    "sdxl": stable_diffusion_xl,
}


@pytest.mark.parametrize("family", list(DECODED))
def test_a_reward_sees_the_pipelines_own_images_and_its_prompts(family):
    """The guess of the last step is where it leads, so the last look is at the image itself."""
    pipe, reward = DECODED[family](), Watching()
    call = {"num_inference_steps": 3, "generator": seeded(0), "output_type": "pt"}
    size = {"height": 16, "width": 32} if family == "flux" else {}
    with steer(pipe, FlowChef(reward, step=0.0)):
        images = pipe(["a red fox", "a cat"], num_images_per_prompt=2, **size, **call).images
    assert reward.prompts[-1] == ["a red fox", "a red fox", "a cat", "a cat"]
    torch.testing.assert_close(reward.items[-1], images, rtol=0, atol=1e-5)  # batches of one size


def test_guesses_are_decoded_by_what_is_given():
    pipe, reward = stable_diffusion(), Watching()
    small = AutoencoderTiny(
        latent_channels=4, encoder_block_out_channels=[8, 8], decoder_block_out_channels=[8, 8],
        num_encoder_blocks=[1, 1], num_decoder_blocks=[1, 1],
    )  # fmt: skip
    with steer(pipe, FlowChef(reward, step=0.1), vae=small):
        pipe("a red fox", num_inference_steps=2)
    assert reward.items[-1].shape == (1, 3, 16, 16)
    with steer(pipe, FlowChef(reward, step=0.1), decode=lambda x: x[:, :1]):
        pipe("a red fox", num_inference_steps=2)
    assert reward.items[-1].shape == (1, 1, 8, 8)


def test_an_autoencoder_in_half_precision_decodes_in_float32_under_its_offload_hook():
    from accelerate import cpu_offload_with_hook

    pipe, reward = stable_diffusion(), Watching()
    pipe.vae.half().register_to_config(force_upcast=True)
    _, hook = cpu_offload_with_hook(pipe.unet, "cpu")
    cpu_offload_with_hook(pipe.vae, "cpu", prev_module_hook=hook)
    with steer(pipe, FlowChef(reward, step=0.1)):
        pipe("a red fox", num_inference_steps=2, output_type="latent")
    assert reward.items[-1].isfinite().all()
    assert pipe.vae.dtype == torch.float16


def test_eta_and_generators_are_honoured():
    pipe = stable_diffusion()
    call = {"num_inference_steps": 4, "eta": 0.5, "output_type": "latent"}
    one, two = seeded(3), seeded(3)
    plain = pipe("a red fox", generator=one, **call).images
    with steer(pipe, FlowChef(target((4, 8, 8)), step=0.0)):
        steered = pipe("a red fox", generator=two, **call).images
    assert torch.equal(plain, steered)
    assert torch.equal(one.get_state(), two.get_state())
    call["eta"] = 0.0
    assert not torch.equal(pipe("a red fox", generator=seeded(3), **call).images, plain)


def test_noise_of_a_guidance_is_its_rows_own_and_the_generator_stays_untouched():
    pipe = pointwise(FlowMatchEulerDiscreteScheduler())
    guidance = FlowDPS(target((1, 4, 4)))
    generators = seeded(7, 8)
    with steer(pipe, guidance):
        both = run(pipe, (1, 1), generator=generators)
        alone = run(pipe, (1,), generator=seeded(8))
        other = run(pipe, (1,), generator=seeded(9), latents=torch.zeros(1, 1, 4, 4))
        again = run(pipe, (1,), generator=seeded(8), latents=torch.zeros(1, 1, 4, 4))
    assert torch.equal(both[1:], alone)
    assert not torch.equal(other, again)
    run(pipe, (1, 1), generator=(plain := seeded(7, 8)))
    for a, b in zip(generators, plain, strict=True):
        assert torch.equal(a.get_state(), b.get_state())


def test_time_travel_takes_steps_again_from_their_level(monkeypatch):
    """By hand, with no noise put back: x_i = alpha_i / alpha' · x', as often as it says."""
    monkeypatch.setattr(guided_steps, "normal", lambda key, shape: torch.zeros(len(key), *shape))
    scheduler = DDIMScheduler(clip_sample=False)
    pipe = pointwise(scheduler)
    guidance = FreeDoM(target((1, 4, 4)), step=0.0, travel=3, travel_window=(0.3, 0.7))
    with steer(pipe, guidance):
        x = run(pipe, (0,))
    assert pipe.unet.calls == 6 + 2 * 3  # floor(.3 · 6) .. floor(.7 · 6) are steps 1, 2, 3
    assert len(scheduler.timesteps) == STEPS
    process, _ = read_grid(scheduler, (1, 4, 4), eta=0.0)
    expected = torch.randn(1, 1, 4, 4, generator=seeded(0))
    for i in range(STEPS):
        for again in (True, True, False) if i in (1, 2, 3) else (False,):
            eps = torch.sin(0.5 * expected)
            clean = (expected - process.sigma[i] * eps) / process.alpha[i]
            expected = process.alpha[i + 1] * clean + process.sigma[i + 1] * eps
            if again:
                expected = process.alpha[i] / process.alpha[i + 1] * expected
    torch.testing.assert_close(x, expected.float(), rtol=0, atol=1e-5)  # float32 tables


@pytest.mark.parametrize("name", ["EulerDiscrete", "FlowMatchEulerDiscrete", "DDPM", "LCM", "TCD"])
def test_time_travel_ends_where_the_reward_wants(name):
    pipe, reward = pointwise(scheduler_of(name)), target((1, 4, 4))
    guidance = FreeDoM(reward, step=0.0)
    with steer(pipe, guidance):
        run(pipe)
    assert pipe.unet.calls == int(guidance.repeats(torch.arange(STEPS), STEPS).sum()) > STEPS


class Breaks(Target):
    def __call__(self, x, prompts):
        raise KeyboardInterrupt


@pytest.mark.parametrize("jacobian", ["skip", "full"])
def test_the_pipeline_is_left_as_it_was_found(jacobian, tmp_path):
    pipe = stable_diffusion()
    shape = (4, 8, 8)
    call = {"num_inference_steps": 3, "output_type": "latent"}
    plain = pipe("a red fox", generator=seeded(0), **call).images
    before = of(pipe)
    with steer(pipe, FlowChef(target(shape), jacobian=jacobian)):
        pipe("a red fox", **call)
        pipe.save_pretrained(tmp_path / "pipe")
        pipe.scheduler.save_pretrained(tmp_path / "alone")
        assert "eta" in inspect.signature(pipe.scheduler.step).parameters
        assert inspect.signature(type(pipe).__call__) == inspect.signature(before[0].__call__)
    assert of(pipe) == before
    assert json.loads((tmp_path / "pipe/model_index.json").read_text())["_class_name"] == (
        "StableDiffusionPipeline"
    )
    for folder in ("pipe/scheduler", "alone"):
        config = json.loads((tmp_path / folder / "scheduler_config.json").read_text())
        assert config["_class_name"] == "DDIMScheduler"
    assert torch.equal(pipe("a red fox", generator=seeded(0), **call).images, plain)
    breaks = Breaks(torch.zeros(shape), torch.ones(shape))
    with pytest.raises(KeyboardInterrupt), steer(pipe, FlowChef(breaks, jacobian=jacobian)):
        pipe("a red fox", **call)
    assert of(pipe) == before
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()
    assert torch.equal(pipe("a red fox", generator=seeded(0), **call).images, plain)


def test_inputs_with_further_channels_are_differentiated_and_strangers_refused():
    """Copies are found in a doubled batch and under joined channels; other things are no states."""
    states = torch.randn(2, 3, 4)
    recorded = Recorded(lambda module, given: None)
    recorded.records = True

    def net(given, scale):  # what a network makes of the first channels of its input
        (given,), _ = recorded.hook(torch.nn.Identity(), (given,), {})
        return (scale * given[:, :, :4]).sin()

    try:
        joined = torch.cat([states, torch.zeros(2, 3, 2)], 2)
        first, second = net(torch.cat([joined, joined]), 2.0).chunk(2)
        output = first + 3 * (second - first) + net(states, 0.5)
        x = states.clone().requires_grad_(True)
        linked = recorded.output(output, x, torch.arange(2), states)
        (slope,) = torch.autograd.grad(linked.sum(), x)
    finally:
        recorded.end()
    torch.testing.assert_close(linked, (2 * states).sin() + (0.5 * states).sin())
    torch.testing.assert_close(slope, 2 * (2 * states).cos() + 0.5 * (0.5 * states).cos())
    assert torch.is_grad_enabled()
    try:
        output = net(2 * states, 1.0)
        with pytest.raises(RuntimeError, match="no copies of the states"):
            recorded.output(output, x, torch.arange(2), states)
    finally:
        recorded.end()
