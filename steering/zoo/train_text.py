"""Train the built-in text model: a masked network of 64 characters of the King James Bible.

    apt-get install bible-kjv
    bible -f gen1:1-rev22:21 > DIR/kjv.txt
    python -m steering.zoo.train_text --data DIR --minutes 40 --out DIR

Every tenth chapter is held out and written beside the weights. The length is wall time, because
the learning rate decays to zero over it; started again with the same `--out`, it goes on.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch
from torch import Tensor

from steering.models.sequence_denoiser import SequenceDenoiser
from steering.zoo.sequence_training import fit_masked

ALPHABET = " abcdefghijklmnopqrstuvwxyz,.;:?'!"
LENGTH = 64
PEAK_LR = 2e-3
SENTENCE_STARTS = 8  # a sentence's start comes up so much more often than another word's


def chapters(path: Path) -> tuple[list[str], list[str]]:
    """The chapters to train on and the held-out ones, every tenth, in the letters of `ALPHABET`.

    Args:
        path: a verse on a line, "Ge1:1 In the beginning ...".
    """
    found: dict[str, list[str]] = {}
    for line in path.read_text(encoding="ascii").splitlines():
        verse, text = line.split(" ", 1)
        text = re.sub(f"[^{ALPHABET}]", "", text.lower().replace("-", " "))
        found.setdefault(verse.split(":")[0], []).append(" ".join(text.split()))
    every = [" ".join(verses) for verses in found.values()]
    return [c for k, c in enumerate(every) if k % 10 != 5], every[5::10]


def tokens_of(text: str) -> Tensor:
    """[L] int64: where each character is in `ALPHABET`."""
    return torch.tensor([ALPHABET.index(c) for c in text])


def windows(texts: list[str], sentence_starts: int) -> tuple[Tensor, Tensor]:
    """The texts' tokens [C] int8 on end, and starts [M] of windows that stay within one text.

    Every word's start comes up once, every sentence's `sentence_starts` times more.
    """
    starts, begin = [], 0
    for text in texts:
        last = len(text) - LENGTH
        words = [0, *(m.end() for m in re.finditer(" ", text))]
        sentences = [0, *(m.end() for m in re.finditer(r"[.?!] ", text))]
        starts += [begin + k for k in words + sentence_starts * sentences if k <= last]
        begin += len(text)
    return tokens_of("".join(texts)).to(torch.int8), torch.tensor(starts)


def build_denoiser() -> SequenceDenoiser:
    """The network: eight blocks of 192 channels at every character, 1.24 million parameters."""
    return SequenceDenoiser(tokens=len(ALPHABET), width=192, depth=8, kernel=5)


def train(data: Path, minutes: float, out: Path, seed: int) -> None:
    """Train for so many minutes of wall time, this and earlier starts together."""
    torch.set_num_threads(1)
    rng = torch.Generator().manual_seed(seed)
    texts, held_out = chapters(data / "kjv.txt")
    out.mkdir(parents=True, exist_ok=True)
    (out / "held_out.txt").write_text("\n".join(held_out) + "\n")
    characters, starts = windows(texts, SENTENCE_STARTS)
    along = torch.arange(LENGTH)

    def batch_of(rows: Tensor) -> tuple[Tensor, None]:
        return characters[starts[rows][:, None] + along].long(), None

    fit_masked(
        build_denoiser, batch_of, len(starts), ALPHABET, LENGTH, out, minutes, PEAK_LR, rng, seed
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds kjv.txt")
    parser.add_argument("--minutes", type=float, default=40.0, help="wall time, resumes included")
    parser.add_argument("--out", type=Path, required=True, help="pipeline folder to write")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    train(args.data, args.minutes, args.out, args.seed)


if __name__ == "__main__":
    main()
