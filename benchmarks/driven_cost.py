"""What does driving a pipeline cost beside its network, and beside a native adapter?

    python -m benchmarks.driven_cost [--quick]
    python -m benchmarks.driven_cost --device cuda [--shape sdxl ...]

On tiny pipelines: CPU time of one query of one state less that of the networks called in it, median
over queries. On a GPU, or with a `--shape`: wall time of a call of 1, 4 and 16 states, driven and
native in turn, and their ratio per row. Goal: 5 ms a query.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from benchmarks.report import finish, header
from steering import Model, from_pipeline, noise
from steering.pipelines.request import networks
from tests.shaped_pipelines import NAMES, shaped
from tests.tiny import Tiny, families

GOAL_MS = 5.0


class Clock:
    """CPU time spent in modules, told by their own hooks."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.spent, self._began = 0.0, 0.0
        for module in modules:
            module.register_forward_pre_hook(self._start)
            module.register_forward_hook(self._stop)

    def _start(self, *_: Any) -> None:
        self._began = time.process_time()

    def _stop(self, *_: Any) -> None:
        self.spent += time.process_time() - self._began


def beside_the_network(tiny: Tiny, repeats: int) -> float:
    """Milliseconds of CPU time a query takes beside its networks, median."""
    pipe, call = tiny.build(), dict(tiny.call)
    own = {name: call.pop(name) for name in ("height", "width", "guidance_scale") if name in call}
    if "negative_prompt" in call:
        own["negative_prompts"] = [call.pop("negative_prompt")]
    prompts = {"text": ["a red fox"], "class": [1], None: None}[tiny.prompt]
    model = from_pipeline(pipe, prompts, steps=4, call=call or None, route="driven", **own)
    clock = Clock(list(networks(pipe).values()))
    x, t, row = _ask(model, 1)
    over = []
    with torch.no_grad():
        for _ in range(repeats):
            clock.spent, began = 0.0, time.process_time()
            model.denoiser(x, t, row)
            over.append(time.process_time() - began - clock.spent)
    return 1e3 * statistics.median(over)


def paired(name: str, device: torch.device, repeats: int) -> dict[str, dict[str, float]]:
    """Wall milliseconds a row of a shaped pipeline, driven and native, by states in a call."""
    pipe = shaped(name, device, torch.bfloat16)
    models = {
        route: from_pipeline(pipe, ["a red fox"], steps=50, route=route)  # type: ignore[arg-type]
        for route in ("native", "driven")
    }
    found: dict[str, dict[str, float]] = {}
    for n in (1, 4, 16):
        spent: dict[str, list[float]] = {route: [] for route in models}
        for _ in range(repeats):
            for route, model in models.items():
                spent[route].append(wall(partial(model.denoiser, *_ask(model, n))))
        native, driven = (statistics.median(spent[route][1:]) for route in ("native", "driven"))
        found[str(n)] = {
            "native_ms_per_row": native / n,
            "driven_ms_per_row": driven / n,
            "ratio": statistics.median(
                d / c for d, c in zip(spent["driven"][1:], spent["native"][1:], strict=True)
            ),
            "ms_per_query_over_native": driven - native,
        }
        print(f"{name} x {n}: " + ", ".join(f"{k} {v:.3f}" for k, v in found[str(n)].items()))
    return found


def wall(run: Callable[[], Any]) -> float:
    """Milliseconds, the device's work included."""
    _wait()
    began = time.perf_counter()
    with torch.no_grad():
        run()
    _wait()
    return 1e3 * (time.perf_counter() - began)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _ask(model: Model, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = model.process.prior(noise.root_key(0, torch.arange(n, device=model.device)))
    t = model.process.time(torch.arange(n, device=model.device) % model.process.steps)
    return x, t, torch.zeros(n, dtype=torch.int64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="every fifth pipeline, few queries")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", nargs="*", default=[], choices=NAMES)
    args = parser.parse_args()
    torch.set_num_threads(1)
    header()
    warnings.simplefilter("ignore")
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    device = torch.device(args.device)
    wanted = args.shape or (["sd15", "sdxl"] if device.type == "cuda" else [])
    pairs = {name: paired(name, device, 10) for name in wanted}
    by_family: dict[str, float] = {}
    for tiny in families()[:: 5 if args.quick else 1]:
        try:
            by_family[tiny.name] = beside_the_network(tiny, 10 if args.quick else 40)
        except ValueError as refused:
            print(f"{tiny.name:<44} {refused}")
            continue
        print(f"{tiny.name:<44} {by_family[tiny.name]:6.2f} ms", flush=True)
    figures = list(by_family.values())
    finish(
        {
            "ms_per_query": statistics.median(figures),
            "largest_ms_per_query": max(figures),
            "goal_ms": GOAL_MS,
            "within_goal": sum(value <= GOAL_MS for value in figures),
            "pipelines": len(figures),
            "by_family": by_family,
            "pairs": pairs,
        }
    )


if __name__ == "__main__":
    main()
