"""A pipeline's tests of itself, before it is driven: what it can do, or why it cannot be driven."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steering.gaussian import GaussianProcess
from steering.noise import normal, root_key
from steering.pipelines.oracle import NotSeenError, Oracle
from steering.pipelines.schedulers import EXPLODING
from steering.pipelines.visit import At, Step


class CannotDriveError(ValueError):
    """A pipeline that is not what it must be to be driven."""


@dataclass(frozen=True, eq=False)
class Grid:
    """The pipeline's own grid, by steps of the chain.

    Args:
        time: [T], of the grid's own dtype.
        sigma: [T], where the scheduler has sigmas.
        index: [T] of its loop.
        scale: [T] float32 factor from a state of the chain to one of the pipeline.
    """

    time: Tensor
    sigma: Tensor | None
    index: tuple[int, ...]
    scale: Tensor

    @staticmethod
    def of(scheduler: Any, process: GaussianProcess) -> Grid:
        """The grid that is set on a scheduler, and that `process` was read from."""
        times = scheduler.timesteps
        # solvers visit levels twice; the first visit is the step
        index = [int((times.float() - t.to(times.device)).abs().argmin()) for t in process.times]
        sigmas = scheduler.sigmas[index] if torch.is_tensor(_sigmas(scheduler)) else None
        alpha = process.alpha[:-1].float()
        exploding = type(scheduler).__name__.removesuffix("Scheduler") in EXPLODING
        scale = 1 / alpha if exploding else torch.ones_like(alpha)
        return Grid(times[index], sigmas, tuple(index), scale)

    def at(self, steps: list[int]) -> At:
        """Where rows at these steps [N] are; one step for all where it is one."""
        take: Any = steps[0] if len(set(steps)) == 1 else steps
        sigma = None if self.sigma is None else self.sigma[take]
        return At(self.time[take], sigma, self.index[steps[0]])


def _sigmas(scheduler: Any) -> Any:
    return getattr(scheduler, "sigmas", None)


@dataclass(frozen=True, eq=False)
class Opening:
    """A pipeline's tests, on a few states of condition 0 unless said otherwise.

    Args:
        oracle: the pipeline.
        grid: its own.
        x: [3, *D] starts, as the pipeline holds them.
    """

    oracle: Oracle
    grid: Grid
    x: Tensor

    @staticmethod
    def of(oracle: Oracle, grid: Grid, first: Step, prior_std: float) -> Opening:
        """Tests on noise of the pipeline's own size."""
        key = root_key(0, torch.arange(3, device=first.sample.device))
        x = prior_std * float(grid.scale[0]) * normal(key, first.sample.shape[1:])
        return Opening(oracle, grid, x.to(first.sample.dtype))

    def replay(self) -> None:
        """Two of the pipeline's own steps, asked for again, the later first, bit for bit.

        Raises:
            CannotDriveError: they come out different.
        """
        try:
            own, again = self._own_and_asked()
        except Exception as refused:  # in whatever words it refuses a state of this shape
            try:
                self.oracle.inject(self.x[:1], 0)
                own, again = self._own_and_asked()
            except NotSeenError:
                raise CannotDriveError(
                    "the state that its network sees is not the one that it was given"
                ) from refused
        for (step, _), other in zip(own, again, strict=True):
            if not torch.equal(step.output, other.output):
                raise CannotDriveError(
                    "a step of its own, asked for again, came out different: what its network says "
                    "depends on earlier steps"
                )
        if len(own) == 2 and not close(own[1][0].sample, own[0][1]):
            raise CannotDriveError(
                "it changes states between steps, as those do that blend a given image in"
            )

    def _own_and_asked(self) -> tuple[list[tuple[Step, Tensor]], list[Step]]:
        own = self.oracle.native(self.x[:1], [0], min(2, len(self.grid.index)))
        asked = [
            self.oracle.query(own[k][0].sample, [0], self.grid.at([k]))
            for k in reversed(range(len(own)))
        ]
        return own, asked[::-1]

    def alone(self, steps: list[int], row: int = 0) -> dict[int, Step]:
        """What is said of one state at each of these steps, by itself."""
        return {i: self.oracle.query(self.x[:1], [row], self.grid.at([i])) for i in steps}

    def batches(self, rows: list[int]) -> bool:
        """Do two states, of conditions `rows`, come out of one call as they do of two?"""
        at = self.grid.at([0])
        try:
            both = self.oracle.query(self.x[:2], rows, at).output
        except Exception:  # whatever a pipeline says of a batch that it cannot take
            return False
        apart = [self.oracle.query(self.x[k : k + 1], [rows[k]], at).output for k in (0, 1)]
        return close(both, torch.cat(apart))

    def mixes(self, alone: dict[int, Step]) -> bool:
        """Do states at different steps come out of one call as they do alone?"""
        steps = list(alone)
        if len(steps) == 1:
            return False
        for k in range(0, len(steps), 8):
            part = steps[k : k + 8] if k + 1 < len(steps) else steps[k - 1 :]
            x = self.x[:1].expand(len(part), *self.x.shape[1:]).clone()
            try:
                mixed = self.oracle.query(x, [0] * len(part), self.grid.at(part)).output
            except Exception:  # a time that is no scalar, where only a scalar will do
                return False
            if not close(mixed, torch.cat([alone[i].output for i in part])):
                return False
        return True

    def cost(self, alone: dict[int, Step], scales: list[float | None]) -> Tensor:
        """Network rows [R, T] of a state of each condition, which are those of its scale.

        Raises:
            CannotDriveError: no network was seen at work.
        """
        T = len(self.grid.index)
        by_scale: dict[Any, Tensor] = {}
        for row, scale in enumerate(scales):
            if scale in by_scale:
                continue
            seen = alone if scale == scales[0] else self.alone(list(alone), row)
            if len({step.rows for step in seen.values()}) > 1 and len(seen) < T:
                seen = self.alone(list(range(T)), row)  # an interval, somewhere between
            counts = [step.rows for step in seen.values()]
            by_scale[scale] = torch.tensor(counts if len(counts) == T else counts[:1] * T)
        if not all(cost.min() for cost in by_scale.values()):
            raise CannotDriveError("none of its networks was seen at work")
        return torch.stack([by_scale[scale] for scale in scales])


def close(a: Tensor, b: Tensor) -> bool:
    """Do two outputs agree, but for a network's rounding over another batch size?

    In float32 sums of some thousand terms do to 1e-5 of the largest; in half precision to a few
    units in the last place.
    """
    eps = torch.finfo(b.dtype).eps
    bound = (1e-4 if eps < 1e-6 else 16 * eps) * float(b.abs().max())
    return a.shape == b.shape and bool((a.float() - b.float()).abs().max() <= bound)
