"""Steering inside an ordinary diffusers pipeline, which stays what it is and is called as ever."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from steering.core import Guidance, Model
from steering.pipelines.request import networks
from steering.pipelines.steered.asked import Asked
from steering.pipelines.steered.guided_steps import Steering
from steering.rewards.compose import name_of


@contextmanager
def steer(
    pipe: Any,
    guidance: Guidance,
    *,
    decode: Callable[[Tensor], Any] | None = None,
    vae: Any = None,
) -> Iterator[Any]:
    """Inside the block, calls of `pipe` are steered by `guidance`.

        with steer(pipe, FlowChef(measure(A, y), step=0.5)):
            images = pipe("a portrait", num_inference_steps=28).images

    At each `scheduler.step` the guidance is shown the state and the clean guess, guidance of the
    pipeline's own applied. By how far it shifts the next states of the first-order kernel, the line
    through the state is moved: its clean end by d = shift / carry, the other end held (on a flow
    both). The scheduler then takes its own step from the moved state, with the output that belongs
    to it, so that solvers of every order, eta, generators and thresholds work as they do: for DDIM,
    Euler and FlowMatchEuler it is exactly what `sample(from_pipeline(pipe), guidance=...)` does.
    Where a step has several stages (Heun, PNDM's first step, DPM-Solver singlestep) only the first
    is bent, the others start from what became of it.

    Where the scheduler clips guesses, it clips the moved one. A guidance that asks for conditions
    (`Step.row`) is told the items of the call, in order: 0 .. N - 1.

    A guidance that needs the network's gradient has the calls of the networks recorded; this costs
    the memory of a backward pass. One that draws noise does so from copies of the call's
    generators, which stay untouched.

    Leaving the block, also by an exception, leaves the pipeline as it was: classes, weights'
    `requires_grad`, hooks. What is saved inside names the real classes.

    Args:
        pipe: a diffusers pipeline that steps one scheduler in one loop.
        guidance: with a reward of its own. The reward is told the prompts of the call, one for each
            image.
        decode: states [N, *D] -> items, differentiable, in place of the pipeline's autoencoder.
        vae: a small autoencoder of the same latents (AutoencoderTiny), for the guesses.

    Raises:
        TypeError: `guidance` is none, or has no reward, or one without gradient; `decode` or `vae`
            are not what they should be.
        ValueError: no pipeline, or one with a scheduler that cannot be steered, or one that is
            steered already. Inside: a reward of the wrong shape or that is not finite; a window
            that holds no step, a guidance by the step's own noise where none is drawn; a pipeline
            that cannot be steered.
    """
    _check(pipe, guidance, decode, vae)
    steering = Steering(pipe, guidance, decode, vae)
    with ExitStack() as undo:
        undo.enter_context(_as(pipe.scheduler, _steered_scheduler(type(pipe.scheduler), steering)))
        undo.enter_context(_as(pipe, _steered_pipeline(type(pipe), steering)))
        for part in pipe.components.values():
            if isinstance(part, nn.Module):
                undo.enter_context(_frozen(part))
        for name, network in networks(pipe).items():
            if "adapter" in name:  # which sees an image, once, and no state
                continue
            hook = network.register_forward_pre_hook(steering.recorded.hook, with_kwargs=True)
            undo.callback(hook.remove)
        yield pipe


def _steered_scheduler(base: type, steering: Steering) -> type:
    """A scheduler class that steps as `steering` has it; to look at it is `base`.

    Signatures are those of `base`: pipelines look at them.
    """
    signature = inspect.signature(base.step)

    @functools.wraps(base.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        base.set_timesteps(self, *args, **kwargs)
        if self is steering.scheduler:
            steering.grid_set()

    @functools.wraps(base.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self is not steering.scheduler:  # a copy
            return base.step(self, *args, **kwargs)
        return steering.step(base, signature.bind(self, *args, **kwargs))

    members: dict[str, Any] = {"set_timesteps": set_timesteps, "step": step}
    if hasattr(base, "index_for_timestep"):

        @functools.wraps(base.index_for_timestep)
        def index_for_timestep(self: Any, timestep: Any, schedule_timesteps: Any = None) -> int:
            own = steering.travel.own if schedule_timesteps is None else schedule_timesteps
            return base.index_for_timestep(self, timestep, own)

        members["index_for_timestep"] = index_for_timestep
    if not hasattr(base, "scale_model_input"):  # by exact class some do not ask a base for it
        members["scale_model_input"] = lambda self, sample, *args: sample
    if hasattr(base, "multistep_uni_c_bh_update"):
        correct = base.multistep_uni_c_bh_update

        @functools.wraps(correct)
        def multistep_uni_c_bh_update(self: Any, this_model_output: Tensor, *args: Any, **kwargs):
            # it starts anew from the state before: correct first, then move
            assert steering.moved is not None
            output, sample, by = steering.moved
            unmoved = self.convert_model_output(output, sample=sample)
            corrected = correct(self, unmoved, *args, **kwargs)
            return (corrected.float() + by).to(corrected.dtype)

        members["multistep_uni_c_bh_update"] = multistep_uni_c_bh_update
    return _disguised(base, steering, members)


def _steered_pipeline(base: type, steering: Steering) -> type:
    @functools.wraps(base.__call__)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        with steering.call(Asked.of(base.__call__, (self, *args), kwargs)):
            return base.__call__(self, *args, **kwargs)

    members: dict[str, Any] = {"__call__": __call__}
    make: Any = getattr(base, "prepare_latents", None)
    if make is not None:

        @functools.wraps(make)
        def prepare_latents(self: Any, *args: Any, **kwargs: Any) -> Any:
            latents = make(self, *args, **kwargs)
            steering.latents_made(latents)
            return latents

        members["prepare_latents"] = prepare_latents
    return _disguised(base, steering, members)


def _disguised(base: type, steering: Steering, members: dict[str, Any]) -> type:
    """A subclass with these members that configurations take for `base` itself."""
    looks = {"__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base.__name__, (base,), {**looks, "_steering": steering, **members})


@contextmanager
def _as(thing: Any, kind: type) -> Iterator[None]:
    found = thing.__class__
    thing.__class__ = kind
    try:
        yield
    finally:
        thing.__class__ = found


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Its weights without gradients, which no guidance asks for."""
    free = [weight for weight in module.parameters() if weight.requires_grad]
    for weight in free:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in free:
            weight.requires_grad_(True)


def _check(pipe: Any, guidance: Any, decode: Any, vae: Any) -> None:
    if not hasattr(pipe, "components"):
        is_model = isinstance(pipe, Model)
        hint = ": a model is steered by sample(model, ..., guidance=)" if is_model else ""
        raise ValueError(f"pipe is a {type(pipe).__name__}, no diffusers pipeline{hint}.")
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is None:
        raise ValueError(f"{type(pipe).__name__} has no scheduler, whose steps could be steered.")
    if hasattr(type(pipe), "_steering") or hasattr(type(scheduler), "_steering"):
        raise ValueError(
            "pipe, or its scheduler, is steered already: leave that block first. Two rewards go "
            "into one guidance as their sum."
        )
    if isinstance(guidance, type) or not hasattr(guidance, "propose"):
        name = guidance.__name__ if isinstance(guidance, type) else type(guidance).__name__
        given = f"the class {name}" if isinstance(guidance, type) else f"a {name}"
        raise TypeError(f"guidance is {given}: give a guidance, such as FlowChef(reward).")
    name = type(guidance).__name__
    if hasattr(guidance, "check"):  # of a model, whose conditions it chooses between
        raise TypeError(
            f"{name} asks the network about several conditions, and a pipeline's call is of one: "
            f"use it in sample(from_pipeline(pipe, ...), guidance={name}(...))."
        )
    reward = getattr(guidance, "reward", ...)
    if reward is None:
        raise TypeError(f"{name} has no reward to follow: give {name}(reward).")
    if reward is not ... and not callable(reward):
        raise TypeError(f"reward={reward!r} of {name} cannot be called: give (items, prompts).")
    if getattr(reward, "differentiable", True) is False:
        raise TypeError(
            f"reward {name_of(reward)} has no gradient, and {name} follows it: give a "
            "differentiable reward, or sample(...) without guidance."
        )
    if decode is not None and not callable(decode):
        raise TypeError(f"decode={decode!r} cannot be called: give states -> items.")
    if vae is not None and not hasattr(vae, "decode"):
        raise TypeError(f"vae is a {type(vae).__name__}: give an autoencoder (AutoencoderTiny).")
    if decode is not None and vae is not None:
        raise ValueError("decode and vae are both given: one of them decodes.")
