"""Stand-ins for a pipeline's networks: the same objects in all but what they are asked."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from steering.core import images_in_unit_range
from steering.pipelines.turns import PerRow, Turns, plain

_IMAGES = 16  # codes of images remembered: an image and a mask, in batches of a few sizes


def counted(net: nn.Module, add: Callable[[int], None] | None) -> nn.Module:
    """A stand-in for a network of a pipeline: the same object in all but its call.

    It adds the rows of each call, unless they do not count, and makes plain tensors of times, so
    that the network runs on nothing it does not know. The network itself is called, with whatever
    hooks and graphs it has.
    """

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        rows = _batch(args, kwargs)
        if add is not None:
            add(rows)
        args = tuple(_fitted(a, rows) for a in args)
        return net(*args, **{name: _fitted(a, rows) for name, a in kwargs.items()})

    members: dict[str, Any] = {"__call__": call}
    if hasattr(net, "dtype"):  # which is looked for among all weights, each time it is asked
        members["dtype"] = net.dtype
    return _in_the_place_of(net, members)


def remembering(vae: nn.Module) -> nn.Module:
    """A stand-in for an autoencoder that encodes an image it has seen before from memory.

    Control images and what is painted over are encoded in every call of a pipeline, and are the
    same in all of them.
    """
    seen: list[tuple[Tensor, bool, Any]] = []

    def encode(self: Any, x: Tensor, return_dict: bool = True) -> Any:
        for image, form, code in seen:
            same = image.shape == x.shape and image.dtype == x.dtype
            if form == return_dict and same and torch.equal(image, x):
                return code
        with torch.no_grad():
            code = vae.encode(x, return_dict=return_dict)  # pyright: ignore[reportCallIssue]
        seen.append((x, return_dict, code))
        del seen[:-_IMAGES]
        return code

    return _in_the_place_of(vae, {"encode": encode})


def passing(pipe: Any) -> dict[str, Any]:
    """Stand-ins for a pipeline's image processors, by name: they clamp images to [0, 1] as it does,
    but gradients that lead back into the range pass."""
    from diffusers.image_processor import VaeImageProcessor

    stand_ins: dict[str, Any] = {}
    for name, part in vars(pipe).items():
        if getattr(type(part), "denormalize", None) is VaeImageProcessor.denormalize:
            stand_ins[name] = copy.copy(part)
            stand_ins[name].denormalize = images_in_unit_range
    return stand_ins


def _in_the_place_of(module: nn.Module, members: dict[str, Any]) -> nn.Module:
    """An object with the attributes and the class of a module, but for some members."""
    stand_in: Any = object.__new__(type(type(module).__name__, (type(module),), members))
    object.__setattr__(stand_in, "__dict__", vars(module))
    return stand_in


def _batch(args: tuple, kwargs: dict) -> int:
    """Rows of a network call: entries of its first argument that is a batch."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, list) and value and isinstance(value[0], Tensor):
            return len(value)
        if isinstance(value, Tensor) and value.dim() >= 3:
            return len(value)
    return 0


def _fitted(value: Any, rows: int) -> Any:
    if not isinstance(value, (PerRow, Turns)):
        return value
    value = plain(value)
    if value.dim() == 1 and rows and len(value) < rows and rows % len(value) == 0:
        return value.repeat(rows // len(value))
    return value
