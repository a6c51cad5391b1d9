"""Rewards as the engine calls them: checked, counted, off the main thread, failure as a value."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from steering.guidance.scoring import WrongShapeError

OnError = Literal["fail", "raise"]
# An item cannot make these happen, a mistake in the program can: they always end the run.
PROGRAMMING = (TypeError, NameError, AttributeError, ImportError, NotImplementedError)
_NOT_FINITE = "a decoded item that is not finite"
_LOOK_SECONDS = 0.1  # between two looks at whether the run is to end
_HELD = 64  # states that wait for their reward at most, where they are held


@dataclass(frozen=True)
class Scores:
    """Rewards of one batch of items."""

    reward: Tensor  # [N] float64, nan where failed
    calls: int  # items scored, retries included
    error: str | None  # the last thing that went wrong, for the report
    seconds: float = 0.0  # decoding and scoring took


def reward_name(reward: Any) -> str:
    """How a reward is called in tables: its `name`, its function's name, or its class."""
    own = getattr(reward, "name", None) or getattr(reward, "__name__", None)
    return own if isinstance(own, str) else type(reward).__name__


def call_reward(reward: Any, items: Any, prompts: Sequence[Any], on_error: OnError) -> Scores:
    """Score items; an item that raises, or scores nan or inf, has failed.

    A batch that raises is scored again one by one, to find the item to blame.

    Raises:
        ValueError: the reward did not return one number per item.
        Exception: whatever a programming error raises; with on_error="raise", anything.
    """
    n = len(prompts)
    try:
        with torch.no_grad():
            value = reward(items, list(prompts))
        scores = _as_scores(value, n, reward)
    except PROGRAMMING:
        raise
    except WrongShapeError:
        raise
    except Exception as error:
        if on_error == "raise":
            raise
        message = f"{type(error).__name__}: {error}"
        if n == 1:
            return Scores(torch.full((1,), torch.nan, dtype=torch.float64), 1, message)
        alone = [
            call_reward(reward, items[k : k + 1], prompts[k : k + 1], on_error) for k in range(n)
        ]
        return Scores(
            torch.cat([a.reward for a in alone]), n + sum(a.calls for a in alone), message
        )
    bad = ~scores.isfinite()
    if bad.any() and on_error == "raise":
        raise ValueError(f"reward {reward_name(reward)} returned {scores[bad][0].item()}.")
    scores = scores.masked_fill(bad, torch.nan)
    return Scores(scores, n, "a reward that is not finite" if bad.any() else None)


def _as_scores(value: Any, n: int, reward: Any) -> Tensor:
    if value is None:
        raise WrongShapeError(
            f"reward {reward_name(reward)} returned None: return one number per item."
        )
    if not isinstance(value, Tensor) and not hasattr(value, "__iter__"):
        value = torch.as_tensor(value)  # a bare number: the shape is what is wrong
    if not isinstance(value, Tensor):
        value = torch.tensor(
            [math.nan if v is None else float(v) for v in value], dtype=torch.float64
        )
    if tuple(value.shape) != (n,):
        raise WrongShapeError(
            f"reward {reward_name(reward)} returned shape {tuple(value.shape)} for {n} items: "
            f"return one number per item, shape ({n},)."
        )
    return value.detach().to("cpu", torch.float64)


class Scorer:
    """Decodes and scores in a thread of its own while denoising goes on.

    With `hold`, nothing is decoded before `release`, which also waits for it: where networks share
    a device by turns, going back and forth would move them each time.
    """

    def __init__(
        self,
        decode: Callable,
        reward: Any,
        prompts: Sequence[Any],
        on_error: OnError,
        hold: bool = False,
        preview: Callable | None = None,
    ) -> None:
        self._preview = preview or decode
        self._decode, self._reward, self._prompts = decode, reward, prompts
        self._on_error: OnError = on_error
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="reward")
        self._jobs: list[tuple[Any, Future[Scores]]] = []
        self._hold, self._held = hold, list[tuple[Any, Tensor, list[int], bool]]()

    def submit(self, tag: Any, x: Tensor, row: list[int], guess: bool = False) -> None:
        """Score clean states x [N, *D] of conditions `row`; `tag` comes back with the answer.

        A `guess` on the way is decoded by the preview, where there is one.
        """
        if self._hold:
            self._held.append((tag, x, row, guess))
            if sum(len(rows) for _, _, rows, _ in self._held) >= _HELD:
                self.release()
        else:
            self._jobs.append((tag, self._pool.submit(self._run, x, row, guess)))

    def release(self) -> None:
        """Score what is held, and wait until that is done."""
        held, self._held = self._held, []
        for tag, x, row, guess in held:
            self._jobs.append((tag, self._pool.submit(self._run, x, row, guess)))
        if held:
            wait_for([job for _, job in self._jobs])

    def finished(
        self, wait: bool, until: Callable[[], bool] = lambda: False
    ) -> list[tuple[Any, Scores]]:
        """Answers in the order of submission; waits for the first one if asked to, `until` the run
        is to end: then no other call may begin."""
        answers = []
        while wait and self._jobs and not self._jobs[0][1].done():
            wait_for([self._jobs[0][1]], timeout=_LOOK_SECONDS)
            if until():
                for _, job in self._jobs[1:]:
                    job.cancel()
                break
        wait = wait and not until()
        while self._jobs and (self._jobs[0][1].done() or (wait and not answers)):
            tag, job = self._jobs.pop(0)
            if not job.cancelled():
                answers.append((tag, job.result()))
        return answers

    def close(self, wait: bool = True) -> None:
        """Start no other call, and wait for the one that is running: `finished` has its answer.

        What was held is scored: its walks are paid for.
        """
        if wait:
            self.release()
        self._pool.shutdown(wait=wait, cancel_futures=True)

    def _run(self, x: Tensor, row: list[int], guess: bool) -> Scores:
        prompts = [self._prompts[r] for r in row]
        decoded = _Decoded(self._preview if guess else self._decode, self._reward)
        began = time.perf_counter()
        scores = call_reward(decoded, x, prompts, self._on_error)
        error = _NOT_FINITE if decoded.broken else scores.error
        return replace(scores, error=error, seconds=time.perf_counter() - began)


@dataclass
class _Decoded:
    """A reward of latent states: what fails to decode has failed, like what fails to score; a batch
    too large to decode is tried one by one."""

    decode: Callable
    reward: Any
    broken: bool = False  # has an item come out of `decode` that is not finite?

    @property
    def name(self) -> str:
        return reward_name(self.reward)

    def __call__(self, x: Tensor, prompts: Sequence[Any]) -> Any:
        items = self.decode(x)
        value = self.reward(items, prompts)
        if not isinstance(items, Tensor) or not items.is_floating_point():
            return value
        # a reward may make a number of broken pixels, and a decoder pixels of a broken state; it
        # would mean nothing
        broken = ~(items.flatten(1).isfinite().all(1).cpu() & x.flatten(1).isfinite().all(1).cpu())
        if not broken.any():
            return value
        self.broken = True
        return _as_scores(value, len(prompts), self).masked_fill(broken, torch.nan)
