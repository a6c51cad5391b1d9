"""Laws of token chains on few enough states to enumerate, in two ways that share no code."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from steering.core import Model
from tests.exact.tokens import every


@torch.no_grad()
def law(model: Model, row: int = 0) -> tuple[Tensor, Tensor]:
    """States [S, L] and the probability [S] float64 that a walk of the model ends there.

    The model's own kernels, one state against all: what its `log_prob` says.
    """
    process: Any = model.process
    x = every(process.states, process.length)
    n = len(x)
    p = torch.zeros(n, dtype=torch.float64)
    start = process.prior(torch.arange(1))[0]
    if process.states > process.tokens:
        p[(x == start).all(1)] = 1.0
    else:
        p[:] = 1 / n  # of a uniform chain
    for i in range(process.steps):
        after = torch.zeros_like(p)
        for k in p.nonzero().flatten().tolist():
            here, at = x[[k]], torch.tensor([i])
            clean = model.denoiser(here, process.time(at), torch.tensor([row]))
            many = clean.expand(n, *clean.shape[1:])
            step = process.transition(here.expand(n, -1), at.expand(n), many)
            after += p[k] * step.log_prob(x).exp()
        p = after
    return x, p


@torch.no_grad()
def unmasking_law(
    guess: Callable[[list[int | None], int], Sequence[Sequence[float]]],
    start: Sequence[int | None],
    level: Sequence[float],
) -> dict[tuple[int, ...], float]:
    """Law of the sequences that a masked chain ends in, written from its definition.

    In step i a free site is filled with probability (m_i - m_{i+1}) / m_i, each by itself, and with
    token v with the probability of v in the guess of the state.

    Args:
        guess: (sequence, None where it is masked; step) -> probabilities [L][K].
        start: the sequence at first.
        level: [T + 1] m, from 1 down to 0.
    """
    laws: dict[tuple[int | None, ...], float] = {tuple(start): 1.0}
    for i in range(len(level) - 1):
        goes = (level[i] - level[i + 1]) / level[i]
        after: dict[tuple[int | None, ...], float] = {}
        for state, p in laws.items():
            known = guess(list(state), i)
            choices = [
                [(token, 1.0)]
                if token is not None
                else [(None, 1 - goes)] + [(v, goes * q) for v, q in enumerate(known[site])]
                for site, token in enumerate(state)
            ]
            for picked in itertools.product(*choices):
                weight = p
                for _, q in picked:
                    weight *= q
                if weight:
                    into = tuple(token for token, _ in picked)
                    after[into] = after.get(into, 0.0) + weight
        laws = after
    return {tuple(int(t) for t in state if t is not None): p for state, p in laws.items()}
