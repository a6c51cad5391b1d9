"""Pipelines as models: parity with the pipelines, costs, mistakes, and a pipe left alone."""

import copy
from types import SimpleNamespace

import diffusers
import pytest
import torch

from benchmarks import parity
from steering import cfg, from_pipeline, noise
from steering.pipelines.latent import PIXELS_AT_ONCE, LatentCodec
from steering.pipelines.request import NotNativeError
from tests.tiny_pipelines import (
    autoencoder,
    dit,
    flux,
    pixel_pipeline,
    stable_diffusion,
    stable_diffusion_3,
    stable_diffusion_xl,
)

CASES = parity.cases()
ASKED = {  # every latent family, and two conditions to ask of it
    stable_diffusion: ["cat", "dog"],
    stable_diffusion_xl: ["cat", "dog"],
    stable_diffusion_3: ["cat", "dog"],
    flux: ["cat", "dog"],
    dit: [3, 700],
}


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_parity(case):
    # 1e-4 is the project's figure; asking for something else must move the image 100 times that
    found = parity.compare(case, steps=4, seed=0)
    assert found.error <= parity.TOLERANCE
    assert min(found.moved.values()) >= 100 * parity.TOLERANCE


def ddim(**options):
    return diffusers.DDIMScheduler(**options)


def call(model, rows, **state):
    """One denoiser call at step 1 for the given rows, every particle at the same state."""
    row = torch.tensor(rows)
    x = model.process.prior(noise.root_key(0, torch.zeros_like(row)))
    x = x.to(**state) if state else x
    return model.denoiser(x, model.process.time(torch.ones_like(row)), row)


def test_rows_above_scale_1_cost_two():
    model = from_pipeline(
        stable_diffusion(), ["cat", "dog", "cow"], steps=4, guidance_scale=[7.5, 1.0, 0.0]
    )
    row = torch.tensor([0, 1, 2, 0])
    assert model.denoiser.rows(torch.zeros(4), row).tolist() == [2, 1, 1, 2]
    assert model.prompts == ("cat", "dog", "cow")


@pytest.mark.parametrize(
    ("family", "default"),
    [
        (stable_diffusion, 7.5),
        (stable_diffusion_xl, 5.0),
        (stable_diffusion_3, 7.0),
        (flux, 3.5),
        (dit, 4.0),
    ],
)
def test_guidance_scale_defaults_to_the_pipelines_own(family, default):
    pipe, asked = family(), ASKED[family][:1]
    with torch.no_grad():
        plain = call(from_pipeline(pipe, asked, steps=4), [0])
        named = call(from_pipeline(pipe, asked, steps=4, guidance_scale=default), [0])
        other = call(from_pipeline(pipe, asked, steps=4, guidance_scale=default + 1), [0])
    assert torch.equal(plain, named)
    assert not torch.equal(plain, other)


def test_a_student_distilled_on_its_scale_costs_one():
    pipe = stable_diffusion(diffusers.LCMScheduler(steps_offset=1), guidance_embedding=8)
    model = from_pipeline(pipe, ["cat"], steps=4, guidance_scale=8.0)
    assert model.denoiser.rows(torch.zeros(1), torch.zeros(1).long()).tolist() == [1]


def test_a_row_does_not_depend_on_the_rows_beside_it():
    model = from_pipeline(
        stable_diffusion(),
        ["cat", "dog", "cow"],
        steps=4,
        guidance_scale=[7.5, 1.0, 3.0],
        negative_prompts=["ant", "bee", "eel"],
    )
    with torch.no_grad():
        together = call(model, [2, 1, 0, 1])
        for k, row in enumerate([2, 1, 0, 1]):
            # networks are not bit-equal over batch sizes: float32 rounding of values up to 20
            torch.testing.assert_close(call(model, [row])[0], together[k], atol=1e-4, rtol=1e-5)


def test_the_guess_is_raw_and_the_process_clips():
    model = from_pipeline(pixel_pipeline(ddim()), steps=4, eta=0.0)
    x = 50 * model.process.prior(noise.root_key(0, torch.arange(2)))
    i = torch.full((2,), 3)
    with torch.no_grad():
        clean = model.denoiser(x, model.process.time(i), torch.zeros(2).long())
    assert clean.abs().max() > 10
    assert model.process.transition(x, i, clean).mean.abs().max() <= 1  # ends at bound(clean)


