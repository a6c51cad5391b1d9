"""Sequence pipelines: their law against the chain's and against enumeration; what they keep."""

import itertools
import math
import signal

import pytest
import torch
from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn

from samplers import SMC, Ancestral, BestOfN, TreeSampling, load, sample
from samplers.view import image_grid, tree_page
from steering import from_pipeline, rewards, zoo
from steering.discrete import SCHEDULES
from steering.models.sequence_denoiser import SequenceDenoiser
from steering.models.sequence_pipeline import SequencePipeline
from steering.models.token_scheduler import TokenScheduler
from steering.rewards import from_text
from tests.exact.token_laws import law, unmasking_law
from tests.tiny.parts import lively
from tests.tiny_pipelines import quiet

LETTERS, SITES, STEPS = "abc", 2, 3
N = 20000


def pipeline(kind="masked", classes=None, length=SITES, letters=LETTERS, **chain):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = SequenceDenoiser(
            len(letters), kind == "masked", width=8, depth=1, kernel=3, fine=8, classes=classes,
            timed=kind == "uniform",
        )  # fmt: skip
        lively(net, gain=0.7)
    return quiet(
        SequencePipeline(net, TokenScheduler(len(letters), kind, **chain), letters, length)
    )


def agrees(tokens: Tensor, x: Tensor, p: Tensor) -> bool:
    """Pearson's statistic of draws [N, L] of states x [S, L] of probabilities p [S]: within five
    standard deviations of its mean, over states that are expected five times."""
    n = len(tokens)
    at = (tokens[:, None] == x).all(2).double().sum(0)
    likely = p * n > 5
    statistic = ((at - p * n)[likely] ** 2 / (p * n)[likely]).sum()
    degrees = int(likely.sum()) - 1
    return bool(statistic < degrees + 5 * math.sqrt(2 * degrees)) and not at[p == 0].any()


def drawn(pipe, prompts, **more) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipe(prompts, STEPS, generator=generator, output_type="pt", **more).sequences


# --- its law -----------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["loglinear", "cosine"])
def test_a_masked_pipeline_draws_from_the_law_of_its_chain_and_of_the_definition(schedule):
    pipe = pipeline(schedule=schedule)
    x, p = law(from_pipeline(pipe, steps=STEPS))
    assert agrees(drawn(pipe, [None] * N), x, p)

    def guess(state, i):
        tokens = torch.tensor([[3 if v is None else v for v in state]])
        return pipe.denoiser(tokens).logits[0].double().softmax(-1).tolist()

    t = [1 - k / STEPS for k in range(STEPS + 1)]
    level = t if schedule == "loglinear" else [math.cos(math.pi / 2 * (1 - s)) for s in t]
    expected = unmasking_law(guess, [None, None], [1.0, *level[1:-1], 0.0])
    for state, q in zip(x.tolist(), p.tolist(), strict=True):
        # float32 logits; NEVER makes of what cannot be an exact 0
        assert q == pytest.approx(expected.get(tuple(state), 0.0), abs=1e-6)


def test_a_uniform_pipeline_draws_from_the_law_of_its_chain_and_of_bayes_rule():
    pipe = pipeline("uniform")
    x, p = law(from_pipeline(pipe, steps=STEPS))
    assert agrees(drawn(pipe, [None] * N), x, p)

    def forward(a, b, kept):  # of a becoming b, where a token is kept with this probability
        return kept * (a == b) + (1 - kept) / 3

    states = list(itertools.product(range(3), repeat=SITES))
    laws = dict.fromkeys(states, 1 / len(states))
    for i in range(STEPS):
        here, after = i / STEPS, (i + 1) / STEPS  # of the data left now, and after the step
        moved = dict.fromkeys(states, 0.0)
        for state, q in laws.items():
            with torch.no_grad():
                t = torch.tensor([1 - i / STEPS])
                guess = pipe.denoiser(torch.tensor([state]), t).logits[0].double().softmax(-1)
            site = [
                [
                    sum(
                        float(guess[s, c]) * forward(c, v, after)
                        * forward(v, state[s], here / after) / forward(c, state[s], here)
                        for c in range(3)
                    )
                    for v in range(3)
                ]
                for s in range(SITES)
            ]  # fmt: skip
            for into in states:
                moved[into] += q * math.prod(site[s][into[s]] for s in range(SITES))
        laws = moved
    for state, q in zip(x.tolist(), p.tolist(), strict=True):
        assert q == pytest.approx(laws[tuple(state)], abs=1e-6)  # float32 logits


