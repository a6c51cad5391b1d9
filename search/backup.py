"""What a node is worth, given its visible children: three means of growing severity.

All of them commute with a shift of the scores, so that a tree may be rebased on its best reward.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable

import torch

from search.select import WIDE

Backup = Callable[[array, array], float]  # (score [n], log_ratio [n]) -> the parent's score


def log_mean_exp(score: array, log_ratio: array) -> float:
    """log mean_c exp(score_c + log_ratio_c): the soft value under the unguided chain, times λ."""
    n = len(score)
    if n == 1:
        return score[0] + log_ratio[0]
    if n <= WIDE:
        both = [s + r for s, r in zip(score, log_ratio, strict=True)]
        top = max(both)
        return top + math.log(sum([math.exp(b - top) for b in both]) / n)
    both = _wide(score) + _wide(log_ratio)
    return float(both.logsumexp(0)) - math.log(n)


def mean(score: array, log_ratio: array) -> float:
    """The mean weighted by exp(log_ratio): what the soft value tends to for λ -> 0."""
    weight = _wide(log_ratio).softmax(0)
    return float((weight * _wide(score)).sum())


def maximum(score: array, log_ratio: array) -> float:
    """The best child: the soft value for λ -> inf, whatever its edge weighs."""
    return max(score) if len(score) <= WIDE else float(_wide(score).max())


def _wide(values: array) -> torch.Tensor:
    return torch.frombuffer(values, dtype=torch.float64)
