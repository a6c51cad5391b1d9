"""Rules of classifier-free guidance: closed forms, diffusers' own, their cost, their space."""

import diffusers
import pytest
import torch
from diffusers.callbacks import SDCFGCutoffCallback

from benchmarks.parity import our_images
from samplers.ledger import Ledger
from samplers.network import Network
from steering import cfg, from_pipeline, noise
from tests.tiny_pipelines import (
    SD_SCHEDULE,
    dit,
    flux,
    pixel_pipeline,
    stable_diffusion,
    stable_diffusion_3,
    stable_diffusion_xl,
)

SHAPE = (4, 3, 5)
RULES = [
    cfg.Scale(),
    cfg.Rescale(0.7),
    cfg.ZeroStar(1),
    cfg.Projected(0.2, norm=3.0),
    cfg.Interval(0.0, 0.5, cfg.Rescale(0.7)),
]
W = torch.tensor([3.0, 7.5])
STEP = torch.tensor([2, 5])


def pair(seed=0):
    """Negative and positive predictions [2, *SHAPE] that have much in common."""
    generator = torch.Generator().manual_seed(seed)
    negative = torch.randn(2, *SHAPE, generator=generator)
    return negative, 0.6 * negative + torch.randn(2, *SHAPE, generator=generator)


def dot(a, b):
    return (a * b).flatten(1).sum(1)


def close(a, b):
    # float32 rounding (6e-8) of sums over 60 numbers of order 1, times scales up to 7.5
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_scale_is_one_at_the_positive_and_zero_at_the_negative():
    u, c = pair()
    close(cfg.Scale()(u, c, torch.tensor([1.0, 0.0]), STEP), torch.stack([c[0], u[1]]))
    close(cfg.Scale()(u, c, W, STEP)[1], u[1] + 7.5 * (c[1] - u[1]))


def test_rescale_has_the_spread_of_the_positive():
    u, c = pair()
    plain, full = cfg.Scale()(u, c, W, STEP), cfg.Rescale(1.0)(u, c, W, STEP)
    close(full.flatten(1).std(1), c.flatten(1).std(1))
    # in the direction of plain guidance: the cosine is 1
    close(dot(plain, full).square(), dot(plain, plain) * dot(full, full))
    close(cfg.Rescale(0.0)(u, c, W, STEP), plain)
    close(cfg.Rescale(0.25)(u, c, W, STEP), 0.25 * full + 0.75 * plain)


def test_zero_star_fits_the_negative_to_the_positive():
    u, c = pair()
    fitted = cfg.ZeroStar(0)(u, c, torch.zeros(2), STEP)  # w = 0 leaves s · u
    close(dot(c - fitted, u), torch.zeros(2))  # of least squares
    close(fitted, u * (dot(c, u) / dot(u, u)).view(2, 1, 1, 1))
    close(cfg.ZeroStar(0)(u, c, W, STEP), fitted + W.view(2, 1, 1, 1) * (c - fitted))
    close(cfg.ZeroStar(0)(u, 3 * u, W, STEP), 3 * u)  # nothing is left to extrapolate


def test_zero_star_rests_in_its_first_steps():
    u, c = pair()
    for i in range(4):
        predictions = cfg.ZeroStar(2)(u, c, W, torch.tensor([i, 5]))
        assert predictions.flatten(1).any(1).tolist() == [i >= 2, True]


def test_projected_drops_what_is_parallel_to_the_positive():
    u, c = pair()
    w = (W - 1).view(2, 1, 1, 1)
    close(cfg.Projected(eta=1.0)(u, c, W, STEP), cfg.Scale()(u, c, W, STEP))
    update = (cfg.Projected()(u, c, W, STEP) - c) / w
    close(dot(update, c), torch.zeros(2))
    parallel = c - u - update
    close(dot(parallel, c).square(), dot(parallel, parallel) * dot(c, c))
    close(cfg.Projected(eta=0.3)(u, c, W, STEP), c + w * (update + 0.3 * parallel))


