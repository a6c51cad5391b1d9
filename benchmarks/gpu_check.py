"""Ten minutes on a GPU: speed, memory and everything that only a device can show.

    make gpu-check            # python -m benchmarks.gpu_check > benchmarks/results/gpu_check.txt
    python -m benchmarks.gpu_check --quick      # the same code on tiny pipelines and the CPU

Pipelines have the networks of SD 1.5, SDXL and FLUX.1 in shape and size, with random weights
(`tests/shaped_pipelines.py`). Checked, natively and driven:

- speed: wall time of a run of DTS, DTS* and SMC, undecoded, over that of as many rows of the bare
  U-Net at its best batch size, in turn, median of pairs; goal 1.05;
- memory: peak of a DTS* run over that of best-of-N, goal 1.1; FLUX in bfloat16 with model offload
  on a device held to 24 GB;
- half precision: rewards are finite in float16 and bfloat16;
- out of memory: a batch that does not fit is cut, and every row of the budget is used;
- compiled networks: the same images, and no more graphs than sizes of calls.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor

from benchmarks.report import finish, header
from samplers import SMC, BestOfN, TreeSampling, TreeSearch, sample
from steering import Model, from_pipeline
from tests.shaped_pipelines import shaped
from tests.tiny_pipelines import stable_diffusion

GB = 2**30
CARD = 24 * GB
ROUTES = ("native", "driven")
SAMPLERS: dict[str, Any] = {
    "dts": TreeSampling(branch="even", parallel=16),
    "dts_star": TreeSearch(branch="even", parallel=16),
    "smc": SMC(16),
}


@dataclass(frozen=True)
class Bench:
    """A device, the pipelines that are tried on it, and how long to try."""

    device: torch.device
    pipelines: dict[str, Callable[[torch.dtype], Any]]
    sizes: tuple[int, ...]
    rollouts: int
    repeats: int
    steps: int

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def wall(self, run: Callable[[], Any]) -> float:
        """Seconds that a run takes, with the device's part of it."""
        self.wait()
        began = time.perf_counter()
        run()
        self.wait()
        return time.perf_counter() - began

    def peak(self, run: Callable[[], Any]) -> float:
        """Most GB that were allocated on the device in a run; nan on a CPU."""
        if not self.on_gpu:
            run()
            return float("nan")
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() / GB


def red(items: Tensor, prompts: Any) -> Tensor:
    """A reward that costs nothing."""
    return items[:, 0].mean((1, 2)) - items[:, -1].mean((1, 2))


def bare(pipe: Any, model: Model, batch: int) -> Callable[[int], None]:
    """Calls of the U-Net alone, with what it is given for `batch` states at mixed steps."""
    key = torch.arange(batch, device=model.device)
    x, t = model.process.prior(key), model.process.time(key % model.process.steps)
    given: list[Any] = []
    hook = pipe.unet.register_forward_pre_hook(
        lambda net, args, kwargs: given.append((args, kwargs)), with_kwargs=True
    )
    try:
        with torch.no_grad():
            model.denoiser(x, t, torch.zeros(batch, dtype=torch.int64))
    finally:
        hook.remove()
    args, kwargs = given[0]

    def call(times: int) -> None:
        with torch.no_grad():
            for _ in range(times):
                pipe.unet(*args, **kwargs)

    return call


def rollout(model: Model) -> int:
    """Network rows from noise to data."""
    i = torch.arange(model.process.steps, device=model.device)
    row = torch.zeros(model.process.steps, dtype=torch.int64)
    return int(model.denoiser.rows(model.process.time(i), row).sum())


def best_batch(bench: Bench, pipe: Any, model: Model) -> int:
    """The batch size at which a state costs least."""
    cost: dict[int, float] = {}
    for batch in bench.sizes:
        try:
            call = bare(pipe, model, batch)
            cost[batch] = min(bench.wall(partial(call, 2)) for _ in range(2)) / (2 * batch)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            break
    print("  bare network, ms a state: "
          + ", ".join(f"batch {b}: {1e3 * s:.2f}" for b, s in cost.items()))  # fmt: skip
    return min(cost, key=lambda b: cost[b])


def speed(bench: Bench, pipe: Any, model: Model) -> dict[str, float]:
    """Wall time of runs over that of the network they call, pair by pair.

    States are scored as they are: decoding is no part of what is measured.
    """
    batch = best_batch(bench, pipe, model)
    call, way = bare(pipe, model, batch), rollout(model)
    undecoded = replace(model, decode=lambda x: x)
    nfe, found = bench.rollouts * way, {"batch": float(batch)}
    for name, sampler in SAMPLERS.items():
        ratios = []
        for repeat in range(bench.repeats + 1):  # the first is for warmth
            run = partial(
                sample, undecoded, red, sampler, nfe=nfe, seed=repeat, batch=batch, progress=False
            )
            results: list[Any] = []
            seconds = bench.wall(lambda run=run, results=results: results.append(run()))
            states = results[0].nfe / (way / bench.steps)
            calls = max(1, round(states / batch))
            network = bench.wall(partial(call, calls)) / (calls * batch)
            ratios.append(seconds / (states * network))
        found[name] = statistics.median(ratios[1:])
        print(f"  {name}: engine over bare network {found[name]:.3f} "
              f"({min(ratios[1:]):.3f}..{max(ratios[1:]):.3f})", flush=True)  # fmt: skip
    return found


def memory(bench: Bench, model: Model, batch: int) -> dict[str, float]:
    """Peak GB of a DTS* run and of best-of-N at the same rows."""
    way = rollout(model)
    options: dict[str, Any] = {"nfe": bench.rollouts * way, "batch": batch, "progress": False}
    plain = bench.peak(lambda: sample(model, red, BestOfN(), **options))
    tree = bench.peak(lambda: sample(model, red, SAMPLERS["dts_star"], **options))
    print(f"  peak GB: best-of-N {plain:.2f}, DTS* {tree:.2f}")
    return {"best_of_n_gb": plain, "dts_star_gb": tree, "ratio": tree / plain}


