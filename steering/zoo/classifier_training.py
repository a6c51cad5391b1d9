"""What the training scripts of the built-in classifiers share: whole epochs, and what is kept."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn


def fit_epochs(
    model: nn.Module,
    loss_of: Callable[[Tensor], Tensor],
    rows: int,
    batch: int,
    epochs: int,
    peak: float,
    decay: float,
    rng: torch.Generator,
    watch: Callable[[int], dict[str, Any]],
    told: str = "",
) -> list[str]:
    """Train for so many epochs; the last one is what ships. The log, a line of JSON each.

    AdamW, its learning rate in one cycle. A last batch that is not full is left out.

    Args:
        model: trained in place, and left in evaluation mode.
        loss_of: the loss [] of the rows with these numbers [batch].
        rows: how many rows there are; they come in a fresh random order every epoch.
        peak: highest learning rate.
        decay: of weights.
        rng: generator of the order.
        watch: epoch, from 1 on -> figures for the log, of the model in evaluation mode.
        told: printed before each line.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=decay, fused=True)
    total = epochs * (rows // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total, pct_start=0.15)
    lines = []
    for epoch in range(1, epochs + 1):
        model.train()
        losses = torch.zeros(())
        batches = torch.randperm(rows, generator=rng).split(batch)[: rows // batch]
        for numbers in batches:
            loss = loss_of(numbers)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses += loss.detach()
        model.eval()
        line = {
            "epoch": epoch,
            "loss": round(losses.item() / len(batches), 5),
            **watch(epoch),
            "cpu_seconds": round(time.process_time(), 1),
        }
        lines.append(json.dumps(line))
        print(told + lines[-1], flush=True)
    return lines


def save_classifier(
    model: Any, lines: list[str], folder: Path, dtype: torch.dtype = torch.float32
) -> None:
    """Write the log, the arguments and the weights, floats among them in `dtype`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "config.json").write_text(json.dumps(model.config, indent=2) + "\n")
    # the number of batches a norm has seen stays an integer
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in model.state_dict().items()}
    save_file(state, folder / "model.safetensors")
