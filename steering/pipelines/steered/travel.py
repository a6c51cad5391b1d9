"""Steps that are taken several times, from their own level each time, inside a pipeline's loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from steering.core import Guidance
from steering.guidance.freedom import up_again
from steering.noise import normal
from steering.pipelines.steered.solver import Solver


class Travel:
    """Back in time, for guidances that have `repeats`.

    The loop of a pipeline goes once over the times of its scheduler: it is shown a grid with each
    as often as its step is taken. The scheduler itself keeps to its own.

    Args:
        scheduler, guidance: whose steps are taken again, and who says how often.
    """

    def __init__(self, scheduler: Any, guidance: Guidance) -> None:
        self.own: Tensor | None = None  # the grid, where the one that the loop sees is longer
        self._scheduler, self._guidance = scheduler, guidance

    def lengthen(self) -> None:
        """The scheduler has a new grid."""
        self.own = None
        repeats = getattr(self._guidance, "repeats", None)
        if repeats is None:
            return
        times = self._scheduler.timesteps
        often = repeats(torch.arange(len(times)), len(times)).to(times.device)
        if (often > 1).any():
            self.own, self._scheduler.timesteps = times, times.repeat_interleave(often)

    def end(self) -> None:
        """The call is over: the scheduler's grid is its own."""
        if self.own is not None:
            self._scheduler.timesteps, self.own = self.own, None

    @contextmanager
    def own_grid(self) -> Iterator[None]:
        """The scheduler with its own grid, which it looks times up in."""
        longer = self._scheduler.timesteps
        if self.own is not None:
            self._scheduler.timesteps = self.own
        try:
            yield
        finally:
            self._scheduler.timesteps = longer

    def again(self, solver: Solver, i: int, taken: Mapping[int, int]) -> bool:
        """Is step i to be taken again, from its own level?

        Args:
            taken: how often each step was, this time included.

        Raises:
            ValueError: a solver that cannot, or a call that starts on the way.
        """
        if self.own is None:
            return False
        guidance: Any = self._guidance
        if not solver.first_order:
            raise ValueError(
                f"{type(guidance).__name__} travels back in time, which {solver.name}Scheduler, "
                "a solver of higher order, cannot: give the pipeline one of first order, such as "
                "DDIM, Euler or FlowMatchEuler."
            )
        if i and not taken.get(i - 1):
            raise ValueError(
                f"the pipeline starts at step {i} of {solver.process.steps}, and "
                f"{type(guidance).__name__} travels back in time: give it the whole grid."
            )
        return taken[i] < int(guidance.repeats(torch.tensor([i]), solver.process.steps))

    def back(self, solver: Solver, i: int, stepped: Any, index: int | None, key: Tensor) -> Any:
        """What `step` returned, its states noised back to level i.

        Args:
            index: the scheduler's cursor before the step.
            key: [N] of the noise.
        """
        if index is not None:
            self._scheduler._step_index = index
        made = stepped[0]  # of the scheduler's outputs, too
        x = made.float() / solver.scale(i + 1)
        noise = normal(key, x.shape[1:])
        x = up_again(solver.process, torch.full((len(x),), i, device=x.device), x, noise)
        back = (x * solver.scale(i)).to(made.dtype)
        if isinstance(stepped, tuple):
            return (back, *stepped[1:])
        stepped.prev_sample = back
        return stepped
