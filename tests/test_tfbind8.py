"""The 8-mers: an exact law, a reward known everywhere, and samplers held against both."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.tfbind8 import Task, best_of_law, chain, equal_kl
from samplers import SMC, TreeSampling, sample
from steering import from_pipeline, zoo
from steering.discrete import MaskedProcess
from steering.finetune import path_kl as estimated_path_kl
from steering.models.sequence_pipeline import SequencePipeline
from steering.rewards import Table
from tests.exact.estimates import average
from tests.exact.masked import index_of, masked_law, path_kl, tabulated, tokens_of

FOLDER = Path(zoo.__file__).parent / "tfbind8"


def random_answers(length: int, tokens: int, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    shape = ((tokens + 1) ** length, length, tokens)
    return torch.randn(shape, generator=g, dtype=torch.float64).log_softmax(-1)


@pytest.fixture(scope="module")
def task():
    """The real model in four steps, its last four bases kept, so that 5^4 states are asked."""
    return four_free(zoo.load("tfbind8"))


def four_free(pipe) -> Task:
    model = from_pipeline(pipe, prompts=["____ATCA"], steps=4)
    free = MaskedProcess.of(4, 4, 4)
    kept = torch.tensor([0, 3, 1, 0]).expand(5**4, 4)
    x = torch.cat([tokens_of(torch.arange(5**4), 4, 5), kept], 1)
    row = torch.zeros(len(x), dtype=torch.int64)
    with torch.no_grad():
        answers = model.denoiser(x, torch.ones(len(x)), row)[:, :4]
    log_p = masked_law(free, answers).log()
    values = zoo.tfbind8_scores()[..., 0, 3, 1, 0]
    return Task(model, answers, Table(values), log_p)


# --- the law ---------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["loglinear", "cosine"])
def test_forward_pass_is_the_product_of_the_kernels(schedule):
    """All 27 states of three sites by 27 matrices of their own kernel: equal to rounding."""
    process = MaskedProcess.of(3, 2, 4, schedule)
    answers, other = random_answers(3, 2, 0), random_answers(3, 2, 1)
    states = torch.tensor(list(itertools.product(range(3), repeat=3)))
    law = torch.zeros(27, dtype=torch.float64)
    law[-1] = 1
    far = 0.0
    for i in range(4):
        at = torch.full((27,), i)
        kernel, beside = (process.transition(states, at, a) for a in (answers, other))
        far += float(law @ kernel.kl(beside))
        law = law @ torch.stack([kernel.log_prob(s.expand(27, 3)) for s in states], 1).exp()
    ends = (states < 2).all(1)
    # the kernel's own table of probabilities to be unmasked is in float32
    torch.testing.assert_close(masked_law(process, answers), law[ends], rtol=1e-6, atol=0)
    assert path_kl(process, answers, other) == pytest.approx(far, rel=1e-6)
    assert path_kl(process, answers, answers) == 0


def test_sequences_have_numbers():
    index = torch.arange(3**4)
    x = tokens_of(index, 4, 3)
    assert x.tolist() == [list(s) for s in itertools.product(range(3), repeat=4)]
    assert torch.equal(index_of(x, 3), index)


def test_draws_of_the_pipeline_follow_the_law(task):
    """Pearson's statistic of 10,000 draws of the pipeline's own call on 20 groups of sequences of
    about equal mass: chi-squared of 19 degrees, above 44 in one of a thousand."""
    pipe = zoo.load("tfbind8")
    drawn = pipe(
        prompts=["____ATCA"] * 10_000,
        num_inference_steps=4,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).sequences
    assert (drawn[:, 4:] == torch.tensor([0, 3, 1, 0])).all()
    p = task.log_p.exp()
    order = p.argsort()
    group = torch.empty(256, dtype=torch.int64)
    group[order] = (p[order].cumsum(0) * 20).ceil().long().clamp(1, 20) - 1
    expected = torch.zeros(20, dtype=torch.float64).index_add(0, group, p) * 10_000
    found = torch.bincount(group[index_of(drawn[:, :4], 4)], minlength=20)
    assert expected.min() > 100
    assert ((found - expected) ** 2 / expected).sum() < 44


# --- the reward ------------------------------------------------------------------------------


def test_the_reward_of_a_sequence_is_its_score():
    reward = Table(zoo.tfbind8_scores())
    values = zoo.tfbind8_scores()
    assert values.shape == (4,) * 8
    assert values.dtype == torch.float32
    assert float(values.min()) == 0
    assert float(values.max()) == 1
    index = torch.arange(0, 4**8, 997)
    x = tokens_of(index, 8, 4)
    found = reward(torch.nn.functional.one_hot(x, 4).float(), [None] * len(x))
    assert torch.equal(found, values.flatten()[index])
    # either strand was measured as one: the strongest site and its reverse complement
    for word in ("AGGTATCA", "TGATACCT"):
        assert values[tuple("ACGT".index(c) for c in word)] == 1


def test_the_reward_of_weights_is_a_mean_and_its_gradient_is_its_slope():
    g = torch.Generator().manual_seed(0)
    reward = Table(torch.rand(2, 2, 2, generator=g, dtype=torch.float64))
    x = torch.rand(5, 3, 2, generator=g, dtype=torch.float64).softmax(-1).requires_grad_()
    every = torch.tensor(list(itertools.product(range(2), repeat=3)))
    chance = torch.stack([x[:, i, every[:, i]] for i in range(3)]).prod(0)  # [5, 8]
    value = reward(x, [None] * 5)
    torch.testing.assert_close(value, chance @ reward.values.flatten())
    assert torch.autograd.gradcheck(lambda y: reward(y, [None] * 5), x)
    (slope,) = torch.autograd.grad(value[0], x)
    assert slope[1:].abs().max() == 0  # items are apart


def test_the_table_refuses_what_it_does_not_have():
    with pytest.raises(ValueError, match="as many tokens"):
        Table(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="nan"):
        Table(torch.full((2, 2), torch.nan))
    with pytest.raises(TypeError, match="tensor of floats"):
        Table(torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"\[N, 2, 2\]"):
        Table(torch.zeros(2, 2))(torch.zeros(1, 3, 2), [None])
    assert Table(torch.zeros(2, 2)).name != Table(torch.ones(2, 2)).name


# --- the model -------------------------------------------------------------------------------


def test_a_saved_pipeline_comes_back_to_the_bit(tmp_path):
    pipe = zoo.load("tfbind8")
    pipe.save_pretrained(tmp_path)
    again = SequencePipeline.from_pretrained(tmp_path, local_files_only=True)
    x = tokens_of(torch.arange(0, 5**8, 4001), 8, 5)
    with torch.inference_mode():
        assert torch.equal(pipe.denoiser(x).logits, again.denoiser(x).logits)
    assert (again.alphabet, again.length) == ("ACGT", 8)


def test_the_model_prefers_weak_sites():
    """Its card's law, from 2,000 draws: mean score within 4 standard errors."""
    card = (FOLDER / "README.md").read_text()
    told = float(card.partition("mean score under the model, T = 8 | ")[2].split()[0])
    drawn = zoo.load("tfbind8")(
        prompts=[None] * 2000,
        num_inference_steps=8,
        generator=torch.Generator().manual_seed(1),
        output_type="pt",
    ).sequences
    score, error = average(zoo.tfbind8_scores().flatten()[index_of(drawn, 4)].double())
    assert abs(score - told) < 4 * error


