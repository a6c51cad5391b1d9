"""What a steered call decodes, draws and takes again, and what it leaves as it was found."""

from __future__ import annotations

import functools
import inspect
import json

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
from steering.pipelines.steered import travel
from steering.pipelines.steered.recorded import Recorded
from tests.steered import (
    STEPS,
    Target,
    Watching,
    of,
    pointwise,
    run,
    scheduler_of,
    seeded,
    target,
)
from tests.tiny.image_flows import aura_flow, cogview_4
from tests.tiny_pipelines import (
    flux,
    stable_diffusion,
    stable_diffusion_3,
    stable_diffusion_xl,
)

DECODED = {
    "flux": flux,
    "sd3": stable_diffusion_3,
    "sd15": lambda: stable_diffusion(DDIMScheduler(clip_sample=False, set_alpha_to_one=True)),
    "sdxl": stable_diffusion_xl,
    "auraflow": aura_flow,  # whose autoencoder has a shift that it does not use
    "cogview4": cogview_4,
}


@pytest.mark.parametrize("family", list(DECODED))
def test_a_reward_sees_the_pipelines_own_images_and_its_prompts(family):
    """The guess of the last step is where it leads, so the last look is at the image itself."""
    pipe, reward = DECODED[family](), Watching()
    call = {"num_inference_steps": 3, "generator": seeded(0), "output_type": "pt"}
    sizes = {"flux": (16, 32), "auraflow": (16, 16), "cogview4": (16, 16)}
    size = dict(zip(("height", "width"), sizes.get(family, ()), strict=False))
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
    monkeypatch.setattr(travel, "normal", lambda key, shape: torch.zeros(len(key), *shape))
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
    plain = run(pipe)
    pipe.unet.calls = 0
    guidance = FreeDoM(reward, step=0.9, rule="polyak")
    with steer(pipe, guidance):
        steered = run(pipe)
    assert reward.left(steered) < 0.02 * reward.left(plain)
    assert pipe.unet.calls == int(guidance.repeats(torch.arange(STEPS), STEPS).sum()) > STEPS


# alpha_i / alpha' and sigma, in a scheduler's own coordinates, from its tables
KEPT = {
    "DDIM": lambda s, i: ((a := s.alphas_cumprod[s.timesteps])[i] / a[i + 1]).sqrt(),
    "EulerDiscrete": lambda s, i: 1.0,
    "FlowMatchEulerDiscrete": lambda s, i: (1 - s.sigmas[i]) / (1 - s.sigmas[i + 1]),
}
SPREAD = {
    "DDIM": lambda s: (1 - s.alphas_cumprod[s.timesteps]).sqrt(),
    "EulerDiscrete": lambda s: s.sigmas,
    "FlowMatchEulerDiscrete": lambda s: s.sigmas,
}


@pytest.mark.parametrize("name", list(KEPT))
def test_a_state_taken_back_has_the_law_of_its_level(name, monkeypatch):
    """back = kept · reached + sqrt(sigma² - (kept · sigma')²) · z, z standard normal: its mean,
    variance and correlation with the state, from 4096 numbers at three levels."""
    kept, spread, calls = KEPT[name], SPREAD[name], list[tuple[Tensor, Tensor]]()
    scheduler = scheduler_of(name)
    own = type(scheduler).step

    @functools.wraps(own)
    def spied(self, *args, **kwargs):
        given = inspect.signature(own).bind(self, *args, **kwargs).arguments["sample"]
        calls.append((given.double(), (stepped := own(self, *args, **kwargs))[0].double()))
        return stepped

    monkeypatch.setattr(type(scheduler), "step", spied)
    pipe = pointwise(scheduler)
    with steer(pipe, FreeDoM(target((1, 4, 4)), step=0.0, travel_window=(0.3, 0.7))):
        run(pipe, (0,) * 256)
    for i in (1, 2, 3):  # each is taken twice; the first step before them once
        reached, back = calls[2 * i - 1][1], calls[2 * i][0]
        k, sigma = float(kept(scheduler, i)), spread(scheduler).double()
        z = (back - k * reached) / (sigma[i] ** 2 - (k * sigma[i + 1]) ** 2).sqrt()
        assert z.mean().abs() < 4 / 64  # four standard errors of 4096 numbers
        assert (z.var() - 1).abs() < 4 * 2**0.5 / 64
        assert torch.corrcoef(torch.stack([z.flatten(), reached.flatten()]))[0, 1].abs() < 4 / 64


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


def test_a_small_gradient_survives_half_precision():
    """In float16, which ends at 6e-8: a slope of 1e-8 for one item, 0 for the next, 1e6 for a
    third."""
    states = torch.randn(3, 16, generator=torch.Generator().manual_seed(0)).half().float()
    recorded = Recorded(lambda module, given: None)
    recorded.records = True
    try:
        (given,), _ = recorded.hook(torch.nn.Identity(), (states.half(),), {})
        x = states.clone().requires_grad_(True)
        linked = recorded.output((2 * given).sin(), x, torch.arange(3), states)
        sizes = torch.tensor([[1e-8], [0.0], [1e6]])
        (slope,) = torch.autograd.grad((sizes * linked).sum(), x)
    finally:
        recorded.end()
    # half precision has 11 bits, here of 2 · x up to 6
    torch.testing.assert_close(slope / sizes.clamp(min=1e-9), (sizes > 0) * 2 * (2 * states).cos(),
                               rtol=0, atol=1e-2)  # fmt: skip