@pytest.mark.parametrize("family", ASKED)
def test_images_are_differentiable_in_the_state(family):
    model = from_pipeline(family(), ASKED[family], steps=4, guidance_scale=[3.0, 1.0])
    x = model.process.prior(noise.root_key(0, torch.arange(2))).requires_grad_()
    i = torch.tensor([1, 2])
    clean = model.denoiser(x, model.process.time(i), torch.arange(2))
    (gradient,) = torch.autograd.grad(model.decode(clean).sum(), x)
    assert gradient.isfinite().all()
    assert (gradient.flatten(1).abs().sum(1) > 0).all()


@pytest.mark.parametrize("family", ASKED)
def test_a_bfloat16_network_runs_under_float32_kernels(family):
    pipe = family().to(torch.bfloat16)
    model = from_pipeline(pipe, ASKED[family], steps=4)
    x = model.process.prior(noise.root_key(0, torch.arange(1)))
    with torch.no_grad():
        clean = call(model, [0])
        law = model.process.transition(x, torch.tensor([1]), clean)
        images = model.decode(clean)
    assert clean.dtype == law.mean.dtype == images.dtype == torch.float32
    assert images.isfinite().all()


def state_of(pipe):
    """All that a user could notice: weights, modes, gradients, scheduler, hooks."""
    parts = {}
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            parts[name] = [
                [module.training for module in part.modules()],
                [parameter.requires_grad for parameter in part.parameters()],
                [parameter.grad is None for parameter in part.parameters()],
                [parameter.data_ptr() for parameter in part.parameters()],
            ]
    scheduler = pipe.scheduler
    return parts, dict(scheduler.config), scheduler.timesteps.tolist(), id(scheduler)


@pytest.mark.parametrize("family", ASKED)
def test_the_pipe_is_left_as_it_was_found(family):
    pipe = family()
    if hasattr(pipe, "text_encoder"):
        pipe.text_encoder.train()
    networks = [pipe.unet if hasattr(pipe, "unet") else pipe.transformer, pipe.vae]
    for network in networks:
        network.train()
    networks[0].requires_grad_(False)
    pipe.scheduler.set_timesteps(3)
    before = copy.deepcopy(state_of(pipe)[:3]), id(pipe.scheduler)
    model = from_pipeline(pipe, ASKED[family], steps=4)
    with torch.no_grad():
        model.decode(call(model, [0]))
    assert (state_of(pipe)[:3], id(pipe.scheduler)) == before


def test_a_saved_pipeline_comes_back_as_the_same_chain(tmp_path):
    # stored configurations list which settings were defaults: clipping, here, undone by the pipe
    pipe = stable_diffusion(ddim(steps_offset=1))
    pipe.save_pretrained(tmp_path)
    loaded = diffusers.StableDiffusionPipeline.from_pretrained(
        tmp_path, local_files_only=True, requires_safety_checker=False, safety_checker=None
    )
    models = [from_pipeline(each, ["cat"], steps=4) for each in (pipe, loaded)]
    with torch.no_grad():
        assert torch.equal(*[call(model, [0]) for model in models])
    assert models[0].process.bound is models[1].process.bound is None


def test_dits_labels_are_not_dropped_in_training_mode():
    pipe = dit()
    model = from_pipeline(pipe, [3], steps=4)
    with torch.no_grad():
        expected = call(model, [0] * 64)
        pipe.transformer.train()
        assert torch.equal(call(model, [0] * 64), expected)


def test_texts_are_encoded_without_dropout():
    pipe = flux()
    expected = from_pipeline(pipe, ["cat"], steps=4).denoiser.positive
    pipe.text_encoder_2.train()  # which T5 has
    found = from_pipeline(pipe, ["cat"], steps=4).denoiser.positive
    assert torch.equal(found["encoder_hidden_states"], expected["encoder_hidden_states"])


def test_sdxl_without_negative_prompts_is_guided_away_from_zeros():
    pipe = stable_diffusion_xl()
    table = from_pipeline(pipe, ["cat"], steps=4).denoiser.negative
    empty = from_pipeline(pipe, ["cat"], steps=4, negative_prompts=[""]).denoiser.negative
    for name in ("encoder_hidden_states", "text_embeds"):
        assert not table[name].any()
        assert empty[name].any()
    assert table["time_ids"].tolist() == empty["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]]


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flux_is_told_sigma_on_the_grid_of_its_pipeline(shift):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    process = from_pipeline(flux(scheduler), ["cat"], steps=4).process
    even = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])
    sigma = shift * even / (1 + (shift - 1) * even)
    # float32 rounding of numbers up to 1
    torch.testing.assert_close(process.sigma.float(), sigma, atol=1e-6, rtol=0)
    torch.testing.assert_close(process.times, sigma[:-1], atol=1e-6, rtol=0)
    assert process.shape == (16, 16)  # 4 x 4 patches of 4 channels by 2 x 2


