"""The one loop, and the only code that calls a network.

Walks at different steps, of different conditions and of different trees share one forward call. A
walk that ends makes room for the next one asked for. What a request costs is counted here and
nowhere else; what a request is, its noise included, is fixed by its key, so an answer that a record
already holds is given back without a network row.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from samplers.bending import Bending
from samplers.core import PRIOR, Budget, Plan, Rollouts, Sampler, Walked
from samplers.flight import Flight, Request
from samplers.journal import Journal, Record, Walk, question
from samplers.ledger import History, Ledger
from samplers.network import Network
from samplers.scoring import OnError, Scorer, Scores
from samplers.store import Store
from steering.core import Guidance, Model
from steering.noise import child_key

_JOURNAL_SECONDS = 2.0  # answers are made durable at least this often
_IN_FLIGHT = 4096  # walks that may have been under way when a record ended


@dataclass(frozen=True)
class Settings:
    """How to run, as opposed to what: none of it changes which tree grows."""

    batch: int = 64
    on_error: OnError = "fail"
    weights: str = "exact"


class Engine:
    """Walks what samplers ask for, on one model and one reward.

    Args:
        model: what is steered.
        reward: (items, prompts) -> [N].
        guidance: bends the stochastic steps; None is the model's own kernel.
        settings: batch size and what a failing reward does.
        record: answers that need no network.
        store: states of those answers, by entry; `clean` their clean guesses where they have one.
        journal: where answers are made durable.
    """

    def __init__(
        self,
        model: Model,
        reward: Any,
        guidance: Guidance | None = None,
        settings: Settings = Settings(),
        record: Record | None = None,
        store: Store | None = None,
        clean: Store | None = None,
        journal: Journal | None = None,
    ) -> None:
        self.model, self.reward, self.guidance, self.settings = model, reward, guidance, settings
        self.record = record or Record()
        self.store = Store() if store is None else store
        # E[x_0 | x] of kept states that were scored on their way
        self.clean = Store() if clean is None else clean
        self.ledger = Ledger.empty(len(model.prompts))
        self.history = History()
        self.entry: dict[int, int] = {}  # handle of the running sampler -> entry of the record
        self.journal = journal
        self.asked: Any = None  # the Spec that the run began with, where it began here
        self._known = self.record.index()
        self._unsaved: list[Walk] = []
        self._saved_at = time.monotonic()
        self._stochastic = model.process.stochastic.cpu()
        self.network = Network(model, self.ledger, settings.batch)
        self.bending: Bending | None = None
        # weights are ratios of densities, which a step without noise has not
        self._bends = self._stochastic | (settings.weights == "none")
        if guidance is not None:
            self.bending = Bending(
                guidance, model, reward, self.network, self.ledger, settings.on_error
            )

    def plan(self, lam: float, seed: int, budget: Budget) -> Plan:
        """What a sampler may know before it starts."""
        cost = self.network.rows
        if self.bending is not None:
            cost = torch.where(self._bends, cost * self.bending.factor, cost)
        prior = self.model.process.prior(torch.arange(16, device=self.model.device))
        return Plan(
            cost,
            self.network.rows,
            self._stochastic,
            lam,
            seed,
            budget,
            self._reuses,
            turns=prior.is_floating_point(),  # tokens are not
            varied=bool((prior != prior[:1]).any()),
        )

    def run(
        self,
        sampler: Sampler,
        state: Any,
        plan: Plan,
        seconds: float | None = None,
        watch: Callable[[Engine], None] | None = None,
        offline: bool = False,
    ) -> str:
        """Walk until the sampler is done; how it ended: "done", "interrupted" or "seconds".

        Args:
            seconds: of wall clock, from the first walk that no record answers; may overrun by one
                network call and the reward call that is running then.
            watch: called after every round, to show progress.
            offline: answer from the record alone, and stop ("interrupted") where it ends.
        """
        began = time.monotonic()
        self._lam = plan.lam
        self.entry = {PRIOR: -1}
        self._first_new: float | None = None
        self._missed = 0
        self._promised = [[0, 0] for _ in self.model.prompts]
        # [R][T + 1] network rows from the noise to a step
        self._way = torch.nn.functional.pad(plan.cost.cumsum(1), (1, 0)).tolist()
        flight = Flight(self.settings.batch, self.model)
        prompts = self.model.prompts
        hold, on_error = self.model.offloaded, self.settings.on_error
        decode, preview = self.model.decode, self.model.preview
        if getattr(self.reward, "of_states", False):
            decode, preview = _as_it_is, None
        scorer = Scorer(decode, self.reward, prompts, on_error, hold, preview)
        stop = _Stop()
        try:
            status = "done"
            while not sampler.done(state):
                if stop.asked:
                    status = "interrupted"
                    break
                if self._late(seconds):
                    status = "seconds"
                    break
                asked = self._admit(sampler, state, plan, flight, scorer, offline)
                idle = not (asked or flight.n)
                if flight.n:
                    self._step(sampler, state, flight, scorer)
                waiting = time.monotonic()
                if idle:
                    scorer.release()
                finished = scorer.finished(idle, lambda: stop.asked or self._late(seconds))
                self.ledger.waited_seconds += time.monotonic() - waiting
                for tag, scores in finished:
                    self._scored(sampler, state, tag, scores)
                    idle = False
                self._save(force=False)
                if watch is not None:
                    watch(self)
                if idle and not (stop.asked or self._late(seconds)) and not sampler.done(state):
                    if offline:
                        status = "interrupted"
                        break
                    raise RuntimeError(f"{type(sampler).__name__} waits for walks it never asked.")
            # what was scored, or is being scored, when the run ended
            scorer.close()
            for tag, scores in scorer.finished(wait=False):
                self._scored(sampler, state, tag, scores)
            return status
        finally:
            stop.close()
            scorer.close(wait=False)  # after an error, or a second Ctrl-C, nothing is waited for
            self._save(force=True)
            self.ledger.seconds += time.monotonic() - began

    @property
    def _reuses(self) -> bool:
        return self.bending is None or self.bending.reuses

    def states(self, handles: list[int]) -> Tensor:
        """Kept states [N, *D] on the model's device."""
        return self.store.get([self.entry[h] for h in handles]).to(self.model.device)

    def _late(self, seconds: float | None) -> bool:
        return seconds is not None and self._walking_for() > seconds

    def _walking_for(self) -> float:
        """Seconds since the first walk that no record answered."""
        return 0.0 if self._first_new is None else time.monotonic() - self._first_new

    # --- one round -----------------------------------------------------------------------------

    def _admit(self, sampler, state, plan, flight, scorer, offline) -> bool:
        """Fill the free places of the batch; True if anything was asked for."""
        asked = False
        while flight.room:
            rollouts = sampler.ask(state, flight.room)
            if not len(rollouts):
                self._drop(rollouts.drop)
                break
            if len(rollouts) > flight.room:
                raise RuntimeError(
                    f"{type(sampler).__name__} asked for {len(rollouts)} walks, there was room for "
                    f"{flight.room}."
                )
            asked = True
            requests = self._requests(rollouts, plan.steps)
            known = [r for r in requests if r.known is not None]
            if known:
                self._replay(sampler, state, known)
            new = [r for r in requests if r.known is None]
            if offline:
                self._missed += len(new)
            elif new:
                self._first_new = self._first_new or time.monotonic()
                self._promise(sampler, new, plan)
                self._start(sampler, state, new, flight, scorer, plan.steps)
            self._drop(rollouts.drop)
            # without a limit of walks a sampler would ask for ever: all that a record can answer
            # is asked for before as many unknown walks as it holds, and those once in flight
            if offline and self._missed > len(self.record.walks) + _IN_FLIGHT:
                return False
        return asked

    def _promise(self, sampler: Sampler, requests: list[Request], plan: Plan) -> None:
        """The budget is hard: a sampler that asks for more than it may is stopped at once."""
        for r in requests:
            rows, scores = self._promised[r.row]
            look = r.score and r.stop < plan.steps
            cached = (
                plan.reuses and r.start < r.stop and r.src in self.clean and math.isnan(r.angle)
            )
            rows += self._way[r.row][r.stop] - self._way[r.row][r.start + cached]
            rows += int(plan.look[r.row, r.stop]) if look else 0
            self._promised[r.row] = [rows, scores + r.score]
            limits = (
                ("nfe", rows, plan.budget.nfe),
                ("reward_calls", scores + r.score, plan.budget.reward_calls),
            )
            for name, value, limit in limits:
                if limit is not None and value > limit:
                    raise RuntimeError(
                        f"{type(sampler).__name__} asked for walks beyond {name}={limit}: a "
                        "sampler must reserve the whole way before it starts a walk, see "
                        "samplers.core.Purse."
                    )

    def _drop(self, handles: Tensor) -> None:
        gone = [self.entry.pop(h) for h in handles.tolist() if h in self.entry]
        self.store.drop(gone)
        self.clean.drop(gone)

    def _requests(self, rollouts: Rollouts, steps: int) -> list[Request]:
        angle = [math.nan] * len(rollouts) if rollouts.angle is None else rollouts.angle.tolist()
        columns = (rollouts.id, rollouts.src, rollouts.start, rollouts.stop, rollouts.key)
        requests = []
        for id, src, start, stop, key, row, score, turn in zip(
            *(c.tolist() for c in columns),
            rollouts.row.tolist(),
            rollouts.score.tolist(),
            angle,
            strict=True,
        ):
            if id in self.entry:
                raise RuntimeError(f"handle {id} was asked for twice.")
            if not 0 <= start <= stop <= steps:
                raise RuntimeError(f"a walk {start} -> {stop} does not fit {steps} steps.")
            if src not in self.entry:
                raise RuntimeError(f"walk {id} starts from handle {src}, which is not kept.")
            src_entry = self.entry[src]
            known = self._known.get(question(src_entry, row, key, start, stop, score, turn))
            if known is not None:
                self.entry[id] = known.entry
            else:
                self.entry[id] = self.record.next_entry
                self.record.next_entry += 1
            requests.append(
                Request(id, self.entry[id], src_entry, start, stop, key, row, score, turn, known)
            )
        return requests

    def _replay(self, sampler, state, requests: list[Request]) -> None:
        walks = [r.known for r in requests if r.known is not None]
        for walk in walks:
            self.ledger.rows[walk.row] += walk.rows
            self.ledger.reward_calls[walk.row] += walk.score
            self.ledger.replayed += walk.rows
            rows, scores = self._promised[walk.row]
            self._promised[walk.row] = [rows + walk.rows, scores + walk.score]
            if walk.score and walk.stop == self.model.process.steps:
                self._see(walk.reward, walk.row)
        sampler.tell(state, _walked([r.id for r in requests], walks))

    def _start(self, sampler, state, requests, flight, scorer, steps: int) -> None:
        device = self.model.device
        key = torch.tensor([r.key for r in requests], device=device)
        x = self._sources(requests, key)
        for k in [k for k, r in enumerate(requests) if not math.isnan(r.angle)]:
            turn = requests[k].angle
            x[k] = math.cos(turn) * x[k] + math.sin(turn) * self.model.process.prior(key[[k]])[0]
        self._first_step_from_cache(requests, x, key)
        planted, landed, walking = [], [], []
        for k, r in enumerate(requests):
            if r.at < r.stop or (r.score and r.stop < steps):
                walking.append(k)
            else:
                (landed if r.score else planted).append(k)
        if walking:
            flight.add([requests[k] for k in walking], x[walking], key[walking])
        self._land(sampler, state, [requests[k] for k in planted], x[planted], scorer, steps)
        self._land(sampler, state, [requests[k] for k in landed], x[landed], scorer, steps)

    def _sources(self, requests: list[Request], key: Tensor) -> Tensor:
        """Where walks begin: [N, *D], drawn from the prior or taken from the store."""
        fresh = [k for k, r in enumerate(requests) if r.src == -1]
        kept = [k for k, r in enumerate(requests) if r.src != -1]
        x = torch.empty(0)
        if fresh:
            drawn = self.model.process.prior(key[fresh])
            x = drawn.new_empty(len(requests), *drawn.shape[1:])
            x[fresh] = drawn
        if kept:
            stored = self.store.get([requests[k].src for k in kept]).to(self.model.device)
            if not fresh:
                return stored
            x[kept] = stored
        return x

    def _first_step_from_cache(self, requests: list[Request], x: Tensor, key: Tensor) -> None:
        """A state that was scored on its way has its first network call behind it."""
        if not self._reuses or not len(self.clean):
            return
        cached = [
            k
            for k, r in enumerate(requests)
            if r.start < r.stop and r.src in self.clean and math.isnan(r.angle)
        ]
        if not cached:
            return
        clean = self.clean.get([requests[k].src for k in cached]).to(x.device)
        part, states = [requests[k] for k in cached], x[cached]
        at = torch.tensor([r.at for r in part])
        keys = child_key(key[cached], at.to(x.device))
        self._move(part, states, at, torch.zeros_like(at, dtype=torch.bool), keys, clean)
        x[cached] = states
        for r in part:
            r.at += 1

    def _step(self, sampler, state, flight: Flight, scorer) -> None:
        """One network call for everything in flight."""
        requests, n = flight.requests, flight.n
        at = torch.tensor([r.at for r in requests])
        looking = torch.tensor([r.at == r.stop for r in requests])  # only the score is missing
        clean = self._move(requests, flight.x[:n], at, looking, flight.keys_at(at))
        seen = looking.nonzero().flatten().tolist()
        if seen:
            self.clean.put([requests[k].entry for k in seen], clean)
            looked = [requests[k] for k in seen]
            self.store.put([r.entry for r in looked], flight.x[seen])
            scorer.submit(looked, clean, [r.row for r in looked], guess=True)
        ended = []
        steps = self.model.process.steps
        for k, r in enumerate(requests):
            if r.at < r.stop:
                r.at += 1
                if r.at == r.stop and (r.stop == steps or not r.score):
                    ended.append(k)
        if ended:
            plain = [k for k in ended if not requests[k].score]
            scored = [k for k in ended if requests[k].score]
            for part in (plain, scored):
                self._land(
                    sampler, state, [requests[k] for k in part], flight.x[part], scorer, steps
                )
        if ended or seen:
            flight.remove(sorted({*ended, *seen}))

    def _move(
        self,
        requests: list[Request],
        x: Tensor,
        at: Tensor,
        looking: Tensor,
        key: Tensor,
        known: Tensor | None = None,
    ) -> Tensor:
        """Take a step from x [n, *D], in place, but for the k walks that are only `looking` [n],
        whose clean guesses [k, *D] come back. Those in `known` [n, *D] have been paid for."""
        row = torch.tensor([r.row for r in requests])
        bent = torch.zeros_like(looking)
        if self.bending is not None:
            lost = torch.tensor([r.failed for r in requests])  # what is lost is not asked about
            bent = ~(looking | lost) & self._bends[at.clamp(max=self.model.process.steps - 1)]
        if not bent.any():
            return self._plain(requests, x, at, row, looking, key, known)
        clean = x[:0]
        for some in (~bent, bent):
            here = some.nonzero().flatten()
            if not len(here):
                continue
            pick = here.to(x.device)
            part, states = [requests[k] for k in here.tolist()], x[pick]
            guesses = None if known is None else known[pick]
            if some is bent:
                self._bent(part, states, at[here], row[here], key[pick], guesses)
            else:
                look = looking[here]
                clean = self._plain(part, states, at[here], row[here], look, key[pick], guesses)
            x[pick] = states
        return clean

    def _plain(self, requests, x, at, row, looking, key, known: Tensor | None) -> Tensor:
        """`_move` by the model's own kernel."""
        i = at.to(x.device)
        clean = known
        if clean is None:
            clean = self.network(x, i, at, row)
            for r, rows in zip(requests, self.network.cost(row, at), strict=True):
                r.rows += rows
        walking = (~looking).nonzero().flatten()
        sub = slice(None) if len(walking) == len(x) else walking.to(x.device)
        transition = self.model.process.transition(x[sub], i[sub], clean[sub])
        x[sub] = transition.sample(key[sub])
        return clean[looking.nonzero().flatten().to(x.device)]

    def _bent(self, requests, x, at, row, key, known: Tensor | None) -> None:
        """`_move` by the guidance, of walks none of which is only looking."""
        assert self.bending is not None
        found = self.bending(requests, x, at, row, key, self._lam, known)
        x[:] = found.x
        weighed = self.settings.weights == "exact"
        columns = zip(requests, found.log_ratio.tolist(), found.failed.tolist(), strict=True)
        for r, log_ratio, failed in columns:
            r.log_ratio += log_ratio if weighed else 0.0
            r.failed |= failed

    # --- what ends -----------------------------------------------------------------------------

    def _land(self, sampler, state, requests, x: Tensor, scorer, steps: int) -> None:
        """Keep the states of walks that have ended; score them, or tell at once."""
        if not requests:
            return
        self.store.put([r.entry for r in requests], x)
        if requests[0].score:
            scorer.submit(requests, x, [r.row for r in requests])
        else:
            self._tell(sampler, state, requests, [math.nan] * len(requests))

    def _scored(self, sampler, state, requests: list[Request], scores: Scores) -> None:
        rewards = scores.reward.tolist()
        self.ledger.decodes += len(requests)
        self.ledger.rescored += scores.calls - len(requests)
        self.ledger.scoring_seconds += scores.seconds
        self.ledger.first_error = self.ledger.first_error or scores.error
        for r, reward in zip(requests, rewards, strict=True):
            self.ledger.reward_calls[r.row] += 1
            r.failed |= math.isnan(reward)
            if r.stop == self.model.process.steps:
                self._see(reward, r.row)
        self._tell(sampler, state, requests, rewards)

    def _see(self, reward: float, row: int) -> None:
        self.history.nfe.append(int(self.ledger.rows.sum()))
        self.history.reward.append(reward)
        self.history.row.append(row)

    def _tell(self, sampler, state, requests: list[Request], rewards: list[float]) -> None:
        walks = []
        for r, reward in zip(requests, rewards, strict=True):
            broken = r.failed or not math.isfinite(r.log_ratio)
            walks.append(
                Walk(
                    r.entry,
                    r.src,
                    r.row,
                    r.key,
                    r.start,
                    r.stop,
                    r.score,
                    r.angle,
                    r.rows,
                    math.nan if broken else reward,
                    math.nan if broken else r.log_ratio,
                    broken,
                )
            )
        self.record.walks += walks
        if self.journal is not None:
            self._unsaved += walks
        sampler.tell(state, _walked([r.id for r in requests], walks))

    def _save(self, force: bool) -> None:
        due = force or time.monotonic() - self._saved_at > _JOURNAL_SECONDS
        if self.journal is None or not self._unsaved or not due:
            return
        self.journal.walks(self._unsaved, self.store, self.clean)
        self._unsaved = []
        self._saved_at = time.monotonic()


class _Stop:
    """Ctrl-C as a wish: the round ends, what was found is returned. A second one stops at once."""

    def __init__(self) -> None:
        self.asked = False
        self._mine = threading.current_thread() is threading.main_thread()
        if self._mine:
            self._before = signal.signal(signal.SIGINT, self._ask)

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def close(self) -> None:
        if self._mine:
            signal.signal(signal.SIGINT, self._before)


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _walked(ids: list[int], walks: list[Walk]) -> Walked:
    return Walked(
        torch.tensor(ids, dtype=torch.int64),
        torch.tensor([w.reward for w in walks], dtype=torch.float64),
        torch.tensor([w.log_ratio for w in walks], dtype=torch.float64),
        torch.tensor([w.failed for w in walks], dtype=torch.bool),
    )
