"""Bad calls get one clear error, which names the argument, before the first network row."""

import math

import pytest
import torch
from diffusers import DDIMScheduler

from samplers import (
    DAS,
    SMC,
    SVDD,
    TDS,
    Ancestral,
    Beam,
    BestOfN,
    TreeSampling,
    TreeSearch,
    ZeroOrder,
    load,
    sample,
)
from search.widen import Widening
from steering import DPS, FlowDPS, FreeDoM, Model, from_pipeline, measure, operators, zoo
from steering.rewards import (
    Acceptability,
    Aesthetic,
    Classifier,
    ClipScore,
    Imscore,
    Jpeg,
    Judge,
    Minimum,
    OverFrames,
    PickScore,
    Product,
    Standardized,
    Sum,
    from_pil,
    from_text,
)
from tests.brownian import brownian, first
from tests.exact import gaussian_chain
from tests.tiny_pipelines import pixel_pipeline


def run(model, **changed):
    """A good call, but for what is changed."""
    good = {"reward": first, "sampler": BestOfN(), "nfe": 100, "progress": False}
    return sample(**{"model": model, **good, **changed})


def plain(items, prompts):
    """Without a gradient."""
    return items.detach()[:, 0]


def on_an_ode(model, sampler):
    return run(Model(model.denoiser, brownian(ode=True).process), sampler=sampler)


class NoDensity:
    """A guidance whose kernel has no density."""

    exact = False
    differentiates = False

    def propose(self, step):
        raise AssertionError("it was run")

    def rows(self, i, steps):
        return torch.ones_like(i)


