"""What is steered and by what: the protocols that everything else implements.

Shapes: N particles of shape D, R conditions (rows of a table built once), T steps. Step index i
runs 0 (noise) .. T (data) and is always a tensor [N].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Denoiser(Protocol):
    """A network that guesses the clean end: E[x_0 | x_t], raw and unclipped.

    One whose calls are several of its network, by step or condition, says so with an attribute
    `fills = False`: it gains nothing from calls that are filled up to a few sizes.
    """

    def __call__(self, x: Tensor, t: Tensor, row: Tensor) -> Tensor:
        """Guess the clean end of N particles.

        Args:
            x: [N, *D] float32 states on the model's device (tokens: [N, L] int64).
            t: [N] times in the network's own units, as `Process.time` gives them, on x's device.
            row: [N] int64 condition of each particle, on the CPU.

        Returns:
            [N, *D] float32 clean guesses (tokens: [N, L, V] log-probabilities).
        """
        ...

    def rows(self, t: Tensor, row: Tensor) -> Tensor:
        """Network rows that a call costs: [N] int64. 1, with classifier-free guidance 2."""
        ...


class Transition(Protocol):
    """The law of the next state given this one: one step of the chain, for N particles."""

    def sample(self, key: Tensor) -> Tensor:
        """Draw the next states [N, *D]; `key` [N] int64 on their device, of particle and step."""
        ...

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density [N] float64 of next states x [N, *D]; 0 where the step is deterministic."""
        ...


class Process(Protocol):
    """The chain from noise to data: its grid, its prior, its kernel. Clipping lives here."""

    @property
    def steps(self) -> int:
        """T, the number of steps; states carry an index 0..T."""
        ...

    @property
    def stochastic(self) -> Tensor:
        """[T] bool, CPU: does step i -> i + 1 draw noise?"""
        ...

    def prior(self, key: Tensor) -> Tensor:
        """States at step 0: [N, *D], a pure function of key [N] int64, on the key's device."""
        ...

    def time(self, i: Tensor) -> Tensor:
        """[N] network times of steps i [N], on the chain's device."""
        ...

    def transition(self, x: Tensor, i: Tensor, clean: Tensor) -> Transition:
        """Law of the states at i + 1 given states x [N, *D] at i [N] and raw clean guesses."""
        ...


class Reward(Protocol):
    """`(items, prompts) -> [N]`, higher is better. Any such callable is a reward.

    Items are what `Model.decode` returns: images [N, C, H, W] float32 in [0, 1]; of sequences
    weights over K tokens [N, L, K], one-hot but for guesses, which are probabilities. A reward that
    is differentiable in its items says so with an attribute `differentiable = True`.
    """

    def __call__(self, items: Any, prompts: Sequence[Any]) -> Tensor | Sequence[float]: ...


@dataclass(frozen=True, eq=False)
class Step:
    """N particles about to take a step each, and what a guidance may ask about them.

    Args:
        x: [N, *D] states.
        i: [N] int64 their steps, on x's device.
        row: [N] int64 their conditions, on the CPU: rows of the model's table. Inside `steer`,
            where there is none, the items of the call, in order: 0 .. N - 1.
        key: [N] int64 noise key of each one's step, on x's device. The step itself draws from it: a
            guidance that draws more takes children of it (`noise.child_key`).
        lam: λ of the run: its target is p(x_0) · exp(λ · reward(x_0)).
        process: the chain.
        reward: what `score` asks.
        denoise: (x, i, row) -> clean guesses, counted; with gradients where x requires them.
        score: (clean, row) -> [N], reward(decode(clean), prompts[row]), differentiable.
    """

    x: Tensor
    i: Tensor
    row: Tensor
    key: Tensor
    lam: float
    process: Process
    reward: Any
    denoise: Callable[[Tensor, Tensor, Tensor], Tensor]
    score: Callable[[Tensor, Tensor], Tensor]

    def __len__(self) -> int:
        """N."""
        return len(self.x)


@dataclass(frozen=True)
class Proposal:
    """What a guidance makes of one step: the engine samples `guided` and weighs it by `base`."""

    base: Transition
    guided: Transition
    clean: Tensor  # [N, *D] the clean guess that `base` was made from
    failed: Tensor  # [N] bool; a particle whose gradient is not finite has failed


