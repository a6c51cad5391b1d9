"""Tune a chain of tokens to weighted draws: the way for rewards without a gradient."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steering.digest import digest
from steering.discrete import denoising_loss
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
from steering.finetune.path_kl import token_chain, watched
from steering.noise import child_key, root_key, uniform
from steering.pipelines import from_pipeline


def distill(
    pipe: Any,
    tokens: Tensor,
    log_weights: Tensor | None = None,
    *,
    rows: Tensor | None = None,
    prompts: Sequence[Any] | None = None,
    steps: int = 64,
    batch: int = 64,
    updates: int = 1000,
    lr: float = 1e-4,
    clip: float = 1.0,
    every: int = 50,
    seed: int = 0,
    out: str | Path | None = None,
    progress: bool = True,
) -> Tuned:
    """A copy of a token pipeline, tuned to draw what weighted sequences draw from.

        min_θ  Σ_n w_n · E[bound on -log p_θ(tokens_n)],    Σ_n w_n = 1 for every condition

    with the bound of `denoising_loss`, for a masked chain the weighted cross-entropy of masked
    sites. No gradient of a reward is needed: the weights carry it. Draws of p_before ·
    exp(lam · reward), as tree sampling gives them, teach a model whose own draws are such, without
    searching. Sequences are drawn into batches by their weights.

    Several processes and mixed precision are as in `drakes`.

    Args:
        pipe: a token pipeline, `SequencePipeline` or of its form, left as it is.
        tokens: [N, L] int64, ordinary tokens: of a `Result`, `result.items.argmax(-1)`.
        log_weights: [N] log weights, normalised over each condition; -inf is weight 0. None: equal.
        rows: [N] int64, which of the prompts each belongs to; None: the first.
        prompts: R of them, as in `from_pipeline`.
        steps: T, of the chain whose bound is lowered.
        batch: sequences of an update, on each process.
        updates: how many.
        lr: Adam's learning rate.
        clip: longest gradient.
        every: updates between two checkpoints, at which some paths are drawn.
        seed: of what is drawn.
        out: folder for checkpoints, as in `drakes`.
        progress: show a bar.

    Returns:
        The tuned pipeline and a history of what `Tuned` lists; at checkpoints also "path_kl" and
        "path_kl_error" to the pipeline that was given.

    Raises:
        ValueError: an argument that cannot be: the first sequence that does not fit, by number.
        NotFiniteError: several updates in a row were not finite. It has what came before.

    Papers: Tang et al., "wd1: Weighted policy optimization for reasoning in diffusion language
    models", arXiv 2507.08838; Tang et al., "TR2-D2: Tree search guided trajectory-aware fine-tuning
    for discrete diffusion", arXiv 2509.25171.
    """
    check_counts(batch=batch, updates=updates, every=every)
    check_numbers(lr=lr, clip=clip, above=True)
    mine, network, original = copied(pipe)
    before = from_pipeline(pipe, prompts, steps=steps)
    tuned = from_pipeline(mine, prompts, steps=steps)
    process, conditions = token_chain(tuned), len(tuned.prompts)
    if rows is None:
        rows = torch.zeros(len(tokens), dtype=torch.int64)
    _check_sequences(tokens, rows, process.length, process.tokens, conditions)
    _check_kept(tokens, rows, getattr(tuned.denoiser, "fixed", None))
    reached = _shares(log_weights, rows).cumsum(0)
    accelerator = accelerator_of(tuned.device)

    def guess_for(row: Tensor):
        return lambda x, i: tuned.denoiser(x, process.time(i), row)

    def gradient(number: int) -> Figures:
        first = (number * accelerator.num_processes + accelerator.process_index) * batch
        key = root_key(seed, first + torch.arange(batch))
        u = uniform(key) * reached[-1]
        pick = torch.searchsorted(reached, u, right=True).clamp(max=len(tokens) - 1)
        row, clean = rows[pick], tokens[pick].to(tuned.device)
        key = key.to(tuned.device)
        # one step from each of `batch` equal parts of the path: less noise than steps at random
        spread = (uniform(child_key(key, 0)) + torch.arange(batch, device=key.device)) / batch
        i = (spread * process.steps).long().clamp(max=process.steps - 1)
        with accelerator.autocast():
            bound = denoising_loss(process, guess_for(row), clean, i, child_key(key, 1))
        loss = bound.mean()
        if bool(torch.isfinite(loss)):
            loss.backward()
        return Figures({"loss": float(loss.detach())}, {"forward": batch, "backward": batch})

    def watch() -> Figures:
        return Figures(watched(tuned, before, seed, accelerator)[2], {})

    told = {
        "method": "distill", "model": before.name, "prompts": tuned.prompts, "steps": steps,
        "data": [digest(t) for t in (tokens, rows, reached)], "batch": batch, "seed": seed,
        "precision": accelerator.mixed_precision,
    }  # fmt: skip
    with frozen(original):
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
            advice="Lower lr.",
            accelerator=accelerator,
        )


def _shares(log_weights: Tensor | None, rows: Tensor) -> Tensor:
    """[N] float64 probabilities of sequences to be taken; conditions that have any are equal.

    Raises:
        ValueError: weights that are nan, or too large, or nothing at all for a condition.
    """
    if log_weights is None:
        log_weights = torch.zeros(len(rows))
    if log_weights.shape != rows.shape:
        raise ValueError(
            f"log_weights has shape {list(log_weights.shape)}: give one for each of {len(rows)}."
        )
    log_w = log_weights.detach().double().cpu()
    if bool((log_w.isnan() | (log_w == torch.inf)).any()):
        raise ValueError("log_weights has nan or inf: give numbers, or -inf for weight 0.")
    shares = torch.zeros_like(log_w)
    for r in rows.unique().tolist():
        of_row = rows == r
        if bool((log_w[of_row] == -torch.inf).all()):
            raise ValueError(f"log_weights: the sequences of prompt {r} have no weight at all.")
        shares[of_row] = log_w[of_row].softmax(0)
    return shares / shares.sum()


def _check_sequences(tokens: Tensor, rows: Tensor, L: int, K: int, conditions: int) -> None:
    """ValueError for sequences that are none of a chain of L sites and K tokens."""
    if not isinstance(tokens, Tensor) or tokens.dtype != torch.int64 or tokens.ndim != 2:
        what = (
            f"{tokens.dtype} {list(tokens.shape)}"
            if isinstance(tokens, Tensor)
            else type(tokens).__name__
        )
        raise ValueError(f"tokens is {what}: give tokens [N, {L}] int64.")
    if tokens.shape[1] != L or not len(tokens):
        raise ValueError(f"tokens has shape {list(tokens.shape)}: give [N, {L}], N from 1 on.")
    wrong = ((tokens < 0) | (tokens >= K)).any(1).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f"tokens: sequence {wrong[0]} has {int(tokens[wrong[0]].max())} or less than 0: give "
            f"tokens 0 to {K - 1} ({len(wrong)} of {len(tokens)} sequences have others)."
        )
    if rows.shape != (len(tokens),) or rows.dtype != torch.int64:
        raise ValueError(f"rows has shape {list(rows.shape)}: give [{len(tokens)}] int64.")
    if bool(((rows < 0) | (rows >= conditions)).any()):
        raise ValueError(f"rows: give 0 to {conditions - 1}, numbers of prompts.")


def _check_kept(tokens: Tensor, rows: Tensor, fixed: Tensor | None) -> None:
    """ValueError for a sequence that has something else where its prompt keeps a token."""
    if fixed is None:
        return
    kept = fixed.cpu()[rows.cpu()]
    other = ((kept >= 0) & (kept != tokens.cpu())).any(1).nonzero().flatten().tolist()
    if other:
        raise ValueError(
            f"tokens: sequence {other[0]} is not what prompt {int(rows[other[0]])} keeps "
            f"({len(other)} of {len(tokens)} such sequences)."
        )
