"""FlowEdit against closed forms: point masses, Gaussians, and a copy of its algorithm."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from samplers import Ancestral, BestOfN, sample
from steering import flow_edit
from steering.core import Model
from steering.gaussian import flow, vp
from steering.noise import child_key, normal, root_key
from tests.editing.gaussians import Gaussians

D, T = (2, 4), 10
SOURCE = torch.linspace(-2, 2, 8).view(D)
SIGMA = torch.tensor([1, 0.95, 0.8, 0.7, 0.55, 0.5, 0.4, 0.25, 0.2, 0.1, 0], dtype=torch.float64)


def nothing(items, prompts):
    return items.new_zeros(len(items))


def gaussians(mean=(-1.0, 2.0), spread=(0.5, 0.5), steps=None, eta=1.0) -> Model:
    levels = SIGMA if steps is None else torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    process = flow(D, levels, eta=eta)
    return Model(Gaussians(process, mean, spread), process, prompts=("cat", "dog"), name="two")


def edited(model, n=1, source=SOURCE, **options) -> Tensor:
    made = flow_edit(model, source, **{"from_row": 0, "to_row": 1, **options})
    return sample(made, nothing, Ancestral(n), progress=False).items


@pytest.mark.parametrize("start", [0.0, 0.3, 0.9])
def test_an_edit_to_the_same_condition_returns_the_source(start):
    # to float32 rounding in each of ten steps, values up to 2
    found = edited(gaussians(), from_row=1, to_row=1, start=start)
    torch.testing.assert_close(found[0], SOURCE, rtol=0, atol=1e-6)


@pytest.mark.parametrize("start", [0.0, 0.3, 0.9])
def test_point_masses_are_exchanged(start):
    found = edited(gaussians(spread=(0.0, 0.0)), start=start)
    torch.testing.assert_close(found[0], SOURCE + 3.0, rtol=0, atol=3e-6)


def test_from_the_very_noise_gaussians_of_one_spread_are_shifted_by_their_means():
    """z - x_s = (1 - sigma)(m_t - m_s) solves the ODE, and Euler's steps follow a line exactly."""
    torch.testing.assert_close(edited(gaussians(), start=0.0)[0], SOURCE + 3.0, rtol=0, atol=5e-6)


def test_a_later_start_shifts_less_as_the_ode_has_it():
    """With V = alpha² s² + sigma², the ODE gives z - x_s = (alpha - alpha_0 sqrt(V / V_0)) · d at
    each level, so that 1 - alpha_0 s / sqrt(V_0) of the way is gone; Euler errs by 1/T."""
    alpha, s = 0.3, 0.5
    share = 1 - alpha * s / (alpha**2 * s**2 + 0.7**2) ** 0.5
    gaps = []
    for steps in (100, 200):
        found = edited(gaussians(steps=steps), start=0.3)[0]
        gaps.append(float((found - SOURCE - 3.0 * share).abs().max()))
    assert gaps[0] < 0.02
    assert gaps[1] < 0.6 * gaps[0]


@pytest.mark.parametrize("averages", [1, 3])
def test_it_is_the_published_algorithm(averages):
    """In velocities, as it is written, step by step; spreads differ, so that the noise matters."""
    model = gaussians(spread=(0.4, 1.2))
    found = edited(model, start=0.3, averages=averages, seed=5)[0]
    z, key = SOURCE[None], root_key(5, torch.zeros(1, dtype=torch.int64))
    for step in range(3, T):
        sigma, after = float(SIGMA[step]), float(SIGMA[step + 1])
        velocity = torch.zeros(1, *D)
        for k in range(averages):
            noise = normal(child_key(key, (step - 3) * averages + k), D)
            z_s = (1 - sigma) * SOURCE + sigma * noise
            z_t = z + z_s - SOURCE
            t = torch.tensor([float(step)])
            v_t, v_s = (
                (at - model.denoiser(at, t, torch.tensor([row]))) / sigma
                for at, row in ((z_t, 1), (z_s, 0))
            )
            velocity = velocity + (v_t - v_s) / averages
        z = z + (after - sigma) * velocity
    torch.testing.assert_close(found, z[0], rtol=0, atol=5e-6)
    assert (edited(model, start=0.3, averages=averages, seed=6)[0] - found).abs().max() > 0.01


