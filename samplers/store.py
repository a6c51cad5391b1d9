"""Where latents live: rows of one growing arena, found by handle."""

from __future__ import annotations

import torch
from torch import Tensor

_DEVICE_BYTES = 1 << 30  # an arena that outgrows this on an accelerator moves to host memory


class Store:
    """Kept states, [N, *D] in and out, addressed by integer handles.

    One tensor holds all states, so that a batch is one gather. It lives on the device of what is
    put in first, and moves to host memory for good when it outgrows a GiB there.
    """

    def __init__(self) -> None:
        self._arena: Tensor | None = None  # [capacity, *D]
        self._slot: dict[int, int] = {}
        self._free: list[int] = []

    def __contains__(self, handle: int) -> bool:
        return handle in self._slot

    def __len__(self) -> int:
        return len(self._slot)

    def put(self, handles: list[int], x: Tensor) -> None:
        """Keep x [N, *D] under N handles; a handle that is kept already is written over."""
        if not handles:
            return
        slots = [self._slot.setdefault(h, -1) for h in handles]
        for k, slot in enumerate(slots):
            if slot < 0:
                slots[k] = self._slot[handles[k]] = self._take(x)
        assert self._arena is not None
        self._arena[slots] = x.to(self._arena)

    def get(self, handles: list[int]) -> Tensor:
        """States [N, *D] of N handles, on the arena's device; KeyError if one is not kept."""
        if self._arena is None:
            raise KeyError(handles)
        return self._arena[[self._slot[h] for h in handles]]

    def drop(self, handles: list[int]) -> None:
        """Let go of handles; those not kept are passed over."""
        self._free += [self._slot.pop(h) for h in handles if h in self._slot]

    def to(self, device: torch.device) -> Store:
        """This store, with its arena on a device if that is not beyond its limit there."""
        if self._arena is not None and self._arena.nbytes <= _DEVICE_BYTES:
            self._arena = self._arena.to(device)
        return self

    def _take(self, x: Tensor) -> int:
        if self._arena is None:
            self._arena = x.new_empty(64, *x.shape[1:])
            self._free = list(range(63, -1, -1))
        if not self._free:
            capacity = len(self._arena)
            size = self._arena.nbytes * 2
            home = self._arena.device if size <= _DEVICE_BYTES else torch.device("cpu")
            grown = self._arena.new_empty(2 * capacity, *self._arena.shape[1:], device=home)
            grown[:capacity] = self._arena
            self._arena = grown
            self._free = list(range(2 * capacity - 1, capacity - 1, -1))
        return self._free.pop()
