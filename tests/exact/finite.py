"""A chain on few enough states to enumerate: L sites of V tokens, T steps."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from steering.core import Model
from steering.noise import uniform


@dataclass(frozen=True)
class Categorical:
    """Independent tokens at every site."""

    probs: Tensor  # [N, L, V] float64

    def sample(self, key: Tensor) -> Tensor:
        u = uniform(key, self.probs.shape[1:2])
        return (u[..., None] >= self.probs.cumsum(-1)[..., :-1]).sum(-1)

    def log_prob(self, x: Tensor) -> Tensor:
        return self.probs.log().gather(-1, x[..., None]).sum((1, 2))


@dataclass(frozen=True)
class FiniteChain:
    """Process and denoiser in one: a site keeps its token, takes a guessed one, or a random one.

        p(x' = v | x, clean) = keep · [v = x] + (1 - keep - stir) · clean_v + stir / V

    The guess of each step and state is a table, so that sites depend on each other.
    """

    guess: Tensor  # [T, V^L, L, V] float64 probabilities
    keep: tuple[float, ...]  # [T]
    stir: tuple[float, ...]  # [T]

    @property
    def steps(self) -> int:
        return len(self.keep)

    @property
    def stochastic(self) -> Tensor:
        return torch.ones(self.steps, dtype=torch.bool)

    @property
    def sites(self) -> int:
        return self.guess.shape[2]

    @property
    def tokens(self) -> int:
        return self.guess.shape[3]

    def prior(self, key: Tensor) -> Tensor:
        return (uniform(key, (self.sites,)) * self.tokens).long()

    def time(self, i: Tensor) -> Tensor:
        return i.float()

    def transition(self, x: Tensor, i: Tensor, clean: Tensor) -> Categorical:
        keep = torch.tensor(self.keep, dtype=torch.float64)[i][:, None, None]
        stir = torch.tensor(self.stir, dtype=torch.float64)[i][:, None, None]
        here = torch.nn.functional.one_hot(x, self.tokens)
        return Categorical(
            keep * here + (1 - keep - stir) * clean.double().exp() + stir / self.tokens
        )

    def __call__(self, x: Tensor, t: Tensor, row: Tensor) -> Tensor:
        return self.guess[t.long(), self.index(x)].log()

    def rows(self, t: Tensor, row: Tensor) -> Tensor:
        return torch.ones(len(t), dtype=torch.int64)

    def states(self) -> Tensor:
        """[V^L, L] all states, in the order of `index`."""
        return torch.tensor(list(itertools.product(range(self.tokens), repeat=self.sites)))

    def index(self, x: Tensor) -> Tensor:
        """[N] position of states x [N, L] in `states`."""
        place = self.tokens ** torch.arange(self.sites - 1, -1, -1)
        return (x * place).sum(1)

    def law(self) -> Tensor:
        """[V^L] float64 probabilities of the states that the chain ends in."""
        states = self.states()
        law = torch.full((len(states),), 1 / len(states), dtype=torch.float64)
        for i in range(self.steps):
            step = torch.full((len(states),), i)
            probs = self.transition(states, step, self.guess[i].log()).probs  # [S, L, V]
            chosen = probs[:, torch.arange(self.sites), states]  # [S, S', L]
            law = law @ chosen.prod(-1)
        return law


def finite_chain(sites: int = 2, tokens: int = 3, steps: int = 3, conditions: int = 1) -> Model:
    """A chain whose guesses are random tables, sharper towards the data.

    Items are token probabilities [N, L, V]: one-hot at the data, the guess on the way.
    """
    table = torch.Generator().manual_seed(7)
    shape = (steps, tokens**sites, sites, tokens)
    sharp = torch.linspace(0.5, 2, steps, dtype=torch.float64).view(-1, 1, 1, 1)
    logits = torch.randn(shape, generator=table, dtype=torch.float64)
    chain = FiniteChain(
        (sharp * logits).softmax(-1),
        keep=tuple(torch.linspace(0.2, 0.5, steps).tolist()),
        stir=tuple(torch.linspace(0.3, 0.1, steps).tolist()),
    )

    def decode(x: Tensor) -> Tensor:
        return x.exp() if x.is_floating_point() else torch.nn.functional.one_hot(x, tokens).double()

    return Model(chain, chain, decode, prompts=(None,) * conditions, name="finite")
