"""What `from_pipeline` was asked for, checked before anything is encoded."""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from steering.cfg import ClassifierFree, Scale, check_rule
from steering.digest import digest

# settings that change where weights come from and how much memory they take, not what is said
_NO_MATTER = ("training", "name_or_path", "use_slicing", "use_tiling", "gradient_checkpointing",
              "warnings_issued")  # fmt: skip
_LOOKED_AT = 16  # numbers of each weight that a fingerprint rests on


class NotNativeError(ValueError):
    """A pipeline or a request that a native adapter does not serve, though driving it may."""


@dataclass(frozen=True)
class Request:
    """The arguments of `from_pipeline`, with lists of one length R."""

    steps: int
    eta: float | None
    height: int | None
    width: int | None
    prompts: tuple[Any, ...] | None
    negative_prompts: tuple[Any, ...] | None
    guidance_scale: float | tuple[float, ...] | None
    cfg: ClassifierFree | None = None
    call: Mapping[str, Any] | None = None
    preview: Any = None

    def __post_init__(self) -> None:
        if not (self.preview is None or callable(self.preview)):
            raise TypeError(
                f"preview={self.preview!r} is neither an autoencoder nor a function: give a "
                "diffusers AutoencoderTiny, or states -> images."
            )
        if type(self.steps) is not int or self.steps < 1:
            raise ValueError(f"steps={self.steps!r} is no number of steps: give an int from 1 on.")
        if self.eta is not None and not isinstance(self.eta, (int, float)):
            raise ValueError(f"eta={self.eta!r} is no number: give one from 0 to 1, or None.")
        for name in ("height", "width"):
            size = getattr(self, name)
            if size is not None and (isinstance(size, bool) or not isinstance(size, int)):
                raise ValueError(f"{name}={size!r} is no size: give pixels as an int.")
        if self.prompts is None and self.negative_prompts is not None:
            raise ValueError("negative_prompts is given without prompts: give both.")
        if self.prompts is not None and self.negative_prompts is not None:
            self._same_length("negative_prompts", self.negative_prompts)
        if isinstance(self.guidance_scale, tuple):
            self._same_length("guidance_scale", self.guidance_scale)
        if self.cfg is not None:
            check_rule("cfg", self.cfg)

    def _same_length(self, name: str, values: tuple[Any, ...]) -> None:
        expected = 1 if self.prompts is None else len(self.prompts)
        if len(values) != expected:
            raise ValueError(
                f"{name} has {len(values)} entries for {expected} prompts: give one for each."
            )

    def describe(self, pipe: Any) -> str:
        """The pipeline's class, what was asked of it, and a fingerprint of its parts: records of
        other models differ in it."""
        own = ("steps", "prompts")  # records hold these apart
        asked = {k: v for k, v in vars(self).items() if k not in own and v is not None}
        settings = ", ".join(f"{k}={_told(k, v)}" for k, v in asked.items())
        asked_for = f"({settings})" if settings else ""
        return f"{type(pipe).__name__}{asked_for}#{fingerprint({'pipe': pipe, **pipe.components})}"

    def scales(self, default: float) -> Tensor:
        """[R] float32 guidance scales."""
        given = default if self.guidance_scale is None else self.guidance_scale
        count = 1 if self.prompts is None else len(self.prompts)
        scales = given if isinstance(given, tuple) else (given,) * count
        for scale in scales:
            if not isinstance(scale, (int, float)) or not math.isfinite(scale):
                raise ValueError(f"guidance_scale has {scale!r}: give finite numbers.")
        return torch.tensor(scales, dtype=torch.float32)

    def rule(self, steps: int) -> ClassifierFree:
        """How pairs of predictions are made one in a chain of `steps`."""
        if self.cfg is None:
            return Scale()
        if not self.cfg.guided(torch.arange(steps), steps).any():
            raise ValueError(
                f"cfg={self.cfg} guides none of {steps} steps: widen its interval, or leave "
                "it out and give guidance_scale=1.0."
            )
        return self.cfg

    def preview_by(self, decoding: Callable[[Any], Any]) -> Callable[[Tensor], Any] | None:
        """How guesses on the way are decoded; `decoding` makes a decoder of an autoencoder."""
        return decoding(self.preview) if hasattr(self.preview, "decode") else self.preview

    def refuse(self, *names: str, because: str) -> None:
        """ValueError if one of these arguments was given, which have no meaning here."""
        for name in names:
            if getattr(self, name) is not None:
                raise ValueError(f"{name} is given, but {because}: leave it out.")

    def texts(self) -> tuple[list[str], list[str]]:
        """[R] prompts and [R] negative prompts, "" where none was given."""
        if self.prompts is None:
            raise ValueError("prompts is missing: this pipeline needs a list of texts.")
        negative = self.negative_prompts or ("",) * len(self.prompts)
        for name, texts in (("prompts", self.prompts), ("negative_prompts", negative)):
            for text in texts:
                if not isinstance(text, str):
                    raise ValueError(f"{name} has {text!r}: this pipeline needs texts.")
        return list(self.prompts), list(negative)

    def labels(self, name: str, count: int) -> Tensor:
        """[R] int64 class labels, which the argument `name` holds."""
        labels = getattr(self, name)
        if labels is None:
            raise ValueError(
                f"{name} is missing: this model is class-conditional, "
                f"give a list of labels from 0 to {count - 1}."
            )
        for label in labels:
            if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < count:
                raise ValueError(f"{name} has {label!r}: give labels, ints from 0 to {count - 1}.")
        return torch.tensor(labels)

    def size(self, height: int, width: int, multiple: int) -> tuple[int, int]:
        """Height and width in pixels: what was given, else the pipeline's own."""
        sizes = (
            height if self.height is None else self.height,
            width if self.width is None else self.width,
        )
        for name, size in zip(("height", "width"), sizes, strict=True):
            if size < multiple or size % multiple:
                raise ValueError(f"{name}={size} does not fit: give a multiple of {multiple}.")
        return sizes

    def only_size(self, height: int, width: int) -> None:
        """ValueError if a size was given that is not the only one there is."""
        for name, own in (("height", height), ("width", width)):
            given = getattr(self, name)
            if given not in (None, own):
                raise ValueError(f"{name}={given} cannot be had: this pipeline makes {own} pixels.")


