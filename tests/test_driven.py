"""Pipelines driven unmodified say what they say themselves, and are left as they were."""

from __future__ import annotations

import inspect
import threading
from functools import partial, wraps
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.families import against_itself, own_chain, own_run
from samplers import SMC, BestOfN, TreeSearch, sample
from steering import from_pipeline, noise
from steering.pipelines.driven import DrivenDenoiser
from steering.pipelines.opening import CannotDriveError
from steering.pipelines.oracle import NotSeenError
from tests.tiny import Tiny, families
from tests.tiny_pipelines import flux, pixel_pipeline, stable_diffusion, stable_diffusion_3

PROMPTS = ["a red fox", "two blue jays on a wire"]
BY_NAME = {tiny.name: tiny for tiny in families()}
# one of each way that states go in and out: plain, exploding, packed, arranged, doubled, clips
SOME = [
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "FluxPipeline",
    "Flux2Pipeline",
    "DiTPipeline",
    "WanPipeline",
]


def driven(tiny: Tiny, pipe: Any = None, prompts: Any = None, **options: Any) -> Any:
    """A tiny pipeline as a driven model of two prompts, four steps."""
    call = dict(tiny.call)
    own = {name: call.pop(name) for name in ("height", "width", "guidance_scale") if name in call}
    default = {"text": PROMPTS, "class": [1, 2], None: None}[tiny.prompt]
    return from_pipeline(
        tiny.build() if pipe is None else pipe,
        default if prompts is None else prompts,
        **{"steps": 4, "route": "driven", "call": call or None, **own, **options},
    )


