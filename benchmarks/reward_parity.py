"""Is a learned reward what its authors published? For those who have the weights.

    python -m benchmarks.reward_parity --reward clip|pickscore|aesthetic|imagereward|hpsv2
                                       [--model ID] [--head ID] [--images DIR] [--prompt TEXT ...]
                                       [--device cuda]
    python -m benchmarks.reward_parity --quick     # clip, pickscore, aesthetic on random weights

Scores the same images twice: by our reward, from tensors, and by the reference, from PIL images:
    clip, pickscore  transformers' own: `AutoProcessor`, then `CLIPModel`'s logits; PickScore with
                     the processor that its authors use,
    aesthetic        transformers' processor and CLIP, then the head's layers in float64,
    imagereward      the authors' package: pip install image-reward
    hpsv2            the authors' package: pip install hpsv2 (version 2.1)
and prints the largest difference, beside the spread of the scores. What is left is the rounding of
the processor's bytes; with --model and --head other weights are compared. The authors' packages
load pickle files: compare in an environment that you would throw away.

Images are the files of DIR, or eight patterns made here; prompts are dealt out in turn.
"""

from __future__ import annotations

import argparse
import importlib
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.report import finish, header
from steering.rewards import Aesthetic, ClipScore, Imscore, PickScore
from steering.weights import pinned

PROMPTS = ["a red fox in the snow", "a city at night", "an abstract pattern"]
OURS: dict[str, Callable[..., Any]] = {
    "clip": ClipScore,
    "pickscore": PickScore,
    "aesthetic": Aesthetic,
    "imagereward": lambda **options: Imscore("imagereward", **options),
    "hpsv2": lambda **options: Imscore("hpsv2.1", **options),
}
AUTHORS_PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


def patterns() -> list[Image.Image]:
    """Eight images of several sizes, smooth and rough."""
    rng = np.random.default_rng(0)
    images = []
    for k, (height, width) in enumerate([(512, 512), (384, 640), (224, 224), (300, 200)] * 2):
        y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
        waves = [np.sin((3 + 5 * k) * (x * c + y * (2 - c)) + c) for c in range(3)]
        noise = rng.normal(size=(height, width, 3)) * 0.1 * k
        pixels = 127.5 + 100 * (np.stack(waves, 2) + noise)
        images.append(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))
    return images


def ours(reward: Any, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
    """One at a time, as their sizes differ."""
    scores = []
    for image, prompt in zip(images, prompts, strict=True):
        pixels = torch.from_numpy(np.asarray(image, dtype=np.float32)).permute(2, 0, 1)[None] / 255
        with torch.no_grad():
            scores.append(reward(pixels.to(reward.device), [prompt]).cpu())
    return torch.cat(scores).double()


def clip(
    model: str, processor: str, images: Sequence[Image.Image], prompts: Sequence[str]
) -> tuple[Tensor, Tensor, float]:
    """transformers' own: logits [N] of each image with its prompt, embeddings [N, d], the scale."""
    from transformers import AutoProcessor, CLIPModel

    net: Any = CLIPModel.from_pretrained(model, revision=pinned(model), use_safetensors=True)
    own: Any = AutoProcessor.from_pretrained(processor)
    length = net.config.text_config.max_position_embeddings
    logits, embeddings = [], []
    for image, prompt in zip(images, prompts, strict=True):
        given = own(text=[prompt], images=image, padding=True, truncation=True, max_length=length,
                    return_tensors="pt")  # fmt: skip
        with torch.no_grad():
            out = net(**given)
        logits.append(out.logits_per_image[0])
        embeddings.append(out.image_embeds)
    scale = float(net.logit_scale.detach().exp())
    return torch.cat(logits).double(), torch.cat(embeddings).double(), scale


def reference(
    name: str, reward: Any, images: Sequence[Image.Image], prompts: Sequence[str]
) -> Tensor:
    """[N] scores as their authors make them."""
    if name == "imagereward":
        net = importlib.import_module("ImageReward").load("ImageReward-v1.0")
        return torch.tensor([float(net.score(p, i)) for i, p in zip(images, prompts, strict=True)])
    if name == "hpsv2":
        package = importlib.import_module("hpsv2")
        pairs = zip(images, prompts, strict=True)
        return torch.tensor([float(package.score(i, p, hps_version="v2.1")[0]) for i, p in pairs])
    known = name == "pickscore" and reward.model == PickScore().model
    processor = AUTHORS_PROCESSOR if known else reward.model
    logits, x, scale = clip(reward.model, processor, images, prompts)
    if name == "pickscore":
        return logits
    if name == "clip":
        return 100 * logits / scale
    for weight, bias in reward.layers:
        x = x @ weight.cpu().double().T + bias.cpu().double()
    return x[:, 0]


def compare(name: str, reward: Any, images: Sequence[Image.Image], prompts: Sequence[str]) -> float:
    """Print and return the largest difference."""
    mine, theirs = ours(reward, images, prompts), reference(name, reward, images, prompts).double()
    for k, (a, b) in enumerate(zip(mine.tolist(), theirs.tolist(), strict=True)):
        print(f"  {k:>3} {images[k].size!s:<12} {prompts[k][:40]:<40} {a:9.4f} {b:9.4f}")
    worst = float((mine - theirs).abs().max())
    print(f"{reward.name}: largest difference {worst:.2g}, spread {float(theirs.std()):.2g}")
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reward", choices=list(OURS))
    parser.add_argument("--model", help="hub id or folder, instead of the well-known one")
    parser.add_argument("--head", help="likewise, of --reward aesthetic")
    parser.add_argument("--images", type=Path, metavar="DIR")
    parser.add_argument("--prompt", action="append", help="repeatable")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="on random weights, no download")
    args = parser.parse_args()
    if (args.reward is None) != args.quick:
        parser.error("give --reward, or --quick")
    header()
    images = patterns()
    if args.images is not None:
        files = sorted(file for file in args.images.iterdir() if file.is_file())
        images = [Image.open(file).convert("RGB") for file in files]
    texts = args.prompt or PROMPTS
    prompts = [texts[k % len(texts)] for k in range(len(images))]
    worst: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        if args.quick:
            from tests import tiny_rewards

            model, head = (
                tiny_rewards.clip(Path(folder) / "clip"),
                tiny_rewards.head(Path(folder) / "head"),
            )
            rewards = {
                "clip": ClipScore(model),
                "pickscore": PickScore(model),
                "aesthetic": Aesthetic(model, head),
            }
        else:
            given = {"model": args.model, "head": args.head}
            options = {k: v for k, v in given.items() if v is not None}
            rewards = {args.reward: OURS[args.reward](**options, device=args.device)}
        for name, reward in rewards.items():
            worst[name] = compare(name, reward, images, prompts)
    finish({"max_difference": max(worst.values()), "differences": worst, "images": len(images)})


if __name__ == "__main__":
    main()
