"""The exact law of a masked chain of few short sequences: a forward pass over all its states."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from steering.core import Model
from steering.discrete import MaskedProcess
from steering.pipelines.sequences import TokenDenoiser


def tokens_of(index: Tensor, length: int, tokens: int) -> Tensor:
    """Sequences [N, L] int64 by their number [N], the last site fastest."""
    place = tokens ** torch.arange(length - 1, -1, -1)
    return index[:, None] // place % tokens


def index_of(x: Tensor, tokens: int) -> Tensor:
    """Numbers [N] of sequences x [N, L]."""
    return (x * tokens ** torch.arange(x.shape[1] - 1, -1, -1)).sum(1)


@torch.no_grad()
def guesses(model: Model, chunk: int = 8192) -> Tensor:
    """What the denoiser says of every state, [(K + 1)^L, L, K] log-probabilities.

    For networks that are not told the time.
    """
    process = model.process
    assert isinstance(process, MaskedProcess)
    V, L = process.states, process.length
    parts = []
    for index in torch.arange(V**L).split(chunk):
        n = len(index)
        t, row = torch.ones(n), torch.zeros(n, dtype=torch.int64)
        parts.append(model.denoiser(tokens_of(index, L, V), t, row))
    return torch.cat(parts)


@dataclass(frozen=True, eq=False)
class Tabulated:
    """A denoiser whose answers to hard states were all asked before; others it is asked itself.

    Args:
        answers: [(K + 1)^L, L, K], see `guesses`.
        ask: the denoiser.
    """

    answers: Tensor
    ask: Any

    def rows(self, t: Tensor, row: Tensor) -> Tensor:
        return self.ask.rows(t, row)

    def __call__(self, x: Tensor, t: Tensor, row: Tensor) -> Tensor:
        if x.is_floating_point():
            return self.ask(x, t, row)
        return self.answers[index_of(x, self.answers.shape[2] + 1)]


def tabulated(model: Model, answers: Tensor, conditions: int = 1) -> Model:
    """The same model of so many conditions, its denoiser's answers looked up."""
    assert isinstance(model.denoiser, TokenDenoiser)
    fixed = model.denoiser.fixed.repeat_interleave(conditions, 0)
    scale = model.denoiser.scale.repeat_interleave(conditions, 0)
    asked = replace(model.denoiser, fixed=fixed, scale=scale)
    return replace(model, denoiser=Tabulated(answers, asked), prompts=(None,) * conditions)


def masked_law(process: MaskedProcess, answers: Tensor) -> Tensor:
    """Probabilities [K^L] float64 of the sequences that a chain ends in.

    A step takes each state to a product of laws, one of every masked site: all states that have the
    same sites masked are one block of the array over states, and go on in one product.

    Args:
        process: the chain, without remasking.
        answers: [(K + 1)^L, L, K] log-probabilities of every state, see `guesses`.
    """
    law, _ = _pass(process, answers, None)
    return law


def path_kl(process: MaskedProcess, tuned: Tensor, answers: Tensor) -> float:
    """KL in nats between the laws of the two chains' paths, of the tuned to the other."""
    return _pass(process, tuned, answers)[1]


def _pass(process: MaskedProcess, answers: Tensor, other: Tensor | None) -> tuple[Tensor, float]:
    assert not process.remask
    L, K = process.length, process.tokens
    p = answers.double().exp().view(*(K + 1,) * L, L, K)
    p = p / p.sum(-1, keepdim=True)
    apart = None
    if other is not None:
        log_q = other.double().log_softmax(-1).view_as(p)
        apart = (p * (answers.double().log_softmax(-1).view_as(p) - log_q)).sum(-1)
    here = torch.zeros((K + 1,) * L, dtype=torch.float64)
    here[(K,) * L] = 1.0
    kl = 0.0
    for i in range(process.steps):
        u = float((process.level[i] - process.level[i + 1]) / process.level[i])
        after = torch.zeros_like(here)
        for masked in itertools.product((False, True), repeat=L):
            block = tuple(slice(K, None) if m else slice(K) for m in masked)
            flow = here[block]  # [1 where masked, K elsewhere]
            if not flow.any():
                continue
            sites = [j for j, m in enumerate(masked) if m]
            if apart is not None and sites:
                kl += u * float((flow[..., None] * apart[block][..., sites]).sum())
            for j in sites:
                go = u * p[block][..., j, :]  # [..., K]
                step = torch.cat([go, torch.full_like(go[..., :1], 1 - u)], -1)
                flow = flow * step.transpose(j, L).squeeze(L)
            after[tuple(slice(None) if m else slice(K) for m in masked)] += flow
        here = after
    law = here[(slice(K),) * L].flatten()
    return law, kl
