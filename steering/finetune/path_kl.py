"""How far one chain of tokens is from another: the KL divergence of their whole paths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steering.core import Model
from steering.discrete import MaskedProcess, TokenProcess
from steering.finetune.loop import check_counts
from steering.noise import child_key, root_key
from steering.pipelines import from_pipeline

_WATCHED = 64  # paths of the chain itself, drawn at each checkpoint


class Estimate(NamedTuple):
    """A mean over independent draws."""

    mean: float
    error: float  # standard error of the mean


def path_kl(
    tuned: Any,
    before: Any,
    *,
    prompts: Sequence[Any] | None = None,
    steps: int = 64,
    n: int = 256,
    batch: int = 64,
    seed: int = 0,
) -> Estimate:
    """KL(paths of `tuned` || paths of `before`) in nats, over n paths of the chain itself.

        Σ_i E_{x_i ~ tuned} KL(p_tuned(x_{i+1} | x_i) || p_before(x_{i+1} | x_i))

    The KL of each step is summed over tokens exactly; only states are drawn. It is a bound on the
    KL of what the chains end in.

    Args:
        tuned, before: token pipelines; or models of one chain, which have prompts and steps
            already.
        prompts, steps: as in `from_pipeline`; the R prompts take turns.
        n: paths drawn.
        batch: paths drawn at a time.
        seed: of the draws.

    Raises:
        ValueError: models of different chains, too few paths, or a pipeline that has no tokens.
    """
    check_counts(n=n, batch=batch)
    if n < 2:
        raise ValueError(f"n={n}: one path has no standard error, give 2 or more.")
    one, other = (
        m if isinstance(m, Model) else from_pipeline(m, prompts, steps=steps)
        for m in (tuned, before)
    )
    a, b, conditions = token_chain(one), token_chain(other), len(one.prompts)
    same = type(a) is type(b) and a.tokens == b.tokens and a.length == b.length
    if not same or conditions != len(other.prompts):
        raise ValueError("tuned and before have different tokens, lengths or numbers of prompts.")
    if not torch.equal(a.level, b.level):
        raise ValueError(f"tuned has {a.steps} steps and before {b.steps}, or another schedule.")
    index = torch.arange(n)
    parts = [
        hard_paths(one, other, part % conditions, root_key(seed, part))[1]
        for part in index.split(batch)
    ]
    return estimate(torch.cat(parts))


def estimate(values: Tensor) -> Estimate:
    """Mean of independent values [n], and its standard error."""
    return Estimate(float(values.mean()), float(values.std() / len(values) ** 0.5))


@torch.no_grad()
def hard_paths(tuned: Model, before: Model, row: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Ends [N, L] of N paths of `tuned`, and the KL [N] float64 to `before` along each.

    Args:
        tuned, before: models of one chain.
        row: [N] int64 conditions, on the CPU.
        key: [N] int64 noise keys, on the CPU.
    """
    process, key = token_chain(tuned), key.to(tuned.device)
    x = process.prior(child_key(key, process.steps))
    apart = torch.zeros(len(key), dtype=torch.float64, device=tuned.device)
    for i in range(process.steps):
        at = torch.full_like(key, i)
        t = process.time(at)
        law = process.transition(x, at, tuned.denoiser(x, t, row))
        apart += law.kl(process.transition(x, at, before.denoiser(x, t, row)))
        x = law.sample(child_key(key, i))
    return x, apart


def watched(
    tuned: Model, before: Model, seed: int, accelerator: Any
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Ends [64, L] of paths of a chain that is tuned, their conditions, and "path_kl" of them with
    its standard error, to the chain as it was."""
    index = torch.arange(_WATCHED)
    row = index % len(tuned.prompts)
    with accelerator.autocast():
        x, apart = hard_paths(tuned, before, row, root_key(seed, -1 - index))
    kl, error = estimate(apart)
    return x, row, {"path_kl": kl, "path_kl_error": error}


def published_kl(
    process: TokenProcess, x: Tensor, i: Tensor, log_p: Tensor, before: Tensor
) -> Tensor:
    """The weighting of the released code of DRAKES, [N]; not a KL of paths.

        Σ_sites (1 - x_mask) Σ_v x_v (p_v log(p_v / q_v) - p_v + q_v) / m_i

    over sites where the mask has the largest weight. It weighs by what is *un*masked and has no
    size of a step: a state without relaxed sites gets exactly 0.

    Args:
        process: a masked chain.
        x: [N, L] states, or [N, L, K + 1] relaxed ones.
        i: [N] steps.
        log_p, before: [N, L, K] log-probabilities p and q of the clean tokens, of all sites.
    """
    weights = process.weights(x)
    masked = weights.argmax(-1) == process.tokens
    p, q = log_p.exp(), before.exp()
    drift = (weights[..., :-1] * (p * (log_p - before) - p + q)).sum(-1)
    per_site = torch.where(masked, (1 - weights[..., -1]) * drift, 0.0)
    return per_site.sum(1) / process.level[i].to(per_site)


def token_chain(model: Model) -> TokenProcess:
    """The chain of a model of tokens; ValueError if it is none, or its denoiser cannot be asked."""
    if not isinstance(model.process, TokenProcess):
        raise ValueError(f"{model.name} is no model of tokens: give a pipeline of sequences.")
    return model.process


def relaxable(model: Model) -> TokenProcess:
    """The chain of a model whose states can be relaxed; ValueError if they cannot."""
    process = token_chain(model)
    if isinstance(process, MaskedProcess) and process.remask:
        raise ValueError(
            f"remask={process.remask}: relaxed paths need a chain that does not mask again; set it "
            "to 0 on the scheduler of what is tuned, and back for sampling."
        )
    if not hasattr(model.denoiser, "log_probs"):
        kind = type(model.denoiser).__name__
        raise ValueError(f"denoiser is a {kind} without log_probs: see TokenDenoiser.")
    return process
