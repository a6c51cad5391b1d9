"""One network, a table of conditions built once, and classifier-free guidance in one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from steering.cfg import ClassifierFree, Scale
from steering.core import Model
from steering.gaussian import GaussianProcess, Prediction, ToClean
from steering.pipelines.request import Request

Conditions = dict[str, Tensor]  # each [R, ...], one row per condition, on the model's device
Network = Callable[[Tensor, Tensor, dict[str, Any]], Tensor]


class Codec(Protocol):
    """The way from clean states to images, and back; differentiable both ways."""

    def __call__(self, x: Tensor) -> Tensor:
        """Images [N, C, H, W] float32 in [0, 1] of clean states x [N, *D]."""
        ...

    def encode(self, images: Tensor) -> Tensor:
        """Clean states [N, *D] float32 of images [N, C, H, W] in [0, 1]."""
        ...


@dataclass(frozen=True, eq=False)
class ConditionalDenoiser:
    """Guesses the clean end under row `row` of a table of conditions.

    Rows with scale > 1 are guided in the steps in which `rule` guides: two network rows. The others
    cost one. Both halves go through the network in one batch.

    Args:
        network: (x [N, *D] float32, t [N], conditions of these rows) -> output [N, *D] float32.
        to_clean: turns an output into a clean guess.
        positive: what each row asks for.
        negative: what each row is guided away from; None if no row is guided.
        scale: [R] float32 on the CPU, guidance scale of each row.
        rule: what is made of a pair of predictions.
    """

    network: Network
    to_clean: ToClean
    positive: Conditions
    negative: Conditions | None
    scale: Tensor
    rule: ClassifierFree = field(default_factory=Scale)

    def rows(self, t: Tensor, row: Tensor) -> Tensor:
        return 1 + self._guided(t, row).long()

    def __call__(self, x: Tensor, t: Tensor, row: Tensor) -> Tensor:
        pairs = self._guided(t, row).nonzero().flatten()  # [K] on the CPU, like `row`
        table_rows = row.to(x.device)
        conditions = {name: table[table_rows] for name, table in self.positive.items()}
        if self.negative is None or len(pairs) == 0:
            return self.to_clean(self.network(x, t, conditions), x, t)
        scale = self.scale[row[pairs]].to(x.device)
        pairs = pairs.to(x.device)
        x_pairs, t_pairs = x[pairs], t[pairs]
        both = {
            name: torch.cat([conditions[name], table[table_rows[pairs]]])
            for name, table in self.negative.items()
        }
        output = self.network(torch.cat([x, x_pairs]), torch.cat([t, t_pairs]), both)
        positive, negative = output.split([len(x), len(pairs)])
        on_clean = self.rule.space == "clean"
        if on_clean:
            positive = self.to_clean(positive, x, t)
            negative = self.to_clean(negative, x_pairs, t_pairs)
        guided = self.rule(negative, positive[pairs], scale, self.to_clean.step(t_pairs))
        positive = positive.index_copy(0, pairs, guided)
        return positive if on_clean else self.to_clean(positive, x, t)

    def _guided(self, t: Tensor, row: Tensor) -> Tensor:
        """Which particles take two rows: [N] bool on the CPU."""
        if self.negative is None:
            return torch.zeros_like(row, dtype=torch.bool)
        guided = self.scale[row] > 1
        if self._steps_guided.all():  # then the device need not be waited for
            return guided
        return guided & self._steps_guided[self.to_clean.step(t).cpu()]

    @cached_property
    def _steps_guided(self) -> Tensor:
        """[T] bool on the CPU."""
        steps = self.to_clean.process.steps
        return self.rule.guided(torch.arange(steps), steps)


def conditional_model(
    pipe: Any,
    request: Request,
    chain: tuple[GaussianProcess, Prediction],
    network: Network,
    conditions: Callable[[], tuple[Conditions, Conditions | None]],
    scale: Tensor,
    decoding: Callable[[Any], Codec],
) -> Model:
    """The model of a pipeline's parts.

    Args:
        pipe: the pipeline.
        request: what was asked of it.
        chain: the process and what the network puts out, as `read_scheduler` gives them.
        network: see `ConditionalDenoiser`; so is `scale`.
        conditions: makes the positive and negative tables, once all else is known to be right.
        decoding: an autoencoder -> the way from clean states to images through it, and back.
    """
    process = chain[0].to(pipe._execution_device)
    to_clean, rule = ToClean(process, chain[1]), request.rule(process.steps)
    positive, negative = conditions()
    codec = decoding(getattr(pipe, "vae", None))
    return Model(
        ConditionalDenoiser(network, to_clean, positive, negative, scale, rule),
        process,
        codec,
        preview=request.preview_by(decoding),
        encode=codec.encode,
        prompts=request.prompts or (None,),
        device=pipe._execution_device,
        name=request.describe(pipe),
    )


def calling(module: Any) -> Network:
    """The network that calls `module` in its own precision, with conditions by their names."""

    dtype = module.dtype

    def network(x: Tensor, t: Tensor, conditions: dict[str, Any]) -> Tensor:
        with evaluating(module):
            output = module(x.to(dtype), timestep=t, return_dict=False, **conditions)
        return output[0].float()

    return network


@contextmanager
def evaluating(*modules: nn.Module | None) -> Iterator[None]:
    """Dropout and its like off inside, and every module as it was found afterwards."""
    training = [
        module
        for root in modules
        if root is not None and root.training
        for module in root.modules()
        if module.training
    ]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