@pytest.mark.parametrize("kind", ["masked", "uniform"])
def test_walks_of_the_model_have_that_law(kind):
    pipe = pipeline(kind, remask=0.3) if kind == "masked" else pipeline(kind)
    model = from_pipeline(pipe, steps=STEPS)
    x, p = law(model)
    assert agrees(drawn(pipe, [None] * N), x, p)
    n = 4000
    run = sample(model, lambda items, _: torch.zeros(len(items)), Ancestral(n), nfe=STEPS * n,
                 batch=1024, progress=False)  # fmt: skip
    assert agrees(run.items.argmax(-1).repeat_interleave(run.counts, 0), x, p)


# --- prompts -----------------------------------------------------------------------------------


def test_guidance_is_a_power_of_what_the_class_changes():
    pipe = pipeline(classes=2)
    model = from_pipeline(pipe, [0, 1, None], steps=STEPS, guidance_scale=[3.0, 1.0, 1.0])
    x = torch.full((3, SITES), 3)
    t, row = torch.ones(3), torch.arange(3)
    guess = model.denoiser(x, t, row)
    with torch.no_grad():
        p = pipe.denoiser(x, None, torch.tensor([0, 1, 2])).logits.log_softmax(-1)
    # p0 (p0 / p)^2, normalised; float32
    expected = (p[2] + 3 * (p[0] - p[2])).log_softmax(-1)
    torch.testing.assert_close(guess[0], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(guess[1:], p[1:], rtol=0, atol=1e-5)
    assert (guess[0] - p[0]).abs().max() > 1e-2
    assert model.denoiser.rows(t, row).tolist() == [2, 1, 1]
    states, q = law(model, row=0)
    assert agrees(drawn(pipe, [0] * N, guidance_scale=3.0), states, q)
    assert not agrees(drawn(pipe, [0] * N), states, q)


@pytest.mark.parametrize("kind", ["masked", "uniform"])
def test_kept_sites_are_kept_and_the_others_follow_the_chain_that_is_shown_them(kind):
    pipe = pipeline(kind)
    model = from_pipeline(pipe, ["_b", "a", None], steps=STEPS)
    x, p = law(model, row=0)
    tokens = drawn(pipe, ["_b"] * N)
    assert (tokens[:, 1] == 1).all()
    assert agrees(tokens, x, p)
    assert float(p[x[:, 1] != 1].sum()) < 1e-9
    run = sample(model, lambda items, _: torch.zeros(len(items)), Ancestral(20), nfe=20 * STEPS,
                 progress=False)  # fmt: skip
    for text, row in zip(run.texts, run.rows.tolist(), strict=True):
        assert row != 0 or text[1] == "b"
        assert row != 1 or text[0] == "a"


class Posterior(nn.Module):
    """The best guess there is: p(x_l | the tokens that are not masked) of a law of three tokens."""

    def __init__(self, joint: Tensor) -> None:
        super().__init__()
        self.register_buffer("joint", joint)  # [K, K, K]
        self.config = FrozenDict(classes=None)

    @property
    def device(self):
        return self.joint.device

    def forward(self, x, timestep=None, class_labels=None, return_dict=True):
        K, out = len(self.joint), []
        states = torch.tensor(list(itertools.product(range(K), repeat=3)))
        for row in x:
            fits = ((row == K) | (states == row)).all(1)
            p = self.joint.flatten() * fits
            out.append(
                torch.stack([p[states[:, s] == v].sum() for s in range(3) for v in range(K)])
            )
        return (torch.stack(out).view(len(x), 3, K).clamp(min=1e-30).log(),)


def test_with_perfect_guesses_kept_sites_are_conditioned_on():
    # The law of what follows kept sites is that of the chain shown them. It is the conditional law
    # of the data where guesses are the data's and few sites go at once: with one free site
    # exactly, else up to what steps that unmask several at once neglect, which falls as 1 / T.
    weights = torch.rand(3, 3, 3, generator=torch.Generator().manual_seed(3)) ** 4
    joint = (weights / weights.sum()).double()
    pipe = quiet(SequencePipeline(Posterior(joint), TokenScheduler(3), LETTERS, 3))

    def apart(prompt, steps):
        model = from_pipeline(pipe, [prompt], steps=steps)
        x, p = law(model)
        fixed = pipe.read([prompt])[0]
        fits = ((fixed < 0) | (x == fixed)).all(1) & (x < 3).all(1)
        truth = torch.where(fits, joint[tuple(x.clamp(max=2).T)], 0.0)
        return float((p - truth / truth.sum()).abs().sum() / 2)

    assert apart("b_c", 2) < 1e-6
    coarse, fine = apart("b", 4), apart("b", 8)
    assert coarse > 0.01
    assert fine == pytest.approx(coarse / 2, rel=0.1)


# --- kept, recorded, gone on with -------------------------------------------------------------


@pytest.mark.parametrize("kind", ["masked", "uniform"])
def test_a_saved_pipeline_is_the_same_to_the_bit(kind, tmp_path):
    pipe = pipeline(kind, classes=2, schedule="cosine", length=6)
    pipe.save_pretrained(tmp_path)
    again = quiet(SequencePipeline.from_pretrained(tmp_path))
    assert {p.suffix for p in tmp_path.rglob("*") if p.is_file()} == {".json", ".safetensors"}
    assert dict(again.scheduler.config).items() >= {"kind": kind, "schedule": "cosine"}.items()
    assert (again.alphabet, again.length, again.classes) == (LETTERS, 6, 2)
    prompts = [0, 1, None, "ab_c"]
    assert drawn(again, prompts).equal(drawn(pipe, prompts))
    assert from_pipeline(again, steps=2).name == from_pipeline(pipe, steps=2).name


@pytest.fixture(scope="module")
def model():
    return from_pipeline(pipeline(length=6), ["a", None], steps=6)


@pytest.fixture(scope="module")
def bs(model):
    @from_text(model)
    def bs(texts):
        return [float(text.count("b")) for text in texts]

    return bs


def test_a_run_is_recorded_read_back_and_goes_on(model, bs, tmp_path):
    run = sample(model, bs, TreeSampling(), nfe=240, record=tmp_path, progress=False)
    again = load(tmp_path, model, bs)
    assert again.texts == run.texts
    assert again.weights.equal(run.weights)
    assert set("".join(run.texts)) <= set(LETTERS)
    assert all(t[0] == "a" for t, r in zip(run.texts, run.rows.tolist(), strict=True) if r == 0)
    grown = again.more(nfe=240, progress=False)
    whole = sample(model, bs, TreeSampling(), nfe=480, progress=False)
    assert int(grown.found.sum()) > int(run.found.sum())
    assert grown.nfe <= whole.nfe + 2 * 6
    assert "draws" in str(grown)
    assert grown.rewards.tolist() == [float(text.count("b")) for text in grown.texts]


def test_an_interrupted_run_shows_the_guesses_of_what_is_on_its_way(model, bs):
    @from_text(model)
    def stopping(texts):
        signal.raise_signal(signal.SIGINT)
        return bs.function(texts)

    run = sample(model, stopping, SMC(8, levels=(2, 4)), nfe=8 * 8, progress=False)
    assert run.status == "interrupted"
    assert run.distinct
    assert not run.finished.any()
    assert run.items.shape == (run.distinct, 6, 3)
    # guesses: probabilities at every site, sure of those that are there already
    torch.testing.assert_close(run.items.sum(-1), torch.ones(run.distinct, 6))
    state = run.states(run.ids)
    there = state < 3
    assert there.any()
    assert not there.all()
    assert run.items.argmax(-1)[there].equal(state[there])
    assert run.rewards.tolist() == [float(text.count("b")) for text in run.texts]


def test_pictures_of_sequences_are_refused_in_one_line(model, bs):
    run = sample(model, bs, TreeSampling(), nfe=60, progress=False)
    with pytest.raises(TypeError, match=r"use \.texts"):
        _ = run.images
    with pytest.raises(TypeError, match="are no images"):
        image_grid(run.items)
    assert "<html" in tree_page(run.tree)


# --- the scheduler ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["masked", "uniform"])
def test_the_scheduler_remembers_nothing(kind):
    scheduler = TokenScheduler(3, kind)
    scheduler.set_timesteps(4)
    logits = torch.randn(5, 6, 3, generator=torch.Generator().manual_seed(0))
    top = 4 if kind == "masked" else 3
    x = torch.randint(top, (5, 6), generator=torch.Generator().manual_seed(1))

    def step(k, seed):
        generator = torch.Generator().manual_seed(seed)
        return scheduler.step(logits, scheduler.timesteps[k], x, generator)

    first = {(k, s): step(k, s) for k in range(4) for s in (1, 2)}
    assert not first[2, 1].prev_sample.equal(first[2, 2].prev_sample)  # siblings
    for k, s in reversed(first):
        assert step(k, s).prev_sample.equal(first[k, s].prev_sample)
    several = scheduler.step(logits, scheduler.timesteps[[3, 1, 0, 2, 1]], x)
    for row, k in enumerate([3, 1, 0, 2, 1]):
        assert several.log_probs[row].equal(first[k, 1].log_probs[row])


@pytest.mark.parametrize("kind", ["masked", "uniform"])
@pytest.mark.parametrize("schedule", ["loglinear", "cosine"])
def test_noised_sequences_have_the_marginals_of_the_schedule(kind, schedule):
    scheduler = TokenScheduler(4, kind, schedule)
    n, t = 100_000, torch.tensor([0.2, 0.7])
    clean = torch.full((2, n), 1)
    x = scheduler.add_noise(clean, t, torch.Generator().manual_seed(0))
    m = SCHEDULES[schedule](t)
    share = (x == 1).double().mean(1)
    expected = 1 - m if kind == "masked" else 1 - m + m / 4
    # five standard deviations of a share
    assert ((share - expected).abs() < 5 * (expected * (1 - expected) / n).sqrt()).all()
    others = {4} if kind == "masked" else {0, 2, 3}
    assert set(x[x != 1].tolist()) == others


# --- what is wrong ----------------------------------------------------------------------------

LABELLED = {"classes": 2}
CALLS = {
    "prompts-text": ({}, {"prompts": "ab"}, "prompts='ab' is one text"),
    "letters": ({}, {"prompts": ["ax"]}, "prompts has 'ax' with 'x'"),
    "too-long": ({}, {"prompts": ["abc"]}, "'abc' of 3 characters"),
    "label": (LABELLED, {"prompts": [5]}, "prompts has 5: this model has labels 0 to 1"),
    "label-none": ({}, {"prompts": [0]}, "takes no class labels"),
    "label-bool": (LABELLED, {"prompts": [True]}, "prompts has True"),
    "kind": ({}, {"prompts": [1.5]}, "prompts has 1.5"),
    "output": ({}, {"output_type": "np"}, "output_type='np'"),
    "scale": (LABELLED, {"prompts": [0], "guidance_scale": math.nan}, "guidance_scale=nan"),
    "steps": ({}, {"num_inference_steps": 0}, "steps=0"),
}
MODELS = {
    "eta": ({}, {"eta": 1.0}, "eta is given, but tokens have none"),
    "height": ({}, {"height": 8}, "height is given"),
    "call": ({}, {"call": {"guidance_scale": 1.0}}, "native adapters take no guidance_scale"),
    "driven": ({}, {"route": "driven"}, "route='driven'"),
    "negative": ({}, {"prompts": ["a"], "negative_prompts": ["b"]}, "negative_prompts is given"),
    "guided": ({}, {"guidance_scale": 2.0}, "takes no class labels"),
    "guided-none": (LABELLED, {"prompts": [None], "guidance_scale": 2.0}, "without a class label"),
    "prompts-text": ({}, {"prompts": "ab"}, "prompts='ab' is no list"),
    "letters": ({}, {"prompts": ["ax"]}, "prompts has 'ax' with 'x'"),
    "steps": ({}, {"steps": 0}, "steps=0"),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_call_gets_one_clear_error(name):
    made, given, said = CALLS[name]
    pipe = pipeline(**made)
    pipe.denoiser.forward = _never
    with pytest.raises(ValueError, match=said):
        pipe(**given)


@pytest.mark.parametrize("name", MODELS)
def test_a_wrong_model_gets_one_clear_error(name):
    made, given, said = MODELS[name]
    pipe = pipeline(**made)
    pipe.denoiser.forward = _never
    with pytest.raises(ValueError, match=said):
        from_pipeline(pipe, **{"steps": 2, **given})


def test_what_does_not_fit_together_is_refused():
    net = SequenceDenoiser(3, width=8, depth=1, kernel=3, fine=8)
    for alphabet, said in (("aab", "different characters"), ("a_b", "none is '_'"),
                           ("ab", "2 characters for 3 tokens")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            SequencePipeline(net, TokenScheduler(3), alphabet)
    for given, said in (({"kind": "soft"}, "kind='soft'"), ({"schedule": "sine"}, "'sine'"),
                        ({"kind": "uniform", "remask": 0.1}, "remask=0.1")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            TokenScheduler(3, **given)
    scheduler = TokenScheduler(3)
    with pytest.raises(ValueError, match="is not one of 64 steps"):
        scheduler.step(torch.zeros(1, 2, 3), 0.3333, torch.zeros(1, 2, dtype=torch.int64))


def _never(*_, **__):
    raise AssertionError("it was run")


def test_a_search_returns_no_sequence_twice():
    pipe = zoo.load("tfbind8")
    model = from_pipeline(pipe, ["ACGTAC__"], steps=4)  # sixteen sequences
    reward = rewards.Table(zoo.tfbind8_scores())
    found = sample(model, reward, BestOfN(), nfe=400, draws=10, progress=False)
    assert len(set(found.texts)) == len(found.texts) == 10
    assert found.rewards.tolist() == sorted(found.rewards.tolist(), reverse=True)
    every = sample(model, reward, BestOfN(), nfe=400, progress=False)
    assert found.texts == list(dict.fromkeys(every.texts))[:10]
