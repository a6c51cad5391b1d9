"""DNA steered towards liver cells: what does reward cost in naturalness, for every method?

    python -m benchmarks.dna_frontier [--quick] [--data DIR] [--work DIR] [--plot FILE]

Reward: log-odds of HepG2 by "dna-reward". Judge: the same by "dna-judge", trained on other
chromosomes. Neither the reward nor the judge is a measurement: both predict. The model is "dna"
without a label, 50 steps; CFG alone gives it the label. DIR holds the wheels of dnadiffusion
0.0.0.dev0 (real sites) and pyjaspar 4.0.0 (motifs), or what they unpack to; without it the columns
that need them are left out. What is drawn is kept in the work folder, and a run that was stopped
goes on from there.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.report import finish, header
from samplers import SMC, SVDD, TDS, Ancestral, BestOfN, TreeSampling, TreeSearch, sample
from steering import from_pipeline, zoo
from steering.discrete import TokenProcess, denoising_loss
from steering.guidance import Twist
from steering.metrics import (
    hamming_diversity,
    kmer_correlation,
    kmer_counts,
    motif_correlation,
    motif_hits,
    read_jaspar,
)
from steering.models.sequence_pipeline import SequencePipeline
from steering.noise import root_key, uniform
from steering.rewards import LogOdds
from steering.zoo.dna_sites import CELLS, Sites, held_out_halves, read_sites

HEPG2 = CELLS.index("HepG2")
JASPAR = "JASPAR2024.sqlite"
CHECKED = ("MA0114.5", "MA0046.3")  # HNF4A, HNF1A: of liver cells, and in no method's objective
BOUND_DRAWS = 16  # steps of the chain that a sequence's bound is averaged over
ALIKE = 0.5  # nats of median reward within which methods are said to reach the same
PUBLISHED = """\
published (arXiv 2410.13643, other data, reward, judge and metrics; see the notes):
  method           Pred-Activity  ATAC-Acc %   3-mer   JASPAR  log-lik
  pretrained                0.17         1.5  -0.061    0.249     -261
  CG                        3.30         0.0  -0.065    0.212     -266
  SMC                       4.15        39.9   0.840        -     -259
  TDS                       4.64        45.3   0.848        -     -257
  CFG                       5.04        92.1   0.746    0.864     -265
  DRAKES without KL         6.44        82.5   0.307    0.557     -281
  DRAKES                    5.61        92.5   0.887    0.911     -264"""
DIFFERENCES = """\
where the protocol differs from the published one:
  data         47,872 accessible sites of four cell types, not 735,156 measured enhancers
  reward       log-odds of a classifier of accessibility, not predicted activity; so is the judge
               (accessible: judge's p above 1/2), which there are an Enformer and a second model
  split        reward on chromosomes 3-9, judge on 10-22, X, Y; denoiser on 3-22, X, Y; reference
               from 1 and 2 (there 1-11 and 12-22)
  networks     denoiser of 0.58 million parameters, trained for minutes on a CPU (there 3.3 million)
  chain        50 steps (there 128); tuning by the path KL in true units (there the released
               weighting, nothing at hard states)
  3-mer        to the half of the held-out HepG2 sites with the higher signal (there the top 0.1 %
               by measured activity, whose words differ far more from the rest's)
  JASPAR       Spearman correlation of mean hits, newest human CORE motifs of 2024 (there 1,956)
  CG, TDS      follow the gradient at probabilities (there log-probabilities went to the reward)
  SMC          resamples when the effective sample size falls below half (there at every step)
  samples      48 a seed, three seeds (there 640)"""


@dataclass(frozen=True)
class Method:
    """A line of the table: how `count` sequences are drawn."""

    name: str
    setting: str
    draw: Callable[[Bench, int], tuple[Tensor, float]]  # seed -> tokens [n, 200], network rows
    family: str  # "plain", "guided", "tuned" or "both"
    alpha: float | None = None  # of the tuned model that it needs

    @property
    def slug(self) -> str:
        kept = (c if c.isalnum() or c in ".-" else "_" for c in f"{self.name} {self.setting}")
        return "".join(kept)


@dataclass(frozen=True)
class Sizes:
    """How much is drawn."""

    seeds: int = 3
    samples: int = 48  # of each seed and method
    share: int = 8  # walks' worth of network rows that a sample of an equal-rows method may take
    steps: int = 50
    # of tuning, which is at a shorter chain: the network is not told the time
    updates: int = 100
    batch: int = 16  # paths of an update
    tuned_steps: int = 20
    truncate: int = 10
    lr: float = 1e-3


class Bench:
    """The model, the reward, the judge, and what real sites look like."""

    def __init__(self, data: Path | None, work: Path, sizes: Sizes) -> None:
        self.data, self.work, self.sizes = data, work, sizes
        work.mkdir(parents=True, exist_ok=True)
        self.reward = LogOdds(zoo.load("dna-reward"), HEPG2)
        self.judge = LogOdds(zoo.load("dna-judge"), HEPG2)
        self.words = zoo.dna_words()
        self.exact = from_pipeline(zoo.load("dna"), [None], steps=sizes.steps)

    def model(self, prompts: list[Any], alpha: float | None = None, scale: float = 1.0) -> Any:
        """The chain of "dna", or of what DRAKES made of it, in bfloat16: half float32's seconds."""
        if alpha is None:
            pipe = zoo.load("dna", dtype=torch.bfloat16)
        else:
            pipe = SequencePipeline.from_pretrained(self.tuned(alpha), torch_dtype=torch.bfloat16)
            pipe.set_progress_bar_config(disable=True)
        return from_pipeline(pipe, prompts, steps=self.sizes.steps, guidance_scale=scale)

    def tuned(self, alpha: float) -> Path:
        """Folder of the pipeline tuned by DRAKES, made once, and of its cost, "cost.json"."""
        from steering.finetune import drakes

        s, folder = self.sizes, self.work / f"drakes-{alpha:g}"
        if not (folder / "cost.json").exists():
            pipe = zoo.load("dna")
            began = time.process_time()
            tuned = drakes(
                pipe, self.reward, alpha=alpha, steps=s.tuned_steps, truncate=s.truncate,
                batch=s.batch, updates=s.updates, lr=s.lr, checkpointing=False, progress=False,
                out=self.work / f"drakes-{alpha:g}-run",
            )  # fmt: skip
            seconds = time.process_time() - began
            tuned.save(folder)
            told = {"seconds": seconds, "history": tuned.history[-1]}
            (folder / "cost.json").write_text(json.dumps(told, default=float))
        return folder

    def tuning_seconds(self, alpha: float) -> float:
        """CPU seconds that the tuning took."""
        return json.loads((self.tuned(alpha) / "cost.json").read_text())["seconds"]

    @cached_property
    def sites(self) -> Sites | None:
        return read_sites(self.data) if self.data is not None else None

    @property
    def halves(self) -> tuple[Sites, Sites]:
        """Real HepG2 sites that no network was trained on: the reference, and the others."""
        assert self.sites is not None
        return held_out_halves(self.sites)

    @cached_property
    def jaspar(self) -> Path | None:
        """JASPAR's file, taken out of the wheel into the work folder if need be."""
        if self.data is None:
            return None
        if found := sorted(self.data.rglob(JASPAR)):
            return found[0]
        for wheel in sorted(self.data.rglob("pyjaspar-*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                for name in archive.namelist():
                    if name.endswith(JASPAR):
                        (self.work / JASPAR).write_bytes(archive.read(name))
                        return self.work / JASPAR
        return None

    @cached_property
    def motifs(self) -> list[Any]:
        return [] if self.jaspar is None else read_jaspar(self.jaspar)

    @cached_property
    def checked(self) -> list[Any]:
        return [] if self.jaspar is None else read_jaspar(self.jaspar, ids=CHECKED)

    @cached_property
    def reference_hits(self) -> Tensor:
        return motif_hits(self.halves[0].tokens, self.motifs)

    def measure(self, tokens: Tensor) -> dict[str, float]:
        """Every column but the costs, of tokens [n, 200]."""
        tokens = tokens.long()
        with torch.inference_mode():
            reward, judged = (f(tokens, [None] * len(tokens)) for f in (self.reward, self.judge))
        counts = kmer_counts(tokens).double()
        usual = self.words["train"] / self.words["train"].sum()
        away, wanted = counts / counts.sum() - usual, self.words["HepG2"].double()
        found = {
            "reward": float(reward.median()),
            "judge": float(judged.median()),
            "accessible": float((judged > 0).double().mean()),
            "3-mer": kmer_correlation(counts, wanted),
            "3-mer excess": kmer_correlation(away, wanted / wanted.sum() - usual),
            "bound": float(self.bound(tokens).median()),
            "diversity": hamming_diversity(tokens),
            "distinct": float(len(tokens.unique(dim=0))) / len(tokens),
        }
        if self.motifs and self.sites is not None:
            hits = motif_hits(tokens, self.motifs)
            found["motifs"] = motif_correlation(hits, self.reference_hits)
        for motif, hit in zip(self.checked, motif_hits(tokens, self.checked).T, strict=True):
            found[motif.name.upper()] = float((hit > 0).double().mean())
        return found

    def bound(self, tokens: Tensor) -> Tensor:
        """[n] nats: lower bounds of log p under the pretrained chain, estimated; steps spread."""
        process, n = self.exact.process, len(tokens)
        assert isinstance(process, TokenProcess)
        row = torch.zeros(n, dtype=torch.int64)

        def guess(x: Tensor, i: Tensor) -> Tensor:
            return self.exact.denoiser(x, process.time(i), row)

        total = torch.zeros(n, dtype=torch.float64)
        for draw in range(BOUND_DRAWS):
            key = root_key(draw, torch.arange(n))
            i = ((draw + uniform(key)) * process.steps / BOUND_DRAWS).long()
            with torch.inference_mode():
                total += denoising_loss(process, guess, tokens, i, key).double()
        return -total / BOUND_DRAWS


def drawn(
    bench: Bench,
    model: Any,
    sampler: Any,
    seed: int,
    nfe: int,
    draws: int | None = 1,
    **options: Any,
) -> tuple[Tensor, float]:
    """Tokens of the draws of a run, and its network rows."""
    found = sample(
        model, bench.reward, sampler, nfe=nfe, draws=draws, seed=seed, batch=128, progress=False,
        **options,
    )  # fmt: skip
    tokens = found.items.argmax(-1).repeat_interleave(found.counts, 0)
    return tokens.to(torch.uint8), float(found.nfe)


def apart(sampler: Any, lam: float, alpha: float | None = None) -> Any:
    """A search of its own for every sample, `share` walks' worth of network rows each."""

    def draw(bench: Bench, seed: int) -> tuple[Tensor, float]:
        s = bench.sizes
        model = bench.model([None] * s.samples, alpha)
        return drawn(bench, model, sampler(s.share), seed, s.share * s.steps, lam=lam)

    return draw


def crowd(sampler: Any, lam: float, rows: int) -> Any:
    """All samples from one population of as many, `rows` network rows a step and particle."""

    def draw(bench: Bench, seed: int) -> tuple[Tensor, float]:
        s = bench.sizes
        nfe = s.samples * s.steps * rows
        model = bench.model([None])
        return drawn(bench, model, sampler(s.samples), seed, nfe, s.samples, lam=lam)

    return draw


def walks(prompt: Any = None, scale: float = 1.0, alpha: float | None = None) -> Any:
    """One walk a sample."""

    def draw(bench: Bench, seed: int) -> tuple[Tensor, float]:
        s = bench.sizes
        nfe = s.samples * s.steps * (2 if scale > 1 else 1)
        model = bench.model([prompt], alpha, scale)
        return drawn(bench, model, Ancestral(s.samples), seed, nfe, None)

    return draw


def bent(step: float) -> Any:
    """One walk a sample, every step tilted along the reward's gradient, without weights."""

    def draw(bench: Bench, seed: int) -> tuple[Tensor, float]:
        s = bench.sizes
        model, nfe = bench.model([None]), s.samples * s.steps
        return drawn(bench, model, Ancestral(s.samples), seed, nfe, None,
                     guidance=Twist(step=step), weights="none")  # fmt: skip

    return draw


def real(bench: Bench, seed: int) -> tuple[Tensor, float]:
    """Held-out HepG2 sites, those that the reference does not have."""
    sites = bench.halves[1].tokens
    pick = torch.randperm(len(sites), generator=torch.Generator().manual_seed(seed))
    return sites[pick[: bench.sizes.samples]], 0.0


def tree(share: int) -> TreeSampling:
    return TreeSampling(branch="even")


def methods(quick: bool) -> list[Method]:
    """Every line of the table."""

    def some(few: tuple[float, ...], many: tuple[float, ...]) -> tuple[float, ...]:
        return few if quick else many

    lams = some((2,), (1, 4))
    alphas = some((0.5,), (1.0, 0.5))
    every_fifth = tuple(range(5, 50, 5))
    lines = [Method("pretrained", "", walks(), "plain")]
    lines.append(Method("real HepG2 sites", "", real, "plain"))
    for s in some((2,), (1, 3, 6)):
        lines.append(Method("CFG", f"scale {s:g}", walks(HEPG2, s), "guided"))
    for s in some((1,), (0.5, 1, 2, 4)):
        lines.append(Method("CG", f"scale {s:g}", bent(s), "guided"))
    for lam in some((1,), (0.25, 1)):
        svdd = apart(lambda m: SVDD(1, proposals=m), lam)
        lines.append(Method("SVDD", f"λ {lam:g}", svdd, "guided"))
    for lam in lams:
        lines.append(Method("DTS", f"λ {lam:g}", apart(tree, lam), "guided"))
    for lam in some((1,), (0.5, 1)):
        one = f"λ {lam:g}"
        smc = crowd(lambda n: SMC(n, levels=every_fifth), lam, 1)
        lines.append(Method("SMC", one, smc, "guided"))
        lines.append(Method("TDS", one, crowd(TDS, lam, 2), "guided"))
    lines.append(Method("best of N", "", apart(lambda m: BestOfN(of=m), 1.0), "guided"))
    lines.append(Method("DTS*", "", apart(lambda m: TreeSearch(branch="even"), 1.0), "guided"))
    for a in some(alphas, (*alphas, 0.0)):
        name = "DRAKES" if a else "DRAKES without KL"
        lines.append(Method(name, f"α {a:g}" if a else "", walks(alpha=a), "tuned", a))
    for a in alphas:
        for lam in lams:
            setting = f"α {a:g}, λ {lam:g}"
            lines.append(Method("DRAKES + DTS", setting, apart(tree, lam, a), "both", a))
    return lines


def drawn_once(bench: Bench, method: Method, seed: int) -> None:
    """Draw a seed's samples into the work folder, with what they took, unless they are there."""
    file = bench.work / f"{method.slug}-{seed}.safetensors"
    if file.exists():
        return
    if method.alpha is not None:
        bench.tuned(method.alpha)  # before the clock starts
    began = time.process_time()
    tokens, rows = method.draw(bench, seed)
    costs = torch.tensor([rows, time.process_time() - began], dtype=torch.float64) / len(tokens)
    save_file({"tokens": tokens.contiguous(), "costs": costs}, file)


def figures_of(bench: Bench, method: Method, seed: int) -> dict[str, float]:
    """What is to be said of a seed's samples; kept too."""
    file = bench.work / f"{method.slug}-{seed}.json"
    if not file.exists():
        kept = load_file(file.with_suffix(".safetensors"))
        rows, seconds = kept["costs"].tolist()
        figures = {"rows": rows, "seconds": seconds, **bench.measure(kept["tokens"])}
        file.write_text(json.dumps(figures))
    return json.loads(file.read_text())


COLUMNS = {  # of a figure: its heading, and decimals
    "reward": ("reward", 2),
    "judge": ("judge", 2),
    "accessible": ("open", 2),
    "3-mer": ("3-mer", 3),
    "3-mer excess": ("excess", 2),
    "motifs": ("motifs", 3),
    "HNF4A": ("HNF4A", 3),
    "HNF1A": ("HNF1A", 3),
    "bound": ("log p", 1),
    "diversity": ("diverse", 3),
    "distinct": ("distinct", 2),
    "rows": ("rows", 0),
    "seconds": ("CPU s", 3),
}


def table(rows: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, tuple[float, float]]]:
    """Print means ± standard deviations over seeds, and give them back."""
    shown = {
        k: v for k, v in COLUMNS.items() if any(k in r for seeds in rows.values() for r in seeds)
    }
    print(f"{'method':30}" + "".join(f"{head:>15}" for head, _ in shown.values()))
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for name, seeds in rows.items():
        cells, line = {}, f"{name:30}"
        for key, (_, digits) in shown.items():
            values = [seed[key] for seed in seeds if key in seed]
            if not values:
                line += f"{'-':>15}"
                continue
            several = torch.tensor(values, dtype=torch.float64)
            spread = float(several.std()) if len(values) > 1 else math.nan
            cells[key] = (float(several.mean()), spread)
            text = f"{cells[key][0]:.{digits}f}"
            line += f"{text if math.isnan(spread) else f'{text} ±{spread:.{digits}f}':>15}"
        found[name] = cells
        print(line)
    return found


def outdone(one: dict[str, Any], others: list[dict[str, Any]], by: str) -> bool:
    """Has another at least its reward and at least its `by`?"""
    pairs = [(o["reward"][0], o[by][0]) for o in others]
    return any(r >= one["reward"][0] and v >= one[by][0] for r, v in pairs)


def plot(lines: list[Method], found: dict[str, Any], path: Path) -> None:
    """Reward against 3-mer correlation and against the bound, a curve for each method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(line.name for line in lines))
    figure, axes = pyplot.subplots(1, 3, figsize=(15, 5.2))
    marks = "osD^v<>PX*hdp8"
    views = [("3-mer", "3-mer correlation with real sites"), ("bound", "bound on log p, nats"),
             ("judge", "judge: median log-odds of HepG2")]  # fmt: skip
    for axis, (key, label) in zip(axes, views, strict=True):
        for k, name in enumerate(names):
            mine = [
                found[title(line)] for line in lines if line.name == name and title(line) in found
            ]
            if not mine:
                continue
            x, y = ([m[c][0] for m in mine] for c in ("reward", key))
            axis.plot(x, y, marker=marks[k % len(marks)], label=name, color=f"C{k % 10}",
                      linestyle="-" if k < 10 else ":", markersize=6)  # fmt: skip
        axis.set_xlabel("median reward, nats")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8, loc="lower left")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def title(line: Method) -> str:
    return f"{line.name} {line.setting}".strip()


def summary(bench: Bench, lines: list[Method], found: dict[str, Any]) -> dict[str, Any]:
    """What the table says of the goals, printed and as figures."""
    of = {kind: [m for m in lines if m.family == kind and title(m) in found]
          for kind in ("guided", "tuned", "both")}  # fmt: skip
    figures: dict[str, Any] = {}
    drakes = [m for m in of["tuned"] if m.alpha]
    if drakes and of["guided"]:
        best = max(of["guided"], key=lambda m: found[title(m)]["3-mer"][0])
        for m in drakes:
            mine = found[title(m)]
            gap = mine["3-mer"][0] - found[title(best)]["3-mer"][0]
            rivals = [g for g in of["guided"]
                      if found[title(g)]["reward"][0] >= mine["reward"][0] - ALIKE]  # fmt: skip
            print(f"{title(m)}: 3-mer correlation {gap:+.3f} to the best guided ({title(best)})")
            figures[f"{title(m)}: 3-mer minus best guided"] = gap
            if rivals:
                near = max(rivals, key=lambda g: found[title(g)]["3-mer"][0])
                gap = mine["3-mer"][0] - found[title(near)]["3-mer"][0]
                print(f"  {gap:+.3f} to the best of those that reach its reward ({title(near)})")
                figures[f"{title(m)}: 3-mer minus best guided of its reward"] = gap
    for m in of["tuned"]:
        mine, tuning = found[title(m)], bench.tuning_seconds(m.alpha or 0.0)
        print(f"{title(m)}: tuned in {tuning:.0f} s of CPU")
        figures[f"{title(m)}: tuning seconds"] = tuning
        for g in of["guided"]:
            theirs = found[title(g)]
            saved = theirs["seconds"][0] - mine["seconds"][0]
            if abs(theirs["reward"][0] - mine["reward"][0]) <= ALIKE:
                even = tuning / saved if saved > 0 else math.inf
                print(f"  pays against {title(g)} (reward {theirs['reward'][0]:.2f}) "
                      f"from {even:.0f} samples on")  # fmt: skip
                figures[f"{title(m)}: breaks even with {title(g)} at"] = even
    for key in ("3-mer", "bound", "judge"):
        alone = [found[title(m)] for m in (*of["tuned"], *of["guided"])
                 if m.family == "tuned" or m.name == "DTS"]  # fmt: skip
        kept = [title(m) for m in of["both"] if not outdone(found[title(m)], alone, key)]
        print(f"reward against {key}: of {len(of['both'])} points of DRAKES + DTS "
              f"{len(kept)} are outdone by no point of DRAKES or DTS alone")  # fmt: skip
        figures[f"DRAKES + DTS not outdone, {key}"] = kept
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="one seed, few samples, one setting")
    parser.add_argument("--data", type=Path, default=None, help="the two wheels, or their files")
    parser.add_argument("--work", type=Path, default=Path("runs/dna_frontier"), help="keeps draws")
    parser.add_argument("--plot", type=Path, default=None, help="write a picture there")
    parser.add_argument("--only", nargs="+", default=None, help="methods, by name")
    args = parser.parse_args()
    sizes = Sizes()
    if args.quick:
        sizes = Sizes(seeds=1, samples=8, share=4, updates=2, batch=4, truncate=4)
        args.work = args.work.with_name(args.work.name + "-quick")
    torch.set_num_threads(1)
    # tuning takes half the seconds; what accelerate would read from its launcher
    os.environ.setdefault("ACCELERATE_MIXED_PRECISION", "bf16")
    header()
    bench = Bench(args.data, args.work, sizes)
    print(f"{sizes.seeds} seeds of {sizes.samples} samples, mean ± standard deviation over seeds; "
          "nats; CPU seconds a sample, one thread")  # fmt: skip
    lines = [
        line
        for line in methods(args.quick)
        if (not args.only or line.name in args.only) and (line.draw is not real or bench.sites)
    ]
    for line in lines:
        for seed in range(sizes.seeds):
            drawn_once(bench, line, seed)
        print(f"drawn: {title(line)}", flush=True)
    rows = {title(line): [figures_of(bench, line, k) for k in range(sizes.seeds)] for line in lines}
    print()
    found = table(rows)
    print()
    figures = {"table": found, **summary(bench, lines, found)}
    print(f"\n{PUBLISHED}\n\n{DIFFERENCES}\n")
    if args.plot is not None:
        plot(lines, found, args.plot)
    finish(figures)


if __name__ == "__main__":
    main()
