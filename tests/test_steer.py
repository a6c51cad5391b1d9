"""Ordinary pipelines under `steer`: what the engine does, what their own solvers do, left as found."""

from __future__ import annotations

import functools
import inspect
import json
from dataclasses import dataclass
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor

from samplers import Ancestral, sample
from steering import DPS, FlowChef, FlowDPS, FreeDoM, from_pipeline, measure, steer
from steering.models.label_pipeline import LabelPipeline
from steering.noise import child_key, root_key
from steering.pipelines import guided_steps
from steering.pipelines.recorded import Recorded
from steering.pipelines.schedulers import FLOWS, SUPPORTED, read_grid
from steering.pipelines.solver import Solver, eta_of
from tests.tiny_pipelines import (
    dit,
    flux,
    pixel_pipeline,
    quiet,
    stable_diffusion,
    stable_diffusion_3,
    stable_diffusion_xl,
)

STEPS = 6


@dataclass(frozen=True)
class Target:
    """-|mask · (x - y)|² of states."""

    y: Tensor
    mask: Tensor
    of_states = True
    differentiable = True
    least_squares = True
    floor = 0.0

    def __call__(self, x, prompts):
        return -(self.mask * (x - self.y)).square().flatten(1).sum(1)

    def left(self, x) -> float:
        return float(-self(x, None).sum())


