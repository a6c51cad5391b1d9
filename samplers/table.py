"""What a sweep has found, read from its folder: rows, distances, means with intervals, tables."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import math
import re
import statistics
import uuid
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from steering.metrics import FEW, Moments, diversity, frechet, mmd, within
from steering.noise import root_key, uniform

PLAN, ROW, DRAWS = "sweep.json", "rows.json", "draws.safetensors"
DISTANCES = ("frechet", "mmd", "diversity")  # columns that rest on the extractor
_RESAMPLED = 2000  # of the bootstrap
_MEDIAN_OF = 1000  # items that the bandwidth of a reference is read off
Row = dict[str, Any]


def slug(name: str) -> str:
    """A name as a folder's: DTS* is "dts-star"."""
    return re.sub(r"[^\w]+", "-", name.lower().replace("*", "-star")).strip("-")


def aside(path: Path) -> Path:
    """A name beside a file that no other process writes to, to be moved to it when it is whole."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")


def write_text(text: str, path: Path) -> None:
    """Write a file at once."""
    part = aside(path)
    part.write_text(text, encoding="utf-8", newline="")
    part.replace(path)


def runs(out: Path) -> Path:
    """Where a sweep keeps its runs."""
    return out / "runs"


def reference_part(out: Path, part: int) -> Path:
    """A file of the independent walks that stand for the target law."""
    return out / "reference" / f"{part:05d}.safetensors"


def read(out: str | Path) -> list[Row]:
    """All rows of a sweep, one per task, sampler, budget, seed and prompt, with their distances.

    Rows that were refused have the key "refused" and no figures; rows of the search for settings
    are left out.

    Raises:
        FileNotFoundError: the folder holds no sweep.
    """
    out = Path(out)
    if not (out / PLAN).exists():
        raise FileNotFoundError(f"{out} holds no {PLAN}: give the folder of a sweep.")
    found = []
    for path in sorted(runs(out).glob(f"*/*/*/*/{ROW}")):
        found += read_rows(out, path.parent)
    return sorted(found, key=lambda r: (r["task"], r["sampler"], r["nfe"], r["seed"], r["prompt"]))


def read_rows(out: Path, folder: Path) -> list[Row]:
    """The rows of one run, with their distances to the reference as far as it has been walked."""
    rows = json.loads((folder / ROW).read_text())
    draws = folder / DRAWS
    if not draws.exists():
        return rows
    tensors, plan = load_file(draws), json.loads((out / PLAN).read_text())
    for row in rows:
        mine = tensors["row"] == row["prompt"]
        if not mine.any():
            continue
        target = reference(out, row["task"], row["prompt"])
        features, counts = tensors["features"][mine], tensors["counts"][mine]
        row |= distances(features, counts, target, plan["extractor"])
    return rows


@dataclass(frozen=True)
class Reference:
    """The target law of one task and prompt: independent walks weighed by exp(λ reward)."""

    features: Tensor  # [K, d] of the walks that hold all but a millionth of the weight
    weights: Tensor  # [K]
    moments: Moments
    bandwidth: float  # median distance of its items
    within: float  # E k(y, y') at that bandwidth
    ess: float


def reference(out: Path, task: str, prompt: int) -> Reference | None:
    """The target law of a task and prompt, as far as it has been walked; None where it rests on
    less than two effective walks, and where none is kept."""
    size = len(list((out / "reference").glob("*.safetensors")))
    return _reference(out, size, task, prompt) if size else None


@cache
def _reference(out: Path, size: int, task: str, prompt: int) -> Reference | None:
    plan = json.loads((out / PLAN).read_text())
    parts = [load_file(path) for path in sorted((out / "reference").glob("*.safetensors"))]
    mine = [part["row"] == prompt for part in parts]
    features = torch.cat([p["features"][m] for p, m in zip(parts, mine, strict=True)])
    reward = torch.cat([p[f"reward.{slug(task)}"][m] for p, m in zip(parts, mine, strict=True)])
    weights = (plan["lam"] * reward).nan_to_num(nan=-torch.inf, neginf=-torch.inf).softmax(0)
    if not 1 / weights.square().sum() >= 2:  # nan where every walk failed
        return None
    moments = Moments.of(features, weights)
    order = weights.argsort(descending=True)
    kept = order[: 1 + int((weights[order].cumsum(0) < 1 - 1e-6).sum())]
    features, weights = features[kept], weights[kept]
    at = (torch.arange(_MEDIAN_OF, dtype=torch.float64) + 0.5) / _MEDIAN_OF * weights.sum()
    some = torch.searchsorted(weights.cumsum(0), at).clamp(max=len(kept) - 1)
    distance = torch.nn.functional.pdist(features[some].double())
    bandwidth = float(distance[distance > 0].median())
    own = within(features, bandwidth=bandwidth, weights=weights)
    return Reference(features, weights, moments, bandwidth, own, moments.n)


def distances(features: Tensor, counts: Tensor, target: Reference | None, extractor: str) -> Row:
    """The figures of `DISTANCES` that can be had.

    Args:
        features: [K, d] of distinct items.
        counts: [K] how often each was drawn.
        target: what to measure to.
        extractor: name of what made the features.
    """
    found: Row = {}
    if int(counts.sum()) < 2:
        return found
    draws = features.repeat_interleave(counts, 0)
    if (features != features[0]).any():
        mine = Moments.of(draws)
        found["diversity"] = float(diversity(draws, extractor=extractor))
    else:  # one item, however often: far from any law that varies, but a distance
        width = features.shape[1]
        mine = Moments(features[0].double(), torch.zeros(width, width).double(), len(draws))
        found["diversity"] = 0.0
    if target is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # how many items there are stands in the same row
            found["frechet"] = float(frechet(mine, target.moments, extractor=extractor))
        pair = len(features) > 1
        value = mmd(
            features if pair else draws[:2],
            target.features,
            bandwidth=target.bandwidth,
            weights_y=target.weights,
            counts_x=counts if pair else None,
            within_y=target.within,
            extractor=extractor,
        )
        found |= {"mmd": float(value), "reference_ess": target.ess}
    return found


@dataclass(frozen=True)
class Point:
    """A mean over seeds and prompts, with its interval."""

    task: str
    sampler: str
    nfe: int
    mean: float
    low: float  # 95 % interval; nan from a single run
    high: float
    seconds: float  # mean per run and prompt; nan where not known
    runs: int
    of: int  # runs that there are: some may not have the figure


def points(rows: Iterable[Row], metric: str) -> list[Point]:
    """Means of a figure with bootstrap intervals over seeds and prompts.

    Seeds and prompts are drawn anew independently of each other, 2,000 times, and the mean over all
    pairs is taken: prompts differ more than seeds do, and share them. The interval is the mean ±
    t·s, s the standard deviation of those means, made unbiased, and t Student's quantile for the
    smaller of the two numbers: percentiles of so few seeds would be far too narrow.

    Args:
        rows: from `read`.
        metric: a column: reward, best, frechet, mmd, diversity, ess, log_z, distinct, "also: NAME".

    Raises:
        ValueError: no row has that figure.
    """
    cells: dict[tuple[str, str, int], list[Row]] = {}
    known: set[str] = set()
    for row in rows:
        known |= {k for k, v in row.items() if isinstance(v, (int, float))}
        if "refused" not in row:
            cells.setdefault((row["task"], row["sampler"], row["nfe"]), []).append(row)
    found = [
        _point(key, mine, metric, len(whole))
        for key, whole in sorted(cells.items())
        if (mine := [row for row in whole if row.get(metric) is not None])
    ]
    if not found:
        raise ValueError(f"metric={metric!r} is in no row: there are {', '.join(sorted(known))}.")
    return found


def _point(key: tuple[str, str, int], rows: Sequence[Row], metric: str, of: int) -> Point:
    seeds = sorted({row["seed"] for row in rows})
    prompts = sorted({row["prompt"] for row in rows})
    grid = torch.full((len(seeds), len(prompts)), math.nan, dtype=torch.float64)
    for row in rows:
        grid[seeds.index(row["seed"]), prompts.index(row["prompt"])] = row[metric]
    low = high = math.nan
    if len(seeds) > 1 or len(prompts) > 1:
        low, high = _interval(grid)
    known = [row["seconds"] for row in rows if row["seconds"] is not None]
    seconds = statistics.mean(known) if known else math.nan
    return Point(*key, float(grid.nanmean()), low, high, seconds, len(rows), of)


def _interval(grid: Tensor) -> tuple[float, float]:
    """95 % interval of the mean of figures [S, P] over seeds and prompts."""
    from scipy.stats import t

    key = root_key(0, torch.arange(2))
    u = [uniform(key[k : k + 1], (_RESAMPLED, size))[0] for k, size in enumerate(grid.shape)]
    seed, prompt = ((part * size).long() for part, size in zip(u, grid.shape, strict=True))
    means = grid[seed[:, :, None], prompt[:, None, :]].flatten(1).nanmean(1)
    n = min(size for size in grid.shape if size > 1)
    spread = float(means[means.isfinite()].std()) * math.sqrt(n / (n - 1))
    half = float(t.ppf(0.975, n - 1)) * spread
    return float(grid.nanmean()) - half, float(grid.nanmean()) + half


def markdown(rows: Sequence[Row], metric: str) -> str:
    """A table for each task: samplers down, budgets across, mean [interval]."""
    found = points(rows, metric)
    lines = []
    for task in dict.fromkeys(p.task for p in found):
        budgets = sorted({p.nfe for p in found if p.task == task})
        lines += [f"**{task}**: {metric}, mean [95 % interval over seeds and prompts]", ""]
        lines.append("| sampler | " + " | ".join(f"{n:,} rows" for n in budgets) + " |")
        lines.append("|---" * (1 + len(budgets)) + "|")
        for sampler in dict.fromkeys(p.sampler for p in found if p.task == task):
            mine = {p.nfe: p for p in found if (p.task, p.sampler) == (task, sampler)}
            cells = [_cell(mine.get(n)) for n in budgets]
            lines.append(f"| {sampler} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _cell(point: Point | None) -> str:
    if point is None:
        return ""
    interval = "" if math.isnan(point.low) else f" [{point.low:.4g}, {point.high:.4g}]"
    part = "" if point.runs == point.of else f" ({point.runs} of {point.of} runs)"
    return f"{point.mean:.4g}{interval}{part}"


def notes(rows: Sequence[Row], out: str | Path) -> str:
    """What the figures rest on: extractor, sizes, settings found and what that took, refusals."""
    plan = json.loads((Path(out) / PLAN).read_text())
    lines = [f"lam = {plan['lam']:g}, {plan['draws']:,} draws per run and prompt."]
    if plan["extractor"] is not None:
        sizes: dict[str, list[float]] = {task: [] for task in plan["tasks"]}
        for row in rows:
            if "reference_ess" in row:
                sizes[row["task"]].append(row["reference_ess"])
        told = [f"{task} {min(e):,.0f}" for task, e in sizes.items() if e]
        lines.append(
            f"Extractor {plan['extractor']}; reference of {plan['reference']:,} independent walks "
            f"per prompt, effective size: {', '.join(told) or 'none'}."
        )
        bare = [task for task, e in sizes.items() if not e]
        if bare and plan["reference"]:
            lines.append(
                f"No distance for {', '.join(bare)}: the reference has no two effective walks; "
                "raise reference or lower lam."
            )
        if plan["draws"] < FEW:
            lines.append(f"Fréchet distances of fewer than {FEW:,} draws are biased upwards.")
    found: dict[tuple[str, str], dict[int, str]] = {}
    for row in rows:
        if row.get("tuning_rows"):
            setting = f"{row.get('setting', 'none')} after {row['tuning_rows']:,} rows of search"
            found.setdefault((row["sampler"], row["task"]), {})[row["nfe"]] = setting
    for (name, task), settings in sorted(found.items()):
        told = [f"{nfe:,}: {setting}" for nfe, setting in sorted(settings.items())]
        lines.append(f"{name} on {task}: {'; '.join(told)}.")
    refused = {
        f"{r['sampler']} at {r['nfe']:,} rows: {r['refused']}" for r in rows if "refused" in r
    }
    return "\n".join([*lines, *(f"Refused, {line}" for line in sorted(refused))])


def metrics(rows: Iterable[Row]) -> list[str]:
    """The columns that a sweep is judged by, those that it has: distances, rewards, held out."""
    known = dict.fromkeys(name for row in rows for name, v in row.items() if v is not None)
    held_out = [name for name in known if name.startswith("also: ")]
    return [name for name in ("frechet", "mmd", "reward", *held_out) if name in known]


def write(rows: Sequence[Row], folder: Path) -> list[Path]:
    """table.csv and table.md in the folder of a sweep, and table.parquet where there is pyarrow."""
    write_csv(rows, folder / "table.csv")
    text = "\n".join(markdown(rows, metric) for metric in metrics(rows))
    write_text(f"{text}\n{notes(rows, folder)}\n", folder / "table.md")
    written = [folder / "table.csv", folder / "table.md"]
    if importlib.util.find_spec("pyarrow") is not None:
        write_parquet(rows, folder / "table.parquet")
        written.append(folder / "table.parquet")
    return written


def write_csv(rows: Sequence[Row], path: str | Path) -> None:
    """All rows as CSV, an empty cell where there is no figure."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    file = io.StringIO()
    writer = csv.DictWriter(file, names)
    writer.writeheader()
    writer.writerows(rows)
    write_text(file.getvalue(), Path(path))


def write_parquet(rows: Sequence[Row], path: str | Path) -> None:
    """All rows as parquet.

    Raises:
        ImportError: pyarrow is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            'parquet needs pyarrow: pip install "diffusion-steering[plot]".'
        ) from error
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: [row.get(name) for row in rows] for name in names}
    part = aside(Path(path))
    pyarrow.parquet.write_table(pyarrow.table(columns), part)
    part.replace(path)
