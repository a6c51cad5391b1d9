"""Guided steps on the engine: what they cost, and what happens when one of them fails."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from samplers import SMC, Ancestral, BestOfN, Importance, TreeSampling, load, sample
from steering import FlowChef
from tests.exact import gaussian_chain

QUIET = {"progress": False}
WARNS = pytest.mark.filterwarnings("ignore:guidance is off at steps")


@dataclass
class Near:
    """-|x - y|², which counts its calls and can be made to fail."""

    y: float = 1.0
    differentiable: bool = True
    least_squares: bool = True
    floor: float = 0.0
    fails: object = lambda x: False
    seen: int = 0

    def __call__(self, x: Tensor, prompts) -> Tensor:
        self.seen += len(x)
        if self.fails(x):
            raise RuntimeError("not this one")
        return -(x - self.y).square().sum(1)


def hooked(model):
    """The model's denoiser, which notes the rows of every call."""
    rows: list[int] = []
    network = type(model.denoiser).__call__

    class Noted(type(model.denoiser)):
        fills = False

        def __call__(self, x, t, row):
            rows.append(len(x))
            return network(self, x, t, row)

    object.__setattr__(model.denoiser, "__class__", Noted)
    return rows


@WARNS
@pytest.mark.parametrize("jacobian", ["skip", "full"])
@pytest.mark.parametrize("sampler", [SMC(8, levels=(1, 3)), TreeSampling(), Importance()])
def test_rows_counted_are_rows_that_the_network_saw(sampler, jacobian):
    model = gaussian_chain(steps=6, dim=2, conditions=2)
    seen = hooked(model)
    guidance = FlowChef(step=0.02, jacobian=jacobian)
    run = sample(model, Near(), sampler, nfe=300, guidance=guidance, lam=0.3, **QUIET)
    assert int(run.spent.rows.sum()) == sum(seen)
    assert (run.spent.rows <= 300).all()
    assert (run.spent.backward > 0) == (jacobian == "full")


@WARNS
def test_a_look_is_the_first_row_of_a_guided_walk_where_the_network_is_not_differentiated():
    model = gaussian_chain(steps=6, dim=2)
    sampler = SMC(10, levels=(2, 4))
    skipped = sample(model, Near(), sampler, guidance=FlowChef(step=0.02), **QUIET)
    assert int(skipped.spent.rows.sum()) == 60
    guidance = FlowChef(step=0.02, jacobian="full")
    full = sample(model, Near(), sampler, guidance=guidance, **QUIET)
    assert int(full.spent.rows.sum()) == 80


@pytest.mark.parametrize("jacobian", ["skip", "full"])
@pytest.mark.parametrize("holds", [1, 3, 7])
def test_a_guided_step_that_runs_out_of_memory_is_taken_in_parts(jacobian, holds):
    model = gaussian_chain(steps=4, dim=2)
    guidance = FlowChef(step=0.1, jacobian=jacobian)
    whole = sample(model, Near(), Ancestral(16), guidance=guidance, weights="none", **QUIET)

    class Small(Near):
        def __call__(self, x, prompts):
            if x.requires_grad and len(x) > holds:
                raise torch.OutOfMemoryError
            return super().__call__(x, prompts)

    parts = sample(model, Small(), Ancestral(16), guidance=guidance, weights="none", **QUIET)
    # the arithmetic of an affine denoiser is by row
    assert torch.equal(whole.items, parts.items)
    assert int(parts.spent.rows.sum()) == int(whole.spent.rows.sum()) == 64


def test_a_reward_that_raises_in_a_guided_step_loses_that_walk_alone(tmp_path):
    model = gaussian_chain(steps=4, dim=1)
    seen = hooked(model)
    reward = Near(fails=lambda x: bool((x.detach() > 0.4).any()))
    run = sample(
        model, reward, Ancestral(40), guidance=FlowChef(step=0.05), weights="none",
        record=tmp_path / "run", **QUIET,
    )  # fmt: skip
    assert 0 < run.failed < 40
    assert int(run.spent.rows.sum()) == 160
    # four calls, and halves and halves again for each walk when it is lost, but not after that
    assert len(seen) < 4 + 2 * 6 * run.failed
    again = load(tmp_path / "run", model, reward, guidance=FlowChef(step=0.05))
    assert torch.equal(again.spent.rows, run.spent.rows)
    assert run.distinct == 40 - run.failed
    assert "not this one" in run.spent.first_error
    with pytest.raises(RuntimeError, match="not this one"):
        sample(model, reward, Ancestral(40), guidance=FlowChef(step=0.05), weights="none",
               on_error="raise", **QUIET)  # fmt: skip


