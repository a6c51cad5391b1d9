"""An unmodified diffusers pipeline as a function: what its network says of a state at a step.

`pipe.__call__` runs up to the first `scheduler.step`, which is shown the network's output, guidance
of every kind applied, and the state that it was made from, and which ends the call. The grid that
the pipeline has set is replaced by copies of one time, so the first step can be any. With an empty
grid only the tail runs: the pipeline's own decoding. Instance attributes of the pipeline are put
back after every call, also after an exception.
"""

from __future__ import annotations

import copy
import inspect
import logging
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from steering.pipelines.conditional import evaluating
from steering.pipelines.encodings import Encodings
from steering.pipelines.inputs import Inputs
from steering.pipelines.request import networks
from steering.pipelines.stand_ins import counted, passing, remembering
from steering.pipelines.turns import enumerate_turns
from steering.pipelines.visit import At, Captured, Step, Visit, driven

# loops look `enumerate` and `randn_tensor` up in their module, which all pipelines of it share
_ALONE = threading.RLock()


class NotSeenError(Exception):
    """The pipeline does not hand the state it is given to its network as it is."""


@dataclass(frozen=True)
class Opened:
    """What a pipeline's first step shows."""

    first: Step
    scheduler: Any  # as the pipeline has set it, of its own class
    cut: bool  # does its loop begin after the grid does?
    from_image: bool  # does it noise an image to start from?


