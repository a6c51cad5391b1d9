"""One call of a pipeline, watched and steered from inside its scheduler and its networks."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from steering.gaussian import over_data
from steering.pipelines.schedulers import EXPLODING
from steering.pipelines.turns import PerRow, plain, turns_of


class Captured(BaseException):
    """Ends a pipeline's call; no `except Exception` of its own swallows it."""


@dataclass(frozen=True)
class At:
    """Where a call is on the pipeline's own grid: one step, or one for every row of the batch."""

    time: Tensor  # scalar or [N], of the grid's own dtype
    sigma: Tensor | None  # the same, where the scheduler has sigmas
    index: int  # of the loop


@dataclass(frozen=True)
class Step:
    """What a pipeline handed to its scheduler's `step`."""

    output: Tensor  # [N, *D] of the network, guided as the pipeline guides
    sample: Tensor  # [N, *D] the state it was made from, as the pipeline holds it
    time: Any  # as given to `step`
    rows: int  # network rows that it took
    length: int | None  # turns that the loop would make; None where it does not say


@dataclass
class Visit:
    """What one call is for, and what was seen in it.

    Args:
        batch: states in it.
        at: ask for one step anywhere; None walks the pipeline's own grid.
        steps: how many steps until the call is ended.
        encode: end it as soon as the grid is set, which is after prompts are encoded.
        tail: clean states to decode: the loop does not turn, or, with `turns`, turns once.
        vae: what decodes instead of the pipeline's own autoencoder.
        start: states that stand in for the pipeline's own noise.
    """

    batch: int
    at: At | None = None
    steps: int = 1
    encode: bool = False
    tail: Tensor | None = None
    turns: bool = False
    vae: Any = None
    start: Tensor | None = None
    seen: list[Step] = field(default_factory=list)
    made: list[Tensor] = field(default_factory=list)  # what the pipeline's own `step` returned
    drawn: list[tuple[int, ...]] = field(default_factory=list)  # shapes of its noise
    noised_image: bool = False  # did it noise an image to start from?
    rows: int = 0
    length: int | None = None

    def _note(self, length: int) -> None:
        self.length = length

    def grid_set(self, scheduler: Any) -> None:
        """The pipeline has set its grid: leave it, or put copies of one time in its place."""
        if self.encode:
            raise Captured
        times = scheduler.timesteps
        if self.tail is not None:
            turn = [times[-1]] if self.turns else []
            scheduler.timesteps = times.as_subclass(turns_of(turn, 0, self._note))
        elif self.at is not None:
            count, time = len(times), self.at.time.to(times)
            each = time.as_subclass(PerRow) if time.dim() else time
            # as long as the pipeline's own: slices and look-ups by the loop's index stay valid
            copies = time.reshape(-1)[:1].repeat(count)
            scheduler.timesteps = copies.as_subclass(
                turns_of([each] * count, self.at.index, self._note)
            )
            if self.at.sigma is not None:
                sigmas = scheduler.sigmas
                level = self.at.sigma.to(sigmas).reshape(-1)[:1].repeat(count)
                scheduler.sigmas = torch.cat([level, torch.zeros_like(sigmas[:1])])
                scheduler._step_index = 0

    def step(self, given: dict[str, Any], step: Callable[[], Any]) -> Any:
        """The pipeline steps: take what it shows, and end the call when that is enough.

        Args:
            given: its arguments by name.
            step: the scheduler's own.
        """
        if self.tail is not None:
            return _Stepped(self.tail)
        output, sample = self._own(given["model_output"]), self._own(given["sample"])
        self.seen.append(Step(output, sample, given["timestep"], self.rows, self.length))
        self.rows = 0
        if self.at is not None:
            raise Captured
        stepped = step()
        made = stepped[0] if isinstance(stepped, tuple) else stepped.prev_sample
        self.made.append(self._own(made))
        if len(self.seen) == self.steps:
            raise Captured
        return stepped

    def _own(self, x: Tensor) -> Tensor:
        """One entry for every state, where a pipeline steps copies along for its guidance.

        In a query, copies that are not the same are left: they will not be taken for the states. On
        its own way a pipeline may add other noise to them, and go on from the first.
        """
        x = plain(x)
        copies = x.split(self.batch) if len(x) % self.batch == 0 else (x,)
        alike = self.at is None or all(torch.equal(copies[0], copy) for copy in copies[1:])
        return copies[0] if alike else x

    def noise(self, draw: Callable[..., Tensor], shape: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The pipeline draws noise: what has a state's shape is where it starts."""
        self.drawn.append(tuple(shape))
        if self.start is not None and tuple(shape) == tuple(self.start.shape):
            return self.start.to(kwargs.get("dtype") or self.start.dtype)
        return draw(shape, *args, **kwargs)

    def code(self, draw: Callable[..., Tensor], shape: Any, generator: Any = None, **kwargs: Any):
        """An autoencoder draws the code of an image: alike for every state of the batch.

        Drawn from global numbers, a batch is not what its states are alone.
        """
        if generator is not None or shape[0] % self.batch:
            return draw(shape, generator=generator, **kwargs)
        drawn = draw((shape[0] // self.batch, *shape[1:]), generator=None, **kwargs)
        return drawn.repeat_interleave(self.batch, 0)

    def noised(self, original: Tensor) -> Tensor | None:
        """The pipeline noises an image to start from: where it starts instead, if anywhere."""
        self.noised_image = True
        return None if self.start is None else self.start.to(original.dtype)


def driven(base: type) -> type:
    """A scheduler class that asks its instance's `visit` what to do, otherwise `base`.

    Signatures are those of `base`: pipelines look at them.
    """

    signature = inspect.signature(base.step)

    @functools.wraps(base.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        base.set_timesteps(self, *args, **kwargs)
        self.visit.grid_set(self)

    @functools.wraps(base.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        return self.visit.step(given, lambda: base.step(self, *args, **kwargs))

    members: dict[str, Any] = {"set_timesteps": set_timesteps, "step": step, "visit": None}
    # a start handed over is in the coordinates of `step`
    members["init_noise_sigma"] = property(lambda self: 1.0, lambda self, value: None)
    if base.__name__.removesuffix("Scheduler") in EXPLODING:

        def scale_model_input(self: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            at = self.visit.at
            if at is None or not at.sigma.dim():
                return base.scale_model_input(self, sample, *args, **kwargs)
            # in float32, as the scheduler has its levels: half precision would round or overflow
            sigma = at.sigma.to(sample.device, torch.float32).repeat(len(sample) // len(at.sigma))
            scale = (over_data(sigma, sample) ** 2 + 1) ** 0.5
            return (sample.float() / scale).to(sample.dtype)

        members["scale_model_input"] = scale_model_input
    if not hasattr(base, "scale_model_input"):  # by exact class some do not ask a base for it
        members["scale_model_input"] = lambda self, sample, *args: sample
    for name in ("add_noise", "scale_noise"):
        if hasattr(base, name):
            members[name] = _noising(base, name)
    return type(base.__name__, (base,), members)


def _noising(base: type, name: str) -> Callable[..., Tensor]:
    method = getattr(base, name)

    @functools.wraps(method)
    def noising(self: Any, original: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        start = self.visit.noised(original)
        return method(self, original, *args, **kwargs) if start is None else start

    return noising


class _Stepped(tuple):
    """What a `step` returns, in every form that pipelines take apart."""

    def __new__(cls, x: Tensor) -> _Stepped:
        self = super().__new__(cls, (x, x))
        self.prev_sample = self.denoised = self.pred_original_sample = x
        return self

    prev_sample: Tensor
    denoised: Tensor
    pred_original_sample: Tensor
