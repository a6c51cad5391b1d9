"""Learned rewards keep the contract on tiny random networks, and are what their models define."""

import dataclasses
import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from samplers import BestOfN, sample
from steering import from_pipeline
from steering.clip import Pixels
from steering.rewards import Aesthetic, Card, ClipScore, Imscore, PickScore
from tests import tiny_rewards
from tests.tiny_pipelines import stable_diffusion

PROMPTS = ["a red fox", "two dogs on a hill"] * 8
LEARNED = [
    "ClipScore", "PickScore", "Aesthetic", "Imscore imagereward", "Imscore hpsv2.1",
    "Imscore cyclereward", "Imscore pickscore-siglip",
]  # fmt: skip
ALL = [*LEARNED, "Judge", "Classifier", "Jpeg", "FromPil", "Sum", "Product", "Minimum",
       "Standardized"]  # fmt: skip
BLIND = ("Aesthetic", "Classifier", "Jpeg", "FromPil")  # to prompts


def images(n=16, channels=3, height=40, width=48, seed=0):
    """Noise over a slope: of every frequency."""
    noise = torch.rand(n, channels, height, width, generator=torch.Generator().manual_seed(seed))
    slope = torch.linspace(0, 1, width) * torch.linspace(0, 1, n)[:, None, None, None]
    return (noise + slope) / 2


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    with tiny_rewards.imscore():
        yield tiny_rewards.every(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def folder(tmp_path):
    return tiny_rewards.clip(tmp_path / "clip")


def test_all_are_here(tiny):
    assert list(tiny) == ALL


@pytest.mark.parametrize("name", ALL)
def test_an_item_is_scored_the_same_in_any_company(tiny, name):
    reward, x = tiny[name], images()
    together = reward(x, PROMPTS).detach()
    alone = torch.cat([reward(x[k : k + 1], PROMPTS[k : k + 1]).detach() for k in range(16)])
    assert together.shape == (16,)
    # float32 sums of some thousand numbers in another order, of scores up to 1,000 in size
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-4)
    assert together.std() > 10 * 1e-4, "scores so alike that nothing was compared"


