"""Which child to go down to: Boltzmann draws with their probability, and upper confidence bounds.

A node's children come as flat arrays, in the order in which they became visible. Narrow nodes are
done in plain Python, wide ones in torch: at 32 children the two cost the same.
"""

from __future__ import annotations

import math
from array import array

import torch

WIDE = 32


def boltzmann(
    score: array, log_ratio: array, u: float, eps: float, beta: float
) -> tuple[int, float]:
    """Draw child c of n with q(c) = (1 - eps)·softmax(beta·(score + log_ratio))(c) + eps/n.

    Args:
        score: [n] float64, finite: λ(v_c - r_ref).
        log_ratio: [n] float64, finite: log p - log q of the edge to each child.
        u: uniform on (0, 1).
        eps: share of uniform selection; bounds a weight 1 / (n q) by 1 / eps.
        beta: flattens the values; eps = 0 with beta = 1 is the published rule.

    Returns:
        The child's position, and log(n q): minus what the selection adds to the log path weight.
    """
    n = len(score)
    if n == 1:
        return 0, 0.0
    if n <= WIDE:
        both = [s + r for s, r in zip(score, log_ratio, strict=True)]
        top = max(both)
        weight = [math.exp(beta * (b - top)) for b in both]
        scale = (1 - eps) / sum(weight)
        left, chosen = u, n - 1
        for position, w in enumerate(weight):
            left -= scale * w + eps / n
            if left < 0:
                chosen = position
                break
        q = scale * weight[chosen] + eps / n
    else:
        both = torch.frombuffer(score, dtype=torch.float64) + torch.frombuffer(
            log_ratio, dtype=torch.float64
        )
        law = both.mul_(beta).softmax(0).mul_(1 - eps).add_(eps / n)
        chosen = min(int(torch.searchsorted(law.cumsum(0), u)), n - 1)
        q = float(law[chosen])
    # rounding may leave u beyond the last weight: what it hits instead may have no probability
    return chosen, math.log(n * q) if q > 0 else 0.0


def upper_confidence(score: array, visits: array, width: float) -> int:
    """The child with the largest score + width·sqrt(log N / N_c), the first of equals.

    UCT (Kocsis and Szepesvari 2006, "Bandit based Monte-Carlo planning") on the values of a tree.

    Args:
        score: [n] float64 values of the children.
        visits: [n] float64 >= 1, rollouts through each child, those in flight included.
        width: c_uct times the spread of the rewards, in the units of `score`.

    Returns:
        The child's position.
    """
    n = len(score)
    if n == 1:
        return 0
    if n <= WIDE:
        reach = width * math.sqrt(math.log(max(sum(visits), 1.0)))
        bound = [s + reach / math.sqrt(v) for s, v in zip(score, visits, strict=True)]
        return bound.index(max(bound))
    seen = torch.frombuffer(visits, dtype=torch.float64)
    reach = width * math.sqrt(math.log(max(float(seen.sum()), 1.0)))
    return int((torch.frombuffer(score, dtype=torch.float64) + reach * seen.rsqrt()).argmax())
