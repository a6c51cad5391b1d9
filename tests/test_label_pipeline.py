"""Our own pipeline: what it computes, what it refuses, and that it is steered like any other."""

import itertools
from functools import partial

import diffusers
import pytest
import torch

from benchmarks import parity
from steering import from_pipeline, noise, zoo
from steering.models.label_pipeline import LabelPipeline
from tests.tiny_pipelines import pixel_pipeline, quiet

LABELS = [0, 3]
NULL = 4


def tiny(scheduler=None, **options):
    scheduler = scheduler or diffusers.FlowMatchEulerDiscreteScheduler()
    return pixel_pipeline(scheduler, LabelPipeline, **{"classes": 5, **options})


def start(n=2, size=8):
    return noise.normal(noise.root_key(0, torch.arange(n)), (1, size, size))


@torch.no_grad()
@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_it_follows_the_flow_by_eulers_rule(scale):
    pipe, x, labels = tiny(), start(), torch.tensor(LABELS)
    found = pipe(LABELS, 4, scale, latents=x, output_type="latent").images
    for k in range(4):
        t = torch.full((2,), 1000 * (1 - k / 4))
        v = pipe.unet(x, t, class_labels=labels).sample
        if scale > 1:
            null = pipe.unet(x, t, class_labels=torch.full_like(labels, NULL)).sample
            v = (1 - scale) * null + scale * v
        x = x - v / 4
    # float32 rounding of values up to 10, and of networks over another batch size
    torch.testing.assert_close(found, x, atol=1e-4, rtol=1e-4)


def test_an_image_costs_one_row_and_guided_two():
    pipe, rows = tiny(), []
    pipe.unet.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    pipe(LABELS, 3, output_type="np")
    pipe(LABELS, 2, 2.0, output_type="np")
    assert rows == [2] * 3 + [4] * 2


def test_outputs_are_the_same_image_in_four_forms():
    pipe, x = tiny(), start()
    made = {
        kind: pipe(torch.tensor(LABELS), 2, latents=x, output_type=kind, return_dict=False)[0]
        for kind in ("pil", "np", "pt", "latent")
    }
    in_unit_range = (made["latent"] / 2 + 0.5).clamp(0, 1)
    assert torch.equal(made["pt"], in_unit_range)
    assert torch.equal(torch.from_numpy(made["np"]).movedim(-1, 1), in_unit_range)
    assert [(image.mode, image.size) for image in made["pil"]] == [("L", (8, 8))] * 2


@pytest.mark.parametrize("scheduler", [diffusers.DDPMScheduler(), diffusers.LCMScheduler()])
def test_a_generator_makes_all_that_is_drawn(scheduler):
    pipe = tiny(scheduler)

    def drawn(seed):
        rng = torch.Generator().manual_seed(seed)
        return pipe(LABELS, 4, generator=rng, output_type="pt").images

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
    each = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    both = pipe(LABELS, 4, generator=each, output_type="pt").images
    alone = torch.Generator().manual_seed(2)
    (second,) = pipe(LABELS[1:], 4, generator=alone, output_type="pt").images
    # float32 rounding over another batch size
    torch.testing.assert_close(both[1], second, atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_scheduler_of_second_order_is_followed_too():
    """Heun's rule, by hand: the mean of the slopes at both ends of a step, Euler at the end."""
    pipe, x = tiny(diffusers.FlowMatchHeunDiscreteScheduler()), start()
    found = pipe(LABELS, 3, latents=x, output_type="latent").images

    def slope(x, sigma):
        t = torch.tensor(1000 * sigma)  # as a plain number it would be cut to a whole one
        return pipe.unet(x, t, class_labels=torch.tensor(LABELS)).sample

    sigmas = torch.linspace(1, 0.001, 3).tolist()  # this scheduler's own levels
    for here, there in itertools.pairwise(sigmas):
        v = slope(x, here)
        x = x + (there - here) * (v + slope(x + (there - here) * v, there)) / 2
    x = x - sigmas[-1] * slope(x, sigmas[-1])
    torch.testing.assert_close(found, x, atol=1e-4, rtol=1e-4)  # float32 rounding of up to 10


def test_its_parts_are_saved_and_come_back(tmp_path):
    pipe, x = tiny(diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0)), start()
    pipe.save_pretrained(tmp_path)
    again = quiet(LabelPipeline.from_pretrained(tmp_path, local_files_only=True))
    images = [p(LABELS, 3, 2.0, latents=x, output_type="pt").images for p in (pipe, again)]
    assert torch.equal(*images)


