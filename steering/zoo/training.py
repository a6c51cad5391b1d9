"""What the training scripts of the built-in diffusion models share: a run of a given wall time.

AdamW, a learning rate that decays to zero over the run, averaged weights, and snapshots from which
a run that was stopped goes on.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Net = TypeVar("Net", bound=nn.Module)

BATCH = 64
WARMUP_STEPS = 300
EMA_DECAY = 0.999
SNAPSHOTS = 80


def learning_rate(peak: float, step: int, fraction: float) -> float:
    """Linear warm-up in steps, then a cosine to 0 over the fraction of the time used."""
    return peak * min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * fraction))


def seeded(build: Callable[[], Net], seed: int) -> Net:
    """A new network with weights of this seed.

    Weights are initialised by the global generator, which is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return build()


def save_state(
    path: Path,
    unet: nn.Module,
    ema: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    rng: torch.Generator,
    progress: dict,
) -> None:
    """Everything that `load_state` needs to go on, in one safetensors file."""
    tensors = {"rng": rng.get_state()}
    for name, p in unet.named_parameters():
        tensors[f"unet/{name}"] = p.detach().clone()
        tensors[f"ema/{name}"] = ema[name].clone()
        for key, value in optimizer.state[p].items():
            tensors[f"adam/{key}/{name}"] = value.clone()
    part = path.with_suffix(".part")
    save_file(tensors, part, metadata={"progress": json.dumps(progress)})
    part.replace(path)  # never a half-written state under the name that is resumed from


def load_state(
    path: Path,
    unet: nn.Module,
    ema: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    rng: torch.Generator,
) -> dict:
    """Restore what `save_state` wrote, in place; returns the progress."""
    tensors = load_file(path)
    rng.set_state(tensors["rng"])
    for name, p in unet.named_parameters():
        p.data.copy_(tensors[f"unet/{name}"])
        ema[name].copy_(tensors[f"ema/{name}"])
        keys = ("step", "exp_avg", "exp_avg_sq")
        optimizer.state[p] = {key: tensors[f"adam/{key}/{name}"] for key in keys}
    with safe_open(path, "pt") as f:
        return json.loads(f.metadata()["progress"])


def fit(
    unet: nn.Module,
    loss_of: Callable[[Tensor], Tensor],
    rows: int,
    save: Callable[[dict[str, Tensor]], None],
    out: Path,
    minutes: float,
    peak: float,
    rng: torch.Generator,
) -> None:
    """Train for so many minutes of wall time, this and earlier starts together.

    Args:
        unet: trained in place.
        loss_of: the loss [] of the rows with these numbers [BATCH]; draws from `rng` only.
        rows: how many rows there are; they come in a fresh random order every time round.
        save: called with the averaged weights by name, at every snapshot.
        out: folder of the log, train.jsonl, and of the state.
        minutes: of wall time, over which the learning rate decays to 0.
        peak: highest learning rate.
        rng: generator of the order of the rows, and of the loss.
    """
    out.mkdir(parents=True, exist_ok=True)
    params = dict(unet.named_parameters())
    ema = {name: p.detach().clone() for name, p in params.items()}
    optimizer = torch.optim.AdamW(unet.parameters(), lr=0.0, weight_decay=1e-3, fused=True)

    state, log = out / "state.safetensors", out / "train.jsonl"
    progress = {"step": 0, "wall": 0.0, "cpu": 0.0, "logged": 0}
    if state.exists():
        progress = load_state(state, unet, ema, optimizer, rng)
    else:
        log.unlink(missing_ok=True)
    step = progress["step"]
    wall, cpu = time.monotonic() - progress["wall"], time.process_time() - progress["cpu"]
    order, losses, fraction = torch.empty(0, dtype=torch.long), [], 0.0
    while fraction < 1:
        fraction = min(1.0, (time.monotonic() - wall) / (60 * minutes))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(peak, step, fraction)
        if len(order) < BATCH:
            order = torch.randperm(rows, generator=rng)
        batch, order = order[:BATCH], order[BATCH:]
        loss = loss_of(batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        step += 1
        losses.append(loss.item())
        # a young average forgets faster, so that early snapshots are of use
        decay = min(EMA_DECAY, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, average in ema.items():
                average.lerp_(params[name], 1 - decay)
        if fraction * SNAPSHOTS >= progress["logged"] + 1 or fraction == 1:
            progress = {
                "step": step,
                "wall": time.monotonic() - wall,
                "cpu": time.process_time() - cpu,
                "logged": math.floor(fraction * SNAPSHOTS),
            }
            line = {
                "step": step,
                "images": step * BATCH,
                "loss": round(sum(losses) / len(losses), 5),
                "lr": optimizer.param_groups[0]["lr"],
                "cpu_seconds": round(progress["cpu"], 1),
                "wall_seconds": round(progress["wall"], 1),
            }
            losses = []
            with log.open("a") as f:
                f.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)
            save(ema)
            save_state(state, unet, ema, optimizer, rng, progress)
    state.unlink()
