"""Clean states that belong to conditions: one for all of them, or one for each."""

from __future__ import annotations

import torch
from torch import Tensor


def of_rows(value: Tensor, row: Tensor, shape: torch.Size) -> Tensor:
    """What N particles of conditions row [N] have of a value: [N or 1, *D], D = `shape`.

    Args:
        value: [*D], or what broadcasts to it; or with one dimension more, [1 or R, ...].
    """
    if value.dim() <= len(shape):
        return value.expand(shape)[None]
    return value[row.to(value.device)] if len(value) > 1 else value


def check_state(name: str, value: object) -> Tensor:
    """A tensor of finite numbers, given as the argument `name`, in float32.

    Raises:
        TypeError: it is no tensor. ValueError: a number is not finite.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}: give a tensor.")
    if not value.numel() or not value.isfinite().all():
        raise ValueError(f"{name} is empty or has nan or inf: give finite numbers.")
    return value.detach().float()


def check_shape(
    name: str, value: Tensor, shape: tuple[int, ...], rows: int, broadcasts: bool = False
) -> None:
    """ValueError unless `value` is [*D], D = `shape`, or has one such part for each of `rows`.

    Args:
        broadcasts: may it have sizes of 1, and lack dimensions, where D has more?
    """
    several = value.dim() > len(shape)
    one, count = (value.shape[1:], len(value)) if several else (value.shape, 1)
    try:
        fits = one == shape or (broadcasts and torch.broadcast_shapes(one, shape) == shape)
    except RuntimeError:
        fits = False
    if not fits or count not in (1, rows):
        raise ValueError(
            f"{name} has shape {list(value.shape)}, and clean states of this model have "
            f"{list(shape)}: give one for all{' that broadcasts to it' if broadcasts else ''}, or "
            f"one for each of {rows} conditions. model.encode(image) makes states of images."
        )