class Guidance(Protocol):
    """Bends a step.

    One that acts in some steps only has an attribute `window`; one that moves a step by the noise
    it draws, `needs_noise`. One that follows a reward of its own, instead of the run's, has it as
    an attribute `reward`; a reward whose attribute `of_states` is true is asked about clean states,
    not decoded items. One that does not suit every model has a method `check(model)`, which raises
    before the first row.
    """

    @property
    def exact(self) -> bool:
        """Has the guided kernel a density? False for methods that travel back in time."""
        ...

    @property
    def differentiates(self) -> bool:
        """Does it need the network's gradient?"""
        ...

    def propose(self, step: Step) -> Proposal:
        """The law of the next states, and what it would be unguided."""
        ...

    def rows(self, i: Tensor, steps: int) -> Tensor:
        """How many denoiser calls `propose` makes at steps i [N] out of `steps`: [N] int64."""
        ...


class _Clamp(torch.autograd.Function):
    """Values are clamped to [0, 1]; a slope passes where it leads back into the range."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x > 1, x < 0)
        return x.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        slope, (above, below) = gradients[0], ctx.saved_tensors
        outwards = (above & (slope > 0)) | (below & (slope < 0))
        return torch.where(outwards, 0.0, slope)


def images_in_unit_range(x: Tensor) -> Tensor:
    """Pixels in [-1, 1] -> images in [0, 1], clamped: the decode of pixel models.

    Where it clamps, the gradient of a reward passes if going up it leads back into the range, so
    that a guess out of range can be pulled back, and is 0 if it leads further out, which would
    change no image.
    """
    return _Clamp.apply(x / 2 + 0.5)


@dataclass(frozen=True)
class Model:
    """A denoiser, its chain, and the way from a state to an item: all that is steered.

    Args:
        denoiser: guesses the clean end.
        process: the chain.
        decode: clean states [N, *D] -> items (images [N, C, H, W] in [0, 1]); default: as they are.
            Of tokens it also takes guesses, log-probabilities [N, L, K].
        preview: the same, rough and quick, for guesses on the way; None is `decode`.
        encode: images [N, C, H, W] in [0, 1] -> clean states [N, *D] float32, what `decode` undoes,
            differentiable; None where there is no way back.
        write: items -> their N texts, where items are sequences.
        prompts: R entries, what each condition asks for, handed to rewards; (None,) is nothing.
        device: where states live.
        name: for records and error messages.
        about: how the pipeline is used, for people.
        offloaded: do networks move to the device when they are called? Then states are decoded when
            no walk is under way, all that wait at once, instead of beside the walks.
    """

    denoiser: Denoiser
    process: Process
    decode: Callable[[Tensor], Any] = field(default=lambda x: x)
    preview: Callable[[Tensor], Any] | None = None
    encode: Callable[[Tensor], Tensor] | None = None
    write: Callable[[Any], list[str]] | None = None
    prompts: tuple[Any, ...] = (None,)
    device: torch.device = torch.device("cpu")
    name: str = "model"
    about: str = ""
    offloaded: bool = False

    @staticmethod
    def check(model: object) -> None:
        """TypeError unless `model`, given as the argument of this name, is one."""
        if not isinstance(model, Model):
            raise TypeError(
                f"model is a {type(model).__name__}, not a steering.Model: "
                "steering.from_pipeline(pipe) makes one of a diffusers pipeline."
            )

    def __str__(self) -> str:
        """What is steered, and how."""
        count = "" if self.prompts == (None,) else f", {len(self.prompts)} conditions"
        about = f": {self.about}" if self.about else ""
        return f"{self.name}, {self.process.steps} steps{count} on {self.device}{about}"

    def __post_init__(self) -> None:
        if isinstance(self.prompts, str):
            raise TypeError(
                f"prompts={self.prompts!r} is one text: give a tuple, ({self.prompts!r},)."
            )
        for name, needs in (
            ("denoiser", ("rows", "__call__")),
            ("process", ("prior", "transition")),
        ):
            lacking = [n for n in needs if not hasattr(getattr(self, name), n)]
            if lacking:
                kind = type(getattr(self, name)).__name__
                raise TypeError(
                    f"{name} is a {kind} without {', '.join(lacking)}: see steering.core."
                )
        if len(self.prompts) == 0:
            raise ValueError("prompts is empty: give one entry per condition, or (None,) for none.")
