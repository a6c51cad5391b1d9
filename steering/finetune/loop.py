"""What every way of tuning shares: a copy to tune, guarded updates, checkpoints and a history."""

from __future__ import annotations

import copy
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from steering.pipelines.request import networks

_PATIENCE = 5  # updates in a row that may fail
Weights = dict[str, nn.Parameter]
_STATE, _SETTINGS, _HISTORY = "state.safetensors", "settings.json", "history.jsonl"


@dataclass(frozen=True)
class Tuned:
    """A pipeline that was tuned, and how.

    Args:
        pipe: an ordinary pipeline, like the one that was given.
        history: one entry for each update: "update", from 1 on; "loss" and "gradient", its norm
            before clipping; "seconds"; "forward" and "backward", network rows of this update, all
            processes together; "skipped"; and what the method adds.
    """

    pipe: Any
    history: list[dict[str, Any]] = field(repr=False)

    @property
    def skipped(self) -> int:
        """Updates that were left out because something in them was not finite."""
        return sum(line["skipped"] for line in self.history)

    def total(self, name: str) -> float:
        """Sum of "seconds", "forward", "backward" or "rewards" over all updates."""
        return sum(line[name] for line in self.history)

    def save(self, folder: str | Path) -> None:
        """Write the pipeline; `SequencePipeline.from_pretrained` reads it."""
        self.pipe.save_pretrained(folder)


class NotFiniteError(RuntimeError):
    """Several updates in a row were not finite. `tuned` is what came of those before."""

    def __init__(self, message: str, tuned: Tuned) -> None:
        super().__init__(message)
        self.tuned = tuned


@dataclass(frozen=True)
class Figures:
    """What an update reports: means over its batch, and how much it took."""

    means: dict[str, float]
    counts: dict[str, int]


def copied(pipe: Any) -> tuple[Any, nn.Module, nn.Module]:
    """A pipeline with a network of its own to tune, in float32; that network, and the original.

    All else is shared. Where some weights of the original require gradients, as adapters do, these
    are tuned; where none do, as in the built-in checkpoints, all are.

    Raises:
        ValueError: no pipeline, or one without one network.
    """
    if not hasattr(pipe, "components"):
        raise ValueError(f"pipe is a {type(pipe).__name__}, no diffusers pipeline.")
    found = networks(pipe)
    if len(found) != 1:
        raise ValueError(f"pipe has networks {sorted(found)}: tuning needs a pipeline with one.")
    ((name, original),) = found.items()
    mine, network = copy.copy(pipe), copy.deepcopy(original).float().eval()
    setattr(mine, name, network)
    if not any(p.requires_grad for p in network.parameters()):
        network.requires_grad_(True)
    return mine, network, original


