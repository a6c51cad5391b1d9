"""Do guided, weighted samplers draw from the law they claim, and when do their weights collapse?

Linear-Gaussian chains, where all of it is known: data N(mean, diag var), the reward -|x - y|² of a
measurement, λ = 1 / (2 noise²), so that the tilted law is p(x | y): Gaussian, with log Z in closed
form for the T-step chain itself. And chains of tokens, three sites of three tokens: masked, masked
with remasking, and uniform, whose law is enumerated; their reward has pairs of sites in it, and the
coordinate is whether the first site has the first token. One condition is one independent
repetition. Three parts:

1. unbiased estimates of importance sampling, SMC, TDS and DAS under every guidance that has a
   density: Ẑ / Z, mean and variance of a coordinate, each repetition weighed by its own Ẑ;
   z = (estimate - truth) / standard error. Beside them the same guidance without weights: how far
   off its mean is, in standard deviations of the tilted law, and how wide its draws are;
2. tree sampling under the same guidances: bias of log Ẑ of one tree, by path weights;
3. of the Gaussian chains, effective sample size, in hundredths of the particles, and the error of
   log Ẑ, against dimension: the same law in every coordinate, so that log Z grows with their
   number. Where particles are resampled it is that of the weights since: log Ẑ/Z far below 0 says
   that they had collapsed.

    python -m benchmarks.guidance_law [--quick]
"""

from __future__ import annotations

import argparse
import time
import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import finish, header
from samplers import DAS, SMC, TDS, Ancestral, Importance, TreeSampling, sample
from steering import DPS, MPGD, ClassifierGuidance, FlowChef, FlowDPS, FreeDoM, Twist, measure
from steering.core import Model
from tests.exact import GaussianChain, NoisyClassifier, gaussian_chain, tilted
from tests.exact.estimates import average, tilted_moments
from tests.exact.tokens import TokenTable, token_chain

STEPS, NOISE = 10, 0.8
MEAN, VAR, Y = (0.3, -0.2), (2.0, 0.5), (1.0, -0.5)
LAM = 1 / (2 * NOISE**2)
DIMS = (1, 4, 16, 64, 256)
# resampled often, where the defaults would seldom need it: what is tested is that it is right
SAMPLERS = {
    "importance": Importance,
    "SMC": partial(SMC, ess=0.9),
    "TDS": partial(TDS, ess=0.9),
    "DAS": partial(DAS, ess=0.9),
}
TOKENS: dict[str, dict[str, Any]] = {
    "mask": {},
    "remask": {"remask": 0.3},
    "uniform": {"kind": "uniform"},
}
TREES = {"default": TreeSampling(), "even branches": TreeSampling(branch="even")}
QUIET = {"lam": LAM, "batch": 4096, "progress": False}


def identity(x: Tensor) -> Tensor:
    return x


def law(model: Model, y: Tensor) -> tuple[Tensor, Tensor, float]:
    """Mean, variance [D] and log Z of the chain's law tilted by exp(-λ |x - y|²)."""
    assert isinstance(model.denoiser, GaussianChain)
    y = y.double()
    mean, var, log_z = tilted(*model.denoiser.law(), 2 * LAM * y, 2 * LAM)
    return mean, var, log_z - LAM * float(y.square().sum())


@dataclass(frozen=True)
class Case:
    """A model of many conditions, a reward, guidances with a density, and the tilted law."""

    model: Model
    reward: Any
    guidances: dict[str, Any]
    mean: float  # of the first coordinate
    var: float
    log_z: float


def case(kind: str, conditions: int) -> Case:
    """A Gaussian chain of two coordinates of unlike variance, or one of tokens."""
    if kind in TOKENS:
        return of_tokens(kind, conditions)
    model = gaussian_chain(list(MEAN), list(VAR), STEPS, 2, kind, conditions=conditions)
    y = torch.tensor(Y)
    mean, var, log_z = law(model, y)
    return Case(model, measure(identity, y), guidances(model), float(mean[0]), float(var[0]), log_z)


