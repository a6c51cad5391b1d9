"""Any diffusers pipeline as a model: driven unmodified, one step of its own loop at a time."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from steering.core import Model
from steering.gaussian import ToClean, over_data
from steering.pipelines.inputs import Inputs
from steering.pipelines.latent import PIXELS_AT_ONCE
from steering.pipelines.opening import CannotDriveError, Grid, Opening
from steering.pipelines.oracle import Oracle
from steering.pipelines.request import Request
from steering.pipelines.schedulers import check_scheduler, read_grid
from steering.pipelines.visit import Step


def build(pipe: Any, request: Request) -> Model:
    """The pipeline as a model, after it has passed its tests (`Opening`).

    Raises:
        CannotDriveError: it has not; says which.
        ValueError: an argument or a scheduler that is not supported.
    """
    if not hasattr(pipe, "scheduler"):
        raise CannotDriveError(f"{type(pipe).__name__} cannot be driven: it has no scheduler.")
    check_scheduler(pipe.scheduler)
    request.refuse("cfg", because="this pipeline is driven: say what you wish in its own arguments")
    inputs, name = Inputs.of(pipe, request), request.describe(pipe)
    try:
        return replace(_opened(Oracle(pipe, inputs), request), name=name)
    except CannotDriveError as error:
        raise CannotDriveError(f"{type(pipe).__name__} cannot be driven: {error}.") from error


def _opened(oracle: Oracle, request: Request) -> Model:
    conditions = range(1 if request.prompts is None else len(request.prompts))
    try:
        look = [oracle.encode(r) for r in conditions]
        opened = oracle.open(0)
    except Exception as error:
        raise CannotDriveError(f"its first step failed, {type(error).__name__}: {error}") from error
    first, scheduler = opened.first, opened.scheduler
    if first.output.shape != first.sample.shape:
        raise CannotDriveError(
            f"its network puts out {tuple(first.output.shape)} for states of shape "
            f"{tuple(first.sample.shape)}, as with a learned variance"
        )
    process, prediction = read_grid(scheduler, tuple(first.sample.shape[1:]), eta=request.eta)
    if opened.cut or (opened.from_image and process.alpha[0] > 1e-6):
        raise CannotDriveError(
            "it starts from a noised image, and only what starts from noise is supported"
            + (" (call={'strength': 1.0} starts from noise)" if prediction == "flow" else "")
        )
    grid = Grid.of(scheduler, process)
    process = process.to(first.sample.device)
    opening = Opening.of(oracle, grid, first, process.prior_std)
    opening = opening.replay()
    # what is asked for in `call`, or a guidance object, may hold at some steps only
    T = process.steps
    every = bool(request.call or oracle.guiders)
    steps = range(T) if every else sorted({k * (T - 1) // 4 for k in range(5)})
    # what another guidance scale turns on may cost more, and hold at other steps
    scales = [oracle.inputs.scale(r) for r in conditions]
    firsts = {scale: scales.index(scale) for scale in scales}
    alone = {scale: opening.alone(list(steps), r) for scale, r in firsts.items()}
    guided = any((scale or 0.0) > 1 for scale in scales)
    if guided and not _heeds_its_scale(opening, alone[scales[0]][0]):
        raise CannotDriveError(
            "guidance_scale is given, but makes no difference to what its network says (some take "
            "another argument, as in call={'true_cfg_scale': 4.0}): leave it out"
        )
    batches = opening.batches([0, 0])
    if not batches:  # some want an image of its own for every state
        oracle.inputs.repeats = True
        oracle.inputs.repeats = batches = opening.batches([0, 0])
    mixes = batches and all(
        (not r or opening.batches([r, r])) and opening.mixes(alone[scale], r)
        for scale, r in firsts.items()
    )
    if batches and not all(opening.batches(group) for group in _mates(oracle, look)):
        look = list(conditions)  # no two conditions in one call
    cost = {scale: opening.cost(alone[scale], r) for scale, r in firsts.items()}
    denoiser = DrivenDenoiser(
        oracle,
        ToClean(process, prediction),
        grid,
        first.sample.dtype,
        tuple(zip(look, scales, strict=True)),
        torch.stack([cost[scale] for scale in scales]),
        batches,
        mixes,
    )
    decoder = DrivenDecoder.of(oracle, opening.x[:1], batches)
    return Model(
        denoiser,
        process,
        decoder,
        preview=request.preview_by(lambda vae: replace(decoder, vae=vae)),
        prompts=request.prompts or (None,),
        device=first.sample.device,
        about=_about(oracle, denoiser, decoder),
        offloaded=any(hasattr(part, "_hf_hook") for part in oracle.pipe.components.values()),
    )


def _heeds_its_scale(opening: Opening, said: Step) -> bool:
    """Does another guidance scale, which is above 1, change what the pipeline says?"""
    oracle, own = opening.oracle, opening.oracle.inputs
    assert own.scales is not None
    oracle.inputs = replace(own, scales=tuple(scale + 3 for scale in own.scales))
    try:
        return not torch.equal(opening.alone([0], 0)[0].output, said.output)
    finally:
        oracle.inputs = own


def _mates(oracle: Oracle, look: list[Any]) -> list[list[int]]:
    """Conditions that would share calls: a few different ones of each of a few kinds."""
    by_kind: dict[Any, dict[Any, int]] = defaultdict(dict)
    for row, kind in enumerate(look):
        by_kind[kind, oracle.inputs.scale(row)].setdefault(oracle.inputs.asked(row), row)
    groups = [list(rows.values())[:4] for rows in by_kind.values() if len(rows) > 1]
    return groups[:4]


def _about(oracle: Oracle, denoiser: DrivenDenoiser, decoder: DrivenDecoder) -> str:
    """What the tests found, in a line."""
    kept_apart = {
        "conditions": denoiser.batches and len(set(denoiser.kind)) > 1,
        "steps": denoiser.batches and not denoiser.mixes,
        "states": not denoiser.batches,
    }
    apart = [what for what, is_so in kept_apart.items() if is_so]
    return ", ".join(
        [
            "driven, states " + ("in place of its noise" if oracle.injected else "as latents="),
            "one call for all"
            if not apart
            else f"a call each for {' and '.join(apart)} that differ",
            "decoded by its own tail" + (", one network call each" if decoder.turns else ""),
        ]
    )


@dataclass(frozen=True, eq=False)
class DrivenDenoiser:
    """Guesses the clean end by asking a pipeline.

    Args:
        oracle: the pipeline.
        to_clean: turns its output into a clean guess.
        grid: its own.
        dtype: of its states.
        kind: [R] conditions that may share a call have the same.
        cost: [R, T] int64 network rows of one state.
        batches: may a call hold more than one state?
        mixes: may they be at different steps?
    """

    oracle: Oracle
    to_clean: ToClean
    grid: Grid
    dtype: torch.dtype
    kind: tuple[Any, ...]
    cost: Tensor
    batches: bool
    mixes: bool

    @property
    def fills(self) -> bool:
        """May a call be filled up? It costs nothing only where all states share one."""
        return self.batches and self.mixes and len(set(self.kind)) == 1

    def rows(self, t: Tensor, row: Tensor) -> Tensor:
        return self.cost[row, self.to_clean.step(t).cpu()]

    def __call__(self, x: Tensor, t: Tensor, row: Tensor) -> Tensor:
        steps, rows = self.to_clean.step(t).cpu(), row.tolist()
        scale = over_data(self.grid.scale[steps].to(x.device), x)
        states, steps = (x * scale).to(self.dtype), steps.tolist()
        calls: dict[Any, list[int]] = defaultdict(list)
        for k, (i, r) in enumerate(zip(steps, rows, strict=True)):
            calls[self.kind[r], 0 if self.mixes else i, 0 if self.batches else k].append(k)
        outputs = [
            self._ask(states[places], [rows[k] for k in places], [steps[k] for k in places])
            for places in calls.values()
        ]
        order = torch.tensor([k for places in calls.values() for k in places], device=x.device)
        return self.to_clean(torch.cat(outputs)[order.argsort()], x, t)

    def _ask(self, x: Tensor, rows: list[int], steps: list[int]) -> Tensor:
        step = self.oracle.query(x, rows, self.grid.at(steps))
        planned = int(self.cost[rows, steps].sum())
        if step.rows != planned:
            raise RuntimeError(
                f"the pipeline's network took {step.rows} rows at steps {sorted(set(steps))} where "
                f"{planned} were planned: it is not the pipeline that was opened."
            )
        return step.output.float()


@dataclass(frozen=True, eq=False)
class DrivenDecoder:
    """Images or clips of clean states by the pipeline's own tail, a few at a time, in [0, 1].

    A state that is not finite becomes nan as a whole. Differentiable, as `images_in_unit_range`
    is, but for pipelines that clamp without an image processor, as those of pixels do. What the
    pipeline does behind its autoencoder, such as checking for safety, is done.

    Args:
        oracle: the pipeline.
        dtype: of its states.
        turns: its loop turns once, in vain, because it cannot be left out.
        at_once: states in one call.
        vae: an autoencoder to put in place of the pipeline's own; None leaves it.
    """

    oracle: Oracle
    dtype: torch.dtype
    turns: bool
    at_once: int
    vae: Any = None

    @staticmethod
    def of(oracle: Oracle, x: Tensor, batches: bool) -> DrivenDecoder:
        """A decoder that works for states like x [1, *D]; one by one where they do not share calls.

        Raises:
            CannotDriveError: there is none.
        """
        error: Exception | None = None
        for turns in (False, True):
            try:
                item = items_of(oracle.decode(x, 0, turns=turns))
            except Exception as failure:
                error = failure
                continue
            pixels = item[0, 0].numel() * (item.shape[1] if item.dim() == 5 else 1)
            at_once = max(1, PIXELS_AT_ONCE // pixels) if batches else 1
            return DrivenDecoder(oracle, x.dtype, turns, at_once)
        raise CannotDriveError(f"it does not decode, {type(error).__name__}: {error}") from error

    def __call__(self, x: Tensor) -> Tensor:
        """Images [N, C, H, W] or clips [N, F, C, H, W] float32 of clean states x [N, *D]."""
        parts = x.to(self.dtype).split(self.at_once)
        items = torch.cat([items_of(self._tail(part)) for part in parts])
        finite = over_data(x.flatten(1).isfinite().all(1), items)
        return torch.where(finite, items, torch.nan)

    def _tail(self, x: Tensor) -> Any:
        return self.oracle.decode(x, 0, turns=self.turns, vae=self.vae)


def items_of(found: Any) -> Tensor:
    """What pipelines put out for output_type="pt": [N, C, H, W] or [N, F, C, H, W] float32."""
    if isinstance(found, list):
        found = torch.stack(found)
    if not isinstance(found, Tensor):
        found = torch.as_tensor(found).movedim(-1, -3)  # arrays have channels last
    if found.dim() not in (4, 5):
        raise CannotDriveError(f"it puts out items of shape {tuple(found.shape)}")
    return found.float()
