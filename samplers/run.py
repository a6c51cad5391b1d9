"""`sample`, `load`, and what a run is made of besides its model and reward."""

from __future__ import annotations

import dataclasses
import inspect
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
from samplers.footprint import footprint
from samplers.progress import Progress
from samplers.result import Result, assemble
from samplers.scoring import OnError, reward_name
from samplers.spec import Spec, check_same_model, check_same_run, decode, encode, header, spec_of
from samplers.temper import find_lam
from steering.core import Guidance, Model
from steering.rewards.compose import Composable

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
        reward: (items, prompts) -> [N], higher is better; see `steering.rewards`. Called from a
            thread of its own, so that a slow one is waited for as little as can be.
        sampler: how, for instance `TreeSampling()`.
        nfe: hard limit of network rows per condition; a classifier-free-guidance pair is two.
        reward_calls: hard limit of items scored per condition; items scored again alone, because a
            batch of them raised, are counted apart, and so are those that a guidance asks about
            (`spent.guided`).
        seconds: of wall clock, for the run, not counting what a record answers; may overrun by one
            network call and the reward call that is running then (with offloaded networks, by the
            scoring of what waits, at most 64 items).
        draws: how many to draw per condition; None gives all that was found, with weights.
        lam: inverse temperature λ (1/λ weighs the KL to the model). Default 1.
        kl: instead of lam, the KL divergence in nats from the model to aim at; found on a counted
            pilot of a tenth of the budget.
        ess: instead of lam, the effective sample size per walk to aim at, in (0, 1); likewise.
        seed: all noise of the run is a pure function of it.
        also: held-out rewards of the draws; nothing is steered by them.
        guidance: bends steps, from `steering.guidance`; None is the sampler's own, if it has one.
        weights: "exact" corrects for the guidance, which then bends the steps that draw noise;
            "none" does not, bends all steps, and is labelled biased.
        batch: walks that share a network call.
        on_error: "fail": a reward that raises or is not finite makes a failed walk, never selected;
            "raise": it ends the run. Programming errors (a wrong shape, a TypeError) always do.
        progress: show a bar with the best and the mean reward, and in a notebook their curve; on a
            GPU first the memory that the run will take.
        record: folder to keep the run in as it goes; an interrupted run goes on from there, and so
            does a finished one when it is asked for with a larger nfe or reward_calls.

    Returns:
        The draws, their weights, and what was spent. Ctrl-C gives what was found so far.

    Raises:
        ValueError, TypeError: an argument that cannot be, before the first network row; after the
            pilot, a kl or ess that no lam reaches.
    """
    budget = Budget(nfe, reward_calls, seconds)
    guidance = _guidance_of(sampler, guidance)
    _check(model, reward, sampler, lam, kl, ess, seed, guidance, weights)
    _check_wishes(draws, also, batch, on_error)
    settings = Settings(batch, on_error, weights)
    aim = ("kl", float(kl)) if kl is not None else ("ess", float(ess)) if ess is not None else None
    spec = Spec(sampler, 1.0 if lam is None else float(lam), seed, budget, weights, aim)
    engine = Engine(model, reward, guidance, settings)
    if guidance is not None and weights == "exact" and not bool(model.process.stochastic.any()):
        raise ValueError(
            "guidance with weights='exact' needs a step that draws noise, and this chain has none: "
            "give from_pipeline an eta > 0, or say weights='none'."
        )
    quiet = (~model.process.stochastic).nonzero()[:, 0].tolist()
    if guidance is not None and weights == "exact" and quiet:
        warnings.warn(
            f"guidance is off at steps {', '.join(map(str, quiet))}, where no noise is drawn.",
            stacklevel=2,
        )
    for each in (reward, getattr(guidance, "reward", None), *also):
        if isinstance(each, Composable):
            each.load()  # what cannot be loaded is no reason to have walked
    if engine.bending is not None:
        engine.bending.check()
    expected = footprint(model, batch) if progress else None
    if expected is not None:
        tqdm.write(str(expected))
    book = None
    if record is not None and journal.exists(record):
        saved = journal.read(record)
        check_same_run(record, saved.header, header(model, reward, guidance, spec))
        engine = _reopened(model, reward, guidance, settings, saved)
        spec = _continued(record, saved, spec, engine)
        book = partial(journal.Journal, record, {})
    else:
        if aim is not None:
            sampler.init(engine.plan(1.0, seed, budget))  # refuses what it must before the pilot
            spec = find_lam(engine, spec, progress)
        engine.asked = spec
        if record is not None:
            book = partial(journal.Journal, record, header(model, reward, guidance, spec))
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
    batch: int = 64,
    on_error: OnError = "fail",
) -> Result:
    """Read a saved run back; `.more` goes on with it, in the same folder.

    Args:
        folder: what `Result.save` or `sample(record=...)` wrote.
        model, reward, guidance: those of the run. Nothing is drawn or scored again.
        sampler: needed only for a sampler of your own; the toolkit's are read from the record.
        draws, also: as in `sample`.
        batch, on_error: as in `sample`, for a later `.more`.

    Raises:
        FileNotFoundError: there is no record.
        CorruptRecordError: a checksum does not match, or a file is missing.
        ValueError: the record is of another model, prompts, reward or guidance, as far as their
            names tell.
    """
    saved = journal.read(folder)
    spec = spec_of(saved, sampler)
    guidance = _guidance_of(spec.sampler, guidance)
    _check(model, reward, spec.sampler, None, None, None, spec.seed, guidance, spec.weights)
    _check_wishes(draws, also, batch, on_error)
    check_same_model(folder, saved.header, header(model, reward, guidance, spec))
    settings = Settings(batch, on_error, spec.weights)
    engine = _reopened(model, reward, guidance, settings, saved)
    book = partial(journal.Journal, folder, {})
    ends = [note for note in saved.notes if "status" in note]
    engine.ledger.first_error = ends[-1].get("first_error") if ends else None
    result = _run(engine, spec, draws, tuple(also), progress=False, offline=True, book=book)
    if result.status == "interrupted" and ends:  # where the record ends, the run ended so
        result = dataclasses.replace(result, status=ends[-1]["status"])
    return result


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
    if not result.finished.all():
        _ = result.items  # what stands on its way walks on, and its state is let go
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
    grown.asked = engine.asked
    if engine.journal is not None:
        engine.journal.note({"spec": encode(spec)})
    before = len(engine.record.walks)
    longer = _run(grown, spec, result._draws, result._also, progress)
    if len(engine.record.walks) == before and longer.status == "done":
        warnings.warn(
            f"more() added no walk: {spec.sampler} was done under the limits {limits}. Raise the "
            "one that ended it, or start a run with another sampler.",
            stacklevel=3,
        )
    return longer


def save(result: Result, folder: str | Path) -> None:
    """`Result.save`."""
    engine = result._engine
    if engine.journal is not None and engine.journal.folder == Path(folder):
        return  # it is there: the run was kept as it went
    if journal.exists(folder):
        raise FileExistsError(f"{folder} holds a record already: give another folder.")
    # as it was asked for, so that it can be asked for again; then as it became
    asked = engine.asked or result._spec
    first_line = header(engine.model, engine.reward, engine.guidance, asked)
    book = journal.Journal(folder, first_line)
    walks = engine.record.walks
    for part in range(0, len(walks), _SAVED_AT_ONCE):
        book.walks(walks[part : part + _SAVED_AT_ONCE], engine.store, engine.clean)
    book.note({**_end(engine, result.status), "spec": encode(result._spec)})
    engine.journal = engine.journal or book


def _run(
    engine: Engine,
    spec: Spec,
    draws: int | None,
    also: tuple[Any, ...],
    progress: bool,
    offline: bool = False,
    book: Callable[[], journal.Journal] | None = None,
) -> Result:
    if spec.lam_walks and not int(engine.ledger.rows.sum()):  # a run that goes on has paid already
        engine.ledger.rows += torch.tensor(spec.lam_rows)
        engine.ledger.reward_calls += spec.lam_walks
    plan = engine.plan(spec.lam, spec.seed, spec.main_budget())
    state = spec.sampler.init(plan)
    if book is not None:  # not before the sampler took the plan: a refused run leaves no record
        engine.journal = book()
    seconds, nfe = spec.budget.seconds, spec.budget.nfe
    if seconds is not None:
        seconds = max(seconds - engine.ledger.seconds, 0.0)  # finding lam took some
    total = None if nfe is None else nfe * len(engine.model.prompts)
    with Progress(total, progress and not offline) as bar:
        status = engine.run(spec.sampler, state, plan, seconds, bar.update, offline)
    found = spec.sampler.result(state)
    spec = dataclasses.replace(spec, sampler=_settled(spec.sampler, state))
    if engine.journal is not None and not offline:
        engine.journal.note({**_end(engine, status), "spec": encode(spec)})
    by_entry = {w.entry: w.reward for w in engine.record.walks if w.score}
    rewards = {h: by_entry.get(engine.entry[h], math.nan) for h in found.id.tolist()}
    if engine.ledger.first_error and not len(found.id):
        warnings.warn(
            f"no item was scored: the reward failed every time, first with "
            f"{engine.ledger.first_error}",
            stacklevel=4,
        )
    return assemble(engine, spec, found, rewards, draws, also, status)


def _reopened(model, reward, guidance, settings: Settings, saved: journal.Saved) -> Engine:
    stores = saved.states.to(model.device), saved.cleans.to(model.device)
    return Engine(model, reward, guidance, settings, saved.record, *stores)


def _settled(sampler: Any, state: Any) -> Any:
    """The sampler with what it took from its budget made explicit, if it can say."""
    resolved = getattr(sampler, "resolved", None)
    return sampler if resolved is None else resolved(state)


def _continued(folder: Any, saved: journal.Saved, asked: Spec, engine: Engine) -> Spec:
    """What to run on top of a record: the same again, or the same under a larger budget.

    Raises:
        ValueError: a limit below the record's, or one that it has not.
    """
    kept = spec_of(saved, asked.sampler)
    began = decode(saved.header["spec"]["budget"], None)
    limits = ("nfe", "reward_calls")
    if all(getattr(asked.budget, name) == getattr(began, name) for name in limits):
        return dataclasses.replace(kept, sampler=asked.sampler, budget=asked.budget)
    for name in limits:
        had, wanted = getattr(kept.budget, name), getattr(asked.budget, name)
        if (had is None) != (wanted is None) or (had is not None and wanted < had):
            raise ValueError(
                f"{name}={wanted}: the record in {str(folder)!r} is of a run with {name}={had}. "
                "Give that or more, or another folder."
            )
    state = kept.sampler.init(engine.plan(kept.lam, kept.seed, kept.main_budget()))
    settled = _settled(kept.sampler, state)
    return dataclasses.replace(kept, sampler=settled, budget=asked.budget)


def _end(engine: Engine, status: str) -> dict[str, Any]:
    return {"status": status, "first_error": engine.ledger.first_error}


def _guidance_of(sampler: Any, given: Guidance | None) -> Guidance | None:
    """The guidance of a run: the one given, or the sampler's own."""
    return getattr(sampler, "guidance", None) if given is None else given