def starts(model: Any, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """States of n rows at steps 0, 1, ... and conditions in turn."""
    i = torch.arange(n) % model.process.steps
    x = model.process.prior(noise.root_key(3, torch.arange(n)))
    return x, i, model.process.time(i), torch.arange(n) % len(model.prompts)


def one_by_one(model: Any, x: torch.Tensor, t: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    rows = [slice(k, k + 1) for k in range(len(x))]
    return torch.cat([model.denoiser(x[k], t[k], row[k]) for k in rows])


def red(items: torch.Tensor, prompts: Any) -> torch.Tensor:
    return items.movedim(-3, 0)[0].flatten(1).mean(1)


@pytest.mark.parametrize("name", SOME)
def test_our_chain_without_noise_ends_in_the_pipelines_own_image(name):
    tiny = BY_NAME[name]
    build = partial(driven, tiny, prompts=["a red fox"] if tiny.prompt == "text" else [1], eta=0.0)
    # float32 over a whole chain of random networks, as for native adapters
    apart = own_chain(tiny, build, tiny.build())
    assert apart is not None
    assert apart <= 1e-4


@pytest.mark.parametrize("name", SOME)
def test_all_steps_and_decoding_are_those_of_the_pipeline_to_the_bit(name):
    tiny = BY_NAME[name]
    pipe = tiny.build()
    assert against_itself(driven(tiny, pipe), tiny, pipe) == ()


@pytest.mark.parametrize("name", [*SOME, "StableDiffusionInpaintPipeline"])
def test_a_batch_of_steps_and_prompts_is_what_its_rows_are_alone(name):
    model = driven(BY_NAME[name])
    x, _, t, row = starts(model, 6)
    with torch.no_grad():
        together = model.denoiser(x, t, row)
        alone = torch.cat(
            [model.denoiser(x[k : k + 1], t[k : k + 1], row[k : k + 1]) for k in range(6)]
        )
        other = model.denoiser(x, t, 1 - row)
    scale = float(alone.abs().max())
    # float32 sums in another order; the prompts move it by far more
    assert (together - alone).abs().max() < 1e-4 * scale
    # of SDXL's random network the prompt moves little, and still by far more than rounding
    assert (together - other).abs().max() > (1e-3 if "XL" in name else 1e-2) * scale
    assert model.denoiser.mixes


@pytest.mark.parametrize(
    ("pipe", "prompts", "options"),
    [
        (lambda: stable_diffusion(), PROMPTS, {"guidance_scale": [5.0, 1.0]}),
        (lambda: stable_diffusion(diffusers.EulerDiscreteScheduler()), PROMPTS, {}),
        (lambda: stable_diffusion(diffusers.LCMScheduler()), PROMPTS, {}),
        (lambda: stable_diffusion(), PROMPTS, {"negative_prompts": ["rain", "snow"]}),
        (lambda: stable_diffusion_3(), PROMPTS, {"height": 32, "width": 16}),
        (lambda: pixel_pipeline(diffusers.DDIMScheduler()), None, {}),
        (lambda: pixel_pipeline(diffusers.DDPMScheduler(), diffusers.DDPMPipeline), None, {}),
    ],
)
def test_both_routes_give_the_same_numbers(pipe, prompts, options):
    made = pipe()
    native, other = (
        from_pipeline(made, prompts, steps=4, route=route, **options)
        for route in ("native", "driven")
    )
    x, i, t, row = starts(native, 6)
    assert torch.equal(x, starts(other, 6)[0])
    with torch.no_grad():
        clean = [m.denoiser(x, t, row) for m in (native, other)]
        torch.testing.assert_close(*clean, rtol=0, atol=1e-4 * float(clean[0].abs().max()))
        torch.testing.assert_close(native.decode(x), other.decode(x), rtol=0, atol=1e-5)
    key = noise.root_key(5, torch.arange(6))
    laws = [m.process.transition(x, i, clean[0]).sample(key) for m in (native, other)]
    assert torch.equal(*laws)
    assert torch.equal(native.denoiser.rows(t, row), other.denoiser.rows(t, row))
    assert native.about.startswith("native")
    assert other.about.startswith("driven")


def signed(call: Any, like: Any) -> Any:
    """A function that says it takes what another does, and hides it."""
    call.__signature__ = inspect.signature(like)
    return call


def same(pipe: Any, before: dict[str, Any]) -> bool:
    now = vars(pipe)
    assert type(pipe).__module__.startswith("diffusers.")
    assert "_execution_device" not in vars(type(pipe))
    return now.keys() == before.keys() and all(now[k] is before[k] for k in now)


@pytest.mark.parametrize(
    "name", ["StableDiffusionControlNetPipeline", "FluxPipeline", "StableDiffusionPAGPipeline"]
)
def test_no_trace_is_left_also_after_an_exception(name, monkeypatch):
    import sys

    tiny = BY_NAME[name]
    pipe = tiny.build()
    module = sys.modules[type(pipe).__module__]
    before, names, state = dict(vars(pipe)), dict(vars(module)), torch.get_rng_state()
    times = pipe.scheduler.timesteps
    network = getattr(pipe, "unet", None) or pipe.transformer
    attention = dict(network.attn_processors)
    model = driven(tiny, pipe)
    sample(model, red, BestOfN(2), nfe=1000, progress=False)
    assert same(pipe, before)

    def broken(*_: Any, **__: Any) -> None:
        raise OSError("the cable is out")

    monkeypatch.setattr(network, "forward", broken)
    x, _, t, row = starts(model, 2)
    with pytest.raises(OSError, match="cable"):
        model.denoiser(x, t, row)
    assert same(pipe, before)
    assert vars(module) == names
    assert torch.equal(torch.get_rng_state(), state)
    assert pipe.scheduler.timesteps is times
    assert network.attn_processors == attention


def test_gradients_reach_the_state_and_no_weight_keeps_one():
    tiny = BY_NAME["FluxPipeline"]
    pipe = tiny.build()
    model = driven(tiny, pipe)
    x, _, t, row = starts(model, 2)
    x.requires_grad_(True)
    clean = model.denoiser(x, t, row)
    assert torch.autograd.grad(clean.square().sum(), x)[0].abs().sum() > 0
    image = model.decode(clean.detach().requires_grad_(True))
    assert image.requires_grad
    assert all(weight.grad is None for weight in pipe.transformer.parameters())


def test_rows_at_the_network_are_those_planned_for_every_step():
    """A guidance that ends half-way, counted by a hook of the network's own."""
    tiny = BY_NAME["Lumina2Pipeline"]
    pipe = tiny.build()
    seen: list[int] = []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    short = {"max_sequence_length": tiny.call["max_sequence_length"]}
    model = driven(tiny, pipe, call={**short, "cfg_trunc_ratio": 0.5}, steps=16)
    x, _, t, row = starts(model, 16)
    planned = model.denoiser.rows(t, row)
    assert planned.tolist() == [2] * 8 + [1] * 8
    seen.clear()
    model.denoiser(x, t, row)
    assert sum(seen) == int(planned.sum())
    seen.clear()
    run = sample(model, red, TreeSearch(branch="even"), nfe=120, progress=False)
    assert sum(seen) == run.nfe
    assert run.spent.padded == 0


def test_a_network_that_takes_other_rows_than_planned_ends_the_run():
    tiny = BY_NAME["StableDiffusionPipeline"]
    pipe = tiny.build()
    model = driven(tiny, pipe)
    inputs = model.denoiser.oracle.inputs
    inputs.fixed = {**inputs.fixed, "guidance_scale": 1.0}
    inputs.scales = None
    x, _, t, row = starts(model, 2)
    with pytest.raises(RuntimeError, match=r"2 rows at steps .* where 4 were planned"):
        model.denoiser(x, t, row)


@pytest.mark.parametrize(("steps", "end"), [(12, 0.5), (16, 0.5), (50, 0.8), (9, 0.12)])
def test_a_control_that_ends_half_way_keeps_steps_apart(steps, end):
    """Wherever it ends, at a multiple of the tests' batch or not."""
    tiny = BY_NAME["StableDiffusionControlNetPipeline"]
    model = driven(
        tiny, steps=steps, call={"image": tiny.call["image"], "control_guidance_end": end}
    )
    assert not model.denoiser.mixes
    assert not model.denoiser.fills


def test_a_control_that_ends_half_way_is_right_at_every_step():
    """What holds at some steps only goes by the loop's index: such steps do not share a call."""
    tiny = BY_NAME["StableDiffusionControlNetPipeline"]
    gated = Tiny(tiny.name, tiny.make, {**tiny.call, "control_guidance_end": 0.5})
    pipe = gated.build()
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    model = driven(gated, pipe)
    assert not model.denoiser.mixes
    shown, _ = own_run(
        pipe, gated, noise.normal(noise.root_key(0, torch.arange(1)), model.process.shape)
    )
    full = driven(tiny, pipe)
    for i, (state, output, _) in enumerate(shown):
        at = model.denoiser.grid.at([i])
        assert torch.equal(model.denoiser.oracle.query(state, [0], at).output, output)
        without = full.denoiser.oracle.query(state, [0], at).output
        assert torch.equal(without, output) == (i < 2)


def test_prompts_of_other_lengths_get_calls_of_their_own():
    tiny = BY_NAME["QwenImagePipeline"]
    model = driven(tiny, prompts=["a fox", "a red fox in the snow", "b fox"])
    short, long, as_short = model.denoiser.kind
    assert short == as_short != long
    x, _, t, _ = starts(model, 3)
    with torch.no_grad():
        together = model.denoiser(x, t, torch.tensor([0, 1, 2]))
        alone = [
            driven(tiny, prompts=[p]).denoiser(x[k : k + 1], t[k : k + 1], torch.tensor([0]))
            for k, p in enumerate(model.prompts)
        ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_text_encoders_have_no_work_after_opening():
    tiny = BY_NAME["FluxPipeline"]
    pipe = tiny.build()
    model = driven(tiny, pipe)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a text encoder was called")

    pipe.text_encoder.forward = pipe.text_encoder_2.forward = never
    run = sample(model, red, SMC(4), nfe=100, progress=False)
    assert run.failed == 0


def test_an_image_is_encoded_once():
    tiny = BY_NAME["FluxFillPipeline"]
    pipe = tiny.build()
    model = driven(tiny, pipe)
    x, _, t, row = starts(model, 2)
    with torch.no_grad():
        model.denoiser(x, t, row)

        def never(*_: Any, **__: Any) -> None:
            raise AssertionError("the image was encoded again")

        pipe.vae.encoder.forward = never
        model.denoiser(x, t, row)
        model.decode(x)


def test_two_threads_may_ask_and_decode_at_once():
    model = driven(BY_NAME["StableDiffusionPipeline"])
    x, _, t, row = starts(model, 2)
    with torch.no_grad():
        clean, image = model.denoiser(x, t, row), model.decode(x)
    wrong: list[Any] = []

    def decode() -> None:
        try:
            for _ in range(20):
                with torch.no_grad():
                    if not torch.equal(model.decode(x), image):
                        wrong.append("image")
        except Exception as error:
            wrong.append(error)

    beside = threading.Thread(target=decode)
    beside.start()
    with torch.no_grad():
        for _ in range(20):
            assert torch.equal(model.denoiser(x, t, row), clean)
    beside.join()
    assert not wrong


def test_prompts_that_are_there_twice_do_not_hide_those_that_are_not(monkeypatch):
    """Embeddings in a form that nobody knows cannot be put together: each prompt by itself."""
    pipe = stable_diffusion()
    encode = type(pipe).encode_prompt

    @wraps(encode)
    def in_a_dictionary(self: Any, *args: Any, **kwargs: Any) -> Any:
        return dict(zip(("a", "b"), encode(self, *args, **kwargs), strict=True))

    kept = type(pipe).__call__.__wrapped__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        made = self.encode_prompt
        vars(self)["encode_prompt"] = lambda *a, **k: tuple(made(*a, **k).values())
        return kept(self, *args, **kwargs)

    monkeypatch.setattr(type(pipe), "encode_prompt", in_a_dictionary)
    monkeypatch.setattr(type(pipe), "__call__", signed(call, kept))
    model = from_pipeline(pipe, ["a fox", "blue jay", "a fox"], steps=4, route="driven")
    x, _, t, row = starts(model, 3)
    with torch.no_grad():
        torch.testing.assert_close(
            model.denoiser(x, t, row), one_by_one(model, x, t, row), rtol=0, atol=1e-4
        )


def test_a_list_as_long_as_a_batch_is_no_list_of_its_rows():
    tiny = BY_NAME["Flux2Pipeline"]
    call = {name: value for name, value in tiny.call.items() if name not in ("height", "width")}
    model = driven(tiny, call={**call, "text_encoder_out_layers": [0, 1, 2]})
    as_tuple = driven(tiny, call={**call, "text_encoder_out_layers": (0, 1, 2)})
    x, _, t, row = starts(model, 3)
    with torch.no_grad():
        assert torch.equal(model.denoiser(x, t, row), as_tuple.denoiser(x, t, row))


def test_a_pipeline_of_one_state_a_call_is_asked_and_decodes_one_by_one(monkeypatch):
    pipe = stable_diffusion()
    kept = type(pipe).__call__.__wrapped__

    def one(self: Any, prompt: Any = None, **kwargs: Any) -> Any:
        if len(prompt) > 1:
            raise ValueError("one prompt at a time")
        return kept(self, prompt, **kwargs)

    monkeypatch.setattr(type(pipe), "__call__", signed(one, kept))
    seen: list[int] = []
    pipe.unet.register_forward_pre_hook(lambda net, args: seen.append(len(args[0])))
    model = from_pipeline(pipe, ["a fox"], steps=4, route="driven")
    seen.clear()
    run = sample(model, red, BestOfN(5), progress=False)
    assert run.items.shape[0] == 5
    assert (run.spent.rescored, run.failed) == (0, 0)
    assert sum(seen) == run.nfe  # and no call was filled up


@pytest.mark.parametrize("leak", [0.03, 0.1])
def test_half_precision_hides_no_leak(leak, monkeypatch):
    pipe = stable_diffusion().to(torch.bfloat16)
    assert from_pipeline(pipe, ["a fox"], steps=4, route="driven").denoiser.batches
    forward = pipe.unet.forward

    def leaking(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return forward(x + leak * (x[:1] - x), *args, **kwargs)

    monkeypatch.setattr(pipe.unet, "forward", leaking)
    assert not from_pipeline(pipe, ["a fox"], steps=4, route="driven").denoiser.batches


def test_records_know_what_changes_a_model():
    """Arrays in `call`, FreeU, a shift, another autoencoder or text encoder."""
    tiny = BY_NAME["StableDiffusionControlNetPipeline"]
    arrays = [np.full((1, 16, 16, 3), value) for value in (0.0, 1.0)]
    names = [driven(tiny, call={"image": array}).name for array in arrays]
    pipe = tiny.build()
    names += [driven(tiny, pipe).name]
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    names += [driven(tiny, pipe).name]
    pipe.disable_freeu()
    pipe.vae.post_quant_conv.weight.data += 1
    names += [driven(tiny, pipe).name]
    next(pipe.text_encoder.parameters()).data += 1
    names += [driven(tiny, pipe).name]
    flow = stable_diffusion_3()
    names += [from_pipeline(flow, ["a fox"], steps=4).name]
    flow.scheduler.set_shift(2.0)
    names += [from_pipeline(flow, ["a fox"], steps=4).name]
    assert len(set(names)) == len(names)
    with pytest.raises(ValueError, match="call holds a object, which a record could not tell"):
        from_pipeline(stable_diffusion(), ["a"], steps=4, call={"cross_attention_kwargs": object()})


# --- refusals ----------------------------------------------------------------------------------


def test_what_depends_on_earlier_steps_is_refused():
    class Momentum(diffusers.DDIMPipeline):
        """Guidance that remembers its last correction."""

        @torch.no_grad()
        def __call__(self, batch_size=1, generator=None, num_inference_steps=4,
                     output_type="pil", latents=None, return_dict=True):  # fmt: skip
            from diffusers.utils.torch_utils import randn_tensor

            size = (batch_size, 1, 8, 8)
            x = randn_tensor(size, generator=generator) if latents is None else latents
            self.scheduler.set_timesteps(num_inference_steps)
            last = 0
            for t in self.scheduler.timesteps:
                out = self.unet(x, t).sample + 0.5 * last
                last = out
                x = self.scheduler.step(out, t, x).prev_sample
            return (x,)

    with pytest.raises(CannotDriveError, match="depends on earlier steps"):
        from_pipeline(pixel_pipeline(diffusers.DDIMScheduler(), Momentum), steps=4)


def test_what_blends_an_image_in_is_refused():
    pipe = stable_diffusion()
    kind = diffusers.StableDiffusionInpaintPipeline
    inpaint = kind(**pipe.components, requires_safety_checker=False)
    inpaint.set_progress_bar_config(disable=True)
    gray = Image.new("RGB", (16, 16), (128, 128, 128))
    half = Image.new("L", (16, 16))
    half.paste(255, (0, 0, 8, 16))
    with pytest.raises(CannotDriveError, match="changes states between steps"):
        from_pipeline(inpaint, ["a fox"], steps=4, height=16, width=16,
                      call={"image": gray, "mask_image": half})  # fmt: skip


def test_what_starts_from_an_image_is_refused():
    pipe = stable_diffusion()
    img2img = diffusers.StableDiffusionImg2ImgPipeline(
        **pipe.components, requires_safety_checker=False
    )
    gray = Image.new("RGB", (16, 16), (128, 128, 128))
    with pytest.raises(CannotDriveError, match="starts from a noised image"):
        from_pipeline(img2img, ["a fox"], steps=4, call={"image": gray, "strength": 0.5})


def test_a_state_that_is_not_the_one_given_is_noticed_in_every_call():
    model = driven(BY_NAME["StableDiffusionPipeline"])
    oracle = model.denoiser.oracle
    forward = type(oracle.pipe).prepare_latents

    def shifted(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return forward(self, *args, **kwargs) + 1

    vars(oracle.pipe)["prepare_latents"] = shifted.__get__(oracle.pipe)
    x, _, t, row = starts(model, 1)
    with pytest.raises(NotSeenError):
        model.denoiser(x, t, row)


BAD = [
    ({"call": {"latents": 1}}, "set by the run"),
    ({"call": {"prompt": "x"}}, "give prompts="),
    ({"call": {"num_inference_steps": 3}}, "give steps="),
    ({"call": {"controlnet_scale": 1}}, "does not take"),
    ({"route": "fast"}, "route='fast'"),
    ({"steps": 4.5}, "steps=4.5"),
    ({"height": 16}, "height=16 is given without the other side"),
    ({"guidance_scale": "7"}, "is a text"),
    ({"call": {"callback": print}}, "set by the run"),
    ({"preview": 3}, "preview=3 is neither"),
    ({"preview": lambda x: x[:, 9]}, "preview does not decode"),
    ({"prompts": "a fox"}, r"give \['a fox'\]"),
    ({"prompts": [1]}, "prompts has 1"),
    ({"call": {"image": None}, "route": "native"}, "native adapters take no image"),
]


@pytest.mark.parametrize(("options", "words"), BAD)
def test_a_mistake_is_named(options, words):
    options = {"prompts": ["a fox"], "route": "driven", "steps": 4, **options}
    with pytest.raises((ValueError, TypeError), match=words):
        from_pipeline(stable_diffusion(), **options)


def test_the_opening_notices_a_batch_that_leaks(monkeypatch):
    """Break it on purpose: a network whose second row sees the first is not called with both."""
    tiny = BY_NAME["StableDiffusionPipeline"]
    pipe = tiny.build()
    forward = pipe.unet.forward

    def leaking(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return forward(x + 0.01 * x[:1].mean() * (len(x) > 2), *args, **kwargs)

    monkeypatch.setattr(pipe.unet, "forward", leaking)
    model = driven(tiny, pipe)
    assert isinstance(model.denoiser, DrivenDenoiser)
    assert not model.denoiser.batches
    x, _, t, row = starts(model, 3)
    with torch.no_grad():
        assert torch.equal(model.denoiser(x, t, row), one_by_one(model, x, t, row))


@pytest.mark.parametrize("route", ["native", "driven"])
@pytest.mark.parametrize("make", [stable_diffusion, flux])
def test_a_preview_decodes_guesses_on_the_way_and_nothing_that_arrives(make, route):
    pipe = make()
    rough = diffusers.AutoencoderTiny(
        latent_channels=pipe.vae.config.latent_channels,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).eval()
    options: dict[str, Any] = {"steps": 4, "route": route}
    plain = from_pipeline(pipe, ["a fox"], **options)
    model = from_pipeline(pipe, ["a fox"], preview=rough, **options)
    x, *_ = starts(model, 2)
    with torch.no_grad():
        assert torch.equal(model.decode(x), plain.decode(x))
        assert model.preview(x).shape == plain.decode(x).shape
        assert not torch.equal(model.preview(x), plain.decode(x))
    shown: list[torch.Tensor] = []

    def reward(items: torch.Tensor, prompts: Any) -> torch.Tensor:
        shown.extend(items)
        return items.mean((1, 2, 3))

    run = sample(model, reward, SMC(4, levels=(2,)), nfe=100, progress=False)
    arrived = {image.mean().item() for image in shown} & {i.mean().item() for i in run.items}
    assert len(arrived) == len(run.items) == len(shown) // 2
    assert not same_images(shown[:4], run.items)


def same_images(some: list[torch.Tensor], items: torch.Tensor) -> bool:
    return any(torch.equal(one, item) for one in some for item in items)


@pytest.mark.parametrize("steps", [4, 12])
def test_guidance_with_momentum_is_refused_wherever_it_begins(steps):
    from diffusers import AdaptiveProjectedMixGuidance

    tiny = BY_NAME["HunyuanImagePipeline"]
    pipe = tiny.build()
    pipe.guider = AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=2)
    before = dict(vars(pipe.guider))
    with pytest.raises(CannotDriveError, match="depends on earlier steps"):
        driven(tiny, pipe, steps=steps)
    assert vars(pipe.guider) == before


def test_an_opening_that_runs_out_of_memory_asks_less_at_once(monkeypatch):
    tiny = BY_NAME["StableDiffusionPipeline"]
    pipe = tiny.build()
    forward = pipe.unet.forward

    def small(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if len(x) > 4:  # two states, guided
            raise torch.OutOfMemoryError
        return forward(x, *args, **kwargs)

    monkeypatch.setattr(pipe.unet, "forward", small)
    model = driven(tiny, pipe, prompts=["a", "b", "c"])
    assert model.denoiser.fills


@pytest.mark.parametrize("route", ["native", "driven"])
def test_a_scale_that_is_not_heeded_is_refused_unless_it_asks_for_nothing(route):
    pipe = flux(guidance=False)
    assert from_pipeline(pipe, ["a fox"], steps=2, guidance_scale=0.0, route=route).about
    with pytest.raises(ValueError, match="guidance_scale is given"):
        from_pipeline(pipe, ["a fox"], steps=2, guidance_scale=3.5, route=route)


def test_a_gate_of_guided_conditions_is_found_behind_one_that_is_not():
    tiny = BY_NAME["Lumina2Pipeline"]
    call = {"max_sequence_length": tiny.call["max_sequence_length"], "cfg_trunc_ratio": 0.5}
    for scales in ([1.0, 4.0], [4.0, 1.0]):
        model = driven(tiny, steps=8, call=call, guidance_scale=scales)
        assert not model.denoiser.mixes
        x, _, t, row = starts(model, 8)
        with torch.no_grad():
            model.denoiser(x, t, row)  # what it takes is what was planned


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_levels_whole(dtype):
    pipe = BY_NAME["StableDiffusionXLPipeline"].build().to(dtype)
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(
        pipe.scheduler.config, use_karras_sigmas=True, sigma_max=700.0
    )
    model = driven(BY_NAME["StableDiffusionXLPipeline"], pipe, steps=16)
    assert model.denoiser.mixes


def test_what_an_opening_that_fails_has_put_in_is_taken_out():
    from diffusers import SkipLayerGuidance

    pag, hunyuan = BY_NAME["StableDiffusionPAGPipeline"], BY_NAME["HunyuanImagePipeline"]
    first, second = pag.build(), hunyuan.build()
    second.guider = SkipLayerGuidance(
        skip_layer_config=diffusers.LayerSkipConfig(indices=[0], fqn="transformer_blocks"),
        skip_layer_guidance_start=0.0,
        skip_layer_guidance_stop=1.0,
    )
    attention = dict(first.unet.attn_processors)
    for tiny, pipe, network in ((pag, first, first.unet), (hunyuan, second, second.transformer)):
        forward, calls = network.forward, []

        def short(*args: Any, forward: Any = forward, calls: list = calls, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) > 1:
                raise torch.OutOfMemoryError
            return forward(*args, **kwargs)

        network.forward = short
        with pytest.raises((CannotDriveError, torch.OutOfMemoryError)):
            driven(tiny, pipe)
        network.forward = forward
    assert first.unet.attn_processors == attention
    hooks = [m._diffusers_hook.hooks for m in second.transformer.modules()
             if hasattr(m, "_diffusers_hook")]  # fmt: skip
    assert not any(hooks)
    driven(hunyuan, second)


def test_a_model_moved_or_tiled_keeps_its_name_in_records(tmp_path):
    import shutil

    pipe = stable_diffusion()
    pipe.save_pretrained(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    loaded = [
        diffusers.DiffusionPipeline.from_pretrained(tmp_path / name, safety_checker=None)
        for name in ("a", "b")
    ]
    loaded[1].vae.enable_tiling()
    names = [from_pipeline(each, ["a fox"], steps=4).name for each in loaded]
    assert names[0] == names[1]
    loaded[1].vae.register_to_config(latents_mean=[0.0, 1.0])
    assert from_pipeline(loaded[1], ["a fox"], steps=4, route="driven").name != names[0]