def test_projected_limits_the_length_of_the_update():
    u, c = pair()
    length = dot(c - u, c - u).sqrt()
    norm = length.mean().item()  # one update is longer, one is not
    update = (cfg.Projected(1.0, norm)(u, c, W, STEP) - c) / (W - 1).view(2, 1, 1, 1)
    close(dot(update, update).sqrt(), length.clamp(max=norm))
    assert (length > norm).tolist() in ([True, False], [False, True])
    close(dot(update, c - u), dot(update, update).sqrt() * length)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_an_item_does_not_depend_on_the_items_beside_it(rule):
    (u, c), (other_u, other_c) = pair(), pair(1)
    alone = rule(u, c, W, STEP)
    u[1], c[1] = 100 * other_u[1], other_c[1]
    assert torch.equal(rule(u, c, W, STEP)[0], alone[0])
    assert not torch.equal(rule(u, c, W, STEP)[1], alone[1])


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_gradients_are_finite_also_where_both_predictions_agree(rule):
    u, c = pair()
    c[0] = u[0]
    u.requires_grad_()
    c.requires_grad_()
    for gradient in torch.autograd.grad(rule(u, c, W, STEP).square().sum(), (u, c)):
        assert gradient.isfinite().all()
        assert (gradient.flatten(1) != 0).any(1).all()


def guider(kind, i, steps, **settings):
    made = getattr(diffusers.guiders, kind)(**settings)
    made.set_state(step=i, num_inference_steps=steps, timestep=torch.tensor(0))
    return made


@pytest.mark.parametrize("i", [0, 1, 3])
@pytest.mark.parametrize(
    ("rule", "kind", "settings"),
    [
        (cfg.Scale(), "ClassifierFreeGuidance", {}),
        (cfg.Rescale(0.7), "ClassifierFreeGuidance", {"guidance_rescale": 0.7}),
        (cfg.ZeroStar(1), "ClassifierFreeZeroStarGuidance", {"zero_init_steps": 1}),
        (
            cfg.Projected(0.2, norm=5.0),
            "AdaptiveProjectedGuidance",
            # the paper's formula counts the scale from the positive prediction
            {"use_original_formulation": True, "eta": 0.2, "guidance_scale": 3.0,
             "adaptive_projected_guidance_rescale": 5.0},
        ),
    ],
)  # fmt: skip
def test_a_rule_is_the_guider_of_diffusers(rule, kind, settings, i):
    u, c = pair()
    theirs = guider(kind, i, 4, **{"guidance_scale": 4.0, **settings})
    ours = rule(u, c, torch.full((2,), 4.0), torch.full((2,), i))
    close(ours, theirs.forward(c, u).pred)


@pytest.mark.parametrize("steps", [1, 3, 28, 100])
@pytest.mark.parametrize("ends", [(0.0, 1.0), (0.2, 0.8), (0.29, 0.57), (0.0, 0.58)])
def test_an_interval_guides_the_steps_that_diffusers_guides(ends, steps):
    rule = cfg.Interval(*ends)
    theirs = [
        guider("ClassifierFreeGuidance", i, steps, start=ends[0], stop=ends[1]).num_conditions == 2
        for i in range(steps)
    ]
    assert rule.guided(torch.arange(steps), steps).tolist() == theirs


def test_an_interval_goes_around_another_rule():
    u, c = pair()
    inner = cfg.Projected(0.2)
    outer = cfg.Interval(0.25, 0.75, cfg.Interval(0.5, 1.0, inner))
    assert outer.space == "clean"
    assert outer.guided(torch.arange(8), 8).tolist() == [4 <= i < 6 for i in range(8)]
    assert torch.equal(outer(u, c, W, STEP), inner(u, c, W, STEP))


def counting(module):
    """The list to which every call of `module` appends its rows."""
    rows = []
    module.register_forward_hook(lambda _, inputs, kwargs, out: rows.append(len(out[0])),
                                 with_kwargs=True)  # fmt: skip
    return rows


