"""Do samplers draw from the law they claim? A chain of three steps on nine states, enumerated.

Two sites of three tokens; each step keeps a token, takes a guessed one or a random one, and the
guesses are tables that tie the sites together. One condition of one seed is one independent
repetition, weighed by its own Ẑ; z = (estimate - truth) / standard error over repetitions, for
Ẑ / Z and for the probability of every state. Tree sampling with path weights is not exactly
unbiased (how many children a node has may depend on their values): its figures stand apart.

    python -m benchmarks.finite_chain [--quick]
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor

from benchmarks.report import finish, header
from samplers import SMC, Importance, TreeSampling, sample
from steering.core import Model
from tests.exact import FiniteChain, finite_chain
from tests.exact.estimates import average, ratio

TABLE = torch.linspace(-1, 2, 6, dtype=torch.float64).view(2, 3)


def reward(items: Tensor, _: object) -> Tensor:
    """Of token probabilities [N, 2, 3]: a sum over sites and one pair."""
    return (items * TABLE).sum((1, 2)) + 1.5 * items[:, 0, 0] * items[:, 1, 1]


def repetitions(sampler, seed: int, repeats: int, nfe: int | None) -> tuple[Tensor, Tensor]:
    """Ẑ / Z [repeats], and the probability of every state [repeats, states] by its own weights."""
    model = finite_chain(conditions=repeats)
    result = sample(model, reward, sampler, nfe=nfe, seed=seed, batch=4096, progress=False)
    chain, log_w = exact(model)
    state = chain.index(result.items.argmax(-1))
    share = torch.zeros(repeats, len(log_w), dtype=torch.float64)
    share.index_put_((result.rows, state), result.weights, accumulate=True)
    return (result.log_z - log_w.logsumexp(0)).exp(), share


def exact(model: Model) -> tuple[FiniteChain, Tensor]:
    """The chain, and log p(state) + λ reward(state)."""
    chain = model.process
    assert isinstance(chain, FiniteChain)
    return chain, chain.law().log() + reward(model.decode(chain.states()), None)


def scores(sampler, seeds: int, repeats: int, nfe: int | None = None) -> tuple[list[float], float]:
    """z of Ẑ / Z and of every state's probability; the largest standard error."""
    began = time.process_time()
    parts = [repetitions(sampler, seed, repeats, nfe) for seed in range(seeds)]
    z, share = (torch.cat(column) for column in zip(*parts, strict=True))
    found = [(average(z), 1.0)]
    for s, p in enumerate(exact(finite_chain())[1].softmax(0)):
        found.append((ratio(z * share[:, s], z), float(p)))
    values = [(estimate - truth) / error for (estimate, error), truth in found]
    (estimate, error), _ = found[0]
    print(
        f"{sampler}\n    Z/Z {estimate:.4f} ± {error:.4f}  z "
        + " ".join(f"{v:+.2f}" for v in values)
        + f"  ({time.process_time() - began:.0f} s)",
        flush=True,
    )
    return values, max(e for (_, e), _ in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small numbers, under a minute")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    header()
    seeds, repeats, k = (1, 100, 40) if quick else (4, 400, 50)
    print(f"noise seeds 0..{seeds - 1}, {repeats} repetitions each, {k} walks or particles\n")
    values, errors = [], []
    samplers = [Importance(k)]
    samplers += [
        SMC(k, potential, levels=(1, 2), ess=ess)
        for potential in ("difference", "max", "add")
        for ess in (0.9, 1.0)
    ]
    for sampler in samplers:
        z, error = scores(sampler, seeds, repeats)
        values += z
        errors.append(error)
    tree, _ = scores(TreeSampling(branch=(1, 2)), seeds, repeats, 3 * k)
    published, _ = scores(TreeSampling(law="published", branch=(1, 2)), seeds, repeats, 3 * k)
    print(f"\n{len(values)} comparisons of unbiased estimates")
    finish(
        {
            "max_z": max(abs(v) for v in values),
            "comparisons": len(values),
            "largest_error": max(errors),
            "dts_path_max_z": max(abs(v) for v in tree),
            "dts_published_max_z": max(abs(v) for v in published),
        }
    )


if __name__ == "__main__":
    main()