def test_dropout_is_off_even_in_training_mode():
    pipe = pixel_pipeline(ddim())
    for module in pipe.unet.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    model = from_pipeline(pipe, steps=4)
    with torch.no_grad():
        expected = call(model, [0])
        pipe.unet.train()
        assert torch.equal(call(model, [0]), expected)
    assert all(module.training for module in pipe.unet.modules())


def test_decoding_in_chunks_changes_nothing():
    vae = autoencoder(latent_channels=4)
    latents = noise.normal(noise.root_key(0, torch.arange(5)), (4, 8, 8))
    with torch.no_grad():
        whole = LatentCodec.of(vae, pixels=256)(latents)
        chunked = LatentCodec.of(vae, pixels=PIXELS_AT_ONCE // 2)(latents)
    assert whole.shape == (5, 3, 16, 16)
    torch.testing.assert_close(whole, chunked, atol=1e-6, rtol=0)


class Passing(torch.nn.Module):
    """An autoencoder that hands its latents through."""

    dtype = torch.float32
    config = SimpleNamespace(scaling_factor=1.0)

    def decode(self, latents, return_dict):
        return (latents,)


def test_an_image_with_a_hole_is_nan_as_a_whole():
    latents = torch.zeros(3, 1, 2, 2)
    latents[1, 0, 1, 1] = torch.inf  # which clamping alone would make a white pixel
    images = LatentCodec(Passing(), pixels=4)(latents)
    assert images[1].isnan().all()
    assert (images[[0, 2]] == 0.5).all()


def test_a_float16_decoder_works_in_float32_on_a_copy():
    vae = autoencoder(latent_channels=4).half()
    decoder = LatentCodec.of(vae, pixels=256)
    latents = 1e4 * noise.normal(noise.root_key(0, torch.arange(2)), (4, 8, 8))  # over 65504 inside
    with torch.no_grad():
        assert decoder(latents).isfinite().all()
    assert vae.dtype == torch.float16


def test_a_pipeline_of_a_users_subclass_is_served_unless_it_has_its_own_loop():
    class Renamed(diffusers.DDIMPipeline):
        pass

    class OwnLoop(diffusers.DDIMPipeline):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs)

    name = from_pipeline(pixel_pipeline(ddim(), Renamed), steps=4).name
    assert name.partition("#")[0] == "Renamed"
    assert from_pipeline(pixel_pipeline(ddim(), Renamed), steps=4).about == "native (unet2d)"
    pipe = pixel_pipeline(ddim(), OwnLoop)
    with pytest.raises(NotNativeError, match="OwnLoop has no native adapter"):
        from_pipeline(pipe, steps=4, route="native")
    assert from_pipeline(pipe, steps=4).about.startswith("driven")


def test_another_order_of_solver_is_named_where_the_user_calls():
    pipe = stable_diffusion(diffusers.PNDMScheduler(steps_offset=1))
    with pytest.warns(UserWarning, match="PNDMScheduler.* DDIM kernel") as caught:
        from_pipeline(pipe, ["cat"], steps=4)
    named = [warning for warning in caught if "PNDMScheduler" in str(warning.message)]
    assert [warning.filename for warning in named] == [__file__]


@pytest.fixture(scope="module")
def pipes():
    made = {
        "pixels": pixel_pipeline(ddim()),
        "classes": pixel_pipeline(ddim(), classes=5),
        "sd": stable_diffusion(),
        "sd3": stable_diffusion_3(),
        "learned": pixel_pipeline(ddim()),
        "text": "stabilityai/stable-diffusion",
        "sdxl": stable_diffusion_xl(),
        "flux": flux(),
        "schnell": flux(guidance=False),
        "dit": dit(),
        "few": dit(),
        "fill": flux(),
        "heun": flux(diffusers.FlowMatchHeunDiscreteScheduler()),
        "aesthetic": stable_diffusion_xl(),
        "playground": stable_diffusion_xl(),
        "other": object.__new__(diffusers.AuraFlowPipeline),
    }
    made["learned"].unet.register_to_config(out_channels=2)
    made["few"].transformer.register_to_config(num_embeds_ada_norm=10)
    made["fill"].transformer.register_to_config(in_channels=96)
    made["aesthetic"].unet.register_to_config(addition_embed_type="text_image")
    made["playground"].vae.register_to_config(latents_mean=[0.0] * 4)

    def never(*_, **__):
        raise AssertionError("a network was called before the arguments were checked")

    for pipe in made.values():
        for part in getattr(pipe, "components", {}).values():
            if isinstance(part, torch.nn.Module):
                part.forward = never
    return made


