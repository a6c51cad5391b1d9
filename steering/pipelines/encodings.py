"""Embeddings of prompts, made once: a pipeline's `encode_prompt`, remembered prompt by prompt."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Encodings:
    """What a pipeline's `encode_prompt` returned for each row, put together for any batch of them.

    Every row is encoded by itself, as if it were run alone, so that its embeddings depend on no
    other row and text encoders have no work left after the first call of a row. Names and
    numbers of a family's embeddings play no part: a batch is the rows' tensors, one after another,
    where a tensor has one entry for one row, and the first row's otherwise (token positions).
    """

    def __init__(self) -> None:
        self._kept: dict[Any, tuple[Any, Any]] = {}  # arguments stay alive: their ids stay theirs
        self._by_row: dict[int, list[Any]] = {}

    def of(self, encode: Callable[..., Any], rows: Sequence[int]) -> Callable[..., Any]:
        """A stand-in for `encode` while a batch of `rows` is run."""
        parameters = inspect.signature(encode)

        def remembered(*args: Any, **kwargs: Any) -> Any:
            arguments = parameters.bind(*args, **kwargs).arguments
            return _together([self._one(encode, arguments, rows, k) for k in range(len(rows))])

        return remembered

    def signature(self, row: int) -> tuple:
        """Shapes of a row's embeddings: rows that share them fit into one batch."""
        return tuple(_shapes(one) for one in self._by_row.get(row, []))

    def _one(self, encode: Callable[..., Any], arguments: Any, rows: Sequence[int], k: int) -> Any:
        """Embeddings of place `k`: lists with one entry per row are cut down to its own."""
        own = {
            name: [value[k]] if isinstance(value, list) and len(value) == len(rows) else value
            for name, value in arguments.items()
        }
        named, star = dict(own), own.get("kwargs")
        if isinstance(star, dict):
            del named["kwargs"]
            named |= star
        key = tuple((name, _key(value)) for name, value in sorted(named.items()))
        if key not in self._kept:
            with torch.no_grad():
                self._kept[key] = encode(**named), named
            self._by_row.setdefault(rows[k], []).append(self._kept[key][0])
        return self._kept[key][0]


def _together(ones: list[Any]) -> Any:
    """The embeddings of a batch, of those of its rows."""
    first = ones[0]
    if len(ones) == 1:
        return first
    if isinstance(first, Tensor):
        return torch.cat(ones) if first.dim() and len(first) == 1 else first
    if isinstance(first, (list, tuple)):
        if isinstance(first, list) and len(first) == 1:  # one entry for one row
            return [one[0] for one in ones]
        return type(first)(_together(list(part)) for part in zip(*ones, strict=True))
    return first


def _shapes(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape), str(value.dtype)
    if isinstance(value, (list, tuple)):
        return tuple(_shapes(part) for part in value)
    return None


def _key(value: Any) -> Any:
    """What tells arguments apart: texts and numbers by value, tensors and objects by identity."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_key, value))
    if isinstance(value, Tensor):
        return id(value), value._version
    if isinstance(value, (str, int, float, bool, type(None), torch.device, torch.dtype)):
        return type(value).__name__, str(value)
    return id(value)