class Oracle:
    """A pipeline, held by its scheduler.

    States are as the pipeline's own `step` sees them. They are handed over as `latents=`, or, with
    `injected`, in place of the noise that the pipeline draws, which it may pack: `inject` finds out
    how.

    Args:
        pipe: a pipeline that steps one scheduler in one loop.
        inputs: arguments of its call, but for the states.
    """

    def __init__(self, pipe: Any, inputs: Inputs) -> None:
        self.pipe, self.inputs = pipe, inputs
        self.injected = "latents" not in inspect.signature(type(pipe).__call__).parameters
        self.scheduler = copy.deepcopy(pipe.scheduler)
        if "skip_prk_steps" in self.scheduler.config:  # its warm-up stages are no steps of a chain
            self.scheduler.register_to_config(skip_prk_steps=True)
        self._base = type(pipe.scheduler)
        self.scheduler.__class__ = driven(self._base)
        self._encodings = Encodings()
        self._networks = networks(pipe)
        self._stand_ins = passing(pipe) | {
            name: counted(net, self._add_rows if _counts(name) else None)
            for name, net in self._networks.items()
        }
        vae = pipe.components.get("vae")
        if isinstance(vae, nn.Module) and hasattr(vae, "encode"):
            self._stand_ins["vae"] = remembering(vae)
        # where it runs is looked for among all of its modules, each time it is asked
        where = {"_execution_device": pipe._execution_device}
        self._kinds = type(pipe), type(type(pipe).__name__, (type(pipe),), where)
        self._device = where["_execution_device"]
        # guidance that keeps what it saw starts anew in every call, as the pipeline's own does
        self.guiders = {n: p for n, p in pipe.components.items() if hasattr(p, "set_state")}
        self._processors: dict[str, dict[str, Any]] = {}  # that the pipeline exchanges in its calls
        owners = [
            c for c in type(pipe).__mro__ if "__call__" in vars(c) or ".pipelines." in c.__module__
        ]
        self._modules = list(
            {id(m): m for m in (sys.modules[c.__module__] for c in owners)}.values()
        )
        self._natural: tuple[int, ...] | None = None  # shape of one state where noise is drawn
        self._order: Tensor | None = None  # entry of a state that each of its entries is taken from

    # --- what can be asked ---------------------------------------------------------------------

    def encode(self, row: int) -> tuple:
        """Encode a condition, once; shapes of its embeddings: conditions that share them can share
        a call."""
        self._run(Visit(1, encode=True), [row])
        return self._encodings.shapes(row)

    def open(self, row: int) -> Opened:
        """The pipeline's own first step, from its own noise."""
        visit, before = Visit(1), self._attention()
        try:
            self._run(visit, [row])
        finally:
            after = self._attention()
            self._processors = {n: before[n] for n in before if before[n] != after[n]}
            self._restore_attention()
        shapes = [shape[1:] for shape in visit.drawn if shape[0] == 1 and len(shape) > 2]
        self._natural = shapes[0] if shapes else None
        scheduler = copy.copy(self.scheduler)
        scheduler.__class__ = self._base
        first = visit.seen[0]
        begins = float(torch.as_tensor(first.time).reshape(-1)[0])
        cut = begins != float(scheduler.timesteps[0])
        return Opened(first, scheduler, cut, visit.noised_image)

    def native(self, x: Tensor, rows: Sequence[int], steps: int) -> list[tuple[Step, Tensor]]:
        """The pipeline's own first steps from states x [N, *D], and what each made of them."""
        visit = Visit(len(rows), steps=steps)
        self._run(visit, rows, x)
        return list(zip(visit.seen, visit.made, strict=True))

    def query(self, x: Tensor, rows: Sequence[int], at: At) -> Step:
        """What the network says of states x [N, *D] of conditions `rows` at `at`.

        Raises:
            NotSeenError: the state that it speaks of is another one.
        """
        visit = Visit(len(rows), at)
        self._run(visit, rows, x)
        step = visit.seen[0]
        if step.sample.shape != x.shape or not torch.equal(step.sample.detach(), x.detach()):
            raise NotSeenError(
                "the pipeline's network saw another state than it was given: was the pipeline "
                "used, moved or changed while a run went on?"
            )
        return step

    def decode(self, x: Tensor, row: int, *, turns: bool, vae: Any = None) -> Any:
        """What the pipeline puts out for clean states x [N, *D], in [0, 1].

        `turns` lets its loop turn once, for nothing, where it cannot do without; `vae` takes the
        place of its autoencoder.
        """
        visit = Visit(len(x), tail=x, turns=turns, vae=vae)
        return self._run(visit, [row] * len(x), x, output_type="pt", return_dict=False)[0]

    def inject(self, x: Tensor, row: int) -> None:
        """From now on, hand states over in place of the pipeline's noise; x [1, *D] is one of them.

        Raises:
            NotSeenError: what it makes of its noise is not that noise in another order.
        """
        if self._natural is None or x[0].numel() != torch.Size(self._natural).numel():
            raise NotSeenError
        size, order = x[0].numel(), torch.zeros(x.shape, dtype=torch.int64)
        for digit in range(3):  # whole numbers below 256 are exact in every float format
            digits = torch.arange(size).div(256**digit, rounding_mode="floor") % 256
            visit = Visit(1, start=digits.to(x).view(1, *self._natural))
            self._run(visit, [row])
            order += visit.seen[0].sample.round().long().cpu() * 256**digit
        if not torch.equal(order.flatten().sort().values, torch.arange(size)):
            raise NotSeenError
        self.injected, self._order = True, order.flatten().argsort().to(x.device)

    def _add_rows(self, rows: int) -> None:
        self.scheduler.visit.rows += rows

    # --- one call ------------------------------------------------------------------------------

    def _run(self, visit: Visit, rows: Sequence[int], x: Tensor | None = None, **more: Any) -> Any:
        inputs = {**self.inputs(rows), **more}
        if x is not None and self.injected:
            shown = x if self._order is None else x.flatten(1)[:, self._order]
            visit.start = shown.reshape(len(x), *(self._natural or x.shape[1:]))
        elif x is not None:
            inputs["latents"] = x
        call = self._kinds[0].__call__
        call = getattr(call, "__wrapped__", call)  # diffusers turns gradients off around it
        with torch.set_grad_enabled(x is not None and x.requires_grad), self._held(visit, rows):
            try:
                return call(self.pipe, **inputs)
            except Captured:
                return None

    @contextmanager
    def _held(self, visit: Visit, rows: Sequence[int]) -> Iterator[None]:
        """The pipeline with our scheduler and stand-ins in place; as it was, afterwards."""
        aside = _random_numbers_aside(self._device)
        with _ALONE, aside, evaluating(*self._networks.values()):
            attributes = vars(self.pipe)
            found, undo = dict(attributes), list[Callable[[], None]]()
            talk = logging.getLogger("diffusers")
            level = talk.level
            try:
                if self.guiders:
                    undo.append(_unhook(self._networks))
                for module in self._modules:
                    _shadow(module, undo, visit.noise, enumerate_turns)
                _shadow(sys.modules["diffusers.models.autoencoders.vae"], undo, visit.code)
                self.scheduler.visit = visit
                self.pipe.__class__ = self._kinds[1]
                attributes.update(self._stand_ins)
                attributes.update({n: copy.deepcopy(p) for n, p in self.guiders.items()})
                attributes["scheduler"] = self.scheduler
                if visit.at is not None or visit.tail is not None:
                    talk.setLevel(logging.ERROR)  # what it has to say, it has said at opening
                if visit.vae is not None:
                    attributes["vae"] = visit.vae
                attributes["_progress_bar_config"] = {"disable": True}
                # which after every image would take all networks off the device and hook them anew
                attributes["maybe_free_model_hooks"] = lambda: None
                if hasattr(self.pipe, "encode_prompt"):
                    encode = self.pipe.encode_prompt
                    attributes["encode_prompt"] = self._encodings.of(encode, rows)
                yield
            finally:
                self.pipe.__class__ = self._kinds[0]
                attributes.clear()
                attributes.update(found)
                for restore in undo:
                    restore()
                self._restore_attention()
                talk.setLevel(level)
                self.scheduler.visit = None

    def _attention(self) -> dict[str, dict[str, Any]]:
        found: dict[str, Any] = {
            name: getattr(net, "attn_processors", None) for name, net in self._networks.items()
        }
        return {name: dict(processors) for name, processors in found.items() if processors}

    def _restore_attention(self) -> None:
        for name, processors in self._processors.items():
            network: Any = self._networks[name]
            network.set_attn_processor(dict(processors))  # which empties what it is given


