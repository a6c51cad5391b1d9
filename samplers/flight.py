"""Walks on their way: what was asked, and the places they take in the next network call."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from samplers.journal import Walk
from steering.core import Model
from steering.noise import child_key


@dataclass(slots=True)
class Request:
    """A walk on its way."""

    id: int
    entry: int
    src: int  # entry of its source; -1 = the prior
    start: int
    stop: int
    key: int
    row: int
    score: bool
    angle: float
    known: Walk | None
    at: int = 0
    rows: int = 0
    log_ratio: float = 0.0
    failed: bool = False

    def __post_init__(self) -> None:
        self.at = self.start


class Flight:
    """The walks that share the next call: places 0..n-1 of a fixed buffer, always contiguous."""

    def __init__(self, capacity: int, model: Model) -> None:
        self._capacity, self._steps = capacity, model.process.steps
        self.requests: list[Request] = []
        self.x = torch.empty(0)  # [capacity, *D]
        self._keys = torch.zeros(capacity, self._steps, dtype=torch.int64, device=model.device)

    @property
    def n(self) -> int:
        return len(self.requests)

    @property
    def room(self) -> int:
        return self._capacity - self.n

    def add(self, requests: list[Request], x: Tensor, key: Tensor) -> None:
        if not len(self.x):
            self.x = x.new_empty(self._capacity, *x.shape[1:])
        place = slice(self.n, self.n + len(requests))
        self.x[place] = x
        # the keys of all steps at once: one per walk and tick would cost as much as the noise
        first = min(r.start for r in requests)
        last = max(r.stop for r in requests)
        span = torch.arange(first, last, device=key.device)
        flat = child_key(key.repeat_interleave(len(span)), span.repeat(len(key)))
        self._keys[place, first:last] = flat.view(len(key), len(span))
        self.requests += requests

    def keys_at(self, at: Tensor) -> Tensor:
        """Noise keys [n] of the steps `at` [n]; at T (a look has no step) any key."""
        index = at.clamp(max=self._steps - 1).to(self._keys.device)
        return self._keys[: self.n].gather(1, index[:, None])[:, 0]

    def remove(self, places: list[int]) -> None:
        """Fill the places of walks that ended with walks from the end."""
        for place in reversed(places):
            last = self.n - 1
            if place != last:
                self.requests[place] = self.requests[last]
                self.x[place] = self.x[last]
                self._keys[place] = self._keys[last]
            self.requests.pop()