def target(shape) -> Target:
    mask = torch.zeros(shape)
    mask[..., : shape[-1] // 2] = 1
    return Target(torch.randn(shape, generator=torch.Generator().manual_seed(5)), mask)


def seeded(*seeds: int) -> Any:
    made = [torch.Generator().manual_seed(seed) for seed in seeds]
    return made[0] if len(made) == 1 else made


class Pointwise(torch.nn.Module):
    """A network that looks at each number by itself, and bends it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.config = {"sample_size": 4, "in_channels": 1, "num_class_embeds": 3}
        self.weight = torch.nn.Parameter(torch.tensor(0.5))
        self.dtype, self.device = torch.float32, torch.device("cpu")

    def forward(self, x, t, labels, return_dict=False):
        self.calls += 1
        return (torch.sin(self.weight * x + 0.1 * labels.view(-1, 1, 1, 1)),)


def pointwise(scheduler) -> Any:
    """A real pipeline round a pointwise network of states [1, 4, 4]."""
    pipe = LabelPipeline.__new__(LabelPipeline)
    diffusers.DiffusionPipeline.__init__(pipe)
    pipe.register_modules(unet=None, scheduler=scheduler)
    pipe.unet = Pointwise()
    return quiet(pipe)


def run(pipe, labels=(0, 1), **more):
    call = {"num_inference_steps": STEPS, "generator": seeded(0), "output_type": "latent", **more}
    return pipe(list(labels), **call).images


def scheduler_of(name: str, **more) -> Any:
    kind = getattr(diffusers, f"{name}Scheduler")
    if name == "PNDM":
        more["skip_prk_steps"] = True
    if "clip_sample" in kind().config:
        more["clip_sample"] = False
    return kind(**more)


# a pipeline hands its scheduler more, or less, than these want
NOT_ON_IT = ("CogVideoXDPM",)
EACH = [name for name in SUPPORTED if name not in NOT_ON_IT]


# --- the engine's kernel, and every solver's own -----------------------------------------------


FAMILIES = {
    "flux": (flux, {}),
    "sd3": (stable_diffusion_3, {}),
    "sd15": (stable_diffusion, {}),
    "sdxl": (stable_diffusion_xl, {}),
    "label": (
        lambda: LabelPipeline(
            pixel_pipeline(DDIMScheduler(), classes=4).unet, FlowMatchEulerDiscreteScheduler()
        ),
        {},
    ),
    "v": (lambda: stable_diffusion(DDIMScheduler(prediction_type="v_prediction", clip_sample=False)), {}),
    "x0": (lambda: stable_diffusion(DDIMScheduler(prediction_type="sample", clip_sample=False)), {}),
    "v exploding": (lambda: stable_diffusion(EulerDiscreteScheduler(prediction_type="v_prediction")), {}),
}  # fmt: skip


@pytest.mark.parametrize("jacobian", ["skip", "full"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_steered_pipeline_is_the_guided_chain_of_the_engine(family, jacobian):
    pipe = quiet(FAMILIES[family][0]())
    prompts = [1] if family == "label" else ["a red fox"]
    model = from_pipeline(pipe, prompts, steps=STEPS, eta=0.0)
    process: Any = model.process
    guidance = FlowChef(target(process.shape), step=0.4, jacobian=jacobian, window=(0.2, 0.9))
    quietly = {"progress": False, "weights": "none"}
    chain = sample(model, guidance.reward, Ancestral(1), guidance=guidance, **quietly)
    key = child_key(root_key(0, torch.zeros(1, dtype=torch.int64)), 0)
    # what a pipeline is handed is standard normal
    more = {"latents": process.prior(key) / process.prior_std, "output_type": "pt"}
    with steer(pipe, guidance):
        steered = pipe(prompts, num_inference_steps=STEPS, **more).images
    plain = pipe(prompts, num_inference_steps=STEPS, **more).images
    # float32 over a whole chain of random networks, as for native adapters unguided
    torch.testing.assert_close(steered[0], chain.items[0], rtol=0, atol=1e-4)
    assert (steered - plain).abs().max() > 0.02


@pytest.mark.parametrize("name", EACH)
def test_every_solver_arrives_and_leaves_the_rest_alone(name):
    """Inside a mask the residual falls a thousandfold; outside, where the network's output does not
    depend on what is inside, the sample is the plain one to the bit."""
    pipe = pointwise(scheduler_of(name))
    reward = target((1, 4, 4))
    plain = run(pipe)
    with steer(pipe, FlowChef(reward, step=0.0)):
        assert torch.equal(run(pipe), plain)
    with steer(pipe, FlowChef(reward, step=0.9)):
        steered = run(pipe)
    assert reward.left(steered) < 1e-3 * reward.left(plain)
    assert torch.equal(steered[..., 2:], plain[..., 2:])
    assert torch.equal(run(pipe), plain)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", [n for n in EACH if n not in FLOWS])
def test_the_first_step_of_every_solver_goes_as_far_as_the_kernel_says(
    name, prediction, monkeypatch
):
    """All begin with a step of first order, which goes carry · d, whatever the network puts out; d
    is `step` of the residual of the guess."""
    scheduler = scheduler_of(name, prediction_type=prediction)
    kind, guesses, made = type(scheduler), list[Tensor](), list[Tensor]()
    own = kind.step

    @functools.wraps(own)
    def spied(self, *args, **kwargs):
        stepped = own(self, *args, **kwargs)
        made.append(stepped[0])
        return stepped

    class Seeing(Target):
        def __call__(self, x, prompts):
            guesses.append(x.detach())
            return super().__call__(x, prompts)

    monkeypatch.setattr(kind, "step", spied)
    pipe, reward = pointwise(scheduler), Seeing(torch.full((1, 4, 4), 0.5), torch.ones(1, 4, 4))
    run(pipe)
    plain = made[0]
    made.clear()
    with steer(pipe, FlowChef(reward, step=0.3)):
        run(pipe)
    guess = guesses[1]  # the first look is before the network's
    solver = Solver.of(scheduler, (1, 4, 4), eta_of(scheduler, name, None), "cpu")
    carry = float(solver.process.carry(torch.tensor([0]))) * solver.scale(1)
    # float32, with states up to init_noise_sigma = 15
    torch.testing.assert_close(made[0] - plain, carry * 0.3 * (0.5 - guess), rtol=1e-3, atol=2e-5)


# --- what it is asked, and what it leaves ------------------------------------------------------


def latents_of(pipe, *args, **kwargs) -> Tensor:
    """Final latents, also of a pipeline that does not give them."""
    seen: list[Tensor] = []
    decode = pipe.vae.decode
    pipe.vae.decode = lambda z, **more: (seen.append(z), decode(z, **more))[1]
    try:
        pipe(*args, num_inference_steps=STEPS, **kwargs)
    finally:
        del pipe.vae.decode
    return seen[0] * pipe.vae.config.scaling_factor


def test_dit_which_steps_its_guidance_along_is_steered_once():
    pipe = dit()
    reward = target((4, 8, 8))
    plain = latents_of(pipe, [3, 7], generator=seeded(0))
    for jacobian in ("skip", "full"):
        with steer(pipe, FlowChef(reward, step=0.9, jacobian=jacobian)):
            assert reward.left(latents_of(pipe, [3, 7], generator=seeded(0))) < 1e-3 * reward.left(
                plain
            )
    with steer(pipe, FlowChef(reward, step=0.0)):
        assert torch.equal(latents_of(pipe, [3, 7], generator=seeded(0)), plain)


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


def of(pipe) -> tuple:
    """All of a pipeline but its scheduler's grid and history, which every call sets."""
    networks = {n: m for n, m in pipe.components.items() if isinstance(m, torch.nn.Module)}
    return (
        type(pipe),
        dict(vars(pipe)),
        {n: type(part) for n, part in pipe.components.items()},
        {n: dict(pipe.scheduler.config) for n in ["config"]},
        sorted(vars(pipe.scheduler)),
        {n: [w.requires_grad for w in m.parameters()] for n, m in networks.items()},
        {n: [len(s._forward_pre_hooks) for s in m.modules()] for n, m in networks.items()},
        {n: m.training for n, m in networks.items()},
    )


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


# --- what cannot be ----------------------------------------------------------------------------


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
        (FlowChef(about(Shapeless)), ValueError, r"reward Shapeless returned \[\] for 2 items at step 0"),
        (FlowChef(about(Detached)), TypeError, "reward Detached has no gradient at step 0 of 6"),
        (FlowChef(measure(lambda x: x, torch.zeros(2, 3), space="states")), TypeError, "y has shape"),
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
    with steer(pipe, guidance), pytest.raises(ValueError, match="exchanged inside the block"):
        pipe.scheduler = DDIMScheduler()
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
    with (
        steer(stable_diffusion(), FlowChef(Watching())) as sd,
        pytest.raises(ValueError, match="3 states for 2 prompts"),
    ):
        sd(["a", "b"], latents=torch.zeros(3, 4, 8, 8), num_inference_steps=2)


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


def test_the_true_gradient_steers_by_another_word():
    pipe, reward = pointwise(FlowMatchEulerDiscreteScheduler()), target((1, 4, 4))
    plain = run(pipe)
    with steer(pipe, DPS(reward)):
        assert reward.left(run(pipe)) < reward.left(plain) / 2