def _told(name: str, value: Any) -> str:
    """A value in a few characters, the same in every process: records of other ones differ in it.

    Raises:
        ValueError: an object that cannot be told from another of its class.
    """
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {_told(name, v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(_told(name, v) for v in value) + ")"
    if isinstance(value, (Tensor, np.ndarray, Image.Image)):
        return "#" + digest(value)
    if isinstance(value, nn.Module):
        return f"{type(value).__name__}#{fingerprint({name: value})}"
    if isinstance(value, np.generic):
        value = value.item()
    if is_dataclass(value) or isinstance(value, (str, int, float, type(None), torch.dtype)):
        return str(value)
    if callable(value) and hasattr(value, "__qualname__"):
        return value.__qualname__
    raise ValueError(
        f"{name} holds a {type(value).__name__}, which a record could not tell from another: give "
        "numbers, texts, images, tensors, or lists of them."
    )


def fingerprint(parts: Mapping[str, Any]) -> str:
    """Eight hexadecimal digits of a few numbers from every weight, and of every plain setting.

    Settings that are no weights change what a network says, too: the scales of adapters, FreeU.
    """
    whole = hashlib.blake2b(digest_size=4)
    for name, part in parts.items():
        config = getattr(part, "config", {})
        plain = isinstance(config, Mapping)
        part = getattr(part, "_orig_mod", part)  # compiled, it says what it said
        whole.update(repr((name, type(part).__name__, _settings(config) if plain else "")).encode())
        if not isinstance(part, nn.Module):
            shift = getattr(part, "shift", None)  # which `set_shift` writes nowhere else
            whole.update(repr(shift if isinstance(shift, (int, float)) else None).encode())
            continue
        for path, module in part.named_modules():
            own = {k: v for k, v in vars(module).items() if k not in _NO_MATTER}
            whole.update(repr((path, _settings(own))).encode())
        for weight in (*part.parameters(), *part.buffers()):
            whole.update(_some_of(weight))
    return whole.hexdigest()


def _settings(named: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What is plain among attributes: numbers, texts, and lists and mappings of them."""
    return sorted(
        (name, repr(_as_saved(value)))
        for name, value in named.items()
        if not name.startswith("_") and name not in _NO_MATTER and _plain(value)
    )


def _as_saved(value: Any) -> Any:
    """A plain value as JSON gives it back: a pipeline that was saved is the same one."""
    if isinstance(value, (list, tuple)):
        return [*map(_as_saved, value)]
    return {k: _as_saved(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def _plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_plain, value))
    if isinstance(value, Mapping):
        return all(map(_plain, value.values()))
    return isinstance(value, (int, float, str, bool, type(None)))


def _some_of(weight: Tensor) -> bytes:
    try:
        some = weight.detach().flatten()[:: max(1, weight.numel() // _LOOKED_AT)]
        return some.to("cpu", torch.float64).numpy().tobytes()
    except (NotImplementedError, RuntimeError):
        # packed by a quantiser that cannot slice, or not here at all while it is offloaded
        return repr((tuple(weight.shape), str(weight.dtype))).encode()


def networks(pipe: Any) -> dict[str, nn.Module]:
    """What runs inside a pipeline's loop: all but what encodes prompts and images or decodes."""
    outside = ("vae", "vqvae", "text_encoder", "image_encoder", "safety_checker")
    return {
        name: part
        for name, part in pipe.components.items()
        if isinstance(part, nn.Module) and not name.startswith(outside)
    }


def as_tuple(name: str, values: Sequence[Any] | None) -> tuple[Any, ...] | None:
    """A list argument as a tuple; a bare text is the commonest mistake."""
    if values is None:
        return None
    if isinstance(values, str):
        each = ", one for each prompt" if name == "negative_prompts" else ""
        raise ValueError(f"{name}={values!r} is no list: give [{values!r}]{each}.")
    if not isinstance(values, Sequence):
        raise ValueError(f"{name} is a {type(values).__name__}: give a list.")
    if len(values) == 0:
        raise ValueError(f"{name} is empty: give at least one, or leave it out.")
    return tuple(values)


def default_scale(pipe: Any) -> float:
    """The guidance scale that a pipeline takes when it is given none."""
    return inspect.signature(pipe.__call__).parameters["guidance_scale"].default
