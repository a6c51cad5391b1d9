"""Networks that are not as they were stored: quantised, adapted, compiled, offloaded, guided."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.families import against_itself
from samplers import SMC, BestOfN, sample
from steering import from_pipeline
from steering.core import Proposal
from steering.gaussian import NormalTransition
from steering.guidance.bend import through_network
from tests.test_driven import BY_NAME, PROMPTS, driven, red, starts
from tests.tiny_pipelines import stable_diffusion


class Int8(nn.Module):
    """A linear layer of int8 weights with a scale per row, as quantisers make them."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        scale = layer.weight.abs().amax(1, keepdim=True) / 127
        whole = (layer.weight / scale).round().to(torch.int8)
        self.weight = nn.Parameter(whole, requires_grad=False)
        self.scale, self.bias = nn.Parameter(scale), layer.bias
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight * self.scale, self.bias)


class Adapted(nn.Module):
    """A linear layer with a low-rank addition, as LoRAs are."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.base, self.weight = layer, layer.weight
        self.down = nn.Parameter(torch.full((2, layer.in_features), 0.1))
        self.up = nn.Parameter(torch.full((layer.out_features, 2), 0.1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


def exchanged(network: nn.Module, kind: Any) -> int:
    """Put `kind` in place of the attention's projections; how many."""
    found = [
        (module, name, child)
        for module in network.modules()
        for name, child in module.named_children()
        if isinstance(child, nn.Linear) and name in ("to_q", "to_k", "to_v")
    ]
    with torch.no_grad():
        for module, name, child in found:
            setattr(module, name, kind(child))
    return len(found)


@pytest.mark.parametrize("kind", [Int8, Adapted])
@pytest.mark.parametrize("name", ["FluxPipeline", "StableDiffusionXLPipeline"])
def test_quantised_and_adapted_networks_are_networks_like_any_other(name, kind):
    tiny = BY_NAME[name]
    plain, pipe = tiny.build(), tiny.build()
    network = getattr(pipe, "unet", None) or pipe.transformer
    assert exchanged(network, kind)
    model, stored = driven(tiny, pipe), driven(tiny, plain)
    assert against_itself(model, tiny, pipe) == ()
    assert model.name != stored.name  # its weights are others, and records know
    x, _, t, row = starts(model, 2)
    with torch.no_grad():
        assert not torch.equal(model.denoiser(x, t, row), stored.denoiser(x, t, row))


def test_a_weight_that_cannot_be_read_has_a_fingerprint_all_the_same():
    pipe = stable_diffusion()
    before = from_pipeline(pipe, ["a fox"], steps=4).name
    layer = pipe.unet.conv_in
    layer.weight = nn.Parameter(layer.weight.to("meta"))
    from steering.pipelines.request import Request

    name = Request(4, None, None, None, ("a fox",), None, None).describe(pipe)
    assert name.partition("#")[0] == before.partition("#")[0]
    assert name != before


def test_a_compiled_network_is_called_in_the_same_few_sizes():
    pipe = stable_diffusion()
    plain = from_pipeline(pipe, PROMPTS, steps=4, route="driven")
    expected = sample(plain, red, SMC(8), nfe=400, batch=8, progress=False)
    sizes: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        sizes.append(1)
        return graph.forward

    torch._dynamo.reset()
    pipe.unet.compile(backend=backend, dynamic=False)
    model = from_pipeline(pipe, PROMPTS, steps=4, route="driven")
    opened = len(sizes)
    run = sample(model, red, SMC(8), nfe=400, batch=8, progress=False)
    assert torch.equal(run.rewards, expected.rewards)
    once = len(sizes)
    sample(model, red, SMC(8), nfe=400, batch=8, seed=1, progress=False)
    torch._dynamo.reset()
    assert opened > 0
    assert once - opened <= 1  # one size of call: eight states, twice
    assert len(sizes) == once


@contextmanager
def hooked(pipe: Any) -> Iterator[list[str]]:
    """Offload hooks as diffusers sets them, on the CPU: notes which part was moved in."""
    from accelerate.hooks import CpuOffload, add_hook_to_module

    moved: list[str] = []

    class Noted(CpuOffload):
        def __init__(self, name: str) -> None:
            super().__init__("cpu")
            self.name = name

        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            if not moved or moved[-1] != self.name:
                moved.append(self.name)
            return super().pre_forward(module, *args, **kwargs)

    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            add_hook_to_module(part, Noted(name))
    yield moved


def test_networks_under_offload_hooks_are_driven_and_take_turns():
    tiny = BY_NAME["FluxPipeline"]
    plain, pipe = driven(tiny), tiny.build()
    call = {"max_sequence_length": tiny.call["max_sequence_length"]}
    size = {name: tiny.call[name] for name in ("height", "width")}
    with hooked(pipe) as moved:
        model = from_pipeline(pipe, PROMPTS, steps=4, **size, call=call)
        assert model.offloaded
        assert "under offload hooks" in from_pipeline(pipe, PROMPTS, steps=4, **size).about
        moved.clear()
        run = sample(model, red, BestOfN(10), batch=8, progress=False)
    other = sample(plain, red, BestOfN(10), batch=8, progress=False)
    assert torch.equal(run.rewards, other.rewards)
    assert moved == ["transformer", "vae"]


@dataclass(frozen=True)
class Climb:
    """Moves the mean of a step along the gradient of the guess's reward."""

    push: float
    exact: bool = True
    differentiates: bool = True

    def propose(self, step) -> Proposal:
        at = through_network(step)
        slope, clean = at.gradient, at.clean
        assert slope.abs().sum() > 0
        base = step.process.transition(step.x, step.i, clean)
        mean = base.mean + self.push * base.std.view(-1, 1, 1, 1) ** 2 * slope
        guided = NormalTransition(mean, base.std)
        return Proposal(base, guided, clean, torch.zeros(len(step), dtype=torch.bool))

    def rows(self, i: torch.Tensor, steps: int) -> torch.Tensor:
        return torch.ones_like(i)


def test_a_guidance_bends_both_routes_alike():
    pipe = stable_diffusion()
    runs = [
        sample(
            from_pipeline(pipe, PROMPTS, steps=4, route=route),
            red,
            BestOfN(6),
            guidance=Climb(500.0),
            progress=False,
        )
        for route in ("native", "driven")
    ]
    # float32 through both networks, twice
    torch.testing.assert_close(runs[0].rewards, runs[1].rewards, rtol=0, atol=1e-5)
    plain = sample(from_pipeline(pipe, PROMPTS, steps=4), red, BestOfN(6), progress=False)
    assert (plain.rewards - runs[0].rewards).abs().max() > 1e-3
    assert torch.equal(runs[0].spent.rows, runs[1].spent.rows)


def test_offload_hooks_are_left_as_they_are():
    tiny = BY_NAME["FluxPipeline"]
    pipe = tiny.build()
    pipe.enable_model_cpu_offload(device="cpu")
    hooks = [id(hook) for hook in pipe._all_hooks]
    kept = {name: part._hf_hook for name, part in pipe.components.items() if name != "scheduler"
            and hasattr(part, "_hf_hook")}  # fmt: skip
    model = driven(tiny, pipe)
    assert model.offloaded
    sample(model, red, BestOfN(3), progress=False)
    assert [id(hook) for hook in pipe._all_hooks] == hooks
    assert all(getattr(pipe, name)._hf_hook is hook for name, hook in kept.items())
    assert len(kept) == 4
    call = {**tiny.call, "num_inference_steps": 2, "output_type": "pt"}
    assert pipe("a fox", **call).images.isfinite().all()