@pytest.mark.parametrize(
    ("rule", "guided"),
    [(None, [0, 1, 2, 3]), (cfg.Interval(0.25, 0.75, cfg.Projected()), [1, 2]),
     (cfg.ZeroStar(1), [0, 1, 2, 3])],
)  # fmt: skip
@pytest.mark.parametrize("family", [stable_diffusion, stable_diffusion_xl, stable_diffusion_3])
def test_rows_at_the_network_are_the_rows_planned(family, rule, guided):
    pipe = family()
    prompts = ["cat", "dog", "cow", "eel"]
    scales = [7.5, 1.0, 3.0, 0.0]
    model = from_pipeline(pipe, prompts, steps=4, guidance_scale=scales, cfg=rule)
    ledger = Ledger.empty(4)
    network = Network(model, ledger, batch=16)
    assert network.rows.tolist() == [
        [2 if scale > 1 and i in guided else 1 for i in range(4)] for scale in scales
    ]
    seen = counting(pipe.unet if hasattr(pipe, "unet") else pipe.transformer)
    i, row = torch.arange(16) // 4, torch.arange(16) % 4  # every step of every row, in one call
    x = model.process.prior(noise.root_key(0, torch.arange(16)))
    network(x, i, i, row)
    assert ledger.padded == 0
    assert sum(seen) == ledger.rows.sum() == network.rows.sum()


def test_flux_costs_one_row_whatever_its_scale():
    pipe = flux()
    model = from_pipeline(pipe, ["cat", "dog"], steps=3, guidance_scale=[1.0, 9.0])
    seen = counting(pipe.transformer)
    network = Network(model, Ledger.empty(2), batch=16)
    key = noise.root_key(0, torch.arange(16))
    network(model.process.prior(key), key * 0, torch.zeros(16).long(), torch.arange(16) % 2)
    assert seen == [16]
    assert network.rows.tolist() == [[1] * 3] * 2


def guesses(pipe, i, **options):
    """Clean guesses of eight particles of row 0 at step i of six."""
    model = from_pipeline(pipe, ["cat"], steps=6, **options)
    x = model.process.prior(noise.root_key(0, torch.arange(8)))
    step = torch.full((8,), i)
    with torch.no_grad():
        return model.denoiser(x, model.process.time(step), torch.zeros(8).long())


def test_steps_outside_an_interval_are_unguided_and_others_are_guided():
    pipe = stable_diffusion()
    for i in range(6):
        found = guesses(pipe, i, guidance_scale=5.0, cfg=cfg.Interval(1 / 3, 2 / 3))
        other = guesses(pipe, i, guidance_scale=5.0 if i in (2, 3) else 1.0)
        assert torch.equal(found, other)


V = {"prediction_type": "v_prediction"}
SPACES = {
    "epsilon": stable_diffusion(),
    "v": stable_diffusion(diffusers.DDIMScheduler(**SD_SCHEDULE, clip_sample=False, **V)),
    "flow": stable_diffusion_3(),
}


@pytest.mark.parametrize("kind", SPACES)
def test_projection_is_on_clean_guesses_whatever_the_network_puts_out(kind):
    pipe = SPACES[kind]
    c = guesses(pipe, 3, guidance_scale=1.0)
    plain = guesses(pipe, 3, guidance_scale=5.0)
    # linear, so the space does not matter: float32 rounding of guesses up to 20
    whole = guesses(pipe, 3, guidance_scale=5.0, cfg=cfg.Projected(eta=1.0))
    torch.testing.assert_close(whole, plain, atol=2e-5, rtol=1e-5)
    update = guesses(pipe, 3, guidance_scale=5.0, cfg=cfg.Projected()) - c
    parallel = (plain - c) - update
    # the cosine with c is 0 but for rounding, that of what was dropped is 1 or -1
    cosine = dot(update, c) / (dot(update, update) * dot(c, c)).sqrt()
    torch.testing.assert_close(cosine, torch.zeros(8), atol=1e-5, rtol=0)
    cosine = dot(parallel, c) / (dot(parallel, parallel) * dot(c, c)).sqrt()
    torch.testing.assert_close(cosine.abs(), torch.ones(8), atol=1e-3, rtol=0)


