"""Guided steps as the engine takes them: counted, checked, in smaller parts where one fails."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from samplers.flight import Request
from samplers.ledger import Ledger
from samplers.network import Network
from samplers.scoring import PROGRAMMING, OnError
from steering.core import Guidance, Model, Step
from steering.discrete import TokenProcess
from steering.guidance.bend import check_acts
from steering.guidance.scoring import WrongShapeError, score
from steering.noise import root_key

_BROKEN = "a guided step whose reward or gradient is not finite"
Denoise = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Bent:
    """N guided steps taken."""

    x: Tensor  # [N, *D] the next states
    log_ratio: Tensor  # [N] float64, log p - log q; nan where failed
    failed: Tensor  # [N] bool


class Bending:
    """A guidance at work on one model.

    A part that runs out of memory is taken again in halves, from there on for good; one whose
    reward raises likewise, until the particle to blame is alone. Rows are counted once.

    Args:
        guidance, model: who bends, and what.
        reward: the run's, followed by a guidance without one of its own.
        network, ledger: the engine's.
        on_error: "fail" makes a failed particle of what is not finite or raises; "raise" raises.
    """

    def __init__(
        self,
        guidance: Guidance,
        model: Model,
        reward: Any,
        network: Network,
        ledger: Ledger,
        on_error: OnError,
    ) -> None:
        own = getattr(guidance, "reward", None)
        self.guidance, self.reward = guidance, reward if own is None else own
        self._model, self._network, self._ledger = model, network, ledger
        self._on_error = on_error
        steps = torch.arange(model.process.steps)
        self.factor = guidance.rows(steps, len(steps)).cpu()  # [T] denoiser calls of a step
        # may the guess that a state was scored by be the first call of a walk from it?
        self.reuses = not guidance.differentiates and bool((self.factor == 1).all())
        self._fits = 2**62  # particles that memory holds, as far as is known

    def check(self) -> None:
        """What the guidance asks of the model; and one step without the network, of a state that
        stands in for its own clean guess (for tokens, one that leans to them).

        Raises:
            TypeError, ValueError: a reward of the wrong shape or without gradient; a guidance that
                does not suit it or the chain.
        """
        suits = getattr(self.guidance, "check", None)
        if suits is not None:
            suits(self._model)
        process = self._model.process
        counted = self._ledger.decodes, self._ledger.guided
        first = check_acts(self.guidance, process.stochastic.cpu())
        key = root_key(0, torch.zeros(1, dtype=torch.int64, device=self._model.device))
        x = process.prior(key)
        i, row = torch.full_like(key, first), torch.zeros(1, dtype=torch.int64)

        def stand_in(x: Tensor, i: Tensor, row: Tensor) -> Tensor:
            if not isinstance(process, TokenProcess):
                return x
            return process.weights(x)[..., : process.tokens].log_softmax(-1)

        try:
            self._propose(x, i, row, key, 1.0, stand_in)
        except (*PROGRAMMING, ValueError):
            raise
        except Exception:
            return  # an item may be at fault, as noise is none: the run will see
        finally:
            self._ledger.decodes, self._ledger.guided = counted  # it is no part of the run

    def __call__(
        self,
        requests: list[Request],
        x: Tensor,
        at: Tensor,
        row: Tensor,
        key: Tensor,
        lam: float,
        known: Tensor | None = None,
    ) -> Bent:
        """Take a step.

        Args:
            requests: [N] walks, charged for their rows.
            x: [N, *D] states; `at`, `row` [N] their steps and conditions, on the CPU.
            key: [N] noise keys of the steps, on x's device.
            lam: λ.
            known: [N, *D] clean guesses of x that were paid for already.
        """
        at_once = self._network.at_once(x) if self.guidance.differentiates else len(x)
        cuts = torch.arange(len(x)).split(min(at_once, self._fits))
        waiting = [slice(int(cut[0]), int(cut[-1]) + 1) for cut in cuts]
        parts = []
        while waiting:
            take = waiting.pop(0)
            size, before = take.stop - take.start, self._ledger.rows.clone()
            halves = [slice(take.start, take.start + size // 2)] if size > 1 else []
            halves += [slice(take.start + size // 2, take.stop)]
            guesses = None if known is None else known[take]
            try:
                bent = self._bend(x[take], at[take], row[take], key[take], lam, guesses)
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
                self._fits = min(self._fits, size - size // 2)
                self._ledger.rows.copy_(before)
                torch.cuda.empty_cache()
                waiting = halves + waiting
                continue
            except (*PROGRAMMING, WrongShapeError):
                raise
            except Exception as error:
                if self._on_error == "raise":
                    raise
                if size > 1:  # one of them is to blame
                    self._ledger.rows.copy_(before)
                    waiting = halves + waiting
                    continue
                self._note(f"{type(error).__name__}: {error}")
                bent = _lost(x[take])
            self._charge(requests[take], row[take], at[take], before, paid=known is not None)
            parts.append(bent)
        names = ("x", "log_ratio", "failed")
        return Bent(*(torch.cat([getattr(p, name) for p in parts]) for name in names))

    def _bend(self, x, at, row, key, lam: float, known: Tensor | None) -> Bent:
        i = at.to(x.device)

        def denoise(x_: Tensor, i_: Tensor, row_: Tensor) -> Tensor:
            if known is not None and x_ is x and row_ is row:
                return known
            if x_.requires_grad:
                return self._network.differentiable(x_, i_, row_)
            return self._network(x_, i_, i_.cpu(), row_)

        proposal = self._propose(x, i, row, key, lam, denoise)
        moved = proposal.guided.sample(key)
        ratio = proposal.base.log_prob(moved) - proposal.guided.log_prob(moved)
        failed = proposal.failed.cpu()
        if failed.any():
            if self._on_error == "raise":
                raise ValueError(f"{type(self.guidance).__name__}: {_BROKEN}.")
            self._note(_BROKEN)
        ratio = torch.where(failed, torch.nan, ratio.detach().cpu())
        return Bent(moved.detach(), ratio, failed)

    def _propose(self, x, i, row, key, lam: float, denoise: Denoise):
        model = self._model
        step = Step(x, i, row, key, lam, model.process, self.reward, denoise, self._score)
        return self.guidance.propose(step)

    def _score(self, clean: Tensor, row: Tensor) -> Tensor:
        """reward(decode(clean)) [N] float32, or of the clean states, with its gradient."""
        prompts = [self._model.prompts[r] for r in row.tolist()]
        self._ledger.guided += len(clean)
        name = type(self.guidance).__name__
        return score(self.reward, clean, prompts, self._decode, guidance=name)

    def _decode(self, clean: Tensor) -> Any:
        self._ledger.decodes += len(clean)
        return (self._model.preview or self._model.decode)(clean)

    def _charge(self, requests, row: Tensor, at: Tensor, before: Tensor, paid: bool) -> None:
        """Rows that the network took are the walks' whose step it was, whatever rows were asked.

        Where conditions differ in cost, each walk is charged its share of what was planned.
        """
        planned = self._network.rows[row, at] * (0 if paid else self.factor[at])
        spent, total = int((self._ledger.rows - before).sum()), int(planned.sum())
        if spent > total:
            raise RuntimeError(  # outside of what may fail: the guidance is wrong, not a particle
                f"{type(self.guidance).__name__} took {spent} network rows for steps where its "
                f"rows(i, steps) promises {total}."
            )
        shares = planned.cumsum(0) * spent // max(total, 1)
        charged = shares.diff(prepend=shares.new_zeros(1))
        self._ledger.rows.copy_(before.index_add(0, row, charged))
        for r, rows in zip(requests, charged.tolist(), strict=True):
            r.rows += rows

    def _note(self, error: str) -> None:
        self._ledger.first_error = self._ledger.first_error or error


def _lost(x: Tensor) -> Bent:
    """A particle whose reward raised: it stays where it is, and has failed."""
    nan = torch.full((len(x),), math.nan, dtype=torch.float64)
    return Bent(x, nan, torch.ones(len(x), dtype=torch.bool))
