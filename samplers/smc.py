"""Sequential Monte Carlo (Feynman-Kac steering): particles weighed by what they seem to become."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from samplers.core import PRIOR, Draws, Plan, Rollouts, Walked
from samplers.levels import check_levels, usable_levels
from samplers.populations import Population, Populations, part
from samplers.walks import UNLIMITED, affordable, check_count
from search.resample import SCHEMES, ess, logsumexp_by
from steering.guidance.twist import check_tempering, tempered
from steering.noise import child_key, uniform

# What a particle remembers of the rewards of its clean guesses (`seen`), and what the log potential
# of a level is over λ: (seen, reward) -> (seen, log G / λ). First `seen`, then the rule.
POTENTIALS: dict[str, tuple[float, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]]] = {
    "difference": (0.0, lambda seen, r: (r, r - seen)),
    "max": (-math.inf, lambda seen, r: (torch.maximum(seen, r), torch.maximum(seen, r))),
    "add": (0.0, lambda seen, r: (seen + r, seen + r)),
}


_HUGE = 1e300  # no reward and no log weight counts as more


@dataclass(frozen=True)
class SMC:
    """Populations of K particles, weighed and resampled on their way from noise to data.

    At each level a particle's log weight grows by log G, a potential made from the reward r_k of
    its clean guess E[x_0 | x] there, and by log p - log q of a guided walk:

        difference  G_k = exp(λ (r_k - r_{k-1}))        max  G_k = exp(λ max_{j<=k} r_j)
        add         G_k = exp(λ Σ_{j<=k} r_j)

    When the effective sample size falls below `ess` · K, the particles are resampled and their
    weights start anew; otherwise weights are kept and go on accumulating. At the data the last
    weight is exp(λ · reward) over the product of the potentials on a particle's own line of
    descent, so that for *every* potential the target is p(x_0) · exp(λ · reward) and the estimate
    of Z = E_p[exp(λ · reward)] has no bias: potentials differ in variance alone ("max" and "add"
    pay for their greed at this last step). So do `tempering`s, by which r_k counts as β_k · r_k on
    the way. Draws are biased at finite K, as all self-normalised ones are. Further populations are
    independent, and merged by their estimates of Z.

    A failed particle has weight zero and is left out of the count that means are taken over.

    Args:
        particles: K per population; None makes one population per condition of all that the
            budget affords.
        potential: "difference", "max" or "add".
        levels: step indices at which to weigh and resample, each in 1..T-1; None is a fifth, two,
            three and four fifths of the way (as far as noise is still drawn after them).
        ess: resample below this share of K; 0 never, 1 always.
        scheme: "systematic", "stratified" or "multinomial".
        tempering: γ of β_k = min(1, (1 + γ)^(100 k / T) - 1) at level k of T; None is β = 1.

    Raises:
        ValueError: a bad argument, a budget below one population, or no noise after a level.

    Paper: Singhal et al., "A general framework for inference-time scaling and steering of
    diffusion models", arXiv 2501.06848.
    """

    particles: int | None = None
    potential: str = "difference"
    levels: tuple[int, ...] | None = None
    ess: float = 0.5
    scheme: str = "systematic"
    tempering: float | None = None

    def __post_init__(self) -> None:
        check_count("particles", self.particles, least=2)
        for name, known in (("potential", POTENTIALS), ("scheme", SCHEMES)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is unknown: give one of {', '.join(known)}."
                )
        check_levels(self.levels)
        if type(self.ess) not in (int, float) or not 0 <= self.ess <= 1:
            raise ValueError(f"ess={self.ess!r} is no share of the particles: give 0 to 1.")
        check_tempering(self.tempering)

    def usual_levels(self, steps: int) -> Iterable[int]:
        """Where to weigh and resample if nothing is said of it."""
        return (steps * fifth // 5 for fifth in range(1, 5))

    def init(self, plan: Plan) -> Populations:
        name = type(self).__name__
        levels = usable_levels(plan, self.levels, self.usual_levels(plan.steps), name)
        rows = plan.cost.sum(1)  # [R] network rows of one particle
        if not plan.reuses:
            rows = rows + plan.look[:, levels].sum(1)
        scores = len(levels) + 1
        if self.particles is None and plan.budget.nfe is None and plan.budget.reward_calls is None:
            raise ValueError(
                f"{name}: particles=None takes its number from the budget: give particles, nfe or "
                "reward_calls."
            )
        k = self.particles
        if k is None:
            k = max(2, int(affordable(plan, rows, scores, "particle").min()))
        limit = affordable(plan, k * rows, k * scores, f"population of {k} particles")
        if plan.budget.seconds is None:
            limit = limit.where(limit < UNLIMITED, 1)
        return Populations(plan, k, [*levels, plan.steps], limit, POTENTIALS[self.potential][0])

    def ask(self, state: Populations, room: int) -> Rollouts:
        """Populations on their way come first, so that few are in memory at a time."""
        parts: list[Rollouts] = []
        while room > 0 and (state.queue or state.start_next()):
            block = state.queue.popleft()
            if len(block) > room:
                state.queue.appendleft(part(block, slice(room, None)))
                block = part(block, slice(0, room))
            parts.append(block)
            room -= len(block)
        if not parts:
            return Rollouts.none()
        drop, state.drop = torch.tensor(state.drop, dtype=torch.int64), []
        columns = ("id", "src", "start", "stop", "key", "row", "score")
        return Rollouts(*(torch.cat([getattr(p, c) for p in parts]) for c in columns), drop=drop)

    def tell(self, state: Populations, walked: Walked) -> None:
        answers = (walked.reward, walked.log_ratio, walked.failed)
        for id, *answer in zip(walked.id.tolist(), *(a.tolist() for a in answers), strict=True):
            if id not in state.flight:
                continue  # a repeated answer
            population, slot = state.flight.pop(id)
            reward, log_ratio, failed = answer
            population.reward[slot] = -math.inf if failed else reward
            population.log_ratio[slot] = -math.inf if failed else log_ratio
            population.waiting -= 1
            if population.waiting == 0:
                state.drop += population.here[population.here != PRIOR].unique().tolist()
                if population.leg < len(state.stops) - 1:
                    self._resample(state, population)

    def _resample(self, state: Populations, p: Population) -> None:
        """Weigh a population that stands complete at a level, resample it and send it on."""
        reward, log_ratio = p.told()
        alive = reward.isfinite()
        if not alive.any():
            p.leg = len(state.stops) - 1  # nothing is left to walk: it ends without an item
            return
        share = tempered(self.tempering, torch.tensor(state.stops[p.leg]), state.plan.steps)
        # hostile rewards must not overflow: inf - inf is no weight
        seen, log_g = POTENTIALS[self.potential][1](p.seen, share * reward.clamp(-_HUGE, _HUGE))
        seen = seen.clamp(-_HUGE, _HUGE)
        log_g = torch.where(alive, (state.plan.lam * log_g).clamp(-_HUGE, _HUGE), 0.0)
        log_w = torch.where(alive, p.log_w + log_g + log_ratio, -torch.inf)
        slot = parent = alive.nonzero().flatten()
        if ess(log_w) < self.ess * state.k:
            # legs take children 0..K-1 of a population's key; those from K on resample
            u = uniform(child_key(p.key, state.k + p.leg), (state.k,))[0]
            slot, parent = torch.arange(state.k), SCHEMES[self.scheme](log_w, u)
            p.log_z += float(log_w.logsumexp(0)) - math.log(int(alive.sum()))
            log_w = torch.zeros_like(log_w)
        lost = torch.ones_like(alive)
        lost[parent] = False
        state.drop += p.there[lost & alive].tolist()
        moved = {"here": p.there, "root": p.root, "walk_key": p.walk_key, "seen": seen}
        for name, value in {**moved, "spent": p.spent + log_g}.items():
            setattr(p, name, value.index_copy(0, slot, value[parent]))
        p.here = torch.full_like(p.here, PRIOR).index_copy(0, slot, p.here[slot])
        p.log_w, p.leg = log_w, p.leg + 1
        p.walk_key = child_key(p.walk_key, torch.arange(state.k))
        state.launch(p, slot)

    def done(self, state: Populations) -> bool:
        return not state.flight and not state.left()

    def result(self, state: Populations) -> Draws:
        """Items at the data; for a condition that has none, its particles where they stand."""
        conditions = state.plan.conditions
        arrived, count = [], torch.zeros(conditions, dtype=torch.int64)
        for p in state.populations:
            arrived.append(p.arrived(state))
            count[p.row] += len(arrived[-1][0]) > 0
        on_way = [p.standing() for p in state.populations if not count[p.row]]
        none = (torch.empty(0, dtype=torch.int64),) * 2
        parts = [(*none, torch.empty(0, dtype=torch.float64), none[0]), *arrived, *on_way]
        id, row, log_w, root = (torch.cat(column) for column in zip(*parts, strict=True))
        finished = torch.arange(len(id)) < sum(len(handles) for handles, *_ in arrived)
        total = logsumexp_by(log_w[finished], row[finished], conditions)
        log_z = torch.where(count > 0, total - count.log(), torch.nan)
        return Draws(id, row, log_w, finished, root, log_z, ranked=False)

    def resolved(self, state: Populations) -> SMC:
        """This sampler with the number of particles it settled on."""
        return replace(self, particles=state.k)
