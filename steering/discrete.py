"""Discrete chains: masked (absorbing) and uniform diffusion of token sequences.

A clean token survives to time t in (0, 1] with probability 1 - m(t); else it is the mask, or any
token at random. m is the schedule: `loglinear`, m = t, or `cosine`, m = cos(pi/2 · (1 - t)). Step
i -> i + 1 goes from level m_i to m_{i+1}, with m_0 = 1 (nothing is left of the data) and m_T = 0.

States are tokens [N, L] int64: 0 .. K - 1 are ordinary ones, and K is the mask where there is one.
Relaxed states [N, L, V] float32 hold weights over the V tokens, V = K + 1 or K. Clean guesses are
log-probabilities [N, L, K], where `NEVER` stands for the logarithm of 0: it is finite, so that
gradients are.

Papers: Austin et al., "Structured denoising diffusion models in discrete state-spaces",
arXiv 2107.03006; Sahoo et al., "Simple and effective masked diffusion language models",
arXiv 2406.07524; Wang et al., "Remasking discrete diffusion models", arXiv 2503.00307.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from steering.noise import child_key, uniform

NEVER = -1e4  # the logarithm of a probability that is 0; its exponential is, exactly


def loglinear(t: Tensor) -> Tensor:
    """m(t) = t: every step unmasks the same share of what there was at first (arXiv 2406.07524)."""
    return t


def cosine(t: Tensor) -> Tensor:
    """m(t) = cos(pi/2 · (1 - t)): slower at first (MaskGIT, arXiv 2202.04200)."""
    return (math.pi / 2 * (1 - t)).cos()


SCHEDULES: dict[str, Callable[[Tensor], Tensor]] = {"loglinear": loglinear, "cosine": cosine}


@dataclass(frozen=True, eq=False)
class CategoricalTransition:
    """Independent tokens at every site: x' = kept + (1 - |kept|) · z, z ~ Categorical.

    Args:
        log_probs: [N, L, V] log-probabilities of z, normalised.
        kept: [N, L, V] what stays as it is: at a site of a hard state all of it or nothing; None is
            nothing at all.
    """

    log_probs: Tensor
    kept: Tensor | None = None

    def sample(self, key: Tensor) -> Tensor:
        """Next states [N, L] int64, for keys [N] int64; kept must be hard."""
        reached = self.log_probs.double().exp().cumsum(-1)
        u = uniform(key, self.log_probs.shape[1:2])[..., None] * reached[..., -1:]
        z = (u >= reached[..., :-1]).sum(-1)
        if self.kept is None:
            return z
        return torch.where(self.kept.any(-1), self.kept.argmax(-1), z)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-probability [N] float64 of next states x [N, L]; `NEVER` for each impossible site."""
        at = x[..., None]
        here = self.log_probs.double().gather(-1, at)[..., 0]
        if self.kept is not None:
            stays = torch.where(self.kept.gather(-1, at)[..., 0] > 0, 0.0, NEVER)
            here = torch.where(self.kept.any(-1), stays.to(here), here)
        return here.sum(1)

    def rsample(self, key: Tensor, tau: float) -> Tensor:
        """Relaxed next states [N, L, V], differentiable in the log-probabilities and in `kept`.

            z = softmax((log_probs + Gumbel noise) / tau)

        Args:
            key: [N] int64, one for each particle.
            tau: temperature; towards 0 the states become hard, and gradients noisy.

        Paper: Jang et al., "Categorical reparameterization with Gumbel-softmax", arXiv 1611.01144.
        """
        u = uniform(key, self.log_probs.shape[1:])
        gumbel = -(-u.log()).log()
        z = ((self.log_probs + gumbel.to(self.log_probs)) / tau).softmax(-1)
        if self.kept is None:
            return z
        return self.kept + (1 - self.kept.sum(-1, keepdim=True)) * z

    def kl(self, other: CategoricalTransition) -> Tensor:
        """KL(this || other) [N] in nats, of two laws that keep the same: Σ (1 - |kept|) KL(z)."""
        apart = (self.log_probs.exp() * (self.log_probs - other.log_probs)).sum(-1)
        if self.kept is not None:
            apart = (1 - self.kept.sum(-1)) * apart
        return apart.sum(1)

    def tilted(self, shift: Tensor) -> CategoricalTransition:
        """The law of z times exp(shift) [N, L, V], normalised anew; what was impossible stays so,
        however large its shift."""
        possible = self.log_probs > NEVER / 2
        log_probs = torch.where(possible, self.log_probs + shift, NEVER).log_softmax(-1)
        return replace(self, log_probs=log_probs)


