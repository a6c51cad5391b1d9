"""Students of one to four steps: every sampler works on them, or says which other one does."""

import diffusers
import pytest
import torch

from samplers import (
    SMC,
    SVDD,
    Ancestral,
    Beam,
    BestOfN,
    Importance,
    TreeSampling,
    TreeSearch,
    Widening,
    ZeroOrder,
    advise,
    sample,
)
from steering import from_pipeline
from tests.exact import gaussian_chain, tilted
from tests.exact.estimates import average, tilted_moments
from tests.tiny_pipelines import stable_diffusion, stable_diffusion_3

QUIET = {"progress": False}
COMPARE = (SMC(), SVDD(proposals=2), Beam(proposals=2))  # need a level with noise after it
ALONE = (Ancestral(), BestOfN(), Importance(), ZeroOrder())
TREES = (TreeSampling(branch="even"), TreeSampling(), TreeSearch(), TreeSearch(branch=(0,)))


def lcm():
    return stable_diffusion(diffusers.LCMScheduler(steps_offset=1), guidance_embedding=8)


def tcd():
    return stable_diffusion(diffusers.TCDScheduler(steps_offset=1))


def turbo():
    scheduler = diffusers.EulerAncestralDiscreteScheduler(
        beta_schedule="scaled_linear", timestep_spacing="trailing", steps_offset=1
    )
    return stable_diffusion(scheduler)


def turbo_ode():
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_schedule="scaled_linear", timestep_spacing="trailing", steps_offset=1
    )
    return stable_diffusion(scheduler)


def schnell():
    return stable_diffusion_3(diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0))


FAMILIES = (lcm, tcd, turbo, schnell)


def brightness(images, prompts):
    return images.mean((1, 2, 3))


def student(family, steps, **how):
    """Two prompts, one network row a step, as students are run."""
    scale = 8.0 if family is lcm else 0.0
    return from_pipeline(family(), ["cat", "dog"], steps=steps, guidance_scale=scale, **how)


@pytest.mark.parametrize("family", FAMILIES)
def test_four_steps_are_enough_for_every_sampler(family):
    model = student(family, 4)
    assert model.process.stochastic.tolist() == [True] * 3 + [False]
    for sampler in (*ALONE, *COMPARE, *TREES):
        run = sample(model, brightness, sampler, nfe=64, draws=3, **QUIET)
        # to the last unit that fits; a tree counts what its walks share
        assert (run.spent.rows > 64 - 4).all(), sampler
        assert (run.spent.rows <= 64).all(), sampler
        assert run.finished.all()
        assert run.items.isfinite().all()
        assert set(run.rows.tolist()) == {0, 1}
        assert torch.allclose(brightness(run.items, None).double(), run.rewards, atol=1e-5)


@pytest.mark.parametrize("family", [*FAMILIES, turbo_ode])
def test_one_step_is_searched_by_its_noise_alone(family):
    model = student(family, 1)
    assert model.process.stochastic.tolist() == [False]
    for sampler in (*ALONE, *TREES):
        run = sample(model, brightness, sampler, nfe=40, **QUIET)
        assert run.spent.rows.tolist() == [40, 40], sampler
        assert run.found.tolist() == [40, 40]
    for sampler in COMPARE:
        name = type(sampler).__name__
        with pytest.raises(ValueError, match=rf"{name} finds no level .* BestOfN, ZeroOrder"):
            sample(model, brightness, sampler, nfe=40, **QUIET)


def test_two_steps_have_no_choice_that_noise_follows():
    model = student(lcm, 2)
    assert model.process.stochastic.tolist() == [True, False]
    for sampler in COMPARE:
        with pytest.raises(ValueError, match="finds no level"):
            sample(model, brightness, sampler, nfe=40, **QUIET)
    assert sample(model, brightness, TreeSearch(branch=(0,)), nfe=40, **QUIET).found.sum() == 40


@pytest.mark.parametrize("steps", [1, 4])
def test_advice_can_be_had_of_a_student(steps):
    advice = advise(student(lcm, steps), brightness, nfe=400, goal="best", progress=False)
    assert advice.nfe + advice.pilot_rows == 400
    if steps == 1:
        assert advice.sampler == BestOfN()


def test_climbing_over_a_one_step_student_beats_chance():
    """Two prompts, three seeds, 150 walks each: ahead in all six by more than rounding."""
    model = student(turbo_ode, 1)
    for seed in range(3):
        best = [
            sample(model, brightness, s, nfe=150, draws=1, seed=seed, **QUIET).rewards
            for s in (ZeroOrder(), BestOfN())
        ]
        assert (best[0] > best[1] + 1e-3).all()


@pytest.mark.parametrize(
    "sampler",
    [
        Importance(120),
        SMC(40, levels=(1, 2), ess=1.0),
        SMC(40),
        SVDD(20, 3),
        TreeSampling(branch=(0, 1, 2), widening=Widening(1.0, 0.5)),
    ],
)
def test_four_re_noised_steps_follow_the_tilted_law(sampler):
    """The chain of a student, with a guess that is affine: its law is known. 80 repetitions."""
    model = gaussian_chain(0.3, 1.0, steps=4, kind="student", conditions=80)
    new_mean, new_var, log_z = tilted(*model.denoiser.law(), 0.8)
    limit = {"nfe": 400} if isinstance(sampler, TreeSampling) else {}
    run = sample(
        model, lambda x, _: x[:, 0], sampler, lam=0.8, seed=2, batch=4096, **limit, **QUIET
    )
    estimate, error = average((run.log_z - log_z).exp())
    assert abs(estimate - 1) < 3 * error < 0.08
    found = tilted_moments(run, log_z)
    for name, truth in (("mean", float(new_mean)), ("var", float(new_var))):
        estimate, error = found[name]
        assert abs(estimate - truth) < 3 * error < 0.08