RUNS = {
    "model": (lambda m: run(object()), "model"),
    "model-none": (lambda m: run(None), "model"),
    "reward": (lambda m: run(m, reward=3), "reward"),
    "reward-none": (lambda m: run(m, reward=None), "reward"),
    "reward-class": (lambda m: run(m, reward=Jpeg), "reward=Jpeg is a class"),
    "reward-of-one": (lambda m: run(m, reward=lambda items: items), "reward"),
    "also-class": (lambda m: run(m, also=[Jpeg]), "also=Jpeg is a class"),
    "also-of-three": (lambda m: run(m, also=[lambda a, b, c: a]), "also"),
    "sampler-class": (lambda m: run(m, sampler=BestOfN), "sampler"),
    "sampler-text": (lambda m: run(m, sampler="dts"), "sampler"),
    "nfe-zero": (lambda m: run(m, nfe=0), "nfe"),
    "nfe-negative": (lambda m: run(m, nfe=-5), "nfe"),
    "nfe-float": (lambda m: run(m, nfe=99.5), "nfe"),
    "nfe-text": (lambda m: run(m, nfe="100"), "nfe"),
    "nfe-bool": (lambda m: run(m, nfe=True), "nfe"),
    "nfe-below-a-walk": (lambda m: run(m, nfe=9), "nfe"),
    "nfe-below-a-walk-dts": (lambda m: run(m, nfe=9, sampler=TreeSampling()), "nfe"),
    "nfe-below-a-group": (lambda m: run(m, nfe=35, sampler=BestOfN(of=4)), "group of 4 walks"),
    "nfe-below-a-population": (lambda m: run(m, nfe=50, sampler=SMC(particles=50)), "nfe"),
    "reward-calls": (lambda m: run(m, reward_calls=0), "reward_calls"),
    "seconds": (lambda m: run(m, seconds=-1.0), "seconds"),
    "seconds-nan": (lambda m: run(m, seconds=math.nan), "seconds"),
    "no-budget": (lambda m: run(m, nfe=None), "nfe"),
    "no-budget-dts": (lambda m: run(m, nfe=None, sampler=TreeSampling()), "nfe"),
    "no-budget-dts-star": (lambda m: run(m, nfe=None, sampler=TreeSearch(parallel=3)), "nfe"),
    "also-none": (lambda m: run(m, also=None), "also"),
    "guidance-part": (lambda m: run(m, guidance=type("G", (), {"propose": 1})()), "exact"),
    "draws": (lambda m: run(m, draws=0), "draws"),
    "draws-float": (lambda m: run(m, draws=2.5), "draws"),
    "lam-negative": (lambda m: run(m, lam=-1.0), "lam"),
    "lam-infinite": (lambda m: run(m, lam=math.inf), "lam"),
    "lam-and-kl": (lambda m: run(m, lam=1.0, kl=1.0), "kl"),
    "kl": (lambda m: run(m, kl=0.0), "kl"),
    "ess": (lambda m: run(m, ess=1.5), "ess"),
    "seed": (lambda m: run(m, seed=0.5), "seed"),
    "weights": (lambda m: run(m, weights="some"), "weights"),
    "guidance": (lambda m: run(m, guidance=3), "guidance"),
    "guidance-without-density": (lambda m: run(m, guidance=NoDensity()), "weights"),
    "batch": (lambda m: run(m, batch=0), "batch"),
    "on-error": (lambda m: run(m, on_error="ignore"), "on_error"),
    "also": (lambda m: run(m, also=[3]), "also"),
    "also-not-a-list": (lambda m: run(m, also=Jpeg()), "also"),
    "branch-on-an-ode": (lambda m: on_an_ode(m, TreeSampling(branch=(5,))), "branch"),
    "branch-beyond": (lambda m: run(m, sampler=TreeSampling(branch=(99,))), "branch"),
    "branch-falling": (lambda m: run(m, sampler=TreeSearch(branch=(5, 3))), "branch"),
    "levels-beyond": (lambda m: run(m, sampler=SMC(levels=(99,))), "levels"),
    "svdd-levels-beyond": (lambda m: run(m, sampler=SVDD(levels=(10,))), "levels"),
    "svdd-on-an-ode": (lambda m: on_an_ode(m, SVDD()), "SVDD finds no level"),
    "beam-on-an-ode": (lambda m: on_an_ode(m, Beam()), "Beam finds no level"),
    "smc-on-an-ode": (lambda m: on_an_ode(m, SMC()), "SMC finds no level"),
    "guided-smc-on-an-ode": (
        lambda _: run(gaussian_chain(eta=0.0), sampler=SMC(), guidance=DPS()),
        "needs a step that draws noise",
    ),
    "tds-on-an-ode": (
        lambda _: run(gaussian_chain(eta=0.0), sampler=TDS(), nfe=1000),
        "needs a step that draws noise",
    ),
    "unweighted-tds-on-an-ode": (
        lambda _: run(gaussian_chain(eta=0.0), sampler=TDS(), nfe=1000, weights="none"),
        "Twist moves a step by its own noise",
    ),
    "tds-without-a-gradient": (
        lambda _: run(gaussian_chain(), reward=plain, sampler=TDS(2), nfe=1000),
        "reward plain has no gradient",
    ),
    "tds-off-gaussian-chains": (lambda m: run(m, sampler=TDS(2), nfe=1000), "a Gaussian chain"),
    "flowdps-off-flows": (
        lambda _: run(gaussian_chain(), guidance=FlowDPS(), weights="none", nfe=1000),
        "FlowDPS is for flows",
    ),
    "freedom-weighed": (lambda _: run(gaussian_chain(), guidance=FreeDoM()), "FreeDoM has no dens"),
    "das-nfe": (
        lambda _: run(gaussian_chain(), sampler=DAS(60), nfe=60 * 98 - 1),  # 50 rows and 48 looks
        "population of 60 particles",
    ),
    "das-no-budget": (lambda _: run(gaussian_chain(), sampler=DAS(), nfe=None), "DAS: particles="),
    "nfe-below-a-particle": (lambda m: run(m, nfe=79, sampler=SVDD()), "particle of 8 proposals"),
    "nfe-below-a-beam": (lambda m: run(m, nfe=39, sampler=Beam()), "beam of 4 proposals"),
    "nfe-below-a-search": (lambda m: run(m, nfe=79, sampler=Beam(2)), "search of 2 beams"),
    "no-budget-svdd": (lambda m: run(m, nfe=None, sampler=SVDD()), "particles"),
    "no-budget-beam": (lambda m: run(m, nfe=None, sampler=Beam()), "beams"),
    "no-budget-zero-order": (lambda m: run(m, nfe=None, sampler=ZeroOrder()), "nfe"),
    "load": (lambda m: load("no/such/folder", m, first), "no/such/folder"),
    "unknown": (lambda m: run(m, budget=100), "budget"),
}

