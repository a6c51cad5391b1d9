"""May the network's Jacobian be skipped? A model is asked."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from steering.core import Model
from steering.guidance.scoring import score
from steering.noise import child_key, root_key

UNSAFE = 0.5


def jacobian_cosine(
    model: Model,
    reward: Any,
    *,
    samples: int = 8,
    seed: int = 0,
    steps: Sequence[int] | None = None,
) -> Tensor:
    """How well ∇_c r(c) points along ∇_x r(c(x)), along unguided walks of the model.

        cosine_i = mean over walks of  ∇_c r · ∇_x r / (|∇_c r| |∇_x r|)    at the states of step i

    1 where the network's Jacobian is a positive multiple of the identity, as on a straight flow;
    near 0 where it says nothing of the way that is followed. The gain of a small move along ∇_c r
    is the cosine times that of one as long along the true gradient, so that below one half skipping
    loses most of it, and it is advised against; below 0 it loses reward.

    Costs `samples` network rows for each step of the chain, differentiated at those measured, and
    as many differentiated reward calls; walks over conditions in turn.

    Args:
        model: what is steered.
        reward: differentiable, (items, prompts) -> [N].
        samples: walks; all at once in memory.
        seed: of the walks' noise.
        steps: at which to measure; None is all.

    Returns:
        [T] float32 mean cosines on the CPU, one per step of the chain, or per entry of `steps`; nan
        where no walk has both gradients (a guess that does not depend on the state has none).

    Warns:
        UserWarning: the mean over steps is below one half: use jacobian="full", or DPS.

    Raises:
        ValueError: no samples; steps off the chain.
        TypeError: a model of tokens.
    """
    Model.check(model)
    total = model.process.steps
    asked = list(range(total)) if steps is None else list(steps)
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ValueError(f"samples={samples!r}: give a whole number >= 1.")
    if not asked or not set(asked) <= set(range(total)):
        raise ValueError(f"steps={steps!r}: give step indices from 0 to {total - 1}.")
    row = torch.arange(samples) % len(model.prompts)
    key = child_key(root_key(seed, row), torch.arange(samples)).to(model.device)
    x = model.process.prior(key)
    if not x.is_floating_point():
        raise TypeError(
            f"{model.name} is a model of tokens, whose two gradients cannot be compared: compare "
            "the ESS of runs with Twist(jacobian='skip') and 'full'."
        )
    found: dict[int, Tensor] = {}
    for at in range(max(asked) + 1):
        i = torch.full_like(key, at)
        if at in asked:
            clean, found[at] = _cosine(model, reward, x, i, row)
        else:
            with torch.no_grad():
                clean = model.denoiser(x, model.process.time(i), row)
        x = model.process.transition(x, i, clean).sample(child_key(key, i))
    cosine = torch.stack([found[at].nanmean() for at in asked]).cpu()
    mean = float(cosine.nanmean())
    if mean < UNSAFE:
        warnings.warn(
            f"{model.name}: skipping the network's Jacobian is unsafe here, its gradient and the "
            f"true one have a mean cosine of {mean:.2f}. Use jacobian='full', or DPS.",
            stacklevel=2,
        )
    return cosine


def _cosine(model: Model, reward: Any, x: Tensor, i: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
    """Clean guesses [N, *D] of states x [N, *D], and cosines [N] float32 of the two gradients."""
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        clean = model.denoiser(x, model.process.time(i), row)
        prompts, decode = [model.prompts[r] for r in row.tolist()], model.preview or model.decode
        value = score(reward, clean, prompts, decode, guidance="jacobian_cosine")
        skipped, true = torch.autograd.grad(value.sum(), (clean, x), materialize_grads=True)
    skipped, true = skipped.flatten(1).double(), true.flatten(1).double()
    # 0 / 0 is nan: no direction has no cosine
    cosine = (skipped * true).sum(1) / (skipped.norm(dim=1) * true.norm(dim=1))
    return clean.detach(), cosine.float()
