"""A scheduler whose steps are bent by a guidance, inside a pipeline that does not know of it."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from steering.core import Guidance, Proposal, Step
from steering.gaussian import NormalTransition
from steering.guidance.bend import inside
from steering.guidance.scoring import score
from steering.noise import child_key
from steering.pipelines.steered.asked import Asked, Decode, decoding
from steering.pipelines.steered.recorded import Recorded, holds_copies
from steering.pipelines.steered.solver import Solver, check_solver, eta_of
from steering.pipelines.steered.travel import Travel
from steering.rewards.compose import name_of

_ALWAYS = (0.0, 1.0)


class Moved(NamedTuple):
    """What a step was called with, and how far its state was moved from there."""

    output: Tensor  # [N, *D]
    sample: Tensor  # [N, *D]
    by: Tensor  # [N, *D] float32


class Steering:
    """A guidance at work in a pipeline.

    Args:
        pipe, guidance: what is steered, and by what.
        decode: states -> items; None is by the pipeline's autoencoder, or by `vae`.
    """

    def __init__(self, pipe: Any, guidance: Guidance, decode: Decode | None, vae: Any) -> None:
        self.pipe, self.scheduler, self.guidance = pipe, pipe.scheduler, guidance
        self.name = check_solver(self.scheduler)
        self.recorded = Recorded(self._look)
        self.travel = Travel(self.scheduler, guidance)
        self.moved: Moved | None = None  # of the step that the scheduler takes
        self._decode, self._vae = decode, vae
        self._decoders: dict[Any, Decode] = {}
        self._solvers: dict[Any, Solver] = {}
        self._known: set[Any] = set()  # shapes that were tried
        self._asked, self._latents = Asked(), None
        self._taken: Counter[int] = Counter()  # by step, how often it was
        self._key: Tensor | None = None

    # --- told by the pipeline ------------------------------------------------------------------

    @contextmanager
    def call(self, asked: Asked) -> Iterator[None]:
        """One call of the pipeline."""
        if self.pipe.scheduler is not self.scheduler:
            raise ValueError(
                "pipe.scheduler was exchanged inside the block, so that nothing would be steered: "
                "exchange it before steer(pipe, ...)."
            )
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                "the pipeline is called under torch.inference_mode, which makes no gradients: use "
                "torch.no_grad, or nothing, as pipelines turn gradients off themselves."
            )
        self._asked, self._latents = asked, None
        self._taken.clear()
        try:
            yield
        finally:
            self.recorded.end()
            self.travel.end()
            self._asked, self._latents, self._key = Asked(), None, None
            self._solvers.clear()
        if not self._taken:
            raise ValueError(
                f"{type(self.pipe).__name__} took no step of its scheduler: nothing was steered."
            )

    def grid_set(self) -> None:
        """The scheduler has its grid."""
        self._solvers.clear()
        self._taken.clear()
        self._key = None
        self.recorded.records = self.guidance.differentiates
        self.travel.lengthen()

    def latents_made(self, latents: Any) -> None:
        """The pipeline has made the states that it starts from."""
        latents = latents[0] if isinstance(latents, tuple) else latents
        self._latents = latents if isinstance(latents, Tensor) else None

    def _look(self, module: nn.Module, given: Tensor) -> None:
        """Before the first network call: try the guidance, without the network.

        Raises:
            TypeError, ValueError: a reward of the wrong shape, or without gradient, or one that
                does not suit what it is asked about; a guidance that would do nothing.
        """
        config: Any = getattr(module, "config", {})
        plain = config.get("out_channels") in (None, given.shape[1], 2 * given.shape[1])
        start = self._latents
        if start is None and plain:  # of what is doubled, one entry of each
            start = given[: len(self._asked.prompts or given)]
        if start is None or not holds_copies(given, start):
            return
        solver = self._solver(start, self._asked.eta)
        if start.shape in self._known:
            return
        self._known.add(start.shape)
        i = int(getattr(self.guidance, "window", _ALWAYS)[0] * solver.process.steps)
        x = start.detach().float() / solver.scale(0)
        try:
            with torch.no_grad():
                self._propose(solver, i, x, x, lambda x, i, row: x)
        except (TypeError, ValueError):
            raise
        except Exception:
            return  # noise may be at fault, as it is no item: the run will see

    # --- a step --------------------------------------------------------------------------------

    def step(self, base: type, call: inspect.BoundArguments) -> Any:
        """The pipeline steps: the scheduler's own step, from where the guidance moves the state."""
        try:
            with torch.no_grad(), self.travel.own_grid():
                return self._step(base, call)
        finally:
            self.recorded.end()

    def _step(self, base: type, call: inspect.BoundArguments) -> Any:
        given = call.arguments
        output, sample = given["model_output"], given["sample"]
        if output.shape != sample.shape:
            raise ValueError(
                f"the network puts out {list(output.shape)} for states {list(sample.shape)}: "
                "what it says of a state beside its guess is not supported."
            )
        solver = self._solver(sample, given.get("eta"))
        i = solver.step(self.scheduler, given["timestep"])
        if i is None:
            given["model_output"] = output.detach()
            return base.step(*call.args, **call.kwargs)
        self._taken[i] += 1
        again = self.travel.again(solver, i, self._taken)
        n = self._asked.count(sample)
        with torch.enable_grad():  # which what was recorded needs
            own = output[:n]
        d = self._move(solver, i, own, sample[:n])
        d = d.repeat(len(sample) // n, *[1] * (d.dim() - 1))
        given["model_output"] = solver.output(i, output.detach(), d)
        given["sample"] = solver.sample(i, sample, d)
        index = getattr(self.scheduler, "_step_index", None)
        self.moved = Moved(output.detach(), sample, solver.along(i) * d)
        stepped = base.step(*call.args, **call.kwargs)
        self.moved = None
        window, following = getattr(self.guidance, "window", _ALWAYS), torch.tensor([i + 1])
        follows = again or bool(inside(window, following, solver.process.steps))
        self.recorded.records = self.guidance.differentiates and follows
        if not again:
            return stepped
        key = child_key(self._step_key(i, sample), 1)
        return self.travel.back(solver, i, stepped, index, key)

    def _move(self, solver: Solver, i: int, output: Tensor, sample: Tensor) -> Tensor:
        """How far the guidance moves the clean guesses of these states: [N, *D] float32."""
        x = sample.float() / solver.scale(i)
        time = solver.process.time(torch.full((len(x),), i, device=x.device))
        clean = solver.to_clean(output.detach().float(), x, time)

        def denoise(asked: Tensor, _: Tensor, row: Tensor) -> Tensor:
            if asked is x:
                return clean
            row = row.to(x.device)
            if not torch.equal(asked.detach(), x[row]):
                raise NotImplementedError(
                    f"{type(self.guidance).__name__} asks the network about other states than the "
                    "pipeline's: use it in sample(from_pipeline(pipe, ...), guidance=...)."
                )
            if not asked.requires_grad:
                return clean[row]
            return solver.to_clean(self.recorded.output(output, asked, row, x), asked, time[row])

        proposal = self._propose(solver, i, x, sample, denoise)
        if proposal.failed.any():
            which = proposal.failed.nonzero().flatten().tolist()
            reward = name_of(getattr(self.guidance, "reward", None))
            raise ValueError(
                f"reward {reward} or its gradient is not finite {self._where(solver, i)}, for "
                f"items {which} of {len(x)}."
            )
        carry = float(solver.process.carry(torch.tensor([i])))
        return self._shift(solver, i, proposal) / carry

    def _propose(
        self, solver: Solver, i: int, x: Tensor, sample: Tensor, denoise: Callable
    ) -> Proposal:
        prompts = self._asked.prompts_of(len(x))
        reward = getattr(self.guidance, "reward", None)
        name, where = type(self.guidance).__name__, f" {self._where(solver, i)}"

        def scored(clean: Tensor, row: Tensor) -> Tensor:
            asked = [prompts[r] for r in row.tolist()]
            return score(reward, clean, asked, self._decode_as(sample), guidance=name, where=where)

        at, row = torch.full((len(x),), i, device=x.device), torch.arange(len(x))
        key = self._step_key(i, x)
        step = Step(x, at, row, key, 1.0, solver.process, reward, denoise, scored)
        return getattr(self.guidance, "once", self.guidance.propose)(step)

    def _shift(self, solver: Solver, i: int, proposal: Proposal) -> Tensor:
        """How far the next states go: [N, *D], with noise where the guidance adds some."""
        base, guided = proposal.base, proposal.guided
        assert isinstance(base, NormalTransition)
        assert isinstance(guided, NormalTransition)
        shift = guided.mean - base.mean
        if torch.equal(guided.std, base.std):
            return shift
        own = guided.std.square() - base.std.square()
        name = type(self.guidance).__name__
        if (own < 0).any():
            raise ValueError(
                f"{name} draws less noise than {self.name}Scheduler {self._where(solver, i)}: give "
                "the pipeline a deterministic scheduler, or eta=0."
            )
        if not solver.first_order:
            raise ValueError(
                f"{name} draws noise, which {self.name}Scheduler, a solver of higher order, would "
                "take for a direction: give the pipeline one of first order, such as DDIM, Euler "
                "or FlowMatchEuler."
            )
        return NormalTransition(shift, own.sqrt()).sample(self._step_key(i, shift))

    # --- what it needs -------------------------------------------------------------------------

    def _solver(self, sample: Tensor, eta: Any) -> Solver:
        eta = eta_of(self.scheduler, self.name, eta)
        about = eta, sample.shape[1:], sample.device
        if about not in self._solvers:
            with self.travel.own_grid():
                solver = Solver.of(self.scheduler, about[1], eta, sample.device)
            self._check_effect(solver)
            self._solvers[about] = solver
        return self._solvers[about]

    def _check_effect(self, solver: Solver) -> None:
        """ValueError if the guidance would do nothing in a chain like this."""
        steps, window = solver.process.steps, getattr(self.guidance, "window", _ALWAYS)
        name, active = type(self.guidance).__name__, inside(window, torch.arange(steps), steps)
        if not active.any():
            raise ValueError(
                f"window={window} of {name} holds none of {steps} steps, so that nothing would be "
                "steered: widen it, or take more steps."
            )
        if getattr(self.guidance, "needs_noise", False) and not solver.draws[active].any():
            raise ValueError(
                f"{name} moves a step in proportion to the noise it draws, and {self.name}Scheduler "
                f"draws none in the window of {steps} steps, so that nothing would be steered: call "
                "the pipeline with eta > 0, give it a scheduler that takes eta or draws noise "
                "(DDIM, DDPM, EulerAncestralDiscrete), or use another guidance, such as DPS."
            )

    def _step_key(self, i: int, x: Tensor) -> Tensor:
        if self._key is None or len(self._key) != len(x):
            self._key = self._asked.keys(len(x), x.device)
        return child_key(child_key(self._key, i), self._taken[i])

    def _decode_as(self, sample: Tensor) -> Decode:
        """How states are decoded of which this is one; found when it is first asked for."""

        def decode(clean: Tensor) -> Any:
            about = sample.shape[1:], self._asked.height, self._asked.width
            if self._decode is None and about not in self._decoders:
                self._decoders[about] = decoding(self.pipe, self._asked, sample, self._vae)
            return (self._decode or self._decoders[about])(clean)

        return decode

    def _where(self, solver: Solver, i: int) -> str:
        return f"at step {i} of {solver.process.steps}"
