"""Do samplers draw from the law they claim? Linear-Gaussian chains, where all of it is known.

An affine denoiser makes the T-step chain itself Gaussian: its mean and variance are pushed forward
in float64 through the tables that run, and a quadratic reward tilts them in closed form. One
condition is one independent repetition. Two parts:

1. unbiased estimates of importance sampling and SMC: Ẑ / Z, and mean and variance of the tilted
   law, each repetition weighed by its own Ẑ; z = (estimate - truth) / standard error; the reward is
   x - x²/2, which shifts and narrows the law;
2. tree sampling: bias and spread of log Ẑ of one tree, by path weights and by the published law;
   the reward is x, whose exponential has a heavier tail.

    python -m benchmarks.gaussian_law [--quick]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.report import finish, header
from samplers import SMC, Importance, TreeSampling, sample
from steering.core import Model
from tests.exact import GaussianChain, gaussian_chain, tilted
from tests.exact.estimates import average, tilted_moments
from tests.exact.guided import Push

LAM, CURVE = 1.0, 1.0
GOAL = ("path, default", "path, even branches")
TREES = {
    "path, default": TreeSampling(),
    "path, even branches": TreeSampling(branch="even"),
    "published": TreeSampling(law="published"),
    "importance": Importance(),
}


def law_of(model: Model) -> tuple[Tensor, Tensor]:
    """Mean and variance of the untilted chain."""
    assert isinstance(model.denoiser, GaussianChain)
    return model.denoiser.law()


def line(x: Tensor, _: object) -> Tensor:
    return x[:, 0]


def bowl(x: Tensor, _: object) -> Tensor:
    return x[:, 0] - CURVE * x[:, 0] ** 2 / 2


def unbiased(repeats: int, walks: int) -> list[dict]:
    """Part 1: one row per chain, sampler and estimate."""
    samplers = {
        "importance": (Importance(walks), None),
        "importance, guided": (Importance(walks), Push(0.5)),
        "SMC difference": (SMC(walks), None),
        "SMC max": (SMC(walks, "max"), None),
        "SMC difference, guided": (SMC(walks), Push(0.5)),
    }
    rows = []
    for kind in ("vp", "flow"):
        model = gaussian_chain(0.3, 1.0, steps=10, kind=kind, conditions=repeats)
        new_mean, new_var, log_z = tilted(*law_of(model), LAM, LAM * CURVE)
        truth = {"z": 1.0, "mean": float(new_mean), "var": float(new_var)}
        for name, (sampler, guidance) in samplers.items():
            began = time.process_time()
            result = sample(
                model, bowl, sampler, lam=LAM, guidance=guidance, batch=4096, progress=False
            )
            seconds = time.process_time() - began
            for what, (estimate, error) in tilted_moments(result, log_z).items():
                z = (estimate - truth[what]) / error
                rows.append({"chain": kind, "z": z, "error": error / abs(truth[what])})
                print(
                    f"{kind:5}{name:24}{what:6}{estimate:9.4f} ± {error:.4f}  truth "
                    f"{truth[what]:8.4f}  z {z:+.2f}  ({seconds:.0f} s)",
                    flush=True,
                )
    return rows


def trees(seeds: int, nfe: int, kind: str, lam: float, names: Sequence[str]) -> list[dict]:
    """Part 2: bias of log Ẑ of one tree, over `seeds` trees."""
    model = gaussian_chain(0.0, 1.0, steps=50, kind=kind, conditions=seeds)
    log_z = tilted(*law_of(model), lam)[2]
    found = []
    for name in names:
        began = time.process_time()
        result = sample(model, line, TREES[name], nfe=nfe, lam=lam, batch=4096, progress=False)
        gap = result.log_z - log_z
        bias, error = average(gap)
        z, z_error = average(gap.exp())
        figures = {"bias": bias, "error": error, "variance": float(gap.var()), "z_ratio": z}
        case = {"name": name, "chain": kind, "lam": lam, "nfe": nfe, "seeds": seeds}
        found.append(case | figures)
        print(
            f"{kind:5}lam {lam:g}  nfe {nfe:<8g}{seeds:4} trees  {name:20} bias of log Z "
            f"{bias:+.4f} ± {error:.4f}  variance {float(gap.var()):.4f}  E[Z]/Z {z:.4f} ± "
            f"{z_error:.4f}  ESS {float(result.ess.mean()):.0f}"
            f"  ({time.process_time() - began:.0f} s)",
            flush=True,
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small numbers, under a minute")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    header()
    print("noise seed 0; every repetition has its own keys\n")
    rows = unbiased(40, 50) if quick else unbiased(200, 600)
    print()
    if quick:
        found = trees(12, 10_000, "vp", LAM, list(TREES))
    else:
        found = trees(256, 10_000, "vp", LAM, list(TREES))
        found += trees(256, 10_000, "flow", LAM, GOAL)
        found += trees(64, 10_000, "vp", 2 * LAM, list(TREES))
        found += trees(256, 100_000, "vp", LAM, GOAL)
        found += trees(64, 100_000, "vp", LAM, ("published", "importance"))
    even = {
        nfe: [
            abs(v["bias"])
            for v in found
            if v["name"] in GOAL and v["nfe"] == nfe and v["lam"] == LAM
        ]
        for nfe in (10_000, 100_000)
    }
    finish(
        {
            "max_z": max(abs(r["z"]) for r in rows),
            "comparisons": len(rows),
            "largest_relative_error": max(r["error"] for r in rows),
            "dts_bias_1e4": max(even[10_000]),
            "dts_bias_1e5": max(even[100_000], default=None),
            "log_z": found,
        }
    )


if __name__ == "__main__":
    main()
