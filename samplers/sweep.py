"""What does more compute buy, and with which sampler? Tasks x samplers x network rows x seeds.

A sweep lives in a folder: every run is kept there as a record while it goes and as one row when it
is done, so that a sweep that was stopped, killed or asked again goes on where it was and redoes
nothing. Settings of a sampler are chosen, where several are given, by a search on seeds that are
not reported; what the search cost is a column.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from samplers import table
from samplers.ancestral import Ancestral
from samplers.core import Budget, Sampler
from samplers.engine import Engine, Settings
from samplers.result import Result
from samplers.run import sample
from samplers.scoring import call_reward, reward_name
from samplers.spec import encode
from steering.core import Model
from steering.metrics import Extractor

_TUNING, _REFERENCE = 1_000_000, 2_000_000  # first seeds of the search and of the reference
_PART = 500  # walks per prompt in a file of the reference
_LEAST = {"seeds": 1, "draws": 2, "reference": 0, "tuning_seeds": 1, "batch": 1}
_DISTANCES = ("frechet", "mmd")  # objectives of which less is better
Candidates = Sampler | Sequence[Sampler]


@dataclass(frozen=True)
class Sweep:
    """Every task with every sampler at every budget, over seeds.

    Args:
        model: what is steered.
        tasks: rewards by name.
        samplers: by name; of a list of samplers the best by `objective` is taken, for each task and
            budget anew, over `tuning_seeds` seeds of their own.
        nfe: hard limits of network rows per prompt.
        seeds: runs of each, seeds 0, 1, ...
        lam: inverse temperature λ.
        draws: per prompt; what rewards and distances are measured on.
        also: held-out rewards.
        extractor: what distances are measured with; None measures none.
        reference: independent walks per prompt, weighed by exp(λ reward), that stand for the target
            law; distances are to it. 0: there is no distance.
        objective: what settings are chosen by: "reward" (the mean over draws) or "best" (of them),
            higher is better; or "frechet" or "mmd" to the reference, lower is better.
        tuning_seeds: seeds of the search.
        batch: walks that share a network call.

    Raises:
        ValueError, TypeError: an argument that cannot be.
    """

    model: Model
    tasks: Mapping[str, Any]
    samplers: Mapping[str, Candidates]
    nfe: Sequence[int]
    seeds: int = 3
    lam: float = 1.0
    draws: int = 1000
    also: Sequence[Any] = ()
    extractor: Extractor | None = None
    reference: int = 0
    objective: str = "reward"
    tuning_seeds: int = 2
    batch: int = 64

    def __post_init__(self) -> None:
        for name in ("tasks", "samplers"):
            value = getattr(self, name)
            if not isinstance(value, Mapping) or not value:
                raise TypeError(f"{name}={value!r}: give a dictionary of at least one, by name.")
            _check_folders(name, value)
        if not self.nfe or not all(type(n) is int and n > 0 for n in self.nfe):
            raise ValueError(f"nfe={self.nfe!r}: give a list of network rows, ints > 0.")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"{name}={value!r}: give a whole number >= {least}.")
        if type(self.lam) not in (int, float) or not 0 <= self.lam < math.inf:
            raise ValueError(f"lam={self.lam!r}: give a finite number >= 0.")
        if not isinstance(self.also, (list, tuple)) or not all(map(callable, self.also)):
            raise TypeError(f"also={self.also!r}: give a list of rewards.")
        if self.objective not in ("reward", "best", *_DISTANCES):
            raise ValueError(f"objective={self.objective!r}: give reward, best, frechet or mmd.")
        if self.objective in _DISTANCES and not (self.extractor and self.reference):
            raise ValueError(f"objective={self.objective!r} needs an extractor and a reference.")
        if self.reference and self.extractor is None:
            raise ValueError(f"reference={self.reference} needs an extractor to measure with.")
        for name, reward in self.tasks.items():
            if not callable(reward):
                raise TypeError(f"tasks[{name!r}]={reward!r} is not callable.")
        for name, given in self.samplers.items():
            if not candidates(given) or not all(hasattr(s, "ask") for s in candidates(given)):
                raise TypeError(f"samplers[{name!r}]={given!r}: give a sampler, or a list of them.")

    def run(
        self,
        out: str | Path,
        *,
        minutes: float = math.inf,
        shard: tuple[int, int] = (0, 1),
        report: Callable[[str], None] = lambda line: None,
    ) -> bool:
        """Do what is missing in `out`; True if nothing is left for this shard.

        Args:
            out: folder of the sweep, made if missing. It may hold a smaller sweep of the same kind:
                tasks, samplers, budgets and seeds may be added.
            minutes: no run is started after so many; one that has been started is finished.
            shard: (k, n): do every n-th piece of work, from the k-th, of n processes side by side.
            report: takes a line of text for every run that was made.

        Raises:
            ValueError: the folder holds a sweep of another kind, or a shard that cannot be.
        """
        k, n = shard
        if not 0 <= k < n:
            raise ValueError(f"shard={shard}: give (k, n) with 0 <= k < n.")
        out = Path(out)
        self._keep_plan(out)
        until = time.monotonic() + 60 * minutes
        for work in list(self._work(out))[k::n]:
            for step in work:
                if time.monotonic() > until:
                    return False
                report(step())
        return True

    def _work(self, out: Path) -> Iterator[Iterator[Callable[[], str]]]:
        """Pieces of work that may be done side by side; each gives the runs it still lacks."""
        for part in range(math.ceil(self.reference / _PART)):
            yield self._missing_parts(out, [part])
        for nfe in sorted(self.nfe):
            for task in self.tasks:
                for name in self.samplers:
                    yield self._runs(out, task, name, nfe)

    def _missing_parts(self, out: Path, parts: Sequence[int]) -> Iterator[Callable[[], str]]:
        for part in parts:
            if not table.reference_part(out, part).exists():
                yield partial(self._walk_part, out, part)

    def _walk_part(self, out: Path, part: int) -> str:
        """Independent walks, with their features and their rewards of every task."""
        assert self.extractor is not None
        n = min(_PART, self.reference - part * _PART)
        run = sample(
            self.model, _nothing, Ancestral(n), seed=_REFERENCE + part, batch=self.batch,
            progress=False,
        )  # fmt: skip
        prompts = run.prompts
        scores = []
        for reward in self.tasks.values():
            pieces = [
                call_reward(reward, run.items[c], [prompts[k] for k in c.tolist()], "fail").reward
                for c in torch.arange(len(prompts)).split(self.batch)
            ]
            scores.append(torch.cat(pieces))
        tensors = {"features": self.extractor(run.items), "row": run.rows}
        tensors |= {f"reward.{table.slug(t)}": r for t, r in zip(self.tasks, scores, strict=True)}
        _write(table.reference_part(out, part), tensors)
        return f"reference {part * _PART + n} of {self.reference}"

    def _runs(self, out: Path, task: str, name: str, nfe: int) -> Iterator[Callable[[], str]]:
        """The search for settings, if there are several, and then the runs that are reported."""
        given = candidates(self.samplers[name])
        folder = table.runs(out) / table.slug(task) / table.slug(name) / str(nfe)
        choice, tuning = 0, 0
        if len(given) > 1:
            seeds = range(_TUNING, _TUNING + self.tuning_seeds)
            tried = [[folder / f"tuning-{c}" / str(s) for s in seeds] for c in range(len(given))]
            for sampler, folders in zip(given, tried, strict=True):
                for seed, one in zip(seeds, folders, strict=True):
                    if not (one / table.ROW).exists():
                        about = {"task": task, "sampler": name, "nfe": nfe, "seed": seed}
                        yield partial(self._walk, one, about, sampler, {})
            if self.objective in _DISTANCES:
                parts = range(math.ceil(self.reference / _PART))
                yield from self._missing_parts(out, parts)  # of another shard, perhaps
            choice, tuning = self._choose(out, tried)
        for seed in range(self.seeds):
            one = folder / str(seed)
            if not (one / table.ROW).exists():
                about = {"task": task, "sampler": name, "nfe": nfe, "seed": seed}
                yield partial(self._walk, one, about, given[choice], {"tuning_rows": tuning})

    def _choose(self, out: Path, tried: Sequence[Sequence[Path]]) -> tuple[int, int]:
        """Number of the best candidate, and the network rows that finding it took."""
        means, spent = [], 0
        for folders in tried:
            rows = [row for folder in folders for row in table.read_rows(out, folder)]
            spent += sum(row.get("rows") or 0 for row in rows)
            values = [row.get(self.objective) for row in rows]
            known = [v for v in values if v is not None]
            sign = -1 if self.objective in _DISTANCES else 1
            whole = len(known) == len(values)
            means.append(sign * sum(known) / len(known) if whole else -math.inf)
        return max(range(len(means)), key=means.__getitem__), spent

    def _walk(self, folder: Path, about: dict[str, Any], sampler: Sampler, more: dict) -> str:
        """One run, kept as a record while it goes and as rows, one per prompt, when it is done."""
        reward = self.tasks[about["task"]]
        folder.mkdir(parents=True, exist_ok=True)
        about = {**about, **more}
        label = "{task}, {sampler}, {nfe} rows, seed {seed}".format(**about)
        if refused := self._refusal(reward, sampler, about["nfe"]):
            rows = [{**about, "prompt": r, "refused": refused} for r in range(self._conditions)]
            _write_json(folder / table.ROW, rows)
            return f"{label}: refused, {refused}"
        run = sample(
            self.model, reward, sampler, nfe=about["nfe"], lam=self.lam, draws=self.draws,
            seed=about["seed"], also=self.also, batch=self.batch, progress=False,
            record=folder / "record",
        )  # fmt: skip
        if run.status != "done":
            raise KeyboardInterrupt
        if self.extractor is not None:
            tensors = {"row": run.rows, "counts": run.counts}
            if run.distinct:
                tensors["features"] = self.extractor(run.items)
            _write(folder / table.DRAWS, tensors)
        rows = [{**about, **_figures(run, r)} for r in range(self._conditions)]
        _write_json(folder / table.ROW, rows)
        known = [row["reward"] for row in rows if row["reward"] is not None]
        mean = f"reward {sum(known) / len(known):.4g}" if known else "nothing found"
        return f"{label}: {mean}, {run.spent.seconds:.1f} s"

    def _refusal(self, reward: Any, sampler: Sampler, nfe: int) -> str:
        """Why a sampler cannot take a budget (others still can); "" if it can."""
        engine = Engine(self.model, reward, settings=Settings(self.batch))
        try:
            sampler.init(engine.plan(self.lam, 0, Budget(nfe)))
        except ValueError as error:
            return str(error)
        return ""

    @property
    def _conditions(self) -> int:
        return len(self.model.prompts)

    def _keep_plan(self, out: Path) -> None:
        """Write what the sweep is of, or see that the folder is of the same."""
        fixed = {
            "model": self.model.name,
            "steps": self.model.process.steps,
            "prompts": [str(p) for p in self.model.prompts],
            "lam": self.lam,
            "draws": self.draws,
            "also": [reward_name(r) for r in self.also],
            "extractor": None if self.extractor is None else self.extractor.name,
            "reference": self.reference,
            "objective": self.objective,
            "tuning_seeds": self.tuning_seeds,
        }
        named = {
            "tasks": {name: reward_name(r) for name, r in self.tasks.items()},
            "samplers": {n: [encode(s) for s in candidates(g)] for n, g in self.samplers.items()},
        }
        path = out / table.PLAN
        kept = json.loads(path.read_text()) if path.exists() else {}
        for key, value in fixed.items():
            if kept and kept[key] != value:
                raise ValueError(
                    f"{key}: the sweep in {out} has {kept[key]!r}, asked for is {value!r}. Give "
                    "another folder."
                )
        for key, values in named.items():
            for name, value in values.items():
                if kept and kept[key].get(name, value) != value:
                    raise ValueError(
                        f"{key}: in {out} {name!r} is {kept[key][name]!r}, asked for is {value!r}. "
                        "Give it another name, or another folder."
                    )
            if kept and self.reference and key == "tasks" and values.keys() - kept[key].keys():
                raise ValueError(
                    f"tasks: the reference in {out} was scored for {', '.join(kept[key])} alone. "
                    "Give another folder."
                )
            named[key] = {**kept.get(key, {}), **values}
            _check_folders(key, named[key])
        out.mkdir(parents=True, exist_ok=True)
        _write_json(path, {**fixed, **named})


def _check_folders(kind: str, names: Mapping[str, Any]) -> None:
    """ValueError unless every name has a folder of its own."""
    taken: dict[str, str] = {}
    for name in names:
        other = taken.setdefault(table.slug(str(name)), name)
        if other != name or not table.slug(str(name)):
            raise ValueError(
                f"{kind}: {name!r} has no folder of its own beside {other!r}: give it a name that "
                "differs in letters or digits."
            )


def candidates(given: Candidates) -> list[Sampler]:
    """The samplers of one name."""
    return list(given) if isinstance(given, (list, tuple)) else [given]  # type: ignore[list-item]


def _figures(run: Result, r: int) -> dict[str, Any]:
    """What one prompt's part of a run comes to; None where there is nothing to tell."""
    mine = run.rows == r
    share = run.counts[mine].double()
    share = share / share.sum()
    found = bool(mine.any())
    values = {
        "reward": float(share @ run.rewards[mine]) if found else math.nan,
        "best": float(run.rewards[mine].max()) if found else math.nan,
        **{
            f"also: {name}": float(share @ value[mine]) if found else math.nan
            for name, value in run.also.items()
        },
        "ess": float(run.ess[r]),
        "root_ess": float(run.root_ess[r]),
        "log_z": float(run.log_z[r]),
        # a run that went on from its record does not know how long it took before
        "seconds": math.nan if run.spent.replayed else run.spent.seconds / len(run.ess),
    }
    return {
        "prompt": r,
        "rows": int(run.spent.rows[r]),
        "reward_calls": int(run.spent.reward_calls[r]),
        "found": int(run.found[r]),
        "distinct": int(mine.sum()),
        "failed": run.failed,
        "biased": run.biased,
        "setting": str(run._spec.sampler),
        **{k: v if math.isfinite(v) else None for k, v in values.items()},
    }


def _nothing(items: Tensor, prompts: list) -> Tensor:
    return torch.zeros(len(items))


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = table.aside(path)
    save_file({k: v.contiguous() for k, v in tensors.items()}, part)
    part.replace(path)


def _write_json(path: Path, value: Any) -> None:
    table.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", path)
