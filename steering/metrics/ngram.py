"""How likely a text is by counts of characters: a judge of texts that no network can be fitted to.

Witten and Bell 1991, "The zero-frequency problem", IEEE Transactions on Information Theory 37(4).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class NGram:
    """Interpolated counts of the characters that follow n - 1 others.

        p_n(c | h) = (count(h c) + distinct(h) · p_{n-1}(c | h')) / (count(h) + distinct(h))

    h' is h without its first character, distinct(h) how many characters were seen after h; below
    the single characters lies the uniform law over those seen.

    Args:
        order: n.
        counts: of every run of 1 .. n characters.
        after: of every run of 0 .. n - 1 characters, how many characters followed it.
        distinct: and how many different ones.
    """

    order: int
    counts: Counter[str]
    after: Counter[str]
    distinct: Counter[str]

    @classmethod
    def fit(cls, texts: Sequence[str], order: int = 5) -> NGram:
        """Count.

        Raises:
            ValueError: an order below 1, or no character to count.
        """
        if type(order) is not int or order < 1:
            raise ValueError(f"order={order!r}: give a whole number of characters, 1 or more.")
        if isinstance(texts, str) or not any(texts):
            raise ValueError("texts: give a list of texts that are not all empty.")
        counts = Counter(
            text[k : k + n] for text in texts for n in range(1, order + 1)
            for k in range(len(text) - n + 1)
        )  # fmt: skip
        after, distinct = Counter(), Counter()
        for run, count in counts.items():
            after[run[:-1]] += count
            distinct[run[:-1]] += 1
        return cls(order, counts, after, distinct)

    def surprise(self, text: str) -> Tensor:
        """-log2 p of each character given those before it, bits, [len(text)] float64.

        A character that was never seen has infinitely many.
        """
        bits = torch.zeros(len(text), dtype=torch.float64)
        for k, c in enumerate(text):
            p = 1 / self.distinct[""] if c in self.counts else 0.0
            for n in range(min(k, self.order - 1) + 1):
                h = text[k - n : k]
                if h in self.after:
                    d = self.distinct[h]
                    p = (self.counts[h + c] + d * p) / (self.after[h] + d)
            bits[k] = -math.log2(p) if p > 0 else math.inf
        return bits
