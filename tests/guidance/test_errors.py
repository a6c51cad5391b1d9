"""What a guidance cannot do is one clear error, before the first network row."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from samplers import SMC, BestOfN, Importance, sample
from steering import (
    FlowChef,
    Twist,
    flow_edit,
    from_pipeline,
    jacobian_cosine,
    measure,
    operators,
    steer,
    zoo,
)
from steering.guidance.bend import window_steps
from tests.brownian import brownian
from tests.exact import gaussian_chain


def rising(x, prompts):
    return x[:, 0]


def run(guidance, reward=rising, **changed):
    model = replace(gaussian_chain(steps=6, dim=2), **changed.pop("model", {}))

    class Silent(type(model.denoiser)):
        def __call__(self, x, t, row):
            raise AssertionError("the network was called")

    object.__setattr__(model.denoiser, "__class__", Silent)
    settings = {"sampler": Importance(), "nfe": 60, "progress": False, **changed}
    return sample(model, reward, guidance=guidance, **settings)


def ode():
    return {"process": gaussian_chain(steps=6, dim=2, eta=0.0).process}


RUNS = {
    "class": (lambda: run(FlowChef), TypeError, "guidance=FlowChef is a class"),
    "shape": (lambda: run(FlowChef(), lambda x, p: x), ValueError, r"returned \[1, 2\] for 1 item"),
    "list": (lambda: run(FlowChef(), lambda x, p: [0.0]), ValueError, "returned list for 1 item"),
    "no-gradient": (
        lambda: run(FlowChef(), lambda x, p: x[:, 0].detach()),
        TypeError,
        "has no gradient, and FlowChef follows it",
    ),
    "polyak": (lambda: run(FlowChef(rule="polyak")), ValueError, "rule='polyak' is for rewards"),
    "other-shape": (
        lambda: run(FlowChef(measure(operators.Box(1), torch.zeros(3, 4, 4)))),
        TypeError,
        "Box",
    ),
    "weights-on-an-ode": (
        lambda: run(FlowChef(), model=ode(), sampler=BestOfN()),
        ValueError,
        "weights='exact' needs a step that draws noise",
    ),
    "resampler-on-an-ode": (
        lambda: run(FlowChef(), model=ode(), sampler=SMC(4), weights="none"),
        ValueError,
        "SMC finds no level",
    ),
    "empty-window": (
        lambda: run(FlowChef(window=(0.0, 0.1))),
        ValueError,
        r"window=\(0.0, 0.1\) of FlowChef holds none of 6 steps",
    ),
    "twist-on-an-ode": (
        lambda: run(Twist(), model=ode(), sampler=BestOfN(), weights="none"),
        ValueError,
        "Twist moves a step by its own noise",
    ),
    "step": (lambda: FlowChef(step=-1), ValueError, "step=-1"),
    "step-nan": (lambda: FlowChef(step=float("nan")), ValueError, "step=nan"),
    "window": (lambda: FlowChef(window=(0.8, 0.2)), ValueError, r"window=\(0.8, 0.2\)"),
    "inner": (lambda: FlowChef(inner=0), ValueError, "inner=0"),
    "inner-full": (lambda: FlowChef(inner=2, jacobian="full"), ValueError, "inner=2"),
    "rule": (lambda: FlowChef(rule="sgd"), ValueError, "rule='sgd' is unknown"),
    "jacobian": (lambda: FlowChef(jacobian="half"), ValueError, "jacobian='half'"),
    "published": (lambda: FlowChef.published("sudoku"), ValueError, "task='sudoku'"),
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.filterwarnings("ignore:guidance is off at steps")
def test_one_clear_error(name):
    call, kind, message = RUNS[name]
    with pytest.raises(kind, match=message):
        call()


def test_a_chain_that_is_not_gaussian_is_named():
    model = brownian()
    with pytest.raises(TypeError, match="Gaussian chain"):
        sample(model, rising, BestOfN(4), guidance=FlowChef(), progress=False)
    assert model.denoiser.rows_seen == []


def test_a_window_written_as_steps_out_of_steps_holds_them_all():
    lost = [(k, n) for n in range(1, 101) for k in range(1, n + 1)
            if window_steps((0.0, k / n), n) != (0, k)]  # fmt: skip
    assert not lost
    assert int(29 / 100 * 100) == 28  # which is what rounding down alone makes of it


@pytest.mark.parametrize("call", [
    lambda model: jacobian_cosine(object(), rising),
    lambda model: flow_edit(object(), torch.zeros(2), from_row=0, to_row=0),
    lambda model: steer(model, FlowChef(rising)).__enter__(),
    lambda model: jacobian_cosine(model, lambda x, p: x[:, 0].detach(), samples=1),
    lambda model: sample(model, rising, BestOfN(2), guidance=FlowChef(0.5)),
])  # fmt: skip
def test_what_is_no_model_or_reward_is_named(call):
    with pytest.raises(
        (TypeError, ValueError), match=r"model is a|pipe is a|has no gradient|reward of"
    ):
        call(gaussian_chain(steps=3))


@pytest.mark.parametrize("images", [
    255 * torch.ones(1, 1, 28, 28), torch.zeros(1, 1, 28, 28, dtype=torch.uint8),
    torch.zeros(1, 1, 32, 32), torch.zeros(1, 3, 28, 28), [1],
], ids=["range", "bytes", "size", "channels", "list"])  # fmt: skip
def test_images_that_are_none_of_the_models_are_not_encoded(images):
    model = from_pipeline(zoo.load("mnist"), steps=2)
    with pytest.raises((TypeError, ValueError), match="images"):
        model.encode(images)