BAD = [
    ("text", {}, "pipe is a str"),
    ("other", {}, "AuraFlowPipeline, no diffusers pipeline"),
    ("learned", {}, "learned variance"),
    ("pixels", {"steps": 0}, "steps=0"),
    ("pixels", {"steps": 1001}, "from 1 to 1000"),
    ("pixels", {"steps": True}, "steps=True"),
    ("pixels", {"eta": 1.1}, "eta=1.1"),
    ("pixels", {"eta": "ddim"}, "eta='ddim'"),
    ("pixels", {"prompts": ["a cat"]}, "unconditional"),
    ("pixels", {"guidance_scale": 2.0}, "unconditional"),
    ("pixels", {"height": 16}, "height=16 cannot be had"),
    ("classes", {}, "prompts is missing"),
    ("classes", {"prompts": []}, "prompts is empty"),
    ("classes", {"prompts": ["cat"]}, "prompts has 'cat'"),
    ("classes", {"prompts": [5]}, "from 0 to 4"),
    ("classes", {"prompts": [1], "guidance_scale": 2.0}, "negative_prompts is missing"),
    ("sd", {}, "prompts is missing"),
    ("sd", {"prompts": "cat"}, r"give \['cat'\]"),
    ("sd", {"prompts": [3]}, "prompts has 3"),
    ("sd", {"prompts": []}, "prompts is empty"),
    ("sd", {"negative_prompts": ["cat"]}, "without prompts"),
    ("sd", {"prompts": ["a", "b"], "negative_prompts": ["c"]}, "1 entries for 2"),
    ("sd", {"prompts": ["a"], "negative_prompts": [None]}, "negative_prompts has None"),
    ("sd", {"prompts": ["a"], "guidance_scale": [1.0, 2.0]}, "2 entries for 1"),
    ("sd", {"prompts": ["a"], "guidance_scale": float("nan")}, "guidance_scale has nan"),
    ("sd", {"prompts": ["a"], "guidance_scale": "7"}, "guidance_scale='7'"),
    ("sd", {"prompts": ["a"], "height": 17}, "height=17"),
    ("sd", {"prompts": ["a"], "width": 16.0}, "width=16.0"),
    ("sd", {"prompts": ["a"], "height": 0}, "height=0"),
    ("sd", {"prompts": ["a"], "cfg": 0.7}, "cfg=0.7 is no rule"),
    ("sd", {"prompts": ["a"], "cfg": cfg.Interval(0.1, 0.2)}, "guides none of 4 steps"),
    ("sdxl", {}, "prompts is missing"),
    ("sdxl", {"prompts": ["a"], "height": 12}, "height=12"),
    ("aesthetic", {"prompts": ["a"], "route": "native"}, "addition_embed_type='text_image'"),
    ("playground", {"prompts": ["a"], "route": "native"}, "latents_mean"),
    ("flux", {"prompts": ["a"], "width": 10}, "width=10"),
    ("flux", {"prompts": ["a"], "negative_prompts": ["b"]}, "negative_prompts is given"),
    ("flux", {"prompts": ["a"], "cfg": cfg.Scale()}, "cfg is given"),
    ("flux", {"prompts": ["a"], "steps": 0}, "steps=0"),
    ("flux", {"prompts": ["a"], "steps": 1001}, "from 1 to 1000"),
    ("flux", {"prompts": ["a"], "steps": 4.0}, "steps=4.0"),
    ("schnell", {"prompts": ["a"], "guidance_scale": 3.5}, "guidance_scale is given"),
    ("fill", {"prompts": ["a"], "route": "native"}, "96 channels"),
    (
        "heun",
        {"prompts": ["a"], "route": "native"},
        "FlowMatchHeunDiscreteScheduler is not supported",
    ),
    ("dit", {}, "prompts is missing"),
    ("dit", {"prompts": [1000]}, "from 0 to 999"),
    ("dit", {"prompts": [3], "negative_prompts": [1]}, "negative_prompts is given"),
    ("dit", {"prompts": [3], "height": 32}, "height=32 cannot be had"),
    ("few", {"prompts": [3], "route": "native"}, "10 classes"),
    ("sd3", {"prompts": ["a"], "width": 15}, "width=15"),
    ("sd3", {"prompts": ["a"], "width": 64}, "at most 32"),
]


@pytest.mark.parametrize(("name", "arguments", "words"), BAD)
def test_a_mistake_is_one_clear_error_before_any_network_call(pipes, name, arguments, words):
    with pytest.raises(ValueError, match=words):
        from_pipeline(pipes[name], **{"steps": 4, **arguments})
