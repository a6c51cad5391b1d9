"""Every reward on random weights, small enough to run in a test and built without any download."""

import sys
import types
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from safetensors.torch import save_file
from torch import nn

from steering import rewards
from tests.tiny_pipelines import text_config, tokenizer

SIZE = 32
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]  # not CLIP's: a constant in the code would be seen
WIDTH = 16  # of an embedding


def clip(folder: Path, **processor: Any) -> str:
    """A CLIP with its processor and tokenizer, in a folder."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPVisionConfig

    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4,
        image_size=SIZE, patch_size=8, projection_dim=WIDTH,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net: Any = CLIPModel(
            CLIPConfig(
                text_config=text_config().to_dict() | {"projection_dim": WIDTH},
                vision_config=vision.to_dict(),
                projection_dim=WIDTH,
            )
        )
    with torch.no_grad():
        for name, weight in net.named_parameters():
            # random towers tell inputs apart by almost nothing: raise what these say
            if "embedding" in name and "class" not in name and "position" not in name:
                weight.mul_(30)
            if "v_proj" in name or "out_proj" in name:
                weight.mul_(10)
    net.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    crop = {"height": SIZE, "width": SIZE}
    settings = {"size": {"shortest_edge": SIZE}, "crop_size": crop, **processor}
    CLIPImageProcessorPil(**settings, image_mean=MEAN, image_std=STD).save_pretrained(folder)
    return str(folder)


def head(folder: Path) -> str:
    """The linear layers of an aesthetic predictor, in a folder."""
    rng = torch.Generator().manual_seed(4)
    widths, weights = [WIDTH, 12, 8, 6, 4, 1], {}
    for k, (i, o) in zip((0, 2, 4, 6, 7), pairwise(widths), strict=True):
        weights[f"layers.{k}.weight"] = torch.randn(o, i, generator=rng) / i**0.5
        weights[f"layers.{k}.bias"] = torch.randn(o, generator=rng)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors")
    return str(folder)


class StandIn(nn.Module, PyTorchModelHubMixin):
    """The interface of imscore's scorers: `from_pretrained` of the same mixin, `score`."""

    columns = False  # does `score` return [N, 1]?

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 8, generator=torch.Generator().manual_seed(5)))

    def score(self, pixels: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        assert pixels.shape[1] == 3
        assert len(pixels) == len(prompts)
        side = nn.functional.adaptive_avg_pool2d(pixels, (1, 8))[:, :, 0]
        words = torch.tensor([len(prompt) for prompt in prompts], device=pixels.device)
        scores = (side * self.weight).sum((1, 2)).tanh() + words / 10
        return scores[:, None] if self.columns else scores


class StandInColumns(StandIn):
    columns = True


@contextmanager
def imscore():
    """imscore as far as it is used, in the place of a package that need not be installed."""
    kinds = {
        "imreward": ("ImageReward", StandInColumns),
        "hps": ("HPSv2", StandIn),
        "cyclereward": ("CycleReward", StandInColumns),
        "preference": ("SiglipPreferenceScorer", StandIn),
    }
    modules: dict[str, Any] = {"imscore": types.ModuleType("imscore")}
    modules["imscore"].__spec__ = ModuleSpec("imscore", None)
    for name, (kind, stand_in) in kinds.items():
        modules[f"imscore.{name}"] = types.ModuleType(f"imscore.{name}")
        model: Any = types.ModuleType(f"imscore.{name}.model")
        setattr(model, kind, stand_in)
        modules[model.__name__] = model
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def stand_in(folder: Path) -> str:
    """Weights of a stand-in, in a folder."""
    StandIn().save_pretrained(folder)
    return str(folder)


class Dark(nn.Module):
    """Three logits that depend on an image and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(3.0))

    def forward(self, x):
        mean, square = x.mean((1, 2, 3)), x.square().mean((1, 2, 3))
        return self.scale * torch.stack([mean, 3 * square, (mean - square).exp()], 1)


def answer(images, prompts):
    """A judge that reads a pixel and its prompt."""
    numbers = [
        10 * image.convert("L").getpixel((0, 0)) / 255 + len(prompt)
        for image, prompt in zip(images, prompts, strict=True)
    ]
    return [f'{{"score": {number}}}' for number in numbers]


def sure(images, prompts):
    """A differentiable function between 0 and 1."""
    return images.mean((1, 2, 3)).sigmoid()


sure.differentiable = True  # type: ignore[attr-defined]


@rewards.from_pil
def light(images):
    return [sum(image.convert("L").histogram()[128:]) for image in images]


def every(folder: Path, batch: int = 16) -> dict[str, Any]:
    """All rewards of images, by name; to be made inside `imscore()`."""
    model, scorer = clip(folder / "clip"), stand_in(folder / "imscore")
    score = rewards.ClipScore(model, batch=batch)
    pick = rewards.PickScore(model, batch=batch)
    aesthetic = rewards.Aesthetic(model, head(folder / "head"), batch=batch)
    names = ("imagereward", "hpsv2.1", "cyclereward", "pickscore-siglip")
    scorers = {f"Imscore {name}": rewards.Imscore(name, scorer, batch=batch) for name in names}
    return {
        "ClipScore": score,
        "PickScore": pick,
        "Aesthetic": aesthetic,
        **scorers,
        "Judge": rewards.Judge(answer, high=30.0),
        "Classifier": rewards.Classifier(Dark(), [0, 2]),
        "Jpeg": rewards.Jpeg(),
        "FromPil": light,
        "Sum": 0.5 * pick + 2 * aesthetic,
        "Product": (scorers["Imscore hpsv2.1"] + sure) * sure,
        "Minimum": rewards.Minimum((score, pick)),
        "Standardized": rewards.Standardized(score, 3.0, 2.0)
        + rewards.Standardized(pick, 1.0, 0.5),
    }
