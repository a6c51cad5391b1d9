"""A pipeline's tests of itself, before it is driven: what it can do, or why it cannot be driven."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from steering.gaussian import GaussianProcess
from steering.noise import normal, root_key
from steering.pipelines.oracle import NotSeenError, Oracle
from steering.pipelines.schedulers import EXPLODING
from steering.pipelines.visit import At, Step

_REMEMBERS = (
    "a step of its own, asked for again, came out different: what its network says depends on "
    "earlier steps"
)


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
        times, index = scheduler.timesteps, list[int]()
        for t in process.times:  # in order; of a level that a solver visits twice, the first visit
            apart = (times.float() - t.to(times.device)).abs()
            apart[: index[-1] + 1 if index else 0] = torch.inf
            index.append(int(apart.argmin()))
        sigmas = getattr(scheduler, "sigmas", None)
        alpha = process.alpha[:-1].float()
        exploding = type(scheduler).__name__.removesuffix("Scheduler") in EXPLODING
        scale = 1 / alpha if exploding else torch.ones_like(alpha)
        sigma = sigmas[index] if isinstance(sigmas, Tensor) else None
        return Grid(times[index], sigma, tuple(index), scale)

    def at(self, steps: list[int]) -> At:
        """Where rows at these steps [N] are; one step for all where it is one."""
        take: Any = steps[0] if len(set(steps)) == 1 else steps
        sigma = None if self.sigma is None else self.sigma[take]
        return At(self.time[take], sigma, self.index[steps[0]])


@dataclass(frozen=True, eq=False)
class Opening:
    """A pipeline's tests, on a few states of condition 0 unless said otherwise.

    Args:
        oracle: the pipeline.
        grid: its own.
        x: [3, *D] starts, as the pipeline holds them.
        tolerance: largest root mean square of a difference, of that of the output, that is rounding
            over another batch size.
    """

    oracle: Oracle
    grid: Grid
    x: Tensor
    tolerance: float = 0.0

    @staticmethod
    def of(oracle: Oracle, grid: Grid, first: Step, prior_std: float) -> Opening:
        """Tests on noise of the pipeline's own size."""
        key = root_key(0, torch.arange(3, device=first.sample.device))
        x = prior_std * float(grid.scale[0]) * normal(key, first.sample.shape[1:])
        return Opening(oracle, grid, x.to(first.sample.dtype))

    def replay(self) -> Opening:
        """The pipeline's own first steps, asked for again, the last one first, bit for bit.

        Two of them; all, where its guidance is an object that could remember. Returns these tests
        with the rounding of this network: how far a state is from itself in a batch of itself.

        Raises:
            CannotDriveError: they come out different.
        """
        try:
            own, again = self._own_and_asked()
        except torch.OutOfMemoryError:
            raise
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
                raise CannotDriveError(_REMEMBERS)
        for (_, made), (step, _) in itertools.pairwise(own):
            if not torch.equal(step.sample, made.to(step.sample.dtype)):
                raise CannotDriveError(
                    "it changes states between steps, as those do that blend a given image in"
                )
        count = len(self.oracle.scheduler.timesteps)
        if again[0].length not in (None, count):
            raise CannotDriveError(f"its loop has {again[0].length} turns on a grid of {count}")
        return replace(self, tolerance=self._rounding())

    def _own_and_asked(self) -> tuple[list[tuple[Step, Tensor]], list[Step]]:
        last = len(self.grid.index) - 1 if self.oracle.guiders else min(1, len(self.grid.index) - 1)
        walked = self.oracle.native(self.x[:1], [0], self.grid.index[last] + 1)
        own = [walked[self.grid.index[i]] for i in range(last + 1)] if last > 1 else walked
        asked = [
            self.oracle.query(own[i][0].sample, [0], self.grid.at([i]))
            for i in reversed(range(len(own)))
        ]
        return own, asked[::-1]

    def _rounding(self) -> float:
        eps = torch.finfo(self.x.dtype).eps
        # float32 sums of some thousand terms agree to 1e-5, half precision to units of the last
        # place; a network that is worse than a few of them is not believed to round
        low, high = (1e-5, 1e-4) if eps < 1e-6 else (eps, 4 * eps)
        at, x = self.grid.at([0]), self.x[:1]
        try:
            copies = self.oracle.query(x.expand(3, *x.shape[1:]).clone(), [0] * 3, at).output
        except Exception:  # it takes no batch
            return low
        alone = self.oracle.query(x, [0], at).output
        return min(max(3 * distance(copies, alone.expand_as(copies)), low), high)

    def alone(self, steps: list[int], row: int) -> dict[int, Step]:
        """What is said of one state at each of these steps, by itself, each asked twice.

        Raises:
            CannotDriveError: it is not the same the second time, when others were asked between.
        """
        said = {i: self.oracle.query(self.x[:1], [row], self.grid.at([i])) for i in steps}
        for i in (steps[-1], steps[len(steps) // 2]):
            again = self.oracle.query(self.x[:1], [row], self.grid.at([i]))
            if not torch.equal(again.output, said[i].output):
                raise CannotDriveError(_REMEMBERS)
        return said

    def batches(self, rows: list[int]) -> bool:
        """Do states of conditions `rows` come out of one call as they do of calls of their own?"""
        at, x = self.grid.at([0]), self.x[torch.arange(len(rows)) % len(self.x)]
        try:
            together = self.oracle.query(x, rows, at)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return len(rows) > 2 and all(self.batches([rows[0], row]) for row in rows[1:])
        except Exception:  # whatever a pipeline says of a batch that it cannot take
            return False
        apart = [self.oracle.query(x[k : k + 1], [r], at) for k, r in enumerate(rows)]
        return self._same(together, apart)

    def mixes(self, alone: dict[int, Step], row: int, at_once: int = 8) -> bool:
        """Do states at different steps come out of one call as they do alone?

        What holds at some steps goes by the loop's index, which is that of a call's first state. So
        every call here spans the whole grid: no interval has all of a call's steps on one side. A
        last call joins a step of each.

        Args:
            alone: what is said at each of these steps of condition `row`.
            at_once: states in a call; fewer where memory does not hold them.
        """
        steps = list(alone)
        if len(steps) == 1:
            return False
        calls = -(-len(steps) // at_once)
        parts = [steps[k::calls] for k in range(calls)]
        parts = [p if len(p) > 1 else [steps[0], *p] for p in parts]
        for part in [*parts, [p[0] for p in parts][:at_once]] if calls > 1 else parts:
            x = self.x[:1].expand(len(part), *self.x.shape[1:]).clone()
            try:
                mixed = self.oracle.query(x, [row] * len(part), self.grid.at(part))
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                return at_once > 2 and self.mixes(alone, row, at_once // 2)
            except Exception:  # a time that is no scalar, where only a scalar will do
                return False
            if not self._same(mixed, [alone[i] for i in part]):
                return False
        return True

    def _same(self, together: Step, apart: list[Step]) -> bool:
        """Is a call what others are, but for rounding, and does it cost the same?"""
        outputs = torch.cat([step.output for step in apart])
        return (
            together.rows == sum(step.rows for step in apart)
            and together.output.shape == outputs.shape
            and all(
                distance(a, b) <= self.tolerance
                for a, b in zip(together.output, outputs, strict=True)
            )
        )

    def cost(self, alone: dict[int, Step], row: int) -> Tensor:
        """Network rows [T] of a state of condition `row`, of which `alone` was said.

        Raises:
            CannotDriveError: no network was seen at work.
        """
        T = len(self.grid.index)
        if len({step.rows for step in alone.values()}) > 1 and len(alone) < T:
            alone = self.alone(list(range(T)), row)  # an interval, somewhere between
        counts = [step.rows for step in alone.values()]
        if not all(counts):
            raise CannotDriveError("none of its networks was seen at work")
        return torch.tensor(counts if len(counts) == T else counts[:1] * T)


def distance(a: Tensor, b: Tensor) -> float:
    """Root mean square of a - b, of that of b."""
    a, b = a.double(), b.double()
    return float((a - b).square().mean().sqrt() / b.square().mean().sqrt().clamp(min=1e-30))
