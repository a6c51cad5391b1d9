"""A recipe: class-conditional draws from an unconditional CIFAR-10 model, compute against FID.

    python -m benchmarks.cifar10 --classifier ID [--model google/ddpm-cifar10-32] [--class K ...]
                                 [--extractor inception] [--reference N] [--nfe N ...] [--seeds S]
                                 [--out DIR] [--minutes M] [--shard K/N] [--device cuda]
    python -m benchmarks.cifar10 --quick        # random weights, no download

The setting of Diffusion Tree Sampling (arXiv 2506.20701): 50 steps of DDIM with eta = 1, lam = 1,
reward log p(class | x). Their classifier and the extractor behind their distances are not
published, so only comparisons within one run of this script mean anything. `--classifier` is an
image classifier of ten classes that transformers loads, by hub id or folder. Distances are to the
tilted law of the model, which `--reference` independent walks stand for. It wants a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import ladder
from benchmarks.report import finish, header
from samplers import Sweep, table
from steering import from_pipeline, rewards
from steering.metrics import Extractor, extractor

METRICS = ("frechet", "mmd", "reward", "root_ess", "log_z", "also: -jpeg kB", "seconds")


class HubClassifier(nn.Module):
    """An image classifier of transformers on images [N, 3, H, W] in [0, 1]; logits [N, classes]."""

    def __init__(self, name: str) -> None:
        super().__init__()
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        self.net = AutoModelForImageClassification.from_pretrained(name, use_safetensors=True)
        processor: Any = AutoImageProcessor.from_pretrained(name)
        size = processor.size
        self.size = (size["height"], size["width"]) if "height" in size else (
            size["shortest_edge"], size["shortest_edge"]
        )  # fmt: skip
        self.mean = nn.Buffer(torch.tensor(processor.image_mean).view(-1, 1, 1))
        self.std = nn.Buffer(torch.tensor(processor.image_std).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        images = nn.functional.interpolate(
            images, self.size, mode="bilinear", align_corners=False, antialias=True
        )
        return self.net(pixel_values=(images - self.mean) / self.std).logits


def parts(args: Any) -> tuple[Any, nn.Module, Extractor]:
    """The pipeline, the classifier, and what distances are measured with."""
    if args.quick:
        from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline
        from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

        from tests.tiny_pipelines import pixel_pipeline

        generator = torch.Generator().manual_seed(0)
        layers = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 10))
        for weight in layers.parameters():
            weight.data = torch.randn(weight.shape, generator=generator)
        return (
            pixel_pipeline(DDPMScheduler(), DDPMPipeline, channels=3),
            layers,
            Extractor("8x8 pixels, averaged by 2", lambda x: x.unfold(2, 4, 4).mean((1, -1, 2))),
        )
    if args.classifier is None:
        raise SystemExit("--classifier is missing: an image classifier of CIFAR-10's ten classes.")
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    pipe: Any = DiffusionPipeline.from_pretrained(args.model, use_safetensors=True)
    net = HubClassifier(args.classifier).to(args.device)
    return pipe.to(args.device), net, extractor(args.extractor, args.device)


def main() -> None:
    parser = ladder.arguments(__doc__, "cifar10", [10_000, 30_000, 100_000], seeds=3)
    parser.add_argument("--model", default="google/ddpm-cifar10-32", help="hub id or folder")
    parser.add_argument("--classifier", help="hub id or folder")
    parser.add_argument("--class", dest="classes", type=int, action="append", default=[])
    parser.add_argument("--extractor", default="inception", help="as for `steer sweep`")
    parser.add_argument("--reference", type=int, default=20_000)
    args = ladder.parse(parser)
    if args.quick:
        args.nfe, args.seeds, args.reference, args.classes = [320], 2, 60, [3, 5]
    header()
    pipe, net, features = parts(args)
    sweep = Sweep(
        from_pipeline(pipe, steps=10 if args.quick else 50, eta=1.0),
        {f"class {k}": rewards.Classifier(net, [k]) for k in args.classes or range(10)},
        ladder.SAMPLERS,
        args.nfe,
        seeds=args.seeds,
        draws=100 if args.quick else 5000,
        also=[rewards.Jpeg()],
        extractor=features,
        reference=args.reference,
        objective="mmd" if args.quick else "frechet",
        batch=64 if args.device == "cpu" else 512,
    )
    rows = ladder.climb(sweep, args, METRICS, drawn="mmd" if args.quick else "frechet")
    finish(
        {
            metric: {f"{p.task}/{p.sampler}/{p.nfe}": p.mean for p in table.points(rows, metric)}
            for metric in ("frechet", "mmd", "reward")
        }
        | {"extractor": features.name}
    )


if __name__ == "__main__":
    main()