def test_training_data_can_be_made_again_from_what_ships():
    from steering.zoo.train_tfbind8 import training_law

    r = zoo.tfbind8_scores().flatten()
    law = training_law(r)
    assert float(law.sum()) == pytest.approx(1)
    assert (law[r > np.median(r)] == 0).all()
    a, b = (r <= r.median()).nonzero().flatten()[:2]
    assert float(law[a] / law[b]) == pytest.approx(float((3 * (r[a] - r[b])).exp()), rel=1e-5)
    lines = [json.loads(line) for line in (FOLDER / "train.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"]


# --- samplers --------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", [SMC(64), TreeSampling(branch=(2, 3))], ids=["SMC", "DTS"])
def test_samplers_follow_the_tilted_law(sampler):
    """Mean reward and log Z over 48 runs, within 4 standard errors and a bias that shrinks with
    the number of draws: 0.01 and 0.05 at these."""
    lam, runs = 5.0, 48
    pipe = zoo.load("tfbind8")
    small = four_free(pipe)
    model = from_pipeline(pipe, prompts=["____ATCA"] * runs, steps=4)
    reward = Table(zoo.tfbind8_scores())
    found = sample(model, reward, sampler, lam=lam, nfe=1000, batch=4096, progress=False)
    target, log_z = small.tilted(lam)
    mean = torch.zeros(runs, dtype=torch.float64)
    mean.index_add_(0, found.rows, found.weights * found.rewards)
    value, error = average(mean)
    assert abs(value - float(target.exp() @ small.r)) < 4 * error + 0.01
    value, error = average(found.log_z)
    assert abs(value - log_z) < 4 * error + 0.05


def test_looked_up_answers_are_the_networks():
    model = from_pipeline(zoo.load("tfbind8"), steps=2)
    x = tokens_of(torch.arange(0, 5**8, 4001), 8, 5)
    t, row = torch.ones(len(x)), torch.zeros(len(x), dtype=torch.int64)
    answers = torch.zeros(5**8, 8, 4)
    with torch.no_grad():
        answers[index_of(x, 5)] = model.denoiser(x, t, row)
        again = tabulated(model, answers, conditions=3)
        assert torch.equal(again.denoiser(x, t, row), model.denoiser(x, t, row))
        soft = chain(model).weights(x[:5]) * 0.5 + 0.1
        one = row[:5]
        assert torch.equal(again.denoiser(soft, t[:5], one), model.denoiser(soft, t[:5], one))


def test_the_law_of_best_of_n_is_that_of_draws():
    """Against all triples of five outcomes, two of equal reward, enumerated."""
    log_p = torch.tensor([0.1, 0.2, 0.3, 0.25, 0.15], dtype=torch.float64).log()
    r = torch.tensor([0.0, 0.5, 0.5, 1.0, 0.2])
    expected = torch.zeros(5, dtype=torch.float64)
    for triple in itertools.product(range(5), repeat=3):
        best = max(triple, key=lambda s: float(r[s]))  # the first of equals
        expected[best] += log_p[list(triple)].sum().exp()
    torch.testing.assert_close(best_of_law(log_p, r, 3), expected)


def test_the_tilt_of_equal_kl_is_found(task):
    """KL and mean of the tilted law at λ = 7 lead back to λ = 7's mean."""
    target, _ = task.tilted(7.0)
    far = float(target.exp() @ (target - task.log_p))
    assert equal_kl(task, far) == pytest.approx(float(target.exp() @ task.r), abs=1e-6)


def test_the_exact_kl_of_paths_is_what_is_estimated():
    """The estimator of `steering.finetune` on 2,000 paths, within 4 of its standard errors."""
    tuned, before = zoo.load("tfbind8"), zoo.load("tfbind8")
    with torch.no_grad():
        tuned.denoiser.out.bias += torch.tensor([0.5, 0.0, 0.0, -0.5])
    mean, error = estimated_path_kl(tuned, before, prompts=["____ATCA"], steps=4, n=2000)
    exact = path_kl(MaskedProcess.of(4, 4, 4), four_free(tuned).answers, four_free(before).answers)
    assert abs(mean - exact) < 4 * error