PARTS = {
    "prompts-text": (
        lambda: Model(brownian().denoiser, brownian().process, prompts="cat"),
        "prompts",
    ),
    "denoiser": (lambda: Model(lambda x, t, row: x, brownian().process), "denoiser"),
    "process": (lambda: Model(brownian().denoiser, None), "process"),
    "pilot-published": (lambda: TreeSampling(law="published", pilot=50), "pilot"),
    "widening-text": (lambda: Widening("a"), "Widening"),
    "n": (lambda: BestOfN(0), "n="),
    "of-above-n": (lambda: BestOfN(3, of=4), "of=4"),
    "n-text": (lambda: Ancestral("4"), "n="),
    "law": (lambda: TreeSampling(law="exact"), "law"),
    "branch": (lambda: TreeSampling(branch="late"), "branch"),
    "parallel": (lambda: TreeSampling(parallel=0), "parallel"),
    "backup": (lambda: TreeSearch(backup="mean"), "backup"),
    "value": (lambda: TreeSearch(value="net"), "value"),
    "c-uct": (lambda: TreeSearch(c_uct=-1.0), "c_uct"),
    "widening": (lambda: Widening(c=0.0), "c="),
    "widening-alpha": (lambda: Widening(alpha=2.0), "alpha="),
    "particles": (lambda: SMC(particles=1), "particles"),
    "potential": (lambda: SMC(potential="sum"), "potential"),
    "scheme": (lambda: SMC(scheme="residual"), "scheme"),
    "smc-ess": (lambda: SMC(ess=2.0), "ess"),
    "smc-tempering": (lambda: SMC(tempering=0.0), "tempering"),
    "das-tempering": (lambda: DAS(tempering=math.nan), "tempering"),
    "tds-jacobian": (lambda: TDS(jacobian="half"), "jacobian"),
    "tds-particles": (lambda: TDS(1), "particles"),
    "option": (lambda: TreeSampling(depth=3), "depth"),
    "svdd-particles": (lambda: SVDD(0), "particles"),
    "svdd-proposals": (lambda: SVDD(proposals=1), "proposals"),
    "svdd-proposals-none": (lambda: SVDD(proposals=None), "proposals"),
    "svdd-levels": (lambda: SVDD(levels=3), "levels"),
    "svdd-selection": (lambda: SVDD(selection="best"), "selection"),
    "beams": (lambda: Beam(2.5), "beams"),
    "beam-proposals": (lambda: Beam(proposals=True), "proposals"),
    "beam-levels": (lambda: Beam(levels="all"), "levels"),
    "neighbours": (lambda: ZeroOrder(neighbours=0), "neighbours"),
    "pivots": (lambda: ZeroOrder(pivots=None), "pivots"),
    "angle-zero": (lambda: ZeroOrder(angle=0.0), "angle"),
    "angle-degrees": (lambda: ZeroOrder(angle=30), "angle"),
    "angle-nan": (lambda: ZeroOrder(angle=math.nan), "angle"),
    "zero-order-n": (lambda: ZeroOrder(n=0), "n="),
    "classes": (lambda: Classifier(torch.nn.Identity(), []), "classes"),
    "net": (lambda: Classifier("resnet", [1]), "net"),
    "quality": (lambda: Jpeg(quality=0), "quality"),
    "terms": (lambda: Sum([(1.0, 3)]), "terms"),
    "rewards": (lambda: Minimum([Jpeg()]), "rewards"),
    "product": (lambda: Product([Jpeg()]), "rewards"),
    "standardized": (lambda: Standardized(3, 0.0, 1.0), "reward"),
    "standardized-mean": (lambda: Standardized(Jpeg(), math.nan, 1.0), "mean"),
    "standardized-std": (lambda: Standardized(Jpeg(), 0.0, 0.0), "std"),
    "frames-reward": (lambda: OverFrames("clip"), "reward"),
    "frames-by": (lambda: OverFrames(Jpeg(), "max"), "by="),
    "frames": (lambda: OverFrames(Jpeg(), frames=0), "frames"),
    "judge": (lambda: Judge("gpt"), "function"),
    "judge-range": (lambda: Judge(print, 10.0, 0.0), "low"),
    "clip-model": (lambda: ClipScore(3), "model"),
    "clip-model-empty": (lambda: ClipScore(""), "model"),
    "clip-folder": (lambda: ClipScore("./no/such/folder"), "model"),
    "clip-batch": (lambda: ClipScore(batch=0), "batch"),
    "clip-device": (lambda: ClipScore(device="abacus"), "device"),
    "pick-dtype": (lambda: PickScore(dtype="float16"), "dtype"),
    "pick-dtype-whole": (lambda: PickScore(dtype=torch.int8), "dtype"),
    "aesthetic-head": (lambda: Aesthetic(head="head.pth"), "head"),
    "aesthetic-head-missing": (lambda: Aesthetic(head="./head.safetensors"), "head"),
    "acceptability-label": (lambda: Acceptability(label=-1), "label"),
    "acceptability-write": (lambda: Acceptability("text"), "write"),
    "offload": (lambda: ClipScore(offload="yes"), "offload"),
    "imscore": (lambda: Imscore("hps"), "scorer"),
    "imscore-model": (lambda: Imscore("hpsv2.1", "/no/such/folder"), "model"),
    "from-pil": (lambda: from_pil(3), "from_pil"),
    "from-text": (lambda: from_text(len), "model=len writes no texts"),
    "box": (lambda: operators.Box(0), "size"),
    "share": (lambda: operators.Random(1.5), "share"),
    "factor": (lambda: operators.Downsample(1.5), "factor"),
    "sigma": (lambda: operators.Blur(-1.0), "sigma"),
    "blur-size": (lambda: operators.Blur(1.0, size=4), "size"),
    "observe-noise": (lambda: operators.observe(abs, torch.ones(1), noise=-1.0), "noise"),
    "measure-class": (lambda: measure(operators.Box, torch.ones(1, 8, 8)), "A is the class Box"),
    "measure-nothing": (lambda: measure(None, torch.ones(1, 8, 8)), "A is a NoneType"),
    "measure-y": (lambda: measure(abs, "cat"), "y is str"),
    "measure-y-nan": (lambda: measure(abs, torch.tensor([math.nan])), "y is"),
    "measure-noise": (lambda: measure(abs, torch.ones(3), noise=-1.0), "noise"),
    "measure-space": (lambda: measure(abs, torch.ones(3), space="pixels"), "space"),
    "zoo": (lambda: zoo.load("imagenet"), "imagenet"),
    "zoo-reference": (lambda: zoo.reference("cifar"), "cifar"),
    "prompts-empty": (
        lambda: Model(brownian().denoiser, brownian().process, prompts=()),
        "prompts",
    ),
}

