"""The network's calls of one step, recorded inside a pipeline, so that they can be differentiated.

Pipelines run without gradients. A hook on their networks puts a leaf in the place of the state that
a network is handed, and turns gradients on until the scheduler steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from steering.gaussian import over_data

_STATE = ("sample", "hidden_states", "latent_model_input", "x")  # names of it, in calls by name
# states in a network's own precision: half has 11 bits, bfloat16 8
_ROUNDING = {torch.float16: 2e-3, torch.bfloat16: 2e-2}


class Recorded:
    """What networks are handed between two steps of a scheduler.

    Args:
        seen: told a network and what it is handed, first in each step.
    """

    def __init__(self, seen: Callable[[nn.Module, Tensor], None]) -> None:
        self.records = False
        self._seen, self._first = seen, True
        self._leaves: list[Tensor] = []
        self._found: bool | None = None  # were gradients on before?

    def hook(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Stands before a network's forward."""
        name = next((name for name in _STATE if isinstance(kwargs.get(name), Tensor)), None)
        given = kwargs[name] if name else args[0] if args else None
        if not isinstance(given, Tensor):
            return None
        if self._first:
            self._first = False
            self._seen(module, given)
        if not self.records:
            return None
        if self._found is None:
            self._found = torch.is_grad_enabled()
        torch.set_grad_enabled(True)
        leaf = given.detach().requires_grad_(True)
        self._leaves.append(leaf)
        return ((leaf, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: leaf})

    def end(self) -> None:
        """The step is over: gradients as they were, and what was recorded is let go."""
        if self._found is not None:
            torch.set_grad_enabled(self._found)
        self._found, self._leaves, self._first = None, [], True

    def output(self, output: Tensor, x: Tensor, row: Tensor, states: Tensor) -> Tensor:
        """What the networks put out for states x [K, *D], rows `row` [K] of `states` [N, *D], of
        which `output` [N, *D] was made: differentiable in x.

        Raises:
            RuntimeError: networks were handed other things than copies of the states.
        """
        row = row.to(x.device)
        if not output.requires_grad:
            raise RuntimeError(
                "the network's gradient is asked for, and no call of a network was seen that this "
                "step's output depends on: does the pipeline compute it by other means?"
            )
        for leaf in self._leaves:
            _check_copies(leaf, states)

        def pull(gradient: Tensor) -> Tensor:
            whole = gradient.new_zeros(output.shape).index_copy(0, row, gradient)
            size = whole.flatten(1).abs().amax(1)
            # each item's largest is 1: half precision ends at 6e-8
            size = over_data(torch.where(size > 0, size, 1.0), whole)
            given = (whole / size).to(output.dtype)
            found = torch.autograd.grad(
                output, self._leaves, given, retain_graph=True, allow_unused=True
            )
            folded = [_copies(part, states).sum(0) for part in found if part is not None]
            return (size * sum(folded, torch.zeros_like(states)))[row]

        return _Linked.apply(x, output.detach().float()[row], pull)  # type: ignore[return-value]


class _Linked(torch.autograd.Function):
    """A value as a function of x, of which the pull-back alone is known."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, pull: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.pull = pull
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return ctx.pull(gradients[0]), None, None


def _copies(leaf: Tensor, states: Tensor) -> Tensor:
    """[C, N, *D] float32: a network's input as copies of states [N, *D], what was joined to their
    channels, or to their tokens, left out."""
    copies = leaf.unflatten(0, (-1, len(states)))
    for dim, size in enumerate(states.shape[1:], 2):
        copies = copies.narrow(dim, 0, size)
    return copies.float()


def holds_copies(leaf: Tensor, states: Tensor) -> bool:
    """Has a network's input room for copies of states, by its shape?"""
    return (
        leaf.dim() == states.dim()
        and len(leaf) % len(states) == 0
        and all(a >= b for a, b in zip(leaf.shape[1:], states.shape[1:], strict=True))
    )


def _check_copies(leaf: Tensor, states: Tensor) -> None:
    fits = holds_copies(leaf, states)
    if fits:
        copies, rounding = _copies(leaf.detach(), states), _ROUNDING.get(leaf.dtype, 1e-5)
        size = states.abs().amax().clamp(min=1e-6)
        fits = bool((copies - states).abs().amax() <= rounding * size)
    if not fits:
        raise RuntimeError(
            f"a network of the pipeline was handed {list(leaf.shape)}, which is no copies of the "
            f"states {list(states.shape)}: its gradient cannot be had here. Use a guidance that "
            "does without it, such as jacobian='skip'."
        )
