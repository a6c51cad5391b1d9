"""What the training scripts of the built-in masked models share: bound, loop, what is kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from steering.models.sequence_denoiser import SequenceDenoiser
from steering.models.sequence_pipeline import SequencePipeline
from steering.models.token_scheduler import TokenScheduler
from steering.zoo.training import fit, seeded


def masked_bound(
    denoiser: nn.Module, x: Tensor, rng: torch.Generator, label: Tensor | None = None
) -> Tensor:
    """[N] nats: an estimate of each sequence's bound -log p(x) <= E[1/t sum of CE at the masked].

    A site is masked with probability t; t is stratified over the batch, in (0, 1].

    Args:
        denoiser: a `SequenceDenoiser`, whose mask is the token after the ordinary ones.
        x: [N, L] int64.
        rng: of t and of the masks.
        label: [N] int64, where it takes class labels.
    """
    n, mask = len(x), denoiser.config["tokens"]  # type: ignore[index]
    t = (torch.arange(n) + 1 - torch.rand(n, generator=rng)) / n
    masked = torch.rand(x.shape, generator=rng) < t[:, None]
    with torch.autocast("cpu", torch.bfloat16):
        logits = denoiser(x.masked_fill(masked, mask), class_labels=label).logits
    return (cross_entropy(logits.float().mT, x, reduction="none") * masked).sum(1) / t


def fit_masked(
    build: Callable[[], SequenceDenoiser],
    batch_of: Callable[[Tensor], tuple[Tensor, Tensor | None]],
    rows: int,
    alphabet: str,
    length: int,
    out: Path,
    minutes: float,
    peak: float,
    rng: torch.Generator,
    seed: int,
) -> None:
    """Train a masked denoiser for so many minutes, and keep it as a `SequencePipeline` in float16.

    Args:
        build: makes the network; `seed` seeds its weights.
        batch_of: rows [BATCH] -> their tokens [n, length] int64, and labels [n] or None; draws from
            `rng` only.
        rows, out, minutes, peak, rng: as in `training.fit`.
        alphabet, length: of the pipeline.
    """
    denoiser = seeded(build, seed)

    def loss(numbers: Tensor) -> Tensor:
        x, label = batch_of(numbers)
        return masked_bound(denoiser, x, rng, label).mean() / length

    def save(weights: dict[str, Tensor]) -> None:
        averaged = build()
        averaged.load_state_dict(weights)
        scheduler = TokenScheduler(len(alphabet))
        SequencePipeline(averaged.half(), scheduler, alphabet, length).save_pretrained(out)

    fit(denoiser, loss, rows, save, out, minutes, peak, rng)
