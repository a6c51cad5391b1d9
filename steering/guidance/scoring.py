"""What a guidance hears of a reward: one number per item, checked, with its gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from steering.rewards.compose import name_of


class WrongShapeError(ValueError):
    """A reward that did not return one number per item."""


def score(
    reward: Any,
    clean: Tensor,
    prompts: Sequence[Any],
    decode: Callable[[Tensor], Any],
    *,
    guidance: str,
    where: str = "",
) -> Tensor:
    """[K] float32 on clean's device: the reward of clean states [K, *D], with its gradient.

    Args:
        reward: (items, prompts) -> [K]; about the states themselves where it is `of_states`.
        clean: [K, *D] clean guesses; a gradient is wanted where they require one.
        prompts: K entries.
        decode: states -> items, not called for a reward of states.
        guidance: who follows the reward, for errors.
        where: in the chain, for errors, with a space before it.

    Raises:
        WrongShapeError: what came back is no tensor [K].
        TypeError: there is no reward, or it has no gradient.
    """
    if reward is None:
        raise TypeError(f"{guidance} asks for a reward{where}, and has none of its own.")
    items = clean if getattr(reward, "of_states", False) else decode(clean)
    value = reward(items, prompts)
    name, n = name_of(reward), len(clean)
    if not isinstance(value, Tensor) or tuple(value.shape) != (n,):
        given = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise WrongShapeError(
            f"reward {name} returned {given} for {n} items{where}: {guidance} needs a tensor of "
            f"one number per item, shape [{n}]."
        )
    if clean.requires_grad and not value.requires_grad:
        raise TypeError(
            f"reward {name} has no gradient{where}, and {guidance} follows it: give a "
            "differentiable reward, or leave the guidance out."
        )
    return value.to(clean.device, torch.float32)