def out_of_memory(bench: Bench, model: Model) -> dict[str, Any]:
    """A batch that does not fit, on a device held to what a small one takes."""
    if not bench.on_gpu:
        return {}
    total = torch.cuda.get_device_properties(bench.device).total_memory
    held = torch.cuda.memory_allocated() + 4 * GB
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, held / total))
    try:
        run = sample(model, red, BestOfN(64), batch=64, progress=False)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    print(f"  out of memory: {run.distinct} of 64 found in {run.spent.calls} calls")
    return {"found": run.distinct, "calls": run.spent.calls}


def compiled(bench: Bench, pipe: Any, model: Model, batch: int) -> dict[str, float]:
    """The same run with the network compiled."""
    options: dict[str, Any] = {"batch": batch, "progress": False}
    before = sample(model, red, BestOfN(2 * batch), **options)
    pipe.unet.compile(dynamic=False, backend="inductor" if bench.on_gpu else "eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    after = sample(model, red, BestOfN(2 * batch), **options)
    graphs = int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    warm = bench.wall(lambda: sample(model, red, BestOfN(2 * batch), **options))
    apart = float((before.rewards - after.rewards).abs().max())
    print(f"  compiled: {graphs} graphs, rewards differ by {apart:.2e}, {warm:.2f} s when warm")
    pipe.unet._compiled_call_impl = None
    return {"graphs": graphs, "reward_difference": apart, "seconds": warm}


def one_shape(bench: Bench, name: str, dtype: torch.dtype) -> dict[str, Any]:
    """Everything about one pipeline, by route."""
    found: dict[str, Any] = {}
    pipe = bench.pipelines[name](dtype)
    for route in ROUTES:
        print(f"{name}, {route}, {dtype}:", flush=True)
        began = time.perf_counter()
        model = from_pipeline(pipe, ["a red fox"], steps=bench.steps, route=route)  # type: ignore[arg-type]
        print(f"  opened in {time.perf_counter() - began:.2f} s: {model.about}")
        speeds = speed(bench, pipe, model)
        batch = int(speeds["batch"])
        found[route] = {
            "speed": speeds,
            "memory": memory(bench, model, batch),
            "out_of_memory": out_of_memory(bench, model),
            "compiled": compiled(bench, pipe, model, min(batch, 16)),
        }
    return found


def halves(bench: Bench) -> dict[str, bool]:
    """Are rewards finite in half precision?"""
    found = {}
    for dtype in (torch.float16, torch.bfloat16):
        name = next(iter(bench.pipelines))
        model = from_pipeline(bench.pipelines[name](dtype), ["a red fox"], steps=bench.steps)
        run = sample(model, red, TreeSearch(branch="even"), nfe=8 * 2 * bench.steps, progress=False)
        found[str(dtype).removeprefix("torch.")] = run.failed == 0
    return found


def flux_on_a_small_card(bench: Bench) -> dict[str, Any]:
    """A DTS* run of the FLUX shape with its networks offloaded, on a device held to 24 GB."""
    if not bench.on_gpu:
        return {}
    total = torch.cuda.get_device_properties(bench.device).total_memory
    pipe = shaped("flux", bench.device, torch.bfloat16).to("cpu")
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, CARD / total))
    pipe.enable_model_cpu_offload(device=bench.device)
    try:
        model = from_pipeline(
            pipe, ["a red fox"], steps=4, height=1024, width=1024, call={"max_sequence_length": 128}
        )
        runs: list[Any] = []
        peak = bench.peak(
            lambda: runs.append(
                sample(model, red, TreeSearch(branch="even", parallel=4), nfe=32, batch=1,
                       progress=False)
            )
        )  # fmt: skip
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    print(f"flux with offload on 24 GB: peak {peak:.2f} GB, {runs[0].distinct} leaves", flush=True)
    return {"peak_gb": peak, "leaves": runs[0].distinct, "fits": peak <= CARD / GB}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny pipelines on the CPU")
    args = parser.parse_args()
    if not args.quick and not torch.cuda.is_available():
        raise SystemExit("gpu_check needs a CUDA device: --quick runs its code on the CPU.")
    torch.set_num_threads(1)
    header()
    warnings.simplefilter("ignore")
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    if args.quick:
        tiny: dict[str, Any] = {"tiny": lambda dtype: stable_diffusion().to(dtype)}
        bench = Bench(torch.device("cpu"), tiny, (4, 8), 16, 1, 3)
        dtype = torch.float32
    else:
        device, dtype = torch.device("cuda"), torch.bfloat16
        bench = Bench(
            device,
            {n: (lambda d, n=n: shaped(n, device, d)) for n in ("sd15", "sdxl")},
            (1, 2, 4, 8, 16, 32),
            32,
            3,
            20,
        )
    shapes = {name: one_shape(bench, name, dtype) for name in bench.pipelines}
    ratios = [
        routes[route]["speed"][name]
        for routes in shapes.values()
        for route in ROUTES
        for name in SAMPLERS
    ]
    peaks = [routes[route]["memory"]["ratio"] for routes in shapes.values() for route in ROUTES]
    finish(
        {
            "engine_over_network": max(ratios),
            "peak_over_best_of_n": max(peaks),
            "half_precision": halves(bench),
            "flux_24gb": flux_on_a_small_card(bench),
            "shapes": shapes,
            "device": torch.cuda.get_device_name() if bench.on_gpu else "cpu",
        }
    )


if __name__ == "__main__":
    main()
