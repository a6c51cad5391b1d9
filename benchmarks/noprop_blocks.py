"""Do blocks trained in two processes take half the time, and come out the same to the bit?

    python -m benchmarks.noprop_blocks [--quick] [--data DIR]

A NoProp-DT network (arXiv:2503.24322) with a small image tower, blocks trained by `noprop` under
`torch.distributed.run`, in one process and in two of one thread each, which exchange blocks through
a folder. Of MNIST's training images (--data DIR, which holds mnist.npz), a quarter of an epoch a
block; with --quick, 4 blocks on the built-in 250 test images.

    speed_up      seconds of training in one process over those in two, until the last has all
                  blocks, by the wall clock; paired, the median over rounds
    cpu_speed_up  seconds of CPU of the one process over those of the busiest of two: what the wall
                  clock would say if each process had a core to itself
    equal         are all weights and buffers of both processes those of the serial run, to the bit?

On a machine that is busy with other work the wall clock says little: see the load averages.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.report import finish, header
from steering import zoo

ROOT = Path(__file__).parents[1]


def examples(data: Path | None) -> tuple[Tensor, Tensor]:
    """Images [N, 1, 28, 28] uint8 and labels [N] int64: MNIST's training set, or the slice."""
    if data is None:
        images, labels = zoo.mnist_slice()
        return images[:, None], labels.long()
    with np.load(data / "mnist.npz") as arrays:
        images = torch.from_numpy(arrays["x_train"])[:, None]
        return images, torch.from_numpy(arrays["y_train"]).long()


def work(out: Path, blocks: int, epochs: float, batch: int, data: Path | None) -> None:
    """Train, as one of the processes; leave weights and figures in `out`."""
    from accelerate import Accelerator

    from steering.finetune import noprop
    from steering.models.noprop import NoPropDenoiser

    torch.set_num_threads(1)
    images, labels = examples(data)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # every process starts from the same weights
        network = NoPropDenoiser("dt", steps=blocks, channels=(16, 32, 48), hidden=48)
    accelerator = Accelerator()
    if accelerator.num_processes != int(os.environ["WORLD_SIZE"]):
        raise RuntimeError("accelerate does not see the other process: each would train all blocks")
    accelerator.wait_for_everyone()  # else the first waits on the other's imports, by the clock
    clock, cpu = time.perf_counter(), time.process_time()
    noprop(network, images, labels, epochs=epochs, batch=batch, out=out, progress=False)
    took = {"seconds": time.perf_counter() - clock, "cpu": time.process_time() - cpu}
    rank = os.environ["RANK"]
    save_file(network.state_dict(), out / f"weights-{rank}.safetensors")
    (out / f"took-{rank}.json").write_text(json.dumps(took))


def launch(processes: int, out: Path, settings: list[str]) -> list[dict[str, float]]:
    """Train in processes of their own; the figures of each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(processes), "-m", "benchmarks.noprop_blocks"]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    out.mkdir()
    done = subprocess.run(
        [*command, *settings, "--worker", str(out)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{processes} processes failed: {done.stderr[-2000:]}")
    return [json.loads((out / f"took-{rank}.json").read_text()) for rank in range(processes)]


def apart(mine: Path, other: Path) -> list[str]:
    """Names of weights and buffers that differ in any bit."""
    a, b = load_file(mine), load_file(other)
    same = {k for k in a.keys() & b.keys() if a[k].dtype == b[k].dtype and torch.equal(a[k], b[k])}
    return sorted((a.keys() | b.keys()) - same)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the built-in images, under a minute")
    parser.add_argument("--data", type=Path, help="folder that holds mnist.npz")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.quick and args.data is None:
        parser.error("--data is missing: give the folder that holds mnist.npz, or --quick.")
    data = None if args.quick else args.data.resolve()
    blocks, epochs, batch, rounds = (4, 4.0, 50, 1) if args.quick else (6, 0.25, 128, 3)
    if args.worker is not None:
        work(args.worker, blocks, epochs, batch, data)
        return

    torch.set_num_threads(1)
    header()
    print(f"dt, {blocks} blocks, batch {batch}, {epochs:g} epochs a block, rounds: {rounds}\n")
    settings = ["--quick"] if args.quick else ["--data", str(data)]
    print("round  processes  seconds   CPU seconds of each   load average (before, after)")
    wall, cpu, differ = list[float](), list[float](), list[str]()
    for number in range(rounds):
        taken: dict[int, dict[str, Any]] = {}
        with tempfile.TemporaryDirectory() as folder:
            for processes in (1, 2):
                load = os.getloadavg()[0]
                took = launch(processes, Path(folder, str(processes)), settings)
                seconds, busy = (max(t[k] for t in took) for k in ("seconds", "cpu"))
                taken[processes] = {"seconds": seconds, "cpu": busy}
                each = ", ".join(f"{t['cpu']:.2f}" for t in took)
                loads = f"{load:.2f}, {os.getloadavg()[0]:.2f}"
                print(f"{number:5} {processes:10} {seconds:8.2f}   {each:21} {loads}", flush=True)
            serial = Path(folder, "1", "weights-0.safetensors")
            for rank in (0, 1):
                differ += apart(serial, Path(folder, "2", f"weights-{rank}.safetensors"))
        wall.append(taken[1]["seconds"] / taken[2]["seconds"])
        cpu.append(taken[1]["cpu"] / taken[2]["cpu"])
    speed_up, cpu_speed_up = statistics.median(wall), statistics.median(cpu)
    print(f"\nspeed-up by the wall clock {speed_up:.2f} ({min(wall):.2f} to {max(wall):.2f})")
    print(f"         by CPU of the busiest process {cpu_speed_up:.2f}")
    print("load averages near or above the number of cores: the wall clock then says little")
    told = f"{len(differ)} differ: {', '.join(differ[:3])}" if differ else "equal to the bit"
    print(f"weights and buffers of one process and of two: {told}")
    finish(
        {"speed_up": speed_up, "cpu_speed_up": cpu_speed_up, "equal": not differ,
         "cores": os.cpu_count(), "rounds": rounds}
    )  # fmt: skip


if __name__ == "__main__":
    main()
