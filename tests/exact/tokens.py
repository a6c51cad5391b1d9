"""Masked and uniform chains on few enough states to enumerate: L sites of V tokens, T steps."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from steering.core import Model
from steering.discrete import NEVER, MaskedProcess, TokenProcess, UniformProcess
from steering.pipelines.sequences import TokenCodec


@dataclass(frozen=True, eq=False)
class TokenTable:
    """Process and denoiser: the guess of each step and state is read off a table.

    Guesses of relaxed states are means over states, each site drawn from its weights alone: linear
    in the weights of every site.
    """

    process: TokenProcess
    guess: Tensor  # [T, V^L, L, K] float64 probabilities

    def __call__(self, x: Tensor, t: Tensor, row: Tensor) -> Tensor:
        i = (t[:, None] - self.process.times).abs().argmin(1)
        if x.is_floating_point():
            share = _chosen(x.double(), self.states())  # [N, V^L]
            p = torch.einsum("ns,nslk->nlk", share, self.guess[i])
        else:
            p = self.guess[i, self.index(x)]
        return torch.where(p > 0, p.clamp(min=1e-300).log(), NEVER).float()

    def rows(self, t: Tensor, row: Tensor) -> Tensor:
        return torch.ones(len(t), dtype=torch.int64)

    def states(self) -> Tensor:
        """[V^L, L] all states, in the order of `index`."""
        return every(self.process.states, self.process.length)

    def index(self, x: Tensor) -> Tensor:
        """[N] position of states x [N, L] in `states`."""
        return (x * self.process.states ** torch.arange(x.shape[1] - 1, -1, -1)).sum(1)

    def laws(self) -> Tensor:
        """[T + 1, V^L] float64 probabilities of the states at every step, pushed forward."""
        chain, states = self.process, self.states()
        S = len(states)
        first = self.index(chain.prior(torch.zeros(1, dtype=torch.int64)))
        law = torch.full((S,), 1 / S, dtype=torch.float64)
        if isinstance(chain, MaskedProcess):
            law = one_hot(first, S)[0].double()
        laws = [law]
        for i in range(chain.steps):
            at = torch.full((S * S,), i)
            x = states.repeat_interleave(S, 0)
            clean = self(x, chain.time(at), at)
            matrix = chain.transition(x, at, clean).log_prob(states.repeat(S, 1)).exp()
            laws.append(laws[-1] @ matrix.view(S, S))
        return torch.stack(laws)


def every(tokens: int, sites: int) -> Tensor:
    """[tokens^sites, sites] all states, the last site changing first."""
    return torch.tensor(list(itertools.product(range(tokens), repeat=sites)))


def _chosen(p: Tensor, states: Tensor) -> Tensor:
    """[N, S] Π_l p[n, l, states[s, l]] of weights p [N, L, V]."""
    return p[:, torch.arange(states.shape[1]), states].prod(-1)


def noise(process: TokenProcess, m: float) -> Tensor:
    """[K, V] float64 q(x_i = v | clean) of a site, at level m."""
    K = process.tokens
    token = torch.eye(K, dtype=torch.float64)
    if isinstance(process, MaskedProcess):
        return torch.cat([(1 - m) * token, torch.full((K, 1), m, dtype=torch.float64)], 1)
    return (1 - m) * token + m / K


def noised_law(process: TokenProcess, data: Tensor, i: int) -> Tensor:
    """[V^L] float64 law at step i of the forward process, of a law of data [K^L]."""
    q = noise(process, float(process.level[i]))[
        every(process.tokens, process.length)
    ]  # [K^L, L, V]
    return data @ _chosen(q, every(process.states, process.length))


def posterior(process: TokenProcess, data: Tensor) -> Tensor:
    """[T, V^L, L, K] float64 marginals of the clean tokens given each state at each step."""
    clean, states = every(process.tokens, process.length), every(process.states, process.length)
    tables = []
    for i in range(process.steps):
        # a masked chain's guess is the same at every level where there are both masks and tokens
        m = 0.5 if isinstance(process, MaskedProcess) else float(process.level[i])
        q = noise(process, m)
        joint = _chosen(q[clean], states).T * data  # [V^L, K^L]
        share = joint / joint.sum(1, keepdim=True)
        hot = one_hot(clean, process.tokens).double()
        tables.append(torch.einsum("sc,clk->slk", share, hot))
    return torch.stack(tables)


def token_chain(
    kind: str = "masked",
    sites: int = 2,
    tokens: int = 3,
    steps: int = 3,
    *,
    schedule: str = "loglinear",
    remask: float = 0.0,
    astray: float = 0.7,
    conditions: int = 1,
) -> Model:
    """A chain of kind "masked" or "uniform" that guesses the tokens of a random law of data.

    Its guesses are the exact posterior's, led astray by normal numbers of this size in their
    logarithms. Items are weights [N, L, K].
    """
    random = torch.Generator().manual_seed(7)
    if kind == "masked":
        process = MaskedProcess.of(sites, tokens, steps, schedule, remask=remask)
    else:
        process = UniformProcess.of(sites, tokens, steps, schedule)
    data = (torch.randn(tokens**sites, generator=random, dtype=torch.float64)).softmax(0)
    exact = posterior(process, data)
    off = astray * torch.randn(exact.shape, generator=random, dtype=torch.float64)
    guess = exact * off.exp()
    table = TokenTable(process, guess / guess.sum(-1, keepdim=True))
    return Model(
        table, process, TokenCodec(tokens), prompts=(None,) * conditions, name=f"{kind} table"
    )