def pairs(items: Tensor, _: object) -> Tensor:
    """Of token weights [N, 3, 3]: a sum over sites, and two pairs."""
    worth = torch.linspace(-1, 2, 9).view(3, 3)
    first, second = items[:, 0, 0] * items[:, 1, 1], items[:, 1, 2] * items[:, 2, 0]
    return (items * worth).sum((1, 2)) + 3 * first + 3 * second


def of_tokens(kind: str, conditions: int) -> Case:
    model = token_chain(sites=3, steps=STEPS, conditions=conditions, **TOKENS[kind])
    table = model.denoiser
    assert isinstance(table, TokenTable)
    items = model.decode(table.states())
    log_w = table.laws()[-1].log() + LAM * pairs(items, None)
    mean = float(log_w.softmax(0) @ items[:, 0, 0].double())
    bent = {"twist": Twist(), "twist, skip": Twist(jacobian="skip")}
    return Case(model, pairs, bent, mean, mean * (1 - mean), float(log_w.logsumexp(0)))


def guidances(model: Model) -> dict[str, Any]:
    """Every guidance with a density, at shifts of a fraction of the steps' noise."""
    chain = model.denoiser
    assert isinstance(chain, GaussianChain)
    var = torch.tensor(VAR, dtype=torch.float64)
    # its step has the same size at every level, and a flow's last noise is small
    constant = 0.03 if chain.process.straight else 0.1
    family: dict[str, Any] = {
        "FlowChef": FlowChef(step=0.05),
        "FlowChef, normalised": FlowChef(step=0.1, rule="normalised"),
        "FlowChef, full": FlowChef(step=0.1, rule="normalised", jacobian="full"),
        "DPS": DPS(step=constant),
        "MPGD": MPGD(step=0.05),
        "FreeDoM, no travel": FreeDoM(step=constant, travel=1),
        "classifier": ClassifierGuidance(NoisyClassifier(chain, var, torch.tensor(Y), NOISE)),
        "twist": Twist(),
        "twist, skip": Twist(jacobian="skip"),
    }
    if chain.process.straight:  # its weights have no variance in the first half
        family["FlowDPS"] = FlowDPS(step=0.05, window=(0.5, 1.0))
    return family


def weighed(kind: str, repeats: int, particles: int) -> tuple[list[dict], list[dict]]:
    """Part 1: a row per estimate, and one per guidance without weights."""
    of = case(kind, repeats)
    model, reward = of.model, of.reward
    truth = {"z": 1.0, "mean": of.mean}
    if kind not in TOKENS:  # where it is 0 or 1, its mean says all
        truth["var"] = of.var
    rows, biased = [], []
    for name, guidance in {"none, or the sampler's own": None, **of.guidances}.items():
        for sampler, make in SAMPLERS.items():
            began = time.process_time()
            seed = len(rows)  # no two estimates share their noise
            run = sample(model, reward, make(particles), guidance=guidance, seed=seed, **QUIET)
            shown = []
            found = tilted_moments(run, of.log_z)
            for what in truth:
                estimate, error = found[what]
                z = (estimate - truth[what]) / error
                rows.append({"z": z, "error": error / abs(truth[what])})
                shown.append(f"{what} {estimate:.4f} ± {error:.4f} (z {z:+.2f})")
            print(
                f"{kind:8}{name:27}{sampler:11}{'  '.join(shown)}  ESS "
                f"{100 * float(run.ess.mean()) / particles:3.0f} %  "
                f"({time.process_time() - began:.0f} s)",
                flush=True,
            )
        plain = sample(
            model, reward, Ancestral(particles), guidance=guidance, weights="none", **QUIET
        )
        items = plain.items.flatten(1)[:, 0].double()
        off = float(items.mean() - of.mean) / of.var**0.5
        width = float(items.std()) / of.var**0.5
        biased.append({"chain": kind, "guidance": name, "mean_off": off, "width": width})
        error = width / len(items) ** 0.5
        print(
            f"{kind:8}{name:27}unweighted  mean off by {off:+.3f} ± {error:.3f} standard "
            f"deviations, {width:.2f} times as wide",
            flush=True,
        )
    print(f"{kind:8}truth: mean {truth['mean']:.4f}, var {of.var:.4f}, log Z {of.log_z:.4f}\n")
    return rows, biased


