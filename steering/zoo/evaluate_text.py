"""Judge the built-in text model and its judge by chapters that neither was trained on.

    python -m steering.zoo.evaluate_text [--n 256] [--seed 0]

prints the bound on the bits per character of held-out windows; how the model's own texts, whole
ones and ones that begin as asked, compare with such windows under counts of characters, known words
and the judge; and some of the texts. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shlex
import statistics
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steering import zoo
from steering.metrics import NGram
from steering.zoo.sequence_training import masked_bound
from steering.zoo.train_text import LENGTH, windows

PROMPTS = ("in the beginning ", "and the king ", "behold, i will ")
SHOWN = 4


@dataclass(frozen=True)
class Check:
    """What no text is steered by: most of the held-out chapters, as counts and as a list of words.

    Args:
        counts: of their characters.
        words: that they know.
        unseen: the other held-out chapters, for comparison.
    """

    counts: NGram
    words: frozenset[str]
    unseen: list[str]

    @classmethod
    def load(cls) -> Check:
        """Of the built-in chapters three in four, and every fourth left out."""
        chapters = zoo.held_out_text()
        rest = [chapter for k, chapter in enumerate(chapters) if k % 4]
        words = frozenset(word for chapter in rest for word in words_of(chapter))
        return cls(NGram.fit(rest), words, chapters[::4])

    def bits(self, text: str, skip: int = 0) -> float:
        """Bits per character after the first `skip`, given those."""
        return float(self.counts.surprise(text)[skip:].mean())

    def known(self, text: str, skip: int = 0) -> float:
        """Share of the words after the first `skip` characters that are known."""
        words = words_of(text[skip:])[:-1]  # the last one may be cut off
        return sum(word in self.words for word in words) / max(1, len(words))


def words_of(text: str) -> list[str]:
    """What is between spaces and punctuation."""
    return "".join(c if c.isalpha() else " " for c in text).split()


def held_out_windows(chapters: list[str], n: int, seed: int) -> Tensor:
    """[n, 64] int64 tokens of different windows of these chapters that start with a word."""
    characters, starts = windows(chapters, 0)
    rng = torch.Generator().manual_seed(seed)
    starts = starts[torch.randperm(len(starts), generator=rng)[:n]]
    return characters[starts[:, None] + torch.arange(LENGTH)].long()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--n", type=int, default=256, help="texts of each kind")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    out, n = sys.stdout, args.n
    out.write(f"command: python -m steering.zoo.evaluate_text {shlex.join(sys.argv[1:])}\n")
    out.write(f"machine: {platform.machine()}, one thread of torch {torch.__version__}\n")
    pipe, judge, check = zoo.load("text"), zoo.load("text-judge"), Check.load()
    rng = torch.Generator().manual_seed(args.seed)

    x = held_out_windows(zoo.held_out_text(), 16 * n, args.seed)
    with torch.no_grad():
        bits = torch.cat([masked_bound(pipe.denoiser, part, rng) for part in x.split(64)])
    bits = bits.double() / LENGTH / math.log(2)
    error = bits.std() / len(bits) ** 0.5
    out.write(f"bound: {bits.mean():.3f} bits per character, standard error {error:.3f}, ")
    out.write(f"of {len(x)} held-out windows\n\n")
    result: dict[str, Any] = {"bound": bits.mean().item(), "bound_error": error.item(), "n": n}

    kinds: dict[str, list[tuple[str, int]]] = {}  # texts and how many characters were given
    real = held_out_windows(check.unseen, n, args.seed)
    kinds["held-out windows"] = [(text, 0) for text in pipe.write(real)]
    texts = [pipe([None] * 64, generator=rng).sequences for _ in range(0, n, 64)]
    kinds["written"] = [(text, 0) for part in texts for text in part][:n]
    for prompt in PROMPTS:
        part = pipe([prompt] * (n // 4), generator=rng).sequences
        kinds[repr(prompt)] = [(text, len(prompt)) for text in part]
    out.write("texts                     bits  known words  mean log p  median log p\n")
    for name, given in kinds.items():
        with torch.inference_mode():
            log_p = judge(pipe.read([text for text, _ in given])).log_softmax(1)[:, 1]
        row = {
            "bits": statistics.mean(check.bits(*each) for each in given),
            "known_words": statistics.mean(check.known(*each) for each in given),
            "log_p": log_p.mean().item(),
            "median_log_p": log_p.median().item(),
        }
        result[name] = row
        out.write(f"{name:24} {row['bits']:5.2f} {row['known_words']:12.3f} {row['log_p']:11.3f} ")
        out.write(f"{row['median_log_p']:13.3f}\n")
    for name, given in kinds.items():
        out.write(f"\n{name}\n" + "".join(f"  {text!r}\n" for text, _ in given[:SHOWN]))
    out.write(f"\n{json.dumps(result)}\n")


if __name__ == "__main__":
    main()
