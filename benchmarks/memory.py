"""What a call holds: the most bytes of tensors that are allocated at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], object], device: str = "cpu") -> int:
    """Most bytes of tensors held at a time by what `call` allocates, on top of what is there.

    On a GPU by its allocator, elsewhere by the profiler's record of allocations.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        held = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - held
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    assert found.profiler is not None
    results = found.profiler.kineto_results
    assert results is not None
    events: list[Any] = [e for e in results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
