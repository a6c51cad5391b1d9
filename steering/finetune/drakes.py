"""DRAKES: tune a chain of tokens to a differentiable reward, through relaxed paths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from steering.core import Model
from steering.discrete import TokenProcess
from steering.finetune.loop import (
    Figures,
    Tuned,
    accelerator_of,
    adam,
    check_counts,
    check_numbers,
    copied,
    fit,
    frozen,
)
from steering.finetune.path_kl import published_kl, relaxable, watched
from steering.noise import child_key, root_key
from steering.pipelines import from_pipeline

_GB = 2**30


def drakes(
    pipe: Any,
    reward: Any,
    *,
    alpha: float,
    prompts: Sequence[Any] | None = None,
    steps: int = 64,
    truncate: int = 25,
    tau: float = 1.0,
    straight_through: str = "end",
    kl: str = "path",
    batch: int = 32,
    accumulate: int = 1,
    updates: int = 1000,
    lr: float = 1e-4,
    warmup: int = 0,
    clip: float = 1.0,
    checkpointing: bool = True,
    every: int = 50,
    seed: int = 0,
    out: str | Path | None = None,
    progress: bool = True,
) -> Tuned:
    """A copy of a token pipeline, tuned to a reward while it stays close to what it was.

        max_θ  E[reward(x_T)] - alpha · KL(paths under θ || paths before)

    whose optimum draws from p_before(x) · exp(reward(x) / alpha). The last `truncate` steps are
    relaxed, z = softmax((log p + Gumbel noise) / tau), and states stay soft from step to step; the
    gradient runs back through them all. Earlier steps are hard draws.

    The KL is the one of the paths, summed over tokens exactly at the states that are met: of each
    step KL(p_θ(· | x_i) || p_before(· | x_i)), which is nothing at unmasked sites and, at masked
    ones, their share of masks times the probability to be unmasked times the KL of the guesses. At
    relaxed steps its gradient also runs back through the states. At hard ones it is that of the
    step alone: that θ also decides which hard states are met (the part that a score function would
    estimate) is left out, like all that the reward owes to them: with truncate below T tuning stops
    short of the optimum. A hot relaxation goes beyond it, since soft steps unmask sooner than the
    chain does: alpha is true to its units for small tau, and "path_kl" in the history says what the
    chain itself has moved. `benchmarks.drakes_optimum` measures both.

    What runs on several processes (`accelerate launch`) averages their gradients: each draws a
    batch of its own. Mixed precision is what accelerate says, "bf16" or none.

    Args:
        pipe: a token pipeline, `SequencePipeline` or of its form. It is left as it is, and is what
            the KL is to. One in half precision is tuned in float32.
        reward: (weights over tokens [N, L, K], prompts) -> [N], differentiable.
        alpha: weight of the KL: reward per nat. 0 leaves it out.
        prompts: R of them, as in `from_pipeline`; paths take them in turns.
        steps: T.
        truncate: last steps that are relaxed; T if it is more.
        tau: temperature of relaxed steps: 1 as published, noisier and nearer to the chain below.
        straight_through: where tokens are hard forwards, with the gradient of the soft ones: "end",
            once, for the reward; "step", after every step; "none".
        kl: "path", or "published", the weighting of the released code (`published_kl`), under which
            alpha means something else and hard states cost nothing.
        batch: paths of one backward pass, on each process.
        accumulate: backward passes to an update.
        updates: how many.
        lr: Adam's learning rate.
        warmup: updates over which alpha rises from 0.
        clip: longest gradient.
        checkpointing: keep states only, and compute a step again when its gradient is due.
        every: updates between two checkpoints, at which some paths of the chain itself are drawn.
        seed: of all noise.
        out: folder for checkpoints, history.jsonl and the settings; a run that was stopped goes on
            from there, with the very same end.
        progress: print the memory it will take, and show a bar.

    Returns:
        The tuned pipeline and a history: "reward" and "kl" of relaxed paths, "alpha", "rewards"
        (how many were asked), what `Tuned` lists; and at checkpoints "drawn_reward", "path_kl" and
        "path_kl_error" of the chain itself.

    Raises:
        TypeError: a reward without a gradient, before the first update.
        ValueError: another argument that cannot be.
        NotFiniteError: several updates in a row were not finite. It has what came before.

    Paper: Wang et al., "Fine-tuning discrete diffusion models via reward optimization with
    applications to DNA and protein design", arXiv 2410.13643.
    """
    from tqdm.auto import tqdm

    check_counts(
        truncate=truncate, batch=batch, accumulate=accumulate, updates=updates, every=every
    )
    check_numbers(alpha=alpha, warmup=warmup)
    check_numbers(tau=tau, lr=lr, clip=clip, above=True)
    for name, value, known in (
        ("straight_through", straight_through, ("end", "step", "none")),
        ("kl", kl, ("path", "published")),
    ):
        if value not in known:
            raise ValueError(f"{name}={value!r} is unknown: give {' or '.join(map(repr, known))}.")
    mine, network, original = copied(pipe)
    before = from_pipeline(pipe, prompts, steps=steps)
    tuned = from_pipeline(mine, prompts, steps=steps)
    process = relaxable(tuned)
    if kl == "published" and process.states == process.tokens:
        raise ValueError("kl='published' is a weighting by masks, and this chain has none.")
    accelerator = accelerator_of(tuned.device)
    conditions = len(tuned.prompts)
    paths = Paths(
        tuned,
        before if alpha > 0 else None,
        min(truncate, process.steps),
        tau,
        straight_through,
        kl,
        checkpointing,
    )
    free = [p for p in network.parameters() if p.requires_grad]
    _check_reward(reward, tuned, min(batch, 2))

    def gradient(number: int) -> Figures:
        weight = alpha * min(1.0, (number + 1) / warmup) if warmup else float(alpha)
        means, counts = dict[str, float](), dict[str, int]()
        for part in range(accumulate):
            first = (number * accumulate + part) * accelerator.num_processes
            index = (first + accelerator.process_index) * batch + torch.arange(batch)
            row, key = index % conditions, root_key(seed, index).to(tuned.device)
            seen = _backward(paths, free, reward, row, key, weight, accumulate, accelerator)
            for name, value in seen.means.items():
                means[name] = means.get(name, 0.0) + value / accumulate
            for name, count in seen.counts.items():
                counts[name] = counts.get(name, 0) + count
        return Figures(means, counts)

    def watch() -> Figures:
        x, row, means = watched(tuned, before, seed, accelerator)
        with torch.no_grad():
            items, asked = tuned.decode(x), [tuned.prompts[r] for r in row.tolist()]
            drawn = torch.as_tensor(reward(items, asked)).double().mean()
        return Figures({"drawn_reward": float(drawn)} | means, {})

    told = {
        "method": "drakes", "model": before.name, "prompts": tuned.prompts, "alpha": alpha,
        "steps": steps, "truncate": truncate, "tau": tau, "straight_through": straight_through,
        "kl": kl, "batch": batch, "accumulate": accumulate, "warmup": warmup, "seed": seed,
        "precision": accelerator.mixed_precision,
    }  # fmt: skip
    with frozen(original):
        if progress and accelerator.is_main_process:
            tqdm.write(predicted_memory(paths, network, original, batch))
        return fit(
            mine,
            network,
            gradient,
            watch,
            told,
            adam(network, lr),
            updates=updates,
            clip=clip,
            every=every,
            out=out,
            progress=progress,
            advice="Look at the reward of such sequences, lower lr, or raise alpha.",
            accelerator=accelerator,
        )


@dataclass(frozen=True, eq=False)
class Paths:
    """Relaxed paths of a model that is tuned, and how they are made; see `drakes`.

    Args:
        tuned: the model.
        before: the same chain with the weights as they were; None, no KL is wanted.
        truncate: last steps that are relaxed, 1 .. T.
        tau, straight_through, kl, checkpointing: as in `drakes`.
    """

    tuned: Model
    before: Model | None
    truncate: int
    tau: float = 1.0
    straight_through: str = "end"
    kl: str = "path"
    checkpointing: bool = True

    @property
    def process(self) -> TokenProcess:
        return relaxable(self.tuned)

    @property
    def first(self) -> int:
        """The first step that is relaxed."""
        return self.process.steps - self.truncate

    def start(
        self, row: Tensor, key: Tensor, spend: Callable[[Tensor], None] | None = None
    ) -> Tensor:
        """States [N, L] before the first relaxed step, drawn hard, without gradients.

        Args:
            row: [N] int64 conditions, on the CPU.
            key: [N] int64 noise keys, on the device.
            spend: is given the KL [N] of each step, with its gradient, as soon as it is there, so
                that nothing of a step need be kept.
        """
        x = self.process.prior(child_key(key, self.process.steps))
        # under the published weighting hard states have no KL
        costs = spend is not None and self.before is not None and self.kl == "path"
        for i in range(self.first):
            with torch.set_grad_enabled(costs):
                law, apart = self._laws(x, i, row, costs)
            if costs and spend is not None:
                spend(apart)
            x = law.sample(child_key(key, i))
        return x

    def end(self, x: Tensor, row: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Items [N, L, K] that relaxed steps lead to from states x, and the KL [N] of these."""
        x = self.process.weights(x)
        total = x.new_zeros(len(x))
        for i in range(self.first, self.process.steps):
            # no gradient runs through the first state, yet the weights want theirs
            if self.checkpointing:
                x, apart = checkpoint(
                    self.step, x, i, row, key, use_reentrant=False, preserve_rng_state=False
                )  # type: ignore[misc]
            else:
                x, apart = self.step(x, i, row, key)
            total = total + apart
        items = x[..., : self.process.tokens]
        return hardened(items) if self.straight_through == "end" else items, total

    def step(self, x: Tensor, i: int, row: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Relaxed states [N, L, V] one step on from x, and the KL [N] of the step.

        The noise is keyed, so that the step is the same when it is computed again.
        """
        law, apart = self._laws(x, i, row, self.before is not None)
        x = law.rsample(child_key(key, i), self.tau)
        return hardened(x) if self.straight_through == "step" else x, apart

    def _laws(self, x: Tensor, i: int, row: Tensor, costs: bool):
        process = self.process
        at = torch.full((len(x),), i, device=x.device)
        t = process.time(at)
        log_p = self.tuned.denoiser.log_probs(x, t, row)  # type: ignore[attr-defined]
        law = process.transition(x, at, log_p)
        if not costs:
            return law, log_p.new_zeros(len(x))
        assert self.before is not None
        log_q = self.before.denoiser.log_probs(x, t, row)  # type: ignore[attr-defined]
        if self.kl == "published":
            return law, published_kl(process, x, at, log_p, log_q)
        return law, law.kl(process.transition(x, at, log_q))

    def rows(self, n: int) -> tuple[int, int]:
        """Network rows, forwards and backwards, of the gradient of n paths."""
        both = self.before is not None
        early = self.first * (1 + (both and self.kl == "path"))
        relaxed = self.truncate * (1 + both) * (1 + self.checkpointing)
        back = self.first * (both and self.kl == "path") + self.truncate
        back += (self.truncate - 1) * both  # the first relaxed state has no gradient to run to
        return n * (early + relaxed), n * back


class _Hardened(torch.autograd.Function):
    """The likeliest token, exactly one-hot; gradients pass as if it were the weights."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor) -> Tensor:
        return torch.zeros_like(weights).scatter_(-1, weights.argmax(-1, keepdim=True), 1.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def hardened(weights: Tensor) -> Tensor:
    """One-hot [.., V] of the largest weight; the gradient is straight through to the weights."""
    hard: Any = _Hardened.apply(weights)
    return hard


def _backward(
    paths: Paths,
    free: list[nn.Parameter],
    reward: Any,
    row: Tensor,
    key: Tensor,
    alpha: float,
    share: int,
    accelerator: Any,
) -> Figures:
    """Add the gradient of one batch in the weights `free`, and in no others, divided by `share`."""
    n = len(row)
    spent: list[float | Tensor] = []

    def spend(apart: Tensor) -> None:
        (alpha / share * apart.mean()).backward(inputs=free)
        spent.append(apart.detach().mean())

    with accelerator.autocast():
        x = paths.start(row, key, spend)
        items, apart = paths.end(x, row, key)
    asked = [paths.tuned.prompts[r] for r in row.tolist()]
    r = reward(items, asked)
    mean = r.mean()
    loss = alpha * apart.mean() - mean
    if bool(torch.isfinite(loss)):
        (loss / share).backward(inputs=free)
    kl = float(sum(spent) + apart.detach().mean())
    gained = float(mean.detach())
    forward, backward = paths.rows(n)
    means = {"loss": alpha * kl - gained, "reward": gained, "alpha": alpha}
    if paths.before is not None:
        means["kl"] = kl
    return Figures(means, {"forward": forward, "backward": backward, "rewards": n})


def predicted_memory(paths: Paths, network: nn.Module, original: nn.Module, batch: int) -> str:
    """What the most memory will be, in words; see `predicted_bytes`."""
    kept, states, step = (part / _GB for part in predicted_bytes(paths, network, original, batch))
    return (
        f"predicted peak memory: {kept + states + step:.3g} GB, the reward's own aside: {kept:.2g} "
        f"weights and moments, {states:.2g} states, {step:.2g} steps that are open at a time"
    )


def predicted_bytes(
    paths: Paths, network: nn.Module, original: nn.Module, batch: int
) -> tuple[int, int, int]:
    """Bytes at the peak: weights and their moments, states on the way, steps open at a time.

    One relaxed step of one path is taken, and what autograd keeps of it is counted; the rest is
    arithmetic.
    """
    process, device = paths.process, paths.tuned.device
    weights = {p.data_ptr() for net in (network, original) for p in net.parameters()}
    seen: dict[int, int] = {}

    def note(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return saved

    key = root_key(0, torch.arange(1, device=device))
    x = process.weights(process.prior(key)).requires_grad_(True)
    row = torch.zeros(1, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
        made = paths.step(x, process.steps - 1, row, key)
    del made
    size = sum(p.numel() * p.element_size() for p in network.parameters())
    # the weights, their gradients and two moments, and the weights as they were
    kept = 4 * size + sum(p.numel() * p.element_size() for p in original.parameters())
    open_at_a_time = 1 if paths.checkpointing else paths.truncate
    states = batch * paths.truncate * x.numel() * x.element_size()
    return kept, states, batch * open_at_a_time * sum(seen.values())


def _check_reward(reward: Any, model: Model, n: int) -> None:
    """Ask once about uniform guesses: is it [n], with a gradient?

    Raises:
        TypeError: it is not.
    """
    if isinstance(reward, type) or not callable(reward):
        raise TypeError(f"reward={reward!r}: give a function (items, prompts) -> [N].")
    process = relaxable(model)
    shape = (n, process.length, process.tokens)
    items = torch.full(shape, 1 / process.tokens, device=model.device, requires_grad=True)
    r = reward(items, [model.prompts[k % len(model.prompts)] for k in range(n)])
    if not isinstance(r, Tensor) or not r.requires_grad:
        raise TypeError(
            "reward returned a value without a gradient in the items: drakes follows gradients. "
            "finetune.distill tunes to any reward, from weighted draws of a sampler."
        )
    if r.shape != (n,):
        raise TypeError(f"reward returned {list(r.shape)} for {n} items: give one each, [{n}].")
