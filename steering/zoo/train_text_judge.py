"""Train the built-in judge of texts: which of two classes do 64 characters belong to?

    python -m steering.zoo.train_text_judge --data DIR --out DIR

Class 1 is the King James Bible (`kjv.txt` in DIR, see `steering.zoo.train_text`). Class 0 is, half
of it, what the built-in text model writes around what is left of a window, from nothing to half
of it; a quarter are windows whose words come in another order, and a quarter such with a few
letters changed. A quarter of each class is not shown as it is, but as the model's guess of it when
part is masked: so the judge can be asked on the way, too.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from steering import zoo
from steering.models.sequence_classifier import SequenceClassifier
from steering.zoo.classifier_training import fit_epochs, save_classifier
from steering.zoo.train_text import ALPHABET, LENGTH, SENTENCE_STARTS, chapters, windows

BATCH = 128
PEAK_LR = 2e-3
MASK = len(ALPHABET)
LETTERS = 27  # of the alphabet these are the space and the letters


def build_judge() -> SequenceClassifier:
    """The network: 0.4 million parameters."""
    return SequenceClassifier(
        classes=2, motifs=128, width=9, channels=96, depth=4, tokens=len(ALPHABET), strands=1
    )


def written(pipe: Any, x: Tensor, rng: torch.Generator) -> Tensor:
    """What the model makes of windows x [N, 64], from a step between 0 and half the way on."""
    steps = pipe.scheduler.num_inference_steps
    parts = []
    for part in x.split(64):
        first = int(torch.randint(steps // 2 + 1, (), generator=rng))
        masked = torch.rand(part.shape, generator=rng) < 1 - first / steps
        state = part.masked_fill(masked, MASK)
        for t in pipe.scheduler.timesteps[first:]:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                logits = pipe.denoiser(state).logits
            state = pipe.scheduler.step(logits, t, state, rng, return_dict=False)[0]
        parts.append(state)
    return torch.cat(parts)


def shuffled(x: Tensor, rng: torch.Generator) -> Tensor:
    """Windows x [N, 64] with their words in another order."""
    rows = []
    for row in x.tolist():
        words, word = [], []
        for k in row:
            if k == 0:
                words.append(word)
                word = []
            else:
                word.append(k)
        words.append(word)
        order = torch.randperm(len(words), generator=rng).tolist()
        rows.append([k for w in order for k in (*words[w], 0)][: len(row)])
    return torch.tensor(rows)


def garbled(x: Tensor, rng: torch.Generator) -> Tensor:
    """Windows x [N, 64] with about one to six characters changed to letters or spaces."""
    share = (1 + 5 * torch.rand(len(x), 1, generator=rng)) / x.shape[1]
    other = torch.randint(LETTERS, x.shape, generator=rng)
    return torch.where(torch.rand(x.shape, generator=rng) < share, other, x)


def shown(pipe: Any, x: Tensor, rng: torch.Generator) -> Tensor:
    """Weights [N, 64, K] of windows x [N, 64]: a quarter are guesses of what is masked of them."""
    weights = one_hot(x, len(ALPHABET)).float()
    n = len(x) // 4
    part = x[:n]
    masked = torch.rand(part.shape, generator=rng) < torch.rand(n, 1, generator=rng)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        guess = pipe.denoiser(part.masked_fill(masked, MASK)).logits.float().softmax(-1)
    weights[:n] = torch.where(masked[..., None], guess, weights[:n])
    return weights


def separation(judge: SequenceClassifier, real: Tensor, other: Tensor) -> float:
    """Share of pairs of a real window and another that are told apart, at random one half."""
    with torch.inference_mode():
        a, b = (judge(x)[:, 1] - judge(x)[:, 0] for x in (real, other))
    return (a[:, None] > b).double().mean().item()


def train(data: Path, out: Path, samples: int, epochs: int, seed: int) -> None:
    torch.set_num_threads(1)
    rng = torch.Generator().manual_seed(seed)
    pipe = zoo.load("text")
    texts, held_out = chapters(data / "kjv.txt")
    characters, starts = windows(texts, SENTENCE_STARTS)
    unseen, unseen_starts = windows(held_out, SENTENCE_STARTS)
    along = torch.arange(LENGTH)

    def draw(n: int) -> Tensor:
        at = starts[torch.randint(len(starts), (n,), generator=rng)]
        return characters[at[:, None] + along].long()

    at = unseen_starts[torch.randint(len(unseen_starts), (1024,), generator=rng)]
    real = unseen[at[:, None] + along].long()
    kinds = {
        "written": written(pipe, real, rng),
        "shuffled": shuffled(real, rng),
        "garbled": garbled(real, rng),
    }
    own = written(pipe, draw(samples), rng)
    quarter = BATCH // 4
    label = torch.tensor([1, 1, 0, 0]).repeat(quarter)

    def loss_of(rows: Tensor) -> Tensor:
        half = quarter // 2
        bad = torch.cat([shuffled(draw(half), rng), garbled(draw(quarter - half), rng)])
        # in turn, so that the quarter that is shown as guesses holds some of each
        x = torch.stack([draw(quarter), draw(quarter), own[rows], bad], 1).flatten(0, 1)
        return cross_entropy(judge(shown(pipe, x, rng)), label)

    def watch(epoch: int) -> dict[str, float]:
        # watched, never selected on
        return {name: round(separation(judge, real, x), 4) for name, x in kinds.items()}

    # weights and dropout draw from the global generator: seed it here, and leave it as it was
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        judge = build_judge()
        lines = fit_epochs(judge, loss_of, samples, quarter, epochs, PEAK_LR, 1e-2, rng, watch)
    save_classifier(judge, lines, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds kjv.txt")
    parser.add_argument("--samples", type=int, default=8000, help="windows that the model writes")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    train(args.data, args.out, args.samples, args.epochs, args.seed)


if __name__ == "__main__":
    main()
