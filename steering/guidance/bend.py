"""What guidances share: where they act, the two gradients of a reward, and the bent kernel."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Literal

import torch
from torch import Tensor

from steering.core import Guidance, Proposal, Step
from steering.gaussian import GaussianProcess, NormalTransition, over_data
from steering.guidance.rules import Rule

Window = tuple[float, float]
Jacobian = Literal["skip", "full"]


@dataclass(frozen=True, eq=False)
class Slope:
    """A reward and its gradient at the clean guesses of N particles."""

    clean: Tensor  # [N, *D] the guesses, without gradients
    value: Tensor  # [N] float32
    gradient: Tensor  # [N, *D] float32; 0 where it is not finite
    failed: Tensor  # [N] bool: the value or the gradient is not finite


def window_steps(window: Window, steps: int) -> tuple[int, int]:
    """First step of a window of shares, and the first one after it: floor(share · steps)."""
    # a share k / n of n steps is k of them, though floats may have it a little less
    first, end = (math.floor(share * steps + 1e-9) for share in window)
    return first, end


def check_acts(guidance: Guidance, stochastic: Tensor) -> int:
    """The first step that a guidance acts on, out of T that draw noise or not: stochastic [T] bool.

    Raises:
        ValueError: there is none in its window; or it follows noise (`needs_noise`), and there none
            is drawn.
    """
    name, window = type(guidance).__name__, getattr(guidance, "window", (0.0, 1.0))
    first, end = window_steps(window, len(stochastic))
    if first == end:
        raise ValueError(
            f"window={window!r} of {name} holds none of {len(stochastic)} steps: give a wider one, "
            "or more steps."
        )
    if getattr(guidance, "needs_noise", False) and not stochastic[first:end].any():
        raise ValueError(
            f"{name} moves a step by its own noise, and none is drawn in window={window!r}: use a "
            "stochastic process (eta > 0), or FlowChef or DPS."
        )
    return first


def inside(window: Window, i: Tensor, steps: int) -> Tensor:
    """Which of the steps i [N] lie in a window of shares: floor(start · T) <= i < floor(stop · T),
    counted from the noise: [N] bool, on i's device."""
    first, end = window_steps(window, steps)
    return (i >= first) & (i < end)


def check_window(window: object, name: str = "window") -> None:
    """ValueError unless `window` is (start, stop), shares of the steps; `name` is its argument."""
    good = (
        isinstance(window, (tuple, list))
        and len(window) == 2
        and all(isinstance(share, Real) and not isinstance(share, bool) for share in window)
        and 0 <= window[0] < window[1] <= 1
    )
    if not good:
        raise ValueError(
            f"{name}={window!r}: give (start, stop), shares of the steps counted from the noise, "
            "0 <= start < stop <= 1."
        )


def check_jacobian(jacobian: object) -> None:
    """ValueError unless `jacobian` is "skip" or "full"."""
    if jacobian not in ("skip", "full"):
        raise ValueError(
            f"jacobian={jacobian!r}: give 'skip', the gradient at the clean guess, or 'full', "
            "through the network."
        )


def check_inner(inner: object) -> None:
    """ValueError unless `inner` is a whole number, at least 1."""
    if isinstance(inner, bool) or not isinstance(inner, int) or inner < 1:
        raise ValueError(f"inner={inner!r}: give a whole number >= 1.")


def gaussian(step: Step) -> GaussianProcess:
    """The chain, which must be a Gaussian one.

    Raises:
        TypeError: it is another.
    """
    if not isinstance(step.process, GaussianProcess):
        raise TypeError(
            f"this guidance moves states of a Gaussian chain, and the model's is a "
            f"{type(step.process).__name__}: Twist bends steps of tokens too."
        )
    return step.process


def at_guess(step: Step, clean: Tensor) -> Slope:
    """∇_c reward(c) at clean guesses [N, *D]: the network is not differentiated."""
    with torch.enable_grad():
        point = clean.detach().requires_grad_(True)
        value = step.score(point, step.row)
        (gradient,) = torch.autograd.grad(value.sum(), point)
    return slope_of(clean.detach(), value, gradient)


def through_network(step: Step) -> Slope:
    """∇_x reward(c(x)) at the particles' states: clean guesses are made on the way."""
    with torch.enable_grad():
        x = step.x.detach().requires_grad_(True)
        clean = step.denoise(x, step.i, step.row)
        value = step.score(clean, step.row)
        (gradient,) = torch.autograd.grad(value.sum(), x)
    return slope_of(clean.detach(), value, gradient)


