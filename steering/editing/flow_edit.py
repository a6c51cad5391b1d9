"""FlowEdit: an edit without mask or inversion, as a model made of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from steering.core import Denoiser, Model
from steering.digest import digest
from steering.editing.states import check_shape, check_state, of_rows
from steering.gaussian import GaussianProcess, Kernel, ToClean, over_data
from steering.noise import child_key, normal, root_key


def flow_edit(
    model: Model,
    source: Tensor,
    *,
    from_row: int | Sequence[int],
    to_row: int | Sequence[int],
    start: float = 0.34,
    averages: int = 1,
    seed: int = 0,
) -> Model:
    """The model that edits images: its walks lead from a source to what a condition asks for.

    A state z begins at the source x_s. At each level sigma, with new noise n,

        z_s = (1 - sigma) · x_s + sigma · n        z_t = z_s + (z - x_s)
        z'  = z + (sigma' - sigma) · (v_t(z_t) - v_s(z_s))

    v_s under the condition that describes the source, v_t under the one asked for. On a flow
    v(x) = (x - c(x)) / sigma, with c the clean guess, so that the difference is (z - C) / sigma,
    C = x_s + c_t(z_t) - c_s(z_s), and z' Euler's step of a flow from z whose clean guess is C.
    So it is a `Model` as any other, of one condition an edit, without noise of its own: every
    sampler runs it, a call costs what its calls under both conditions cost, and C is what a look
    ahead sees. (All walks begin in one place, which the first step knows by itself.)

    The noise is keyed by (seed, edit, step): walks of one edit are all the same. For several
    results of one image give its rows repeatedly, `to_row=[3] * 8`.

    Published for SD3: 50 steps, start=17/50, guidance_scale 3.5 of the source's row and 13.5 of the
    target's; for FLUX.1-dev: 28 steps, start=4/28, 1.5 and 5.5. The paper's plain sampling of the
    last steps (n_min), which it does not use on images, is left out.

    Args:
        model: a rectified flow. How its own steps draw noise plays no part.
        source: clean state of the image, [*D], or one per edit, [R, *D]: model.encode(image).
        from_row, to_row: conditions of the model that describe the source and what is asked for;
            one for all edits, or one per edit.
        start: share of the steps left out at the noisy end. The larger, the nearer to the source.
        averages: noises to average over in each step; the cost is multiplied by it.
        seed: of the noise.

    Raises:
        TypeError, ValueError: a model that is no flow, or an argument that cannot be, by name.

    Paper: Kulikov et al., "FlowEdit: inversion-free text-based editing using pre-trained flow
    models", arXiv 2412.08629.
    """
    Model.check(model)
    chain = model.process
    if not isinstance(chain, GaussianProcess) or not chain.straight:
        raise ValueError(f"model={model.name} is no rectified flow, and this edit is for those.")
    skipped = _skipped(start, chain.steps)
    for name, value, least in (("averages", averages, 1), ("seed", seed, None)):
        if type(value) is not int or (least is not None and value < least):
            raise ValueError(f"{name}={value!r}: give a whole number{' >= 1' if least else ''}.")
    source = check_state("source", source)
    several = {"from_row": from_row, "to_row": to_row}
    counts = {name: len(v) for name, v in several.items() if isinstance(v, Sequence)}
    if source.dim() > len(chain.shape) and len(source) > 1:
        counts["source"] = len(source)
    edits = max(counts.values(), default=1)
    if any(count != edits for count in counts.values()):
        given = ", ".join(f"{name} has {count}" for name, count in counts.items())
        raise ValueError(f"{given} entries: give one for each edit, or one for all.")
    check_shape("source", source, chain.shape, edits)
    before, after = (_rows(k, v, edits, len(model.prompts)) for k, v in several.items())
    source = source.to(model.device)
    process = _from_source(chain, skipped)
    rows = digest(torch.stack([before, after]))
    told = f"source=#{digest(source)}, rows=#{rows}, start={skipped}/{chain.steps}"
    return replace(
        model,
        denoiser=FlowEditDenoiser(model.denoiser, process, source, before, after, averages, seed),
        process=process,
        prompts=tuple(model.prompts[r] for r in after.tolist()),
        name=f"flow_edit({model.name}, {told}, averages={averages}, seed={seed})",
        about=f"{model.about}; edits {edits} by FlowEdit" if model.about else "edits by FlowEdit",
    )


@dataclass(frozen=True, eq=False)
class FlowEditDenoiser:
    """The clean guess C of `flow_edit`; in the first step, the state after it.

    Args:
        denoiser: of the flow.
        process: the chain of the edit.
        source: [*D], or [1 or R, *D].
        from_row, to_row: [R] int64 on the CPU, conditions of `denoiser`.
        averages: noises in a step.
        seed: of the noise.
    """

    denoiser: Denoiser
    process: GaussianProcess
    source: Tensor
    from_row: Tensor
    to_row: Tensor
    averages: int
    seed: int

    @property
    def fills(self) -> bool:
        """Does it gain by calls that are filled up? As its denoiser does."""
        return getattr(self.denoiser, "fills", True)

    def rows(self, t: Tensor, row: Tensor) -> Tensor:
        both = (self.denoiser.rows(t, of[row]) for of in (self.from_row, self.to_row))
        return self.averages * sum(both, torch.zeros_like(row))

    def __call__(self, x: Tensor, t: Tensor, row: Tensor) -> Tensor:
        i = self._levels.step(t)
        sigma = over_data(self.process.sigma[i].float(), x)
        source = of_rows(self.source, row, x.shape[1:])
        first = over_data(i == 0, x)
        ahead = torch.where(first, 0.0, x - source)  # z - x_s
        key = root_key(self.seed, row).to(x.device)
        rows, times = torch.cat([self.from_row[row], self.to_row[row]]), torch.cat([t, t])
        change = torch.zeros_like(x)  # c_t(z_t) - c_s(z_s)
        for k in range(self.averages):
            noise = normal(child_key(key, i * self.averages + k), x.shape[1:])
            z_s = (1 - sigma) * source + sigma * noise
            c_s, c_t = self.denoiser(torch.cat([z_s, z_s + ahead]), times, rows).chunk(2)
            change = change + (c_t - c_s) / self.averages
        way = torch.where(first, 1 - over_data(self.process.sigma[i + 1].float(), x) / sigma, 1.0)
        return source + way * change

    @cached_property
    def _levels(self) -> ToClean:
        """Knows the step that a time belongs to."""
        return ToClean(self.process, "sample")


def _from_source(chain: GaussianProcess, skipped: int) -> GaussianProcess:
    """Euler's steps without the first `skipped`. The first one left forgets where it begins: a
    prior knows no condition, and so not the source, which is its denoiser's to know."""
    sigma = chain.sigma[skipped:]
    on_x = sigma[1:] / sigma[:-1]
    on_clean = 1 - on_x
    on_x[0], on_clean[0] = 0.0, 1.0
    none = torch.zeros_like(on_x)
    kernel = Kernel(on_x, on_clean, none, none)
    times, alpha = chain.times[skipped:], chain.alpha[skipped:]
    return GaussianProcess(chain.shape, times, alpha, sigma, kernel, prior_std=0.0)


def _skipped(start: float, steps: int) -> int:
    """How many steps a share of them is."""
    if type(start) in (int, float) and 0 <= start < 1:
        skipped = round(start * steps)
        if skipped < steps:
            return skipped
    raise ValueError(f"start={start!r}: give a share of {steps} steps, from 0, that leaves some.")


def _rows(name: str, given: int | Sequence[int], edits: int, conditions: int) -> Tensor:
    """[R] conditions, one for each edit."""
    rows = list(given) if isinstance(given, Sequence) else [given] * edits
    for row in rows:
        if type(row) is not int or not 0 <= row < conditions:
            raise ValueError(
                f"{name} has {row!r}: give conditions, ints from 0 to {conditions - 1}."
            )
    return torch.tensor(rows)
