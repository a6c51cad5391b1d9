"""Classifier guidance with the true classifier: the chain of the conditional model."""

import pytest
import torch

from samplers import Ancestral, sample
from steering import ClassifierGuidance
from tests.exact import NoisyClassifier, gaussian_chain
from tests.guidance.steps import Squares, drawn, step_of

MEAN, VAR = [0.3, -1.0, 0.5], torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
Y, NOISE = torch.tensor([1.0, 0.0, -2.0]), 0.8  # what is seen of the data, and how well


def models(kind, eta):
    """The model, and the model of the data given y."""
    after = 1 / (1 / VAR + 1 / NOISE**2)
    given = after * (torch.tensor(MEAN) / VAR + Y / NOISE**2)
    made = {"steps": 6, "dim": 3, "kind": kind, "eta": eta}
    plain = gaussian_chain(MEAN, VAR.tolist(), **made)
    return plain, gaussian_chain(given.tolist(), after.tolist(), **made)


@pytest.mark.parametrize("kind", ["vp", "flow"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_the_guided_chain_is_the_conditional_models(kind, eta):
    plain, conditional = models(kind, eta)
    guidance = ClassifierGuidance(NoisyClassifier(plain.denoiser, VAR, Y, NOISE))
    x, row = drawn(0, 4, 3), torch.zeros(4, dtype=torch.int64)
    for i in range(6):
        step = step_of(plain, None, x, i)
        guided = guidance.propose(step).guided
        clean = conditional.denoiser(x, conditional.process.time(step.i), row)
        expected = conditional.process.transition(x, step.i, clean).mean
        if plain.process.alpha[i] == 0:  # no signal: what y says is not in the state yet
            expected = guidance.propose(step).base.mean
        torch.testing.assert_close(guided.mean, expected, rtol=1e-4, atol=2e-5)  # float32


def test_a_small_stochastic_step_moves_by_the_variance_times_the_gradient():
    """Algorithm 1 of the paper; what differs falls with the size of the step."""
    off = []
    for steps in (100, 1000):
        model = gaussian_chain(MEAN, VAR.tolist(), steps=steps, dim=3)
        classifier = NoisyClassifier(model.denoiser, VAR, Y, NOISE)
        x, i = drawn(0, 4, 3), torch.full((4,), steps // 2)
        found = ClassifierGuidance(classifier, scale=2.0).propose(step_of(model, None, x, i))
        leaf = x.clone().requires_grad_(True)
        (slope,) = torch.autograd.grad(classifier(leaf, i, i).sum(), leaf)
        expected = 2.0 * model.process.kernel.std[steps // 2].float() ** 2 * slope
        moved = found.guided.mean - found.base.mean
        off.append(float((moved / expected - 1).abs().max()))
    assert off[0] < 0.15
    assert off[1] < 0.2 * off[0]


def test_it_costs_plain_samplings_rows_and_needs_no_differentiable_reward():
    plain, _ = models("vp", 1.0)
    run = sample(
        plain,
        lambda x, _: [0.0] * len(x),
        Ancestral(3),
        guidance=ClassifierGuidance(NoisyClassifier(plain.denoiser, VAR, Y, NOISE)),
        weights="none",
        progress=False,
    )
    assert int(run.spent.rows.sum()) == 3 * 6


def test_a_classifier_that_is_none_is_named():
    plain, _ = models("vp", 1.0)
    step = step_of(plain, Squares(Y), drawn(0, 4, 3), 3)
    for wrong in (lambda x, t, row: x.sum(), lambda x, t, row: x.detach().sum(1)):
        with pytest.raises(TypeError, match="classifier returned"):
            ClassifierGuidance(wrong).propose(step)
    with pytest.raises(TypeError, match="classifier=3"):
        ClassifierGuidance(3)
    with pytest.raises(ValueError, match="scale"):
        ClassifierGuidance(lambda x, t, row: x.sum(1), scale=-1.0)
