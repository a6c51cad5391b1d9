"""Embeddings of prompts, made once: a pipeline's `encode_prompt`, remembered prompt by prompt."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from steering.digest import digest


class Encodings:
    """What a pipeline's `encode_prompt` returned for each row, put together for any batch of them.

    Every row is encoded by itself, as if it were run alone: its embeddings depend on no other row,
    and text encoders have no work left after its first call. How a family names and shapes its
    embeddings plays no part: which axis of each is the batch shows when one row is encoded twice in
    one call.
    """

    def __init__(self) -> None:
        # arguments are kept with what they gave, so that their ids stay theirs
        self._kept: dict[Any, tuple[Any, Any]] = {}
        self._by_row: dict[int, dict[Any, Any]] = {}
        self._layouts: dict[Any, Any] = {}  # by all arguments but the texts
        self._signature: inspect.Signature | None = None

    def of(self, encode: Callable[..., Any], rows: Sequence[int]) -> Callable[..., Any]:
        """A stand-in for `encode` while a batch of `rows` is run."""
        signature = self._signature = self._signature or inspect.signature(encode)

        def remembered(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            given |= given.pop("kwargs", {})
            apart = [_of_place(given, k, len(rows)) for k in range(len(rows))]
            ones = [self._encoded(encode, own) for own in apart]
            for row, own, one in zip(rows, apart, ones, strict=True):
                self._by_row.setdefault(row, {})[_key(own)] = one
            if len(ones) == 1:
                return ones[0]
            cut = {name for name, own in apart[0].items() if own is not given[name]}
            call = tuple(sorted(cut)), _key({n: v for n, v in given.items() if n not in cut})
            if call not in self._layouts:
                twice = {n: own * 2 if n in cut else own for n, own in apart[0].items()}
                with torch.no_grad():
                    self._layouts[call] = _layout(ones[0], encode(**twice))
            return _together(ones, self._layouts[call])

        return remembered

    def shapes(self, row: int) -> tuple:
        """Of a row's embeddings: rows that share them fit into one batch."""
        return tuple(_shapes(one) for one in self._by_row.get(row, {}).values())

    def _encoded(self, encode: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        key = _key(arguments)
        if key not in self._kept:
            with torch.no_grad():
                self._kept[key] = encode(**arguments), arguments
        return self._kept[key][0]


def _of_place(given: dict[str, Any], k: int, count: int) -> dict[str, Any]:
    """Arguments of one row of a batch: of lists with an entry for every row, its own; one row."""
    own = {
        name: [value[k]]
        if "prompt" in name and isinstance(value, list) and len(value) == count
        else value
        for name, value in given.items()
    }
    return own | ({"batch_size": 1} if "batch_size" in own else {})


def _layout(one: Any, pair: Any) -> Any:
    """Where the batch is in what `encode_prompt` returns, of what it gave for one row and for two.

    Of a tensor its axis, None where it has none; of a list with entries for rows True; of other
    lists and tuples the layouts of their parts.
    """
    if isinstance(one, Tensor):
        return next((k for k in range(one.dim()) if pair.shape[k] == 2 * one.shape[k]), None)
    if isinstance(one, list) and len(pair) == 2 * len(one):
        return True
    if isinstance(one, (list, tuple)):
        return tuple(_layout(part, both) for part, both in zip(one, pair, strict=True))
    if one is None or isinstance(one, (int, float, str)):
        return None
    raise TypeError(f"embeddings in a {type(one).__name__} cannot be put together")


def _together(ones: list[Any], layout: Any) -> Any:
    """The embeddings of a batch, of those of its rows."""
    one = ones[0]
    if layout is None:  # of no row in particular, such as positions of tokens
        return one
    if isinstance(one, Tensor):
        # [n, ...] halves of one row, as guidance has them, become n blocks of all rows
        return torch.stack(ones, layout + 1).flatten(layout, layout + 1)
    if layout is True:
        return [own[k] for k in range(len(one)) for own in ones]
    parts = zip(zip(*ones, strict=True), layout, strict=True)
    return type(one)(_together(list(part), where) for part, where in parts)


def _shapes(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape), str(value.dtype)
    if isinstance(value, (list, tuple)):
        return tuple(_shapes(part) for part in value)
    return None if value is None else id(value)


def _key(value: Any) -> Any:
    """What tells arguments apart: by value where that can be told, objects by identity."""
    if isinstance(value, dict):
        return tuple((name, _key(part)) for name, part in sorted(value.items()))
    if isinstance(value, (list, tuple)):
        return tuple(map(_key, value))
    if isinstance(value, (Tensor, np.ndarray, Image.Image)):  # pipelines make them anew each time
        return digest(value)
    if isinstance(value, (str, int, float, bool, type(None), torch.device, torch.dtype)):
        return type(value).__name__, str(value)
    return id(value)
