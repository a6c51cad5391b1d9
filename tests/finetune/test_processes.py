"""accelerate's several processes and its mixed precision."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.finetune.processes import main

ROOT = Path(__file__).parents[2]


def launch(out: Path, processes: int, precision: str, batch: int, updates: int) -> None:
    """Tune in processes of their own, on the CPU."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(processes), "-m", "tests.finetune.processes"]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    done = subprocess.run(
        [*command, str(out), str(batch), str(updates)],
        cwd=ROOT,
        env=os.environ | environment | {"ACCELERATE_MIXED_PRECISION": precision},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def learned(out: Path) -> dict[str, torch.Tensor]:
    """Weights in the last checkpoint."""
    state = load_file(out / "state.safetensors")
    return {name: t for name, t in state.items() if name.startswith("weight/")}


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch(tmp_path):
    # the same eight paths, whose gradients are summed in another order: 1e-7 of the gradient. Adam
    # divides by its size, so that a weight differs by lr · 1e-7 · |largest| / |its own| at most
    two, one = tmp_path / "two", tmp_path / "one"
    launch(two, 2, "no", batch=4, updates=2)
    launch(two, 2, "no", batch=4, updates=4)  # goes on
    main(str(one), 8, 4)
    apart = max(float((learned(two)[k] - w).abs().max()) for k, w in learned(one).items())
    assert apart < 2e-5  # of weights that moved by 4e-3
    lines = [
        [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
        for out in (two, one)
    ]
    for a, b in zip(*lines, strict=True):
        assert (a["forward"], a["backward"], a["rewards"]) == (b["forward"], b["backward"], 8)
        assert a["reward"] == pytest.approx(b["reward"])
        assert a["kl"] == pytest.approx(b["kl"], rel=1e-4, abs=1e-6)


@pytest.mark.slow
def test_bfloat16_is_near_float32(tmp_path):
    half, full = tmp_path / "half", tmp_path / "full"
    launch(half, 1, "bf16", batch=8, updates=4)
    main(str(full), 8, 4)
    last = [json.loads((o / "history.jsonl").read_text().splitlines()[-1]) for o in (half, full)]
    assert last[0]["kl"] != last[1]["kl"]
    assert last[0]["kl"] == pytest.approx(last[1]["kl"], rel=0.1, abs=0.02)  # eight bits
    assert all(w.dtype == torch.float32 for w in learned(half).values())


def test_float16_is_refused(monkeypatch):
    import accelerate

    from steering.finetune.loop import accelerator_of

    class Half:
        mixed_precision = "fp16"

    monkeypatch.setattr(accelerate, "Accelerator", Half)
    with pytest.raises(ValueError, match=r"mixed_precision='fp16'.*'bf16' or 'no'"):
        accelerator_of(torch.device("cpu"))


def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch):
    # torch's launcher without accelerate's: on a machine without a GPU, unless it is told
    from steering.finetune.loop import accelerator_of

    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="3 processes were launched, and accelerate sees 1"):
        accelerator_of(torch.device("cpu"))