def test_half_precision_works():
    images = tiny().to(torch.bfloat16)(LABELS, 2, 2.0, output_type="pt").images
    assert images.dtype == torch.float32
    assert images.isfinite().all()


BAD = [
    ({"class_labels": []}, "class_labels=.* is no list"),
    ({"class_labels": 3}, "class_labels=3 is no list"),
    ({"class_labels": "3"}, "class_labels='3' is no list"),
    ({"class_labels": [5]}, "class_labels has 5: give ints from 0 to 4"),
    ({"class_labels": [-1]}, "class_labels has -1"),
    ({"class_labels": [True]}, "class_labels has True"),
    ({"class_labels": torch.tensor([[1]])}, r"class_labels has \[1\]"),
    ({"class_labels": torch.tensor([1.0])}, "class_labels has 1.0"),
    ({"num_inference_steps": 0}, "num_inference_steps=0"),
    ({"num_inference_steps": 4.0}, "num_inference_steps=4.0"),
    ({"guidance_scale": "2"}, "guidance_scale='2'"),
    ({"guidance_scale": float("nan")}, "guidance_scale=nan"),
    ({"generator": [torch.Generator()]}, "generator has 1 entries for 2"),
    ({"latents": torch.zeros(2, 1, 9, 8)}, r"latents has shape \(2, 1, 9, 8\): give \(2, 1, 8"),
    ({"output_type": "jpg"}, "output_type='jpg'"),
]


@pytest.mark.parametrize(("arguments", "words"), BAD)
def test_a_mistake_is_one_clear_error_before_any_network_call(arguments, words):
    pipe = tiny()
    pipe.unet.register_forward_pre_hook(lambda *_: pytest.fail("the network was called"))
    with pytest.raises(ValueError, match=words):
        pipe(**{"class_labels": LABELS, "num_inference_steps": 2, **arguments})


def test_a_network_without_classes_is_refused():
    with pytest.raises(ValueError, match="unet takes no class labels"):
        tiny(classes=None)


# --- as a model to steer ---------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_our_chain_is_the_shipped_pipelines_by_both_routes(scale):
    guided = {"unguided": {"guidance_scale": 1.0}} if scale > 1 else {}
    case = parity.Case(
        "mnist-flow",
        partial(zoo.load, "mnist-flow"),
        {"prompts": [3, 5], "guidance_scale": scale, "eta": 0.0},
        {"swapped": {"prompts": [5, 3]}, **guided},
    )
    found = parity.compare(case, steps=10, seed=0)
    assert found.driven is not None
    assert max(found.error, found.driven) <= parity.TOLERANCE
    assert min(found.moved.values()) >= 100 * parity.TOLERANCE


def test_its_null_class_need_not_be_given_but_may_be():
    pipe = tiny()
    for null in (None, [NULL, NULL]):
        denoiser = from_pipeline(
            pipe, LABELS, steps=4, guidance_scale=2.0, negative_prompts=null
        ).denoiser
        assert denoiser.negative["class_labels"].tolist() == [NULL, NULL]
    model = from_pipeline(pipe, LABELS, steps=4, guidance_scale=2.0)
    assert model.denoiser.rows(torch.zeros(2), torch.arange(2)).tolist() == [2, 2]
    plain = from_pipeline(pipe, LABELS, steps=4)  # the pipeline's own scale is 1
    assert plain.denoiser.rows(torch.zeros(2), torch.arange(2)).tolist() == [1, 1]


def test_a_users_subclass_is_served_natively():
    class Mine(LabelPipeline):
        pass

    pipe = pixel_pipeline(diffusers.FlowMatchEulerDiscreteScheduler(), Mine, classes=5)
    assert from_pipeline(pipe, LABELS, steps=4).about == "native (unet2d)"


def test_wrong_requests_are_refused():
    for asked, words in (
        ({}, "prompts is missing"),
        ({"prompts": [5]}, "prompts has 5.* from 0 to 4"),
        ({"prompts": ["cat"]}, "prompts has 'cat'"),
        ({"prompts": LABELS, "negative_prompts": [5, 5]}, "negative_prompts has 5"),
        ({"prompts": LABELS, "steps": 1001}, "steps=1001"),
        ({"prompts": LABELS, "height": 16}, "height=16"),
    ):
        with pytest.raises(ValueError, match=words):
            from_pipeline(tiny(), **{"steps": 4, **asked})