@dataclass(frozen=True, eq=False)
class TokenProcess(ABC):
    """What masked and uniform chains share. Use `MaskedProcess` or `UniformProcess`.

    Args:
        length: L sites.
        tokens: K ordinary tokens.
        times: [T] float32 what the network is told at each step, falling in (0, 1].
        level: [T + 1] float64 m_i, from 1 down to 0.

    Raises:
        ValueError: levels that do not fall from 1 to 0, or tables of other lengths.
    """

    length: int
    tokens: int
    times: Tensor
    level: Tensor

    def __post_init__(self) -> None:
        ends = self.level[0] == 1 and self.level[-1] == 0
        falls = bool((self.level.diff() < 0).all())
        if len(self.times) == 0 or len(self.level) != len(self.times) + 1 or not (ends and falls):
            raise ValueError(
                f"level={self.level.tolist()} for {len(self.times)} times: give one more level "
                "than times, falling from 1 to 0."
            )

    @classmethod
    def of(cls, length: int, tokens: int, steps: int, schedule: str = "loglinear", **more):
        """The chain of `steps` equal steps in time under a schedule.

        Raises:
            ValueError: an unknown schedule, or no step.
        """
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule={schedule!r} is unknown: give {' or '.join(SCHEDULES)}.")
        if type(steps) is not int or steps < 1:
            raise ValueError(f"steps={steps!r} is no number of steps: give an int from 1 on.")
        t = 1 - torch.arange(steps + 1, dtype=torch.float64) / steps
        level = SCHEDULES[schedule](t)
        level[0], level[-1] = 1.0, 0.0
        return cls(length, tokens, t[:-1].float(), level, **more)

    @property
    def steps(self) -> int:
        return len(self.times)

    @property
    def stochastic(self) -> Tensor:
        return torch.ones(self.steps, dtype=torch.bool)

    @property
    @abstractmethod
    def states(self) -> int:
        """V, the number of tokens that a site of a state can hold."""

    def time(self, i: Tensor) -> Tensor:
        return self.times[i.to(self.times.device)]

    def to(self, device: torch.device | str):
        """The same chain with its tables on another device."""
        return replace(self, times=self.times.to(device), level=self.level.to(device))

    def noised(self, clean: Tensor, i: Tensor, key: Tensor) -> Tensor:
        """States [N, L] at steps i [N] of clean tokens [N, L]: what training sees."""
        lost = uniform(child_key(key, 0), (self.length,)) < self.level[i][:, None]
        return torch.where(lost, self.prior(child_key(key, 1)), clean)

    @abstractmethod
    def prior(self, key: Tensor) -> Tensor:
        """States [N, L] at step 0, for keys [N]."""

    @abstractmethod
    def transition(self, x: Tensor, i: Tensor, clean: Tensor) -> CategoricalTransition:
        """Law of the states at i + 1, of states x at i [N] and guesses clean [N, L, K]."""

    @abstractmethod
    def expected(self, x: Tensor, i: Tensor, clean: Tensor, value: Tensor) -> Tensor:
        """What each next token says of the clean one: [N, L, V] E[value_c | x, x' = v].

        Args:
            x: [N, L] tokens.
            i: [N] steps.
            clean: [N, L, K] log-probabilities of the clean tokens c.
            value: [N, L, K] of each of them.
        """

    def weights(self, x: Tensor) -> Tensor:
        """[N, L, V] float32 weights over tokens of states x, hard or relaxed."""
        return x if x.is_floating_point() else one_hot(x, self.states).float()