@pytest.mark.parametrize("name", ALL)
def test_a_broken_item_fails_alone(tiny, name):
    reward, x = tiny[name], images(4)
    whole = reward(x, PROMPTS[:4]).detach()
    x[1, 0, 0, 0], x[2, 2, -1, -1] = math.nan, math.inf  # corners, which a crop would cut away
    broken = reward(x, PROMPTS[:4]).detach()
    assert broken.isfinite().tolist() == [True, False, False, True]
    torch.testing.assert_close(broken[[0, 3]], whole[[0, 3]], rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_the_gradient_flag_is_true(tiny, name):
    reward, x = tiny[name], images(4)
    x[3, 0, 5, 5] = math.nan
    x.requires_grad_()
    scores = reward(x, PROMPTS[:4])
    if not reward.differentiable:
        assert not scores.requires_grad
        return
    (first,) = torch.autograd.grad(scores[0], x, retain_graph=True)
    assert first[0].abs().max() > 0
    assert first[0].isfinite().all()
    others = slice(1, None if name in LEARNED else 3)  # the last one is broken
    assert (first[others] == 0).all(), "one item's score depends on another item"
    (gradient,) = torch.autograd.grad(scores[:3].sum(), x)
    assert (gradient[:3].abs().amax((1, 2, 3)) > 0).all()
    # a step along the gradient changes the score by the step times its norm; float32 scores leave
    # three digits of the difference
    unit = gradient[0] / gradient[0].norm()
    with torch.no_grad():
        up, down = (
            reward((x[:1] + sign * 0.02 * unit).detach(), PROMPTS[:1]).double() for sign in (1, -1)
        )
    assert ((up - down) / 0.04).item() == pytest.approx(gradient[0].norm().item(), rel=0.02)


@pytest.mark.parametrize("name", ALL)
def test_prompts_matter_where_the_card_does_not_say_otherwise(tiny, name):
    other = tiny[name](images(), ["something else entirely"] * 16).detach()
    same = tiny[name](images(), PROMPTS).detach()
    assert torch.equal(other, same) == (name in BLIND)
    if name in BLIND and name != "FromPil":
        assert "does not read the prompt" in tiny[name].card.notes


@pytest.mark.parametrize("name", [*LEARNED, "Judge", "Classifier", "Jpeg", "FromPil"])
def test_cards_hold(tiny, name):
    card = tiny[name].card
    assert isinstance(card, Card)
    assert card.differentiable == tiny[name].differentiable
    assert card.higher
    if name != "Imscore hpsv2.1" and name != "Imscore imagereward":  # stand-ins, of no range
        scores = tiny[name](images(), PROMPTS)
        assert (card.range[0] <= scores).all()
        assert (scores <= card.range[1]).all()


@pytest.mark.parametrize("reward", [ClipScore(), PickScore(), Aesthetic()])
def test_the_weights_that_are_meant_are_named_to_the_commit(reward):
    assert len(reward.card.revision) == 40
    assert reward.card.memory > 1
    assert reward.card.paper.startswith("arXiv:")


@pytest.mark.parametrize("name", LEARNED)
def test_gray_images_are_shown_to_all_channels(tiny, name):
    gray = images(3, channels=1)
    colour = gray.expand(-1, 3, -1, -1)
    expected = tiny[name](colour, PROMPTS[:3])
    torch.testing.assert_close(tiny[name](gray, PROMPTS[:3]), expected, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize(
    "items", [torch.rand(2, 4, 8, 8), torch.rand(2, 3, 3, 8, 8), torch.rand(2, 7), "images", None]
)
def test_what_are_no_images_is_refused(tiny, name, items):
    with pytest.raises(TypeError, match=r"items .*\[N, 1 or 3, H, W\]"):
        tiny[name](items, PROMPTS[:2])


@pytest.mark.parametrize("name", LEARNED)
def test_prompts_that_are_no_texts_are_refused(tiny, name):
    with pytest.raises(TypeError, match="1 prompts for 2 images"):
        tiny[name](images(2), PROMPTS[:1])
    if name != "Aesthetic":
        with pytest.raises(TypeError, match="the prompt None"):
            tiny[name](images(2), ["a fox", None])
    assert tiny[name](images(0), []).shape == (0,)


def processed(folder, x):
    """What the processor makes of PIL images."""
    from transformers import CLIPImageProcessorPil

    pixels = [Image.fromarray(p) for p in np.asarray((x * 255).byte().permute(0, 2, 3, 1))]
    processor = CLIPImageProcessorPil.from_pretrained(folder)
    return processor(images=pixels, return_tensors="pt")["pixel_values"]


@pytest.mark.parametrize("size", [(32, 32), (40, 48), (91, 61), (20, 28), (33, 200)])
@pytest.mark.parametrize("squeeze", [False, True])
def test_pixels_are_what_the_processor_makes(tmp_path, size, squeeze):
    settings = {"size": {"height": 32, "width": 40}} if squeeze else {}
    folder = tiny_rewards.clip(tmp_path, **settings)
    x = (images(3, 3, *size) * 255).round() / 255  # PIL images are bytes
    x[0, :, :, : size[1] // 2] = 0  # an edge, where bicubic overshoots
    x[0, :, :, size[1] // 2 :] = 1
    ours, theirs = Pixels.load(folder, "main")(x), processed(folder, x)
    assert ours.shape == theirs.shape == (3, 3, 32, 32)
    level = (ours - theirs).abs() * torch.tensor(tiny_rewards.STD)[:, None, None] * 255
    # one rounding to bytes after each pass: half a level each, the first one spread by a kernel
    # whose absolute values sum to at most 1.3, and none where nothing is resized
    same = size == (32, 32) and not squeeze
    assert level.max() < (1e-3 if same else 1.5)
    assert (level.max() > 0.1) == (not same)


@pytest.mark.parametrize(
    "settings", [{"resample": 2}, {"do_normalize": False}, {"size": {"longest_edge": 32}}]
)
def test_a_processor_that_does_otherwise_is_refused(tmp_path, settings):
    folder = tiny_rewards.clip(tmp_path, **settings)
    with pytest.raises(ValueError, match="bicubic"):
        Pixels.load(folder, "main")
    with pytest.raises(ImportError, match="cannot be loaded"):
        ClipScore(folder)(images(1), ["a"])


def test_an_image_too_narrow_for_the_crop_is_told():
    with pytest.raises(ValueError, match="crop"):
        Pixels(16, (32, 32), (0.5,) * 3, (0.5,) * 3)(images(1))


def test_clip_and_pick_scores_are_the_models_logits(folder):
    from transformers import CLIPModel, CLIPTokenizer

    x = (images(4, 3, 32, 32) * 255).round() / 255  # nothing is resized, and bytes are kept
    net = CLIPModel.from_pretrained(folder)
    tokens = CLIPTokenizer.from_pretrained(folder)(PROMPTS[:4], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = net(**tokens, pixel_values=processed(folder, x)).logits_per_image.diagonal()
    scale = net.logit_scale.exp().item()
    # float32 rounding of a cosine, times 100
    torch.testing.assert_close(PickScore(folder)(x, PROMPTS[:4]), logits, rtol=0, atol=1e-4)
    cosine = ClipScore(folder)(x, PROMPTS[:4]) / 100
    torch.testing.assert_close(cosine, logits / scale, rtol=0, atol=1e-5)


def test_aesthetic_is_its_layers_on_the_unit_embedding(folder, tmp_path):
    from safetensors.torch import load_file, save_file
    from transformers import CLIPModel

    head = tiny_rewards.head(tmp_path / "head")
    weights = load_file(f"{head}/model.safetensors")
    x = (images(4, 3, 32, 32) * 255).round() / 255
    net = CLIPModel.from_pretrained(folder)
    text = torch.zeros(1, 2, dtype=torch.long)
    with torch.no_grad():
        embedding = net(input_ids=text, pixel_values=processed(folder, x)).image_embeds.double()
    # affine maps: composed in float64, then applied
    slope, offset = torch.eye(tiny_rewards.WIDTH).double(), torch.zeros(tiny_rewards.WIDTH).double()
    for k in (0, 2, 4, 6, 7):
        weight = weights[f"layers.{k}.weight"].double()
        slope, offset = weight @ slope, weight @ offset + weights[f"layers.{k}.bias"].double()
    expected = (embedding @ slope.T + offset)[:, 0]
    # numbers, not names, say which layer comes first
    save_file(
        {k.replace("layers.7.", "layers.10."): v for k, v in weights.items()},
        tmp_path / "ten.safetensors",
    )
    for given in (head, f"{head}/model.safetensors", str(tmp_path / "ten.safetensors")):
        scores = Aesthetic(folder, given)(x, [None] * 4).double()
        torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)  # float32 of numbers near 1


def test_memory_is_bounded_by_the_batch(folder, tmp_path):
    seen = []
    for reward in (
        ClipScore(folder, batch=5),
        PickScore(folder, batch=5),
        Aesthetic(folder, tiny_rewards.head(tmp_path / "head"), batch=5),
    ):
        net = reward.tower[1] if isinstance(reward, Aesthetic) else reward.towers.net.vision_model
        net.register_forward_pre_hook(
            lambda module, a, k: seen.append(len(k["pixel_values"])), with_kwargs=True
        )
        assert reward(images(12), PROMPTS[:12]).shape == (12,)
    assert seen == [5, 5, 2] * 3


def test_half_precision_is_near(folder, tmp_path):
    head = tiny_rewards.head(tmp_path / "head")
    for kind in (ClipScore, PickScore, lambda m, **o: Aesthetic(m, head, **o)):
        x, exact = images(), kind(folder)(images(), PROMPTS)
        half = kind(folder, dtype=torch.bfloat16)(x, PROMPTS)
        assert half.dtype == torch.float32
        # eight bits of mantissa through a few layers: some hundredths of the spread of scores
        assert (half - exact).abs().max() < 0.3 * exact.std()
        assert not torch.equal(half, exact)


def test_nothing_is_loaded_before_it_is_wanted_and_once_then(folder, monkeypatch):
    from transformers import CLIPModel

    loads, load = [], CLIPModel.from_pretrained
    monkeypatch.setattr(
        CLIPModel, "from_pretrained", lambda *a, **k: loads.append(k) or load(*a, **k)
    )
    reward = ClipScore(folder)
    assert reward.name == "CLIPScore clip"
    assert loads == []
    reward(images(1), ["a"])
    reward(images(2), ["a", "b"])
    assert [load["use_safetensors"] for load in loads] == [True]


def test_pickled_weights_are_not_loaded(folder, tmp_path):
    from pathlib import Path

    Path(folder, "model.safetensors").rename(Path(folder, "pytorch_model.bin"))
    with pytest.raises(ImportError, match=r"CLIPScore clip cannot be loaded from .*safetensors"):
        ClipScore(folder)(images(1), ["a"])
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "pytorch_model.bin").write_bytes(b"x")
    with tiny_rewards.imscore(), pytest.raises(ImportError, match=r"model\.safetensors"):
        Imscore("imagereward", str(pickled))(images(1), ["a"])
    for name in ("sac+logos+ava1-l14-linearMSE.pth", "head.pt", "head.bin"):
        with pytest.raises(ValueError, match="pickle"):
            Aesthetic(head=name)


def test_imscore_is_not_asked_where_there_are_no_safetensors(monkeypatch):
    def missing(*arguments, **options):
        raise OSError("RE-N-Y/ImageReward has no file named model.safetensors")

    # its loader would take a pickle file of a hub repository instead
    monkeypatch.setattr("transformers.utils.hub.cached_file", missing)
    monkeypatch.setattr(
        tiny_rewards.StandIn, "from_pretrained", lambda *a, **k: pytest.fail("asked")
    )
    with tiny_rewards.imscore(), pytest.raises(ImportError, match=r"no file named model\."):
        Imscore("imagereward")(images(1), ["a"])


def test_a_head_that_does_not_fit_is_told(folder, tmp_path):
    from safetensors.torch import save_file

    def head(**weights):
        file = str(tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors")
        save_file({k.replace("_", "."): v for k, v in weights.items()}, file)
        return file

    for given, why in (
        (head(layers_0_weight=torch.ones(1, 5), layers_0_bias=torch.ones(1)), "gets 16"),
        (head(layers_0_weight=torch.ones(3, 16), layers_0_bias=torch.ones(3)), "3 numbers"),
        (head(layers_0_weight=torch.ones(1, 16)), "layers.0.weight, not"),
        (head(mlp_weight=torch.ones(1, 16)), "mlp.weight, not"),
    ):
        with pytest.raises(ImportError, match=why):
            Aesthetic(folder, given)(images(1), ["a"])
    (tmp_path / "head.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(ImportError, match="aesthetic head cannot be loaded"):
        Aesthetic(folder, str(tmp_path / "head.safetensors"))(images(1), ["a"])


def test_imscore_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "imscore", None)
    with pytest.raises(ImportError, match=r"pip install 'diffusion-steering\[imscore\]'"):
        Imscore("imagereward")


def test_imscore_with_another_interface_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(tiny_rewards.StandIn, "score", lambda *a: torch.zeros(2, 5))
    with tiny_rewards.imscore(), pytest.raises(TypeError, match=r"shape \(2, 5\) for 2 images"):
        Imscore("hpsv2.1", tiny_rewards.stand_in(tmp_path))(images(2), ["a", "b"])


def test_a_learned_reward_steers(folder):
    model = from_pipeline(stable_diffusion(), PROMPTS[:2], steps=3, eta=1.0)
    reward = ClipScore(folder)
    result = sample(model, reward, BestOfN(6), nfe=40, draws=1, progress=False)
    assert result.failed == 0
    scores = reward(torch.stack([pixels(image) for image in result.images]), PROMPTS[:2])
    # the images are shown as bytes: half a level of 255 in every pixel
    torch.testing.assert_close(scores.double(), result.rewards, rtol=0, atol=1.0)


def pixels(image):
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)


@pytest.mark.parametrize("name", LEARNED)
def test_an_offloaded_network_is_on_its_device_for_a_call_alone(tiny, name, monkeypatch):
    reward = dataclasses.replace(tiny[name], offload=True)
    plain, moved = tiny[name](images(2), PROMPTS[:2]), []
    reward.load()
    to = torch.nn.Module.to

    def noted(module, place, *more):
        moved.append(str(place))
        return to(module, place, *more)

    monkeypatch.setattr(torch.nn.Module, "to", noted)
    torch.testing.assert_close(reward(images(2), PROMPTS[:2]), plain, rtol=1e-6, atol=1e-4)
    networks = 2 if name == "Aesthetic" else 1
    assert moved == ["cpu"] * 2 * networks  # there, and back