def test_zero_star_leaves_a_flow_where_it_is_in_its_first_step():
    options = {"guidance_scale": 5.0, "cfg": cfg.ZeroStar(1)}
    model = from_pipeline(SPACES["flow"], ["cat"], steps=6, eta=0.0, **options)
    x = model.process.prior(noise.root_key(0, torch.arange(8)))
    law = model.process.transition(
        x, torch.zeros(8).long(), guesses(SPACES["flow"], 0, eta=0.0, **options)
    )
    close(law.mean, x)
    assert not torch.equal(
        guesses(SPACES["flow"], 1, **options), guesses(SPACES["flow"], 1, guidance_scale=5.0)
    )


def test_an_interval_gives_the_image_of_a_pipeline_whose_guidance_is_cut_off():
    pipe = stable_diffusion()
    key = noise.root_key(3, torch.arange(1))
    options = {"steps": 5, "eta": 0.0, "guidance_scale": 20.0}
    model = from_pipeline(pipe, ["cat"], **options, cfg=cfg.Interval(0.0, 0.6))
    theirs = pipe(
        "cat",
        num_inference_steps=5,
        guidance_scale=20.0,
        latents=noise.normal(key, model.process.shape),
        output_type="pt",
        callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=0.4),  # after step 2
    ).images
    whole = our_images(from_pipeline(pipe, ["cat"], **options), key)
    # the project's figure for a pipeline's own images, and a hundred times that
    torch.testing.assert_close(our_images(model, key), theirs, atol=1e-4, rtol=0)
    assert (whole - theirs).abs().max() > 1e-2


def test_records_of_other_rules_have_other_names():
    pipe = stable_diffusion()
    rules = [None, cfg.Rescale(0.7), cfg.Rescale(0.5), cfg.Interval(0.0, 0.5)]
    names = [from_pipeline(pipe, ["cat"], steps=4, cfg=rule).name for rule in rules]
    assert len(set(names)) == len(rules)
    assert "cfg=Rescale(phi=0.7)" in names[1]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: cfg.Interval(0.8, 0.2), r"start=0.8, stop=0.2 .* shares of the steps"),
        (lambda: cfg.Interval(5, 20), "start=5, stop=20"),
        (lambda: cfg.Interval(0.0, float("nan")), "stop=nan"),
        (lambda: cfg.Interval(0.0, 0.5, cfg.Scale), "rule=.*Scale.* is no rule"),
        (lambda: cfg.Rescale(1.5), "phi=1.5"),
        (lambda: cfg.Rescale("all"), "phi='all'"),
        (lambda: cfg.ZeroStar(-1), "zero_steps=-1"),
        (lambda: cfg.ZeroStar(0.04), "zero_steps=0.04"),
        (lambda: cfg.Projected(eta=float("inf")), "eta=inf"),
        (lambda: cfg.Projected(norm=0), "norm=0"),
    ],
)
def test_a_rule_refuses_settings_that_mean_nothing(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    ("pipe", "prompts", "words"),
    [
        (lambda: flux(), ["cat"], "cfg is given, but guidance is distilled"),
        (lambda: pixel_pipeline(diffusers.DDIMScheduler()), None, "cfg is given, .*unconditional"),
        (
            lambda: stable_diffusion(diffusers.LCMScheduler(steps_offset=1), guidance_embedding=8),
            ["cat"],
            "cfg is given, but this student",
        ),
    ],
)
def test_a_model_without_pairs_refuses_a_rule(pipe, prompts, words):
    with pytest.raises(ValueError, match=words):
        from_pipeline(pipe(), prompts, steps=4, cfg=cfg.Scale())


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (cfg.Rescale, "cfg=.*Rescale.* is no rule"),
        (0.7, "cfg=0.7 is no rule"),
        (cfg.Interval(0.1, 0.2), r"cfg=Interval\(start=0.1.* guides none of 4 steps"),
    ],
)
def test_what_is_no_rule_for_these_steps_is_refused(rule, words):
    pipe = dit()
    with pytest.raises(ValueError, match=words):
        from_pipeline(pipe, [3], steps=4, cfg=rule)