PIPES = {
    "pipe": (lambda p: from_pipeline(object()), "pipe"),
    "pipe-text": (lambda p: from_pipeline("runwayml/stable-diffusion"), "pipe"),
    "steps-zero": (lambda p: from_pipeline(p, steps=0), "steps"),
    "steps-float": (lambda p: from_pipeline(p, steps=2.5), "steps"),
    "steps-beyond": (lambda p: from_pipeline(p, steps=1001), "steps"),
    "eta": (lambda p: from_pipeline(p, eta=2.0), "eta"),
    "prompts-text": (lambda p: from_pipeline(p, "a cat"), "prompts"),
    "prompts-none": (lambda p: from_pipeline(p, []), "prompts"),
    "prompts-unconditional": (lambda p: from_pipeline(p, ["a cat"]), "prompts"),
    "negative": (lambda p: from_pipeline(p, negative_prompts=["x"]), "negative_prompts"),
    "height": (lambda p: from_pipeline(p, height=9), "height"),
    "guidance-scale": (lambda p: from_pipeline(p, guidance_scale=3.0), "guidance_scale"),
}


def clear(error: BaseException, name: str) -> None:
    """The message is one or two sentences, and names what is wrong."""
    text = str(error)
    assert name in text
    assert 10 < len(text) < 500
    assert "\n" not in text


@pytest.mark.parametrize("case", RUNS)
def test_a_bad_run_is_refused_before_the_first_row(case):
    model, (call, name) = brownian(), RUNS[case]
    with pytest.raises((ValueError, TypeError, FileNotFoundError)) as caught:
        call(model)
    clear(caught.value, name)
    assert model.denoiser.rows_seen == []


def test_the_good_call_is_good():
    model = brownian()
    assert run(model).distinct == 10
    assert sum(model.denoiser.rows_seen) >= 100


@pytest.mark.parametrize("case", PARTS)
def test_a_bad_part_is_refused_where_it_is_made(case):
    call, name = PARTS[case]
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    clear(caught.value, name)


@pytest.fixture(scope="module")
def pipe():
    return pixel_pipeline(DDIMScheduler())


@pytest.mark.parametrize("case", PIPES)
def test_a_bad_pipeline_call_is_refused_before_the_first_row(case, pipe):
    rows = []
    hook = pipe.unet.register_forward_pre_hook(lambda module, inputs: rows.append(1))
    call, name = PIPES[case]
    with pytest.raises((ValueError, TypeError)) as caught:
        call(pipe)
    hook.remove()
    clear(caught.value, name)
    assert rows == []