def test_a_step_costs_the_calls_of_both_conditions():
    model = gaussians()
    model.denoiser.cost = torch.tensor([1, 2])
    made = flow_edit(model, SOURCE, from_row=0, to_row=1, start=0.3, averages=2)
    run = sample(made, nothing, Ancestral(2), progress=False)
    assert run.spent.rows.tolist() == [2 * 7 * 2 * 3]
    assert model.denoiser.asked == 2 * 7 * 2 * 2
    assert not made.process.stochastic.any()  # whatever the model's own chain draws


def test_several_edits_at_once_are_those_of_each_alone_but_for_their_noise():
    model = gaussians(spread=(0.5, 0.5))  # of equal spread: noise plays no part
    sources = torch.stack([SOURCE, -SOURCE, SOURCE + 1])
    both = flow_edit(model, sources, from_row=[0, 1, 1], to_row=[1, 0, 1])
    found = sample(both, nothing, Ancestral(1), progress=False).items
    for k, (before, after) in enumerate([(0, 1), (1, 0), (1, 1)]):
        alone = edited(model, source=sources[k], from_row=before, to_row=after)[0]
        torch.testing.assert_close(found[k], alone, rtol=0, atol=1e-6)
    assert both.prompts == ("dog", "cat", "dog")


def test_results_of_one_image_differ_by_row_and_not_by_walk():
    model = gaussians(spread=(0.4, 1.2))
    made = flow_edit(model, SOURCE, from_row=0, to_row=[1] * 4)
    run = sample(made, nothing, Ancestral(2), progress=False)
    for row in range(4):
        pair = run.items[run.rows == row]
        torch.testing.assert_close(pair[0], pair[1], rtol=0, atol=1e-6)
    assert torch.pdist(run.items[::2].flatten(1)).min() > 0.1
    best = sample(made, lambda items, prompts: items.sum((1, 2)), BestOfN(1), progress=False)
    assert best.rewards.max() > best.rewards.min()


def test_what_else_the_model_is_carries_over():
    model = replace(gaussians(), decode=lambda x: x + 1, preview=lambda x: x, about="native")
    made = flow_edit(model, SOURCE, from_row=0, to_row=1)
    assert (made.decode, made.preview) == (model.decode, model.preview)
    assert (made.device, made.prompts) == (model.device, ("dog",))
    assert "two" in made.name
    assert "native" in made.about
    assert made.name != flow_edit(model, SOURCE + 1, from_row=0, to_row=1).name
    assert made.process.steps == 7


BAD = {
    "from_row": {"from_row": 2},
    "from_row-float": {"from_row": 0.0},
    "to_row": {"to_row": [1, -1]},
    "to_row-count": {"to_row": [1, 1, 0], "from_row": [0, 0]},
    "source": {"source": SOURCE[0]},
    "source-count": {"source": SOURCE.expand(3, *D), "to_row": [1, 1]},
    "source-list": {"source": [1.0]},
    "source-nan": {"source": SOURCE / 0},
    "start": {"start": 1.0},
    "start-all": {"start": 0.99},
    "averages": {"averages": 0},
    "seed": {"seed": 0.5},
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_edit_is_refused_before_the_first_row(case):
    model = gaussians()
    with pytest.raises((ValueError, TypeError), match=case.partition("-")[0]):
        flow_edit(model, **{"source": SOURCE, "from_row": 0, "to_row": 1, **BAD[case]})
    assert model.denoiser.asked == 0


def test_what_is_no_flow_is_refused():
    process = vp(D, torch.linspace(0.01, 1, 6, dtype=torch.float64))
    model = Model(Gaussians(process, (0.0, 1.0), (0.5, 0.5)), process, prompts=("a", "b"))
    with pytest.raises(ValueError, match="no rectified flow"):
        flow_edit(model, SOURCE, from_row=0, to_row=1)