def trees(kind: str, seeds: int, nfe: int) -> list[dict]:
    """Part 2: bias of log Ẑ of one tree, over `seeds` trees."""
    of, found = case(kind, seeds), []
    for name, guidance in {"none": None, **of.guidances}.items():
        for tree, sampler in TREES.items():
            began = time.process_time()
            run = sample(of.model, of.reward, sampler, guidance=guidance, nfe=nfe, **QUIET)
            gap = run.log_z - of.log_z
            bias, error = average(gap)
            found.append({"chain": kind, "guidance": name, "tree": tree, "bias": bias})
            print(
                f"{kind:8}DTS, {tree:15}{name:22}nfe {nfe}  {seeds} trees  bias of log Z "
                f"{bias:+.4f} ± {error:.4f}  variance {float(gap.var()):.4f}  ESS "
                f"{float(run.ess.mean()):.0f}  ({time.process_time() - began:.0f} s)",
                flush=True,
            )
    print()
    return found


def collapse(kind: str, repeats: int, particles: int, dims: tuple[int, ...]) -> list[dict]:
    """Part 3: a row per method and dimension."""
    methods: dict[str, tuple[Any, Any]] = {
        "importance": (Importance(particles), None),
        "importance, FlowChef": (Importance(particles), FlowChef(step=0.05)),
        "importance, twist": (Importance(particles), Twist()),
        "SMC": (SMC(particles), None),
        "SMC, FlowChef": (SMC(particles), FlowChef(step=0.05)),
        "TDS": (TDS(particles), None),
        "TDS, skip": (TDS(particles, jacobian="skip"), None),
        "DAS": (DAS(particles), None),
    }
    found = []
    for name, (sampler, guidance) in methods.items():
        cells = []
        for dim in dims:
            model = gaussian_chain(0.3, 2.0, STEPS, dim, kind, conditions=repeats)
            y = torch.ones(dim)
            log_z = law(model, y)[2]
            run = sample(model, measure(identity, y), sampler, guidance=guidance, **QUIET)
            share, gap = float(run.ess.mean()) / particles, float((run.log_z - log_z).mean())
            found.append({"chain": kind, "method": name, "dim": dim, "ess": share, "log_z": gap})
            cells.append(f"{100 * share:5.1f} % {gap:+9.2f}")
        print(f"{kind:8}{name:22}{' '.join(cells)}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small numbers, under a minute")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "guidance is off")  # at the last step, which draws no noise
    header()
    print("a seed to every run of the first part, 0 after it; every repetition has its own keys\n")
    rows, biased, dts, ess = [], [], [], []
    for kind in ("vp", "flow", *TOKENS):
        more = weighed(kind, *((40, 30) if quick else (100, 500)))
        rows, biased = rows + more[0], biased + more[1]
    for kind in ("vp", "flow", *TOKENS):
        dts += trees(kind, *((8, 600) if quick else (128, 4000)))
    dims = DIMS[:3] if quick else DIMS
    print(f"{'':8}{'dimension':22}" + "".join(f"{dim:<18}" for dim in dims))
    print(f"{'':8}{'':22}" + "   ESS  log Ẑ/Z   " * len(dims))
    for kind in ("vp", "flow"):
        ess += collapse(kind, *((5, 50) if quick else (20, 200)), dims)
    finish(
        {
            "max_z": max(abs(r["z"]) for r in rows),
            "comparisons": len(rows),
            "largest_relative_error": max(r["error"] for r in rows),
            "dts_bias": max(abs(r["bias"]) for r in dts),
            "unweighted": biased,
            "dts": dts,
            "ess": ess,
        }
    )


if __name__ == "__main__":
    main()
