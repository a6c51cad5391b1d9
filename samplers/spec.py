"""All that decides a run besides its model and reward, in memory and as JSON."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from samplers import journal
from samplers.core import Budget, Sampler
from samplers.scoring import reward_name
from steering.core import Guidance, Model


@dataclass(frozen=True)
class Spec:
    """All that decides a run besides its model and reward."""

    sampler: Any
    lam: float
    seed: int
    budget: Budget  # of the whole run, finding lam included
    weights: str
    aim: tuple[str, float] | None = None  # the target lam was sought for: ("kl" or "ess", value)
    lam_walks: int = 0  # walks per condition that were spent on finding lam
    lam_rows: tuple[int, ...] = ()  # [R] network rows that those took

    def main_budget(self) -> Budget:
        """What finding lam has left of the budget."""
        nfe, reward_calls = self.budget.nfe, self.budget.reward_calls
        if nfe is not None and self.lam_rows:
            nfe -= max(self.lam_rows)
        if reward_calls is not None:
            reward_calls -= self.lam_walks
        return dataclasses.replace(self.budget, nfe=nfe, reward_calls=reward_calls)


def encode(value: Any) -> Any:
    """A sampler, a Spec or a plain value as JSON; TypeError for what JSON cannot hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, (tuple, list)):
        return [encode(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"type": "float", "value": str(value)}  # JSON has no word for it
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{type(value).__name__} in a sampler's settings cannot be recorded as JSON.")


def decode(value: Any, own: Sampler | None) -> Any:
    """What `encode` was given; `own` tells the class of a sampler of its name that is not ours."""
    if isinstance(value, list):
        return tuple(decode(v, own) for v in value)
    if not isinstance(value, dict):
        return value
    import samplers

    known = {"Spec": Spec, "Budget": Budget, **{n: getattr(samplers, n) for n in samplers.__all__}}
    kind = value["type"]
    if kind == "float":
        return float(value["value"])
    if own is not None and type(own).__name__ == kind:
        if not dataclasses.is_dataclass(own):
            return own
        known[kind] = type(own)
    if not dataclasses.is_dataclass(known.get(kind)):
        raise ValueError(f"the record names a sampler {kind!r} that is not ours: give sampler=.")
    return known[kind](**{k: decode(v, own) for k, v in value.items() if k != "type"})


def header(model: Model, reward: Any, guidance: Guidance | None, spec: Spec) -> dict[str, Any]:
    """First line of a run's journal."""
    return {
        "model": model.name,
        "steps": model.process.steps,
        "prompts": [str(p) for p in model.prompts],
        "reward": reward_name(reward),
        "guidance": None if guidance is None else _guidance_name(guidance),
        "spec": encode(spec),
    }


def _guidance_name(guidance: Guidance) -> str:
    """A guidance with its settings, its reward by name: what a record knows it by."""
    name = type(guidance).__name__
    if not dataclasses.is_dataclass(guidance):
        return name
    settings = {f.name: getattr(guidance, f.name) for f in dataclasses.fields(guidance)}
    shown = {
        key: reward_name(value) if callable(value) else value
        for key, value in settings.items()
        if value is None or callable(value) or isinstance(value, (bool, int, float, str, tuple))
    }
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in shown.items())})"


def spec_of(saved: journal.Saved, own: Sampler | None) -> Spec:
    """The Spec of a saved run as it was last."""
    specs = [saved.header["spec"], *(n["spec"] for n in saved.notes if "spec" in n)]
    return decode(specs[-1], own)


def check_same_model(folder: Any, kept: dict[str, Any], asked: dict[str, Any]) -> None:
    """ValueError, naming the first difference, unless a record is of this model and reward, as far
    as their names tell."""
    for name in ("model", "steps", "prompts", "reward", "guidance"):
        if kept[name] != asked[name]:
            raise ValueError(_other(folder, name, kept[name], asked[name]))


def check_same_run(folder: Any, kept: dict[str, Any], asked: dict[str, Any]) -> None:
    """ValueError, naming the first difference, unless the record is of the run asked for, or of its
    beginning under a smaller budget."""
    check_same_model(folder, kept, asked)
    drop = ("budget", "lam_walks", "lam_rows", *(("lam",) if asked["spec"]["aim"] else ()))
    for name, value in asked["spec"].items():
        if name not in drop and kept["spec"][name] != value:
            raise ValueError(_other(folder, name, kept["spec"][name], value))


def _other(folder: Any, name: str, kept: Any, asked: Any) -> str:
    return (
        f"the record in {str(folder)!r} is of another run: its {name} is {kept!r}, asked for is "
        f"{asked!r}. Give another folder, or ask as it was asked."
    )
