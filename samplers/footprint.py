"""What a run will take of a device's memory, measured on one and on two states before it starts."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from steering.core import Model
from steering.noise import root_key

GB = 2**30


@dataclass(frozen=True)
class Footprint:
    """GB on a device: what is there already, and the most that a call takes on top of it."""

    held: float  # allocated before the run: weights that stay on the device
    one: float  # what a call of one state takes; nan where two do not fit
    more: float  # what every further state takes
    total: float  # that the device has
    batch: int

    @property
    def call(self) -> float:
        """GB that a call of `batch` states takes."""
        return self.one + (self.batch - 1) * self.more

    def __str__(self) -> str:
        if self.one != self.one:
            return f"expected: not even 2 states fit into one call beside {self.held:.1f} GB"
        need, most = self.held + self.call, self.total - self.held - self.one
        note = "" if need < self.total else f": too much, say batch={1 + int(most / self.more)}"
        return (
            f"expected: {need:.1f} of {self.total:.1f} GB ({self.held:.1f} held, {self.call:.1f} "
            f"for a call of {self.batch}){note}"
        )


def footprint(model: Model, batch: int) -> Footprint | None:
    """What calls of `batch` states will take; None where a device does not tell.

    Two calls are made, of one state and of two, that no budget counts; the rest is a straight line.
    """
    device = model.device
    if device.type != "cuda":
        return None
    held = torch.cuda.memory_allocated(device)
    try:
        one, two = (_peak(model, n) - held for n in (1, 2))
    except torch.OutOfMemoryError:
        one = two = float("nan")
    total = torch.cuda.get_device_properties(device).total_memory
    return Footprint(held / GB, one / GB, max(two - one, 1) / GB, total / GB, batch)


def _peak(model: Model, n: int) -> int:
    """Most bytes allocated while n states are asked for."""
    device = model.device
    torch.cuda.reset_peak_memory_stats(device)
    x = model.process.prior(root_key(0, torch.arange(n, device=device)))
    t = model.process.time(torch.zeros(n, dtype=torch.int64, device=device))
    with torch.no_grad():
        model.denoiser(x, t, torch.zeros(n, dtype=torch.int64))
    return torch.cuda.max_memory_allocated(device)
