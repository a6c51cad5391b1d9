"""What holds for every guidance: items do not see each other, windows, sizes, wrong input."""

import dataclasses
import math

import pytest
import torch

from steering import DPS, MPGD, ClassifierGuidance, FlowChef, FlowDPS, FreeDoM, Twist
from tests.exact import NoisyClassifier, gaussian_chain
from tests.guidance.steps import Squares, drawn, part_of, step_of

VAR = [0.5, 1.0, 2.0, 4.0]
MODEL = gaussian_chain(0.3, VAR, steps=8, dim=4, kind="flow")
CLASSIFIER = NoisyClassifier(
    MODEL.denoiser, torch.tensor(VAR, dtype=torch.float64), drawn(1, 4), 0.8
)
FAMILY = {
    "flowchef": FlowChef(),
    "flowchef-inner": FlowChef(inner=3, rule="adam", step=0.1),
    "flowchef-full": FlowChef(jacobian="full", rule="normalised"),
    "dps": DPS(),
    "dps-polyak": DPS(rule="polyak"),
    "mpgd": MPGD(),
    "freedom": FreeDoM(travel=3, travel_window=(0.0, 1.0)),
    "flowdps": FlowDPS(),
    "classifier": ClassifierGuidance(CLASSIFIER),
    "twist": Twist(),
    "twist-skip": Twist(jacobian="skip", tempering=0.02),
}


@pytest.mark.parametrize("guidance", FAMILY.values(), ids=FAMILY)
def test_an_item_is_bent_the_same_alone_and_among_others(guidance):
    x = drawn(0, 6, 4) * torch.linspace(0.1, 5, 6)[:, None]  # residuals of unlike size
    step = step_of(MODEL, Squares(drawn(1, 4)), x, torch.tensor([0, 1, 3, 4, 6, 7]))
    together = guidance.propose(step)
    for k in range(6):
        alone = guidance.propose(part_of(step, k))
        for name in ("mean", "std"):
            one, many = getattr(alone.guided, name), getattr(together.guided, name)[[k]]
            torch.testing.assert_close(one, many, rtol=0, atol=1e-6)


@pytest.mark.parametrize("guidance", FAMILY.values(), ids=FAMILY)
def test_outside_its_window_a_guidance_is_the_model(guidance):
    i = torch.tensor([1, 2, 5, 6])
    step = step_of(MODEL, Squares(drawn(1, 4)), drawn(0, 4, 4), i)
    proposal = dataclasses.replace(guidance, window=(0.25, 0.75)).propose(step)
    base = MODEL.process.transition(step.x, i, step.denoise(step.x, i, step.row))
    same = (proposal.guided.mean == base.mean).all(1)
    assert same.tolist() == [True, False, False, True]


# share of the residual that a step removes, at four times the numbers over that at one time
SHARES = {
    "flowchef": (FlowChef(), 1.0),
    "flowchef-normalised": (FlowChef(rule="normalised", step=0.1), 1.0),
    "mpgd": (MPGD(), 1.0),
    "flowdps": (FlowDPS(), 1.0),
    "dps-polyak": (DPS(rule="polyak"), 1.0),
    "dps": (DPS(), 0.5),  # by the paper's rule a step of the same size, from twice the residual
    "freedom": (FreeDoM(travel=1), 0.5),
}


@pytest.mark.parametrize(("guidance", "ratio"), SHARES.values(), ids=SHARES)
def test_what_a_step_removes_at_twice_the_resolution(guidance, ratio):
    small, y = drawn(0, 4, 9), drawn(1, 9)
    moved = []
    for times in (1, 4):
        model = gaussian_chain(0.3, 2.0, steps=8, dim=9 * times, kind="flow")
        reward = Squares(y.repeat_interleave(times))
        proposal = guidance.propose(step_of(model, reward, small.repeat_interleave(times, 1), 4))
        moved.append((proposal.guided.mean - proposal.base.mean)[:, ::times])
    torch.testing.assert_close(moved[1], ratio * moved[0], rtol=1e-4, atol=1e-6)
    assert moved[0].abs().max() > 1e-3


WRONG = {
    "step": (lambda: DPS(step=-1.0), "step=-1.0"),
    "step-nan": (lambda: MPGD(step=math.nan), "step=nan"),
    "window": (lambda: FlowDPS(window=(0.5, 0.5)), "window="),
    "rule": (lambda: FreeDoM(rule="newton"), "rule='newton'"),
    "inner": (lambda: FlowDPS(inner=0), "inner=0"),
    "travel": (lambda: FreeDoM(travel=0), "travel=0"),
    "travel-window": (lambda: FreeDoM(travel_window=(0.7, 0.3)), "travel_window="),
}


@pytest.mark.parametrize(("make", "named"), WRONG.values(), ids=WRONG)
def test_a_wrong_setting_is_named(make, named):
    with pytest.raises(ValueError, match=named):
        make()


@pytest.mark.parametrize("rule", ["norm", "polyak"])
def test_rules_for_squares_are_refused_for_other_rewards(rule):
    model = gaussian_chain(0.3, 1.0, steps=8, dim=4)
    step = step_of(model, lambda x, _: x.sum(1), drawn(0, 4, 4), 3)
    with pytest.raises(ValueError, match="sum of squares"):
        DPS(rule=rule).propose(step)