@dataclass(frozen=True, eq=False)
class MaskedProcess(TokenProcess):
    """Every site is masked at first; a masked one is unmasked once, and stays as it is.

        p(x' = v | mask) = u · clean_v,   p(x' = mask | mask) = 1 - u,   u = (m - m') / m

    and with remasking, σ = min(remask, m' / (1 - m)) of the unmasked sites are masked again in each
    step, u = (m - m' + σ (1 - m)) / m (ReMDM-cap, arXiv 2503.00307). The guess of an unmasked site
    is its token: see `subs`.

    Args:
        length, tokens, times, level: as in `TokenProcess`; the mask is token K.
        remask: largest probability that an unmasked site is masked again in a step, 0 to 1.

    Raises:
        ValueError: as `TokenProcess` does; remask outside 0 .. 1.
    """

    remask: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.remask <= 1:
            raise ValueError(f"remask={self.remask!r} is no probability: give 0 to 1.")

    @property
    def states(self) -> int:
        return self.tokens + 1

    def prior(self, key: Tensor) -> Tensor:
        return torch.full((len(key), self.length), self.tokens, device=key.device)

    def transition(self, x: Tensor, i: Tensor, clean: Tensor) -> CategoricalTransition:
        """Law of the states at i + 1.

        Args:
            x: [N, L] tokens, or [N, L, K + 1] relaxed ones.
            i: [N] steps.
            clean: [N, L, K] log-probabilities; of masked sites alone, if x is relaxed.

        Raises:
            ValueError: relaxed states of a chain that masks again.
        """
        leaves, again = self._table[:, i.to(self._table.device)]  # [N] each
        go, stay = _log(leaves)[:, None, None], _log(1 - leaves)[:, None, None]
        moves = torch.cat([clean + go, stay.expand(*clean.shape[:2], 1)], -1)
        known = pad(self.weights(x)[..., :-1], (0, 1))  # nothing is kept of the mask
        if not self.remask:
            return CategoricalTransition(moves, known)
        if x.is_floating_point():
            raise ValueError("remask: relaxed states need a chain that does not mask again.")
        back = known + again[:, None, None] * (self.mask_weights - known)
        masked = (x == self.tokens)[..., None]
        return CategoricalTransition(torch.where(masked, moves, _log(back)))

    def expected(self, x: Tensor, i: Tensor, clean: Tensor, value: Tensor) -> Tensor:
        """A token is the clean one, and the mask says nothing."""
        return torch.cat([value, (clean.exp() * value).sum(-1, keepdim=True)], -1)

    @property
    def mask_weights(self) -> Tensor:
        """[K + 1] the mask as weights over tokens."""
        return one_hot(torch.tensor(self.tokens, device=self.times.device), self.states).float()

    @cached_property
    def _table(self) -> Tensor:
        """[2, T] float32: probabilities that a masked site is unmasked, and the reverse."""
        m, after = self.level[:-1], self.level[1:]
        again = torch.minimum(torch.full_like(m, self.remask), after / (1 - m))
        again[0] = 0.0  # nothing is unmasked yet
        return torch.stack([(m - after + again * (1 - m)) / m, again]).float()


