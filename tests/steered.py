"""Rewards of states, a pipeline round a pointwise network, and how a pipeline was found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor

from steering.models.label_pipeline import LabelPipeline
from tests.tiny_pipelines import (
    quiet,
)

STEPS = 6


@dataclass(frozen=True)
class Target:
    """-|mask · (x - y)|² of states."""

    y: Tensor
    mask: Tensor
    of_states = True
    differentiable = True
    least_squares = True
    floor = 0.0

    def __call__(self, x, prompts):
        return -(self.mask * (x - self.y)).square().flatten(1).sum(1)

    def left(self, x) -> float:
        return float(-self(x, None).sum())


def target(shape) -> Target:
    mask = torch.zeros(shape)
    mask[..., : shape[-1] // 2] = 1
    return Target(torch.randn(shape, generator=torch.Generator().manual_seed(5)), mask)


def seeded(*seeds: int) -> Any:
    made = [torch.Generator().manual_seed(seed) for seed in seeds]
    return made[0] if len(made) == 1 else made


class Pointwise(torch.nn.Module):
    """A network that looks at each number by itself, and bends it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.config = {"sample_size": 4, "in_channels": 1, "num_class_embeds": 3}
        self.weight = torch.nn.Parameter(torch.tensor(0.5))
        self.dtype, self.device = torch.float32, torch.device("cpu")

    def forward(self, x, t, labels, return_dict=False):
        self.calls += 1
        return (torch.sin(self.weight * x + 0.1 * labels.view(-1, 1, 1, 1)),)


def pointwise(scheduler) -> Any:
    """A real pipeline round a pointwise network of states [1, 4, 4]."""
    pipe = LabelPipeline.__new__(LabelPipeline)
    diffusers.DiffusionPipeline.__init__(pipe)
    pipe.register_modules(unet=None, scheduler=scheduler)
    pipe.unet = Pointwise()
    return quiet(pipe)


def run(pipe: Any, labels=(0, 1), **more):
    call = {"num_inference_steps": STEPS, "generator": seeded(0), "output_type": "latent", **more}
    return pipe(list(labels), **call).images


def scheduler_of(name: str, **more) -> Any:
    kind = getattr(diffusers, f"{name}Scheduler")
    if name == "PNDM":
        more["skip_prk_steps"] = True
    if "clip_sample" in kind().config:
        more["clip_sample"] = False
    return kind(**more)


def latents_of(pipe: Any, *args, **kwargs) -> Tensor:
    """Final latents, also of a pipeline that does not give them."""
    seen: list[Tensor] = []
    decode = pipe.vae.decode
    pipe.vae.decode = lambda z, **more: (seen.append(z), decode(z, **more))[1]
    try:
        pipe(*args, **{"num_inference_steps": STEPS, **kwargs})
    finally:
        del pipe.vae.decode
    return seen[0] * pipe.vae.config.scaling_factor


def of(pipe: Any) -> tuple:
    """All there is of a pipeline but what its own calls leave: the scheduler's grid and history,
    and after an exception where its loop was."""
    networks = {n: m for n, m in pipe.components.items() if isinstance(m, torch.nn.Module)}
    return (
        type(pipe),
        {n: v for n, v in vars(pipe).items() if n != "_current_timestep"},
        {n: type(part) for n, part in pipe.components.items()},
        pipe.scheduler.to_json_string(),
        sorted(vars(pipe.scheduler)),
        {n: [w.requires_grad for w in m.parameters()] for n, m in networks.items()},
        {n: [len(s._forward_pre_hooks) for s in m.modules()] for n, m in networks.items()},
        {n: m.training for n, m in networks.items()},
    )


class Watching:
    """A reward that keeps what it is shown."""

    differentiable = True

    def __init__(self) -> None:
        self.items: list[Tensor] = []
        self.prompts: list[Any] = []

    def __call__(self, items, prompts):
        self.items.append(items.detach())
        self.prompts.append(list(prompts))
        return items.flatten(1).mean(1)