def adam(network: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Adam (arXiv 1412.6980) of the weights that require gradients."""
    return torch.optim.Adam((p for p in network.parameters() if p.requires_grad), lr, fused=True)


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """No weight of a network gathers gradients inside; all as it was found afterwards."""
    free = [p for p in network.parameters() if p.requires_grad]
    for p in free:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in free:
            p.requires_grad_(True)


def accelerator_of(device: torch.device) -> Any:
    """accelerate's view of this process: its number, others, and the precision asked for.

    Raises:
        ValueError: float16, several processes with the network on another's device, or processes
            that do not know of each other.
    """
    from accelerate import Accelerator

    accelerator = Accelerator()
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise ValueError(
            f"mixed_precision={accelerator.mixed_precision!r}: losses are not scaled for it and "
            "would overflow or vanish, launch with 'bf16' or 'no'."
        )
    launched = os.environ.get("WORLD_SIZE", "1")
    if launched != str(accelerator.num_processes):
        raise ValueError(
            f"{launched} processes were launched, and accelerate sees {accelerator.num_processes}: "
            "each would do all the work. On CPUs, set ACCELERATE_USE_CPU=1."
        )
    mine = accelerator.device
    if accelerator.num_processes > 1 and (mine.type, mine.index or 0) != (
        device.type,
        device.index or 0,
    ):
        raise ValueError(
            f"the network is on {device}, and this is process {accelerator.process_index} on "
            f"{mine}: move it there first, .to(accelerate.Accelerator().device)."
        )
    return accelerator


def fit(
    pipe: Any,
    network: nn.Module,
    gradient: Callable[[int], Figures],
    watch: Callable[[], Figures],
    told: dict[str, Any],
    optimizer: torch.optim.Optimizer,
    *,
    updates: int,
    clip: float,
    every: int,
    out: str | Path | None,
    progress: bool,
    advice: str,
    accelerator: Any = None,
    rate: Callable[[int], float] | None = None,
    more: Mapping[str, Tensor] = MappingProxyType({}),
    label: str = "",
) -> Tuned:
    """Updates of an optimiser, left out where they are not finite, on one process or several.

    Args:
        pipe: whose network is tuned.
        network: tuned in place.
        gradient: number of an update, from 0 on -> adds its gradient to the weights' and says what
            it saw. A pure function of that number and the weights.
        watch: looks at the model as it is, at every checkpoint.
        told: what decides the run beside what is known here, for `out`.
        optimizer: of the weights that require gradients.
        updates: how many, those of an earlier run in `out` included.
        clip: longest gradient; longer ones are shortened to it.
        every: updates between two checkpoints.
        out: folder of checkpoints, from which the run goes on; None keeps none.
        progress: show a bar.
        advice: what to do where updates are not finite.
        accelerator: see `accelerator_of`; gradients are averaged over its processes. None: this
            process is alone with its network.
        rate: number of an update -> its share of the optimiser's learning rates. None: all of it.
        more: tensors that belong to the state, too; changed in place as the run goes on.
        label: of the bar.

    Raises:
        NotFiniteError: several updates in a row were not finite.
        ValueError: `out` is of a run with other settings.
    """
    from tqdm.auto import tqdm

    weights: Weights = {n: p for n, p in network.named_parameters() if p.requires_grad}
    alone = accelerator is None or accelerator.num_processes == 1
    main = accelerator is None or accelerator.is_main_process
    folder, history = None if out is None else Path(out), list[dict[str, Any]]()
    told = told | {
        "lr": optimizer.param_groups[0]["lr"],
        "clip": clip,
        "processes": 1 if accelerator is None else accelerator.num_processes,
    }
    if folder is not None:
        # the main process cuts the history, where the others read it
        with nullcontext() if accelerator is None else accelerator.main_process_first():
            history = _resumed(folder, weights, optimizer, told, main, more)
    peaks = [group["lr"] for group in optimizer.param_groups]
    tuned, failed = Tuned(pipe, history), 0
    shown = tqdm(
        total=updates,
        initial=len(history),
        unit="update",
        desc=label or None,
        mininterval=1.0,
        disable=not (progress and main),
    )
    with shown as bar:
        for number in range(len(history), updates):
            began = time.perf_counter()
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * (1.0 if rate is None else rate(number))
            optimizer.zero_grad()
            seen = gradient(number)
            if not alone:
                seen = _averaged(seen, weights, accelerator)
            norm = float(nn.utils.clip_grad_norm_(weights.values(), clip))
            good = all(map(math.isfinite, (*seen.means.values(), norm)))
            if good:
                optimizer.step()
            failed = 0 if good else failed + 1
            line = {"update": number + 1, **seen.means, "gradient": norm, **seen.counts}
            line |= {"seconds": time.perf_counter() - began, "skipped": not good}
            history.append(line)
            bar.update()
            bar.set_postfix({k: f"{v:.4g}" for k, v in seen.means.items()}, refresh=False)
            # what follows an update that failed is not known to be good
            due = good and ((number + 1) % every == 0 or number + 1 == updates)
            if due:
                line |= watch().means
            if folder is not None and main:
                with (folder / _HISTORY).open("a") as f:
                    f.write(json.dumps(_plain(line)) + "\n")
                if due:
                    _save(folder / _STATE, weights, optimizer, number + 1, more)
            if failed == _PATIENCE:
                bad = [name for name, v in line.items() if isinstance(v, float) and v != v]
                optimizer.zero_grad()
                kept = "" if folder is None else f" The last good checkpoint is in {folder}."
                raise NotFiniteError(
                    f"{_PATIENCE} updates in a row, the last of them number {number + 1}, were "
                    f"not finite ({', '.join(bad) or 'infinite'}), and were left out.{kept} "
                    f"{advice}",
                    tuned,
                )
    optimizer.zero_grad()
    return tuned


def _averaged(seen: Figures, weights: Weights, accelerator: Any) -> Figures:
    """Gradients and means averaged over processes; counts summed."""
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in weights.values()]
    flat = torch.cat([g.flatten() for g in grads])
    flat = accelerator.reduce(flat, reduction="mean")
    for p, mean in zip(weights.values(), flat.split([g.numel() for g in grads]), strict=True):
        p.grad = mean.view_as(p)
    told = torch.tensor(list(seen.means.values()), device=flat.device)
    means = accelerator.reduce(told, reduction="mean").tolist()
    counts = {name: n * accelerator.num_processes for name, n in seen.counts.items()}
    return Figures(dict(zip(seen.means, means, strict=True)), counts)


def _resumed(
    folder: Path,
    weights: Weights,
    optimizer: torch.optim.Optimizer,
    told: dict[str, Any],
    main: bool,
    more: Mapping[str, Tensor],
) -> list[dict[str, Any]]:
    """The history of an earlier run in a folder up to its checkpoint, whose state is restored.

    Raises:
        ValueError: it had other settings.
    """
    told = json.loads(json.dumps(told, default=str))
    settings, state, log = folder / _SETTINGS, folder / _STATE, folder / _HISTORY
    if settings.exists():
        had = json.loads(settings.read_text())
        other = [f"{k}={had.get(k)!r}, not {v!r}" for k, v in told.items() if had.get(k) != v]
        if other:
            raise ValueError(
                f"out={str(folder)!r} holds a run with {'; '.join(other)}: give the same, or "
                "another folder."
            )
    elif main:
        folder.mkdir(parents=True, exist_ok=True)
        settings.write_text(json.dumps(told, indent=1) + "\n")
    done = _load(state, weights, optimizer, more) if state.exists() else 0
    written = log.read_text().splitlines() if log.exists() else []
    lines = written[:done]
    if main and lines != written:  # others may be reading what is as it should be
        log.write_text("".join(line + "\n" for line in lines))
    return [
        {k: math.nan if v is None else v for k, v in json.loads(line).items()} for line in lines
    ]


def _save(
    path: Path,
    weights: Weights,
    optimizer: torch.optim.Optimizer,
    done: int,
    more: Mapping[str, Tensor],
) -> None:
    tensors = {f"more/{name}": t.contiguous() for name, t in more.items()}
    for name, p in weights.items():
        tensors[f"weight/{name}"] = p.detach().contiguous()
        for key, value in optimizer.state[p].items():
            tensors[f"adam/{key}/{name}"] = value.contiguous()
    part = path.with_suffix(".part")
    save_file(tensors, part, metadata={"updates": str(done)})
    part.replace(path)  # never a half-written state under the name that is resumed from


@torch.no_grad()
def _load(
    path: Path, weights: Weights, optimizer: torch.optim.Optimizer, more: Mapping[str, Tensor]
) -> int:
    """Restore what `_save` wrote, in place; returns how many updates were done."""
    tensors = load_file(path)
    for name, t in more.items():
        t.copy_(tensors[f"more/{name}"])
    for name, p in weights.items():
        p.copy_(tensors[f"weight/{name}"])
        moments = {key: tensors[f"adam/{key}/{name}"] for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[p] = {k: v.to(p.device) for k, v in moments.items()}
        optimizer.state[p]["step"] = tensors[f"adam/step/{name}"].to(p.device)
    with safe_open(path, "pt") as f:
        return int(f.metadata()["updates"])


def _plain(line: dict[str, Any]) -> dict[str, Any]:
    """As JSON has it: what is not finite is null."""
    return {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()
    }


def check_counts(**given: Any) -> None:
    """ValueError for what is no whole number from 1 on, by name."""
    for name, value in given.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"{name}={value!r}: give a whole number from 1 on.")


def check_numbers(above: bool = False, **given: Any) -> None:
    """ValueError for what is no finite number from 0 on (above 0), by name."""
    for name, value in given.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value < 0 or (above and value == 0):
            least = "above 0" if above else "from 0 on"
            raise ValueError(f"{name}={value!r}: give a finite number {least}.")