def test_a_gradient_that_is_not_finite_fails_its_walk():
    model = gaussian_chain(steps=4, dim=1)

    def root(x, prompts):
        value, high = x[:, 0].clone(), x[:, 0].detach() > 0.4
        value[high] += (value[high] - value[high].detach()).sqrt()  # adds 0, with infinite slope
        return value

    run = sample(model, root, Ancestral(40), guidance=FlowChef(step=0.01), weights="none", **QUIET)
    assert 0 < run.failed < 40
    assert "not finite" in run.spent.first_error
    with pytest.raises(ValueError, match="FlowChef: a guided step"):
        sample(model, root, Ancestral(40), guidance=FlowChef(step=0.01), weights="none",
               on_error="raise", **QUIET)  # fmt: skip


def test_a_guidance_follows_its_own_reward_where_it_has_one():
    model = gaussian_chain(steps=6, dim=1)

    def low(x, prompts):
        return -x[:, 0]

    guidance = FlowChef(Near(y=3.0), step=1.0)
    run = sample(model, low, Ancestral(30), guidance=guidance, weights="none", **QUIET)
    assert (run.items - 3.0).abs().max() < 1e-5  # the last step ends on the measurement
    assert run.rewards.max() < -2.99


def test_a_reward_of_states_is_asked_about_states():
    model = replace(gaussian_chain(steps=6, dim=1), decode=lambda x: x * 0 + 7)
    reward = Near(y=3.0)
    reward.of_states = True
    guidance = FlowChef(reward, step=1.0)
    run = sample(
        model, lambda x, _: x[:, 0], Ancestral(4), guidance=guidance, weights="none", **QUIET
    )
    states = run._engine.states(run.ids.tolist())
    assert (states - 3.0).abs().max() < 1e-5


def test_a_reward_of_states_may_be_the_runs_own():
    model = replace(gaussian_chain(steps=6, dim=1), decode=lambda x: x * 0 + 7)
    reward = Near(y=3.0)
    reward.of_states = True
    run = sample(model, reward, BestOfN(6), guidance=FlowChef(step=1.0), weights="none", **QUIET)
    assert (run.rewards.abs() < 1e-8).all()


@pytest.mark.parametrize("weights", ["exact", "none"])
def test_on_an_ode_a_guidance_needs_no_weights(weights):
    model = gaussian_chain(steps=6, dim=1, eta=0.0)
    guidance = FlowChef(step=1.0)
    if weights == "exact":
        with pytest.raises(ValueError, match="draws noise"):
            sample(model, Near(), BestOfN(4), guidance=guidance, **QUIET)
        return
    run = sample(model, Near(), BestOfN(4), guidance=guidance, weights="none", **QUIET)
    assert (run.items - 1.0).abs().max() < 1e-5
    assert run.biased


def test_a_guidance_that_asks_more_than_it_said_is_wrong_and_no_walk_has_failed():
    class Greedy(FlowChef):
        def propose(self, step):
            step.denoise(step.x + 0, step.i, step.row)
            return super().propose(step)

    with pytest.raises(RuntimeError, match=r"Greedy took 8 network rows .* promises 4"):
        sample(gaussian_chain(steps=4, dim=1), Near(), Ancestral(4), guidance=Greedy(),
               weights="none", **QUIET)  # fmt: skip


def test_items_that_a_guidance_asks_about_are_counted_apart():
    model, reward = gaussian_chain(steps=5, dim=1), Near()
    guidance = FlowChef(step=0.1, inner=3)
    run = sample(model, reward, BestOfN(), reward_calls=8, guidance=guidance, weights="none",
                 **QUIET)  # fmt: skip
    assert run.spent.guided == 8 * 5 * 3
    assert int(run.spent.reward_calls.sum()) == 8
    assert reward.seen == 8 + 120 + 3  # the last in one step that is tried before the first row
    assert "8 reward calls and 120 for guidance" in str(run)
