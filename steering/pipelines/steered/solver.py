"""A diffusers scheduler's own step as one of a chain: which it is, and how it is told of a move."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steering.gaussian import GaussianProcess, ToClean
from steering.pipelines.schedulers import (
    DIFFUSION,
    EXPLODING,
    HIGHER_ORDER,
    check_scheduler,
    read_grid,
)

_OWN_NOISE = ("DDPM", "DDPMParallel", "LCM")  # their kernels are stochastic, whatever `eta`


def check_solver(scheduler: Any) -> str:
    """The short name of a scheduler whose steps can be steered.

    Raises:
        ValueError: a scheduler or a setting of it that cannot be, by name.
    """
    name = check_scheduler(scheduler)
    refused = {
        "skip_prk_steps": name == "PNDM" and not scheduler.config.skip_prk_steps,
        "solver_p": scheduler.config.get("solver_p") is not None,
    }
    for setting, is_set in refused.items():
        if is_set:
            raise ValueError(
                f"{name}Scheduler with {setting}={scheduler.config[setting]!r} cannot be steered: "
                "its stages are no steps from one state to the next. Give the pipeline another, "
                "for example DDIMScheduler.from_config(pipe.scheduler.config)."
            )
    return name


def eta_of(scheduler: Any, name: str, given: Any) -> float | None:
    """The share of new noise that a step is asked for, as `read_grid` takes it."""
    if name in _OWN_NOISE:
        return None
    if name == "EulerAncestralDiscrete":
        return 1.0
    default = inspect.signature(type(scheduler).step).parameters.get("eta")
    if default is None:
        return None if scheduler.config.get("stochastic_sampling") else 0.0
    return float(default.default if given is None else given)


@dataclass(frozen=True, eq=False)
class Solver:
    """A scheduler with its grid set.

    Args:
        name: of the scheduler.
        process: the first-order chain on its grid, variance-preserving or a flow.
        to_clean: turns what the network puts out into a clean guess of that chain.
    """

    name: str
    process: GaussianProcess
    to_clean: ToClean

    @staticmethod
    def of(scheduler: Any, shape: tuple[int, ...], eta: float | None, device: Any) -> Solver:
        """The solver of states of this shape on a device."""
        name = type(scheduler).__name__.removesuffix("Scheduler")
        with warnings.catch_warnings():
            # that a first-order kernel is used: here the step itself is the scheduler's own
            warnings.simplefilter("ignore", UserWarning)
            process, prediction = read_grid(scheduler, shape, eta=eta)
        process = process.to(device)
        return Solver(name, process, ToClean(process, prediction))

    @property
    def first_order(self) -> bool:
        """Is the next state a function of this one alone?"""
        return self.name not in HIGHER_ORDER

    def step(self, scheduler: Any, time: Any) -> int | None:
        """Which step of the chain a call of `scheduler.step` at `time` begins.

        None where it begins none: the further stages of a step of several, whose start they take
        from the first, and which see the states that it has led to.

        Raises:
            ValueError: a time that is not on the grid.
        """
        if self.name in DIFFUSION:
            if self.name == "PNDM" and scheduler.counter == 1:
                return None
            i = int(self.to_clean.step(torch.as_tensor(time).reshape(-1)[:1].float())[0])
            if i < 0:
                raise ValueError(f"timestep={time} is not on the grid that the scheduler has set.")
            return i
        if scheduler.step_index is None:
            scheduler._init_step_index(time)
        k: Any = scheduler.step_index
        if self.name in ("HeunDiscrete", "FlowMatchHeunDiscrete"):  # levels come twice
            return k // 2 if scheduler.state_in_first_order else None
        if self.name == "DPMSolverSinglestep":
            order = scheduler.order_list[k]
            while order > 1 and scheduler.model_outputs[1 - order] is None:  # it began in a block
                order -= 1
            return k if order == 1 else None
        return k

    def scale(self, i: int) -> float:
        """From a state of the chain to one of the scheduler: 1 / alpha where variance explodes."""
        return 1 / float(self.process.alpha[i]) if self.name in EXPLODING else 1.0

    def along(self, i: int) -> float:
        """How far the scheduler's state goes with its clean guess, the other end of the line held:
        the velocity on a flow, the noise on a diffusion."""
        alpha, sigma = float(self.process.alpha[i]), float(self.process.sigma[i])
        return self.scale(i) * (alpha + sigma if self.process.straight else alpha)

    def output(self, i: int, output: Tensor, d: Tensor) -> Tensor:
        """What the network would put out at a state whose clean guess is moved by d [N, *D]."""
        if self.to_clean.prediction == "sample":
            return _plus(output, d)
        if self.to_clean.prediction == "v_prediction":
            return _plus(output, -float(self.process.sigma[i]) * d)
        return output  # the noise, or the velocity, which is held

    def sample(self, i: int, sample: Tensor, d: Tensor) -> Tensor:
        """The scheduler's state whose clean guess is moved by d [N, *D]."""
        return _plus(sample, self.along(i) * d)


def _plus(x: Tensor, d: Tensor) -> Tensor:
    return (x.float() + d).to(x.dtype)