def move_guess(step: Step, clean: Tensor, move: Rule, inner: int) -> tuple[Tensor, Tensor]:
    """Clean guesses [N, *D] after `inner` moves along ∇_c reward(c), the network's output held, and
    which have failed [N]."""
    sigma = gaussian(step).sigma[step.i].float()
    failed = torch.zeros_like(step.i, dtype=torch.bool)
    for _ in range(inner):
        at = at_guess(step, clean)
        clean = clean + move(at.value, at.gradient, sigma)
        failed = failed | at.failed
    return clean, failed


def carried(step: Step, clean: Tensor, d: Tensor, *, noise_held: bool = False) -> Tensor:
    """How far the next states go, [N, *D], when clean guesses [N, *D] are moved by d [N, *D].

    The state moves along, so that the other end of its line is held (`GaussianProcess.carry`), or
    with `noise_held` the noise on every chain; where the chain clips guesses, the moved one is.
    """
    process = gaussian(step)
    held = process.straight and not noise_held
    if process.bound is None and not noise_held:
        return over_data(process.carry(step.i), d) * d
    alpha, sigma = process.alpha[step.i], process.sigma[step.i]
    along = over_data((alpha + held * sigma).float(), d)
    moved = process.transition(step.x + along * d, step.i, clean + d)
    return moved.mean - process.transition(step.x, step.i, clean).mean


def slope_of(clean: Tensor, value: Tensor, gradient: Tensor) -> Slope:
    """Where value [N] or gradient [N, *D] is not finite, a particle has failed and stays."""
    failed = ~(value.isfinite() & gradient.flatten(1).isfinite().all(1))
    gradient = torch.where(over_data(failed, gradient), 0.0, gradient)
    return Slope(clean, value.detach(), gradient, failed)


def part(step: Step, pick: Tensor) -> Step:
    """Particles `pick` [K] int64, on x's device, of a step."""
    if len(pick) == len(step):  # what a guidance asks of the whole step may be known already
        return step
    kept = {name: value for name, value in vars(step).items() if name not in ("x", "i", "key")}
    kept["row"] = step.row[pick.cpu()]
    return Step(x=step.x[pick], i=step.i[pick], key=step.key[pick], **kept)


def shifted(step: Step, clean: Tensor, shift: Tensor, failed: Tensor) -> Proposal:
    """The model's own kernel from clean guesses [N, *D], its mean moved by shift [N, *D]."""
    base = gaussian(step).transition(step.x, step.i, clean)
    return Proposal(base, NormalTransition(base.mean + shift, base.std), clean, failed)


# what a guidance makes of particles that it acts on, and of their clean guesses where the network
# is not differentiated: (clean [K, *D], shift [K, *D] of the next states, or [K, L, V] of the
# log-probabilities of tokens, failed [K])
Act = Callable[[Step, Tensor | None], tuple[Tensor, Tensor, Tensor]]


def bent_within(window: Window, step: Step, act: Act, *, differentiates: bool) -> Proposal:
    """The kernel bent by `act` for particles inside a window, and the model's own elsewhere."""
    gaussian(step)
    return shifted(step, *acted(window, step, act, differentiates=differentiates))


def acted(
    window: Window, step: Step, act: Act, *, differentiates: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """What `act` makes of particles inside a window: clean guesses, shifts, and which have failed,
    of all; the others, which the model moves alone, have shift 0.

    Without the network's gradient all particles share one call of it.
    """
    active = inside(window, step.i, step.process.steps)
    pick, rest = active.nonzero().flatten(), (~active).nonzero().flatten()
    failed = torch.zeros_like(active)
    if not len(pick):
        return step.denoise(step.x, step.i, step.row), torch.zeros(()), failed
    if differentiates:
        clean, moved, failed[pick] = act(part(step, pick), None)
        if len(rest):
            still = part(step, rest)
            guess = step.denoise(still.x, still.i, still.row)
            clean = torch.cat([clean, guess])[torch.cat([pick, rest]).argsort()]
    else:
        clean = step.denoise(step.x, step.i, step.row)
        _, moved, failed[pick] = act(part(step, pick), clean[pick])
    shift = moved.new_zeros(len(step), *moved.shape[1:])
    shift[pick] = moved
    return clean, shift, failed
