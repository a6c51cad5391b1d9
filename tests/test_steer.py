"""Pipelines under `steer` do what the engine does, by every solver, on every kind of state."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor

from samplers import Ancestral, sample
from steering import DPS, FlowChef, from_pipeline, steer
from steering.models.label_pipeline import LabelPipeline
from steering.noise import child_key, root_key
from steering.pipelines.schedulers import FLOWS, SUPPORTED
from steering.pipelines.steered.solver import Solver, eta_of
from tests.steered import (
    STEPS,
    Pointwise,
    Target,
    latents_of,
    pointwise,
    run,
    scheduler_of,
    seeded,
    target,
)
from tests.tiny_pipelines import (
    dit,
    flux,
    pixel_pipeline,
    quiet,
    stable_diffusion,
    stable_diffusion_3,
    stable_diffusion_xl,
)

# a pipeline hands its scheduler more, or less, than these want
NOT_ON_IT = ("CogVideoXDPM",)
EACH = [name for name in SUPPORTED if name not in NOT_ON_IT]


FAMILIES = {
    "flux": flux,
    "sd3": stable_diffusion_3,
    "sd15": stable_diffusion,
    "sdxl": stable_diffusion_xl,
    "label": lambda: LabelPipeline(
        pixel_pipeline(DDIMScheduler(), classes=4).unet, FlowMatchEulerDiscreteScheduler()
    ),
    "v": lambda: stable_diffusion(scheduler_of("DDIM", prediction_type="v_prediction")),
    "x0": lambda: stable_diffusion(scheduler_of("DDIM", prediction_type="sample")),
    "v exploding": lambda: stable_diffusion(
        scheduler_of("EulerDiscrete", prediction_type="v_prediction")
    ),
}


@pytest.mark.parametrize("jacobian", ["skip", "full"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_steered_pipeline_is_the_guided_chain_of_the_engine(family, jacobian):
    pipe = quiet(FAMILIES[family]())
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


FLOWING = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "solver_order": 1}
ON_A_LINE = {
    "FlowMatchEulerDiscrete": {},
    "FlowMatchHeunDiscrete": {},
    "DPMSolverMultistep": FLOWING,
    "UniPCMultistep": FLOWING,  # which corrects each state from the one before
}


@pytest.mark.parametrize("name", list(ON_A_LINE))
def test_on_a_straight_flow_each_step_removes_its_share_once(name):
    """T steps leave (1 - step)^T of the residual, whatever stages and corrections a solver has; the
    reward is asked once a step, and once before the first."""
    noise, point = torch.linspace(-2, 2, 16).view(1, 1, 4, 4), torch.full((1, 1, 4, 4), 0.5)

    class Line(Pointwise):
        def forward(self, x, t, labels, return_dict=False):
            return (noise - point,)

    class Counting(Target):
        def __call__(self, x, prompts):
            counted.append(len(x))
            return super().__call__(x, prompts)

    counted: list[int] = []
    pipe = pointwise(scheduler_of(name, **ON_A_LINE[name]))
    pipe.unet = Line()
    reward = Counting(torch.full((1, 4, 4), 3.0), torch.ones(1, 4, 4))
    plain = run(pipe, (0,), latents=noise)
    with steer(pipe, FlowChef(reward, step=0.3)):
        steered = run(pipe, (0,), latents=noise)
    # float32, six steps, values up to 3
    torch.testing.assert_close(3 - steered, 0.7**STEPS * (3 - plain), rtol=0, atol=1e-5)
    assert len(counted) == STEPS + 1


@pytest.mark.parametrize("name", ["HeunDiscrete", "PNDM", "DPMSolverSinglestep"])
def test_further_stages_of_a_step_are_not_bent(name):
    scheduler, counted = scheduler_of(name), list[int]()

    class Counting(Target):
        def __call__(self, x, prompts):
            counted.append(len(x))
            return super().__call__(x, prompts)

    pipe = pointwise(scheduler)
    with steer(pipe, FlowChef(Counting(torch.zeros(1, 4, 4), torch.ones(1, 4, 4)))):
        run(pipe)
    blocks = {"HeunDiscrete": STEPS, "PNDM": STEPS, "DPMSolverSinglestep": 4}  # of 1, 2, 1, 2, 1, 1
    assert len(counted) == blocks[name] + 1
    assert pipe.unet.calls == {"HeunDiscrete": 11, "PNDM": 7, "DPMSolverSinglestep": 6}[name]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", [n for n in EACH if n not in FLOWS])
def test_the_first_step_of_every_solver_goes_as_far_as_the_kernel_says(
    name, prediction, monkeypatch
):
    """All begin with a step of first order, which goes carry · d, whatever the network puts out; d
    is `step` of the residual of the guess."""
    if prediction == "sample" and name in ("PNDM", "EulerAncestralDiscrete"):
        pytest.skip("diffusers has none")
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


def test_the_true_gradient_steers_by_another_word():
    pipe, reward = pointwise(FlowMatchEulerDiscreteScheduler()), target((1, 4, 4))
    plain = run(pipe)
    with steer(pipe, DPS(reward)):
        assert reward.left(run(pipe)) < reward.left(plain) / 2


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