def _check(model, reward, sampler, lam, kl, ess, seed, guidance, weights) -> None:
    Model.check(model)
    _check_reward("reward", reward)
    if isinstance(sampler, type):
        name = sampler.__name__
        raise TypeError(f"sampler={name} is a class: give an instance, {name}().")
    missing = [m for m in ("init", "ask", "tell", "done", "result") if not hasattr(sampler, m)]
    if missing:
        raise TypeError(f"sampler={sampler!r} has no {', '.join(missing)}: give a sampler.")
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
    if isinstance(guidance, type):
        name = guidance.__name__
        raise TypeError(f"guidance={name} is a class: give an instance, {name}().")
    if getattr(guidance, "reward", None) is not None:
        _check_reward(f"reward of {type(guidance).__name__}", guidance.reward)
    needed = ("propose", "rows", "exact", "differentiates")
    lacking = [m for m in needed if not hasattr(guidance, m)]
    if guidance is not None and lacking:
        raise TypeError(f"guidance={guidance!r} has no {', '.join(lacking)}: give a Guidance.")
    if guidance is not None and weights == "exact" and not guidance.exact:
        name = type(guidance).__name__
        raise ValueError(f"weights='exact': {name} has no density, so say weights='none'.")


def _check_reward(name: str, reward: Any) -> None:
    if isinstance(reward, type):
        raise TypeError(f"{name}={reward.__name__} is a class: give an instance of it.")
    if not callable(reward):
        raise TypeError(f"{name}={reward!r} is not callable: give (items, prompts) -> [N].")
    try:
        inspect.signature(reward).bind(None, ())
    except ValueError:  # built in, without a signature
        return
    except TypeError as error:
        raise TypeError(
            f"{name}: {reward_name(reward)} cannot be called with (items, prompts): {error}."
        ) from error


def _check_wishes(draws, also, batch, on_error) -> None:
    if draws is not None and (isinstance(draws, bool) or not isinstance(draws, int) or draws < 1):
        raise ValueError(f"draws={draws!r}: give a whole number >= 1, or None for all.")
    if not isinstance(also, (list, tuple)):
        raise TypeError(f"also={also!r}: give a list of rewards, (items, prompts) -> [N].")
    for held_out in also:
        _check_reward("also", held_out)
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise ValueError(f"batch={batch!r}: give a whole number >= 1.")
    if on_error not in ("fail", "raise"):
        raise ValueError(f"on_error={on_error!r}: give 'fail' or 'raise'.")
