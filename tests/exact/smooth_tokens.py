"""Masked and uniform chains on few enough states to enumerate, with smooth networks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from steering.core import Model
from steering.discrete import MaskedProcess, TokenProcess, UniformProcess
from steering.pipelines.sequences import TokenCodec, TokenDenoiser
from tests.exact.tokens import every


class SmoothGuess(nn.Module):
    """Logits [N, L, K] of relaxed states [N, L, V] and times: smooth in both and in its weights."""

    def __init__(self, process: TokenProcess, width: int = 16, seed: int = 0) -> None:
        super().__init__()
        g, L = torch.Generator().manual_seed(seed), process.length
        self.shape = (L, process.tokens)
        self.process = process

        def draw(out: int, inputs: int) -> nn.Parameter:
            return nn.Parameter(
                torch.randn(out, inputs, generator=g, dtype=torch.float64) / inputs**0.5
            )

        self.first = draw(width, L * process.states + 1)
        self.second = draw(L * process.tokens, width)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = self.process.weights(x).double().flatten(1)
        hidden = (torch.cat([x, t[:, None].double()], 1) @ self.first.T).tanh()
        return 2 * (hidden @ self.second.T).unflatten(1, self.shape)


@dataclass(frozen=True)
class Chain:
    """A model whose network is `guess`."""

    guess: SmoothGuess
    model: Model


def token_chain(
    kind: str = "masked",
    schedule: str = "loglinear",
    length: int = 2,
    tokens: int = 3,
    steps: int = 3,
    seed: int = 0,
) -> Chain:
    """A chain of `length` sites in float64, its network drawn from `seed`."""
    family = MaskedProcess if kind == "masked" else UniformProcess
    process = family.of(length, tokens, steps, schedule)
    guess = SmoothGuess(process, seed=seed)

    def network(x: Tensor, t: Tensor, row: Tensor, without: Tensor) -> Tensor:
        return guess(x, t)

    free = torch.full((1, length), -1)
    denoiser = TokenDenoiser(network, process, free, torch.ones(1))
    return Chain(guess, Model(denoiser, process, TokenCodec(tokens), name=f"{kind} {schedule}"))


@torch.no_grad()
def kernel(model: Model, i: int) -> Tensor:
    """[S, S] float64 probabilities of all states at i + 1 given each at i."""
    process: TokenProcess = model.process  # type: ignore[assignment]
    states = every(process.states, process.length)
    S = len(states)
    x, after = states.repeat_interleave(S, 0), states.repeat(S, 1)
    at = torch.full((len(x),), i)
    clean = model.denoiser(x, process.time(at), torch.zeros_like(at))
    return process.transition(x, at, clean).log_prob(after).exp().view(S, S)


@torch.no_grad()
def enumerated(model: Model, before: Model | None = None) -> tuple[Tensor, float]:
    """Probabilities [S] that the chain ends in each state, and the KL of its paths to `before`'s.

    Σ_i Σ_x p_i(x) Σ_x' P(x' | x) log(P(x' | x) / Q(x' | x)), every sum over all states.
    """
    process: TokenProcess = model.process  # type: ignore[assignment]
    states = every(process.states, process.length)
    if process.states > process.tokens:
        law = (states == process.tokens).all(1).double()
    else:
        law = torch.full((len(states),), 1 / len(states), dtype=torch.float64)
    kl = 0.0
    for i in range(process.steps):
        p = kernel(model, i)
        if before is not None:
            q = kernel(before, i)
            per_state = torch.where(p > 0, p * (p.log() - q.log()), 0.0).sum(1)
            kl += float(law @ per_state)
        law = law @ p
    return law, kl