def _unhook(networks: dict[str, nn.Module]) -> Callable[[], None]:
    """How to take off networks the hooks that they do not have yet: guidance sets some for a call,
    and takes them off when it comes to its end."""

    def registries() -> list[Any]:
        found = [m for network in networks.values() for m in network.modules()]
        return [m._diffusers_hook for m in found if hasattr(m, "_diffusers_hook")]

    known = {id(registry): set(registry.hooks) for registry in registries()}

    def undo() -> None:
        for registry in registries():
            for name in set(registry.hooks) - known.get(id(registry), set()):
                registry.remove_hook(name, recurse=False)

    return undo


def _counts(name: str) -> bool:
    """Is a call of this component a call of the network that compute is counted in?"""
    return "controlnet" not in name and "adapter" not in name


def _shadow(module: Any, undo: list, noise: Callable[..., Tensor], enumeration: Any = None) -> None:
    """Put stand-ins into a module, for its `randn_tensor` if it draws and for the built-in
    `enumerate`; how to take them out again goes to `undo` first."""
    names = vars(module)
    shadows: dict[str, Any] = {} if enumeration is None else {"enumerate": enumeration}
    if "randn_tensor" in names:
        shadows["randn_tensor"] = partial(noise, names["randn_tensor"])
    before = {name: names[name] for name in shadows if name in names}

    def restore() -> None:
        for name in shadows:
            names.pop(name, None)
        names.update(before)

    undo.append(restore)
    names.update(shadows)


@contextmanager
def _random_numbers_aside(device: torch.device) -> Iterator[None]:
    """Global random numbers are the same in every call, and untouched afterwards.

    Some pipelines draw from them what depends on no state, such as the code of a control image.
    """
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.set_rng_state(torch.Generator().manual_seed(0).get_state())
        for each in devices:
            torch.cuda.set_rng_state(torch.Generator(each).manual_seed(0).get_state(), each)
        yield