@dataclass(frozen=True, eq=False)
class UniformProcess(TokenProcess):
    """Every site holds a random token at first, and tokens change to and fro.

        p(x' | x) = Σ_c clean_c · q(x' | x, c),   q(x' | x, c) ∝ q(x | x') · q(x' | c)

    with the forward chain q(x | c) = (1 - m) [x = c] + m / K (D3PM-uniform, arXiv 2107.03006).
    """

    @property
    def states(self) -> int:
        return self.tokens

    def prior(self, key: Tensor) -> Tensor:
        return (uniform(key, (self.length,)) * self.tokens).long()

    def transition(self, x: Tensor, i: Tensor, clean: Tensor) -> CategoricalTransition:
        """Law of the states at i + 1; x is [N, L], or [N, L, K] relaxed: a mixture of laws."""
        reached = self._reached(x, i, clean.double().exp())
        return CategoricalTransition(_log(reached).float().log_softmax(-1))

    def expected(self, x: Tensor, i: Tensor, clean: Tensor, value: Tensor) -> Tensor:
        """By Bayes' rule: clean_c · q(x' | x, c), normalised over c, is what x' = v leaves of c."""
        p = clean.double().exp()
        known = self._reached(x, i, p * value) / self._reached(x, i, p).clamp(min=1e-300)
        return known.to(value)

    def _reached(self, x: Tensor, i: Tensor, p: Tensor) -> Tensor:
        """Σ_c p_c q(x' | x, c) [N, L, K] float64 at each x', for weights p [N, L, K] of clean
        tokens."""
        K, here = self.tokens, self.weights(x).double()
        m, after = self.level[i][:, None, None], self.level[i + 1][:, None, None]
        alone, same = m / K, 1 - m + m / K  # q(x | c) where c is another token, and where it is x
        apart = here * (1 / same - 1 / alone) + 1 / alone  # [N, L, K] 1 / q(x | c), averaged over x
        total = (p * apart).sum(-1, keepdim=True)  # Σ_c p_c / q(x | c), averaged over x
        stays = (1 - m) / (1 - after)  # of what is left at the next level, that is left now
        # [N, L, K] Σ_c p_c / q(x | c), for x this token
        from_here = (p.sum(-1, keepdim=True) - p) / alone + p / same
        reached = stays * here * ((1 - after) * p / same + after / K * from_here)
        return reached + (1 - stays) / K * ((1 - after) * p * apart + after / K * total)


def subs(x: Tensor, log_p: Tensor) -> Tensor:
    """Clean guesses [N, L, K] of masked states: the network's at masked sites, else the token.

        log(x_k + x_mask · p_k)

    for states x [N, L] or relaxed ones [N, L, K + 1], and what the network says, log_p [N, L, K]
    (SUBS, arXiv 2406.07524, carried over to relaxed states).
    """
    K = log_p.shape[-1]
    if not x.is_floating_point():
        return torch.where((x == K)[..., None], log_p, certain(x, K))
    return _log(x[..., :K] + x[..., K:] * log_p.exp())


def certain(x: Tensor, tokens: int) -> Tensor:
    """Log-probabilities [N, L, K] float32 of guesses that are sure of tokens x [N, L]; a token that
    is none of the K gets none."""
    return torch.where(one_hot(x.clamp(max=tokens), tokens + 1)[..., :tokens] > 0, 0.0, NEVER)


def denoising_loss(
    process: TokenProcess,
    guess: Callable[[Tensor, Tensor], Tensor],
    clean: Tensor,
    i: Tensor,
    key: Tensor,
) -> Tensor:
    """One draw of the bound on -log p(clean), of the chain itself: [N] nats.

        T · KL(q(x_{i+1} | x_i, clean) || p(x_{i+1} | x_i)),    x_i ~ q(x_i | clean)

    With i uniform on 0 .. T - 1 its mean is a bound on the negative log-likelihood, exact for the
    T-step chain. For a masked chain it is T · u_i · the cross-entropy of the masked sites.

    Args:
        process: the chain, as long as one likes.
        guess: (x [N, L], i [N]) -> log-probabilities [N, L, K] of the clean tokens, with gradients.
        clean: [N, L] int64 tokens.
        i: [N] int64 steps.
        key: [N] int64 noise keys.
    """
    x = process.noised(clean, i, key)
    truth = process.transition(x, i, certain(clean, process.tokens))
    return process.steps * truth.kl(process.transition(x, i, guess(x, i)))


def _log(p: Tensor) -> Tensor:
    """log p, `NEVER` where that is less; without a slope there."""
    tiny = math.exp(-80.0)
    return torch.where(p > tiny, p.clamp(min=tiny).log(), NEVER)
