"""FlowChef's edit: guidance outside a mask, and inside it a pull towards the source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor

from steering.core import Model, Proposal, Step
from steering.digest import digest
from steering.editing.states import check_shape, check_state, of_rows
from steering.gaussian import GaussianProcess, NormalTransition, over_data
from steering.guidance.bend import Window, carried, check_inner, check_window, gaussian, inside
from steering.guidance.rules import RuleName, check_rule, check_step, rule_for

_TASKS = (
    *("change-object", "add", "remove", "attribute", "pose"),
    *("colour", "material", "background", "style"),
)
# Table 8, by task in this order: rate, inner steps, steps of full source, scale, last step
_TABLE: dict[str, dict[str, tuple[float, ...]]] = {
    "flux": {
        "rate": (0.4, 0.5, 0.5, 0.5, 0.5, 0.4, 0.5, 0.5, 0.4),
        "inner": (1, 1, 1, 1, 1, 1, 1, 1, 1),
        "full": (5, 5, 0, 2, 5, 3, 5, 0, 5),
        "scale": (4.5, 4.5, 4.5, 4.5, 7.5, 10, 4.5, 0, 10),
        "last": (30,) * 9,  # the table has none: all of them
    },
    "instaflow": {
        "rate": (0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 1.0, 0.5),
        "inner": (1, 1, 3, 2, 2, 2, 2, 4, 1),
        "full": (30, 30, 0, 10, 10, 20, 20, 0, 30),
        "scale": (2, 2, 2, 4.5, 8, 8, 4, 3, 6),
        "last": (50, 50, 50, 50, 20, 30, 50, 50, 30),
    },
}
_STEPS = {"flux": 30, "instaflow": 50}
# The published rates as the plain step of a *sum* of squares, which removes twice this share of a
# residual. FLUX: plain descent on 1000 times the mean square of 4096 x 64 numbers, so that rate .5
# removes .4 % in each inner step. InstaFlow: Adam on 1e-5 times the mean square of 4 x 64 x 64
# numbers. Its gradients, about 1e-9, lie below Adam's epsilon of 1e-8, so that it divides by that
# alone and acts as plain descent: rate .5 removes 6 %, to first order, and so it is given here.
_UNIT = {"flux": 1000 / (4096 * 64), "instaflow": 1e-5 / (4 * 64 * 64) / 1e-8}


def _preset(model: str, task: int) -> dict[str, Any]:
    row, steps = {name: values[task] for name, values in _TABLE[model].items()}, _STEPS[model]
    return {
        "scale": float(row["scale"]),
        "step": row["rate"] * _UNIT[model],
        "rule": "plain",
        "inner": int(row["inner"]),
        "full_source": row["full"] / steps,
        "window": (0.0, row["last"] / steps),
        "steps": steps,
    }


# (model, task) -> the arguments of FlowChefEdit, and "steps", which is one of from_pipeline
PUBLISHED: dict[tuple[str, str], dict[str, Any]] = {
    (model, task): _preset(model, n) for model in _TABLE for n, task in enumerate(_TASKS)
}


@dataclass(frozen=True, eq=False)
class FlowChefEdit:
    """Changes a source image where a mask lets it, and keeps it elsewhere: Algorithm 3 of FlowChef.

        v = v_edit + (1 - M) · (v_edit - v_base) · scale           M = 1 where the source is kept

    v_edit is the walk's own condition's, v_base that of another one, which describes the source or
    what is not wanted. In clean guesses that is the same sum. Then the guess c, the network's
    output held, is moved `inner` times towards the source: along the gradient of -|c - source|²
    in the first steps (`full_source`), of -|M · (c - source)|² after them.

    Conditions that are the base of others are walked, too. With themselves as base they make one
    network call a step, the others two, in one batch; what is spent is shared out among all.
    Conditions keep guidance scales of their own in these calls: the published edits have none
    besides `scale`.

    `FlowChefEdit.published("flux", "add", ...)` has the paper's settings by task. The base of the
    weight is the model's own kernel under the walk's condition, so the density is
    known. On a chain without noise say `weights="none"`.

    Args:
        source: clean state of the image, [*D], or one per condition, [R, *D]: model.encode(image).
        mask: M, 0..1: what broadcasts to [*D], or one such per condition, [R, ...].
        base: condition of v_base, of all; or a mapping {condition: its base}, where those that it
            lacks have none, as if scale were 0.
        scale: of the difference, >= 0. 0 needs no base, and takes one call a step.
        step: how far towards the source, in units of the rule. For "polyak" the share of the
            residual to remove in each inner step: 1 arrives there at once.
        rule: see `steering.guidance.rules`.
        inner: moves in each step.
        full_source: share of the steps, from the noise, in which all is pulled, whatever M is.
        window: (start, stop), shares of the steps in which there is a pull.

    Raises:
        TypeError, ValueError: an argument that cannot be; before the first network row, when
            `source`, `mask` or `base` do not fit the model, or a base costs more than its edit.

    Paper: Patel et al., "FlowChef: Steering of rectified flow models for controlled generations",
    arXiv 2412.00100, Algorithm 3 and Table 8.
    """

    source: Tensor  # kept in float32, like `mask`
    mask: Tensor
    base: int | Mapping[int, int] | None = None
    scale: float = 0.0
    step: float = 0.5
    rule: RuleName = "polyak"
    inner: int = 1
    full_source: float = 0.0
    window: Window = (0.0, 1.0)
    told: str = field(init=False)  # records know the tensors and the base by it

    exact = True
    differentiates = False
    least_squares = True  # what it descends is, so that every rule has a meaning

    def __post_init__(self) -> None:
        mask = check_state("mask", self.mask)
        if mask.min() < 0 or mask.max() > 1:
            raise ValueError("mask has values outside of 0..1: give 1 where the source is kept.")
        object.__setattr__(self, "source", check_state("source", self.source))
        object.__setattr__(self, "mask", mask)
        if any(type(row) is not int for row in _named(self.base)):
            raise TypeError(f"base={self.base!r}: give a condition's index, or a mapping of them.")
        check_step(self.step)
        check_rule(self.rule)
        check_window(self.window)
        if not _is_number(self.scale) or not 0 <= self.scale < float("inf"):
            raise ValueError(f"scale={self.scale!r}: give a finite number >= 0.")
        if self.scale and self.base is None:
            raise ValueError(f"scale={self.scale} without base: give the condition of v_base.")
        check_inner(self.inner)
        if not _is_number(self.full_source) or not 0 <= self.full_source <= 1:
            raise ValueError(f"full_source={self.full_source!r}: give a share of the steps, 0..1.")
        base = dict(self.base) if isinstance(self.base, Mapping) else self.base
        told = f"source #{digest(self.source)}, mask #{digest(mask)}, base {base}"
        object.__setattr__(self, "told", told)

    @classmethod
    def published(
        cls,
        model: Literal["flux", "instaflow"],
        task: str,
        *,
        source: Tensor,
        mask: Tensor,
        base: int | Mapping[int, int] | None = None,
    ) -> FlowChefEdit:
        """The paper's settings for a task: change-object, add, remove, attribute, pose, colour,
        material, background or style. They are meant for a chain of 30 (flux) or 50 (instaflow)
        steps, `steering.editing.PUBLISHED[model, task]["steps"]`.

        Raises:
            ValueError: no model or task has this name.
        """
        if (model, task) not in PUBLISHED:
            raise ValueError(
                f"model={model!r}, task={task!r} is not published: models are "
                f"{', '.join(_TABLE)}, tasks {', '.join(_TASKS)}."
            )
        settings = {k: v for k, v in PUBLISHED[model, task].items() if k != "steps"}
        return cls(source, mask, base, **settings)

    def rows(self, i: Tensor, steps: int) -> Tensor:
        return torch.full_like(i, 2 if self.scale else 1)

    def check(self, model: Model) -> None:
        """ValueError unless source, mask and base fit the model; called before it is run."""
        process, count = model.process, len(model.prompts)
        if not isinstance(process, GaussianProcess):
            return  # the first step says so
        check_shape("source", self.source, process.shape, count)
        check_shape("mask", self.mask, process.shape, count, broadcasts=True)
        for row in _named(self.base):
            if not 0 <= row < count:
                raise ValueError(f"base names condition {row}, and the model has {count}, from 0.")
        if not self.scale:
            return
        time = process.time(torch.arange(process.steps, device=model.device))
        for row in range(count):
            edit, base = (
                model.denoiser.rows(time, torch.full((process.steps,), r))
                for r in (row, int(self._base(torch.tensor([row]))))
            )
            if (base > edit).any():
                raise ValueError(
                    f"base of condition {row} takes {int(base.max())} network rows a call, and the "
                    f"condition {int(edit.max())}: give its base no guidance scale of its own "
                    "where the condition has none."
                )

    def propose(self, step: Step) -> Proposal:
        process, i, x = gaussian(step), step.i, step.x
        mask, source = (
            of_rows(value.to(x.device), step.row, x.shape[1:]) for value in (self.mask, self.source)
        )
        edit, clean = self._guesses(step, mask)
        own = process.transition(x, i, edit)
        bent = process.transition(x, i, clean)
        sigma, moved = process.sigma[i].float(), clean
        full = inside((0.0, self.full_source), i, process.steps)
        held = torch.where(over_data(full, x), 1.0, mask)
        held = held * over_data(inside(self.window, i, process.steps), x)
        move = rule_for(self.rule, self, self.step)
        for _ in range(self.inner):
            away = held * (moved - source)
            value = -away.square().flatten(1).sum(1)
            moved = moved + move(value, -2 * held * away, sigma)
        mean = bent.mean + carried(step, clean, moved - clean)
        failed = ~moved.flatten(1).isfinite().all(1)
        return Proposal(own, NormalTransition(mean, own.std), edit, failed)

    def _guesses(self, step: Step, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Clean guesses [N, *D] under the walks' conditions, and combined with their bases'."""
        base = self._base(step.row)
        other = (base != step.row).nonzero().flatten()  # [K] on the CPU
        if not self.scale or not len(other):
            edit = step.denoise(step.x, step.i, step.row)
            return edit, edit
        pick = other.to(step.x.device)
        both = step.denoise(
            torch.cat([step.x, step.x[pick]]),
            torch.cat([step.i, step.i[pick]]),
            torch.cat([step.row, base[other]]),
        )
        edit, against = both.split([len(step), len(other)])
        changed = (
            edit[pick] + (1 - mask.expand_as(edit)[pick]) * (edit[pick] - against) * self.scale
        )
        return edit, edit.index_copy(0, pick, changed)

    def _base(self, row: Tensor) -> Tensor:
        """The conditions [N] that v_base is asked under; a condition's own where it has none."""
        if isinstance(self.base, Mapping):
            return torch.tensor([self.base.get(r, r) for r in row.tolist()], dtype=row.dtype)
        return row if self.base is None else torch.full_like(row, self.base)


def _named(base: Any) -> list[Any]:
    """What is named as a condition."""
    if isinstance(base, Mapping):
        return [row for pair in base.items() for row in pair]
    return [] if base is None else [base]


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
