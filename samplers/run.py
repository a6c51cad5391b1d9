"""`sample`, `load`, and what a run is made of besides its model and reward."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from samplers import journal
from samplers.core import Budget, Sampler
from samplers.engine import Engine, Settings
from samplers.result import Result, assemble
from samplers.scoring import OnError, reward_name
from samplers.spec import Spec, check_same_run, encode, header, spec_of
from samplers.temper import find_lam
from steering.core import Guidance, Model

_SAVED_AT_ONCE = 4096  # walks per file of states


def sample(
    model: Model,
    reward: Any,
    sampler: Sampler,
    *,
    nfe: int | None = None,
    reward_calls: int | None = None,
    seconds: float | None = None,
    draws: int | None = None,
    lam: float | None = None,
    kl: float | None = None,
    ess: float | None = None,
    seed: int = 0,
    also: Sequence[Any] = (),
    guidance: Guidance | None = None,
    weights: str = "exact",
    batch: int = 64,
    on_error: OnError = "fail",
    progress: bool = True,
    record: str | Path | None = None,
) -> Result:
    """Draw from p(x_0) exp(λ reward(x_0)), or search for the best x_0 under it.

    Args:
        model: what is steered, from `steering.from_pipeline` or made by hand.
        reward: (items, prompts) -> [N], higher is better; see `steering.rewards`.
        sampler: how, for instance `TreeSampling()`.
        nfe: hard limit of network rows per condition; a classifier-free-guidance pair is two.
        reward_calls: hard limit of items scored per condition.
        seconds: of wall clock, for the run; may overrun by one network call.
        draws: how many to draw per condition; None gives all that was found, with weights.
        lam: inverse temperature λ (1/λ weighs the KL to the model). Default 1.
        kl: instead of lam, the KL divergence in nats from the model to aim at.
        ess: instead of lam, the effective sample size per walk to aim at, in (0, 1).
        seed: all noise of the run is a pure function of it.
        also: held-out rewards of the draws; nothing is steered by them.
        guidance: bends the steps that draw noise.
        weights: "exact" corrects for the guidance; "none" does not, and is labelled biased.
        batch: walks that share a network call.
        on_error: "fail": a reward that raises or is not finite makes a failed walk, never selected;
            "raise": it ends the run. Programming errors (a wrong shape, a TypeError) always do.
        progress: show a bar with the best and the mean reward.
        record: folder to keep the run in as it goes; an interrupted run goes on from there.

    Returns:
        The draws, their weights, and what was spent. Ctrl-C gives what was found so far.

    Raises:
        ValueError, TypeError: an argument that cannot be, before the first network row.
    """
    budget = Budget(nfe, reward_calls, seconds)
    _check(model, reward, sampler, draws, lam, kl, ess, seed, guidance, weights, batch, on_error)
    if callable(also) or not all(callable(held_out) for held_out in also):
        raise TypeError(f"also={also!r}: give a list of rewards, (items, prompts) -> [N].")
    settings = Settings(batch, on_error, weights)
    spec = Spec(sampler, 1.0 if lam is None else float(lam), seed, budget, weights)
    engine = Engine(model, reward, guidance, settings)
    if guidance is not None and weights == "exact" and not bool(model.process.stochastic.any()):
        raise ValueError(
            "guidance with weights='exact' needs a step that draws noise, and this chain has none: "
            "give from_pipeline an eta > 0, or say weights='none'."
        )
    aim = {"kl": kl, "ess": ess} if kl is not None or ess is not None else None
    book = None
    if record is not None and journal.exists(record):
        saved = journal.read(record)
        kept = spec_of(saved, sampler)
        check_same_run(record, saved.header, header(model, reward, spec, aim))
        spec = dataclasses.replace(kept, sampler=sampler, budget=budget)
        engine = _reopened(model, reward, guidance, settings, saved)
        book = partial(journal.Journal, record, {})
    else:
        if aim is not None:
            spec = find_lam(engine, spec, aim)
        if record is not None:
            book = partial(journal.Journal, record, header(model, reward, spec, aim))
    return _run(engine, spec, draws, tuple(also), progress, book=book)


def load(
    folder: str | Path,
    model: Model,
    reward: Any,
    *,
    sampler: Sampler | None = None,
    guidance: Guidance | None = None,
    draws: int | None = None,
    also: Sequence[Any] = (),
) -> Result:
    """Read a saved run back; `.more` goes on with it, in the same folder.

    Args:
        folder: what `Result.save` or `sample(record=...)` wrote.
        model, reward, guidance: those of the run. Nothing is drawn or scored again.
        sampler: needed only for a sampler of your own; the toolkit's are read from the record.
        draws, also: as in `sample`.

    Raises:
        FileNotFoundError: there is no record.
        CorruptRecordError: a checksum does not match, or a file is missing.
        ValueError: the record is of another model or reward, as far as their names tell.
    """
    saved = journal.read(folder)
    spec = spec_of(saved, sampler)
    same = {"model": model.name, "steps": model.process.steps, "reward": reward_name(reward)}
    for name, mine in same.items():
        if saved.header[name] != mine:
            raise ValueError(
                f"{name}: the record in {folder} is of {saved.header[name]!r}, given is {mine!r}. "
                "Build the model and the reward as they were."
            )
    engine = _reopened(model, reward, guidance, Settings(weights=spec.weights), saved)
    book = partial(journal.Journal, folder, {})
    return _run(engine, spec, draws, tuple(also), progress=False, offline=True, book=book)


def more(result: Result, *, nfe, reward_calls, seconds, progress) -> Result:
    """`Result.more`."""
    Budget(nfe, reward_calls, seconds)
    if nfe is None and reward_calls is None and seconds is None:
        raise ValueError("more() without nfe, reward_calls or seconds adds nothing: give one.")
    old, engine = result._spec, result._engine

    def add(name: str, had: int | None, extra: int | None) -> int | None:
        if extra is not None and had is None:
            raise ValueError(f"{name}: the run had no such limit, so there is none to raise.")
        return had if extra is None or had is None else had + extra

    limits = Budget(
        add("nfe", old.budget.nfe, nfe),
        add("reward_calls", old.budget.reward_calls, reward_calls),
        seconds,
    )
    spec = dataclasses.replace(old, budget=limits)
    grown = Engine(
        engine.model,
        engine.reward,
        engine.guidance,
        engine.settings,
        engine.record,
        engine.store,
        engine.clean,
        engine.journal,
    )
    if engine.journal is not None:
        engine.journal.note({"spec": encode(spec)})
    return _run(grown, spec, result._draws, result._also, progress)


def save(result: Result, folder: str | Path) -> None:
    """`Result.save`."""
    engine = result._engine
    if journal.exists(folder):
        raise FileExistsError(f"{folder} holds a record already: give another folder.")
    book = journal.Journal(folder, header(engine.model, engine.reward, result._spec, None))
    walks = engine.record.walks
    for part in range(0, len(walks), _SAVED_AT_ONCE):
        book.walks(walks[part : part + _SAVED_AT_ONCE], engine.store, engine.clean)
    book.note({"status": result.status})


def _run(
    engine: Engine,
    spec: Spec,
    draws: int | None,
    also: tuple[Any, ...],
    progress: bool,
    offline: bool = False,
    book: Callable[[], journal.Journal] | None = None,
) -> Result:
    budget = spec.budget
    if budget.nfe is not None and spec.pilot:
        budget = dataclasses.replace(budget, nfe=budget.nfe - max(spec.pilot_rows))
    if budget.reward_calls is not None and spec.pilot:
        budget = dataclasses.replace(budget, reward_calls=budget.reward_calls - spec.pilot)
    if spec.pilot and not int(engine.ledger.rows.sum()):  # a run that goes on has paid already
        engine.ledger.rows += torch.tensor(spec.pilot_rows)
        engine.ledger.reward_calls += spec.pilot
    plan = engine.plan(spec.lam, spec.seed, budget)
    state = spec.sampler.init(plan)
    if book is not None:  # not before the sampler took the plan: a refused run leaves no record
        engine.journal = book()
    with _Progress(engine, spec, progress and not offline) as bar:
        status = engine.run(spec.sampler, state, plan, budget.seconds, bar.update, offline)
    found = spec.sampler.result(state)
    resolved = getattr(spec.sampler, "resolved", None)
    if resolved is not None:
        spec = dataclasses.replace(spec, sampler=resolved(state))
    if engine.journal is not None and not offline:
        engine.journal.note({"status": status, "spec": encode(spec)})
    by_entry = {w.entry: w.reward for w in engine.record.walks if w.score}
    rewards = {h: by_entry.get(engine.entry[h], math.nan) for h in found.id.tolist()}
    if engine.ledger.first_error and not len(found.id):
        warnings.warn(
            f"no item was scored: the reward failed every time, first with "
            f"{engine.ledger.first_error}",
            stacklevel=4,
        )
    return assemble(engine, spec, found, rewards, draws, also, status)


class _Progress:
    """A bar over network rows, with the best and the mean reward."""

    def __init__(self, engine: Engine, spec: Spec, show: bool) -> None:
        nfe = spec.budget.nfe
        total = None if nfe is None else nfe * len(engine.model.prompts)
        self._engine, self._seen, self._sum, self._best = engine, 0, 0.0, -math.inf
        self._finite = 0
        self._bar = tqdm(total=total, unit="row", disable=not show, mininterval=0.2)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *raised: object) -> None:
        self._bar.close()

    def update(self, engine: Engine) -> None:
        if self._bar.disable:
            return
        for r in engine.history.reward[self._seen :]:
            if math.isfinite(r):
                self._best = max(self._best, r)
                self._sum += r
                self._finite += 1
        self._seen = len(engine.history.reward)
        if self._finite:
            self._bar.set_postfix(
                best=f"{self._best:.4g}", mean=f"{self._sum / self._finite:.4g}", refresh=False
            )
        self._bar.update(int(engine.ledger.rows.sum()) - self._bar.n)


def _reopened(model, reward, guidance, settings: Settings, saved: journal.Saved) -> Engine:
    stores = saved.states.to(model.device), saved.cleans.to(model.device)
    return Engine(model, reward, guidance, settings, saved.record, *stores)


def _check(
    model, reward, sampler, draws, lam, kl, ess, seed, guidance, weights, batch, on_error
) -> None:
    if not isinstance(model, Model):
        hint = "steering.from_pipeline(pipe) makes one of a diffusers pipeline"
        raise TypeError(f"model is a {type(model).__name__}, not a steering.Model: {hint}.")
    if not callable(reward):
        raise TypeError(f"reward={reward!r} is not callable: give (items, prompts) -> [N].")
    if isinstance(sampler, type):
        name = sampler.__name__
        raise TypeError(f"sampler={name} is a class: give an instance, {name}().")
    missing = [m for m in ("init", "ask", "tell", "done", "result") if not hasattr(sampler, m)]
    if missing:
        raise TypeError(f"sampler={sampler!r} has no {', '.join(missing)}: give a sampler.")
    if draws is not None and (isinstance(draws, bool) or not isinstance(draws, int) or draws < 1):
        raise ValueError(f"draws={draws!r}: give a whole number >= 1, or None for all.")
    if sum(v is not None for v in (lam, kl, ess)) > 1:
        raise ValueError(f"lam={lam}, kl={kl}, ess={ess}: give one of them, each fixes λ.")
    if lam is not None and not (isinstance(lam, (int, float)) and 0 <= lam < math.inf):
        raise ValueError(f"lam={lam!r}: give a finite number >= 0.")
    if kl is not None and not (isinstance(kl, (int, float)) and 0 < kl < math.inf):
        raise ValueError(f"kl={kl!r}: give a number of nats > 0.")
    if ess is not None and not (isinstance(ess, (int, float)) and 0 < ess < 1):
        raise ValueError(f"ess={ess!r}: give a share of the walks in (0, 1).")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed={seed!r}: give an int.")
    if weights not in ("exact", "none"):
        raise ValueError(f"weights={weights!r}: give 'exact' or 'none'.")
    if guidance is not None and not hasattr(guidance, "propose"):
        raise TypeError(f"guidance={guidance!r} has no propose: give a Guidance.")
    if guidance is not None and weights == "exact" and not guidance.exact:
        name = type(guidance).__name__
        raise ValueError(f"weights='exact': {name} has no density, so say weights='none'.")
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise ValueError(f"batch={batch!r}: give a whole number >= 1.")
    if on_error not in ("fail", "raise"):
        raise ValueError(f"on_error={on_error!r}: give 'fail' or 'raise'.")
